"""Converts the TarFlow authors' checkpoints (bare state dicts in .pth files) into TarFlowModel."""

import math
import pickle
import re
from os import PathLike
from pathlib import Path

import torch

from .configuration_tarflow import TarFlowConfig
from .modeling_tarflow import TarFlowModel
from .noise import NoiseType

_LAYER_NAMES = {
    "attention.norm": "attention_norm",
    "attention.qkv": "attention.qkv_proj",
    "attention.proj": "attention.out_proj",
    "mlp.norm": "mlp_norm",
    "mlp.main.0": "mlp.up_proj",
    "mlp.main.2": "mlp.down_proj",
}
_LAYER_KEY = re.compile(
    rf"blocks\.(\d+)\.attn_blocks\.(\d+)\.({'|'.join(map(re.escape, _LAYER_NAMES))})\.(weight|bias)"
)
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(proj_in\.weight|proj_in\.bias|proj_out\.weight|proj_out\.bias)")
_POSITION_KEY = re.compile(r"blocks\.(\d+)\.pos_embed")
_CLASS_KEY = re.compile(r"blocks\.(\d+)\.class_embed")
_MASK_KEY = re.compile(r"blocks\.\d+\.attn_mask")
_HEAD_DIM = 64


def convert_reference_checkpoint(
    path: str | PathLike[str],
    *,
    image_size: int,
    num_channels: int = 3,
    noise_type: NoiseType | None = None,
    noise_std: float | None = None,
) -> TarFlowModel:
    """Reads a checkpoint of the TarFlow authors' code into a [`TarFlowModel`] in evaluation mode.

    All sizes but those of the image are read from the weights. Unless it is given, the noise is read from a file name
    of the authors' form `NAME_model_PATCH_WIDTH_BLOCKS_LAYERS_NOISE.pth`, where NOISE is a standard deviation or
    `uniform`. Dropped on the way: the attention masks, which are all the same, and the prior variance `var` of a model
    that is not volume preserving, which is one.

    Args:
        path: The .pth file. It is read with `weights_only=True`: no code in it is run.
        image_size: Side of the images in pixels.
        num_channels: Channels of the images.
        noise_type: `"gaussian"` or `"uniform"`; None reads it from the file name.
        noise_std: Standard deviation of Gaussian noise in units of the [-1, 1] range; None: from the file name.

    Returns:
        The model, float32, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete checkpoint, has an unknown key, lacks one, or has a tensor of another
            shape; if the image size does not fit; or if the noise is neither given nor in the file name.
    """
    path = Path(path)
    noise_type, noise_std = _noise(path, noise_type, noise_std)
    state = _read(path)
    config = _config(state, image_size=image_size, num_channels=num_channels)
    config.noise_type = noise_type
    config.noise_std = noise_std
    model = _empty_model(config)
    model.load_state_dict(_converted(state, model), strict=True, assign=True)
    return model.eval()


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, read without running code."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not loaded: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete PyTorch checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    return state


def _noise(path: Path, noise_type: NoiseType | None, noise_std: float | None) -> tuple[NoiseType, float]:
    """Noise type and standard deviation, from the arguments or else from the file name."""
    match = re.fullmatch(r".+_model_\d+_\d+_\d+_\d+_(uniform|\d+\.\d+)", path.stem)
    if noise_type is None and noise_std is None and match is None:
        raise ValueError(
            f"the file name {path.name!r} does not carry the noise (NAME_model_PATCH_WIDTH_BLOCKS_LAYERS_NOISE.pth): "
            "give noise_type and noise_std"
        )
    if noise_type is None:
        noise_type = "uniform" if noise_std is None and match and match[1] == "uniform" else "gaussian"
    if noise_type == "uniform":
        return "uniform", 0.0
    if noise_std is None:
        if match is None or match[1] == "uniform":
            raise ValueError(f"noise_std must be given: the file name {path.name!r} does not carry it")
        noise_std = float(match[1])
    return "gaussian", noise_std


