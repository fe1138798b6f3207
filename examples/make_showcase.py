"""Makes a model of the showcase from a run: half-precision weights, pictures, and a page with what was measured.

    python -m examples.make_showcase runs/fashion_latent examples/showcase/fashion \
        --recipe examples/recipes/latents/fashion.yaml --guidance_scale 2 --temperature 0.8 \
        --classifier examples/data/classifiers.py:fashion_classifier --note "MIT ..."

Nothing is picked: the samples are those of the first seeds. Every number is measured on the weights as they are saved,
by the pipeline that a visitor loads. Takes some minutes; started again it keeps the samples that it has drawn.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import ModelCard
from PIL import Image

from examples import evaluate
from examples.data.classifiers import SmallClassifier, predicted
from examples.latents import slerp
from tarflow_hf import TarFlowPipeline
from tarflow_hf.hub.model_card import Result, render
from tarflow_hf.hub.repositories import about_images
from tarflow_hf.images.arguments import DataArguments, public_place
from tarflow_hf.images.batches import ImageBatch, StoredImages, collate
from tarflow_hf.images.latents import encode_moments
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.features import load_feature_extractor
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.checkpoints import read_manifest
from tarflow_hf.training.export import checkpoint_of, load_pipeline
from tarflow_hf.training.recipes import make_arguments, read_recipe
from tarflow_hf.training.run_card import run_page

COLUMNS = 10
SCALES = (1.0, 2.0, 3.0, 4.0)  # of guidance, read by the classifier beside the recommended one
NUM_COMPARED = 1000  # samples, and held-out images, whose nearest training image is looked for
MAX_BYTES = 4 * 2**20  # of a model that lives in a repository of code


def main(argv: Sequence[str]) -> None:
    """Makes the folder that the command line names."""
    options = parse(argv)
    arguments = make_arguments(read_recipe(options.recipe))
    data = options.data or arguments.data.data
    pipe = save(options)
    train, held_out = (
        read_split(data, split or "test", arguments)
        for split in (arguments.data.train_split, arguments.data.eval_split)
    )
    names = [str(name) for name in (pipe.transformer.config.id2label or {}).values()]
    pictures(pipe, options, names, train, held_out)
    results = measure(pipe, options, data, train, held_out)
    write_page(pipe, options, arguments, results)
    print(f"{options.output}: pipeline, pictures and README.md")


def save(options: argparse.Namespace) -> TarFlowPipeline:
    """Writes the weights in half precision, and gives the pipeline as it is loaded from there, in float32."""
    pipe = load_pipeline(options.run)
    pipe.register_to_config(guidance_scale=options.guidance_scale, temperature=options.temperature)
    pipe.to(torch.float16).save_pretrained(options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"the weights in {options.output} must be at most {MAX_BYTES:,} bytes, got {size:,}")
    pipe = TarFlowPipeline.from_pretrained(options.output, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_split(data: str, split: str, arguments: TrainingArguments) -> ImageBatch:
    """The images of a split, as the run saw them."""
    rows, _ = load_image_data(DataArguments(data=data, train_split=split), class_conditional=True)
    return collate(StoredImages(rows, arguments.image_format, cached=True).samples)


def draw(
    pipe: TarFlowPipeline, labels: torch.Tensor, scale: float | None = None, temperature: float | None = None
) -> torch.Tensor:
    """(images, channels, height, width) levels: a sample of each label, from the first seeds.

    Args:
        pipe: The pipeline.
        labels: (images,) class ids; image i has the seed i, as in `examples/sample.py`.
        scale: Of guidance; None is the pipeline's.
        temperature: Standard deviation of the latents; None is the pipeline's.
    """
    parts = []
    for rows in torch.arange(len(labels)).split(100):
        generators = [torch.Generator().manual_seed(row) for row in rows.tolist()]
        settings: dict[str, Any] = {"guidance_scale": scale, "temperature": temperature, "generator": generators}
        (images,) = pipe(labels[rows], output_type="pt", return_dict=False, **settings)
        parts.append((cast(torch.Tensor, images) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def pictures(
    pipe: TarFlowPipeline, options: argparse.Namespace, names: list[str], train: ImageBatch, held_out: ImageBatch
) -> None:
    """Writes samples.png, plain.png, guidance.png, nearest.png and interpolation.png."""
    count, folder = len(names), options.output
    rowwise, once = torch.arange(count).repeat_interleave(COLUMNS), torch.arange(count)
    samples = draw(pipe, rowwise)
    save_image_grid(as_images(samples), folder / "samples.png", columns=COLUMNS, row_labels=names)
    plain = draw(pipe, rowwise, 1.0, 1.0)
    save_image_grid(as_images(plain), folder / "plain.png", columns=COLUMNS, row_labels=names)
    scales = (1.0, 1.5, 2.0, 3.0, 4.0)
    strips = [image for scale in scales for image in as_images(draw(pipe, once, scale))]
    labels = [f"guidance {scale:g}" for scale in scales]
    save_image_grid(strips, folder / "guidance.png", columns=count, row_labels=labels, column_labels=names)

    samples = samples[::COLUMNS]
    _, rows = nearest(samples, train.levels, 4)
    beside = [
        image
        for sample, found in zip(samples, rows, strict=True)
        for image in as_images(torch.cat([sample[None], train.levels[found]]))
    ]
    heads = ["sample", "nearest", "second", "third", "fourth"]
    save_image_grid(beside, folder / "nearest.png", columns=5, row_labels=names, column_labels=heads)

    strips = []
    for label in range(count):
        first, second = held_out.levels[held_out.class_labels == label][:2]
        strips += between(pipe, first, second, label)
    save_image_grid(strips, folder / "interpolation.png", columns=9, row_labels=names)


def between(pipe: TarFlowPipeline, first: torch.Tensor, second: torch.Tensor, label: int) -> list[Image.Image]:
    """Nine pictures on the great circle between the latents of two images of one class."""
    ends = pipe.invert(to_pixel_values(torch.stack([first, second])), torch.tensor([label] * 2))
    output = pipe(
        torch.tensor([label] * 9), guidance_scale=1.0, denoising_strength=0.0, latents=slerp(ends[0], ends[1], 9)
    )
    return cast(list[Image.Image], cast(ImagePipelineOutput, output).images)


def as_images(levels: torch.Tensor) -> list[Image.Image]:
    """(images, channels, height, width) levels as pictures."""
    return [Image.fromarray(each.movedim(0, -1).squeeze(-1).numpy()) for each in levels]


def nearest(levels: torch.Tensor, among: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (root mean square, in [-1, 1]) of images to the nearest ones of others, and their rows."""
    distances = torch.cdist(to_pixel_values(levels).flatten(1), to_pixel_values(among).flatten(1))
    found, rows = distances.topk(count, largest=False)
    return found / levels[0].numel() ** 0.5, rows


