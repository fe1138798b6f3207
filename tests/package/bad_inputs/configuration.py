"""Settings of a model that no model has."""

from huggingface_hub.errors import StrictDataclassClassValidationError as Misfit
from huggingface_hub.errors import StrictDataclassFieldValidationError as WrongType

from bad_inputs import Bad
from tarflow_hf import TarFlowConfig, TarFlowInverseConfig


def config(name, error, message, **settings):
    """A row: a configuration of these settings."""
    return Bad(name, lambda _: TarFlowConfig(**settings), error, message)


def inverse(name, error, message, **settings):
    """A row: a configuration of a learned inverse with these settings."""
    flow = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
    return Bad(name, lambda _: TarFlowInverseConfig(flow=flow, **settings), error, message)


ROWS = [
    config("num_block", ValueError, "'num_block', did you mean 'num_blocks'", num_block=4),
    config("patchsize", ValueError, "'patchsize', did you mean 'patch_size'", patchsize=4),
    config("nose_std", ValueError, "'nose_std', did you mean 'noise_std'", nose_std=0.1),
    config("nothing near", ValueError, "has no argument 'xyzzy'$", xyzzy=1),
    config("a method's name", ValueError, "has no argument 'to_dict'", to_dict=1),
    config("another model's type", ValueError, "model_type must be 'tarflow', got 'bert'", model_type="bert"),
    config("labels beside classes", ValueError, "num_labels must be num_classes=0, got 3", num_labels=3),
    config("classes without end", ValueError, "num_classes must be at most", num_classes=2**40),
    config("an image without end", Misfit, "image_size must be at least 1.* at most", image_size=2**40),
    config("a width without end", Misfit, "hidden_size must be at most", hidden_size=2**40),
    config("layers without end", Misfit, "layers_per_block must be", layers_per_block=2**40),
    config("a list too long", Misfit, r"layers_per_block must be .*got \[1, 1", layers_per_block=[1] * 100_000),
    config("blocks of text", WrongType, "num_blocks", num_blocks="4"),
    config("half a block", WrongType, "num_blocks", num_blocks=1.5),
    config("noise of text", WrongType, "noise_std", noise_std="0.1"),
    config("unknown noise", WrongType, "noise_type", noise_type="pink"),
    config("noise without end", Misfit, "noise_std must be finite", noise_std=float("inf")),
    config("levels that fall", Misfit, "noise_range must be two rising", noise_range=(0.3, 0.1)),
    config("a name for a class that is not", Misfit, "id2label must name the ids", num_classes=1, id2label={5: "cat"}),
    inverse("an inverse's misspelt width", ValueError, "'hidden_sise', did you mean 'hidden_size'", hidden_sise=64),
    inverse("an inverse of another type", ValueError, "must be 'tarflow_inverse', got 'bert'", model_type="bert"),
    inverse("too few layers", Misfit, "num_layers must be more than the 2 blocks of the flow, got 2", num_layers=2),
    inverse("an inverse without end", Misfit, "num_layers must be .* at most", num_layers=2**40),
    inverse("heads that do not fit", Misfit, "hidden_size=96 must be even and a multiple", hidden_size=96),
    inverse("guidance below none", Misfit, "max_guidance_scale must be .* got 0.5", max_guidance_scale=0.5),
    inverse("a fingerprint cut short", Misfit, "a finite number for each of the 2 blocks", flow_fingerprint=[1.0]),
    inverse("steps below none", Misfit, "num_training_steps must be at least 0", num_training_steps=-1),
]
