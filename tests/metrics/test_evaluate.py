"""examples/evaluate.py on real digits and a tiny model: the authors' formula, resuming, processes, files, the card."""

import json
import math
import re
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import random_images, tiny_model
from hub.loopback import LoopbackHub
from huggingface_hub import ModelCard
from PIL import Image
from png_files import BOMB
from training_runs import environments, exit_codes, start_processes

from examples import evaluate
from examples.data.digits_classifier import DIGITS, load_digits_split
from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.likelihood import DensityUnit, bits_per_dim
from tarflow_hf.images.batches import UnreadableImageError
from tarflow_hf.metrics.likelihood import density_summary, dequantized_images, log_prob_draws
from tarflow_hf.metrics.statistics import Moments

ROOT = Path(__file__).parents[2]
EXTRACTOR = "examples/data/digits_classifier.py:digits_classifier"
DISTANCE = ["--metrics", "frechet_distance", "--feature_extractor", str(ROOT / EXTRACTOR)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline of a tiny model of the ten digits."""
    folder = tmp_path_factory.mktemp("model") / "tiny-digits"
    model = tiny_model(dtype=torch.float32, num_classes=10, id2label={index: str(index) for index in range(10)})
    TarFlowPipeline(transformer=model, guidance_scale=1.5).save_pretrained(folder)
    return folder


def arguments(folder, output, *more):
    sizes = ["--num_images", "70", "--batch_size", "16", "--num_workers", "2"]
    if "frechet_distance" in more:
        sizes += ["--num_samples", "50", "--statistics_cache", str(output / "cache")]
    return [str(folder), "--data", str(DIGITS), "--output_dir", str(output), *sizes, *map(str, more)]


def measure(folder, output, *more):
    evaluate.main(arguments(folder, output, *more))
    return json.loads((output / "metrics.json").read_text())


def authors_bits_per_dim(model, images, labels):
    """[mean(z^2 / 2) + log(2 pi) / 2 + log 128 - log_det / dims] / log 2, for the images as they are."""
    output = model(images, labels)
    nats = (output.latents**2 / 2).mean((1, 2)) + math.log(2 * math.pi) / 2 + math.log(128)
    return (nats - output.log_det / model.config.num_dims) / math.log(2)


@torch.no_grad()
def test_bits_per_dim_equal_the_authors_formula_for_the_same_noise(folder, tmp_path):
    measured = measure(folder, tmp_path, "--num_noise_draws", 3, "--seed", 5)
    model = TarFlowPipeline.from_pretrained(folder).transformer
    levels, labels = (values[:70] for values in load_digits_split("test"))
    draws = dequantized_images(levels, range(70), 3, seed=5)
    table = pyarrow.parquet.read_table(tmp_path / "per_image.parquet").to_pydict()
    assert table["class_label"] == labels.tolist()
    for name, given in (("bits_per_dim", None), ("bits_per_dim_with_labels", labels)):
        expected = torch.stack([authors_bits_per_dim(model, draw, given) for draw in draws]).mean(0)
        np.testing.assert_allclose(table[name], expected, atol=1e-6, rtol=1e-6)
        entry = measured[name]
        assert entry["value"] == pytest.approx(np.mean(table[name]), rel=1e-12)
        assert entry["standard_error"] == pytest.approx(np.std(table[name], ddof=1) / math.sqrt(70), rel=1e-9)
        assert (entry["num_samples"], entry["num_noise_draws"], entry["seed"]) == (70, 3, 5)
    assert measured["bits_per_dim"]["value"] != measured["bits_per_dim_with_labels"]["value"]


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_the_reference_bits_of_clean_images_hold_for_any_prior(volume_preserving):
    model = tiny_model(volume_preserving=volume_preserving)
    images = random_images(model)
    found = bits_per_dim(model.log_prob(images), model.config.num_dims)
    if not volume_preserving:
        torch.testing.assert_close(found, authors_bits_per_dim(model, images, None), rtol=1e-12, atol=1e-12)
    else:  # their formula leaves the learned variance out
        assert (found - authors_bits_per_dim(model, images, None)).abs().min() > 1e-3


def test_noise_belongs_to_the_image_and_its_first_draws_do_not_depend_on_their_number():
    levels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = dequantized_images(levels, range(10, 16), 3, seed=1)
    part = dequantized_images(levels[2:4], range(12, 14), 2, seed=1)
    assert torch.equal(whole[:2, 2:4], part)
    assert not torch.equal(whole[0], dequantized_images(levels, range(10, 16), 1, seed=2)[0])
    cell = (whole + 1) * 128
    assert torch.equal(cell.floor().byte(), levels.expand_as(cell))


def test_more_draws_lower_the_spread_of_an_image(folder):
    model = TarFlowPipeline.from_pretrained(folder).transformer
    levels = load_digits_split("test")[0][:1].expand(64, 1, 8, 8)
    draws = dequantized_images(levels, range(64), 16, seed=0)
    log_prob = log_prob_draws(model, draws, None)
    one, sixteen = (Moments.of(values[:, None]) for values in (log_prob[:, 0], log_prob.mean(axis=1)))
    error, lower = (density_summary(each, DensityUnit(64))["standard_error"] for each in (one, sixteen))
    assert 2.5 < error / lower < 6.5  # 4 in the mean


def test_two_processes_equal_one(folder, tmp_path):
    everything = [*DISTANCE, "--metrics", "bits_per_dim", "frechet_distance", "--classify", "--num_noise_draws", 2]
    one = measure(folder, tmp_path / "one", *everything)
    argv = arguments(folder, tmp_path / "two", *everything)
    assert exit_codes(start_processes(evaluate.main, (argv,), environments(2))) == [0, 0]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert one.keys() == two.keys()
    for name, entry in one.items():
        numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
        assert {key: two[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-9), name
        assert {**two[name], **numbers} == entry
    first, second = (
        pyarrow.parquet.read_table(tmp_path / which / "per_image.parquet").to_pydict() for which in ("one", "two")
    )
    assert first == second
    assert len(first["bits_per_dim"]) == 70


def test_sampling_that_is_killed_goes_on_and_ends_the_same(folder, tmp_path):
    options = [*DISTANCE, "--num_samples", 120, "--save_samples", "npz", "--batch_size", 4]
    argv = arguments(folder, tmp_path / "killed", *options)
    (process,) = start_processes(evaluate.main, (argv,), [{}])
    while process.is_alive() and len(batches_of(tmp_path / "killed")) < 3:
        time.sleep(0.005)
    process.kill()
    assert exit_codes([process]) == [-signal.SIGKILL]
    kept = {path: path.stat().st_mtime_ns for path in batches_of(tmp_path / "killed")}
    assert 3 <= len(kept) < 30
    resumed = measure(folder, tmp_path / "killed", *options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = measure(folder, tmp_path / "whole", *options)
    assert resumed == whole
    first, second = (np.load(tmp_path / which / "samples.npz")["arr_0"] for which in ("killed", "whole"))
    np.testing.assert_array_equal(first, second)


def batches_of(output):
    return sorted(output.glob("work/samples/*/[0-9]*.npz"))


def test_samples_are_written_in_the_form_that_evaluators_read(folder, tmp_path):
    measure(folder, tmp_path, *DISTANCE, "--save_samples", "npz", "--num_samples", 20)
    measure(folder, tmp_path, *DISTANCE, "--save_samples", "png", "--num_samples", 20)
    with np.load(tmp_path / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype, labels.shape) == ((20, 8, 8, 3), np.uint8, (20,))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"{index:09d}.png" for index in range(20)]
    for index, name in enumerate(names):
        with Image.open(tmp_path / "samples" / name) as image:
            np.testing.assert_array_equal(np.array(image), images[index, :, :, 0])
    pipe = TarFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)  # seed 0, sample 7: it does not depend on the batch
    alone = pipe(int(labels[7]), generator=generator, output_type="pil").images[0]
    assert np.abs(np.array(alone).astype(int) - images[7, :, :, 0]).max() <= 1


def test_a_reference_file_takes_the_place_of_the_data_set(folder, tmp_path):
    from_data = measure(folder, tmp_path, *DISTANCE)["FD-digits_classifier"]
    (cached,) = (tmp_path / "cache").iterdir()
    with np.load(cached) as file:
        np.savez(tmp_path / "adm.npz", mu=file["mu"], sigma=file["sigma"])
    measured = measure(folder, tmp_path / "bare", *DISTANCE, "--reference", tmp_path / "adm.npz")
    assert measured["FD-digits_classifier"]["value"] == pytest.approx(from_data["value"], rel=1e-12)
    assert "KD-digits_classifier" not in measured
    assert "recall" not in measured


def test_fewer_samples_than_features_is_said(folder, tmp_path, capsys):
    measured = measure(folder, tmp_path, *DISTANCE, "--num_samples", 12)
    assert measured["FD-digits_classifier"]["note"].startswith("12 generated samples for 32 features")
    assert "covariance is singular" in capsys.readouterr().out
    assert "note" not in measured["KD-digits_classifier"]


def test_results_reach_the_model_index_and_keep_the_page(folder, tmp_path):
    page = folder / "README.md"
    page.write_text(page.read_text() + "\nA sentence of its owner.\n")
    for seed in (0, 1):
        measured = measure(folder, tmp_path, "--classify", "--update_card", "--seed", seed)
    card = ModelCard.load(page)
    assert "A sentence of its owner." in card.text
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {name: entry["value"] for name, entry in measured.items()}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}


def test_results_reach_the_page_of_a_model_on_the_hub(tmp_path):
    with LoopbackHub(tmp_path) as hub:
        seen = hub.run("measured", str(DIGITS), str(tmp_path / "output"))
    measured = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert seen["results"] == {name: entry["value"] for name, entry in measured.items()}
    assert seen["commits"] == ["Add evaluation results", "Upload TarFlowPipeline", "initial commit"]
    assert "alice/measured" in seen["text"]


def test_metrics_of_earlier_runs_stay(folder, tmp_path):
    measure(folder, tmp_path)
    measured = measure(folder, tmp_path, *DISTANCE, "--num_samples", 40, "--classify")
    assert {"bits_per_dim", "bits_per_dim_with_labels", "accuracy", "FD-digits_classifier"} <= set(measured)


def test_bad_input_is_named_and_nothing_is_lost(folder, tmp_path):
    before = measure(folder, tmp_path)
    for options, message in [
        (["--num_noise_draws", 0], "num_noise_draws must be at least 1, got 0"),
        (["--num_images", 298], r"num_images must be 1 \.\.\. 297"),
        (["--classify", "--ignore_labels"], "class-conditional model and labelled images"),
        (["--metrics", "frechet_distance"], "needs inception_weights"),
        ([*DISTANCE, "--guidance_scale", 0.5], "0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(folder, tmp_path, *options)
    assert json.loads((tmp_path / "metrics.json").read_text()) == before
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(OSError, match=r"metrics\.json must hold a JSON object, got '\[\]'"):
        measure(folder, tmp_path)
    assert (tmp_path / "metrics.json").read_text() == "[]"


@pytest.mark.parametrize("content", [b"nothing", BOMB], ids=["no image", "a bomb"])
def test_an_unreadable_image_is_named_or_left_out(folder, tmp_path, capsys, content):
    levels, labels = (values[:10] for values in load_digits_split("test"))
    cells = [Image.fromarray(image[0].numpy()) for image in levels]
    cells[3] = {"bytes": content, "path": None}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(index) for index in range(10)])}
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels.tolist()}, features=datasets.Features(kinds))
    rows.to_parquet(tmp_path / "digits.parquet")
    argv = [str(folder), "--data", str(tmp_path / "digits.parquet"), "--split", "train", "--num_workers", "2"]
    argv += ["--output_dir", str(tmp_path)]
    with pytest.raises(UnreadableImageError, match=r"row 3 of data set '.*digits\.parquet'"):
        evaluate.main(argv)
    evaluate.main([*argv, "--skip_bad_images"])
    assert re.search(r"unreadable images in rows \[3\] of .*digits\.parquet, left out", capsys.readouterr().out)
    assert json.loads((tmp_path / "metrics.json").read_text())["bits_per_dim"]["num_samples"] == 9


def test_a_card_names_the_command_that_gives_its_numbers():
    drawn = ["--num_samples", "40", "--guidance_scale", "2.0", "--feature_extractor", "/home/me/mine.py:features"]
    given = ["runs/digits", "--data", "digits", "--metrics", "frechet_distance", *drawn]
    command = evaluate.command_of(evaluate.parse([*given, "--save_samples", "png", "--output_dir", "/home/me/here"]))
    assert command.startswith("examples/evaluate.py runs/digits --data digits --split test --metrics frechet_distance")
    assert evaluate.command_of(evaluate.parse(command.split()[1:])) == command
    for option in ("--num_samples 40", "--guidance_scale 2.0", "--feature_extractor mine.py:features"):
        assert option in command
    assert "home" not in command


@pytest.mark.parametrize("option", [["--guidance_scale", "2"], ["--save_samples", "png"], ["--num_samples", "50"]])
def test_options_of_samples_that_are_not_drawn_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["digits", "--data", "digits", *option])
    assert f"{option[0]} is of samples, which --metrics frechet_distance draws" in capsys.readouterr().err


def test_what_is_written_has_no_credentials_and_the_card_no_path_of_this_machine():
    options = evaluate.parse(["/home/me/runs/digits", "--data", "https://me:secret@host.org/a.parquet?token=1"])
    assert evaluate.source(options)["data"] == "https://host.org/a.parquet"
    (result,) = evaluate.results({"accuracy": {"value": 0.5}}, options)
    assert result.dataset == "https://host.org/a.parquet"
    measured_by = "examples/evaluate.py digits --data https://host.org/a.parquet --split test --metrics bits_per_dim"
    assert result.source == measured_by
    options.data = "/home/me/pictures"
    assert evaluate.results({"accuracy": {"value": 0.5}}, options)[0].dataset == "pictures"