def measure(
    pipe: TarFlowPipeline, options: argparse.Namespace, data: str, train: ImageBatch, held_out: ImageBatch
) -> tuple[Result, ...]:
    """Likelihood, distance, how samples are read, how near training images are, and the autoencoder's error."""
    results: list[Result] = []
    name_of_data = public_place(str(read_recipe(options.recipe)["data"]))

    def result(metric: str, name: str, value: float, method: str) -> Result:
        command = f"python -m examples.make_showcase, --classifier {options.classifier}"
        return Result(metric, name, round(value, 4), name_of_data, "test", method, command)

    network = cast(SmallClassifier, load_feature_extractor(options.classifier).network)
    share = (predicted(network, held_out.levels) == held_out.class_labels).float().mean().item()
    results.append(result("accuracy", "held-out images read right by the classifier", share, "real images"))
    saved = (options.guidance_scale, options.temperature)
    settings = {(scale, 1.0) for scale in SCALES} | {(1.0, options.temperature), saved}
    for scale, temperature in sorted(settings, key=lambda pair: (-pair[1], pair[0])):
        labels = torch.arange(NUM_COMPARED) % pipe.transformer.config.num_classes
        samples = draw(pipe, labels, scale, temperature)
        right = predicted(network, samples) == labels
        of_classes = [right[labels == label].float().mean() for label in labels.unique()]
        shares = ", ".join(f"{share:.2f}" for share in of_classes)
        given = f"guidance {scale:g}, temperature {temperature:g}"
        note = f"{NUM_COMPARED:,} samples, {given}; by class {shares}"
        results.append(result("accuracy", "samples read as the class asked for", right.float().mean().item(), note))
        if (scale, temperature) == saved:
            near = float(nearest(samples, train.levels, 1)[0].median())
            note = f"median of {NUM_COMPARED:,} samples, root mean square in [-1, 1], {given}"
            results.append(result("nearest", "distance to the nearest training image", near, note))
    near = float(nearest(held_out.levels[:NUM_COMPARED], train.levels, 1)[0].median())
    results.append(result("nearest", "the same of held-out images", near, f"median of {NUM_COMPARED:,} images"))
    for noise, name in ((0.0, "clean"), (float(pipe.transformer.config.noise_std), "noisy")):
        error = reconstruction_error(pipe, held_out.levels, noise)
        note = f"root mean square in [-1, 1], all held-out images, noise {noise:g} on the latents"
        results.append(result("rms", f"reconstruction error of the autoencoder, {name} latents", error, note))
    output = options.work / "evaluation"
    line = [str(options.output), "--data", data, "--output_dir", str(output), "--num_workers", "0"]
    line += ["--metrics", "bits_per_dim", "frechet_distance", "--feature_extractor", options.classifier]
    evaluate.main([*line, "--num_samples", str(options.num_samples)])
    asked = evaluate.parse(line)
    asked.data = name_of_data
    found = json.loads((output / "metrics.json").read_text())
    measured = [replace(each, value=float(f"{each.value:.4g}")) for each in evaluate.results(found, asked)]
    return (*measured, *results)


