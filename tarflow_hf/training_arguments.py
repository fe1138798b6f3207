"""What a training run can be told: frozen groups of options, read from a YAML recipe and the command line.

Every option has one name, one type and one line of help; the names are the same in a recipe and after `--`.
"""

import argparse
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .configuration_tarflow import TarFlowConfig
from .guidance import Guidance, GuidanceRule, GuidanceSchedule
from .image_processing import ImageFormat, ResizeMethod
from .noise import NoiseLevelSampling, NoiseLevelWeighting, NoiseType

Tracker = Literal["tensorboard", "trackio", "wandb"]
T = TypeVar("T")

# Two ways to say one thing: naming one of a pair on the command line replaces the other one of the recipe.
_ALTERNATIVES = {"epochs": "max_steps", "warmup_epochs": "warmup_steps"}


def _option(default: T, text: str, *, may_change: bool = False) -> T:
    """A field with its help; `may_change` marks what a resumed run may set anew without changing its results."""
    return field(default=default, metadata={"help": text, "may_change": may_change})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelArguments:
    """The shape of the model; the fields mean what they mean in [`TarFlowConfig`]."""

    image_size: int = _option(64, "side of the square images, pixels")
    num_channels: int = _option(3, "1 for grey, 3 for RGB")
    patch_size: int = _option(2, "side of a patch, pixels")
    hidden_size: int = _option(768, "width of the transformer")
    num_blocks: int = _option(8, "flow blocks")
    layers_per_block: int | list[int] = _option(8, "transformer layers of a block: one number, or one per block")
    head_dim: int = _option(64, "width of an attention head")
    mlp_ratio: int = _option(4, "width of the MLP divided by hidden_size")
    volume_preserving: bool = _option(False, "blocks that only shift, with a learned prior variance")
    noise_type: NoiseType = _option("gaussian", "training noise: gaussian, or uniform dequantisation")
    noise_std: float = _option(0.05, "standard deviation of the gaussian noise, of pixels in [-1, 1]")
    noise_conditioning: bool = _option(False, "tell the model the noise level of each image (iTARFlow)")
    noise_range: tuple[float, ...] = _option((0.01, 0.3), "lowest and highest level, with noise_conditioning")
    class_conditional: bool = _option(True, "condition on the labels of the data set")

    def to_config(self, class_names: Sequence[str]) -> TarFlowConfig:
        """The model's configuration for a data set with these classes (none for an unconditional model)."""
        shape = {name: value for name, value in asdict(self).items() if name != "class_conditional"}
        names = dict(enumerate(class_names))
        return TarFlowConfig(**shape, num_classes=len(names), id2label=names)


