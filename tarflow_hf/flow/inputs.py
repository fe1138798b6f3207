"""Checks of what a TarFlow model is given: images, latents, labels and noise levels against its configuration."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import cast

import numpy as np
import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.class_names import class_names, named, nearest_name, warn_of_namesake
from tarflow_hf.flow.precision import working_dtype

ClassLabel = int | str | None  # None is no label, as -1 is


def is_number(value: object) -> bool:
    """Whether this is one real number (or a tensor of one), and no truth value."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether this is a finite number."""
    return is_number(value) and math.isfinite(cast(float, value))


def is_whole(value: object) -> bool:
    """Whether this is an integer."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_generator(generator: object, batch: int) -> None:
    """Raises ValueError unless this is one generator, one for each image in a list, or None."""
    if isinstance(generator, list):
        if len(generator) != batch:
            raise ValueError(f"generator must be one or one per image: {batch} images, {len(generator)} generators")
        wrong = [each for each in generator if not isinstance(each, torch.Generator)]
    else:
        wrong = [] if generator is None or isinstance(generator, torch.Generator) else [generator]
    if wrong:
        raise ValueError(
            f"generator must be a torch.Generator or a list of one per image, got {wrong[0]!r}; "
            "a seed becomes one by torch.Generator().manual_seed(seed)"
        )


def check_pixel_values(pixel_values: torch.Tensor, config: TarFlowConfig) -> None:
    """Raises ValueError unless these are floating point images of the model's size."""
    expected = (config.num_channels, config.image_height, config.image_width)
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(f"pixel_values must be a tensor (batch, {expected}), got {type(pixel_values).__name__}")
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(f"pixel_values must have shape (batch, {expected}), got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}")


def count_latents(latents: object) -> int:
    """The number of these latents. Raises ValueError if they are no tensor of some, or have no numbers in place."""
    if not isinstance(latents, torch.Tensor) or latents.ndim == 0:
        raise ValueError(f"latents must be a tensor (batch, tokens, patch_dim), got {latents!r}")
    if latents.is_nested or latents.layout is not torch.strided or latents.is_meta:
        kind = "nested" if latents.is_nested else "meta" if latents.is_meta else str(latents.layout)
        raise ValueError(f"latents must be a dense tensor of numbers (batch, tokens, patch_dim), got a {kind} one")
    return len(latents)


def check_latents(latents: torch.Tensor, config: TarFlowConfig, batch: int | None = None) -> None:
    """Raises ValueError unless these are finite latents of the model's size, and `batch` of them where it is given."""
    expected = (config.num_tokens, config.patch_dim)
    count_latents(latents)
    fits = latents.ndim == 3 and tuple(latents.shape[1:]) == expected
    if not fits or batch not in (None, latents.shape[0]):
        name = "batch" if batch is None else f"batch={batch}"
        raise ValueError(
            f"latents must have shape ({name}, tokens={expected[0]}, patch_dim={expected[1]}), "
            f"got {tuple(latents.shape)}"
        )
    if not latents.is_floating_point() or (not is_traced(latents) and not latents.isfinite().all()):
        raise ValueError(
            f"latents must be finite floating point numbers, got {latents.dtype} with "
            f"{int((~latents.isfinite()).sum())} non-finite values"
        )


def check_guesses(guesses: Sequence[torch.Tensor] | None, latents: torch.Tensor, config: TarFlowConfig) -> None:
    """Raises ValueError unless there is a guess of the shape of the latents for each block, or none at all."""
    if guesses is None:
        return
    shapes = [tuple(guess.shape) for guess in guesses]
    if shapes != [tuple(latents.shape)] * config.num_blocks:
        raise ValueError(
            f"guesses must be {config.num_blocks} tensors, one for each block, of shape {tuple(latents.shape)}, "
            f"got {shapes}"
        )


