"""Checkpoints of the authors' code become ours; may import every room but `training` and `metrics`.

`python -m tarflow_hf.conversion CHECKPOINT FOLDER --image_size 256` is the command; `--help` has the rest.
"""

from tarflow_hf.conversion.checkpoint import convert_reference_checkpoint
from tarflow_hf.conversion.command import main as main
from tarflow_hf.conversion.folders import save_converted, set_class_names
from tarflow_hf.conversion.reference_keys import reference_state_dict

__all__ = ["convert_reference_checkpoint", "reference_state_dict", "save_converted", "set_class_names"]
