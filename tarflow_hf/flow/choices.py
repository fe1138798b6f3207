"""What can be chosen of noise and guidance, by name: without torch, so that command lines can list it at once."""

from typing import Literal

GuidanceSchedule = Literal["linear", "constant"]
GuidedPart = Literal["both", "shift", "log_scale"]
GuidanceRule = Literal["log_scale", "scale", "product"]
Decoder = Literal["exact", "one_pass", "refined"]
OnNonFinite = Literal["redraw", "raise", "warn"]
NoiseLevelSampling = Literal["uniform", "linear", "edm"]
NoiseLevelWeighting = Literal["none", "t", "t_relative", "t2", "t2_relative"]

__all__ = [
    "Decoder",
    "GuidanceRule",
    "GuidanceSchedule",
    "GuidedPart",
    "NoiseLevelSampling",
    "NoiseLevelWeighting",
    "OnNonFinite",
]
