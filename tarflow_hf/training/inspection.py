"""What a saved state must be before it reaches a model or an optimizer: names, shapes, types, finite numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from tarflow_hf.training.progress import Progress

_PARTS = {"model", "optimizer", "ema", "progress"}
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_COUNTS = [item.name for item in fields(Progress) if item.type is int]


def check_state(
    state: Mapping[str, Any],
    *,
    model: Mapping[str, torch.Tensor],
    parameters: Sequence[torch.Tensor],
    step: int,
) -> None:
    """Raises ValueError if a state of [`Trainer.state`] is none of this model, or holds what no sound run holds.

    Args:
        state: The state, as it was read.
        model: The tensors of the model by name.
        parameters: Those of them that the optimizer trains, in its order.
        step: The step that the state is said to be of.
    """
    missing = sorted(_PARTS - state.keys())
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing)}")
    _check_tensors("model", state["model"], model)
    later = state.get("posthoc", {})
    _check_type("posthoc", later, dict)
    for name, kept in [("ema", state["ema"]), *((f"posthoc {length}", kept) for length, kept in later.items())]:
        if kept is not None:
            _check_type(name, kept, dict)
            _check_tensors(f"{name} average", kept.get("average"), model)
            _check_count(f"{name} num_updates", kept.get("num_updates"))
    _check_optimizer(state["optimizer"], parameters, step)
    _check_progress(state["progress"], step)
    scaler = state.get("scaler")
    if scaler is not None:
        _check_type("scaler", scaler, dict)
        for name in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"):
            value = scaler.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"scaler {name} must be a finite number, at least 0, got {value!r}")


def _check_tensors(part: str, saved: object, expected: Mapping[str, torch.Tensor]) -> None:
    _check_type(part, saved, dict)
    assert isinstance(saved, dict)
    different = sorted(map(str, saved.keys() ^ expected.keys()))
    if different:
        raise ValueError(f"tensors of {part} that are missing or of another model: {', '.join(different[:5])}")
    for name, tensor in expected.items():
        _check_tensor(f"{part} {name}", saved[name], tensor)


def _check_tensor(name: str, saved: object, expected: torch.Tensor) -> None:
    _check_type(name, saved, torch.Tensor)
    assert isinstance(saved, torch.Tensor)
    if saved.shape != expected.shape or saved.dtype != expected.dtype or saved.layout != torch.strided:
        raise ValueError(
            f"{name} must be {expected.dtype} of shape {tuple(expected.shape)}, got {saved.dtype} of shape "
            f"{tuple(saved.shape)}" + ("" if saved.layout == torch.strided else f" in the layout {saved.layout}")
        )
    if saved.is_meta:
        raise ValueError(f"{name} must have values, got a tensor of the meta device")
    if not torch.isfinite(saved).all():
        raise ValueError(f"{name} has {int((~torch.isfinite(saved)).sum())} values that are not finite")


def _check_optimizer(saved: object, parameters: Sequence[torch.Tensor], step: int) -> None:
    _check_type("optimizer", saved, dict)
    assert isinstance(saved, dict)
    _check_type("optimizer state", saved.get("state"), dict)
    trained = saved["state"]
    if trained and trained.keys() != set(range(len(parameters))):
        raise ValueError(f"optimizer state must be of {len(parameters)} parameters, got {len(trained)}")
    for index, entry in trained.items():
        if not isinstance(entry, dict) or entry.keys() != _MOMENTS:
            raise ValueError(f"optimizer state of parameter {index} must have {sorted(_MOMENTS)}")
        for name in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"optimizer {name} of parameter {index}", entry[name], parameters[index])
        if (entry["exp_avg_sq"] < 0).any():
            raise ValueError(f"optimizer exp_avg_sq of parameter {index} must be at least 0")
        _check_tensor(f"optimizer step of parameter {index}", entry["step"], torch.zeros((), dtype=torch.float32))
        if not 0 <= entry["step"] <= step:
            raise ValueError(f"optimizer step of parameter {index} must be 0 ... {step}, got {entry['step'].item():g}")


def _check_progress(saved: object, step: int) -> None:
    _check_type("progress", saved, dict)
    assert isinstance(saved, dict)
    unknown = sorted(saved.keys() - {item.name for item in fields(Progress)})
    if unknown or "step" not in saved:
        raise ValueError(f"progress must have 'step' and no {', '.join(map(repr, unknown)) or 'other name'}")
    for name in _COUNTS:
        _check_count(f"progress {name}", saved.get(name, 0))
    for name in ("window_loss", "window_bits", "first_loss"):
        value = saved.get(name, 0.0)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"progress {name} must be a finite number, got {value!r}")
    if saved["step"] != step:
        raise ValueError(f"progress must be of step {step}, got {saved['step']}")
    if saved.get("window_steps", 0) > step:
        raise ValueError(f"progress window_steps must be at most {step}, got {saved['window_steps']}")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be a whole number, at least 0, got {value!r}")


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


__all__ = ["check_state"]
