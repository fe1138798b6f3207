"""What a measurement depends on and is checked against before the work: code, references, labels, names of numbers."""

import copy
import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_config, tiny_model
from PIL import Image
from test_evaluate import DISTANCE, arguments, folder, measure  # noqa: F401

from examples import evaluate
from tarflow_hf.flow.inputs import class_id, class_of_text
from tarflow_hf.flow.noise import dequantize
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import UnreadableImageError
from tarflow_hf.images.processing import ImageFormat, as_shown, to_levels, to_pixel_values
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.features import FeatureExtractor, load_feature_extractor, source_fingerprint
from tarflow_hf.metrics.frechet_distance import FrechetDistance
from tarflow_hf.metrics.images import RealImages, noisy_images, reference_summary
from tarflow_hf.metrics.measure import Workplace
from tarflow_hf.metrics.report import read_metrics, write_metrics
from tarflow_hf.metrics.samples import SampleSettings, draw_samples
from tarflow_hf.metrics.small_example import digits_images
from tarflow_hf.pipeline_tarflow import TarFlowPipeline

NETWORK = """
import torch
def feats():
    import scale
    class Net(torch.nn.Module):
        def forward(self, levels):
            return levels.float().flatten(1)[:, 20:24] FORMULA
    return Net()
"""


def test_an_edited_extractor_or_a_module_it_imports_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    images, prints = digits_images(20), []
    for formula, scale in (("/ 255", 1), ("/ 127.5 - 1", 1), ("/ 127.5 - 1", 2), ("/ 255", 1)):
        (tmp_path / "ext.py").write_text(NETWORK.replace("FORMULA", formula))
        (tmp_path / "scale.py").write_text(f"SCALE = {scale}\n")
        extractor = load_feature_extractor(f"{tmp_path}/ext.py:feats")
        prints.append(extractor.fingerprint())
        cache = tmp_path / "cache"
        summary = reference_summary(images, extractor, PartialState(cpu=True), batch_size=10, cache_dir=cache)
        expected = images.read(range(20)).levels.flatten(1)[:, 20:24].double()
        expected = expected / 255 if formula == "/ 255" else expected / 127.5 - 1
        np.testing.assert_allclose(summary.mean, expected.mean(0), atol=1e-5)
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]
    assert len(list(cache.iterdir())) == 3


def test_settings_of_a_network_that_are_no_weights_count():
    first, second = (FeatureExtractor.of_module(torch.nn.AvgPool2d(size), "pool") for size in (1, 2))
    assert first.fingerprint() != second.fingerprint()


def test_relative_and_circular_imports_are_followed(tmp_path):
    package = tmp_path / "kit"
    package.mkdir()
    (package / "__init__.py").write_text("from . import a\n")
    (package / "a.py").write_text("from .b import X\nimport json\nimport numpy\nimport tarflow_hf\n")
    (package / "b.py").write_text("from . import a\nX = 1\n")
    before = source_fingerprint(package / "a.py")
    (package / "b.py").write_text("from . import a\nX = 2\n")
    assert source_fingerprint(package / "a.py") != before


def test_a_reference_of_another_width_or_extractor_is_found_before_sampling(folder, tmp_path):  # noqa: F811
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "other.npz", mu=np.zeros(32), sigma=np.eye(32), extractor="FID")
    for name, message in (("narrow", "holds 3 features, FD-digits_classifier has 32"), ("other", "is of 'FID'")):
        with pytest.raises(ValueError, match=message):
            measure(folder, tmp_path, *DISTANCE, "--reference", tmp_path / f"{name}.npz")
    assert not (tmp_path / "work" / "samples").exists()
    with pytest.raises(ValueError, match="at least 6 real images, got num_images=3"):
        measure(folder, tmp_path, *DISTANCE, "--num_images", 3)


