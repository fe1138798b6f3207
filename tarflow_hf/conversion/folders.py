"""A converted model as a pipeline folder."""

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from tarflow_hf.conversion.checkpoint import empty_model
from tarflow_hf.hub.model_card import Page, TrainingData, render
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LICENSE_NOTE = (
    "The weights were converted from a checkpoint in the format of the TarFlow authors' code; "
    "their licence is that under which they were released."
)


def save_converted(
    pipe: TarFlowPipeline,
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    variants: Sequence[str] = (),
    data: TrainingData | None = None,
) -> None:
    """Saves the pipeline of a converted model as a folder, which appears when it is complete and not before.

    Args:
        pipe: The pipeline, with the defaults to save and a float32 model.
        folder: The new folder; it may exist if it is empty.
        dtype: Of the weights that are loaded when no variant is asked for.
        variants: More weights beside them: "fp16", "bf16".
        data: What the model was trained on, for the page.

    Raises:
        FileExistsError: If the folder holds something.
        ValueError: If a weight is too large for a dtype.

    Example:
        >>> from pathlib import Path
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval(), guidance_scale=3.3)
        >>> save_converted(pipe, "digits", variants=["fp16"])
        >>> sorted(path.name for path in Path("digits/transformer").glob("*.safetensors"))
        ['model.fp16.safetensors', 'model.safetensors']
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: name a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    defaults = pipe.sampling_defaults
    page = Page(
        repo_id=f"your-name/{folder.name}",
        config=pipe.transformer.config,
        num_parameters=pipe.transformer.num_parameters(),
        defaults=defaults,
        data=data,
        license_note=_LICENSE_NOTE,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as parent:
        new = Path(parent, folder.name)
        for variant, weights in [(None, dtype), *((name, VARIANTS[name]) for name in variants)]:
            converted = TarFlowPipeline(transformer=_in_dtype(pipe.transformer, weights), **defaults)
            converted.save_pretrained(new, variant=variant)
            del converted  # before the next copy is made
        render(page).save(new / "README.md")
        new.replace(folder)


def _in_dtype(model: TarFlowModel, dtype: torch.dtype) -> TarFlowModel:
    """The model with its weights in another dtype, leaving the one given as it is."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {dtype}")
    converted = empty_model(model.config)
    converted.load_state_dict(state, assign=True)
    return converted.eval()


def set_class_names(model: TarFlowModel, names: Sequence[str]) -> None:
    """Gives the classes of a model their names, in the order of the ids.

    Args:
        model: A class-conditional model; its configuration is changed.
        names: One name for each class.

    Raises:
        ValueError: If there is not one name for each class.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, num_classes=2)
        >>> model = TarFlowModel(config)
        >>> set_class_names(model, ["cat", "dog"])
        >>> model.config.id2label
        {0: 'cat', 1: 'dog'}
    """
    if len(names) != model.config.num_classes:
        raise ValueError(
            f"{len(names)} class names were given, and the checkpoint has {model.config.num_classes} classes"
        )
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


__all__ = ["VARIANTS", "save_converted", "set_class_names"]
