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
        ValueError: If there is no inverse, or it does not fit; the message names what differs.
        OSError: If there is no pipeline.

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
    source = load_pipeline(init_from, dtype=torch.float32).inverse
    if source is None:
        raise ValueError(
            f"init_from={init_from!r} has no inverse: name a pipeline that examples/train_inverse.py made"
        )
    old, new = _shape(source.config), _shape(config)
    changes = [
        f"{name} is {old[name]!r:.80} there and {new[name]!r:.80} here" for name in new if old[name] != new[name]
    ]
    if changes:
        raise ValueError(f"init_from={init_from!r} has an inverse that does not fit: {', '.join(changes)}")
    inverse.load_state_dict(source.state_dict())
    return inverse


def _shape(config: TarFlowInverseConfig) -> dict[str, Any]:
    """What must agree for weights to mean the same."""
    flow = config.flow_config
    own = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "head_dim", "mlp_ratio")}
    of_flow = {name: getattr(flow, name) for name in ("num_blocks", "grid_size", "patch_size", "num_channels")}
    return own | of_flow | {"classes": class_names(flow), "condition_dim": flow.condition_dim}


__all__ = ["start_inverse"]
