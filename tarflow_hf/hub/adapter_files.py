"""Files of adapters, of diffusers' format and of PEFT's, looked through before anything is attached to a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open

from tarflow_hf.configuration_tarflow import read_json
from tarflow_hf.hub.safetensors_files import check_finite, read_header

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(path: Path, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The weights of a file of diffusers' format, and the adapter's configuration where it has one.

    Args:
        path: The file.
        prefix: What the names in its metadata begin with, a part of the pipeline.

    Raises:
        OSError: If it is missing or damaged.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"transformer.lora_A.weight": torch.ones(1, 2)}, "adapter.safetensors")
        >>> from pathlib import Path
        >>> read_adapter(Path("adapter.safetensors"), "transformer")
        ({'transformer.lora_A.weight': tensor([[1., 1.]])}, None)
    """
    if not path.is_file():
        raise FileNotFoundError(f"No such file or directory: {path}")
    _check_weights(path)
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dictionary
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    check_adapter_weights(weights)
    if text is None:
        return weights, None
    try:
        return weights, {key.removeprefix(f"{prefix}."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise OSError(f"{path} is damaged: its metadata are no configuration of an adapter: {error}") from error


def check_peft_folder(config: Path, weights: Path) -> None:
    """Raises OSError unless these are the files of an adapter that PEFT saved; weights are safetensors alone.

    Args:
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("adapter_config.json").write_text('{"peft_type": null}')
        >>> check_peft_folder(Path("adapter_config.json"), Path("adapter_model.safetensors"))
        Traceback (most recent call last):
            ...
        OSError: adapter_config.json is damaged: peft_type must be the name of a method, got None
    """
    settings = read_json(config, str(config))
    if not isinstance(settings.get("peft_type"), str):
        raise OSError(
            f"{config} is damaged: peft_type must be the name of a method, got {settings.get('peft_type')!r:.60}"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"No such file or directory: {weights}; other files of weights can run code")
    _check_weights(weights)


def check_adapter_weights(weights: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are finite floating point tensors.

    Args:
        weights: An adapter's, by name.

    Example:
        >>> check_adapter_weights({"lora_A.weight": torch.ones(2, 2).long()})
        Traceback (most recent call last):
            ...
        ValueError: the adapter's lora_A.weight must be a floating point tensor, got torch.int64
    """
    for name, weight in weights.items():
        if not (isinstance(weight, torch.Tensor) and weight.is_floating_point()):
            got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"the adapter's {name} must be a floating point tensor, got {got}")
        if not weight.isfinite().all():
            raise ValueError(f"the adapter's {name} must be finite, and has values that are not")


def _check_weights(path: Path) -> None:
    read_header(path, str(path))
    check_finite(path, str(path))


__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "check_adapter_weights", "check_peft_folder", "read_adapter"]
