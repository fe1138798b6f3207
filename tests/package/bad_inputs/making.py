"""Arguments that pipelines, models and configurations are made and loaded by; the files are sound."""

import shutil

import torch
from conftest import tiny_model
from inverse_models import tiny_inverse

from bad_inputs import Bad, saved_pipeline
from tarflow_hf import TarFlowConfig, TarFlowInverseConfig, TarFlowModel, TarFlowPipeline
from tarflow_hf.flow.sampling.one_pass import InverseMismatchError


def pipeline(name, message, **arguments):
    """A row: a sound pipeline is loaded with these arguments."""
    return Bad(
        f"pipeline loaded with {name}",
        lambda parent: TarFlowPipeline.from_pretrained(saved_pipeline(parent), **arguments),
        ValueError,
        message,
    )


def model(name, message, **arguments):
    """A row: a sound model is loaded with these arguments."""
    return Bad(
        f"model loaded with {name}",
        lambda parent: TarFlowModel.from_pretrained(saved_pipeline(parent) / "transformer", **arguments),
        ValueError,
        message,
    )


def source(value, load):
    """A row: something that is no folder is to be loaded."""
    message = "pretrained_model_name_or_path must be a folder or the name of a Hub repository, got "
    return Bad(f"{load.__self__.__name__} of {value!r}", lambda parent: load(value), ValueError, message)


def made(name, message, transformer=None, **arguments):
    """A row: a pipeline is made of these."""
    return Bad(
        f"pipeline of {name}",
        lambda parent: TarFlowPipeline(transformer or tiny_model(dtype=torch.float32), **arguments),
        ValueError,
        message,
    )


def empty(kind, inside, message):
    """A row: a configuration is read from a folder that has none."""
    return Bad(
        f"{kind.__name__} of {inside}",
        lambda parent: kind.from_pretrained(saved_pipeline(parent) if inside == "a pipeline" else parent),
        OSError,
        message,
    )


NONE = "has no config.json with settings of a "


