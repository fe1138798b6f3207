"""What a training run gives away: its pipeline with a page that says how it was made, also before there is one."""

from dataclasses import fields, replace
from pathlib import Path

import yaml

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.noise import NOISE_NAMES
from tarflow_hf.hub.known_data import training_data
from tarflow_hf.hub.model_card import SAMPLING_DEFAULTS, Page, Result, merge, render
from tarflow_hf.hub.page_files import read_page
from tarflow_hf.hub.repositories import about_images
from tarflow_hf.images.arguments import DataArguments, public_place
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.arguments import OptimizationArguments, TrainingArguments
from tarflow_hf.training.inverse_arguments import InverseArguments, published_options

_DATA_SETTINGS = ("resize", "horizontal_flip")


def run_page(
    arguments: TrainingArguments,
    config: TarFlowConfig,
    num_parameters: int,
    *,
    repo_id: str,
    command: str,
    results: tuple[Result, ...] = (),
    samples: str | None = None,
    curve: str | None = None,
) -> Page:
    """The page of the model that a run with these options gives.

    Args:
        arguments: The options of the run.
        config: The model's configuration.
        num_parameters: Parameters of the model.
        repo_id: Name of the repository, "user/model".
        command: The command that trains it.
        results: What was measured on its weights.
        samples: Path of the grid of samples, relative to the page.
        curve: Path of the picture of the training curve, relative to the page.

    Returns:
        The page, without a licence: that is the owner's to choose (`dataclasses.replace(page, license=...)`).

    Example:
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "image_size": 8, "hidden_size": 64})
        >>> config = arguments.model.to_config(["cat", "dog", "wild"])
        >>> page = run_page(arguments, config, 100_000, repo_id="user/animals", command="examples/train.py a.yaml")
        >>> page.title, page.data.name, page.class_names
        ('animals', 'AFHQ', ['cat', 'dog', 'wild'])
    """
    output = arguments.output
    return Page(
        repo_id=repo_id,
        config=config,
        num_parameters=num_parameters,
        defaults={name: getattr(output, name) for name in SAMPLING_DEFAULTS},
        data=training_data(public_place(arguments.data.data)),
        training=training_settings(arguments),
        command=command,
        results=results,
        samples=samples,
        curve=curve,
    )


def write_page(
    folder: Path,
    pipe: TarFlowPipeline,
    arguments: TrainingArguments,
    *,
    results: tuple[Result, ...] = (),
    about_weights: dict[str, object] | None = None,
) -> None:
    """Writes the options (`recipe.yaml`) and the page of a run beside its pipeline.

    Args:
        folder: The folder of the pipeline; `samples.png` and `curve.png` in it are shown on the page.
        pipe: The pipeline.
        arguments: The options of the run.
        results: What was measured on the weights.
        about_weights: What the page is to say of the weights beside the options.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> shape = {"image_size": 8, "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1}
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, **shape})
        >>> model = TarFlowModel(arguments.model.to_config(["cat", "dog", "wild"])).eval()
        >>> write_page(Path("."), TarFlowPipeline(transformer=model), arguments)
        >>> "AFHQ" in Path("README.md").read_text()
        True
    """
    (folder / "recipe.yaml").write_text(yaml.safe_dump(arguments.published(folder), sort_keys=False), encoding="utf-8")
    page = run_page(
        arguments,
        pipe.transformer.config,
        pipe.transformer.num_parameters(),
        repo_id=f"your-name/{folder.resolve().name}",
        command="accelerate launch examples/train.py recipe.yaml",
        results=results,
        samples="samples.png" if (folder / "samples.png").exists() else None,
        curve="curve.png" if (folder / "curve.png").exists() else None,
    )
    page = replace(page, training={**page.training, **(about_weights or {})}, **about_images(pipe))
    save_page(page, folder / "README.md")


def inverse_page(
    pipe: TarFlowPipeline,
    data: DataArguments,
    settings: OptimizationArguments,
    options: InverseArguments,
    *,
    repo_id: str,
    command: str,
    samples: str | None = None,
) -> Page:
    """The page of a flow with the inverse that a run with these options gives.

    Args:
        pipe: Flow and inverse.
        data: What the inverse was trained on.
        settings: The options of the optimisation.
        options: Those of the inverse.
        repo_id: Name of the repository, "user/model".
        command: The command that trains the inverse.
        samples: Path of the picture of the decoders, relative to the page.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> from tarflow_hf.training.inverse_arguments import InverseArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> options = InverseArguments(flow="runs/digits", hidden_size=64, num_layers=3)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.register_modules(inverse=TarFlowInverseModel(options.to_config(pipe.transformer)))
        >>> data, settings = DataArguments(data="examples/data/digits"), OptimizationArguments(max_steps=100)
        >>> page = inverse_page(pipe, data, settings, options, repo_id="user/fast", command="train_inverse.py")
        >>> page.training["flow"], page.inverse
        ('runs/digits', '185,292 parameters, guidance_scale from 1 to 4')
    """
    values = published_options(options, settings)
    training = {
        item.name: values[item.name]
        for group in (options, settings)
        for item in fields(group)
        if not item.metadata["may_change"] and not item.name.startswith("noise_level_")
    }
    if options.perceptual is None:
        del training["perceptual_weight"]
    return Page(
        repo_id=repo_id,
        config=pipe.transformer.config,
        num_parameters=pipe.transformer.num_parameters(),
        defaults=pipe.sampling_defaults,
        data=training_data(public_place(data.data)),
        training={name: value for name, value in training.items() if value != ()},
        command=command,
        samples=samples,
        **about_images(pipe),
    )


