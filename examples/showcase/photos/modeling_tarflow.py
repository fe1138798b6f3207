"""Finds the classes of this repository in the tarflow_hf package; nothing else is here."""

from transformers import PreTrainedModel  # diffusers looks for this name beside the model's

try:
    from tarflow_hf import TarFlowConfig, TarFlowImageProcessor, TarFlowModel
except ModuleNotFoundError as error:
    if error.name != "tarflow_hf":
        raise
    raise ModuleNotFoundError("this model needs the tarflow_hf package: pip install tarflow_hf") from error
