"""A model made to fit other data than it was trained on: weights that fit are copied, the others adapted by rule.

A rule is a function from the source's weights to the target's that says what it did and why. Where the mathematics
allows, what it gives has the density of the source: the tests hold that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.class_names import class_names as names_of
from tarflow_hf.hub.adapters import refuse_adapters
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.fixed_sizes import FIXED_SIZES, differing_sizes
from tarflow_hf.training.grids import interpolate_over_grid, likeness, positions_over_grid

Origin = Literal["copied", "adapted", "fresh", "left out"]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """Where a tensor of an adapted model came from.

    Args:
        name: Its name, in the target, or in the source if it was left out.
        origin: `"copied"`, `"adapted"` (made from the source's by rule), `"fresh"` or `"left out"`.
        rule: How and why; empty for a copy.

    Example:
        >>> Weight("blocks.0.class_embedding.weight", "fresh", "zero: every class starts as the source").origin
        'fresh'
    """

    name: str
    origin: Origin
    rule: str = ""


@dataclass(frozen=True)
class Adaptation:
    """What became of every weight.

    Args:
        weights: A row for each tensor.
        remarks: What changed that has no weight, such as the noise.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> _, adaptation = adapt(TarFlowModel(config), image_size=(8, 16))
        >>> print(adaptation)  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        | weights | | rule |
        | --- | --- | --- |
        | blocks.*.position_embedding | adapted | interpolated from a grid of 4x4 to 4x8 patches, times 0.5 about ... |
        | 32 others | copied | |
        >>> adaptation.count("copied"), adaptation.count("adapted")
        (32, 2)
    """

    weights: tuple[Weight, ...]
    remarks: tuple[str, ...] = ()

    def count(self, origin: Origin) -> int:
        """How many tensors are of this origin."""
        return sum(weight.origin == origin for weight in self.weights)

    def __str__(self) -> str:
        """A table; tensors of one kind in all blocks share a row, and copies theirs."""
        changed = [
            (_kind(weight.name), weight.origin, weight.rule) for weight in self.weights if weight.origin != "copied"
        ]
        rows = [f"| {name} | {origin} | {rule} |" for (name, origin, rule), _ in groupby(sorted(changed))]
        copied = self.count("copied")
        if copied:
            rows.append(f"| {copied} others | copied | |" if changed else f"| all {copied} | copied | |")
        return "\n".join(["| weights | | rule |", "| --- | --- | --- |", *rows, *self.remarks])


def adapt(
    model: TarFlowModel, *, class_names: Sequence[str] | None = None, **changes: object
) -> tuple[TarFlowModel, Adaptation]:
    """A copy of a model with another configuration: its weights where they fit, by rule where they do not.

    - Classes are matched by name; one without a match starts at the mean class vector. From a model without classes
      every class starts as that model, exactly; a model without classes made from one with is its density without a
      label, exactly.
    - Another image size or shape: the position embeddings of every block (and a learned prior variance) are
      interpolated over the image grid, see [`positions_over_grid`]. They are kept in raster order whatever the order
      in which a block reads.
    - Grey to colour: the input projection is divided over the channels and the output repeated, so that a grey image
      on all channels has the source's latents on all channels. Colour to grey: summed, and the output averaged; exact
      for a model made from a grey one, else a start, as the channels of its latents differ. Densities of one and of
      three numbers a pixel are not comparable in either direction.
    - Another noise level or kind is the same weights under another name. A model that is to be told the noise level
      starts as the source at all levels; one that is no longer told it is the source at `noise_std`.
    - A condition that is a vector comes and goes as classes do: every condition starts as the source, and a model
      without one is its density without a condition. Another mean or deviation leaves the function as it was.
    - Sizes of the transformer stay: see [`ValueError`].

    Args:
        model: The source. It is not changed.
        class_names: Names of the target's classes; an empty list for no classes; None: the source's.
        **changes: Other fields of [`TarFlowConfig`].

    Returns:
        The new model, in evaluation mode, dtype and device as the source; and what became of every weight.

    Raises:
        ValueError: If a field is unknown, class names collide, or a field cannot be changed; the message says why.

    Example:
        >>> config = TarFlowConfig(
        ...     image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1, num_classes=2
        ... )
        >>> pets, adaptation = adapt(TarFlowModel(config), class_names=["cat", "dog", "fish"], image_size=16)
        >>> pets.config.id2label, pets.config.num_tokens
        ({0: 'cat', 1: 'dog', 2: 'fish'}, 64)
        >>> adapt(pets, patch_size=4)
        Traceback (most recent call last):
            ...
        ValueError: patch_size cannot change from 2 to 4: patches of another size are other tokens: no weight of ...
    """
    if not isinstance(getattr(model, "config", None), TarFlowConfig):
        raise ValueError(f"model must be a TarFlowModel, got {type(model).__name__}")
    if isinstance(class_names, str | Mapping) or not isinstance(class_names, Iterable | None):
        raise ValueError(f"class_names must be a list of names, or None, got {class_names!r:.80}")
    known = [item.name for item in fields(TarFlowConfig) if item.name in TarFlowConfig.__annotations__]
    unknown = [name for name in changes if name not in known or name == "num_classes"]
    if unknown:
        raise ValueError(
            f"adapt cannot change {', '.join(map(repr, unknown))}; give class_names, or fields of TarFlowConfig: "
            f"{', '.join(name for name in known if name != 'num_classes')}"
        )
    values: dict[str, Any] = {name: getattr(model.config, name) for name in known} | changes
    names = names_of(model.config) if class_names is None else list(class_names)
    values |= {"num_classes": len(names), "id2label": dict(enumerate(names))}
    return adapt_to(model, TarFlowConfig(**values))


def adapt_to(model: TarFlowModel, config: TarFlowConfig) -> tuple[TarFlowModel, Adaptation]:
    """[`adapt`] to a whole configuration, such as that of a recipe.

    Args:
        model: The source. It is not changed.
        config: The target's configuration.

    Raises:
        ValueError: As for [`adapt`].

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> same, adaptation = adapt_to(TarFlowModel(config), config)
        >>> print(adaptation)  # doctest: +NORMALIZE_WHITESPACE
        | weights | | rule |
        | --- | --- | --- |
        | all 34 | copied | |
    """
    source = model.config
    refuse_adapters(model)
    _check(source, config)
    target = TarFlowModel(config).eval()
    target.to(model.dtype)
    own = {name: tensor.cpu() for name, tensor in target.state_dict().items()}
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    origins: dict[str, tuple[Origin, str]] = {}
    for rule in _RULES:
        origins |= rule(model, target, state)
    for name in [*(state.keys() - own.keys()), *(own.keys() - state.keys() - origins.keys())]:
        raise ValueError(f"model must have the weights of its configuration and no others, got another {name}")
    adapted = {name: state.get(name, tensor) for name, tensor in own.items()}
    target.load_state_dict(adapted, strict=True)
    rows = [Weight(name, *origins.get(name, ("copied", "") if name in state else ("fresh", ""))) for name in own]
    rows += [Weight(name, *origins[name]) for name in origins if name not in own]
    target.to(model.device)
    return target, Adaptation(tuple(rows), _remarks(source, config))


def _check(source: TarFlowConfig, target: TarFlowConfig) -> None:
    for config, whose in ((source, "the source"), (target, "the target")):
        names = names_of(config)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class names of {whose} collide, so that none can be matched: {', '.join(twice[:5])}")
    for name, (old, new) in differing_sizes(source, target).items():
        raise ValueError(f"{name} cannot change from {old} to {new}: {FIXED_SIZES[name]}")
    dims = source.condition_dim, target.condition_dim
    if 0 not in dims and (dims[0] != dims[1] or source.condition_names != target.condition_names):
        raise ValueError(
            f"the condition cannot change from {source.condition_names or dims[0]} to "
            f"{target.condition_names or dims[1]}: no rule says which of its numbers stands for which"
        )
    if source.num_channels != target.num_channels and (source.value_scale or target.value_scale):
        raise ValueError(
            f"num_channels of arrays cannot change from {source.num_channels} to {target.num_channels}: no rule says "
            "which channel stands for which"
        )
    if source.num_channels != target.num_channels and 1 not in (source.num_channels, target.num_channels):
        raise ValueError(
            f"num_channels cannot change from {source.num_channels} to {target.num_channels}: only from grey (1) and "
            "to grey is there a rule which channel stands for which"
        )


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _remarks(source: TarFlowConfig, target: TarFlowConfig) -> tuple[str, ...]:
    """What changes but has no weight of its own."""

    def noise(config: TarFlowConfig) -> str:
        if config.noise_conditioning:
            return "Gaussian of levels {} to {}".format(*config.noise_range)
        return "uniform" if config.noise_type == "uniform" else f"Gaussian of {config.noise_std}"

    def units(config: TarFlowConfig) -> str:
        if config.value_mean is None or config.value_scale is None:
            return "8-bit images"
        mean, scale = (
            [float(f"{value:.4g}") for value in values] for values in (config.value_mean, config.value_scale)
        )
        return f"(value - {mean}) / {scale}"

    changes = {"The training noise was": noise, "What the model sees was": units}
    return tuple(
        f"{what} {told(source)} and is now {told(target)}."
        for what, told in changes.items()
        if told(source) != told(target)
    )


def _blocks(model: TarFlowModel) -> list[tuple[str, TarFlowBlock]]:
    return [(f"blocks.{index}.", block) for index, block in enumerate(model.blocks) if isinstance(block, TarFlowBlock)]


def _classes(source: TarFlowModel, target: TarFlowModel, state: State) -> dict[str, tuple[Origin, str]]:
    """Class vectors by name; folded into the bias where classes go, zero where they come."""
    names, old = names_of(target.config), names_of(source.config)
    if names == old:
        return {}
    found: dict[str, tuple[Origin, str]] = {}
    for prefix, block in _blocks(target):
        name = f"{prefix}class_embedding.weight"
        table = state.pop(name, None)
        if table is None and block.class_embedding is not None:
            state[name] = state[f"{prefix}proj_in.bias"].new_zeros(len(names), source.config.hidden_size)
            found[name] = ("fresh", "zero: every class starts as the source")
        elif table is not None and not names:
            state[f"{prefix}proj_in.bias"] += table.mean(0)
            found[name] = ("left out", "the model has no classes")
            found[f"{prefix}proj_in.bias"] = ("adapted", "the mean class vector added: the density without a label")
        elif table is not None:
            rows = [table[old.index(label)] if label in old else table.mean(0) for label in names]
            state[name] = torch.stack(rows)
            matched = sum(label in old for label in names)
            rule = f"{matched} of {len(names)} classes matched by name, the others start at the mean"
            found[name] = ("adapted", rule)
    return found


def _noise_level(source: TarFlowModel, target: TarFlowModel, state: State) -> dict[str, tuple[Origin, str]]:
    """The embedding of the noise level: silent where it comes, folded into the bias at one level where it goes."""
    was, is_now = source.config.noise_conditioning, target.config.noise_conditioning
    if was == is_now:
        return {}
    found: dict[str, tuple[Origin, str]] = {}
    if is_now:
        for prefix, block in _blocks(target):
            for name, tensor in block.state_dict().items():
                if name.startswith("noise_embedding."):
                    silent = "down_proj" in name
                    state[prefix + name] = torch.zeros_like(tensor, device="cpu") if silent else tensor.cpu()
                    found[prefix + name] = (
                        "fresh",
                        "zero: starts as the source at all levels" if silent else "random",
                    )
        return found
    level = float(target.config.noise_std)
    if target.config.noise_type != "gaussian" or level <= 0:
        raise ValueError(
            "the source is told its noise level: give noise_type='gaussian' and a noise_std above 0 to take it at, "
            f"got {target.config.noise_type!r} and {level}"
        )
    for prefix, block in _blocks(source):
        assert block.noise_embedding is not None
        with torch.no_grad():
            vector = block.noise_embedding(torch.tensor([level], dtype=torch.float64).to(source.device, source.dtype))
        state[f"{prefix}proj_in.bias"] += vector.flatten().cpu()
        found[f"{prefix}proj_in.bias"] = ("adapted", f"the vector of noise level {level} added")
        for name in [name for name in state if name.startswith(f"{prefix}noise_embedding.")]:
            del state[name]
            found[name] = ("left out", "the model is not told the noise level")
    return found


def _condition(source: TarFlowModel, target: TarFlowModel, state: State) -> dict[str, tuple[Origin, str]]:
    """The embedding of a condition: silent where it comes, none where it goes, in the units of the new data."""
    old, new = source.config, target.config
    if not old.condition_dim and not new.condition_dim:
        return {}
    found: dict[str, tuple[Origin, str]] = {}
    for prefix, block in _blocks(target):
        name = f"{prefix}condition_embedding."
        if block.condition_embedding is None and f"{name}no_condition" not in state:
            continue
        if not old.condition_dim:
            assert block.condition_embedding is not None
            for key, tensor in block.condition_embedding.state_dict().items():
                silent = not key.startswith("up_proj")
                state[name + key] = torch.zeros_like(tensor, device="cpu") if silent else tensor.cpu()
                found[name + key] = ("fresh", "zero: every condition starts as the source" if silent else "random")
        elif not new.condition_dim:
            state[f"{prefix}proj_in.bias"] += state[f"{name}no_condition"]
            found[f"{prefix}proj_in.bias"] = ("adapted", "the vector of no condition added")
            for key in [key for key in state if key.startswith(name)]:
                del state[key]
                found[key] = ("left out", "the model has no condition")
        elif (old.condition_mean, old.condition_std) != (new.condition_mean, new.condition_std):
            mean, std, new_mean, new_std = (
                state[f"{name}up_proj.weight"].new_tensor(values or [default] * new.condition_dim)
                for config in (old, new)
                for values, default in ((config.condition_mean, 0.0), (config.condition_std, 1.0))
            )
            weight = state[f"{name}up_proj.weight"] / std
            state[f"{name}up_proj.weight"] = weight * new_std
            state[f"{name}up_proj.bias"] += weight @ (new_mean - mean)
            for key in ("up_proj.weight", "up_proj.bias"):
                found[name + key] = ("adapted", "for the new standardisation: the same function of the same condition")
    return found


def _grid(source: TarFlowModel, target: TarFlowModel, state: State) -> dict[str, tuple[Origin, str]]:
    """Position embeddings and prior variance, interpolated over the image."""
    old, new = source.config.grid_size, target.config.grid_size
    if old == new:
        return {}
    rule = "interpolated from a grid of {}x{} to {}x{} patches".format(*old, *new)
    found: dict[str, tuple[Origin, str]] = {}
    for name in [name for name in state if name.endswith("position_embedding")]:
        state[name] = positions_over_grid(state[name], old, new)
        found[name] = ("adapted", f"{rule}, times {likeness(old, new):.2g} about their mean")
    if "prior_variance" in state:
        state["prior_variance"] = interpolate_over_grid(state["prior_variance"], old, new)
        found["prior_variance"] = ("adapted", rule)
    return found


def _channels(source: TarFlowModel, target: TarFlowModel, state: State) -> dict[str, tuple[Origin, str]]:
    """Input and output projections (and the prior variance) of one channel for many, or of many for one."""
    old, new = source.config.num_channels, target.config.num_channels
    if old == new:
        return {}
    pixels = source.config.patch_size**2
    found: dict[str, tuple[Origin, str]] = {}

    def convert(name: str, axis: int, merge: Callable[[torch.Tensor], torch.Tensor], scale: float, rule: str) -> None:
        """Numbers of a patch along an axis: (parts * channels * pixels) of one number of channels for the other."""
        split = state[name].movedim(axis, 0).unflatten(0, (-1, old, pixels))
        split = merge(split) if new == 1 else split.expand(-1, new, *split.shape[2:]) * scale
        state[name] = split.flatten(0, 2).movedim(0, axis).contiguous()
        found[name] = ("adapted", rule)

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.sum(1, keepdim=True)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.mean(1, keepdim=True)

    into = "summed over the channels" if new == 1 else f"divided over {new} channels"
    out = "averaged over the channels" if new == 1 else f"repeated for {new} channels"
    for prefix, _ in _blocks(source):
        convert(f"{prefix}proj_in.weight", 1, total, 1 / new, into)
        for name in ("proj_out.weight", "proj_out.bias"):
            convert(f"{prefix}{name}", 0, mean, 1.0, out)
    if "prior_variance" in state:
        convert("prior_variance", 1, mean, 1.0, out)
    return found


Rule = Callable[[TarFlowModel, TarFlowModel, State], Mapping[str, tuple[Origin, str]]]
_RULES: tuple[Rule, ...] = (_classes, _noise_level, _condition, _grid, _channels)

__all__ = ["Adaptation", "Origin", "Weight", "adapt", "adapt_to"]