def write(path, cells, labels):
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_or_left_out(folder, tmp_path, workers, capsys):  # noqa: F811
    good = [Image.new("L", (8, 8), level) for level in (0, 100, 200)]
    cells = [good[0], {"bytes": b"nothing", "path": "broken.png"}, good[1], None, good[2]]
    path = write(tmp_path / "test.parquet", cells, [0, 1, 2, 3, 4])
    command = [str(folder), "--data", str(path), "--split", "train", "--output_dir", str(tmp_path / "out")]
    command += ["--num_workers", str(workers)]
    with pytest.raises(UnreadableImageError, match="row 1 of data set"):
        evaluate.main(command)
    evaluate.main([*command, "--skip_bad_images"])
    assert "unreadable images in rows [1, 3]" in capsys.readouterr().out
    table = pyarrow.parquet.read_table(tmp_path / "out" / "per_image.parquet").to_pydict()
    assert table["image"] == ["row 0", "row 2", "row 4"]
    assert table["class_label"] == [0, 2, 4]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bits_per_dim"]["num_samples"] == 3
    data, _ = load_image_data(DataArguments(data=str(path)), class_conditional=True)
    bad = load_image_data(DataArguments(data=str(write(tmp_path / "b.parquet", [None], [0]))), class_conditional=True)[
        0
    ]
    assert RealImages.of(data, ImageFormat(8, 1), skip_bad_images=True).bad_rows == (1, 3)
    with pytest.raises(ValueError, match="has no image that can be read"):
        RealImages.of(bad, ImageFormat(8, 1), skip_bad_images=True)


def test_labels_that_are_all_missing_are_said_at_the_start(folder, tmp_path):  # noqa: F811
    path = write(tmp_path / "test.parquet", [Image.new("L", (8, 8), level) for level in (0, 9)], [-1, -1])
    command = [str(folder), "--data", str(path), "--split", "train", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="has a label .*--ignore_labels"):
        evaluate.main(command)
    evaluate.main([*command, "--ignore_labels"])
    assert (tmp_path / "out" / "per_image.parquet").exists()


def test_tensors_that_require_grad_are_taken(tmp_path):
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = FrechetDistance(cache_dir=str(tmp_path)).compute(predictions=features, reference=features + 1)
    assert found["frechet_distance"] == pytest.approx(3, rel=1e-4)


def test_uniform_noise_is_undone_level_by_level():
    levels = torch.arange(256, dtype=torch.uint8).repeat(2000).view(1, 1, 256, 2000)
    for dtype in (torch.float32, torch.float64):
        noisy = dequantize(to_pixel_values(levels).to(dtype), generator=torch.Generator().manual_seed(0))
        assert torch.equal(to_levels(noisy, "uniform"), levels)
        assert torch.equal(as_shown(noisy, "uniform"), to_pixel_values(levels).to(dtype))
    assert torch.equal(to_levels(to_pixel_values(levels), "uniform"), levels)
    assert (to_levels(noisy) == levels).double().mean() < 0.8  # what the nearest level would lose


def test_the_highest_noise_stays_in_its_cell(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(1 - 2**-24))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_levels(dequantize(to_pixel_values(levels)), "uniform"), levels)


def test_label_counts_are_one_for_each_class_and_count_something():
    for counts in ((), (0, 0), (3, -1)):
        with pytest.raises(ValueError, match=r"labels='data' needs label_counts of at least one image, got \("):
            SampleSettings(labels="data", label_counts=counts)
    with pytest.raises(ValueError, match=r"label_counts must have one for each of 4 classes, got \(1, 2\)"):
        SampleSettings(labels="data", label_counts=(1, 2)).class_labels(range(3), num_classes=4)
    drawn = SampleSettings(labels="data", label_counts=(1, 0, 3)).class_labels(range(2000), num_classes=3)
    assert set(drawn) == {0, 2}
    assert abs(drawn.count(2) - 1500) < 4 * 19.4  # standard deviation of 2,000 draws of 3/4
    assert drawn[700:710] == SampleSettings(labels="data", label_counts=(1, 0, 3)).class_labels(range(700, 710), 3)


