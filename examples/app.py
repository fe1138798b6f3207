"""A demo page: draws images, shows how noise turns into them, and measures their likelihood and that of uploads.

    python examples/app.py [MODEL]                 # folder or Hub name; prints the address of the page

On a Hub Space it runs as it is and starts with the checkpoint that the Space's variable MODEL names. The page needs no
other server: no fonts, scripts or statistics from outside.
"""

import argparse
import base64
import html
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from PIL import Image

from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.class_names import class_names as names_of
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.processing import ImageFormat, preprocess_image, resize_and_crop
from tarflow_hf.images.reading import convert_image, open_image
from tarflow_hf.metrics.likelihood import class_log_prob_mean, flow_draws, log_prob_draws, unit_of
from tarflow_hf.metrics.posterior import class_posterior

with installed_by("demo"):
    import gradio as gr

Trace = list[tuple[str, Image.Image]]  # the name of each step of sampling, and the first image after it
SHOWCASE = Path(__file__).parent / "showcase"
EACH_CLASS = "each"  # choice of the class menu beside the class ids and -1, no label
MAX_IMAGES = 16
MAX_SEED = 2**32 - MAX_IMAGES  # generators on a CPU know 32 bits of a seed
MAX_TRACE = 16  # states of the first image
MAX_ASPECT = 20  # long side by short side of an upload
MAX_CLASSES = 100  # models of more classes compare them only if asked to
NOISE_DRAWS = 4  # over which log-densities are averaged
PAIRS_PER_PASS = 32  # of image and class, which bounds memory

LOADING = Lock()
PROBLEMS = (ValueError, OSError, torch.OutOfMemoryError)  # that a visitor can mend
LIKELIHOOD_NOTE = (
    '<p class="note">log p: log-likelihood of the picture as an 8-bit file, given the class it was drawn or tried as, '
    f"the mean over {NOISE_DRAWS} draws of the noise within a level. Bits/dim: the same for each number in the image, "
    "less is likelier. Compare them within a checkpoint. A model of latents measures noisy latents, in nats.</p>"
)
CSS = """
.title { margin: 0 0 10px; font-weight: 600; } .strip figcaption { font-size: 12px; }
.cards, .strip { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; margin-bottom: 24px; }
.strip { gap: 8px; } .beside { align-self: center; } .note { font-size: 12px; opacity: 0.8; }
figure { margin: 0; text-align: center; } figure .enlarged { image-rendering: pixelated; }
figure img { display: block; margin: 0; max-width: 100%; height: auto; border-radius: 3px; }
figcaption { margin-top: 4px; font-size: 14px; line-height: 1.35; font-variant-numeric: tabular-nums; }
.cards p, .strip figcaption { margin: 0; line-height: inherit; white-space: nowrap; }
.problem { padding: 10px 14px; border-left: 4px solid #dc2626; background: #dc26261a; overflow-wrap: anywhere; }
.cards td, .cards th { padding: 4px 12px; text-align: right; font-variant-numeric: tabular-nums; }
.cards td:first-child { text-align: left; }
@media (max-width: 400px) { .cards figure { max-width: calc(50% - 8px); } }
"""


