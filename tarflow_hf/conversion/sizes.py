"""The configuration of a checkpoint of the authors' code, from the names and shapes of its weights."""

import math
from typing import Any

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.conversion.reference_keys import HEAD_DIM, LAYER_KEY


def checkpoint_config(
    state: dict[str, torch.Tensor], *, image_size: int, num_channels: int, noise: dict[str, Any]
) -> TarFlowConfig:
    """The configuration that the shapes of the weights tell.

    Args:
        state: Weights by the authors' names.
        image_size: Side of the images in pixels.
        num_channels: Channels of the images.
        noise: What the configuration says on noise.

    Raises:
        ValueError: If a weight is missing or the shapes do not fit together or the images.
    """
    for name, size in {"image_size": image_size, "num_channels": num_channels}.items():
        if not (type(size) is int and size >= 1):
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    layers = _block_depths(state)
    hidden_size, patch_dim = _tensor(state, "blocks.0.proj_in.weight", 2).shape
    layer_list = "head_blocks" if any(".head_blocks." in key for key in state) else "attn_blocks"
    mlp_width = _tensor(state, f"blocks.0.{layer_list}.0.mlp.main.0.weight", 2).shape[0]
    classes = "blocks.0.class_embed"
    num_classes = _tensor(state, classes, 3).shape[0] if classes in state else 0
    return TarFlowConfig(
        image_size=image_size,
        num_channels=num_channels,
        patch_size=_patch_size(state, patch_dim, image_size=image_size, num_channels=num_channels),
        hidden_size=hidden_size,
        num_blocks=len(layers),
        layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        head_dim=HEAD_DIM,
        mlp_ratio=mlp_width // hidden_size,
        num_classes=num_classes,
        volume_preserving=_is_volume_preserving(state, patch_dim),
        **noise,
    )


def _block_depths(state: dict[str, torch.Tensor]) -> list[int]:
    """Layers of each block."""
    layers: dict[int, set[int]] = {}
    for key in state:
        if match := LAYER_KEY.fullmatch(key):
            layers.setdefault(int(match[1]), set()).add(int(match[2]))
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(f"the checkpoint must have the blocks 0, 1, ... without a gap, got {sorted(layers)[:20]}")
    for block, found_layers in layers.items():
        if sorted(found_layers) != list(range(len(found_layers))):
            last = sorted(found_layers)[-20:]
            raise ValueError(f"block {block} must have the layers 0, 1, ... without a gap, got {last}")
    return [len(layers[block]) for block in range(len(layers))]


def _patch_size(state: dict[str, torch.Tensor], patch_dim: int, *, image_size: int, num_channels: int) -> int:
    """Side of a patch, for images of this size to fit the tokens."""
    num_tokens = _tensor(state, "blocks.0.pos_embed", 2).shape[0]
    patch_size = math.isqrt(patch_dim // num_channels)
    tokens_per_side = math.isqrt(num_tokens)
    if patch_size**2 * num_channels != patch_dim or tokens_per_side * patch_size != image_size:
        raise ValueError(
            f"image_size={image_size} and num_channels={num_channels} do not fit the checkpoint, which has "
            f"{num_tokens} tokens of {patch_dim} numbers"
        )
    return patch_size


def _is_volume_preserving(state: dict[str, torch.Tensor], patch_dim: int) -> bool:
    """Whether the blocks predict a shift alone."""
    output_dim = _tensor(state, "blocks.0.proj_out.weight", 2).shape[0]
    if output_dim not in (patch_dim, 2 * patch_dim):
        raise ValueError(
            f"blocks.0.proj_out.weight must have {2 * patch_dim} rows, or {patch_dim} if volume preserving, "
            f"got {output_dim}"
        )
    return output_dim == patch_dim


def _tensor(state: dict[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    """A tensor that every checkpoint has, by its name and number of dimensions."""
    if key not in state:
        raise ValueError(f"the checkpoint lacks the key {key!r}")
    if state[key].ndim != ndim:
        raise ValueError(f"{key} must have {ndim} dimensions, got shape {tuple(state[key].shape)}")
    return state[key]


__all__ = ["checkpoint_config"]
