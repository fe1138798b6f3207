"""What a run starts from: a new model, or anyone's weights made to fit."""

import math
from pathlib import Path
from typing import Any

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.conversion.checkpoint import convert_reference_checkpoint
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.adaptation import Adaptation, adapt_to
from tarflow_hf.training.arguments import ModelArguments, StartArguments
from tarflow_hf.training.export import load_pipeline
from tarflow_hf.training.fixed_sizes import differing_sizes
from tarflow_hf.training.trained_part import add_lora, freeze


def start_model(config: TarFlowConfig, arguments: StartArguments, shape: ModelArguments) -> tuple[TarFlowModel, str]:
    """The model that a run starts with: new, or another one's weights made to fit; with what is not trained frozen.

    Args:
        config: The configuration of the run's model.
        arguments: What it starts from and what of it is trained.
        shape: The options of the model, for a .pth file that does not say them.

    Returns:
        The model, in float32, and what became of the source's weights, to be printed; empty where there is no source.

    Raises:
        ValueError: If the source is no model or cannot be adapted, or a pattern or target matches nothing.

    Example:
        >>> from tarflow_hf.training.arguments import ModelArguments, StartArguments
        >>> shape = ModelArguments(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> config = shape.to_config([])
        >>> model, _ = start_model(config, StartArguments(freeze=("blocks.0.*",)), shape)
        >>> sorted({name[:8] for name, parameter in model.named_parameters() if parameter.requires_grad})
        ['blocks.1']
    """
    if arguments.init_from is None:
        model, report, changed = TarFlowModel(config), "", set()
    else:
        source = load_source(arguments.init_from, shape).float()  # halves lose small steps
        try:
            model, adaptation = adapt_to(source, config)
        except ValueError as error:
            raise ValueError(
                f"init_from={arguments.init_from!r} does not fit the options of this run: {error}"
                f"{_sizes_to_give(source.config, config)}"
            ) from error
        model.train()
        report, changed = f"started from {arguments.init_from}:\n{adaptation}", _changed(adaptation)
    if arguments.lora is not None:
        add_lora(model, arguments.lora, trained=changed)
    freeze(model, arguments.freeze)
    return model, report


def _sizes_to_give(source: TarFlowConfig, config: TarFlowConfig) -> str:
    """The end of a message: the options that a recipe for this source needs and that are others now."""
    given = [
        f"{name}: {old}".lower().replace("none", "null")  # as YAML writes them
        for name, (old, _) in differing_sizes(source, config).items()
    ]
    return f". A recipe for this source says {', '.join(given)}" if given else ""


def _changed(adaptation: Adaptation) -> set[str]:
    return {weight.name for weight in adaptation.weights if weight.origin in ("adapted", "fresh")}


def load_source(place: str, shape: ModelArguments) -> TarFlowModel:
    """A model from wherever one may be kept, in evaluation mode.

    Args:
        place: A folder with a pipeline, a model or a checkpoint of a run (its average); a .pth file of the authors'
            code; or a name on the Hub.
        shape: The size and noise of the images, which a .pth file does not hold.

    Raises:
        ValueError: If there is no model there.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> from tarflow_hf.training.arguments import ModelArguments
        >>> TarFlowPipeline(transformer=TarFlowModel(config)).save_pretrained("pipe")
        >>> load_source("pipe", ModelArguments()).config.num_blocks
        2
    """
    path = Path(place).expanduser()
    if path.suffix == ".pth":
        return _convert(path, shape)
    if (path / "checkpoint.json").is_file():
        return load_pipeline(path).transformer.eval()
    if path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"init_from={place!r} is no model: the folder has no model_index.json (a pipeline), config.json (a model) "
            "or checkpoint.json (a checkpoint of a run)"
        )
    if place.startswith(("/", "./", "../", "~")) and not path.exists():
        raise ValueError(f"init_from={place!r} is no model: there is nothing at this path")
    try:
        if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
            return TarFlowModel.from_pretrained(path).eval()
        pipe = TarFlowPipeline.from_pretrained(str(path) if path.is_dir() else place)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={place!r} is no model that can be loaded: {error}") from error
    return pipe.transformer.eval()


def _convert(path: Path, shape: ModelArguments) -> TarFlowModel:
    """The authors' checkpoint; the image size, which is in no file, is that of the run, or the square that fits."""
    noise: dict[str, Any] = {}
    if shape.noise_conditioning:
        noise = {"noise_range": shape.noise_range}
    sizes = [side for side in (shape.image_size, *_squares(path, shape.num_channels)) if isinstance(side, int)]
    problem: ValueError | None = None
    for channels in dict.fromkeys((shape.num_channels, 3, 1)):
        for side in sizes:
            try:
                return convert_reference_checkpoint(path, image_size=side, num_channels=channels, **noise)
            except ValueError as error:
                problem = problem or error
            except FileNotFoundError as error:
                raise ValueError(f"init_from is no model: {error}") from error
    raise ValueError(f"init_from={str(path)!r} cannot be converted: {problem}") from problem


def _squares(path: Path, num_channels: int) -> list[int]:
    """Sides of the square images that fit the tokens of a checkpoint of the authors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tokens, patch_dim = len(state["blocks.0.pos_embed"]), state["blocks.0.proj_in.weight"].shape[1]
    except Exception:  # the converter says what is wrong with the file
        return []
    return [math.isqrt(tokens) * math.isqrt(patch_dim // channels) for channels in (num_channels, 3, 1)]


__all__ = ["load_source", "start_model"]