def check_density(
    density: torch.Tensor, pixel_values: torch.Tensor, config: TarFlowConfig, *, of: str = "log_prob"
) -> None:
    """Raises ValueError if what `of` gives for some image is not finite, or the image is no image in [-1, 1] by far.

    Images with noise on them leave [-1, 1]; ten times that and more they do not. Arrays may be of any size. Inside
    `torch.compile` and the transforms of `torch.func`, where no number can be read, nothing is checked.
    """
    transformed = torch._C._functorch.maybe_current_level() is not None
    if torch.compiler.is_compiling() or transformed or density.is_meta:
        return
    lost = (~density.isfinite()).flatten(1).any(1) if density.ndim > 1 else ~density.isfinite()
    limit = 10 * (1 + max(config.noise_std, config.noise_range[1] if config.noise_conditioning else 0.0))
    wanted, made = "[-1, 1] (noise may leave them a little)", "`to_pixel_values` makes them from 0 ... 255"
    if config.value_scale is not None:
        limit = math.inf
        wanted, made = "units of value_scale around value_mean", "`to_model_units` brings data to them"
    outside = pixel_values.detach().abs().flatten(1)
    far = (outside > limit).any(1)
    wrong = (lost | far).nonzero().flatten().tolist()
    if not wrong:
        return
    numbers = pixel_values.detach()[wrong[0]]
    finite = numbers[numbers.isfinite()]
    span = f"from {finite.min().item():.4g} to {finite.max().item():.4g}" if finite.numel() else "none of them finite"
    no_numbers = numbers.numel() - finite.numel()
    raise ValueError(
        f"{of} needs pixel_values in {wanted}, and images {wrong} "
        f"{'have no finite density' if lost[wrong[0]] else 'are far from it'}: in image {wrong[0]} "
        f"{int((numbers.abs() > 1).sum())} of {numbers.numel()} values are outside, {span}, and {no_numbers} are not "
        f"finite; {made}"
    )


def check_callback(callback: object, asked: object, known: Collection[str]) -> None:
    """Raises ValueError unless this is a function or None, and the names of the tensors that it asks for are known."""
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback_on_step_end must be a function or None, got {callback!r}")
    names = [asked] if isinstance(asked, str) or not isinstance(asked, Collection) else list(asked)
    if isinstance(asked, str) or not set(map(str, names)) <= set(known):
        found = repr(asked) if isinstance(asked, str) else sorted(set(map(str, names)) - set(known))
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {found}")


def replaced_latents(latents: torch.Tensor, returned: object, known: Collection[str] = ("latents",)) -> torch.Tensor:
    """The latents that a callback returned in a dict, or those of the step. Raises ValueError if they do not fit."""
    if isinstance(returned, dict) and (unknown := returned.keys() - set(known)):
        raise ValueError(
            f"callback_on_step_end may return {sorted(known)} in its dict, got {sorted(map(str, unknown))}"
        )
    replacement = returned.get("latents", latents) if isinstance(returned, dict) else returned
    shape = tuple(replacement.shape) if isinstance(replacement, torch.Tensor) else None
    if shape != tuple(latents.shape):
        raise ValueError(
            "callback_on_step_end must return None or a dict, in it latents of shape "
            f"{tuple(latents.shape)}, got {shape or repr(returned)}"
        )
    return cast(torch.Tensor, replacement).to(latents.device, latents.dtype)


