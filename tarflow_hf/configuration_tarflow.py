"""The shape of a TarFlow model: what is fixed by its weights and by the noise it was trained with.

Nothing about sampling or optimisation is here. How a file of settings is read is, as no room lies below this one.
"""

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

NoiseType = Literal["gaussian", "uniform"]
Config = TypeVar("Config", bound=PreTrainedConfig)
_LARGEST = 2**20  # of any size; a larger one is a damaged file or a slip, and would take all memory before it fails
_MOST_BYTES = 4 * 2**20  # of a file of settings
_FLOATS = ("float64", "float32", "float16", "bfloat16")

# What transformers, of any version, and its quantizers keep in a configuration beside the fields of PreTrainedConfig.
OF_TRANSFORMERS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class _commit_hash
    _experts_implementation _experts_implementation_internal _is_quantized _name_or_path _num_labels
    _output_attentions _pre_quantization_dtype add_cross_attention attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id experts_implementation exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id fusion_config is_decoder length_penalty max_length
    min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_past output_scores pad_token_id prefix pruned_heads quantization_config
    remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
    top_p torch_dtype torchscript transformers_weights typical_p use_bfloat16 use_cache xla_device""".split()
)


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The end of a message on an unknown name: the nearest known one, or nothing where none is as near as `likeness`.

    Example:
        >>> did_you_mean("num_block", ["num_blocks", "num_classes"])
        ", did you mean 'num_blocks'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f", did you mean {near[0]!r}?" if near else ""


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file, which the message calls `name`; no key may stand in it twice.

    Raises:
        OSError: If the file is cut short, holds something else, or is larger than settings are.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("config.json").write_text('{"num_blocks": 4}')
        >>> read_json(Path("config.json"), "config.json")
        {'num_blocks': 4}
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise OSError(f"{name} must be at most {_MOST_BYTES} bytes, got {size}")
    return parse_json(path.read_bytes(), name)


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON text, which the message calls `name`; raises as [`read_json`] does.

    Example:
        >>> parse_json(b'{"num_blocks": 4, "num_blocks": 8}', "config.json")
        Traceback (most recent call last):
            ...
        OSError: config.json is damaged: the key 'num_blocks' stands in it twice
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(name for name, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise OSError(f"{name} is damaged: the key {twice!r} stands in it twice")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        loaded = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{name} is cut short or not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise OSError(f"{name} must hold a JSON object, got {str(loaded)[:40]!r} ({type(loaded).__name__})")
    return loaded


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """The two sides of an image given by its side, if it is square, or by (height, width); ValueError for others.

    Example:
        >>> height_and_width(64), height_and_width((16, 32))
        ((64, 64), (16, 32))
    """
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or not 1 <= min(sides) <= max(sides) <= _LARGEST:
        wanted = f"at least 1, or (height, width) of at least 1 each, and at most {_LARGEST}"
        raise ValueError(f"image_size must be {wanted}, got {str(image_size)[:80]}")
    return sides[0], sides[1]


def refuse_unknown(config: PreTrainedConfig, arguments: dict[str, Any]) -> None:
    """Raises ValueError for an argument that a configuration has not, and where one of transformers' own is wrong."""
    names, dtype = config.id2label, arguments.get("torch_dtype", config.dtype)
    if not (names is None or (isinstance(names, dict) and all(str(index).isdecimal() for index in names))):
        raise ValueError(f"id2label must name classes by their ids, {{0: 'cat', 1: 'dog'}}, got {names!r:.60}")
    if not (config.label2id is None or isinstance(config.label2id, dict)):
        raise ValueError(f"label2id must be an object of names and their ids, got {config.label2id!r:.60}")
    if not (dtype is None or str(dtype).removeprefix("torch.") in _FLOATS):
        raise ValueError(f"dtype must be a floating point type such as 'float32', got {dtype!r:.60}")
    known = sorted(field.name for field in fields(config))
    for name in arguments.keys() - OF_TRANSFORMERS:
        raise ValueError(f"{type(config).__name__} has no argument {name!r}{did_you_mean(name, known)}")
    if arguments.get("model_type", config.model_type) != config.model_type:
        raise ValueError(f"model_type must be {config.model_type!r}, got {arguments['model_type']!r}")


