"""Checks of what a TarFlow model is given: images, latents, labels and noise levels against its configuration."""

from numbers import Integral

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig

ClassLabel = int | str


def check_pixel_values(pixel_values: torch.Tensor, config: TarFlowConfig) -> None:
    """Raises ValueError unless these are floating point images of the model's size."""
    expected = (config.num_channels, config.image_height, config.image_width)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(f"pixel_values must have shape (batch, {expected}), got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}")


def check_latents(latents: torch.Tensor, config: TarFlowConfig, batch: int | None = None) -> None:
    """Raises ValueError unless these are finite latents of the model's size, and `batch` of them where it is given."""
    expected = (config.num_tokens, config.patch_dim)
    fits = latents.ndim == 3 and tuple(latents.shape[1:]) == expected
    if not fits or batch not in (None, latents.shape[0]):
        name = "batch" if batch is None else f"batch={batch}"
        raise ValueError(
            f"latents must have shape ({name}, tokens={expected[0]}, patch_dim={expected[1]}), "
            f"got {tuple(latents.shape)}"
        )
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise ValueError(
            f"latents must be finite floating point numbers, got {latents.dtype} with "
            f"{int((~latents.isfinite()).sum())} non-finite values"
        )


def checked_labels(
    class_labels: torch.Tensor | None, inputs: torch.Tensor, config: TarFlowConfig, *, check_range: bool
) -> torch.Tensor | None:
    """(batch,) labels with -1 for no label, after checking them; None for an unconditional model."""
    batch, num_classes = inputs.shape[0], config.num_classes
    if class_labels is None:
        return torch.full((batch,), -1, device=inputs.device) if num_classes else None
    if num_classes == 0:
        raise ValueError("class_labels must be None for an unconditional model (num_classes=0)")
    if tuple(class_labels.shape) != (batch,) or class_labels.is_floating_point():
        raise ValueError(
            f"class_labels must be ({batch},) integers, got shape {tuple(class_labels.shape)} of {class_labels.dtype}"
        )
    if check_range and not torch.compiler.is_compiling():
        wrong = class_labels[(class_labels < -1) | (class_labels >= num_classes)]
        if wrong.numel():
            raise ValueError(f"class_labels must be in -1 ... {num_classes - 1}, got {wrong[0].item()}")
    return class_labels


def checked_noise_levels(
    noise_level: torch.Tensor | None, inputs: torch.Tensor, config: TarFlowConfig
) -> torch.Tensor | None:
    """(batch,) levels in float32 or wider, after checking them; None for a model without noise conditioning."""
    if noise_level is None and not config.noise_conditioning:
        return None
    if noise_level is None or not config.noise_conditioning:
        needed = "given" if noise_level is None else "None"
        raise ValueError(
            f"noise_level must be {needed} for a model with noise_conditioning={config.noise_conditioning}"
        )
    if tuple(noise_level.shape) != (inputs.shape[0],) or not noise_level.is_floating_point():
        raise ValueError(
            f"noise_level must be ({inputs.shape[0]},) floating point numbers, got shape "
            f"{tuple(noise_level.shape)} of {noise_level.dtype}"
        )
    if noise_level.device.type == "cpu" and not torch.compiler.is_compiling() and not (noise_level > 0).all():
        raise ValueError(f"noise_level must be above 0, got {noise_level.min().item()}")
    return noise_level.to(torch.promote_types(inputs.dtype, torch.float32))


def class_id(label: ClassLabel, config: TarFlowConfig) -> int:
    """The id of a class given by id or by name; a name may be one of the synonyms between commas."""
    if isinstance(label, Integral) and not isinstance(label, bool):
        if not -1 <= label < config.num_classes:
            raise ValueError(f"class_labels must be -1 (no label) ... {config.num_classes - 1}, got {label}")
        return int(label)
    if not isinstance(label, str):
        raise ValueError(f"class_labels must be class ids or names, got {label!r}")
    names = {int(index): name for index, name in (config.id2label or {}).items()}
    found = [index for index, name in names.items() if name == label]
    found = found or [index for index, name in names.items() if label in name.split(", ")]
    if len(found) != 1:
        problem = f"fits the classes {found}, choose by id" if found else "is unknown"
        first = ", ".join(repr(name) for name in list(names.values())[:10])
        raise ValueError(f"class_labels: class name {label!r} {problem}; the model's names are {first}, ...")
    return found[0]


__all__ = ["ClassLabel", "class_id", "check_latents", "check_pixel_values", "checked_labels", "checked_noise_levels"]