@dataclass(frozen=True)
class DataArguments:
    """Where the images come from and how they are read."""

    data: str = _option(
        "", "Hub data set, image folder, or parquet file, pattern or folder; ./ is the recipe's folder"
    )
    data_config: str | None = _option(None, "configuration of the Hub data set, for instance a resolution")
    eval_data: str | None = _option(None, "held-out images, where they are not a split of data")
    train_split: str = _option("train", "split to train on")
    eval_split: str | None = _option(None, "split to evaluate on; none: no held-out evaluation")
    image_column: str | None = _option(None, "column of the images; none: the only image column")
    label_column: str | None = _option(None, "column of the labels; none: the only column of class labels")
    resize: ResizeMethod = _option("short_side", "short_side (bilinear, the authors') or adm (box, then bicubic)")
    horizontal_flip: bool = _option(True, "mirror half of the training images at random")
    streaming: bool = _option(False, "read the data set while training instead of storing it first")
    shuffle_buffer: int = _option(10_000, "images that a streamed data set is shuffled over")
    skip_bad_images: bool = _option(False, "let the next readable image stand in for an unreadable one")
    cache_images: bool = _option(False, "keep all prepared images in memory, one byte a sub-pixel", may_change=True)
    num_workers: int = _option(4, "processes that read images, for each training process", may_change=True)

    def __post_init__(self) -> None:
        _require(bool(self.data), "data must name a data set: a Hub name, an image folder or parquet files")
        _require(self.shuffle_buffer >= 1, f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        _require(self.num_workers >= 0, f"num_workers must be at least 0, got {self.num_workers}")
        _require(
            not (self.streaming and self.cache_images),
            "streaming=true and cache_images=true contradict each other: a streamed data set is not kept",
        )


@dataclass(frozen=True)
class OptimizationArguments:
    """The optimisation: all counts are optimizer steps unless they say otherwise."""

    batch_size: int = _option(256, "images of an optimizer step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = _option(1, "parts the batch of a process is cut into", may_change=True)
    epochs: float | None = _option(None, "length of the training, passes over the data set")
    max_steps: int | None = _option(None, "length of the training, optimizer steps (in place of epochs)")
    learning_rate: float = _option(1e-4, "highest learning rate")
    min_learning_rate: float = _option(1e-6, "learning rate at the first step and at the end")
    warmup_epochs: float | None = _option(None, "passes over the data set with a rising learning rate")
    warmup_steps: int | None = _option(None, "steps with a rising learning rate (in place of warmup_epochs)")
    weight_decay: float = _option(1e-4, "AdamW's weight decay, on every parameter")
    adam_beta1: float = _option(0.9, "AdamW's decay of the first moment")
    adam_beta2: float = _option(0.95, "AdamW's decay of the second moment")
    label_drop: float = _option(0.1, "probability that an image trains without its label (conditional models)")
    noise_level_sampling: NoiseLevelSampling = _option("uniform", "how levels are drawn, with noise_conditioning")
    noise_level_weighting: NoiseLevelWeighting = _option("t", "weight of the loss, with noise_conditioning")
    max_grad_norm: float | None = _option(None, "gradients are scaled down to this norm; none: not clipped")
    ema_decay: float | None = _option(None, "decay of the moving average of the weights; none: no average")
    max_bad_steps: int = _option(20, "non-finite steps in a row that end the run", may_change=True)
    precision: Literal["float32", "bfloat16"] = _option("float32", "of the matrix products; weights stay float32")
    activation_checkpointing: bool = _option(False, "recompute activations to save memory", may_change=True)
    compile: bool = _option(False, "compile the model with torch.compile", may_change=True)
    deterministic: bool = _option(False, "deterministic kernels: a resumed GPU run is bit-identical", may_change=True)
    seed: int = _option(0, "of the initial weights, the order of the images, flips, noise and label dropping")

    def __post_init__(self) -> None:
        _require(
            (self.epochs is None) != (self.max_steps is None),
            f"give either epochs or max_steps, got epochs={self.epochs} and max_steps={self.max_steps}",
        )
        _require(
            self.warmup_epochs is None or self.warmup_steps is None,
            f"give warmup_epochs or warmup_steps, got {self.warmup_epochs} and {self.warmup_steps}",
        )
        for name in ("batch_size", "gradient_accumulation_steps", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "max_steps", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "warmup_epochs", "warmup_steps", "seed"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must be at least 0, got {value}")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        _require(0 <= self.label_drop <= 1, f"label_drop must be in [0, 1], got {self.label_drop}")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate must be between 0 and learning_rate={self.learning_rate}, "
            f"got {self.min_learning_rate}",
        )


@dataclass(frozen=True)
class OutputArguments:
    """What a run writes, when, and the sampling defaults that are saved with the pipeline."""

    output_dir: str = _option("runs/tarflow", "folder of the run", may_change=True)
    log_every: int = _option(10, "steps between two lines of metrics.jsonl", may_change=True)
    eval_every: int | None = _option(None, "steps between held-out evaluations; none: at the end", may_change=True)
    eval_images: int | None = _option(None, "held-out images used; none: all", may_change=True)
    eval_batch_size: int = _option(64, "images evaluated or sampled at once by a process", may_change=True)
    sample_every: int | None = _option(None, "steps between sample grids; none: at the end", may_change=True)
    sample_rows: int = _option(10, "most rows of a sample grid: classes, or just rows", may_change=True)
    sample_columns: int = _option(10, "images in a row of a sample grid", may_change=True)
    guidance_scale: float = _option(1.0, "the pipeline's default guidance, 1 + the paper's w", may_change=True)
    guidance_schedule: GuidanceSchedule = _option("linear", "the pipeline's default schedule", may_change=True)
    attention_temperature: float = _option(1.0, "the pipeline's default, of the unlabelled branch", may_change=True)
    denoising_strength: float | None = _option(None, "the pipeline's default, 1 is Tweedie", may_change=True)
    guidance_rule: GuidanceRule | None = _option(None, "the pipeline's default; none: log_scale", may_change=True)
    num_refinement_steps: int | None = _option(None, "the pipeline's default, denoising steps", may_change=True)
    checkpoint_every: int | None = _option(None, "steps between checkpoints; none: at the end", may_change=True)
    keep_checkpoints: int = _option(2, "complete checkpoints that are kept, the newest", may_change=True)
    report_to: tuple[Tracker, ...] = _option((), "experiment trackers beside metrics.jsonl", may_change=True)
    push_to_hub: bool = _option(False, "upload the pipeline to the Hub at the end", may_change=True)
    push_checkpoints: bool = _option(False, "also at each checkpoint, while training goes on", may_change=True)
    hub_model_id: str | None = _option(None, "repository, user/model; none: named like output_dir", may_change=True)
    hub_private: bool = _option(False, "make the repository private, if it is made now", may_change=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (int, int | None) and value is not None:
                _require(value >= 1, f"{item.name} must be at least 1, got {value}")
        rule = self.guidance_rule or "log_scale"
        Guidance(self.guidance_scale, self.guidance_schedule, self.attention_temperature, rule=rule)
        _require(
            self.push_to_hub or not (self.push_checkpoints or self.hub_model_id or self.hub_private),
            "push_checkpoints, hub_model_id and hub_private need push_to_hub=true",
        )

    @property
    def repo_id(self) -> str:
        """Name of the repository on the Hub."""
        return self.hub_model_id or Path(self.output_dir).name


@dataclass(frozen=True)
class TrainingArguments:
    """All options of a run."""

    model: ModelArguments
    data: DataArguments
    optimization: OptimizationArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        _require(
            not (self.data.streaming and self.optimization.max_steps is None),
            "a streamed data set has no known length: give max_steps in place of epochs",
        )
        _require(
            not (self.data.streaming and self.optimization.warmup_epochs is not None),
            "a streamed data set has no known length: give warmup_steps in place of warmup_epochs",
        )
        _require(
            self.data.eval_data is None or self.data.eval_split is not None,
            f"eval_data={self.data.eval_data!r} needs eval_split, the name of its split",
        )
        _ = self.image_format  # checks its values

    @property
    def image_format(self) -> ImageFormat:
        """What every image is turned into."""
        return ImageFormat(self.model.image_size, self.model.num_channels, self.data.resize)

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def fixed(self) -> dict[str, Any]:
        """The options that decide the result of a run: a checkpoint made with others is of another run."""
        options = _options()
        return {name: value for name, value in self.flat().items() if not options[name].may_change}


_GROUPS = {
    "model": ModelArguments,
    "data": DataArguments,
    "optimization": OptimizationArguments,
    "output": OutputArguments,
}


@dataclass(frozen=True)
class _Option:
    group: str
    annotation: Any
    default: Any
    text: str
    may_change: bool


def _options() -> dict[str, _Option]:
    found = {}
    for group, cls in _GROUPS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            meta = item.metadata
            found[item.name] = _Option(group, hints[item.name], item.default, meta["help"], meta["may_change"])
    return found


def make_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Options from a flat mapping, each converted to its type.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type or range, or options contradict each other.
    """
    options = _options()
    unknown = [name for name in values if name not in options]
    _require(not unknown, f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(options)}")
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for name, value in values.items():
        groups[options[name].group][name] = convert(name, value, options[name].annotation)
    return TrainingArguments(**{group: cls(**groups[group]) for group, cls in _GROUPS.items()})


def convert(name: str, value: object, annotation: object) -> object:
    """A value of YAML as the type of an option: int, float, bool, str, None, Literal, list or a union of them.

    YAML reads 1e-4 as text, so text that spells a number is taken where a number is expected.

    Raises:
        ValueError: If the value does not fit; it names the option, what was expected and what came.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for member in get_args(annotation):
            try:
                return convert(name, value, member)
            except ValueError:
                continue
    elif origin is Literal:
        if value in get_args(annotation):
            return value
    elif origin in (list, tuple):
        items = [value] if origin is tuple and isinstance(value, str) else value
        if isinstance(items, list | tuple):
            return origin(convert(name, item, get_args(annotation)[0]) for item in items)
    elif annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is annotation or (annotation is types.NoneType and value is None):
        return value
    raise ValueError(f"{name} must be {_type_name(annotation)}, got {value!r}")


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in get_args(annotation))
    if annotation is types.NoneType:
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options of a YAML recipe, as they are written there but for paths of data.

    `data` and `eval_data` that start with ./ or ../ are taken relative to the recipe's folder.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a mapping of options.
    """
    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    _require(isinstance(values, dict), f"{path} must hold a mapping of options, got {type(values).__name__}")
    for name in ("data", "eval_data"):
        value = values.get(name)
        if isinstance(value, str) and value.startswith(("./", "../")):
            values[name] = str((path.parent / value).resolve())
    return values


def parse_arguments(argv: Sequence[str], *, default_recipe: str | Path) -> TrainingArguments:
    """Options from a command line `[recipe.yaml] [--name value ...]`, which overrides single values of the recipe.

    Args:
        argv: The arguments after the program's name.
        default_recipe: The recipe that is read where the command line names none.

    Raises:
        SystemExit: If the command line is not understood; the reason is printed.
        ValueError: If an option is unknown in the recipe, or a value does not fit.
    """
    options = _options()
    parser = argparse.ArgumentParser(
        description="Train a TarFlow model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("recipe", nargs="?", default=str(default_recipe), help="YAML file of options")
    for name, option in options.items():
        text = f"{option.text} [{option.default}]".replace("%", "%%")
        if option.annotation is bool:
            parser.add_argument(f"--{name}", nargs="?", const="true", metavar="BOOL", help=text)
        else:
            parser.add_argument(f"--{name}", metavar=_type_name(option.annotation).upper()[:24], help=text)
    given = vars(parser.parse_args(argv))
    values = read_recipe(given.pop("recipe"))
    for name, other in [*_ALTERNATIVES.items(), *((b, a) for a, b in _ALTERNATIVES.items())]:
        if name in given and other not in given:
            values.pop(other, None)
    for name, text in given.items():
        values[name] = text if text in _text_choices(options[name].annotation) else yaml.safe_load(text)
    return make_arguments(values)


def _text_choices(annotation: object) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


__all__ = [
    "DataArguments",
    "ModelArguments",
    "OptimizationArguments",
    "OutputArguments",
    "TrainingArguments",
    "convert",
    "make_arguments",
    "parse_arguments",
    "read_recipe",
]
