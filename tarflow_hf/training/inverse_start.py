"""The inverse that a training run begins with: a new one, or with the weights of another of the same size."""

from typing import Any

import torch

from tarflow_hf.flow.class_names import class_names
from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.hub.inverse_model import TarFlowInverseModel
from tarflow_hf.training.export import load_pipeline


def start_inverse(config: TarFlowInverseConfig, init_from: str | None) -> TarFlowInverseModel:
    """An inverse of a configuration, in float32: with random weights, or those of another pipeline's inverse.

    Another flow of the same shape, another largest guidance scale, other losses and data are a start; another size,
    number of tokens or blocks, condition or list of classes is none, as its weights would mean something else.

    Args:
        config: Of the new inverse.
        init_from: A pipeline with an inverse, its folder or Hub name; None for random weights.

    Raises:
        ValueError: If there is no pipeline with an inverse, or it does not fit; the message names what differs.

    Example:
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)).eval()
        >>> config = TarFlowInverseConfig(flow=flow.config, hidden_size=64, num_layers=3)
        >>> TarFlowPipeline(transformer=flow, inverse=start_inverse(config, None)).save_pretrained("fast")
        >>> start_inverse(config, "fast").config.num_layers
        3
        >>> start_inverse(TarFlowInverseConfig(flow=flow.config, hidden_size=64, num_layers=4), "fast")
        Traceback (most recent call last):
            ...
        ValueError: init_from='fast' has an inverse that does not fit: num_layers is 3 there and 4 here
    """
    inverse = TarFlowInverseModel(config)
    if init_from is None:
        return inverse
    try:
        source = load_pipeline(init_from, dtype=torch.float32).inverse
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={init_from!r} is no pipeline that can be loaded: {error}") from error
    if source is None:
        raise ValueError(
            f"init_from={init_from!r} has no inverse: name a pipeline that examples/train_inverse.py made"
        )
    old, new = _shape(source.config), _shape(config)
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"init_from={init_from!r} has an inverse that does not fit: {name} is {old.get(name)!r} there and "
                f"{new.get(name)!r} here"
            )
    inverse.load_state_dict(source.state_dict())
    return inverse


def _shape(config: TarFlowInverseConfig) -> dict[str, Any]:
    """What must agree for weights to mean the same, by name."""
    flow = config.flow_config
    own = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "head_dim", "mlp_ratio")}
    of_the_flow = (
        "num_blocks grid_size patch_size num_channels condition_dim condition_names condition_mean condition_std"
    ).split()
    classes = {f"class {number}": name for number, name in enumerate(class_names(flow))}
    return own | {name: getattr(flow, name) for name in of_the_flow} | classes


@torch.no_grad()
def set_state_scale(inverse: TarFlowInverseModel, scale: torch.Tensor) -> None:
    """Sets the scales s_k of the states s_k R_k norm(h), and R_k so that the states stay what they were.

    Args:
        inverse: Changed in place.
        scale: (blocks,) s_k, above 0.

    Example:
        >>> flow = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
        >>> inverse = TarFlowInverseModel(TarFlowInverseConfig(flow=flow, hidden_size=64, num_layers=3))
        >>> set_state_scale(inverse, torch.tensor([0.9, 0.5]))
        >>> inverse.state_scale
        tensor([0.9000, 0.5000])
    """
    for projection, factor in zip(inverse.state_out, inverse.state_scale / scale, strict=True):
        for parameter in projection.parameters():
            parameter.mul_(factor)
    inverse.state_scale.copy_(scale)


__all__ = ["set_state_scale", "start_inverse"]
