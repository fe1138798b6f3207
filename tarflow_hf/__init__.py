"""TarFlow normalizing flows for the Hugging Face ecosystem: public names, loaded when first used."""

import importlib
from typing import TYPE_CHECKING

from tarflow_hf.hub import auto_classes

if TYPE_CHECKING:
    from tarflow_hf.configuration_tarflow import TarFlowConfig
    from tarflow_hf.conversion import convert_reference_checkpoint
    from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
    from tarflow_hf.flow.likelihood import bits_per_dim
    from tarflow_hf.flow.noise import augment
    from tarflow_hf.flow.sampling.denoising import denoise
    from tarflow_hf.flow.sampling.guidance import Guidance
    from tarflow_hf.hub.inverse_model import TarFlowInverseModel, TarFlowInverseOutput
    from tarflow_hf.hub.push import push_folder
    from tarflow_hf.images.image_processor import TarFlowImageProcessor
    from tarflow_hf.images.plotting import save_curve, save_image_grid, save_trace
    from tarflow_hf.images.processing import ImageFormat, preprocess_image, to_levels, to_pixel_values
    from tarflow_hf.metrics.posterior import class_log_prob, class_posterior
    from tarflow_hf.modeling_tarflow import TarFlowModel, TarFlowOutput
    from tarflow_hf.pipeline_tarflow import TarFlowPipeline
    from tarflow_hf.training.adaptation import adapt

__version__ = "0.1.0"

__all__ = [
    "Guidance",
    "ImageFormat",
    "TarFlowConfig",
    "TarFlowImageProcessor",
    "TarFlowInverseConfig",
    "TarFlowInverseModel",
    "TarFlowInverseOutput",
    "TarFlowModel",
    "TarFlowOutput",
    "TarFlowPipeline",
    "adapt",
    "augment",
    "bits_per_dim",
    "class_log_prob",
    "class_posterior",
    "convert_reference_checkpoint",
    "denoise",
    "preprocess_image",
    "push_folder",
    "save_curve",
    "save_image_grid",
    "save_trace",
    "to_levels",
    "to_pixel_values",
]

_MODULES = {
    "Guidance": "flow.sampling.guidance",
    "ImageFormat": "images.processing",
    "TarFlowConfig": "configuration_tarflow",
    "TarFlowImageProcessor": "images.image_processor",
    "TarFlowInverseConfig": "flow.inverse.configuration",
    "TarFlowInverseModel": "hub.inverse_model",
    "TarFlowInverseOutput": "hub.inverse_model",
    "TarFlowModel": "modeling_tarflow",
    "TarFlowOutput": "modeling_tarflow",
    "TarFlowPipeline": "pipeline_tarflow",
    "adapt": "training.adaptation",
    "augment": "flow.noise",
    "bits_per_dim": "flow.likelihood",
    "class_log_prob": "metrics.posterior",
    "class_posterior": "metrics.posterior",
    "convert_reference_checkpoint": "conversion",
    "denoise": "flow.sampling.denoising",
    "preprocess_image": "images.processing",
    "push_folder": "hub.push",
    "save_curve": "images.plotting",
    "save_image_grid": "images.plotting",
    "save_trace": "images.plotting",
    "to_levels": "images.processing",
    "to_pixel_values": "images.processing",
}


def __getattr__(name: str) -> object:
    if name == "PreTrainedModel":  # which diffusers looks for beside a pipeline's part that is named by this package
        return importlib.import_module("transformers").PreTrainedModel
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


auto_classes.register_when_imported(__getattr__)