class SettingsFile(PreTrainedConfig):
    """How our configurations are read from their files: one that is missing or damaged is refused."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
        """The settings in a file and the arguments that are left, as transformers has it."""
        content, unused = super().get_config_dict(*args, **kwargs)
        if not content:
            raise OSError(f"{args[0]} has no config.json with settings of a {cls.__name__}")
        return content, unused

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike[str]) -> dict[str, Any]:  # where transformers reads a file
        content = read_json(Path(json_file), str(json_file))
        checked_config(cls, content, str(json_file))
        return content


@strict
class TarFlowConfig(SettingsFile):
    """Configuration of a [`TarFlowModel`].

    An image is cut into `num_tokens` = (height / patch_size) (width / patch_size) patches of `patch_dim` =
    num_channels * patch_size^2 numbers each. The defaults are the paper's ImageNet 64x64 model.

    Args:
        image_size: Side of a square image in pixels, or (height, width); multiples of `patch_size`. A pair of equal
            sides is kept as the one number.
        num_channels: Channels of the image, for instance 1 for grey and 3 for RGB.
        patch_size: Side of a patch in pixels.
        hidden_size: Width of the transformer; a multiple of `head_dim`.
        num_blocks: Number of autoregressive flow blocks; every second one reads the patches in reverse order.
        layers_per_block: Transformer layers in a block: one number for all blocks, or one per block in the order from
            image to noise.
        head_dim: Width of one attention head.
        mlp_ratio: Width of the MLP's hidden layer divided by `hidden_size`.
        num_classes: Number of classes the model is conditioned on; 0 for an unconditional model.
        volume_preserving: If true the blocks only shift (log-determinant 0) and the variance of the prior is learned.
        noise_type: Noise the images had in training: `"gaussian"` with `noise_std`, or `"uniform"` dequantisation.
        noise_std: Standard deviation of the Gaussian training noise, in units of the [-1, 1] pixel range. Denoising
            uses it. Ignored for uniform noise and for a model with `noise_conditioning`.
        noise_conditioning: If true every block is told the level of the Gaussian noise on each image, and images are
            sampled by decoding at the highest level and refining towards none (iTARFlow).
        noise_range: Lowest and highest standard deviation of the noise that a model with `noise_conditioning` knows.
        resize: How the images of the training were brought to `image_size`, see [`processing.resize_and_crop`].
        id2label: Class names, from class id to name; the ids are 0 ... `num_classes` - 1.
        condition_dim: Numbers in the vector that each image is conditioned on; 0 for none.
        condition_names: What these numbers are called; None: nothing.
        condition_mean: Mean of each number over the training data; None: 0. The model standardises what it is given.
        condition_std: Standard deviation of each; None: 1.
        num_conditioned_blocks: Blocks that are told class and condition, counted from the noise; None: all. Guidance
            acts in these alone (STARFlow: in the deep block next to the noise).
        value_mean: For a model of arrays: what is subtracted from each channel of the data. None: 8-bit images.
        value_scale: What each channel is then divided by; the model and `noise_std` are in units of the result.

    Raises:
        ValueError: If an argument is unknown.
        huggingface_hub.errors.StrictDataclassError: If a value has the wrong type, or values do not fit together.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329;
    for `noise_conditioning` arXiv 2604.20041.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, patch_size=2, hidden_size=64, num_blocks=2)
        >>> config.num_tokens, config.patch_dim
        (16, 4)
    """

    model_type = "tarflow"

    image_size: int | tuple[int, ...] | list[int] = 64
    num_channels: int = 3
    patch_size: int = 2
    hidden_size: int = 768
    num_blocks: int = 8
    layers_per_block: int | list[int] = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    num_classes: int = 0
    volume_preserving: bool = False
    noise_type: NoiseType = "gaussian"
    noise_std: float | int = 0.05
    noise_conditioning: bool = False
    noise_range: tuple[float | int, ...] | list[float | int] = (0.01, 0.3)
    condition_dim: int = 0
    condition_names: list[str] | None = None
    condition_mean: list[float | int] | None = None
    condition_std: list[float | int] | None = None
    num_conditioned_blocks: int | None = None
    value_mean: list[float | int] | None = None
    value_scale: list[float | int] | None = None
    resize: Literal["short_side", "adm"] = "short_side"

    def __post_init__(self, **kwargs: object) -> None:
        refuse_unknown(self, kwargs)
        if kwargs.get("num_labels") not in (None, self.num_classes):
            raise ValueError(f"num_labels must be num_classes={self.num_classes}, got {kwargs['num_labels']}")
        if self.num_classes > _LARGEST:
            raise ValueError(f"num_classes must be at most {_LARGEST}, got {self.num_classes}")
        if self.id2label is None:
            self.id2label = {index: f"LABEL_{index}" for index in range(self.num_classes)}
        if self.label2id is None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        self.noise_range = tuple(self.noise_range) if isinstance(self.noise_range, list) else self.noise_range
        if isinstance(self.image_size, list | tuple):
            square = len(self.image_size) == 2 and self.image_size[0] == self.image_size[1]
            self.image_size = self.image_size[0] if square else tuple(self.image_size)
        super().__post_init__(**kwargs)
        self.id2label = dict(sorted(cast(dict[int, str], self.id2label).items()))  # in files 10 comes before 2

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, without what says nothing: on a condition, on blocks told it, on arrays."""
        said = {"condition_": self.condition_dim, "num_cond": self.num_conditioned_blocks, "value_": self.value_mean}
        silent = tuple(start for start, value in said.items() if not value)
        return {name: value for name, value in super().to_dict().items() if not name.startswith(silent)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401  # as transformers has it
        """A configuration from a dictionary, with some of its values replaced; a misspelt argument is a ValueError.

        Another number of classes, by `num_classes` or by transformers' word for it, `num_labels`, gets new names for
        the classes where none are given; names alone (`id2label`) say how many there are.

        Args:
            config_dict: Values by their names.
            **kwargs: Values in place of those, and what `PreTrainedConfig.from_dict` takes.

        Returns:
            The configuration; with `return_unused_kwargs=True` also the arguments that are none of its.
        """
        own = {field.name for field in fields(cls)} - {"dtype"}
        if (count := kwargs.pop("num_labels", len(kwargs.get("id2label") or []) or None)) is not None:
            kwargs.setdefault("num_classes", count)
        replaced = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        values = {**config_dict, **replaced}
        if values.get("num_classes") != config_dict.get("num_classes") and "id2label" not in replaced:
            values.pop("id2label", None)
        if "label2id" not in replaced and values.get("id2label") != config_dict.get("id2label"):
            values.pop("label2id", None)
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        if not replaced and "name_or_path" in kwargs:
            checked_config(cls, values, f"{kwargs['name_or_path']}: config.json")
        config, unused = super().from_dict(values, return_unused_kwargs=True, **kwargs)
        for name in () if wants_unused else unused:
            if near := did_you_mean(name, own, likeness=0.85):
                raise ValueError(f"TarFlowConfig has no argument {name!r}{near}")
        return (config, unused) if wants_unused else config

    @property
    def image_height(self) -> int:
        """Rows of pixels of an image."""
        return height_and_width(self.image_size)[0]

    @property
    def image_width(self) -> int:
        """Columns of pixels of an image."""
        return height_and_width(self.image_size)[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the grid of patches."""
        return self.image_height // self.patch_size, self.image_width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T, the number of patches of an image."""
        return math.prod(self.grid_size)

    @property
    def patch_dim(self) -> int:
        """D, the numbers in a patch."""
        return self.num_channels * self.patch_size**2

    @property
    def num_dims(self) -> int:
        """T * D, the numbers in an image."""
        return self.num_tokens * self.patch_dim

    @property
    def num_attention_heads(self) -> int:
        """Heads of an attention layer."""
        return self.hidden_size // self.head_dim

    @property
    def block_depths(self) -> list[int]:
        """Transformer layers of each block, in the order from image to noise."""
        depths = self.layers_per_block
        return [depths] * self.num_blocks if isinstance(depths, int) else list(depths)

    def validate_sizes(self) -> None:
        """Raises ValueError if sizes are not positive or do not fit together; runs when the configuration is made."""
        for name in ("num_channels", "patch_size", "hidden_size", "num_blocks", "head_dim", "mlp_ratio"):
            if not 1 <= (size := getattr(self, name)) <= _LARGEST:
                raise ValueError(f"{name} must be at {f'most {_LARGEST}' if size > 1 else 'least 1'}, got {size}")
        if any(side % self.patch_size for side in height_and_width(self.image_size)):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of head_dim={self.head_dim}")
        depths = self.block_depths
        if len(depths) != self.num_blocks or not 1 <= min(depths) <= max(depths) <= _LARGEST:
            wanted = f"a positive number, or num_blocks={self.num_blocks} of them"
            raise ValueError(f"layers_per_block must be {wanted}, got {str(self.layers_per_block)[:80]}")

    def validate_classes(self) -> None:
        """Raises ValueError if not every class has one name; runs when the configuration is made."""
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unconditional) or more, got {self.num_classes}")
        if wrong := [name for name in (self.id2label or {}).values() if not isinstance(name, str)]:
            raise ValueError(f"id2label must name classes by text, got {wrong[0]!r}")
        reverse = {name: int(index) for index, name in (self.id2label or {}).items()}
        if reverse and isinstance(self.label2id, dict) and self.label2id != reverse:
            raise ValueError(f"label2id must be the reverse of id2label, got {str(self.label2id)[:80]}")
        if sorted(int(index) for index in self.id2label or {}) != list(range(self.num_classes)):
            raise ValueError(
                f"id2label must name the ids 0 ... num_classes - 1 with num_classes={self.num_classes}, "
                f"got {len(self.id2label or {})} names for the ids {sorted(self.id2label or {})[:10]}"
            )

    def is_conditioned(self, block_idx: int) -> bool:
        """Whether a block, counted from the image, is told class and condition."""
        return self.num_blocks - block_idx <= (self.num_conditioned_blocks or self.num_blocks)

    def validate_scaling(self) -> None:
        """Raises ValueError unless each number of a condition, and each channel of arrays, is described once."""
        if self.condition_dim < 0:
            raise ValueError(f"condition_dim must be 0 (none) or more, got {self.condition_dim}")
        sizes = dict.fromkeys(("condition_names", "condition_mean", "condition_std"), "condition_dim")
        for name, size in (sizes | dict.fromkeys(("value_mean", "value_scale"), "num_channels")).items():
            values = getattr(self, name)
            if values is not None and len(values) != getattr(self, size):
                raise ValueError(f"{name} must have {size}={getattr(self, size)} values, got {values}")
            if name.endswith("_mean") and not all(math.isfinite(mean) for mean in values or []):
                raise ValueError(f"{name} must be finite, got {values}")
            if name.endswith(("_std", "_scale")) and not all(0 < scale < math.inf for scale in values or []):
                raise ValueError(f"{name} must be finite and above 0, got {values}")
        if len(set(self.condition_names or [])) != len(self.condition_names or []):
            raise ValueError(f"condition_names must differ, got {self.condition_names}")
        if (self.value_mean is None) != (self.value_scale is None):
            raise ValueError("value_mean and value_scale must be given together")
        if self.value_scale is not None and self.noise_type != "gaussian":
            raise ValueError(f"arrays need noise_type='gaussian', got {self.noise_type!r}: they have no 8-bit levels")
        count = self.num_conditioned_blocks
        if count is not None and not 1 <= count <= self.num_blocks:
            raise ValueError(f"num_conditioned_blocks must be 1 ... num_blocks={self.num_blocks}, got {count}")

    def validate_noise(self) -> None:
        """Raises ValueError if noise levels are out of range; runs when the configuration is made."""
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"noise_std must be finite and at least 0, got {self.noise_std}")
        levels = tuple(self.noise_range)
        if len(levels) != 2 or not 0 < levels[0] <= levels[1] < math.inf:
            raise ValueError(f"noise_range must be two rising finite levels above 0, got {levels}")
        if self.noise_conditioning and (self.noise_type != "gaussian" or self.volume_preserving):
            got = f"got {self.noise_type!r} and {self.volume_preserving}"
            raise ValueError(f"noise_conditioning=True needs noise_type='gaussian', volume_preserving=False, {got}")
        if self.noise_conditioning and self.hidden_size % 2:
            raise ValueError(f"noise_conditioning=True needs an even hidden_size, got {self.hidden_size}")


def checked_config(cls: type[Config], content: dict[str, Any], name: str) -> Config:
    """The configuration that a file holds; OSError, which calls the file `name`, where it is none."""
    try:
        return cls(**content)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{name} is damaged: {reason}") from error


__all__ = ["TarFlowConfig", "did_you_mean", "height_and_width", "parse_json", "read_json"]