def saved(name, message, damage=lambda folder: None, **arguments):
    """A row: a pipeline is to be saved over another one, of which nothing may then be changed."""

    def call(parent):
        folder = saved_pipeline(parent)
        damage(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            TarFlowPipeline(tiny_model(dtype=torch.float32, seed=1)).save_pretrained(
                **({"save_directory": folder} | arguments)
            )
        finally:
            assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return Bad(f"save {name}", call, ValueError, message)


def with_weights(change):
    """A row's call: a pipeline with an inverse is changed and saved."""

    def call(folder):
        flow = tiny_model(dtype=torch.float32)
        pipe = TarFlowPipeline(flow, inverse=tiny_inverse(flow))
        change(pipe)
        pipe.save_pretrained(folder / "new")

    return call


def page(text):
    return lambda folder: (folder / "README.md").write_bytes(text)


def blocked(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def file_for_folder(folder):
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").write_text("mine")


ROWS = [
    pipeline("no transformer", "transformer must be a TarFlowModel, got NoneType", transformer=None),
    pipeline("text for a vae", "vae must be an image autoencoder of diffusers, got str", vae="x"),
    pipeline(
        "a layer for an inverse", "^inverse must be a TarFlowInverseModel, got Linear", inverse=torch.nn.Linear(1, 1)
    ),
    pipeline("a number for a type", "dtype must be torch.float32, .* got 5", dtype=5),
    pipeline("8 bits", "dtype must be .* got torch.float8_e4m3fn", dtype=torch.float8_e4m3fn),
    pipeline("a type of no part", "torch_dtype must name parts .* got 'x'", torch_dtype={"x": torch.float16}),
    pipeline("no temperature", "^temperature must be finite .* got None", temperature=None),
    pipeline("no attention", "^attention_temperature must be .* got None", attention_temperature=None),
    pipeline("a size of pixels", "^image_size must be None without vae", image_size=5),
    model("8 bits", "dtype must be .* got torch.float8_e4m3fn", dtype=torch.float8_e4m3fn),
    model("a number for a folder", "subfolder must be a folder, got 5", subfolder=5),
    model("text for a type", "torch_dtype must be .* got 'x'", torch_dtype="x"),
    model("settings of language", "from_pretrained has no argument 'pad_token_id'", pad_token_id=5),
    model("other names", "key_mapping must be None: .*got {'blocks.0'", key_mapping={"blocks.0": "blocks.1"}),
    model("classes in a list", "id2label must name classes by their ids", id2label=["a", "b", "c", "d"]),
    *(source(value, TarFlowPipeline.from_pretrained) for value in (None, 5, b"pipe", [])),
    *(source(value, TarFlowModel.from_pretrained) for value in (5, b"pipe", [])),
    made("text", "transformer must be a TarFlowModel, got str", "x"),
    made("a layer", "transformer must be a TarFlowModel, got Linear", torch.nn.Linear(1, 1)),
    made("a class", "transformer must be a TarFlowModel, got", TarFlowModel),
    made("a number for a vae", "vae must be an image autoencoder of diffusers, got int", vae=5),
    made("text for an inverse", "inverse must be a TarFlowInverseModel, got str", inverse="x"),
    made("no guidance at all", "guidance_scale.* got None", guidance_scale=None),
    made("no schedule", "guidance_schedule.* got None", guidance_schedule=None),
    empty(TarFlowConfig, "an empty folder", NONE + "TarFlowConfig"),
    empty(TarFlowConfig, "a pipeline", NONE + "TarFlowConfig"),
    empty(TarFlowInverseConfig, "an empty folder", NONE + "TarFlowInverseConfig"),
    *(
        Bad(
            f"pipeline moved to {dtype}",
            lambda _, dtype=dtype: TarFlowPipeline(tiny_model(dtype=torch.float32)).to("cpu", dtype),
            ValueError,
            f"dtype must be torch.float32, .* got {dtype}",
        )
        for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64)
    ),
    *(
        Bad(
            f"classes named by {names!r}",
            lambda _, names=names: TarFlowConfig(id2label=names),
            ValueError,
            "id2label must na",
        )
        for names in (["a"], "a", 5, {None: "a"}, {"x": "a"}, {0.5: "a"}, {True: "a"})
    ),
    Bad(
        "a configuration of text for ids",
        lambda _: TarFlowConfig(label2id=5),
        ValueError,
        "label2id must be an object",
    ),
    Bad(
        "a configuration of an unknown type",
        lambda _: TarFlowConfig(dtype="x"),
        ValueError,
        "dtype must be .* got 'x'",
    ),
    *(
        saved(f"over a page {name}", r"pipe/README.md is damaged: .*: mend it, or move it away", page(text))
        for name, text in {
            "that is no text": b"\xff\xfe",
            "of broken YAML": b"---\nfoo: [\n---\n",
            "of a list": b"---\n- a\n---\n",
            "of tags that are a number": b"---\ntags: 5\n---\n",
            "of results that are none": b"---\nmodel-index: 5\n---\n",
        }.items()
    ),
    *(
        saved(f"over a folder {name}", f"pipe/{name} must be a file, .* it is a folder: move it away", blocked(name))
        for name in ("README.md", "pipeline.py", "model_index.json", "transformer/model.safetensors")
    ),
    saved("over a file transformer", "pipe/transformer must be a folder, or not there", file_for_folder),
    *(
        saved(f"to {place!r}", "save_directory must be a folder, got ", save_directory=place)
        for place in (None, 5, "", b"pipe", [])
    ),
    *(
        saved(f"as variant {variant!r}", "variant must be a word of letters, digits and underscores", variant=variant)
        for variant in (5, "", "a.b", "../fp16", "a b")
    ),
    *(
        saved(f"in shards of {size!r}", "max_shard_size must be a number of bytes above 0", max_shard_size=size)
        for size in (0, -1, True, 1.5, [], "20", "x", "0GB")
    ),
    Bad(
        "save an inverse of weights that have changed since",
        with_weights(lambda pipe: torch.nn.init.normal_(pipe.transformer.blocks[0].proj_out.weight)),
        InverseMismatchError,
        "inverse was trained for another flow",
    ),
    Bad(
        "a pipeline of no pipeline", lambda _: TarFlowPipeline.from_pipe(None), ValueError, "must be a pipeline of dif"
    ),
]