def test_samples_are_read_as_the_noise_of_training_wrote_them():
    for noise_type in ("uniform", "gaussian"):
        pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, noise_type=noise_type))
        pipe.set_progress_bar_config(disable=True)

        def call(kind, pipe=pipe):
            generators = [torch.Generator().manual_seed(index) for index in range(8)]
            labels = SampleSettings().class_labels(range(8), 4)
            return pipe(labels, generator=generators, denoising_strength=0.0, output_type=kind).images

        expected = to_levels(call("latent"), noise_type)
        pictures = torch.stack([torch.from_numpy(np.array(picture)) for picture in call("pil")])
        assert torch.equal(pictures, expected[:, 0])
        if noise_type == "uniform":
            assert torch.equal((call("pt") * 255).round().byte(), expected)
            assert (expected != to_levels(call("latent"))).any()
        drawn = draw_samples(pipe, range(8), SampleSettings(denoising_strength=0.0))
        assert np.array_equal(drawn["images"], expected.movedim(1, -1).numpy())


def test_shown_numbers_that_are_not_finite_stay():
    found = as_shown(torch.tensor([float("nan"), float("inf"), 0.0]), "uniform")
    assert found[0].isnan()
    assert found[1].isinf()


def test_a_class_is_a_name_as_a_string_and_an_id_as_a_number():
    config = tiny_config(id2label={0: "0", 1: "1", 2: "10", 3: "2"})
    assert (class_id("2", config), class_id("10", config), class_of_text("10", config)) == (3, 2, 2)
    assert (class_id(2, config), class_of_text("3", config), class_of_text("-1", config)) == (2, 3, -1)
    with pytest.raises(ValueError, match="'zebra' is unknown"):
        class_of_text("zebra", config)
    pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, id2label=config.id2label))
    with pytest.warns(
        UserWarning, match="number 2 is the id of the class named '10'; the class named '2' has the id 3"
    ):
        assert pipe.prepare_class_labels([2]).tolist() == [2]
    assert pipe.prepare_class_labels(torch.tensor([2])).tolist() == [2]
    assert pipe.prepare_class_labels(["2", 1]).tolist() == [3, 1]


def test_numbers_that_are_not_finite_leave_the_file_of_metrics_as_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    before = write_metrics(path, {"accuracy": {"value": 0.5}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(path, {"log_loss": {"value": float("inf")}})
    assert read_metrics(path) == before


def test_work_is_that_of_a_configuration_and_its_saved_settings(tmp_path):
    def place(**changes):
        shape = {"num_classes": 4, "dtype": torch.float32}
        defaults = {name: changes.pop(name) for name in list(changes) if name in ("guidance_rule", "guidance_scale")}
        pipe = TarFlowPipeline(tiny_model(**(shape | changes)), **defaults)
        return Workplace(pipe, PartialState(), tmp_path, 4).open("samples", 8, {"seed": 0}).folder

    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    assert place() == place() == place(id2label=names)
    others = [place(noise_std=0.2), place(guidance_rule="product"), place(guidance_scale=3.0)]
    assert len({place(), *others}) == 4


def test_noise_of_a_model_that_is_told_its_level_is_the_one_it_is_told():
    config = tiny_config(
        num_classes=10, id2label=dict(enumerate("0123456789")), noise_conditioning=True, noise_range=(0.02, 0.3)
    )
    noisy, _, _ = noisy_images(config, "./examples/data/digits", "test", num_images=50, seed=0)
    levels = (noisy + 1) * 127.5
    assert (levels - levels.round()).std() > 0.1
    clean = noisy_images(replace_noise(config), "./examples/data/digits", "test", num_images=50, seed=0)[0]
    assert (noisy - clean).std() == pytest.approx(0.02, rel=0.05)


def replace_noise(config):
    """The same images with next to no noise."""
    changed = copy.deepcopy(config)
    changed.noise_conditioning, changed.noise_std = False, 1e-9
    return changed
