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


def checked_condition(
    condition: torch.Tensor | None, condition_mask: torch.Tensor | None, inputs: torch.Tensor, config: TarFlowConfig
) -> torch.Tensor | None:
    """(batch, condition_dim) standardised conditions in float32 or wider, after checking them.

    (c - condition_mean) / condition_std, and rows of NaN, which the blocks read as none, where the mask is False or
    there is no condition; None for a model without conditions.
    """
    shape = (inputs.shape[0], config.condition_dim)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    if config.condition_dim == 0:
        if condition is None and condition_mask is None:
            return None
        raise ValueError("condition and condition_mask must be None for a model without one (condition_dim=0)")
    if condition is None:
        if condition_mask is not None:
            raise ValueError("condition_mask must be None where there is no condition, got a tensor")
        return torch.full(shape, float("nan"), dtype=dtype, device=inputs.device)
    if tuple(condition.shape) != shape or not condition.is_floating_point():
        names = "" if config.condition_names is None else f" ({', '.join(config.condition_names)})"
        raise ValueError(
            f"condition must be {shape} floating point numbers{names}, got shape {tuple(condition.shape)} of "
            f"{condition.dtype}"
        )
    if condition.device.type == "cpu" and not torch.compiler.is_compiling() and not condition.isfinite().all():
        row = int((~condition.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"condition must be finite (condition_mask says which are none), got {condition[row]} in row {row}"
        )
    condition = condition.to(dtype)
    mean, std = (
        condition.new_tensor(values or [default] * config.condition_dim)
        for values, default in ((config.condition_mean, 0.0), (config.condition_std, 1.0))
    )
    standardised = (condition - mean) / std
    if condition_mask is None:
        return standardised
    if tuple(condition_mask.shape) != shape[:1] or condition_mask.dtype != torch.bool:
        raise ValueError(
            f"condition_mask must be ({shape[0]},) booleans, got shape {tuple(condition_mask.shape)} of "
            f"{condition_mask.dtype}"
        )
    return standardised.masked_fill(~condition_mask[:, None], float("nan"))


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


__all__ = [
    "ClassLabel",
    "class_id",
    "check_latents",
    "check_pixel_values",
    "checked_condition",
    "checked_labels",
    "checked_noise_levels",
]