def main(argv: Sequence[str]) -> None:
    """Starts the page and prints its address."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    default = os.environ.get("MODEL") or showcase().get("fashion", "runs/digits")
    parser.add_argument("model", nargs="?", default=default, help=f"folder or Hub name of a pipeline [{default}]")
    parser.add_argument("--port", type=int, help="[GRADIO_SERVER_PORT, or the first free one from 7860 on]")
    options = parser.parse_args(argv)
    try:
        page = build_page(options.model)
    except PROBLEMS as error:
        raise SystemExit(f"{options.model} cannot be shown: {error}") from error
    page.queue(default_concurrency_limit=2, max_size=50)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False, "quiet": True}
    try:
        _, address, _ = page.launch(server_port=options.port, max_file_size="20mb", prevent_thread_lock=True, **look)
    except OSError as error:  # the port is taken
        raise SystemExit(str(error)) from error
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def showcase() -> dict[str, str]:
    """Folders of the trained models that the repository brings, by name."""
    return {path.parent.name: str(path.parent) for path in sorted(SHOWCASE.glob("*/model_index.json"))}


def load(name: str) -> TarFlowPipeline:
    """A pipeline from a folder or the Hub, kept for the next request; one at a time."""
    with LOADING:  # while diffusers builds an autoencoder, models that other threads build get no data
        return _load(name)


@lru_cache(maxsize=2)
def _load(name: str) -> TarFlowPipeline:
    cuda = torch.cuda.is_available()
    pipe = TarFlowPipeline.from_pretrained(name, dtype=None if cuda else torch.float32)  # halves are slow on a CPU
    if pipe.transformer.config.value_scale is not None:
        raise ValueError(f"{name} is a model of arrays, the page shows images")
    if pipe.num_channels not in (1, 3):
        raise ValueError(f"{name} has {pipe.num_channels} channels, the page shows images of 1 (grey) or 3 (colour)")
    return pipe.to("cuda" if cuda else "cpu")


def class_names(pipe: TarFlowPipeline) -> list[str]:
    """The names of the classes in the order of their ids, with the id behind names that occur twice."""
    names = names_of(pipe.transformer.config)
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def problem(error: Exception) -> str:
    """HTML that says what went wrong."""
    return f'<p class="problem" role="alert">{html.escape(str(error))}</p>'


def generate(
    loaded: str, name: str, choice: int | str, guidance: float, denoising: float, count: int, seed: int | None
) -> Iterator[str]:
    """HTML of the images after each step, in the end with their likelihoods; or of what is wrong.

    The arguments are the values of the controls, behind the loaded checkpoint and what stands in its field. Image
    number i is drawn from `seed` + i.
    """
    try:
        check_loaded(loaded, name)
        if seed is None:
            raise ValueError("The seed is missing: a whole number, from which the images follow.")
        pipe = load(loaded)
        names = class_names(pipe)
        seeds = range(seed, seed + int(count))
        labels = None
        heads = [f"seed {seed}" for seed in seeds]
        if names and choice != -1:
            labels = [index % len(names) if choice == EACH_CLASS else int(choice) for index in range(len(seeds))]
            heads = [f"{names[label]}, {head}" for label, head in zip(labels, heads, strict=True)]
        trace: Trace = []
        for step, images in stream(pipe, labels, seeds, guidance, denoising):
            trace.append((step, images[0]))
            yield cards(step, images, heads, ["<br>&nbsp;"] * len(seeds), trace)
        (log_prob, values), unit = measure(pipe, images, labels), unit_of(pipe).short
        lines = [f"log p {nats:,.1f} nats<br>{value:.2f} {unit}" for nats, value in zip(log_prob, values, strict=True)]
        yield cards(f"{len(seeds)} images, {values.mean():.2f} {unit} on average", images, heads, lines, trace)
    except PROBLEMS as error:
        yield problem(error)


def stream(
    pipe: TarFlowPipeline, labels: list[int] | None, seeds: Sequence[int], guidance: float, denoising: float
) -> Iterator[tuple[str, list[Image.Image]]]:
    """A pipeline call while it runs, in a thread: each step's name and the images after it.

    Others may call the pipeline meanwhile. The call is interrupted when nobody reads on.
    """
    pipe = TarFlowPipeline(**pipe.components, image_size=pipe.config.image_size, **pipe.sampling_defaults)  # its own
    pipe.set_progress_bar_config(disable=True)
    first, generators = ([torch.Generator().manual_seed(seed) for seed in seeds] for _ in range(2))
    latents = pipe.prepare_latents(len(seeds), first, temperature=pipe.config.temperature)  # as the call will draw
    config = pipe.transformer.config
    events: SimpleQueue[tuple[int, torch.Tensor] | Exception | None] = SimpleQueue()

    def end_step(pipe: TarFlowPipeline, step: int, block: int, tensors: dict[str, torch.Tensor]) -> None:
        events.put((step + 1, tensors["latents"]))

    def call() -> None:
        try:
            pipe(
                labels,
                num_images_per_label=1 if labels else len(seeds),
                guidance_scale=guidance,
                denoising_strength=denoising,
                generator=generators,
                callback_on_step_end=end_step,
            )
            events.put(None)
        except Exception as error:
            events.put(error)

    events.put((0, latents))
    Thread(target=call, daemon=True).start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            step, patches = event
            images = pipe.pictures(pipe.transformer.unpatchify(patches))
            yield step_name(step, config.num_blocks, config.noise_conditioning), images
    finally:
        pipe._interrupt = True


def step_name(step: int, num_blocks: int, refined: bool) -> str:
    """What a state of sampling is called: noise, after a block, after one denoising step or one of many."""
    if step <= num_blocks:
        return f"block {step} of {num_blocks}" if step else "noise"
    return f"refined {step - num_blocks}" if refined else "denoised"


def measure(
    pipe: TarFlowPipeline, images: Sequence[Image.Image], labels: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-density in nats and in the model's unit, (images,) each, of images as 8-bit files."""
    label_ids = None if labels is None else torch.tensor(labels)
    log_prob = torch.from_numpy(log_prob_draws(pipe.transformer, noisy(pipe, images), label_ids)).mean(dim=1)
    return log_prob, unit_of(pipe).per_dim(log_prob)


