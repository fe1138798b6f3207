"""TarFlow normalizing flows for the Hugging Face ecosystem: public names, loaded when first used."""

import importlib
from typing import TYPE_CHECKING

from . import auto_classes

if TYPE_CHECKING:
    from .configuration_tarflow import TarFlowConfig
    from .conversion import convert_reference_checkpoint
    from .guidance import Guidance
    from .modeling_tarflow import TarFlowModel, TarFlowOutput
    from .pipeline_tarflow import TarFlowPipeline

__version__ = "0.1.0"

__all__ = [
    "Guidance",
    "TarFlowConfig",
    "TarFlowModel",
    "TarFlowOutput",
    "TarFlowPipeline",
    "convert_reference_checkpoint",
]

_MODULES = {
    "Guidance": "guidance",
    "TarFlowConfig": "configuration_tarflow",
    "TarFlowModel": "modeling_tarflow",
    "TarFlowOutput": "modeling_tarflow",
    "TarFlowPipeline": "pipeline_tarflow",
    "convert_reference_checkpoint": "conversion",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


auto_classes.register_when_imported()
