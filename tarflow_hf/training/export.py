"""The pipeline in a checkpoint of a training run: to be used at once, or written as a folder of its own."""

import json
from pathlib import Path
from typing import Any, Literal, cast

from tarflow_hf.hub.autoencoders import load_autoencoder
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.checkpoints import latest_checkpoint, read_manifest, read_state
from tarflow_hf.training.latents import flow_config
from tarflow_hf.training.posthoc import FOLDER, posthoc_average
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.run_card import write_page
from tarflow_hf.training.trained_part import add_lora, without_adapters
from tarflow_hf.training.validation import make_pipeline

Weights = Literal["ema", "raw", "posthoc"]

_OF_THE_DATA = ("condition", "arrays")  # parts of a checkpoint's configuration that the model's has too
_TRAINED_BESIDE = {  # by an option of such runs
    "flow": "the inverse of a flow, with a pipeline once it has finished",
    "freeze_encoder": "an autoencoder, which `vae` of a recipe names",
}


def checkpoint_of(place: str | Path) -> Path | None:
    """The checkpoint that a place stands for: its folder itself, or the newest of a run that has no pipeline yet.

    Args:
        place: A folder, or anything else that a pipeline may be called.

    Returns:
        The folder of the checkpoint; None for a pipeline or a name of the Hub.

    Raises:
        FileNotFoundError: If it is the folder of a run without a complete checkpoint.

    Example:
        >>> checkpoint_of("user/model") is None
        True
    """
    folder = Path(place)
    if (folder / "checkpoint.json").is_file():
        return folder
    if not (folder / "checkpoints").is_dir() or (folder / "model_index.json").exists():
        return None
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has neither a pipeline nor a complete checkpoint yet")
    return checkpoint


def read_options(checkpoint: Path) -> tuple[TrainingArguments, list[str]]:
    """The options and the class names that a checkpoint was made with.

    Args:
        checkpoint: Its folder. Checkpoints of version 0.1.0 tell only the options that decide the result.

    Raises:
        ValueError: If it is of a run that trains something else.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.checkpoints import write_checkpoint
        >>> options = {"data": "huggan/AFHQ", "max_steps": 10}
        >>> about = options | {"class_names": ["cat", "dog"], "num_images": 20}
        >>> arguments, names = read_options(write_checkpoint(Path("checkpoints"), 10, {}, about, keep=1))
        >>> arguments.data.data, names
        ('huggan/AFHQ', ['cat', 'dog'])
    """
    read_manifest(checkpoint)  # says what is wrong with it; what follows has the paths as version 0.1.0 wrote them
    about: dict[str, Any] = json.loads((checkpoint / "checkpoint.json").read_text())
    saved = dict(about["configuration"])
    for option, trained in _TRAINED_BESIDE.items():
        if option in saved:
            raise ValueError(
                f"{checkpoint} is of a run that trains {trained}; the run's folder holds what it has made"
            )
    class_names = saved.pop("class_names")
    saved.pop("num_images")
    for name in _OF_THE_DATA:
        saved.pop(name, None)
    options = dict(about.get("options") or saved)
    for name in ("data", "eval_data"):
        if str(options.get(name)).startswith(("./", "../")):  # seen from the folder of the run
            options[name] = str((checkpoint.resolve().parents[1] / options[name]).resolve())
    return make_arguments(options), class_names


def load_pipeline(
    place: str | Path,
    *,
    weights: Weights | None = None,
    ema_length: float | None = None,
    **options: object,
) -> TarFlowPipeline:
    """A pipeline from wherever there is one: a pipeline's folder or Hub name, a checkpoint, or a run under way.

    Args:
        place: What [`checkpoint_of`] finds a checkpoint in; else it is left to `TarFlowPipeline.from_pretrained`.
        weights: Of a checkpoint: `ema`, the average by `ema_decay`; `raw`, those that are trained; `posthoc`, an
            average by a power of time. None: the average where the run keeps one, as at its end.
        ema_length: Relative length of the average for `posthoc`, in (0, 12^-1/2].
        **options: Those of `from_pretrained`; of a checkpoint, `dtype` alone.

    Raises:
        ValueError: If the checkpoint has no such weights, or an option is of no use.
        DamagedCheckpointError: If the checkpoint is not what was written.
        OSError: If there is no pipeline, or it is damaged.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> TarFlowPipeline(transformer=TarFlowModel(config).eval()).save_pretrained("digits")
        >>> load_pipeline("digits").transformer.config.image_size
        8
    """
    checkpoint = checkpoint_of(place)
    if checkpoint is None:
        if weights is not None or ema_length is not None:
            raise ValueError(f"weights={weights!r} chooses among those of a checkpoint, and {place} is a pipeline")
        return TarFlowPipeline.from_pretrained(place, **cast(dict[str, Any], options))
    pipe, _ = _pipeline_of(checkpoint, weights, ema_length)
    return pipe.to(options.pop("dtype")) if options.get("dtype") is not None else pipe


