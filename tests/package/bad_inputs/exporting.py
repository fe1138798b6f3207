"""Checkpoints turned into pipelines."""

from conftest import tiny_config

from bad_inputs import Bad, saved_pipeline
from tarflow_hf import TarFlowModel
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.checkpoints import write_checkpoint
from tarflow_hf.training.export import export, load_pipeline
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.results import check_folder
from tarflow_hf.training.sharding import tensor_state


def checkpoint(folder):
    """A checkpoint of a run without averages."""
    config = tiny_config(num_classes=0)
    names = ("image_size", "num_channels", "patch_size", "hidden_size", "num_blocks", "layers_per_block", "head_dim")
    shape = {name: getattr(config, name) for name in (*names, "mlp_ratio")}
    options = make_arguments({"data": "user/data", "max_steps": 9, "class_conditional": False, **shape}).flat()
    model = TarFlowModel(make_arguments(options).model.to_config([]))
    state = {"model": tensor_state(model), "ema": None, "posthoc": {}, "progress": {"step": 9}}
    configuration = {"class_names": [], "num_images": 1}
    return write_checkpoint(folder / "checkpoints", 9, state, configuration, keep=1, options=options)


def empty_run(folder):
    (folder / "checkpoints").mkdir()
    return folder


def there(folder, name):
    (folder / name).write_text('{"step": 1, "mine": 2}')
    return folder


def there_as_folder(folder, name):
    (folder / name).mkdir(parents=True)
    return folder


def there_as_file(folder, name):
    (folder / name).write_text("mine")
    return folder


def damaged(folder, name, content):
    (folder / "recipe.yaml").write_text("data: x")
    (folder / name).write_bytes(content)
    return folder


ROWS = [
    *(
        Bad(
            f"a folder {name} in the folder of a run",
            lambda f, name=name: check_folder(there_as_folder(f, name)),
            ValueError,
            f"{name} must be a file, or not there, to be written; it is a folder",
        )
        for name in ("README.md", "recipe.yaml", "history.jsonl", "run.lock", "transformer/config.json")
    ),
    *(
        Bad(
            f"a file {name} in the folder of a run",
            lambda f, name=name: check_folder(there_as_file(f, name)),
            ValueError,
            f"{name} must be a folder, or not there, for ",
        )
        for name in ("checkpoints", "transformer")
    ),
    Bad(
        "a file for the folder of a run",
        lambda f: check_folder(there_as_file(f, "run") / "run"),
        ValueError,
        "run must be a folder, or not there",
    ),
    Bad(
        "a page of a run that is no text",
        lambda f: check_folder(damaged(f, "README.md", b"\xff\xfe")),
        ValueError,
        "README.md is damaged",
    ),
    Bad(
        "a history of something else",
        lambda f: check_folder(damaged(f, "history.jsonl", b"[1]\n")),
        ValueError,
        "history.jsonl, line 1, must be an object",
    ),
    *(
        Bad(
            f"a foreign {name} in the folder of a run",
            lambda f, name=name: check_folder(there(f, name)),
            ValueError,
            f"{name} is there already and of no run",
        )
        for name in ("README.md", "metrics.jsonl")
    ),
    Bad(
        "an average that is not kept",
        lambda f: load_pipeline(checkpoint(f), weights="ema"),
        ValueError,
        "no ema_decay",
    ),
    Bad(
        "averages that were not stored",
        lambda f: load_pipeline(checkpoint(f), weights="posthoc", ema_length=0.1),
        ValueError,
        "no posthoc_ema",
    ),
    Bad("no length", lambda f: load_pipeline(checkpoint(f), weights="posthoc"), ValueError, "needs an ema_length"),
    Bad(
        "a length for other weights",
        lambda f: load_pipeline(checkpoint(f), weights="raw", ema_length=0.1),
        ValueError,
        "needs an ema_length, and only it",
    ),
    Bad(
        "a run that has nothing yet",
        lambda f: load_pipeline(empty_run(f)),
        FileNotFoundError,
        "neither a pipeline nor",
    ),
    Bad(
        "weights of a pipeline", lambda f: load_pipeline(saved_pipeline(f), weights="raw"), ValueError, "is a pipeline"
    ),
    Bad("a pipeline to export", lambda f: export(saved_pipeline(f), f / "out"), ValueError, "folder of a checkpoint"),
    Bad(
        "one average alone",
        lambda f: OptimizationArguments(max_steps=1, posthoc_ema=(0.1,)),
        ValueError,
        r"posthoc_ema must hold no length or at least two different ones, got \[0.1\]",
    ),
    Bad(
        "a length beyond the plain mean",
        lambda f: OptimizationArguments(max_steps=1, posthoc_ema=(0.1, 0.3)),
        ValueError,
        r"posthoc_ema must hold lengths in \(0, 0.2886\], got 0.3",
    ),
]
