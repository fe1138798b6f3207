"""Makes a model of the showcase from a run: half-precision weights, pictures, and a page with what was measured.

    python -m examples.make_showcase runs/fashion_latent examples/showcase/fashion \
        --recipe examples/recipes/latents/fashion.yaml --guidance_scale 2 --temperature 0.8 \
        --classifier examples/data/classifiers.py:fashion_classifier --note "MIT ..."

Nothing is picked: the samples are those of the first seeds. Classes with names such as `Food & Drink: food-fruit`
share the row of what stands before the colon, each as often as it was in training. A model without classes needs no
`--classifier`, but a `--feature_extractor` for the distance. Every number is measured on the weights as they are
saved, by the pipeline that a visitor loads. Takes some minutes; started again it keeps the samples that it has drawn.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import ModelCard
from PIL import Image

from examples import evaluate
from examples.data.classifiers import SmallClassifier, groups_of, predicted
from examples.latents import slerp
from tarflow_hf import TarFlowConfig, TarFlowPipeline
from tarflow_hf.flow.class_names import class_names
from tarflow_hf.hub.model_card import Result, render
from tarflow_hf.hub.repositories import about_images
from tarflow_hf.images.arguments import DataArguments, public_place
from tarflow_hf.images.batches import ImageBatch, StoredImages, collate
from tarflow_hf.images.labels import label_numbering, renumber
from tarflow_hf.images.latents import encode_moments
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.features import load_feature_extractor
from tarflow_hf.metrics.samples import SampleLabels
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.checkpoints import read_manifest
from tarflow_hf.training.export import checkpoint_of, load_pipeline
from tarflow_hf.training.recipes import make_arguments, read_recipe
from tarflow_hf.training.run_card import run_page

COLUMNS = 10
SCALES = (1.0, 2.0, 3.0, 4.0)  # of guidance, read by the classifier beside the recommended one
PLAIN_ROWS = 8  # of samples of a model without classes
SAVED = ("guidance_scale", "temperature", "denoising_strength")
MAX_BYTES = 4 * 2**20  # of a model that lives in a repository of code


def main(argv: Sequence[str]) -> None:
    """Makes the folder that the command line names."""
    options = parse(argv)
    arguments = make_arguments(read_recipe(options.recipe))
    options.label_column, options.split = arguments.data.label_column, arguments.data.eval_split or "test"
    options.work = options.work or Path("runs/showcase", options.output.name)
    data = options.data or arguments.data.data
    pipe = save(options)
    train, held_out = (
        read_split(data, split or "test", arguments, pipe.transformer.config)
        for split in (arguments.data.train_split, arguments.data.eval_split)
    )
    names, of_class = groups_of(class_names(pipe.transformer.config))
    labels = train.class_labels if names else torch.zeros(0, dtype=torch.long)
    groups = Groups(names, of_class, labels.bincount(minlength=len(of_class)))
    pictures(pipe, options.output, groups, train, held_out)
    results = measure(pipe, options, groups, data, train, held_out)
    write_page(pipe, options, groups, arguments, results)
    print(f"{options.output}: pipeline, pictures and README.md")


@dataclass(frozen=True)
class Groups:
    """What the rows of the pictures show, and the classifier reads: classes, or groups of them.

    Args:
        names: Of each group; none for a model without classes.
        of_class: (classes,) the group of each.
        counts: (classes,) images of each that the model was trained on.
    """

    names: list[str]
    of_class: torch.Tensor
    counts: torch.Tensor

    def labels(self, groups: torch.Tensor) -> torch.Tensor:
        """(images,) a class of each group asked for, as often as there were images of it; -1 for a model without.

        The same ones in every run: nothing is picked.
        """
        if not self.names:
            return torch.full_like(groups, -1)
        shares = torch.where(self.of_class == groups[:, None], self.counts, 0).double()
        return shares.multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]


def save(options: argparse.Namespace) -> TarFlowPipeline:
    """Writes the weights in half precision, and gives the pipeline as it is loaded from there, in float32."""
    pipe = load_pipeline(options.run)
    pipe.register_to_config(**{name: getattr(options, name) for name in SAVED})
    pipe.to(torch.float16).save_pretrained(options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"the weights in {options.output} must be at most {MAX_BYTES:,} bytes, got {size:,}")
    pipe = TarFlowPipeline.from_pretrained(options.output, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_split(data: str, split: str, arguments: TrainingArguments, config: TarFlowConfig) -> ImageBatch:
    """The images of a split, as the run saw them, their labels as the model numbers them."""
    place = DataArguments(data=data, train_split=split, label_column=arguments.data.label_column)
    rows, _ = load_image_data(place, class_conditional=arguments.model.class_conditional)
    batch = collate(StoredImages(rows, arguments.image_format, cached=True).samples)
    numbering = label_numbering(rows, config)
    return batch if numbering is None else replace(batch, class_labels=renumber(batch.class_labels, numbering))


def draw(
    pipe: TarFlowPipeline, labels: torch.Tensor, scale: float | None = None, temperature: float | None = None
) -> torch.Tensor:
    """(images, channels, height, width) levels: a sample of each label, from the first seeds.

    Args:
        pipe: The pipeline.
        labels: (images,) class ids, -1 for a model without; image i has the seed i, as in `examples/sample.py`.
        scale: Of guidance; None is the pipeline's.
        temperature: Standard deviation of the latents; None is the pipeline's.
    """
    parts = []
    for rows in torch.arange(len(labels)).split(100):
        generators = [torch.Generator().manual_seed(row) for row in rows.tolist()]
        settings: dict[str, Any] = {"guidance_scale": scale, "temperature": temperature, "generator": generators}
        if pipe.transformer.config.num_classes:
            settings["class_labels"] = labels[rows]
        else:
            settings["num_images_per_label"] = len(rows)
        (images,) = pipe(output_type="pt", return_dict=False, **settings)
        parts.append((cast(torch.Tensor, images) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def pictures(pipe: TarFlowPipeline, folder: Path, groups: Groups, train: ImageBatch, held_out: ImageBatch) -> None:
    """Writes samples.png, plain.png, nearest.png and interpolation.png, and where there are classes guidance.png."""
    names, count = groups.names or None, len(groups.names) or PLAIN_ROWS
    every_row = torch.arange(count)
    rowwise, once = groups.labels(every_row.repeat_interleave(COLUMNS)), groups.labels(every_row)
    samples = draw(pipe, rowwise)
    save_image_grid(as_images(samples), folder / "samples.png", columns=COLUMNS, row_labels=names)
    plain = draw(pipe, rowwise, 1.0, 1.0)
    save_image_grid(as_images(plain), folder / "plain.png", columns=COLUMNS, row_labels=names)
    if names is not None:
        scales = (1.0, 1.5, 2.0, 3.0, 4.0)
        strips = [image for scale in scales for image in as_images(draw(pipe, once, scale))]
        heads = [f"guidance {scale:g}" for scale in scales]
        save_image_grid(strips, folder / "guidance.png", columns=count, row_labels=heads, column_labels=names)

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
    for row in range(count):
        (first, second), label = pair(held_out, groups, row)
        strips += between(pipe, first, second, label)
    save_image_grid(strips, folder / "interpolation.png", columns=9, row_labels=names)


def pair(held_out: ImageBatch, groups: Groups, row: int) -> tuple[torch.Tensor, int]:
    """(2, channels, height, width) levels of the first two held-out images of one class of a group, and that class.

    The class is the first of the group that has two; where none has they are the first two of the group, and of no
    class (-1), as they are without classes: the images 2 row and 2 row + 1.
    """
    if not groups.names:
        return held_out.levels[2 * row : 2 * row + 2], -1
    for label in (groups.of_class == row).nonzero().flatten().tolist():
        found = held_out.levels[held_out.class_labels == label][:2]
        if len(found) == 2:
            return found, label
    found = held_out.levels[groups.of_class[held_out.class_labels] == row][:2]
    if len(found) == 2:
        return found, -1
    raise ValueError(f"{groups.names[row]} has no two held-out images to go from one to the other")


def between(pipe: TarFlowPipeline, first: torch.Tensor, second: torch.Tensor, label: int) -> list[Image.Image]:
    """Nine pictures on the great circle between the latents of two images of one class (-1: of none it is told)."""

    def asked(count: int) -> torch.Tensor | None:
        return torch.tensor([label] * count) if label >= 0 else None

    ends = pipe.invert(to_pixel_values(torch.stack([first, second])), asked(2))
    output = pipe(asked(9), guidance_scale=1.0, denoising_strength=0.0, latents=slerp(ends[0], ends[1], 9))
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
    pipe: TarFlowPipeline,
    options: argparse.Namespace,
    groups: Groups,
    data: str,
    train: ImageBatch,
    held_out: ImageBatch,
) -> tuple[Result, ...]:
    """Likelihood, distance, how samples are read, how near training images are, and the autoencoder's error."""
    results: list[Result] = []
    name_of_data = public_place(str(read_recipe(options.recipe)["data"]))

    def result(metric: str, name: str, value: float, method: str) -> Result:
        command = "python -m examples.make_showcase"
        command += f", --classifier {options.classifier}" if options.classifier else ""
        return Result(metric, name, round(value, 4), name_of_data, options.split, method, command)

    count = options.num_compared
    turns = groups.labels(torch.arange(count) % max(1, len(groups.names)))
    if options.classifier:
        network = cast(SmallClassifier, load_feature_extractor(options.classifier).network)
        share = (predicted(network, held_out.levels) == groups.of_class[held_out.class_labels]).float().mean().item()
        results.append(result("accuracy", "held-out images read right by the classifier", share, "real images"))
        settings = {(scale, 1.0) for scale in SCALES} | {(scale, options.temperature) for scale in SCALES}
        settings |= {(options.guidance_scale, options.temperature)}
        for scale, temperature in sorted(settings, key=lambda each: (-each[1], each[0])):
            right = predicted(network, draw(pipe, turns, scale, temperature)) == groups.of_class[turns]
            by_group = [right[groups.of_class[turns] == group].float().mean() for group in range(len(groups.names))]
            shares = ", ".join(f"{share:.2f}" for share in by_group)
            note = f"{count:,} samples, guidance {scale:g}, temperature {temperature:g}; by class {shares}"
            share = right.float().mean().item()
            results.append(result("accuracy", "samples read as the class asked for", share, note))
    near = float(nearest(draw(pipe, turns), train.levels, 1)[0].median())
    note = f"median of {count:,} samples, root mean square in [-1, 1], with the saved settings"
    results.append(result("nearest", "distance to the nearest training image", near, note))
    others = held_out.levels[:count]
    near = float(nearest(others, train.levels, 1)[0].median())
    results.append(result("nearest", "the same of held-out images", near, f"median of {len(others):,} images"))
    for noise, name in ((0.0, "clean"), (float(pipe.transformer.config.noise_std), "noisy")):
        error = reconstruction_error(pipe, held_out.levels, noise)
        note = f"root mean square in [-1, 1], all held-out images, noise {noise:g} on the latents"
        results.append(result("rms", f"reconstruction error of the autoencoder, {name} latents", error, note))
    output = options.work / "evaluation"
    line = [str(options.output), "--data", data, "--output_dir", str(output), "--num_workers", "0"]
    line += ["--metrics", "bits_per_dim", "frechet_distance", "--sample_labels", options.sample_labels]
    line += ["--feature_extractor", options.feature_extractor or options.classifier]
    line += ["--label_column", options.label_column] if options.label_column else []
    line += ["--split", options.split, "--num_samples", str(options.num_samples)]
    (output / "metrics.json").unlink(missing_ok=True)  # of an earlier state of the model, or of another one
    evaluate.main(line)
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
    groups: Groups,
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
        license=options.license,
        license_note=options.note,
        **about_images(pipe),
    )
    shown = f"{of_pictures(groups, pipe.transformer.config.num_classes)}\n\n## Data and licence\n"
    card = ModelCard(str(render(page)).replace("## Data and licence\n", shown, 1))
    card.save(options.output / "README.md")