def save_page(page: Page, path: Path) -> None:
    """Writes a page to a file; one that is there keeps its text if a person edited it.

    Args:
        page: The page.
        path: The file, `README.md` of a repository.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.hub.model_card import Page
        >>> page = Page("user/animals", TarFlowConfig(image_size=8, hidden_size=64), num_parameters=100_000)
        >>> save_page(page, Path("README.md"))
        >>> "# animals" in Path("README.md").read_text()
        True
    """
    card = render(page)
    (merge(read_page(path), card) if path.exists() else card).save(path)


def training_settings(arguments: TrainingArguments) -> dict[str, object]:
    """The options that decide the result of a run, without the model's shape and without paths.

    Example:
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "image_size": 8, "hidden_size": 64})
        >>> settings = training_settings(arguments)
        >>> settings["max_steps"], settings["batch_size"], "image_size" in settings
        (1000, 256, False)
    """
    fixed = arguments.fixed()
    names = [item.name for item in fields(OptimizationArguments)] + [
        item.name for item in fields(DataArguments) if item.name in _DATA_SETTINGS
    ]
    if arguments.data.condition_columns:
        fixed["condition_columns"] = ", ".join(arguments.data.condition_columns)
        names.append("condition_columns")
    elif not arguments.model.class_conditional:
        names.remove("label_drop")
    if not arguments.model.noise_conditioning:
        names = [name for name in names if not name.startswith("noise_level_")]
    start = arguments.start
    if start.init_from is not None:
        fixed["init_from"] = public_place(start.init_from)
        names.append("init_from")
    if start.freeze:
        fixed["freeze"] = ", ".join(start.freeze)
        names.append("freeze")
    if start.lora is not None:
        fixed["lora"] = (
            f"rank {start.lora.rank}, alpha {start.lora.alpha:g}, on {', '.join(start.lora.targets)}; `adapter/`"
        )
        names.append("lora")
    if start.layer_decay != 1:
        names.append("layer_decay")
    return {name: fixed[name] for name in names if name in fixed}


def held_out_result(arguments: TrainingArguments, bits: float, num_images: int, *, source: str) -> Result:
    """The bits (or nats) per dimension of held-out images at the end of a run, and how they were measured.

    Args:
        arguments: The options of the run.
        bits: Mean bits per 8-bit sub-pixel, or nats per dimension of latents or arrays.
        num_images: Held-out images.
        source: The command of the run.

    Returns:
        The row for the page.

    Example:
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "image_size": 8, "hidden_size": 64})
        >>> result = held_out_result(arguments, 5.4321, 500, source="examples/train.py")
        >>> result.name, result.value, result.dataset
        ('bits per dimension of noisy images', 5.4321, 'huggan/AFHQ')
    """
    model, data = arguments.model, training_data(public_place(arguments.data.data))
    uniform = model.noise_type == "uniform"
    level = model.noise_range[0] if model.noise_conditioning else model.noise_std
    noise = NOISE_NAMES[model.noise_type] + ("" if uniform else f" of {level}, so no rate of compression")
    weights = "weights" if arguments.optimization.ema_decay is None else "averaged weights"
    metric, name = "bits_per_dim", "bits per dimension"
    if not uniform:
        metric, name = "noisy_bits_per_dim", "bits per dimension of noisy images"
    if arguments.data.vae is not None:  # whose latents are no pixels, and have no bits
        metric, name = "latent_nats_per_dim", "nats per dimension of noisy latents (no bits of pixels)"
    if arguments.data.array_layout is not None:
        metric, name = "nats_per_dim", "nats per dimension of noisy arrays, in the units of the data"
    return Result(
        metric=metric,
        name=name,
        value=round(bits, 4),
        dataset=data.hub_id or data.name,
        split=arguments.data.eval_split or "held out",
        method=f"{num_images:,} images with labels where there are any, one draw of {noise}, {weights}, float32",
        source=source,
    )


__all__ = ["held_out_result", "inverse_page", "run_page", "save_page", "training_settings", "write_page"]
