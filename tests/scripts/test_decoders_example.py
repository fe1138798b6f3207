"""examples/decoders.py: exact, one pass and refined from the same latents, in tables and pictures."""

import json

import pytest
import torch
from conftest import tiny_model
from inverse_models import tiny_inverse
from PIL import Image

from examples.decoders import main
from tarflow_hf import TarFlowPipeline
from tarflow_hf.metrics.samples import SampleSettings, draw_samples, sample_errors

DATA = ["--data", "examples/data/digits", "--num_images", "40", "--num_samples", "30", "--num_workers", "0"]
CLASSIFIER = ["--feature_extractor", "examples/data/digits_classifier.py:digits_classifier"]
SMALL = ["--rounds", "2", "--batch_sizes", "1", "3", "--sides", "2", "--length_batch_sizes", "2"]


@pytest.fixture
def saved(tmp_path):
    flow = tiny_model(dtype=torch.float32, num_classes=10)
    TarFlowPipeline(transformer=flow, inverse=tiny_inverse(flow), guidance_scale=2.0).save_pretrained(
        tmp_path / "pipe"
    )
    return tmp_path / "pipe"


def test_every_table_and_picture(saved, tmp_path, capsys):
    main([str(saved), *DATA, *CLASSIFIER, *SMALL, "--guidance_scales", "1", "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/decoders.json").read_text())
    quality = {(row["guidance"], row["decoder"]): row for row in found["quality"]}
    assert list(quality) == [(scale, name) for scale in (1.0, 2.0) for name in ("exact", "one_pass", "refined")]
    for (_, name), row in quality.items():
        assert 0 <= row["read as asked"] <= 1
        if name == "exact":
            assert row["of exact's"] == 1
        if name == "refined":  # as exact, up to the rounding of a level
            assert row["rms to exact, levels"] < 0.5
            assert row["of exact's"] == pytest.approx(1, abs=0.01)
        if name == "one_pass":  # of an inverse that has learned nothing
            assert row["rms to exact, levels"] > 10
            assert row["error, median"] > 0.5
            assert -1 <= row["rank correlation of error and rms"] <= 1
    assert [(row["batch"], row["decoder"]) for row in found["speed"]][::3] == [(1, "exact"), (3, "exact")]
    for row in found["speed"] + found["tokens"]:
        assert row["images/s"] > 0
        assert (row["sweeps"] == 0) == (row["decoder"] == "one_pass")
    assert {row["tokens"] for row in found["tokens"]} == {4}
    assert capsys.readouterr().out.count("\n| --- |") == 3
    with Image.open(tmp_path / "out/decoders.png") as grid, Image.open(tmp_path / "out/errors.png") as extremes:
        assert grid.height > 6 * 64
        assert extremes.height > 4 * 64


def test_speed_alone_needs_no_images_drawn(saved, tmp_path):
    main([str(saved), "--data", "gone", *SMALL, "--tables", "speed", "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/decoders.json").read_text()).keys() == {"machine", "model", "speed"}
    assert not (tmp_path / "out/decoders.png").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler, when first imported
def test_decoders_are_timed_compiled_too(saved, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # compilers have tests of their own
        main([str(saved), "--data", "gone", *SMALL, "--tables", "speed", "--compile", "--output_dir", str(tmp_path)])
    names = [row["decoder"] for row in json.loads((tmp_path / "decoders.json").read_text())["speed"]]
    three = ["exact", "one_pass", "refined"]
    assert names[:6] == [*three, *(f"{name} compiled" for name in three)]


def test_errors_are_of_the_samples_that_are_drawn(saved):
    pipe = TarFlowPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    settings = SampleSettings(seed=3, guidance_scale=2.0, temperature=0.5, labels="balanced", denoising_strength=0.0)
    exact = draw_samples(pipe, range(5, 9), settings)["images"]
    seen = []

    def keep(module, given, options):
        seen.append((given[0], given[1]))

    handle = pipe.inverse.register_forward_pre_hook(keep, with_kwargs=True)
    errors = sample_errors(pipe, range(5, 9), settings)["error"]
    handle.remove()
    ((latents, labels),) = seen
    again = pipe(labels, latents=latents, denoising_strength=0.0, output_type="np").images
    assert abs(255 * again - exact).max() < 0.51
    assert errors.tolist() == pytest.approx(pipe.reconstruction_error(latents, labels).tolist(), rel=1e-5)


def test_a_pipeline_without_an_inverse_is_refused(tmp_path):
    TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, num_classes=10)).save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a pipeline with an inverse, see examples/train_inverse.py"):
        main([str(tmp_path / "pipe"), *DATA, "--tables", "speed"])