def checked_labels(
    class_labels: torch.Tensor | None, inputs: torch.Tensor, config: TarFlowConfig, *, check_range: bool
) -> torch.Tensor | None:
    """(batch,) labels with -1 for no label, after checking them; None for an unconditional model."""
    batch, num_classes = inputs.shape[0], config.num_classes
    if class_labels is None:
        return torch.full((batch,), -1, device=inputs.device) if num_classes else None
    if num_classes == 0:
        raise ValueError("class_labels must be None for an unconditional model (num_classes=0)")
    _check_tensor("class_labels", class_labels, f"{batch} integers")
    if tuple(class_labels.shape) != (batch,) or not _is_integer(class_labels.dtype):
        raise ValueError(
            f"class_labels must be ({batch},) integers, got shape {tuple(class_labels.shape)} of {class_labels.dtype}"
        )
    labels = class_labels.long()  # as an index, torch takes uint8 for a mask
    if check_range and not is_traced(class_labels):
        unsigned = not class_labels.dtype.is_signed
        wrong = (labels < -1) | (labels >= num_classes) | ((labels < 0) & unsigned)
        if wrong.any():
            first = class_labels[int(wrong.nonzero()[0])].item()
            raise ValueError(f"class_labels must be in -1 ... {num_classes - 1}, got {first}")
    return labels