def noisy(pipe: TarFlowPipeline, images: Sequence[Image.Image]) -> torch.Tensor:
    """(draws, images, channels, height, width): what the flow sees of images, with the same noise every time."""
    image_format = ImageFormat(pipe.image_shape, pipe.num_channels, pipe.transformer.config.resize)
    levels = torch.stack([preprocess_image(image, image_format) for image in images])
    return flow_draws(pipe, levels, [0] * len(images), NOISE_DRAWS, seed=0)


def score(loaded: str, name: str, path: str | None, compare: bool) -> tuple[str, dict[str, float] | None]:
    """How likely an uploaded image is, as HTML, and if all classes are to be compared their posterior."""
    try:
        check_loaded(loaded, name)
        if path is None:
            raise ValueError("There is no image yet: choose one or drop it into the field.")
        pipe = load(loaded)
        names, unit, image = class_names(pipe), unit_of(pipe).short, read_upload(Path(path))
        grey_or_colour = convert_image(image, pipe.num_channels)
        seen = resize_and_crop(grey_or_colour, pipe.image_shape, pipe.transformer.config.resize)
        log_prob, values = measure(pipe, [seen], None)
        rows = [("without a label" if names else "this image", float(log_prob[0]), float(values[0]))]
        if not (names and compare):
            return report(image, seen, rows, unit), None
        by_class = torch.from_numpy(class_log_prob_mean(pipe.transformer, noisy(pipe, [seen]), PAIRS_PER_PASS))
        best, values = int(by_class.argmax()), unit_of(pipe).per_dim(by_class.max(dim=1).values)
        rows.append((f"as {names[best]}", float(by_class.max()), float(values[0])))
        posterior = class_posterior(by_class)[0].tolist()
        return report(image, seen, rows, unit), dict(zip(names, posterior, strict=True))
    except PROBLEMS as error:
        return problem(error), None


def read_upload(path: Path) -> Image.Image:
    """The image in an uploaded file; ValueError if it is no image, several, or too narrow a one."""
    try:
        with Image.open(path) as file:  # an MPO file is a photo with its preview
            pictures = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
        image = open_image(path)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read as an image: it is damaged, or of another kind.") from error
    if pictures > 1:
        raise ValueError(f"{path.name} holds {pictures} pictures (an animation?); choose a file with one.")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{path.name} is {image.width}x{image.height}: too narrow, at most {MAX_ASPECT}:1 is taken.")
    return image


