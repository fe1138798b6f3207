"""The shape of a learned inverse, and the flow that it belongs to. No torch here."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from tarflow_hf.configuration_tarflow import SettingsFile, TarFlowConfig, refuse_unknown

_LARGEST = 2**20  # of any size, as in TarFlowConfig

LEARNED_SETTINGS = (
    "guidance_schedule",
    "attention_temperature",
    "denoising_strength",
    "guidance_rule",
    "num_refinement_steps",
)
"""Settings of sampling that an inverse learns together with the image, so that a call cannot change them."""


@strict
class TarFlowInverseConfig(SettingsFile):
    """Configuration of a [`TarFlowInverseModel`]: its own size, and which flow it inverts.

    Args:
        flow: The configuration of the flow, a [`TarFlowConfig`] or its dictionary.
        flow_fingerprint: Numbers that tell the flow's weights from others', see [`fingerprint.flow_fingerprint`]. None
            (a new inverse) fits any flow of this configuration.
        hidden_size: Width of the transformer; a multiple of `head_dim`.
        num_layers: Transformer layers, at least one for each block of the flow and one more, which learns the
            denoising.
        head_dim: Width of one attention head.
        mlp_ratio: Width of the MLP's hidden layer divided by `hidden_size`.
        max_guidance_scale: Largest guidance scale that it has learned; the smallest is 1, no guidance.
        num_training_steps: Steps it was trained for; 0 is a new one, which a pipeline refuses to decode with.
        learned_settings: The value of each of `LEARNED_SETTINGS` that it was trained for; None: what its pipeline has
            saved.

    Raises:
        ValueError: If an argument is unknown.
        huggingface_hub.errors.StrictDataclassFieldValidationError: If a value has the wrong type.
        huggingface_hub.errors.StrictDataclassClassValidationError: If values do not fit together.

    Reference: after BiFlow, arXiv 2512.10953.

    Example:
        >>> flow = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=4)
        >>> config = TarFlowInverseConfig(flow=flow, hidden_size=64, num_layers=10)
        >>> config.state_layers  # after which of them the state before each block is read, from noise to image
        [2, 4, 6, 8]
    """

    model_type = "tarflow_inverse"

    flow: TarFlowConfig | dict[str, Any] | None = None
    flow_fingerprint: list[float] | None = None
    hidden_size: int = 768
    num_layers: int = 18
    head_dim: int = 64
    mlp_ratio: int = 4
    max_guidance_scale: float | int = 1.0
    num_training_steps: int = 0
    learned_settings: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        refuse_unknown(self, kwargs)
        if isinstance(self.flow, dict):  # as JSON has it
            self.flow = TarFlowConfig(**self.flow)
        elif self.flow is None:
            self.flow = TarFlowConfig()
        super().__post_init__(**kwargs)

    @property
    def flow_config(self) -> TarFlowConfig:
        """`flow`, which is a configuration once the inverse's own is made."""
        assert isinstance(self.flow, TarFlowConfig)
        return self.flow

    @property
    def num_attention_heads(self) -> int:
        """Heads of an attention layer."""
        return self.hidden_size // self.head_dim

    @property
    def state_layers(self) -> list[int]:
        """Layers before the state in front of each block is read, from the block next to the noise to the first.

        The layers are cut into as many even parts as the flow has blocks, and one for the denoising.
        """
        parts = self.flow_config.num_blocks + 1
        return [self.num_layers * part // parts for part in range(1, parts)]

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit together; runs when the configuration is made.

        Raises:
            ValueError: If not.
        """
        for name in ("hidden_size", "num_layers", "head_dim", "mlp_ratio"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {_LARGEST}, got {getattr(self, name)}")
        if self.hidden_size % self.head_dim or self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must be even and a multiple of head_dim={self.head_dim}")
        if self.num_layers <= self.flow_config.num_blocks:
            raise ValueError(
                f"num_layers must be more than the {self.flow_config.num_blocks} blocks of the flow, "
                f"got {self.num_layers}"
            )
        if not 1 <= self.max_guidance_scale < math.inf:
            raise ValueError(f"max_guidance_scale must be finite and at least 1, got {self.max_guidance_scale}")
        if self.num_training_steps < 0:
            raise ValueError(f"num_training_steps must be at least 0, got {self.num_training_steps}")

    def validate_settings(self) -> None:
        """Checks that the settings are those that an inverse learns; runs when the configuration is made.

        Raises:
            ValueError: If not.
        """
        if self.learned_settings is not None and self.learned_settings.keys() != set(LEARNED_SETTINGS):
            raise ValueError(
                f"learned_settings must have {', '.join(LEARNED_SETTINGS)}, got {list(self.learned_settings)!s:.80}"
            )

    def validate_fingerprint(self) -> None:
        """Checks that there is a finite number for each block of the flow; runs when the configuration is made.

        Raises:
            ValueError: If not.
        """
        numbers = self.flow_fingerprint
        if numbers is None:
            return
        if len(numbers) != self.flow_config.num_blocks or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"flow_fingerprint must have a finite number for each of the {self.flow_config.num_blocks} blocks of "
                f"the flow, got {str(numbers)[:80]}"
            )


__all__ = ["LEARNED_SETTINGS", "TarFlowInverseConfig"]