def _check_tensor(name: str, value: object, numbers: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor of {numbers}, got {type(value).__name__}")


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether `torch.func` follows a tensor: inside of `vmap`, `grad`, `jvp` and what is made of them."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are not to be looked at: under torch.compile, torch.export or torch.func."""
    return torch.compiler.is_compiling() or is_transformed(tensor)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


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
    _check_tensor("noise_level", noise_level, f"{inputs.shape[0]} numbers")
    if tuple(noise_level.shape) != (inputs.shape[0],) or not noise_level.is_floating_point():
        raise ValueError(
            f"noise_level must be ({inputs.shape[0]},) floating point numbers, got shape "
            f"{tuple(noise_level.shape)} of {noise_level.dtype}"
        )
    if noise_level.device.type == "cpu" and not is_traced(noise_level):
        if not (in_range := (noise_level > 0) & noise_level.isfinite()).all():
            raise ValueError(f"noise_level must be finite and above 0, got {noise_level[~in_range][0].item()}")
    return noise_level.to(working_dtype(inputs.dtype))


def check_conditioning(
    pixel_values: torch.Tensor,
    class_labels: torch.Tensor | None,
    condition: torch.Tensor | None,
    condition_mask: torch.Tensor | None,
    config: TarFlowConfig,
) -> None:
    """Raises ValueError for images, labels and conditions that the model cannot have; waits for their device."""
    check_pixel_values(pixel_values, config)
    checked_labels(class_labels, pixel_values, config, check_range=True)
    checked_condition(condition, condition_mask, pixel_values, config, check_finite=True)


def checked_condition(
    condition: torch.Tensor | None,
    condition_mask: torch.Tensor | None,
    inputs: torch.Tensor,
    config: TarFlowConfig,
    *,
    check_finite: bool = False,
) -> torch.Tensor | None:
    """(batch, condition_dim) standardised conditions in float32 or wider, after checking them.

    Numbers are checked on a CPU, and elsewhere, where that waits for the device, with `check_finite`.

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
    _check_tensor("condition", condition, f"{shape} numbers")
    if tuple(condition.shape) != shape or not condition.is_floating_point():
        names = "" if config.condition_names is None else f" ({', '.join(config.condition_names)})"
        raise ValueError(
            f"condition must be {shape} floating point numbers{names}, got shape {tuple(condition.shape)} of "
            f"{condition.dtype}"
        )
    read = check_finite or condition.device.type == "cpu"
    if read and not is_traced(condition) and not condition.isfinite().all():
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
    _check_tensor("condition_mask", condition_mask, f"{shape[0]} booleans")
    if tuple(condition_mask.shape) != shape[:1] or condition_mask.dtype != torch.bool:
        raise ValueError(
            f"condition_mask must be ({shape[0]},) booleans, got shape {tuple(condition_mask.shape)} of "
            f"{condition_mask.dtype}"
        )
    return standardised.masked_fill(~condition_mask[:, None], float("nan"))


def class_id(label: ClassLabel, config: TarFlowConfig, *, warn: bool = False) -> int:
    """The id of a class: of a number that number, of a string the class of that name.

    None is -1, no label; a name may be one of the synonyms between commas.

    Args:
        label: Id or name.
        config: The model's configuration.
        warn: Whether to say so where a number is the id of one class and the name of another.
    """
    if label is None:
        return -1
    if isinstance(label, Integral) and not isinstance(label, bool):
        if not -1 <= label < config.num_classes:
            raise ValueError(f"class_labels must be -1 (no label) ... {config.num_classes - 1}, got {label}")
        if warn:
            warn_of_namesake(int(label), config.id2label or {})
        return int(label)
    if not isinstance(label, str):
        raise ValueError(f"class_labels must be class ids or names, got {label!r}")
    names = class_names(config)
    found = named(label, names)
    if len(found) != 1:
        problem = f"fits the classes {found}, choose by id" if found else f"is unknown{nearest_name(label, names)}"
        first = ", ".join(repr(name) for name in names[:10])
        raise ValueError(f"class_labels: class name {label!r} {problem}; the model's names are {first}, ...")
    return found[0]


def class_ids(class_labels: object, config: TarFlowConfig, num_images: int | None = None) -> list[int]:
    """The ids of one class or several, each given by id, name or None; no label at all is for no image alone."""
    if config.num_classes == 0:
        raise ValueError(f"class_labels must be None for an unconditional model, got {class_labels!r}")
    warn = not isinstance(class_labels, torch.Tensor)  # a tensor holds ids
    if isinstance(class_labels, list | tuple):
        class_labels = [label.tolist() if isinstance(label, torch.Tensor) else label for label in class_labels]
    elif isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.cpu()
    labels = np.atleast_1d(np.asarray(class_labels, dtype=object)).tolist()
    if not labels and num_images != 0:
        raise ValueError("class_labels must name at least one class, got an empty list")
    return [class_id(label, config, warn=warn) for label in labels]


def condition_vectors(condition: object, config: TarFlowConfig, num_labels: int | None = None) -> torch.Tensor:
    """(images, condition_dim) float32 conditions: one for each label, or one for all."""
    size = config.condition_dim
    if size == 0:
        raise ValueError("condition must be None for a model without one (condition_dim=0)")
    vectors = _real_numbers(condition, size)
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != size or not vectors.numel():
        raise ValueError(f"condition must have condition_dim={size} numbers an image, got {tuple(vectors.shape)}")
    if not vectors.isfinite().all():
        raise ValueError(f"condition must be finite, got {vectors.tolist()}")
    if vectors.ndim == 1:
        vectors = vectors.expand(num_labels or 1, size)
    if num_labels not in (None, len(vectors)):
        raise ValueError(f"condition must be one, or one for each of {num_labels} labels, got {len(vectors)}")
    return vectors


def _real_numbers(condition: object, size: int) -> torch.Tensor:
    """Numbers that somebody handed over, in float32; no text, truth values or complex ones."""
    try:
        numbers = condition if isinstance(condition, torch.Tensor) else torch.as_tensor(np.asarray(condition))
    except (TypeError, ValueError) as error:  # of numpy or torch, for text, rows of several lengths, no numbers at all
        raise ValueError(f"condition must be {size} numbers an image, got {condition!r:.80}") from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"condition must be {size} real numbers an image, got {numbers.dtype}")
    return numbers.float()


def class_of_text(text: str, config: TarFlowConfig) -> int:
    """The id of a class written on a command line: the class of that name, or else the id where it is a number."""
    try:
        return class_id(text, config)
    except ValueError:
        if not text.removeprefix("-").isdecimal():
            raise
        return class_id(int(text), config)


__all__ = [
    "ClassLabel",
    "check_callback",
    "check_density",
    "check_guesses",
    "check_generator",
    "class_id",
    "class_of_text",
    "check_latents",
    "check_pixel_values",
    "checked_condition",
    "checked_labels",
    "checked_noise_levels",
    "class_id",
    "class_ids",
    "condition_vectors",
    "count_latents",
    "is_finite",
    "is_number",
    "is_whole",
    "replaced_latents",
]