def check_loaded(loaded: str, name: str) -> None:
    """Raises ValueError if another checkpoint was typed and not loaded."""
    if name.strip() != loaded:
        raise ValueError(f"The page shows {loaded}; press Load to go on with {name.strip() or 'another checkpoint'}.")


def cards(title: str, images: Sequence[Image.Image], heads: Sequence[str], lines: Sequence[str], trace: Trace) -> str:
    """HTML of images, each with a head and further lines below it, and of the way of the first one."""
    figures = "".join(
        figure(image, head, f"<b>{html.escape(head)}</b><p>{line}</p>", smallest=140, largest=256)
        for image, head, line in zip(images, heads, lines, strict=True)
    )
    every = -(-len(trace) // MAX_TRACE)
    shown = [trace[0], *trace[:0:-every][::-1]]
    strip = "".join(figure(image, step, step.split(" of ")[0], smallest=60, largest=64) for step, image in shown)
    return (
        f'<p class="title" role="status">{html.escape(title)}</p><div class="cards">{figures}</div>'
        f'<p class="title">From noise to the first image</p><div class="strip">{strip}</div>'
    )


def figure(image: Image.Image, description: str, caption: str, *, smallest: int, largest: int) -> str:
    """HTML of an image, a text for those who do not see it and an HTML caption.

    A small image is enlarged by a whole factor to `smallest` screen pixels or more, a large one shown at `largest`.
    """
    file = io.BytesIO()
    image.save(file, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    factor = -(-smallest // image.width)
    width, look = (image.width * factor, "enlarged") if factor > 1 else (min(image.width, largest), "")
    tag = f'<img src="{source}" class="{look}" width="{width}" alt="{html.escape(description)}">'
    return f'<figure style="width: {width}px">{tag}<figcaption>{caption}</figcaption></figure>'


def report(image: Image.Image, seen: Image.Image, rows: Sequence[tuple[str, float, float]], unit: str) -> str:
    """HTML of an upload as the model sees it, and a table of nats, in all and per dimension, under each condition."""
    changes = [f"cut and resized from {image.width}x{image.height}"] if image.size != seen.size else []
    changes += ["made grey"] if seen.mode == "L" and image.mode not in ("1", "L") else []
    caption = f"{seen.width}x{seen.height}" + "".join(f"<br>{change}" for change in changes)
    cells = "".join(
        f"<tr><td>{html.escape(case)}</td><td>{nats:,.1f}</td><td>{each:.3f}</td></tr>" for case, nats, each in rows
    )
    return (
        '<p class="title" role="status">As the model sees it</p><div class="cards">'
        f"{figure(seen, 'the upload as the model sees it', caption, smallest=160, largest=256)}"
        f"<table><tr><th></th><th>log p (nats)</th><th>{unit}</th></tr>{cells}</table></div>"
    )


def controls(name: str) -> list[dict[str, object]]:
    """What a checkpoint makes of the controls, in the order in which `build_page` lists them."""
    pipe = load(name)
    config, names, defaults = pipe.transformer.config, class_names(pipe), pipe.sampling_defaults
    size = f"{pipe.transformer.num_parameters() / 1e6:,.1f} M parameters"
    if pipe.vae is not None:
        size += f" on the latents of an autoencoder of {pipe.vae.num_parameters() / 1e6:,.1f} M"
    kind = f"{'x'.join(map(str, pipe.image_shape))} {'grey' if pipe.num_channels == 1 else 'colour'} images"
    choices = [("each class in turn", EACH_CLASS), *((label, index) for index, label in enumerate(names))]
    strength, guided = defaults["denoising_strength"], bool(names) or defaults["attention_temperature"] != 1
    comparison = f"Class posterior, by a look at each of the {len(names)} classes"
    return [
        {"value": name},
        {"value": f"{kind}, {len(names) or 'no'} classes, {config.num_blocks} blocks, {size}."},
        {"choices": [*choices, ("no label", -1)], "value": EACH_CLASS, "visible": bool(names)},
        {"value": defaults["guidance_scale"], "maximum": max(5.0, defaults["guidance_scale"]), "visible": guided},
        {"value": strength, "maximum": max(2.0, strength), "visible": config.noise_type == "gaussian"},
        {"value": len(names) <= MAX_CLASSES, "label": comparison, "visible": bool(names)},
        {"value": None, "visible": bool(names)},
    ]


def build_page(model: str) -> gr.Blocks:
    """The page, with the controls that fit a checkpoint."""
    name, about, choice, guidance, denoising, compare, by_class = controls(model)
    with gr.Blocks(analytics_enabled=False, title="TarFlow", delete_cache=(3600, 3600)) as page:
        loaded = gr.State(model)
        gr.Markdown("# TarFlow\nA normalizing flow turns noise into images, block by block, and measures any image.")
        with gr.Row():
            known = gr.Dropdown([*showcase().items()], label="Showcase", scale=2, value=None, visible=bool(showcase()))
            checkpoint = gr.Textbox(label="Checkpoint: folder or Hub name", scale=6, min_width=200, **name)
            load_button = gr.Button("Load", scale=1, min_width=80, elem_classes="beside")
        about_line = gr.Markdown(**about)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                drawing = generation_controls(choice, guidance, denoising)
                with gr.Row():
                    run = gr.Button("Generate", variant="primary", scale=2, min_width=120)
                    stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=3, min_width=300):
                drawn = gr.HTML(elem_id="drawn", padding=False)
                gr.HTML(LIKELIHOOD_NOTE, padding=False)
        with gr.Tab("Score an image"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                upload = gr.File(label="Image", elem_id="upload", height=140)
                with_posterior = gr.Checkbox(**compare)
                measure_button = gr.Button("Score", variant="primary")
            with gr.Column(scale=3, min_width=300):
                scored = gr.HTML(elem_id="scored", padding=False)
                posterior = gr.Label(label="Class posterior", num_top_classes=10, elem_id="posterior", **by_class)
                gr.HTML(LIKELIHOOD_NOTE, padding=False)

        changed = [checkpoint, about_line, *drawing[:3], with_posterior, posterior, loaded, drawn, scored]
        gr.on([load_button.click, checkpoint.submit], open_checkpoint, checkpoint, changed)
        known.input(open_checkpoint, known, changed)
        generation = run.click(generate, [loaded, checkpoint, *drawing], drawn)
        stop.click(None, cancels=generation)
        measure_button.click(score, [loaded, checkpoint, upload, with_posterior], [scored, posterior])
    return page


def generation_controls(
    choice: dict[str, object], guidance: dict[str, object], denoising: dict[str, object]
) -> list[gr.Component]:
    """The controls whose values `generate` takes, in its order."""
    chosen = gr.Dropdown(label="Class", **choice)
    scale = gr.Slider(1, step=0.1, label="Guidance scale", info="1 is none", **guidance)
    strength = gr.Slider(0, step=0.1, label="Denoising strength", info="0 is none", **denoising)
    count = gr.Slider(1, MAX_IMAGES, value=10, step=1, precision=0, label="Number of images")
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="First seed", min_width=120)
        new_seed = gr.Button("New seed", min_width=80, elem_classes="beside")
    new_seed.click(lambda: random.randrange(MAX_SEED), None, seed)
    return [chosen, scale, strength, count, seed]


def open_checkpoint(name: str) -> list[object]:
    """Another checkpoint: its controls, its name as the loaded one, and empty results; or what is wrong with it."""
    try:
        if not (name := name.strip()):
            raise ValueError("Which checkpoint? Type a folder or a Hub name (user/model).")
        return [*(gr.update(**settings) for settings in controls(name)), name, "", ""]
    except PROBLEMS as error:
        return [gr.skip(), problem(error), *[gr.skip()] * 8]


if __name__ == "__main__":
    main(sys.argv[1:])
