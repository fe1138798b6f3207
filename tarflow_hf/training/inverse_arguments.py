"""The options of a training run of a learned inverse, beside those of the data and of the optimisation."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.inverse.configuration import LEARNED_SETTINGS, TarFlowInverseConfig
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint
from tarflow_hf.images.arguments import DataArguments, option, public_place, require
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.option_groups import refuse_unused


@dataclass(frozen=True)
class InverseArguments:
    """The options of a run of `examples/train_inverse.py` beside those of data and optimisation.

    Example:
        >>> InverseArguments(flow="runs/digits", max_guidance_scale=4).sweeps
        2
        >>> InverseArguments(flow="runs/digits", sweeps=0)
        Traceback (most recent call last):
            ...
        ValueError: sweeps must be at least 1, got 0
    """

    flow: str = option("", "the flow to invert: folder of a pipeline, a run or a checkpoint, or Hub name")
    init_from: str | None = option(
        None, "a pipeline with an inverse to start from: folder of a finished run or Hub name"
    )
    hidden_size: int = option(768, "width of the inverse's transformer")
    num_layers: int = option(18, "its layers, more than the flow has blocks")
    head_dim: int = option(64, "width of an attention head")
    mlp_ratio: int = option(4, "width of the MLP divided by hidden_size")
    max_guidance_scale: float = option(4.0, "largest guidance scale that it learns; 1: none")
    drawn_per_image: int = option(1, "drawn latents, with any guidance scale, for each encoded image of a step")
    sweeps: int = option(2, "times that a block corrects states of drawn latents, exact with one less than tokens")
    image_weight: float = option(1.0, "weight of the image's error beside that of each block's state")
    perceptual: str | None = option(None, "FILE.py:FUNCTION, a network of levels 0 to 255 whose features shall agree")
    perceptual_weight: float = option(1.0, "weight of the relative error of its features, with perceptual")
    output_dir: str = option("runs/inverse", "folder of the run", may_change=True)
    log_every: int = option(10, "steps between two lines of metrics.jsonl", may_change=True)
    eval_every: int = option(500, "steps between measurements with a picture", may_change=True)
    checkpoint_every: int = option(500, "steps between checkpoints", may_change=True)
    keep_checkpoints: int = option(2, "complete checkpoints that are kept, the newest", may_change=True)

    def __post_init__(self) -> None:
        require(bool(self.flow), "flow must name the pipeline to invert, got ''")
        for name in ("hidden_size", "num_layers", "head_dim", "mlp_ratio", "sweeps", "log_every", "eval_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "keep_checkpoints", "drawn_per_image"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("image_weight", "perceptual_weight"):
            require(0 <= getattr(self, name) < math.inf, f"{name} must be at least 0, got {getattr(self, name)}")
        require(self.max_guidance_scale >= 1, f"max_guidance_scale must be at least 1, got {self.max_guidance_scale}")

    def to_config(self, flow: TarFlowModel, settings: Mapping[str, Any] | None = None) -> TarFlowInverseConfig:
        """The configuration of an inverse of this flow, and of the settings that its pipeline has saved."""
        return TarFlowInverseConfig(
            flow=copy.deepcopy(flow.config),
            flow_fingerprint=flow_fingerprint(flow.blocks),
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            head_dim=self.head_dim,
            mlp_ratio=self.mlp_ratio,
            max_guidance_scale=self.max_guidance_scale,
            learned_settings=None if settings is None else {name: settings[name] for name in LEARNED_SETTINGS},
        )


def check_options(data: DataArguments, settings: OptimizationArguments) -> None:
    """Raises ValueError unless an inverse can be trained on data that are read in this way, and as the options say.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> check_options(DataArguments(data="huggan/AFHQ", vae="./vae"), OptimizationArguments(max_steps=1))
        Traceback (most recent call last):
            ...
        ValueError: vae must be left out: it is the one of the flow, got './vae'
    """
    refuse_unused(_UNUSED, data, settings)


_UNUSED = {
    "streaming": "images are stored",
    "vae": "it is the one of the flow",
    "latents_dir": "the latents are kept in output_dir",
    "eval_data": "an inverse is measured on latents that are drawn",
    "eval_split": "an inverse is measured on latents that are drawn",
    "posthoc_ema": "an inverse has the average by ema_decay alone",
}


def check_condition(condition: Mapping[str, Any], flow: TarFlowConfig) -> None:
    """Raises ValueError unless data have the condition of a flow, in the flow's order.

    Args:
        condition: What the data say of it, see [`sources.ImageData`].
        flow: The flow's configuration.

    Example:
        >>> flow = TarFlowConfig(condition_dim=2, condition_names=["brightness", "contrast"])
        >>> check_condition({}, flow)
        Traceback (most recent call last):
            ...
        ValueError: condition_columns must give the flow's brightness, contrast, got nothing
    """
    found, names = condition.get("condition_dim", 0), condition.get("condition_names") or []
    fits = found == flow.condition_dim and (not found or names == (flow.condition_names or names))
    wanted = ", ".join(flow.condition_names or []) or f"{flow.condition_dim or 'no'} numbers"
    require(fits, f"condition_columns must give the flow's {wanted}, got {', '.join(names) or 'nothing'}")


def published_options(*groups: Any, seen_from: Path | None = None) -> dict[str, Any]:  # noqa: ANN401
    """Every option of a run by its name, as it may be written into a file that is given away, and read again.

    Args:
        *groups: The run's options.
        seen_from: The folder of the file, which paths of data and flow are relative to; None leaves their last name.

    Example:
        >>> from pathlib import Path
        >>> options = InverseArguments(flow="user/model", output_dir="/home/me/runs/fast")
        >>> published_options(options, seen_from=Path("runs/fast"))["output_dir"]
        'fast'
    """
    values = {name: value for group in groups for name, value in asdict(group).items()}
    for name in values.keys() & {"data", "eval_data", "flow", "init_from", "perceptual", "output_dir"}:
        place = None if name in ("perceptual", "output_dir") else seen_from
        values[name] = values[name] and public_place(values[name], place)
    return values


GROUPS = (DataArguments, OptimizationArguments, InverseArguments)


__all__ = ["GROUPS", "InverseArguments", "check_condition", "check_options", "published_options"]
