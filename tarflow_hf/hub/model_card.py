"""The page of a checkpoint on the Hub: rendered from its config, training settings and measured numbers, and merged
with what people wrote on it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.class_names import class_names, confusing_ids

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TASK = "unconditional-image-generation"
SAMPLING_DEFAULTS = (
    "guidance_scale",
    "guidance_schedule",
    "attention_temperature",
    "denoising_strength",
    "guidance_rule",
    "num_refinement_steps",
    "temperature",
)
DIGEST = re.compile(r"\n*<!-- Rendered by tarflow_hf; digest ([0-9a-f]{16}): [^>]*-->\s*$")


@dataclass(frozen=True)
class Result:
    """One number and where it comes from.

    Args:
        metric: Its identifier, for instance `bits_per_dim` or `fid`.
        name: What the page calls it, with its unit.
        value: The number.
        dataset: Name of the data it was measured on; a Hub data set by its identifier.
        split: Part of the data; empty where it is not known.
        method: How it was measured: images, draws, precision, settings.
        source: The command that measured it, or the publication that states it.

    Example:
        >>> bits = Result("bits_per_dim", "bits per dimension", 3.21, "cifar10", "test", "one draw", "evaluate.py")
        >>> f"{bits.name} of {bits.dataset} ({bits.split}): {bits.value}"
        'bits per dimension of cifar10 (test): 3.21'
    """

    metric: str
    name: str
    value: float
    dataset: str
    split: str
    method: str
    source: str


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on.

    Args:
        name: What the page calls it.
        hub_id: Its identifier on the Hub, if it is there.
        description: One or more sentences: what it holds, where it comes from, under which licence.
        biases: What the data lack or overstate, and what a model will repeat.

    Example:
        >>> data = TrainingData("my cats", description="2,000 photographs of two cats.", biases="Both cats are black.")
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000, data=data)
        >>> "Both cats are black." in render(page).text
        True
    """

    name: str
    hub_id: str | None = None
    description: str = ""
    biases: str = ""


