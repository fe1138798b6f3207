"""Adapters on a pipeline's model by the names that diffusers' pipelines have: LoRA and its kin, through PEFT."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils.peft_utils import get_adapter_name
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from tarflow_hf.configuration_tarflow import did_you_mean
from tarflow_hf.flow.inputs import is_finite
from tarflow_hf.hub.adapter_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    check_adapter_weights,
    check_peft_folder,
    read_adapter,
)
from tarflow_hf.hub.arguments import as_source
from tarflow_hf.hub.download import DownloadOptions

_PREFIX = "transformer"
_KNOWN = frozenset({"low_cpu_mem_usage", *(field.name for field in fields(DownloadOptions))})


class AdapterPipeline(LoraBaseMixin):
    """What a pipeline does with adapters; [`LoraBaseMixin`] has `set_adapters`, `unload_lora_weights` and the others.

    Example:
        >>> from peft import LoraConfig
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> lora = LoraConfig(r=4, target_modules=["qkv_proj", "out_proj"])
        >>> pipe.transformer.add_adapter(lora, "thick")  # and train it
        >>> layers = pipe.transformer.get_adapter_state_dict("thick")
        >>> pipe.save_lora_weights("thick", layers, transformer_lora_adapter_metadata=lora.to_dict())
        >>> pipe.unload_lora_weights()
        >>> pipe.load_lora_weights("thick", adapter_name="bold")
        >>> pipe.get_active_adapters()
        ['bold']
    """

    _lora_loadable_modules = [_PREFIX]
    transformer: Any  # a TarFlowModel

    def load_lora_weights(  # type: ignore[override]  # declared without arguments
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Attaches an adapter and activates it.

        Args:
            pretrained_model_name_or_path_or_dict: A folder or Hub repository of [`save_lora_weights`] or of PEFT
                (`adapter_config.json` and `adapter_model.safetensors`), or the adapter's weights by name.
            adapter_name: What to call it; None: default_0, default_1, ...
            weight_name: The file, where [`save_lora_weights`] wrote it.
            **kwargs: `revision`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            OSError: If there is no adapter.
            ValueError: If the weights do not fit the model, which is then left as it was.
        """
        name = get_adapter_name(self.transformer) if adapter_name is None else adapter_name
        if not (isinstance(name, str) and name and "." not in name):
            raise ValueError(f"adapter_name must be text without dots, got {adapter_name!r:.80}")
        for unknown in kwargs.keys() - _KNOWN:
            raise ValueError(f"load_lora_weights has no argument {unknown!r}{did_you_mean(unknown, _KNOWN)}")
        kwargs.pop("low_cpu_mem_usage", None)  # it changes nothing of what is loaded
        if not isinstance(weight_name, str):
            raise ValueError(f"weight_name must be the name of a file, got {weight_name!r:.80}")
        if name in getattr(self.transformer, "peft_config", {}):
            raise ValueError(f"adapter_name {name!r} is in use: choose another, or delete_adapters({name!r}) first")
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = as_source(source, "pretrained_model_name_or_path_or_dict")
            if Path(source).name == PEFT_WEIGHTS and Path(source).with_name(PEFT_CONFIG).is_file():
                source = str(Path(source).parent)  # whose settings say how strong it is
            if source.startswith(("/", ".", "~")) and not Path(source).exists():
                raise FileNotFoundError(f"{source} is no adapter: there is nothing at this path")
        with warnings.catch_warnings(), cast(Any, self).weights_in_place(), self._attaching(name):
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once is what is wanted
            if isinstance(source, Mapping):
                check_adapter_weights(source)
                self._attach(name, dict(source), None)
            elif (Path(source) / PEFT_CONFIG).is_file() or not Path(source).exists():
                self._load_from_peft(source, name, weight_name, kwargs)
            else:
                path = Path(source) / weight_name if Path(source).is_dir() else Path(source)
                self._attach(name, *read_adapter(path, _PREFIX))

    @classmethod
    def save_lora_weights(  # type: ignore[override]  # declared without arguments
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Mapping[str, torch.Tensor | nn.Module],
        *,
        is_main_process: bool = True,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves an adapter's weights as one file of diffusers' format.

        Args:
            save_directory: The folder; made if missing.
            transformer_lora_layers: The weights: `pipe.transformer.get_adapter_state_dict(name)`.
            is_main_process: Whether this process writes.
            weight_name: Name of the file.
            transformer_lora_adapter_metadata: The adapter's configuration,
                `pipe.transformer.peft_config[name].to_dict()`; without it loading takes `lora_alpha` to be the rank.

        Raises:
            ValueError: If there are no weights.
        """
        if not transformer_lora_layers:
            raise ValueError("transformer_lora_layers must have the weights of an adapter, got none")
        cls._save_lora_weights(
            save_directory,
            lora_layers={_PREFIX: dict(transformer_lora_layers)},
            lora_metadata={_PREFIX: _plain(transformer_lora_adapter_metadata)},
            is_main_process=is_main_process,
            weight_name=weight_name,
        )

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Takes adapters off; after the last one the model is as if it never had one.

        Args:
            adapter_names: One or several.

        Raises:
            ValueError: If there is no such adapter.
        """
        self._check_there(adapter_names)
        super().delete_adapters(adapter_names)
        if not getattr(self.transformer, "peft_config", {}):
            self.unload_lora_weights()

    def unload_lora_weights(self) -> None:
        """Takes all adapters off; what was fused stays in the weights."""
        for name, module in list(self.transformer.named_modules()):
            wraps_a_layer, stands_for_one = hasattr(module, "get_base_layer"), hasattr(module, "original_module")
            if wraps_a_layer or stands_for_one:
                parent, _, own_name = name.rpartition(".")
                own = module.get_base_layer() if wraps_a_layer else module.original_module
                setattr(self.transformer.get_submodule(parent), own_name, own)
        if hasattr(self.transformer, "peft_config"):
            del self.transformer.peft_config
        self.transformer._hf_peft_config_loaded = False
        vars(self.transformer).pop("_weight_conversions", None)  # to an adapter's names, which saving would take

    def fuse_lora(  # type: ignore[override]  # by name, as diffusers calls it
        self,
        components: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Adds the active adapters to the weights, as diffusers does.

        Args:
            components: `["transformer"]`, the default.
            **kwargs: `lora_scale`, `safe_fusing` and `adapter_names` as in diffusers.

        Raises:
            ValueError: If there is no such adapter, it has whole layers of its own, or the scale is not finite.
        """
        if kwargs.get("adapter_names") is not None:
            self._check_there(kwargs["adapter_names"])
        if not is_finite(scale := kwargs.get("lora_scale", 1.0)):
            raise ValueError(f"lora_scale must be finite, got {scale!r:.80}")
        if any(hasattr(module, "original_module") for module in self.transformer.modules()):
            raise ValueError("adapters with modules_to_save have layers of their own, which cannot be added")
        super().fuse_lora([_PREFIX] if components is None else components, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Takes the adapters out of the weights again.

        Args:
            components: `["transformer"]`, the default.
            **kwargs: As in diffusers.
        """
        super().unfuse_lora([_PREFIX] if components is None else components, **kwargs)

    def _check_there(self, adapter_names: object) -> None:
        """Raises ValueError unless these are names of adapters that are attached."""
        there = list(getattr(self.transformer, "peft_config", {}))
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not (isinstance(names, list | tuple) and all(name in there for name in names)):
            raise ValueError(f"adapter_names must be among {there}, got {adapter_names!r:.80}")

    @contextmanager
    def _attaching(self, name: str) -> Iterator[None]:
        """An adapter that fails while it is attached leaves the model as it was."""
        others = set(getattr(self.transformer, "peft_config", {}))
        try:
            yield
        except Exception as error:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
                super().delete_adapters(name)
            if not others:
                self.unload_lora_weights()
            if isinstance(error, OSError | ImportError) or type(error) is ValueError:
                raise
            reason = "weights have other shapes" if "mismatched" in str(error) else str(error).splitlines()[0]
            raise ValueError(f"the adapter does not fit: {type(error).__name__}: {reason:.200}") from error

    def _load_from_peft(self, source: str, name: str, weight_name: str, kwargs: dict[str, Any]) -> None:
        """An adapter of PEFT's format, or one file of diffusers' from the Hub."""
        config, path = Path(source, PEFT_CONFIG), Path(source, PEFT_WEIGHTS)
        if not Path(source).exists():
            try:
                config = Path(hf_hub_download(source, PEFT_CONFIG, **kwargs))
            except OSError:
                self._attach(name, *read_adapter(Path(hf_hub_download(source, weight_name, **kwargs)), _PREFIX))
                return
            path = Path(hf_hub_download(source, PEFT_WEIGHTS, **kwargs))
        check_peft_folder(config, path)
        weights = _with_magnitudes(load_file(path))
        loaded = self.transformer.load_adapter(source, name, adapter_state_dict=weights, adapter_kwargs=kwargs)
        self._check(loaded, name)

    def _attach(self, name: str, weights: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> None:
        from peft import LoraConfig

        weights = {key.removeprefix("base_model.model.").removeprefix(f"{_PREFIX}."): weights[key] for key in weights}
        if settings is None:
            ranks = {key.partition(".lora_A")[0]: len(weight) for key, weight in weights.items() if ".lora_A" in key}
            if not ranks:
                raise ValueError(f"no LoRA weights are among the {len(weights)} given: {', '.join(list(weights)[:3])}")
            rank = max(ranks.values())
            patterns = {"rank_pattern": ranks, "alpha_pattern": ranks}
            settings = {"r": rank, "lora_alpha": rank, "target_modules": list(ranks), **patterns}
        loaded = self.transformer.load_adapter(
            adapter_name=name,
            peft_config=LoraConfig(**settings),
            adapter_state_dict=_with_magnitudes(weights),
        )
        self._check(loaded, name)

    def _check(self, loaded: Any, name: str) -> None:  # noqa: ANN401  # transformers' LoadStateDictInfo
        """Raises ValueError, with the adapter removed, unless every weight found its place."""
        wrong = {
            "are missing": {key for key in loaded.missing_keys if f".{name}." in f"{key}."},  # not another adapter's
            "are not the model's": loaded.unexpected_keys,
            "have other shapes": {key for key, *_ in loaded.mismatched_keys},
        }
        for problem, keys in wrong.items():
            if keys:
                self.delete_adapters(name)
                raise ValueError(f"the adapter does not fit: {len(keys)} weights {problem}, among them {min(keys)}")
        for key, weight in self.transformer.named_parameters():
            if f".{name}." in f"{key}.":
                weight.data = weight.data.clone()  # not a map of a file, which may change
        self.transformer.set_adapter(name)


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError if adapters are attached to a model: its base weights have other names then.

    Args:
        model: The model that is about to be saved.

    Example:
        >>> refuse_adapters(torch.nn.Linear(2, 2))  # has none
    """
    signs = ("base_layer", "peft_config", "original_module")
    if any(hasattr(module, sign) for module in model.modules() for sign in signs):
        raise ValueError(
            "adapters are attached to the model, and a pipeline is saved without them: save the adapter by "
            "save_lora_weights, then unload_lora_weights(); or make it part of the weights by fuse_lora() and then "
            "unload_lora_weights(). Of a PeftModel, take merge_and_unload() or unload()"
        )


def _with_magnitudes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an adapter in which DoRA's magnitudes have the name that they have in the model."""
    vector = "lora_magnitude_vector"
    return {f"{key}.weight" if key.endswith(vector) else key: weight for key, weight in weights.items()}


def _plain(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A configuration as JSON has it: sets as lists, without what is None or empty."""
    if settings is None:
        return None
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items() if value}
    return json.loads(json.dumps({key: getattr(value, "value", value) for key, value in values.items()}))


__all__ = ["AdapterPipeline", "refuse_adapters"]