def of_pictures(groups: Groups, num_classes: int) -> str:
    """The part of the page that shows the pictures."""
    which = "."
    if groups.names:
        grouped = len(groups.names) < num_classes
        which = ", the first ten of each class above" if not grouped else ", ten of each group"
        which += "" if not grouped else ", of its classes as often as the training images are"
        which += ".\n\nOne set of latents under growing guidance:\n\n![Guidance](guidance.png)"
    between = "one held-out image to another of its kind" if groups.names else "one held-out image to the next"
    return "\n\n".join(
        [
            f"## Pictures\n\nNone is picked: all are of the first seeds{which}",
            "The same seeds of the model as it is, `guidance_scale=1, temperature=1`, which vary more:",
            "![The model as it is](plain.png)",
            "Samples, and the training images nearest to them in pixels:",
            "![Nearest training images](nearest.png)",
            f"From {between}, on the great circle between their latents:",
            "![Interpolation](interpolation.png)",
        ]
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    add = parser.add_argument
    add("run", help="folder of a run, a checkpoint or a pipeline, class-conditional and on latents")
    add("output", type=Path, help="folder of the showcase model")
    add("--recipe", required=True, help="recipe of the run, which the page tells of")
    add("--classifier", help="FILE.py:FUNCTION, a feature extractor with `logits`; needed where there are classes")
    add("--feature_extractor", help="of the distance [the classifier]")
    add("--sample_labels", choices=get_args(SampleLabels), default="random", help="of the distance [random]")
    add("--data", help="data set, in place of the recipe's")
    add("--guidance_scale", type=float, default=2.0, help="the recommended one, which is saved [2]")
    add("--temperature", type=float, default=0.8, help="of the latents, likewise [0.8]")
    add("--denoising_strength", type=float, default=0.0, help="of the latents, likewise [0]")
    add("--num_samples", type=int, default=5000, help="samples for the distance [5000]")
    add(
        "--num_compared",
        type=int,
        default=1000,
        help="samples that are read and whose nearest images are found [1000]",
    )
    add("--time", default="", help="how long the training took, on what")
    add("--advice", default="", help="a sentence about sampling")
    add("--license", default="apache-2.0", help="of the weights, by its name on the Hub [apache-2.0]")
    add("--note", default="The weights are under Apache 2.0, like the code.", help="a sentence about the licence")
    add("--work", type=Path, help="folder of what is measured [runs/showcase/NAME]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
