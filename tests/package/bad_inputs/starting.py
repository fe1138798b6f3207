"""What a run may start from, train and be conditioned on."""

import datasets
import torch
from conftest import random_images, tiny_config, tiny_model
from PIL import Image

from bad_inputs import Bad
from examples import sample
from tarflow_hf import adapt
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import LoraArguments, ModelArguments, StartArguments
from tarflow_hf.training.start import start_model


def start(name, message, **arguments):
    """A row: a tiny run is to start like this."""

    def call(folder):
        start_model(tiny_config(), StartArguments(**arguments), ModelArguments(image_size=8, num_channels=1))

    return Bad(name, call, ValueError, message)


def condition(name, message, values):
    """A row: a model with one number as condition is given these."""

    def call(folder):
        model = tiny_model(condition_dim=1, condition_names=["slant"])
        model.log_prob(random_images(model, 2), condition=values)

    return Bad(name, call, ValueError, message)


def source(name, message, write):
    """A row: a run is to start from what was written to a path that is its own."""

    def call(folder):
        start_model(tiny_config(), StartArguments(init_from=str(write(folder))), ModelArguments(image_size=8))

    return Bad(name, call, ValueError, message)


def text_for_weights(folder):
    (folder / "model.pth").write_text("no weights")
    return folder / "model.pth"


def other_config(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def columns(name, message, values, kind="float32"):
    """A row: a data set's column is to be the condition."""

    def call(folder):
        feature = datasets.List(datasets.Value("float32")) if kind == "list" else datasets.Value(kind)
        features = datasets.Features({"image": datasets.Image(), "slant": feature})
        rows = {"image": [Image.new("L", (8, 8), 9)] * len(values), "slant": values}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
        place = DataArguments(data=str(folder / "a.parquet"), condition_columns=("slant",))
        load_image_data(place, class_conditional=False)

    return Bad(name, call, ValueError, message)


ROWS = [
    source("a text file with the name of weights", r"init_from=.*model\.pth' cannot be converted", text_for_weights),
    source("a model of another kind", "init_from=.* is no model that can be loaded", other_config),
    columns(
        "a condition column with NaN", "row 1 of .*'slant' must hold finite numbers, got nan", [0.0, float("nan")]
    ),
    columns("a condition column with a gap", "row 1 of .*'slant' must hold finite numbers, got None", [0.0, None]),
    columns(
        "a condition column of text", "row 0 of .*'slant' must hold finite numbers, got 'a'", ["a", "b"], "string"
    ),
    columns("a condition that is always the same", "condition_columns: slant has the same value", [0.5, 0.5]),
    columns(
        "lists of changing length as a condition",
        "row 1 of .*: condition_columns must hold 2 numbers as in the first row, got 3",
        [[0.0, 1.0], [1.0, 2.0, 3.0]],
        "list",
    ),
    start("a folder without a model", "init_from='.' is no model: the folder has no", init_from="."),
    start("a path with nothing", "init_from='./gone' is no model: there is nothing", init_from="./gone"),
    start("a pattern that matches nothing", "freeze: the pattern 'block.*", freeze=("block.0.*",)),
    start("everything frozen", r"freeze=\['blocks.\*'\] leaves no parameter", freeze=("blocks.*",)),
    start(
        "targets of another model", r"lora.targets: \['to_q'\] match no linear", lora=LoraArguments(targets=("to_q",))
    ),
    condition("a condition of wrong length", r"condition must be \(2, 1\) .*\(slant\), got", torch.zeros(2, 3)),
    condition("a condition with NaN", "condition must be finite .* in row 1", torch.tensor([[0.0], [float("nan")]])),
    Bad(
        "class names that collide",
        lambda folder: adapt(tiny_model(), class_names=["cat", "cat"]),
        ValueError,
        "class names of the target collide, .*: cat",
    ),
    Bad(
        "a source whose class names collide",
        lambda folder: adapt(tiny_model(num_classes=2, id2label={0: "cat", 1: "cat"}), class_names=["dog"]),
        ValueError,
        "class names of the source collide, .*: cat",
    ),
    *(
        Bad(
            f"adapt to classes {names!r}",
            lambda _, names=names: adapt(tiny_model(), class_names=names),
            ValueError,
            "class_names must be a list of names, or None, got ",
        )
        for names in (5, "ab", {"cat": 1})
    ),
    Bad("adapt nothing", lambda _: adapt(None), ValueError, "model must be a TarFlowModel, got NoneType"),
    Bad("adapters without end", lambda _: LoraArguments(rank=10**6), ValueError, "lora.rank must be .* at most 4096"),
    Bad(
        "adapters of no strength", lambda _: LoraArguments(alpha=float("inf")), ValueError, "lora.alpha must be finite"
    ),
    Bad(
        "no image of a label",
        lambda _: sample.main(["gone", "--num_images_per_label", "0"]),
        ValueError,
        "num_images_per_label must be at least 1, got 0",
    ),
]