def export(
    checkpoint: str | Path, folder: str | Path, *, weights: Weights | None = None, ema_length: float | None = None
) -> str:
    """Writes the pipeline of a checkpoint into a folder, with its page and recipe; the run may go on meanwhile.

    Args:
        checkpoint: Folder of a checkpoint, or of a run, whose newest one is taken.
        folder: The folder, made if missing.
        weights: As in [`load_pipeline`].
        ema_length: As in [`load_pipeline`].

    Returns:
        What the weights are.

    Raises:
        ValueError: If there is no checkpoint, or it has no such weights.
        DamagedCheckpointError: If it is not what was written.
        FileNotFoundError: If it is of a run on latents and the autoencoder is not in the folder of the run.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.checkpoints import write_checkpoint
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> shape = {"image_size": 8, "num_channels": 1, "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1}
        >>> options = {"data": "huggan/AFHQ", "max_steps": 10, **shape}
        >>> model = TarFlowModel(make_arguments(options).model.to_config(["cat", "dog"]))
        >>> state = {"model": dict(model.named_parameters()), "ema": None, "progress": {"step": 10}}
        >>> about = options | {"class_names": ["cat", "dog"], "num_images": 20}
        >>> export(write_checkpoint(Path("checkpoints"), 10, state, about, keep=1), "cats")
        'as trained, after 10 steps'
        >>> TarFlowPipeline.from_pretrained("cats").transformer.config.id2label
        {0: 'cat', 1: 'dog'}
    """
    run = Path(checkpoint)
    found = checkpoint_of(run) or (latest_checkpoint(run / "checkpoints") if run.is_dir() else None)
    if found is None:
        raise ValueError(f"{checkpoint} must be the folder of a checkpoint, or of a run with checkpoints")
    pipe, what = _pipeline_of(found, weights, ema_length)
    arguments, _ = read_options(found)
    pipe.save_pretrained(folder)
    step = read_manifest(found)["step"]
    write_page(Path(folder), pipe, arguments, about_weights={"weights": what, "steps_taken": step})
    return f"{what}, after {step} steps"


def _pipeline_of(checkpoint: Path, weights: Weights | None, ema_length: float | None) -> tuple[TarFlowPipeline, str]:
    arguments, class_names = read_options(checkpoint)
    saved = read_manifest(checkpoint)["configuration"]
    of_the_data = {name: value for part in _OF_THE_DATA for name, value in saved.get(part, {}).items()}
    vae = None if arguments.data.vae is None else load_autoencoder(str(_autoencoder_of(checkpoint)))
    model = TarFlowModel(flow_config(arguments, class_names, vae, **of_the_data)).eval()
    if arguments.start.lora is not None:
        add_lora(model, arguments.start.lora, trained=set())
    state = read_state(checkpoint)
    weights = weights or ("raw" if state["ema"] is None else "ema")
    if (ema_length is None) == (weights == "posthoc"):
        raise ValueError(f"weights='posthoc' needs an ema_length, and only it, got {weights!r} and {ema_length}")
    if weights == "ema" and state["ema"] is None:
        raise ValueError(f"{checkpoint} has no average of the weights: its recipe has no ema_decay")
    if ema_length is not None:
        folder = checkpoint.resolve().parents[1] / FOLDER
        made = posthoc_average(folder, state["progress"]["step"], state.get("posthoc") or {}, ema_length)
        model.load_state_dict(made.tensors)
        what = f"average of relative length {ema_length}, made of {made.stored} stored ones, error {made.error:.1e}"
    else:
        model.load_state_dict(state["model"] if weights == "raw" else state["ema"]["average"])
        what = "as trained" if weights == "raw" else f"average with decay {arguments.optimization.ema_decay}"
    return make_pipeline(without_adapters(model), arguments.output, vae, arguments.model.image_size), what


def _autoencoder_of(checkpoint: Path) -> Path:
    folder = checkpoint.resolve().parents[1] / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the autoencoder of the run is not in {folder}: put it there, or leave {checkpoint} "
            "in the folder of its run"
        )
    return folder


__all__ = ["Weights", "checkpoint_of", "export", "load_pipeline", "read_options"]
