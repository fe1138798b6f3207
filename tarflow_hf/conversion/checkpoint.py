"""Converts the TarFlow authors' checkpoints (bare state dicts in .pth files) into [`TarFlowModel`]."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from tarflow_hf.configuration_tarflow import NoiseType, TarFlowConfig
from tarflow_hf.conversion.reference_keys import CLASS_KEY, NOISE_KEY, our_name, reference_state_dict
from tarflow_hf.conversion.sizes import checkpoint_config
from tarflow_hf.conversion.tensors import read_tensors
from tarflow_hf.modeling_tarflow import TarFlowModel


def convert_reference_checkpoint(
    path: str | PathLike[str],
    *,
    image_size: int,
    num_channels: int = 3,
    noise_type: NoiseType | None = None,
    noise_std: float | None = None,
    noise_range: tuple[float, float] | None = None,
) -> TarFlowModel:
    """Reads a checkpoint of the TarFlow or iTARFlow authors' code into a [`TarFlowModel`] in evaluation mode.

    All sizes but those of the image are read from the weights. Unless it is given, the noise is read from a file name
    of the authors' form `NAME_model_PATCH_WIDTH_BLOCKS_LAYERS_NOISE.pth`, where NOISE is a standard deviation or
    `uniform`. Weights that embed a noise level (iTARFlow's) make a model with `noise_conditioning`; the range of its
    levels is in no file and has to be given. Dropped on the way: the attention masks, which are all the same, and the
    prior variance `var` of a model that is not volume preserving, which is one.

    Args:
        path: The .pth file. It is read with `weights_only=True`: no code in it is run.
        image_size: Side of the images in pixels.
        num_channels: Channels of the images.
        noise_type: `"gaussian"` or `"uniform"`; None reads it from the file name.
        noise_std: Standard deviation of Gaussian noise in units of the [-1, 1] range; None: from the file name.
        noise_range: Lowest and highest noise level of an iTARFlow checkpoint, in place of the two above.

    Returns:
        The model, float32, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete checkpoint, has an unknown key, lacks one, or has a tensor of another
            shape, of whole or complex numbers, or with a number that is not finite; if the image size does not fit; or
            if the noise is neither given nor in the file name. The message names the file.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> torch.save(reference_state_dict(TarFlowModel(config)), "digits_model_2_64_2_1_0.10.pth")
        >>> model = convert_reference_checkpoint("digits_model_2_64_2_1_0.10.pth", image_size=8, num_channels=1)
        >>> model.config.num_blocks, model.config.hidden_size, model.config.noise_std
        (2, 64, 0.1)
    """
    path = Path(path)
    try:
        state = read_tensors(path)
        noise: dict[str, Any]
        if any(NOISE_KEY.fullmatch(key) for key in state):
            noise = _noise_conditioning(noise_type, noise_std, noise_range)
        else:
            if noise_range is not None:
                raise ValueError(f"noise_range is for checkpoints with noise conditioning, got {noise_range}")
            noise_type, noise_std = _noise(path, noise_type, noise_std)
            noise = {"noise_type": noise_type, "noise_std": noise_std}
        config = checkpoint_config(state, image_size=image_size, num_channels=num_channels, noise=noise)
        model = empty_model(config)
        model.load_state_dict(_converted(state, model), strict=True, assign=True)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return model.eval()


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
        if noise_std:
            raise ValueError(f"noise_std must be left out for noise_type='uniform', got {noise_std}")
        return "uniform", 0.0
    if noise_std is None:
        if match is None or match[1] == "uniform":
            raise ValueError(f"noise_std must be given: the file name {path.name!r} does not carry it")
        noise_std = float(match[1])
    return "gaussian", noise_std


def _noise_conditioning(
    noise_type: NoiseType | None, noise_std: float | None, noise_range: tuple[float, float] | None
) -> dict[str, Any]:
    """What the configuration says on the noise of an iTARFlow checkpoint."""
    if noise_type == "uniform" or noise_std is not None:
        raise ValueError(
            "the checkpoint is conditioned on the noise level: give noise_range in place of "
            f"noise_type={noise_type!r} and noise_std={noise_std}"
        )
    if noise_range is None:
        raise ValueError(
            "the checkpoint is conditioned on the noise level and does not tell its levels: give noise_range, "
            "the lowest and the highest"
        )
    return {"noise_conditioning": True, "noise_range": noise_range}


def empty_model(config: TarFlowConfig) -> TarFlowModel:
    """A model without storage, for weights to be assigned to.

    Args:
        config: Its configuration.

    Example:
        >>> empty_model(TarFlowConfig(image_size=8, hidden_size=64, num_blocks=1, layers_per_block=1)).device
        device(type='meta')
    """
    with torch.device("meta"):
        return TarFlowModel(config)


def _converted(state: dict[str, torch.Tensor], model: TarFlowModel) -> dict[str, torch.Tensor]:
    """The state dict under our names, every key mapped or dropped on purpose, every shape checked."""
    expected = model.state_dict()
    converted = {}
    for key, tensor in state.items():
        name = our_name(key, volume_preserving=model.config.volume_preserving)
        if name is None:
            if key == "var" and not torch.equal(tensor, torch.ones_like(tensor)):
                raise ValueError("var must be one in a model that is not volume preserving, got other values")
            continue
        if name not in expected:
            raise ValueError(f"the checkpoint has the unknown key {key!r}")
        tensor = tensor.squeeze(1) if CLASS_KEY.fullmatch(key) and tensor.ndim > 1 else tensor
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{key} must have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
        converted[name] = tensor.float()
    missing = sorted(set(expected) - set(converted))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, among them the one for {missing[0]!r}")
    return converted


__all__ = ["convert_reference_checkpoint", "empty_model", "reference_state_dict"]