def _config(state: dict[str, torch.Tensor], *, image_size: int, num_channels: int) -> TarFlowConfig:
    """The configuration that the shapes of the weights tell."""
    depths: dict[int, int] = {}
    for key in state:
        if match := _LAYER_KEY.fullmatch(key):
            block, layer = int(match[1]), int(match[2])
            depths[block] = max(depths.get(block, 0), layer + 1)
    num_blocks = max(depths, default=-1) + 1
    if sorted(depths) != list(range(num_blocks)) or num_blocks == 0:
        raise ValueError(f"the checkpoint must have the blocks 0, 1, ... without a gap, got {sorted(depths)}")
    hidden_size, patch_dim = _tensor(state, "blocks.0.proj_in.weight", 2).shape
    num_tokens = _tensor(state, "blocks.0.pos_embed", 2).shape[0]
    mlp_width = _tensor(state, "blocks.0.attn_blocks.0.mlp.main.0.weight", 2).shape[0]
    output_dim = _tensor(state, "blocks.0.proj_out.weight", 2).shape[0]
    if output_dim not in (patch_dim, 2 * patch_dim):
        raise ValueError(
            f"blocks.0.proj_out.weight must have {2 * patch_dim} rows, or {patch_dim} if volume preserving, "
            f"got {output_dim}"
        )
    patch_size = math.isqrt(patch_dim // num_channels)
    tokens_per_side = math.isqrt(num_tokens)
    if patch_size**2 * num_channels != patch_dim or tokens_per_side * patch_size != image_size:
        raise ValueError(
            f"image_size={image_size} and num_channels={num_channels} do not fit the checkpoint, which has "
            f"{num_tokens} tokens of {patch_dim} numbers"
        )
    class_embedding = state.get("blocks.0.class_embed")
    layers = [depths[block] for block in range(num_blocks)]
    return TarFlowConfig(
        image_size=image_size,
        num_channels=num_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_blocks=num_blocks,
        layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        head_dim=_HEAD_DIM,
        mlp_ratio=mlp_width // hidden_size,
        num_classes=0 if class_embedding is None else class_embedding.shape[0],
        volume_preserving=output_dim == patch_dim,
    )


def _tensor(state: dict[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    """A tensor that every checkpoint has, by its name and number of dimensions."""
    if key not in state:
        raise ValueError(f"the checkpoint lacks the key {key!r}")
    if state[key].ndim != ndim:
        raise ValueError(f"{key} must have {ndim} dimensions, got shape {tuple(state[key].shape)}")
    return state[key]


def _empty_model(config: TarFlowConfig) -> TarFlowModel:
    """A model without storage, for weights to be assigned to."""
    with torch.device("meta"):
        return TarFlowModel(config)


def _converted(state: dict[str, torch.Tensor], model: TarFlowModel) -> dict[str, torch.Tensor]:
    """The state dict under our names, every key mapped or dropped on purpose, every shape checked."""
    expected = model.state_dict()
    converted, origin = {}, {}
    for key, tensor in state.items():
        name = _name(key, volume_preserving=model.config.volume_preserving)
        if name is None:
            if key == "var" and not torch.equal(tensor, torch.ones_like(tensor)):
                raise ValueError("var must be one in a model that is not volume preserving, got other values")
            continue
        if name not in expected:
            raise ValueError(f"the checkpoint has the unknown key {key!r}")
        tensor = tensor.squeeze(1) if _CLASS_KEY.fullmatch(key) else tensor
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{key} must have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
        converted[name], origin[name] = tensor.float(), key
    missing = sorted(set(expected) - set(converted))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, among them the one for {missing[0]!r}")
    return converted


def _name(key: str, *, volume_preserving: bool) -> str | None:
    """Our name for a key of the authors' state dict; None for what is dropped.

    Raises:
        ValueError: If the key is unknown.
    """
    if key == "var":
        return "prior_variance" if volume_preserving else None
    if _MASK_KEY.fullmatch(key):
        return None
    if match := _LAYER_KEY.fullmatch(key):
        block, layer, module, kind = match.groups()
        return f"blocks.{block}.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    if match := _BLOCK_KEY.fullmatch(key):
        return f"blocks.{match[1]}.{match[2]}"
    if match := _POSITION_KEY.fullmatch(key):
        return f"blocks.{match[1]}.position_embedding"
    if match := _CLASS_KEY.fullmatch(key):
        return f"blocks.{match[1]}.class_embedding.weight"
    raise ValueError(f"the checkpoint has the unknown key {key!r}")


__all__ = ["convert_reference_checkpoint"]
