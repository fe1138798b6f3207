"""What a run may start from, train and be conditioned on."""

import torch
from conftest import random_images, tiny_config, tiny_model

from bad_inputs import Bad
from tarflow_hf import adapt
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


ROWS = [
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
]
