"""Loading a model by name, from a folder or from the Hub, after its files have been looked through."""

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, cast

from tarflow_hf.configuration_tarflow import did_you_mean, read_json
from tarflow_hf.hub.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS, check_peft_folder
from tarflow_hf.hub.arguments import as_dtype, as_source
from tarflow_hf.hub.checkpoint_files import Place
from tarflow_hf.hub.download import DownloadOptions, download_model
from tarflow_hf.hub.model_files import ModelConfig, check_entries, check_model_files, is_quantized, read_entries

_OTHER_SOURCES = ("state_dict", "gguf_file")


class HubModel:
    """What our models have beside `PreTrainedModel`: their files are checked before they are built from them.

    Example:
        >>> TarFlowModel(TarFlowConfig(image_size=8, hidden_size=64, num_blocks=2)).save_pretrained("digits")
        >>> TarFlowModel.from_pretrained("digits").config.num_blocks
        2
    """

    config_class: Any  # of the model's own kind

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: object,
        subfolder: str = "",
        variant: str | None = None,
        **kwargs: object,
    ) -> Self:
        """Loads a model from a folder or from the Hub, in evaluation mode; only safetensors weights are read.

        Settings, names, shapes and types of the weights are compared before anything is built, and every number must
        be finite.

        Args:
            pretrained_model_name_or_path: A folder of `save_pretrained`, or a Hub repository, "user/model".
            *model_args: None; `PreTrainedModel` has it.
            subfolder: Folder of the model within that, "transformer" for the model of a pipeline.
            variant: Weights to load: None for `model.safetensors`, "fp16" for `model.fp16.safetensors`.
            **kwargs: The options of [`download.DownloadOptions`]; settings to change (`num_classes=5` with
                `ignore_mismatched_sizes=True` draws the classes' vectors anew); `dtype` and the other arguments of
                `PreTrainedModel.from_pretrained`.

        Returns:
            The model.

        Raises:
            OSError: If there is no such model, or its files are damaged; the message names the file.
            ValueError: If an argument is a misspelt setting, or asks for weights that are no safetensors.
        """
        path = pretrained_model_name_or_path
        if path is None or any(kwargs.get(name) is not None for name in _OTHER_SOURCES):
            kwargs |= {"subfolder": subfolder, "variant": variant}
            return super().from_pretrained(path, *model_args, **kwargs)  # type: ignore[misc]
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must be True: other files of weights can run code, got False")
        if kwargs.get("key_mapping"):
            raise ValueError(f"key_mapping must be None: the names are the model's, got {kwargs['key_mapping']!r:.80}")
        folder, subfolder = Path(as_source(path)), as_source(subfolder, "subfolder") if subfolder else ""
        kwargs |= {name: _model_dtype(name, kwargs[name]) for name in ("dtype", "torch_dtype") if name in kwargs}
        kwargs |= {"subfolder": subfolder, "variant": variant, "use_safetensors": True}
        if (folder / subfolder / PEFT_CONFIG).is_file():
            _check_adapter(folder / subfolder, cast(type[ModelConfig], cls.config_class))
            return super().from_pretrained(path, *model_args, **kwargs)  # type: ignore[misc]
        options = DownloadOptions.taken_from(kwargs)
        if not folder.is_dir():
            folder = download_model(str(path), subfolder=subfolder, variant=variant, options=options)
        place = Place(str(path), f"{subfolder}/" if subfolder else "")
        kind = cast(type[ModelConfig], cls.config_class)
        check_model_files(folder / subfolder, place, variant, kind=kind)
        kwargs["config"] = _wanted_config(kind, folder / subfolder, place, kwargs)
        try:
            loaded = super().from_pretrained(str(folder), *model_args, **kwargs)  # type: ignore[misc]
        except TypeError as error:  # of the model's constructor, which gets what nothing else knows
            if unknown := re.search(r"unexpected keyword argument ('\w+')", str(error)):
                raise ValueError(f"from_pretrained has no argument {unknown[1]}") from error
            raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.name_or_path = model.config.name_or_path = str(path)
        return loaded


def _check_adapter(folder: Path, kind: type[ModelConfig]) -> None:
    """Raises OSError unless a folder holds a sound adapter alone, whose model is sound too."""
    if (folder / "config.json").is_file():
        raise OSError(
            f"{folder} holds a model and an adapter ({PEFT_CONFIG}): move the adapter to its own folder, and load it "
            "by load_lora_weights"
        )
    check_peft_folder(folder / PEFT_CONFIG, folder / PEFT_WEIGHTS)
    base = read_json(folder / PEFT_CONFIG, str(folder / PEFT_CONFIG)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise OSError(f"{folder / PEFT_CONFIG} must name the model of the adapter, got {base!r:.60}")
    if Path(base).is_dir():
        check_model_files(Path(base), Place(base, ""), None, kind=kind)


def _model_dtype(argument: str, value: Any) -> Any:  # noqa: ANN401  # whatever was given
    """A type of weights as transformers takes it, for which None is another than "auto"."""
    return value if value is None or value == "auto" else as_dtype(argument, value)


def _wanted_config(kind: type[ModelConfig], folder: Path, place: Place, kwargs: dict[str, Any]) -> ModelConfig:
    """The configuration to build, with the settings that a call changes, which are removed from its arguments."""
    own = {field.name for field in fields(kind)} - {"dtype"} | {"num_labels", "output_attentions"}
    changed = {name: kwargs.pop(name) for name in sorted(own & kwargs.keys())}
    config = kwargs.pop("config", None)
    if not isinstance(config, kind):
        config = kind.from_pretrained(folder if config is None else config, **changed)
    elif changed:
        raise ValueError(f"give config or settings to change, got both: {', '.join(changed)}")
    for name in kwargs:
        if near := did_you_mean(name, own, likeness=0.85):
            raise ValueError(f"from_pretrained has no argument {name!r}{near}")
    if not is_quantized(config):
        entries = read_entries(folder, place, kwargs.get("variant"))
        check_entries(config, entries, place, may_differ=bool(kwargs.get("ignore_mismatched_sizes")))
    return config


__all__ = ["HubModel"]
