"""The files of a model looked through before it is built: settings, names, shapes and types of the weights, numbers.

What a file claims is believed only as far as the weights bear it out: a refusal costs no more than reading a header.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig, checked_config, read_json
from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.inverse.network import TarFlowInverseTransformer
from tarflow_hf.hub.checkpoint_files import INDEX, Place, weight_names
from tarflow_hf.hub.safetensors_files import FLOATS, Entry, check_finite, read_header, shape_text

ModelConfig = TarFlowConfig | TarFlowInverseConfig

# Every configuration that was ever saved has these, and most of them mean something that the weights do not show.
_ALWAYS_SAVED: dict[type[ModelConfig], list[str]] = {
    TarFlowConfig: (
        "image_size num_channels patch_size hidden_size num_blocks layers_per_block head_dim mlp_ratio num_classes "
        "volume_preserving noise_type noise_std"
    ).split(),
    TarFlowInverseConfig: "flow hidden_size num_layers head_dim mlp_ratio max_guidance_scale".split(),
}
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.(?:layers\.(\d{1,9})\.)?")


def check_model_files(
    folder: Path,
    place: Place,
    variant: str | None = None,
    *,
    finite: bool = True,
    kind: type[ModelConfig] = TarFlowConfig,
) -> None:
    """Raises OSError, naming the file, unless a folder holds a sound model.

    Args:
        folder: The folder of `config.json` and the weights.
        place: What messages call it.
        variant: The weights that are wanted.
        finite: Whether to read the weights themselves and look for numbers that are not finite.
        kind: The configuration of the model: a flow's, or that of a learned inverse.
    """
    config = read_config(folder, place, kind)
    entries = read_entries(folder, place, variant)
    if not is_quantized(config):
        check_entries(config, entries, place)
    if finite:
        for file in weight_files(folder, place, variant):
            check_finite(folder / file, place.file(file))


def is_quantized(config: ModelConfig) -> bool:
    """Whether the weights are a quantizer's, which has names, shapes and types of its own."""
    return getattr(config, "quantization_config", None) is not None


def read_config(folder: Path, place: Place, kind: type[ModelConfig] = TarFlowConfig) -> ModelConfig:
    """The configuration in a model's folder.

    Raises:
        OSError: If it is missing, or not one that was saved.
    """
    if not (folder / "config.json").is_file():
        pipeline = '; its model is in subfolder="transformer"' if (folder / INDEX).is_file() else ""
        raise OSError(f"{place.owner} is incomplete: it has no {place.inside}config.json{pipeline}")
    name = place.file("config.json")
    content = read_json(folder / "config.json", name)
    config = checked_config(kind, content, name)
    _check_of_transformers(content, name)
    if lacking := [key for key in _ALWAYS_SAVED[kind] if key not in content]:
        raise OSError(f"{name} is incomplete: it lacks {', '.join(lacking)}")
    return config


def _check_of_transformers(content: Mapping[str, Any], name: str) -> None:
    """Raises OSError where a setting of transformers' own is none: it looks at them late, or never."""
    for key in ("output_hidden_states", "return_dict"):
        if type(content.get(key, False)) is not bool:
            raise OSError(f"{name} is damaged: {key} must be true or false, got {content[key]!r:.60}")
    quantization = content.get("quantization_config")
    if quantization is not None:
        from transformers.utils.quantization_config import QuantizationMethod

        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in [known.value for known in QuantizationMethod]:
            raise OSError(
                f"{name} is damaged: quantization_config must be an object with the quant_method of one of "
                f"transformers' quantizers, got {quantization!r:.60}"
            )


