"""What a training run can be told: frozen groups of options, each with one name, one type and one line of help.

`recipes.py` reads them from a YAML recipe and the command line; the names are the same in both. Nothing here imports
torch before an option is checked that needs it, so that `--help` answers at once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from tarflow_hf.flow.choices import GuidanceRule, GuidanceSchedule, NoiseLevelSampling, NoiseLevelWeighting
from tarflow_hf.images.arguments import DataArguments, ResizeMethod, option, public_place, require

if TYPE_CHECKING:
    from tarflow_hf.configuration_tarflow import TarFlowConfig
    from tarflow_hf.images.processing import ImageFormat

Tracker = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class ModelArguments:
    """The shape of the model; the fields mean what they mean in [`TarFlowConfig`].

    Example:
        >>> shape = ModelArguments(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
        >>> shape.to_config(["cat", "dog"]).id2label
        {0: 'cat', 1: 'dog'}
    """

    image_size: int | tuple[int, ...] = option(64, "side of square images, or [height, width], pixels")
    num_channels: int = option(3, "1 for grey, 3 for RGB")
    patch_size: int = option(2, "side of a patch, pixels")
    hidden_size: int = option(768, "width of the transformer")
    num_blocks: int = option(8, "flow blocks")
    layers_per_block: int | list[int] = option(8, "transformer layers of a block: one number, or one per block")
    head_dim: int = option(64, "width of an attention head")
    mlp_ratio: int = option(4, "width of the MLP divided by hidden_size")
    volume_preserving: bool = option(False, "blocks that only shift, with a learned prior variance")
    noise_type: Literal["gaussian", "uniform"] = option(
        "gaussian", "training noise: gaussian, or uniform dequantisation"
    )
    noise_std: float = option(0.05, "standard deviation of the gaussian noise, of pixels in [-1, 1]")
    noise_conditioning: bool = option(False, "tell the model the noise level of each image (iTARFlow)")
    noise_range: tuple[float, ...] = option((0.01, 0.3), "lowest and highest level, with noise_conditioning")
    class_conditional: bool = option(True, "condition on the labels of the data set")
    num_conditioned_blocks: int | None = option(None, "blocks told class and condition, from the noise; none: all")

    def to_config(
        self,
        class_names: Sequence[str],
        resize: ResizeMethod = "short_side",
        **condition: Any,  # noqa: ANN401
    ) -> "TarFlowConfig":
        """The model's configuration for a data set with these classes (none for an unconditional model).

        `condition` are the fields of [`TarFlowConfig`] that describe the data's condition.
        """
        from tarflow_hf.configuration_tarflow import TarFlowConfig

        shape = {name: value for name, value in asdict(self).items() if name != "class_conditional"}
        names = dict(enumerate(class_names))
        return TarFlowConfig(**shape, num_classes=len(names), id2label=names, resize=resize, **condition)


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters beside linear layers, of PEFT: y = W x + b + (alpha / rank) B A x.

    Example:
        >>> LoraArguments(rank=4).targets
        ('qkv_proj', 'out_proj', 'up_proj', 'down_proj')
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv_proj", "out_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 4096, f"lora.rank must be at least 1 and at most 4096, got {self.rank}")
        require(0 < self.alpha < float("inf"), f"lora.alpha must be finite and above 0, got {self.alpha}")
        require(bool(self.targets), "lora.targets must name a linear layer, got none")


@dataclass(frozen=True)
class StartArguments:
    """What the training starts from, and what of it is trained.

    Example:
        >>> StartArguments(init_from="user/model", freeze=("blocks.0.*",)).lora is None
        True
    """

    init_from: str | None = option(None, "model to start from: pipeline, model, checkpoint folder, .pth or Hub name")
    freeze: tuple[str, ...] = option((), "patterns of parameters that stay as they are, for instance blocks.0.*")
    lora: LoraArguments | None = option(
        None, "train low-rank adapters alone: {rank: 8, alpha: 16, targets: [qkv_proj]}"
    )
    layer_decay: float = option(1.0, "learning rate of a layer divided by that of the next one of its block")

    def __post_init__(self) -> None:
        require(0 < self.layer_decay <= 1, f"layer_decay must be in (0, 1], got {self.layer_decay}")


@dataclass(frozen=True)
class OptimizationArguments:
    """The optimisation: all counts are optimizer steps unless they say otherwise.

    Example:
        >>> settings = OptimizationArguments(max_steps=1000, warmup_steps=100)
        >>> settings.batch_size, settings.learning_rate
        (256, 0.0001)
        >>> OptimizationArguments(max_steps=1000, epochs=10)
        Traceback (most recent call last):
            ...
        ValueError: give either epochs or max_steps, got epochs=10 and max_steps=1000
    """

    batch_size: int = option(256, "images of an optimizer step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = option(1, "parts the batch of a process is cut into", may_change=True)
    epochs: float | None = option(None, "length of the training, passes over the data set")
    max_steps: int | None = option(None, "length of the training, optimizer steps (in place of epochs)")
    learning_rate: float = option(1e-4, "highest learning rate")
    min_learning_rate: float = option(1e-6, "learning rate at the first step and at the end")
    warmup_epochs: float | None = option(None, "passes over the data set with a rising learning rate")
    warmup_steps: int | None = option(None, "steps with a rising learning rate (in place of warmup_epochs)")
    weight_decay: float = option(1e-4, "AdamW's weight decay, on every parameter")
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment")
    adam_beta2: float = option(0.95, "AdamW's decay of the second moment")
    label_drop: float = option(0.1, "probability that an image trains without its label (conditional models)")
    noise_level_sampling: NoiseLevelSampling = option("uniform", "how levels are drawn, with noise_conditioning")
    noise_level_weighting: NoiseLevelWeighting = option("t", "weight of the loss, with noise_conditioning")
    max_grad_norm: float | None = option(None, "gradients are scaled down to this norm; none: not clipped")
    ema_decay: float | None = option(None, "decay of the moving average of the weights; none: no average")
    posthoc_ema: tuple[float, ...] = option(
        (), "relative lengths of two averages of the weights, to make others of afterwards", may_change=True
    )
    max_bad_steps: int = option(20, "non-finite steps in a row that end the run", may_change=True)
    max_rollbacks: int = option(3, "times a run that diverged goes back and on with other data", may_change=True)
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of matrix products; weights stay float32"
    )
    process_group_timeout: float = option(30.0, "minutes that processes wait for each other", may_change=True)
    activation_checkpointing: bool = option(False, "recompute activations to save memory", may_change=True)
    compile: bool = option(False, "compile the model with torch.compile", may_change=True)
    deterministic: bool = option(False, "deterministic kernels: a resumed GPU run is bit-identical", may_change=True)
    seed: int = option(0, "of the initial weights, the order of the images, flips, noise and label dropping")

    def __post_init__(self) -> None:
        require(
            (self.epochs is None) != (self.max_steps is None),
            f"give either epochs or max_steps, got epochs={self.epochs} and max_steps={self.max_steps}",
        )
        require(
            self.warmup_epochs is None or self.warmup_steps is None,
            f"give warmup_epochs or warmup_steps, got {self.warmup_epochs} and {self.warmup_steps}",
        )
        for name in ("batch_size", "gradient_accumulation_steps", "max_bad_steps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "max_steps", "learning_rate", "max_grad_norm", "process_group_timeout"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0, got {value}")
        require(0 <= self.seed < 2**63, f"seed must be at least 0 and below 2^63, got {self.seed}")
        for name in ("weight_decay", "warmup_epochs", "warmup_steps", "max_rollbacks"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0, got {value}")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        for length in self.posthoc_ema:
            require(0 < length <= 12**-0.5, f"posthoc_ema must hold lengths in (0, 0.2886], got {length}")
        require(
            len(set(self.posthoc_ema)) == len(self.posthoc_ema) != 1,
            f"posthoc_ema must hold no length or at least two different ones, got {list(self.posthoc_ema)}",
        )
        require(0 <= self.label_drop <= 1, f"label_drop must be in [0, 1], got {self.label_drop}")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate must be between 0 and learning_rate={self.learning_rate}, "
            f"got {self.min_learning_rate}",
        )


@dataclass(frozen=True)
class OutputArguments:
    """What a run writes, when, and the sampling defaults that are saved with the pipeline.

    Example:
        >>> OutputArguments(output_dir="runs/cats", guidance_scale=2.0).repo_id
        'cats'
    """

    output_dir: str = option("runs/tarflow", "folder of the run", may_change=True)
    log_every: int = option(10, "steps between two lines of metrics.jsonl", may_change=True)
    eval_every: int | None = option(None, "steps between held-out evaluations; none: at the end", may_change=True)
    eval_images: int | None = option(None, "held-out images used; none: all", may_change=True)
    eval_batch_size: int = option(64, "images evaluated or sampled at once by a process", may_change=True)
    sample_every: int | None = option(None, "steps between sample grids; none: at the end", may_change=True)
    sample_rows: int = option(10, "most rows of a sample grid: classes, or just rows", may_change=True)
    sample_columns: int = option(10, "images in a row of a sample grid", may_change=True)
    guidance_scale: float = option(1.0, "the pipeline's default guidance, 1 + the paper's w", may_change=True)
    guidance_schedule: GuidanceSchedule = option("linear", "the pipeline's default schedule", may_change=True)
    attention_temperature: float = option(1.0, "the pipeline's default, of the unlabelled branch", may_change=True)
    denoising_strength: float | None = option(None, "the pipeline's default, 1 is Tweedie", may_change=True)
    guidance_rule: GuidanceRule | None = option(None, "the pipeline's default; none: log_scale", may_change=True)
    num_refinement_steps: int | None = option(None, "the pipeline's default, denoising steps", may_change=True)
    temperature: float = option(1.0, "the pipeline's default, standard deviation of latents", may_change=True)
    checkpoint_every: int | None = option(None, "steps between checkpoints; none: at the end", may_change=True)
    posthoc_every: int | None = option(None, "steps between stored averages; none: a 32nd of the run", may_change=True)
    keep_checkpoints: int = option(2, "complete checkpoints that are kept, the newest", may_change=True)
    checkpoint_minutes: float | None = option(
        30.0, "also after so many minutes, at a line of the log", may_change=True
    )
    checkpoint_format: Literal["whole", "sharded"] = option(
        "whole", "one file by one process, or a part by each process", may_change=True
    )
    async_checkpoints: bool = option(False, "write checkpoints while training goes on", may_change=True)
    keep_every: int | None = option(None, "steps between checkpoints that are kept for good", may_change=True)
    keep_best: int | None = option(None, "checkpoints kept of the lowest validation bits", may_change=True)
    max_hours: float | None = option(None, "stop by itself, with a checkpoint, before so many hours", may_change=True)
    override: tuple[str, ...] = option((), "NAME=VALUE that a resumed run changes; may be repeated", may_change=True)
    allow_changes: bool = option(False, "let a resumed run change any option but the model's", may_change=True)
    report_to: tuple[Tracker, ...] = option((), "experiment trackers beside metrics.jsonl", may_change=True)
    push_to_hub: bool = option(False, "upload the pipeline to the Hub at the end", may_change=True)
    push_checkpoints: bool = option(False, "also at each checkpoint, while training goes on", may_change=True)
    hub_model_id: str | None = option(None, "repository, user/model; none: named like output_dir", may_change=True)
    hub_private: bool = option(False, "make the repository private, if it is made now", may_change=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (int, int | None) and value is not None:
                require(value >= 1, f"{item.name} must be at least 1, got {value}")
        require(bool(self.output_dir), "output_dir must name a folder, got ''")
        minutes = self.checkpoint_minutes
        require(minutes is None or minutes > 0, f"checkpoint_minutes must be above 0, got {minutes}")
        require(self.max_hours is None or self.max_hours > 0, f"max_hours must be above 0, got {self.max_hours}")
        self._check_guidance()
        require(
            self.push_to_hub or not (self.push_checkpoints or self.hub_model_id or self.hub_private),
            "push_checkpoints, hub_model_id and hub_private need push_to_hub=true",
        )

    def _check_guidance(self) -> None:
        from tarflow_hf.flow.sampling.guidance import Guidance
        from tarflow_hf.flow.sampling.settings import check_temperature

        check_temperature(self.temperature)
        rule = self.guidance_rule or "log_scale"
        Guidance(self.guidance_scale, self.guidance_schedule, self.attention_temperature, rule=rule)

    @property
    def repo_id(self) -> str:
        """Name of the repository on the Hub."""
        return self.hub_model_id or Path(self.output_dir).name


@dataclass(frozen=True)
class TrainingArguments:
    """All options of a run.

    Example:
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "image_size": 32, "log_every": 5})
        >>> arguments.image_format
        ImageFormat(image_size=32, num_channels=3, resize='short_side')
        >>> arguments.flat()["log_every"], "log_every" in arguments.fixed()  # how often is logged decides no result
        (5, False)
    """

    model: ModelArguments
    data: DataArguments
    optimization: OptimizationArguments
    output: OutputArguments
    start: StartArguments = StartArguments()

    def __post_init__(self) -> None:
        require(
            not (self.data.streaming and self.optimization.max_steps is None),
            "a streamed data set has no known length: give max_steps in place of epochs",
        )
        require(
            not (self.data.streaming and self.optimization.warmup_epochs is not None),
            "a streamed data set has no known length: give warmup_steps in place of warmup_epochs",
        )
        for name, value in (("eval_data", self.data.eval_data), ("keep_best", self.output.keep_best)):
            fits = value is None or self.data.eval_split is not None
            require(fits, f"{name}={value!r} needs eval_split, the name of its split")
        self._check_sampling_defaults()
        _ = self.image_format  # checks its values

    def _check_sampling_defaults(self) -> None:
        """The pipeline would refuse these too, but only once it is made: in the middle of the training."""
        strength, steps = self.output.denoising_strength, self.output.num_refinement_steps
        noise = self.model.noise_type
        require(strength is None or strength >= 0, f"denoising_strength must be at least 0, got {strength}")
        require(
            not strength or noise == "gaussian",
            f"denoising_strength must be 0 for noise_type={noise!r}, got {strength}: the score removes Gaussian noise",
        )
        require(noise == "gaussian" or self.data.array_layout is None, f"array_layout cannot have noise_type={noise}")
        require(
            steps in (None, 1) or self.model.noise_conditioning,
            f"num_refinement_steps must be 1 without noise_conditioning, got {steps}",
        )

    @property
    def image_format(self) -> "ImageFormat":
        """What every image is turned into."""
        from tarflow_hf.images.arrays import format_of

        return format_of(self.model.image_size, self.model.num_channels, self.data)

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def published(self, seen_from: Path | None = None) -> dict[str, Any]:
        """Every option by its name, as it may be written into files that are given away: see [`public_place`].

        Args:
            seen_from: The folder that paths of data are relative to; None leaves their last name.
        """
        values = self.flat()
        for name in ("data", "eval_data", "vae"):
            values[name] = values[name] and public_place(values[name], seen_from)
        for name in ("init_from", "output_dir", "latents_dir"):
            values[name] = values[name] and public_place(values[name])
        return values | {"override": (), "allow_changes": False}  # what they changed is among the values

    def fixed(self) -> dict[str, Any]:
        """The options that decide the result of a run: a checkpoint made with others is of another run.

        Of data the last name of their path is kept, wherever they lie.
        """
        options = known_options()
        return {name: value for name, value in self.published().items() if not options[name].may_change}


OPTION_GROUPS = {
    "model": ModelArguments,
    "data": DataArguments,
    "optimization": OptimizationArguments,
    "output": OutputArguments,
    "start": StartArguments,
}


@dataclass(frozen=True)
class Option:
    """An option as the command line offers it.

    Args:
        group: Which of `OPTION_GROUPS` it belongs to.
        annotation: Its type.
        default: What it is where nothing is given.
        text: Its line of help.
        may_change: Whether a resumed run may set it anew.

    Example:
        >>> known_options()["batch_size"].default
        256
    """

    group: str
    annotation: Any
    default: Any
    text: str
    may_change: bool


def known_options() -> dict[str, Option]:
    """Every option of every group by its name.

    Example:
        >>> known_options()["learning_rate"].text
        'highest learning rate'
    """
    found = {}
    for group, cls in OPTION_GROUPS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            meta = item.metadata
            found[item.name] = Option(group, hints[item.name], item.default, meta["help"], meta["may_change"])
    return found


__all__ = [
    "OPTION_GROUPS",
    "LoraArguments",
    "ModelArguments",
    "OptimizationArguments",
    "Option",
    "OutputArguments",
    "StartArguments",
    "TrainingArguments",
    "known_options",
]