@torch.no_grad()
def reconstruction_error(pipe: TarFlowPipeline, levels: torch.Tensor, noise: float) -> float:
    """Root mean square between images in [-1, 1] and what the autoencoder makes of them, with noise on its latents."""
    vae, total, generator = pipe.vae, 0.0, torch.Generator().manual_seed(0)
    assert vae is not None
    for part in levels.split(250):
        images = to_pixel_values(part)
        latents, _ = encode_moments(vae, images, pipe.transformer.config.patch_size)
        latents = latents + noise * torch.randn(latents.shape, generator=generator)
        decoded = pipe.decoded(latents).clamp(-1, 1)
        total += float((decoded - images).square().mean(dim=(1, 2, 3)).sum())
    return (total / len(levels)) ** 0.5


def write_page(
    pipe: TarFlowPipeline,
    options: argparse.Namespace,
    arguments: TrainingArguments,
    results: tuple[Result, ...],
) -> None:
    """Writes README.md: the page of the run, the pictures and the numbers."""
    page = run_page(
        arguments,
        pipe.transformer.config,
        pipe.transformer.num_parameters(),
        repo_id=f"your-name/tarflow-{options.output.name}",
        command=f"accelerate launch examples/train.py {options.recipe}",
        results=results,
        samples="samples.png",
    )
    checkpoint, taken = checkpoint_of(options.run), dict[str, object]()
    if checkpoint is not None:
        taken["steps_taken"] = read_manifest(checkpoint)["step"]
    if options.time:
        taken["time"] = options.time
    page = replace(
        page,
        training={**page.training, **taken},
        defaults=pipe.sampling_defaults,
        advice=options.advice,
        license="apache-2.0",
        license_note=options.note,
        **about_images(pipe),
    )
    shown = (
        "## Pictures\n\nNone is picked: all are of the first seeds, the first ten of each class above.\n\n"
        "The same seeds of the model as it is, `guidance_scale=1, temperature=1`, which vary more:\n\n"
        "![The model as it is](plain.png)\n\nOne set of latents under growing guidance:\n\n![Guidance](guidance.png)"
        "\n\n"
        "Samples, and the training images nearest to them in pixels:\n\n![Nearest training images](nearest.png)\n\n"
        "From one held-out image to another of its class, on the great circle between their latents:\n\n"
        "![Interpolation](interpolation.png)\n\n## Data and licence\n"
    )
    card = ModelCard(str(render(page)).replace("## Data and licence\n", shown, 1))
    card.save(options.output / "README.md")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    add = parser.add_argument
    add("run", help="folder of a run, a checkpoint or a pipeline, class-conditional and on latents")
    add("output", type=Path, help="folder of the showcase model")
    add("--recipe", required=True, help="recipe of the run, which the page tells of")
    add("--classifier", required=True, help="FILE.py:FUNCTION, a feature extractor with `logits`")
    add("--data", help="data set, in place of the recipe's")
    add("--guidance_scale", type=float, default=2.0, help="the recommended one, which is saved [2]")
    add("--temperature", type=float, default=0.8, help="of the latents, likewise [0.8]")
    add("--num_samples", type=int, default=5000, help="samples for the distance [5000]")
    add("--time", default="", help="how long the training took, on what")
    add("--advice", default="", help="a sentence about sampling")
    add("--note", default="The weights are under Apache 2.0, like the code.", help="a sentence about the licence")
    add("--work", type=Path, default=Path("runs/showcase"), help="folder of what is measured [runs/showcase]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
