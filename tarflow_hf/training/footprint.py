"""What a run takes of memory and disk, estimated before it begins."""

from dataclasses import dataclass
from pathlib import Path

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.training.arguments import OptimizationArguments


@dataclass(frozen=True)
class Footprint:
    """Bytes that a training run needs.

    Args:
        weights: Of a process, for weights, gradients, AdamW's moments and the average of the weights.
        activations: Of a process, for what the backward pass needs of a micro-batch.
        checkpoint: Of a checkpoint.

    Example:
        >>> Footprint(weights=2_000_000, activations=1_000_000, checkpoint=1_600_000).memory
        3000000
    """

    weights: int
    activations: int
    checkpoint: int

    @property
    def memory(self) -> int:
        """Bytes of a process."""
        return self.weights + self.activations

    @classmethod
    def estimate(
        cls,
        config: TarFlowConfig,
        settings: OptimizationArguments,
        *,
        num_parameters: int,
        micro_batch_size: int,
        shards: int,
    ) -> "Footprint":
        """Four bytes a number: weight, gradient, two moments, average; and what each layer keeps for its gradient.

        A layer keeps, of every token, its input, both normalised inputs, q, k, v, the attended values and the middle
        of its residual (8 widths), and the MLP before and after its nonlinearity (2 r widths, r = mlp_ratio); with
        activation checkpointing its input alone.

        Args:
            config: The model.
            settings: The options of the optimisation.
            num_parameters: Of the whole model.
            micro_batch_size: Images that a process works on at once.
            shards: Processes that weights, gradients and moments are divided over.
        """
        average = settings.ema_decay is not None
        size = 4 if settings.precision == "float32" else 2
        tokens = micro_batch_size * config.num_tokens * config.hidden_size
        layer = (8 + 2 * config.mlp_ratio) * size
        layers = sum(config.block_depths)
        kept = layers * 4 + layer if settings.activation_checkpointing else layers * layer
        return cls(
            weights=num_parameters * 4 * (4 + average) // shards,
            activations=tokens * kept,
            checkpoint=num_parameters * 4 * (3 + average),
        )


def readable_bytes(count: float) -> str:
    """Bytes as a person reads them.

    Args:
        count: How many.

    Example:
        >>> readable_bytes(1_234), readable_bytes(5_600_000_000)
        ('1.23 kB', '5.6 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there.

    Args:
        folder: A folder that may be missing.

    Example:
        >>> from pathlib import Path
        >>> existing_parent(Path("runs/new"))
        PosixPath('.')
    """
    return folder if folder.exists() else existing_parent(folder.parent)


__all__ = ["Footprint", "existing_parent", "readable_bytes"]