@dataclass(frozen=True)
class Page:
    """Everything that a page tells. What is left out here is left out there.

    Args:
        repo_id: The name the page's code loads, "user/model".
        config: The model's configuration.
        num_parameters: Parameters of the model.
        defaults: The pipeline's saved defaults for guidance and denoising.
        license: Identifier of the weights' licence, as the Hub spells it; `None` leaves it to the owner.
        license_note: A sentence about the licence.
        data: What the model was trained on.
        training: Settings of the training run, from name to value.
        command: The command that trained it.
        results: Numbers measured on these weights.
        published: Numbers of others, to compare with.
        samples: Path of the grid of samples, relative to the page.
        curve: Path of the picture of the training curve, relative to the page.
        advice: Sentences about good settings for sampling, added to those that follow from the config.
        autoencoder: What decodes the latents that the model is of, in words; empty for a model of pixels.
        inverse: The learned inverse beside the flow, in words; empty where there is none.
        image: Channels, height and width of the images, where they are not the config's.

    Example:
        >>> config = TarFlowConfig(image_size=8, hidden_size=64, num_classes=2, id2label={0: "cat", 1: "dog"})
        >>> page = Page("user/pets", config, num_parameters=100_000, defaults={"guidance_scale": 2.0})
        >>> page.title, page.call, page.saved_defaults
        ('pets', 'class_labels="cat"', '`guidance_scale=2.0`')
    """

    repo_id: str
    config: TarFlowConfig
    num_parameters: int
    defaults: Mapping[str, float | str | None] = field(default_factory=dict)
    license: str | None = None
    license_note: str = ""
    data: TrainingData | None = None
    training: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
    results: tuple[Result, ...] = ()
    published: tuple[Result, ...] = ()
    samples: str | None = None
    curve: str | None = None
    advice: str = ""
    autoencoder: str = ""
    inverse: str = ""
    image: tuple[int, int, int] | None = None

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return int(self.config.num_channels) if self.image is None else self.image[0]

    @property
    def height(self) -> int:
        """Height of the images, pixels."""
        return self.config.image_height if self.image is None else self.image[1]

    @property
    def width(self) -> int:
        """Width of the images, pixels."""
        return self.config.image_width if self.image is None else self.image[2]

    @property
    def title(self) -> str:
        """The model's name without its owner."""
        return self.repo_id.rsplit("/", 1)[-1]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes; empty where they are numbered only."""
        names = class_names(self.config)
        return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names

    @property
    def short_class_names(self) -> list[str]:
        """The first of each class's synonyms."""
        return [name.split(", ")[0] for name in self.class_names]

    @property
    def confusing_ids(self) -> str:
        """The ids of classes whose names are other numbers, see [`class_names.confusing_ids`]."""
        return confusing_ids(self.config.id2label or {}, most=30)

    @property
    def call(self) -> str:
        """The arguments of the pipeline call in the page's example: the first class, the mean condition."""
        config, arguments = self.config, []
        if config.num_classes:
            first = self.class_names[0] if self.class_names else 0
            arguments.append(f"class_labels={json.dumps(first, ensure_ascii=False)}")
        if config.condition_dim:
            mean = [float(f"{value:.3g}") for value in config.condition_mean or [0.0] * config.condition_dim]
            arguments.append(f"condition={mean}")
        return ", ".join(arguments)

    @property
    def condition(self) -> list[str]:
        """The numbers of the condition by name, with their mean and deviation in the training data where known."""
        config = self.config
        names = config.condition_names or [f"number {place + 1}" for place in range(config.condition_dim)]
        if not (config.condition_mean and config.condition_std):
            return list(names)
        spread = zip(names, config.condition_mean, config.condition_std, strict=True)
        return [f"{name} ({mean:.3g} ± {deviation:.2g})" for name, mean, deviation in spread]

    @property
    def value_mean(self) -> list[float]:
        """What is subtracted from each channel of arrays, to four digits."""
        return [float(f"{value:.4g}") for value in self.config.value_mean or []]

    @property
    def value_scale(self) -> list[float]:
        """What each channel is divided by, to four digits."""
        return [float(f"{value:.4g}") for value in self.config.value_scale or []]

    @property
    def saved_defaults(self) -> str:
        """The pipeline's defaults as arguments of a call."""
        plain = {"temperature": 1.0}  # what nobody need be told
        shown = {name: value for name, value in self.defaults.items() if value not in (None, plain.get(name))}
        return ", ".join(f"`{name}={value!r}`" for name, value in shown.items())

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The settings of the training run as they are printed."""
        given = [(name, value) for name, value in self.training.items() if value is not None]
        return [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in given]


def metadata(page: Page) -> ModelCardData:
    """The machine-readable part of a page.

    Args:
        page: What to tell.

    Returns:
        Library, task, tags, data sets, licence, and a `model-index` with the measured numbers.

    Example:
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> metadata(page).tags
        ['tarflow', 'tarflow_hf', 'normalizing-flow', 'image-generation', 'unconditional']
    """
    conditional = "conditional" if page.config.condition_dim else "unconditional"
    kind = "class-conditional" if page.config.num_classes else conditional
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["tarflow", "tarflow_hf", "normalizing-flow", "image-generation", kind],
        license=page.license,
        datasets=[page.data.hub_id] if page.data and page.data.hub_id else None,
        model_name=page.title if page.results else None,
        eval_results=[_eval_result(result) for result in page.results] or None,
    )


def _eval_result(result: Result) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=result.dataset,
        dataset_name=result.dataset,
        dataset_split=result.split or None,
        metric_type=result.metric,
        metric_name=f"{result.name} ({result.method})",
        metric_value=result.value,
    )


def render(page: Page) -> ModelCard:
    """Writes the page.

    Args:
        page: What to tell.

    Returns:
        The card, ending with a digest of its text that tells `merge` whether somebody has edited it since.

    Example:
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> card = render(page)
        >>> card.text.split()[:2], card.data.library_name
        (['#', 'cats'], 'diffusers')
    """
    card = ModelCard.from_template(metadata(page), template_path=str(TEMPLATE), page=page, config=page.config)
    card.text = sign(re.sub(r"\n{3,}", "\n\n", card.text))
    return card


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().replace("\r\n", "\n").encode()).hexdigest()[:16]


def sign(text: str) -> str:
    """Adds the digest of a text below it, as a comment that the Hub does not show.

    Example:
        >>> is_edited(sign("What the model is.")), is_edited(sign("What the model is.") + "My remark.")
        (False, True)
    """
    note = (
        f"<!-- Rendered by tarflow_hf; digest {_digest(text)}: with any edit above, later uploads keep this text. -->"
    )
    return f"\n{text.strip()}\n\n{note}\n"


def is_edited(text: str) -> bool:
    """Whether a person wrote the text of a page, or changed what `render` wrote; an empty text is nobody's.

    Example:
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> text = render(page).text
        >>> is_edited(text), is_edited(text.replace("cats", "my cats")), is_edited("")
        (False, True, False)
    """
    match = DIGEST.search(text)
    if match is None:
        return bool(text.strip())
    return _digest(text[: match.start()]) != match[1]


def for_repository(card: ModelCard, repo_id: str) -> ModelCard:
    """The page under a repository's name, as its title and in its code; an edited page is returned as it is.

    Args:
        card: A page that `render` wrote.
        repo_id: The name to put on it, "user/model".

    Example:
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> card = for_repository(render(page), "other-user/black-cats")
        >>> "other-user/black-cats" in card.text
        True
    """
    if is_edited(card.text):
        return card
    name = repo_id.rsplit("/", 1)[-1]
    text = re.sub(r"^# .*$", f"# {name}", DIGEST.sub("", card.text), count=1, flags=re.MULTILINE)
    card.text = sign(re.sub(r'(?<=from_pretrained\()"[^"]+"', f'"{repo_id}"', text))
    if card.data.get("eval_results"):
        card.data["model_name"] = name
    return card


def merge(existing: ModelCard, new: ModelCard, *, update_text: bool = True) -> ModelCard:
    """Brings a page up to date without taking away what a person wrote.

    The text of an edited page stays. Of the metadata, single values that are there stay, lists are united, and a
    measured number replaces the same measurement in `model-index`.

    Args:
        existing: The page as it is.
        new: The page as `render` would write it today.
        update_text: Whether the new text replaces one that nobody edited; an empty one is replaced in any case.

    Returns:
        The page to store.

    Example:
        >>> page = Page("user/cats", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> existing = render(page)
        >>> existing.text += "My remark."
        >>> merged = merge(existing, render(page))  # the same page, rendered anew
        >>> merged.text.endswith("My remark.")
        True
    """
    keep = bool(existing.text.strip()) and (is_edited(existing.text) or not update_text)
    merged = ModelCard(str(existing if keep else new))
    merged.data = ModelCardData(**_merge_metadata(vars(existing.data), vars(new.data)))
    return merged


def _merge_metadata(existing: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in existing.items() if value is not None}
    for key, value in new.items():
        if key == "eval_results":
            kept = [
                old for old in merged.get(key, []) if not any(_same_measurement(old, result) for result in value or [])
            ]
            merged[key] = [*kept, *(value or [])] or None
        elif isinstance(value, list):
            old = merged.get(key, [])
            old = old if isinstance(old, list) else [old]
            merged[key] = [*old, *(item for item in value if item not in old)]
        elif value is not None:
            merged.setdefault(key, value)
    return merged


def _same_measurement(first: EvalResult, second: EvalResult) -> bool:
    return first.unique_identifier == second.unique_identifier and (first.metric_type, first.metric_name) == (
        second.metric_type,
        second.metric_name,
    )


__all__ = [
    "SAMPLING_DEFAULTS",
    "Page",
    "Result",
    "TrainingData",
    "for_repository",
    "is_edited",
    "merge",
    "metadata",
    "render",
    "sign",
]
