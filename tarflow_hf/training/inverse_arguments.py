"""The options of a training run of a learned inverse, beside those of the data and of the optimisation."""

import copy
import math
from dataclasses import dataclass

from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint
from tarflow_hf.images.arguments import DataArguments, option, require
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.arguments import OptimizationArguments


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

    def to_config(self, flow: TarFlowModel) -> TarFlowInverseConfig:
        """The configuration of an inverse of this flow."""
        return TarFlowInverseConfig(
            flow=copy.deepcopy(flow.config),
            flow_fingerprint=flow_fingerprint(flow.blocks),
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            head_dim=self.head_dim,
            mlp_ratio=self.mlp_ratio,
            max_guidance_scale=self.max_guidance_scale,
        )


def check_data(data: DataArguments) -> None:
    """Raises ValueError unless an inverse can be trained on data that are read in this way.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> check_data(DataArguments(data="huggan/AFHQ", vae="./vae"))
        Traceback (most recent call last):
            ...
        ValueError: vae must be left out: it is the one of the flow, got ./vae
    """
    require(not data.streaming, "streaming must be left out: images are stored")
    require(data.vae is None, f"vae must be left out: it is the one of the flow, got {data.vae}")


GROUPS = (DataArguments, OptimizationArguments, InverseArguments)


__all__ = ["GROUPS", "InverseArguments", "check_data"]