def read_entries(folder: Path, place: Place, variant: str | None = None, stem: str = "model") -> dict[str, Entry]:
    """What the headers of a model's weights say, by the names of the tensors."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder, place, variant, stem):
        entries |= read_header(folder / file, place.file(file))
    return entries


def weight_files(folder: Path, place: Place, variant: str | None = None, stem: str = "model") -> list[str]:
    """The files that hold the weights of a model's folder: one, or the shards that an index lists.

    Args:
        folder: The folder.
        place: What messages call it.
        variant: The weights that are wanted.
        stem: How their names begin, see [`checkpoint_files.weight_names`].

    Raises:
        OSError: If there are none or both kinds, one is missing, or the index names what is no shard of this folder.
    """
    whole, _, index = weight_names(variant, stem)
    if (folder / whole).is_file() and (folder / index).is_file():
        raise OSError(
            f"{place.owner} has weights twice, {place.inside}{whole} and the shards of {index}: take away those that "
            "are not meant"
        )
    if (folder / whole).is_file():
        return [whole]
    if not (folder / index).is_file():
        wanted = "" if variant is None else f" of the variant {variant!r}"
        raise OSError(f"{place.owner} has no weights{wanted}: neither {place.inside}{whole} nor shards of it")
    places, total_size = _weight_map(folder / index, place.file(index))
    shard_name = re.compile(re.escape(whole.removesuffix(".safetensors")) + r"-\d{5}-of-\d{5}\.safetensors")
    shards, size = sorted(set(places.values())), 0
    for shard in shards:
        if not shard_name.fullmatch(shard):
            raise OSError(f"{place.file(index)} is damaged: {_short(shard)} is no name of a shard of {whole}")
        if not (folder / shard).is_file():
            raise OSError(f"{place.owner} is incomplete: it has no {place.inside}{shard}, which {index} lists")
        entries = read_header(folder / shard, place.file(shard))
        held, size = set(entries), size + sum(entry.num_bytes for entry in entries.values())
        placed = {key for key, file in places.items() if file == shard}
        if missing := sorted(placed - held):
            raise OSError(f"{place.file(shard)} lacks {missing[0]}, which {index} places there")
        if surplus := sorted(held - placed):
            raise OSError(f"{place.file(shard)} has {surplus[0]}, which {index} does not place there")
    if total_size is not None and total_size != size:
        raise OSError(
            f"{place.file(index)} is damaged: total_size must be the {size} bytes of the tensors, got {total_size}"
        )
    return shards


def _weight_map(path: Path, name: str) -> tuple[dict[str, str], int | None]:
    """The shard of each tensor, and the bytes of all where it tells them, from an index of shards."""
    content = read_json(path, name)
    places = content.get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(place, str) for place in places.values())):
        raise OSError(f"{name} is damaged: weight_map must name the file of each tensor, got {_short(places)}")
    if not isinstance(content.get("metadata"), dict):
        raise OSError(f"{name} is damaged: metadata must be an object, got {_short(content.get('metadata'))}")
    total_size = content["metadata"].get("total_size")
    if not (total_size is None or type(total_size) is int or (type(total_size) is float and total_size.is_integer())):
        raise OSError(f"{name} is damaged: total_size must be a number of bytes, got {_short(total_size)}")
    return places, None if total_size is None else int(total_size)


def check_entries(
    config: ModelConfig, entries: Mapping[str, Entry], place: Place, *, may_differ: bool = False
) -> None:
    """Raises OSError unless weights are those of a model with this configuration, naming what differs.

    Args:
        config: The configuration.
        entries: What the headers of the weights say.
        place: What messages call their folder.
        may_differ: Whether tensors may be missing or of other shapes, which transformers then draws anew.
    """
    settings = place.file("config.json")
    if not may_differ:
        _check_depths(config, entries, settings)
    expected = expected_shapes(config, settings)
    if surplus := sorted(entries.keys() - expected.keys()):
        if may_differ:  # drawing weights anew is what was asked for, leaving some out is not
            raise ValueError(
                f"ignore_mismatched_sizes draws weights of other sizes anew, and {surplus[0]} would be left out: "
                "tarflow_hf.adapt makes a model without it, by a rule that keeps the density where one does"
            )
        raise OSError(
            f"{entries[surplus[0]].file} has {len(surplus)} tensors that a model of its config.json has not, "
            f"among them {surplus[0]}: {_depth_text(config)}"
        )
    missing = sorted(expected.keys() - entries.keys())
    if missing and not may_differ:
        raise OSError(f"{place.owner} is incomplete: its weights lack {len(missing)} tensors, among them {missing[0]}")
    for key, entry in entries.items():
        if entry.dtype not in FLOATS:
            raise OSError(f"{entry.file} is damaged: {key} must be one of {', '.join(FLOATS)}, got {entry.dtype}")
        if entry.shape != expected[key] and not may_differ:
            raise OSError(
                f"{entry.file} does not fit its config.json: {key} must be {shape_text(expected[key])}, "
                f"got {shape_text(entry.shape)}"
            )


def _depth_text(config: ModelConfig) -> str:
    """What a configuration says of the number of its tensors."""
    if isinstance(config, TarFlowInverseConfig):
        flow = config.flow_config
        return f"num_layers={config.num_layers}, of a flow of num_blocks={flow.num_blocks}"
    return (
        f"num_blocks={config.num_blocks}, layers_per_block={config.layers_per_block}, num_classes={config.num_classes}"
    )


def _check_depths(config: ModelConfig, names: Iterable[str], settings: str) -> None:
    """Refuses blocks and layers that the weights do not have: a model of 10^7 blocks is never built."""
    if isinstance(config, TarFlowInverseConfig):  # which has more layers than its flow has blocks
        there = {name.split(".")[1] for name in names if name.startswith("layers.")}
        lacking = next((layer for layer in range(config.num_layers) if str(layer) not in there), None)
        if lacking is not None:
            says = f"num_layers={config.num_layers}, and the weights have no layers.{lacking}"
            raise OSError(f"{settings} does not fit the weights: it says {says}")
        return
    layers: dict[int, set[int]] = {}
    for match in filter(None, map(_BLOCK.match, names)):
        of_block = layers.setdefault(int(match[1]), set())
        if match[2] is not None:
            of_block.add(int(match[2]))
    for block, depth in enumerate(config.block_depths):
        if block not in layers:
            says = f"num_blocks={config.num_blocks}, and the weights have no blocks.{block}"
        elif (lacking := next((layer for layer in range(depth) if layer not in layers[block]), None)) is not None:
            says = f"layers_per_block={depth}, and the weights have no blocks.{block}.layers.{lacking}"
        else:
            continue
        raise OSError(f"{settings} does not fit the weights: it says {says}")


def expected_shapes(config: ModelConfig, settings: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a model by name, without making them; `settings` is for the message."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with torch.device("meta"):
            if isinstance(config, TarFlowInverseConfig):
                state = TarFlowInverseTransformer(copy.deepcopy(config)).state_dict()
                return {key: tuple(tensor.shape) for key, tensor in state.items()}
            if config.volume_preserving:
                shapes["prior_variance"] = (config.num_tokens, config.patch_dim)
            for block in range(config.num_blocks):
                state = TarFlowBlock(config, block).state_dict()
                shapes |= {f"blocks.{block}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    except RuntimeError as error:  # a tensor of more than 2^63 bytes
        reason = str(error).splitlines()[0]
        raise OSError(f"{settings} is damaged: no memory holds a model of its sizes: {reason}") from error
    return shapes


def _short(value: Any) -> str:  # noqa: ANN401  # whatever stands in a damaged file
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["check_entries", "check_model_files", "expected_shapes", "is_quantized", "read_config", "read_entries"]
