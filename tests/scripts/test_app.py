"""The demo page, examples/app.py, run as it is and used in a real browser (headless Chromium)."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from examples import app
from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.likelihood import bits_per_dim
from tarflow_hf.images.processing import ImageFormat, preprocess_image
from tarflow_hf.metrics.likelihood import dequantized_images, log_prob_draws

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

APP = Path(__file__).parents[2] / "examples" / "app.py"
NAMES = {0: "cat", 1: "dog", 2: "a <b>fox</b>", 3: "eel"}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a grey model of four classes, and of a colour model with noise conditioning and without classes."""
    folder = tmp_path_factory.mktemp("models")
    size = {"dtype": torch.float32, "image_size": 16}
    refined = {"num_channels": 3, "num_classes": 0, "noise_conditioning": True, "noise_range": [0.02, 0.03]}
    TarFlowPipeline(tiny_model(**size, id2label=NAMES), guidance_scale=2.0).save_pretrained(folder / "grey")
    TarFlowPipeline(tiny_model(**size, **refined)).save_pretrained(folder / "colour")
    return folder


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """The address of the page, which starts with the grey model; its log must stay free of stack traces."""
    folder = tmp_path_factory.mktemp("app")
    log = folder / "log.txt"
    with log.open("w") as file:
        env = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, APP, models / "grey"], stdout=file, stderr=file, env=env)
    try:
        while not (found := re.search(r"The page is at (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    """Chromium, as the system has it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(names)} is on the PATH; leave out with -m 'not browser'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visitor(browser, address, width=1280):
    """The page as a new visitor sees it; it must not ask other servers for anything, nor raise errors."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(PATIENCE)
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    page = context.new_page()
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    context.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(browser, address):
    with visitor(browser, address) as page:
        yield page


def choose(page, class_name):
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name=class_name, exact=True).click()


def generate(page, *, seed=0, count=4, wait=True):
    page.get_by_label("First seed").fill(str(seed))
    page.get_by_label("number input for Number of images").fill(str(count))
    page.evaluate("document.querySelectorAll('#drawn *').forEach(element => element.classList.add('former'))")
    page.get_by_role("button", name="Generate").click()
    if wait:
        finish(page)


def finish(page):
    expect(page.locator("#drawn .title[role=status]:not(.former)")).to_contain_text("on average", timeout=PATIENCE)


def load(page, name):
    page.get_by_label("Checkpoint").fill(str(name))
    page.get_by_role("button", name="Load").click()


def upload(page, path):
    page.get_by_role("tab", name="Score an image").click()
    if page.locator("#upload").get_by_label("Clear").is_visible():
        page.locator("#upload").get_by_label("Clear").click()
    page.locator("#upload input[type=file]").set_input_files(path)
    expect(page.locator("#upload")).to_contain_text(path.stem)
    page.get_by_role("button", name="Score", exact=True).click()


def pictures(page, place="#drawn .cards img"):
    """The images on the page, pixel by pixel as it got them."""
    sources = [image.get_attribute("src") for image in page.locator(place).all()]
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def drawn_by_pipeline(folder, labels, seeds, **settings):
    """What the plain pipeline call draws, and the captions that its likelihoods give."""
    pipe = TarFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    count = 1 if labels else len(seeds)
    images = pipe(labels, count, generator=generators, **settings).images
    levels = torch.stack(
        [preprocess_image(image, ImageFormat(16, pipe.transformer.config.num_channels)) for image in images]
    )
    draws = dequantized_images(levels, [0] * len(seeds), num_draws=4, seed=0)
    ids = None if labels is None else torch.tensor([list(NAMES.values()).index(label) for label in labels])
    log_prob = torch.from_numpy(log_prob_draws(pipe.transformer, draws, ids)).mean(1)
    bits = bits_per_dim(log_prob, pipe.transformer.config.num_dims)
    return images, [f"log p {nats:,.1f} nats\n{bit:.2f} bits/dim" for nats, bit in zip(log_prob, bits, strict=True)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def test_images_appear_step_by_step_and_end_as_the_pipeline_draws_them(page, models):
    page.locator("#drawn").wait_for(state="attached")
    page.evaluate(
        """() => {
            window.titles = [];
            const note = () => window.titles.push(document.querySelector('#drawn .title')?.innerText);
            new MutationObserver(note).observe(document.querySelector('#drawn'), {childList: true, subtree: true});
        }"""
    )
    generate(page, seed=5, count=6)
    names = list(NAMES.values())
    images, likelihoods = drawn_by_pipeline(models / "grey", [*names, *names[:2]], range(5, 11))
    assert_same(pictures(page), images)
    captions = page.locator("#drawn .cards figcaption").all_inner_texts()
    heads = [f"{name}, seed {seed}" for name, seed in zip([*names, *names[:2]], range(5, 11), strict=True)]
    assert [" ".join(text.split()) for text in captions] == [
        f"{head} {' '.join(line.split())}" for head, line in zip(heads, likelihoods, strict=True)
    ]
    steps = ["noise", "block 1", "block 2", "block 3", "denoised"]
    assert page.locator("#drawn .strip figcaption").all_inner_texts() == steps
    assert_same(pictures(page, "#drawn .strip img")[-1:], images[:1])
    seen = page.evaluate("window.titles")
    assert {"noise", "block 1 of 3", "block 2 of 3", "block 3 of 3", "denoised"} & set(
        seen
    )  # a busy browser skips some


def test_small_images_are_enlarged_by_whole_sharp_pixels(page):
    generate(page, count=1)
    image = page.locator("#drawn .cards img")
    box = image.bounding_box()
    assert box["width"] == box["height"] >= 128
    assert box["width"] % 16 == 0
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_another_class_guidance_and_no_denoising(page, models):
    choose(page, "dog")
    page.get_by_label("number input for Guidance scale").fill("3")
    page.get_by_label("number input for Denoising strength").fill("0")
    generate(page, count=2)
    settings = {"guidance_scale": 3.0, "denoising_strength": 0.0}
    images, _ = drawn_by_pipeline(models / "grey", ["dog", "dog"], range(2), **settings)
    assert_same(pictures(page), images)
    assert page.locator("#drawn .cards b").all_inner_texts() == ["dog, seed 0", "dog, seed 1"]
    choose(page, "no label")
    generate(page, count=2)
    expect(page.locator("#drawn .cards b").first).to_have_text("seed 0")
    assert_same(pictures(page), drawn_by_pipeline(models / "grey", None, range(2), **settings)[0])


def test_two_visitors_at_once_get_their_own_images_of_their_own_checkpoints(browser, address, models):
    with visitor(browser, address) as one, visitor(browser, address) as two:
        load(two, models / "colour")
        expect(two.get_by_text("16x16 colour images, no classes")).to_be_visible(timeout=PATIENCE)
        choose(one, "eel")
        generate(one, seed=3, count=3, wait=False)
        generate(two, seed=30, count=5, wait=False)
        finish(one)
        finish(two)
        assert_same(pictures(one), drawn_by_pipeline(models / "grey", ["eel"] * 3, range(3, 6))[0])
        assert_same(pictures(two), drawn_by_pipeline(models / "colour", None, range(30, 35))[0])


def test_a_model_without_classes_and_with_noise_levels_has_the_controls_that_fit_it(page, models):
    load(page, models / "colour")
    expect(page.get_by_label("Class", exact=True)).to_be_hidden(timeout=PATIENCE)
    expect(page.get_by_label("number input for Guidance scale")).to_be_hidden()
    generate(page, count=2)
    steps = ["noise", "block 1", "block 2", "block 3", "refined 1", "refined 2", "refined 3"]
    assert page.locator("#drawn .strip figcaption").all_inner_texts() == steps
    assert page.locator("#drawn .cards b").all_inner_texts() == ["seed 0", "seed 1"]


def test_a_model_of_the_showcase_is_chosen_and_drawn(page):
    page.get_by_label("Showcase").click()
    page.get_by_role("option", name="fashion", exact=True).click()
    expect(page.get_by_text("28x28 grey images, 10 classes")).to_be_visible(timeout=PATIENCE)
    generate(page, count=1)
    assert page.locator("#drawn .cards b").all_inner_texts() == ["T-shirt/top, seed 0"]
    expect(page.locator("#drawn .cards p").first).to_contain_text("nats/dim")


def test_an_upload_is_scored_and_its_class_found(page, models, tmp_path):
    (image,), (likelihood,) = drawn_by_pipeline(models / "grey", ["dog"], [7], guidance_scale=3.0)
    image.save(tmp_path / "dog.png")
    upload(page, tmp_path / "dog.png")
    expect(page.locator("#scored tr").nth(2)).to_be_visible(timeout=PATIENCE)
    assert_same(pictures(page, "#scored img"), [image])
    expect(page.locator("#posterior").get_by_text("%")).to_have_count(4, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("name", "message"), [("text.png", "cannot be read as an image"), ("moving.gif", "3 pictures")]
)
def test_a_bad_upload_is_explained_and_the_next_one_scored(page, tmp_path, name, message):
    (tmp_path / "text.png").write_text("nothing")
    frames = [Image.new("L", (20, 20), level) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    upload(page, tmp_path / name)
    expect(page.locator("#scored").get_by_role("alert")).to_contain_text(message, timeout=PATIENCE)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "colour.jpg")
    upload(page, tmp_path / "colour.jpg")
    expect(page.locator("#scored figcaption")).to_contain_text("cut and resized from 30x20", timeout=PATIENCE)
    expect(page.locator("#scored figcaption")).to_contain_text("made grey")


def test_a_checkpoint_that_is_not_there_or_not_loaded_is_explained_and_the_page_goes_on(page, models):
    load(page, "user/<i>nothing")
    expect(page.get_by_role("alert").first).to_contain_text("'user/<i>nothing'", timeout=PATIENCE)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#drawn").get_by_role("alert")).to_contain_text("press Load", timeout=PATIENCE)
    load(page, models)
    expect(page.get_by_role("alert").first).to_contain_text("is not a TarFlow pipeline", timeout=PATIENCE)
    page.get_by_label("Checkpoint").fill(str(models / "grey"))
    page.get_by_label("First seed").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#drawn").get_by_role("alert")).to_contain_text("The seed is missing", timeout=PATIENCE)
    generate(page)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_on_a_phone_or_a_screen(browser, address, width):
    with visitor(browser, address, width) as page:
        generate(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [image.bounding_box() for image in page.locator("#drawn img").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        assert len({box["y"] for box in boxes[:4]}) == (2 if width == 360 else 1)


def test_a_page_without_its_checkpoint_does_not_start_and_says_why(tmp_path):
    with pytest.raises(SystemExit, match="nothing cannot be shown: .*nothing"):
        app.main([str(tmp_path / "nothing")])


def test_an_upload_of_extreme_shape_is_refused(tmp_path):
    Image.new("L", (210, 10)).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match="narrow.png is 210x10: too narrow"):
        app.read_upload(tmp_path / "narrow.png")


def test_uploads_are_resized_as_the_model_says():
    picture = Image.effect_noise((90, 50), 60)
    pipes = [TarFlowPipeline(tiny_model(resize=resize)) for resize in ("short_side", "adm")]
    seen = [app.noisy(pipe, [picture]) for pipe in pipes]
    levels = preprocess_image(picture, ImageFormat(8, 1, "adm"))
    assert seen[1].equal(dequantized_images(levels[None], [0], app.NOISE_DRAWS, seed=0))
    assert not seen[0].equal(seen[1])


def test_visitors_may_load_checkpoints_at_the_same_time(models, monkeypatch):
    monkeypatch.setattr(app, "_load", app._load.__wrapped__)  # every visitor another one
    folders = [str(models / "colour"), app.showcase()["fashion"]] * 8  # diffusers empties what is built beside a vae
    with ThreadPoolExecutor(4) as visitors:
        channels = [pipe.num_channels for pipe in visitors.map(app.load, folders)]
    assert channels == [3, 1] * 8


def test_names_that_occur_twice_are_told_apart():
    pipe = TarFlowPipeline(tiny_model(id2label={0: "crane", 1: "lynx", 2: "crane", 3: "eel"}))
    assert app.class_names(pipe) == ["crane (0)", "lynx", "crane (2)", "eel"]


def test_the_space_runs_the_tested_version_of_gradio():
    root = APP.parents[1]
    pinned = re.search(r"^gradio==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"sdk_version: {pinned}\n" in (root / "examples" / "space" / "README.md").read_text()
