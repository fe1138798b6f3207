"""Converts the TarFlow authors' checkpoints (bare state dicts in .pth files) into TarFlowModel and pipeline folders.

`python -m tarflow_hf.conversion CHECKPOINT FOLDER --image_size 256` is the command; `--help` has the rest.
"""

import argparse
import math
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch

from .configuration_tarflow import TarFlowConfig
from .guidance import GuidanceRule, GuidanceSchedule
from .hub import push_folder
from .model_card import SAMPLING_DEFAULTS, Page, TrainingData, render
from .modeling_tarflow import TarFlowModel
from .noise import NoiseType
from .pipeline_tarflow import TarFlowPipeline
from .reference_keys import CLASS_KEY, HEAD_DIM, LAYER_KEY, NOISE_KEY, our_name, reference_state_dict
from .training_data import KNOWN_DATA, class_names, named_data, read_class_names

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LICENSE_NOTE = (
    "The weights were converted from a checkpoint in the format of the TarFlow authors' code; "
    "their licence is that under which they were released."
)


def convert_reference_checkpoint(
    path: str | PathLike[str],
    *,
    image_size: int,
    num_channels: int = 3,
    noise_type: NoiseType | None = None,
    noise_std: float | None = None,
    noise_range: tuple[float, float] | None = None,
) -> TarFlowModel:
    """Reads a checkpoint of the TarFlow or iTARFlow authors' code into a [`TarFlowModel`] in evaluation mode.

    All sizes but those of the image are read from the weights. Unless it is given, the noise is read from a file name
    of the authors' form `NAME_model_PATCH_WIDTH_BLOCKS_LAYERS_NOISE.pth`, where NOISE is a standard deviation or
    `uniform`. Weights that embed a noise level (iTARFlow's) make a model with `noise_conditioning`; the range of its
    levels is in no file and has to be given. Dropped on the way: the attention masks, which are all the same, and the
    prior variance `var` of a model that is not volume preserving, which is one.

    Args:
        path: The .pth file. It is read with `weights_only=True`: no code in it is run.
        image_size: Side of the images in pixels.
        num_channels: Channels of the images.
        noise_type: `"gaussian"` or `"uniform"`; None reads it from the file name.
        noise_std: Standard deviation of Gaussian noise in units of the [-1, 1] range; None: from the file name.
        noise_range: Lowest and highest noise level of an iTARFlow checkpoint, in place of the two above.

    Returns:
        The model, float32, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete checkpoint, has an unknown key, lacks one, or has a tensor of another
            shape; if the image size does not fit; or if the noise is neither given nor in the file name.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> torch.save(reference_state_dict(TarFlowModel(config)), "digits_model_2_64_2_1_0.10.pth")
        >>> model = convert_reference_checkpoint("digits_model_2_64_2_1_0.10.pth", image_size=8, num_channels=1)
        >>> model.config.num_blocks, model.config.hidden_size, model.config.noise_std
        (2, 64, 0.1)
    """
    path = Path(path)
    state = _read(path)
    noise: dict[str, Any]
    if any(NOISE_KEY.fullmatch(key) for key in state):
        noise = _noise_conditioning(noise_type, noise_std, noise_range)
    else:
        if noise_range is not None:
            raise ValueError(f"noise_range is for checkpoints with noise conditioning, got {noise_range}")
        noise_type, noise_std = _noise(path, noise_type, noise_std)
        noise = {"noise_type": noise_type, "noise_std": noise_std}
    config = _config(state, image_size=image_size, num_channels=num_channels, noise=noise)
    model = _empty_model(config)
    model.load_state_dict(_converted(state, model), strict=True, assign=True)
    return model.eval()


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, read without running code."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        with warnings.catch_warnings():
            # torch doubts that it can read other protocols than its own; where it cannot, it raises.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = re.search(r"WeightsUnpickler error: (.+?)(?: by default|\n|$)", str(error))
        what = reason[1] if reason else "its pickle was not written by torch.save"
        raise ValueError(f"{path} holds more than tensors and is not loaded: {what}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete PyTorch checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    return state


def _noise(path: Path, noise_type: NoiseType | None, noise_std: float | None) -> tuple[NoiseType, float]:
    """Noise type and standard deviation, from the arguments or else from the file name."""
    match = re.fullmatch(r".+_model_\d+_\d+_\d+_\d+_(uniform|\d+\.\d+)", path.stem)
    if noise_type is None and noise_std is None and match is None:
        raise ValueError(
            f"the file name {path.name!r} does not carry the noise (NAME_model_PATCH_WIDTH_BLOCKS_LAYERS_NOISE.pth): "
            "give noise_type and noise_std"
        )
    if noise_type is None:
        noise_type = "uniform" if noise_std is None and match and match[1] == "uniform" else "gaussian"
    if noise_type == "uniform":
        return "uniform", 0.0
    if noise_std is None:
        if match is None or match[1] == "uniform":
            raise ValueError(f"noise_std must be given: the file name {path.name!r} does not carry it")
        noise_std = float(match[1])
    return "gaussian", noise_std


def _noise_conditioning(
    noise_type: NoiseType | None, noise_std: float | None, noise_range: tuple[float, float] | None
) -> dict[str, Any]:
    """What the configuration says on the noise of an iTARFlow checkpoint."""
    if noise_type == "uniform" or noise_std is not None:
        raise ValueError(
            "the checkpoint is conditioned on the noise level: give noise_range in place of "
            f"noise_type={noise_type!r} and noise_std={noise_std}"
        )
    if noise_range is None:
        raise ValueError(
            "the checkpoint is conditioned on the noise level and does not tell its levels: give noise_range, "
            "the lowest and the highest"
        )
    return {"noise_conditioning": True, "noise_range": noise_range}


def _config(
    state: dict[str, torch.Tensor], *, image_size: int, num_channels: int, noise: dict[str, Any]
) -> TarFlowConfig:
    """The configuration that the shapes of the weights tell."""
    depths: dict[int, int] = {}
    for key in state:
        if match := LAYER_KEY.fullmatch(key):
            block, layer = int(match[1]), int(match[2])
            depths[block] = max(depths.get(block, 0), layer + 1)
    num_blocks = max(depths, default=-1) + 1
    if sorted(depths) != list(range(num_blocks)) or num_blocks == 0:
        raise ValueError(f"the checkpoint must have the blocks 0, 1, ... without a gap, got {sorted(depths)}")
    hidden_size, patch_dim = _tensor(state, "blocks.0.proj_in.weight", 2).shape
    num_tokens = _tensor(state, "blocks.0.pos_embed", 2).shape[0]
    layer_list = "head_blocks" if any(".head_blocks." in key for key in state) else "attn_blocks"
    mlp_width = _tensor(state, f"blocks.0.{layer_list}.0.mlp.main.0.weight", 2).shape[0]
    output_dim = _tensor(state, "blocks.0.proj_out.weight", 2).shape[0]
    if output_dim not in (patch_dim, 2 * patch_dim):
        raise ValueError(
            f"blocks.0.proj_out.weight must have {2 * patch_dim} rows, or {patch_dim} if volume preserving, "
            f"got {output_dim}"
        )
    patch_size = math.isqrt(patch_dim // num_channels)
    tokens_per_side = math.isqrt(num_tokens)
    if patch_size**2 * num_channels != patch_dim or tokens_per_side * patch_size != image_size:
        raise ValueError(
            f"image_size={image_size} and num_channels={num_channels} do not fit the checkpoint, which has "
            f"{num_tokens} tokens of {patch_dim} numbers"
        )
    class_embedding = state.get("blocks.0.class_embed")
    layers = [depths[block] for block in range(num_blocks)]
    return TarFlowConfig(
        image_size=image_size,
        num_channels=num_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_blocks=num_blocks,
        layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        head_dim=HEAD_DIM,
        mlp_ratio=mlp_width // hidden_size,
        num_classes=0 if class_embedding is None else class_embedding.shape[0],
        volume_preserving=output_dim == patch_dim,
        **noise,
    )


def _tensor(state: dict[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    """A tensor that every checkpoint has, by its name and number of dimensions."""
    if key not in state:
        raise ValueError(f"the checkpoint lacks the key {key!r}")
    if state[key].ndim != ndim:
        raise ValueError(f"{key} must have {ndim} dimensions, got shape {tuple(state[key].shape)}")
    return state[key]


def _empty_model(config: TarFlowConfig) -> TarFlowModel:
    """A model without storage, for weights to be assigned to."""
    with torch.device("meta"):
        return TarFlowModel(config)


def _converted(state: dict[str, torch.Tensor], model: TarFlowModel) -> dict[str, torch.Tensor]:
    """The state dict under our names, every key mapped or dropped on purpose, every shape checked."""
    expected = model.state_dict()
    converted = {}
    for key, tensor in state.items():
        name = our_name(key, volume_preserving=model.config.volume_preserving)
        if name is None:
            if key == "var" and not torch.equal(tensor, torch.ones_like(tensor)):
                raise ValueError("var must be one in a model that is not volume preserving, got other values")
            continue
        if name not in expected:
            raise ValueError(f"the checkpoint has the unknown key {key!r}")
        tensor = tensor.squeeze(1) if CLASS_KEY.fullmatch(key) else tensor
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{key} must have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
        converted[name] = tensor.float()
    missing = sorted(set(expected) - set(converted))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, among them the one for {missing[0]!r}")
    return converted


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
        for variant, weights in [(None, dtype), *((name, _VARIANTS[name]) for name in variants)]:
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
    converted = _empty_model(model.config)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tarflow_hf.conversion", description="Convert a checkpoint of the TarFlow authors' code."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="the .pth file; code in it is not run")
    add("folder", type=Path, help="new folder for the pipeline")
    add("--image_size", type=int, required=True, help="side of the images, pixels")
    add("--num_channels", type=int, default=3, help="1 for grey, 3 for RGB")
    add("--noise_type", choices=get_args(NoiseType), help="training noise, if the file name does not tell")
    add("--noise_std", type=float, help="standard deviation of Gaussian noise, if the file name does not tell")
    add("--noise_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels of an iTARFlow checkpoint")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--dataset", choices=named_data(), help="known data set, for class names and the page")
    names.add_argument("--id2label", type=Path, help="class names: one a line, or JSON")
    add("--dtype", choices=sorted(_DTYPES), default="float32", help="of the plain weights")
    add("--variant", choices=sorted(_VARIANTS), nargs="*", default=[], help="more weights beside the plain ones")
    add("--guidance_scale", type=float, help="default to save: 1 + the paper's w")
    add("--guidance_schedule", choices=get_args(GuidanceSchedule), help="default to save")
    add("--attention_temperature", type=float, help="default to save, of the unlabelled branch")
    add("--denoising_strength", type=float, help="default to save: 1 is Tweedie")
    add("--guidance_rule", choices=get_args(GuidanceRule), help="default to save")
    add("--num_refinement_steps", type=int, help="default to save, of an iTARFlow checkpoint")
    add("--push_to_hub", metavar="NAME", help="then upload the folder to this repository")
    add("--private", action="store_true", help="make that repository private, if it is made now")
    return parser


def _run(options: argparse.Namespace) -> None:
    model = convert_reference_checkpoint(
        options.checkpoint,
        image_size=options.image_size,
        num_channels=options.num_channels,
        noise_type=options.noise_type,
        noise_std=options.noise_std,
        noise_range=tuple(options.noise_range) if options.noise_range else None,
    )
    if options.id2label:
        set_class_names(model, read_class_names(options.id2label))
    elif options.dataset and model.config.num_classes:  # an unconditional model of the same data has none to name
        set_class_names(model, class_names(options.dataset))
    defaults = {name: value for name in SAMPLING_DEFAULTS if (value := getattr(options, name)) is not None}
    save_converted(
        TarFlowPipeline(transformer=model, **defaults),
        options.folder,
        dtype=_DTYPES[options.dtype],
        variants=options.variant,
        data=KNOWN_DATA.get(options.dataset),
    )
    print(f"{options.folder}: {model.num_parameters():,} parameters")
    if options.push_to_hub:
        print(push_folder(options.folder, options.push_to_hub, private=options.private or None).commit_url)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what is wrong with the input ends it with one line that says so."""
    try:
        _run(_parser().parse_args(arguments))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


__all__ = ["convert_reference_checkpoint", "reference_state_dict", "save_converted", "set_class_names"]

if __name__ == "__main__":
    main()
