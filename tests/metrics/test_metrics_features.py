"""Feature extractors: what they take, how they are named and found, and what their distances order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

from examples.data.digits_classifier import DIGITS, accuracy, digits_classifier, load_digits_split
from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.labels import label_numbering, renumber
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.features import FeatureExtractor, load_feature_extractor, weights_fingerprint
from tarflow_hf.metrics.images import RealImages, feature_statistics, reference_summary


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor.of_module(digits_classifier(), "digits")


def digits(split="test"):
    return load_image_data(DataArguments(data=str(DIGITS), train_split=split), class_conditional=True)[0]


def summary(levels, extractor):
    return feature_statistics(enumerate(levels[:, None]), extractor).summary(extractor.frechet_name)


def test_the_digits_classifier_reads_the_held_out_digits():
    assert accuracy(digits_classifier()) > 0.97


def test_damage_raises_the_distance(extractor):
    reference = summary(load_digits_split("test")[0], extractor)
    levels = load_digits_split("train")[0][:297]
    noise = torch.randn(levels.shape, generator=torch.Generator().manual_seed(0))
    distances = []
    for std in (0, 60, 100, 160):
        noisy = (levels + std * noise).round().clamp(0, 255).byte()
        distances.append(feature_distances(summary(noisy, extractor), reference)["frechet_distance"])
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]


def test_grey_images_are_repeated_for_a_network_of_three_channels():
    class Means(torch.nn.Module):
        def forward(self, levels):
            return levels.float().mean((2, 3))

    levels = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    three = FeatureExtractor.of_module(Means(), "means", num_channels=3)
    torch.testing.assert_close(three(levels), torch.tensor([[1.5] * 3, [5.5] * 3]))
    assert FeatureExtractor.of_module(Means(), "means")(levels).shape == (2, 1)
    assert (three.frechet_name, three.kernel_name) == ("FD-means", "KD-means")


def test_an_extractor_is_found_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import torch\ndef flat():\n    return torch.nn.Flatten()\n")
    found = load_feature_extractor(f"{path}:flat")
    assert found.frechet_name == "FD-flat"
    assert found(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)).shape == (2, 9)
    with pytest.raises(ValueError, match="has no function 'other'"):
        load_feature_extractor(f"{path}:other")
    with pytest.raises(FileNotFoundError, match=r"gone\.py is not a file"):
        load_feature_extractor(f"{tmp_path}/gone.py:flat")


def test_bad_extractors_and_images_are_named(extractor, tmp_path):
    with pytest.raises(ValueError, match="must be inception, efficientnet-lite0 or FILE.py:FUNCTION, got 'vgg'"):
        load_feature_extractor("vgg")
    with pytest.raises(ValueError, match="needs inception_weights"):
        load_feature_extractor("inception")
    with pytest.raises(FileNotFoundError, match="inception_weights='/gone.pth' is not a file"):
        load_feature_extractor("inception", inception_weights="/gone.pth")
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="are not the weights"):
        load_feature_extractor("inception", inception_weights=str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match="levels must be uint8"):
        extractor(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"FD-pixels must give \(2, num_features\)"):
        FeatureExtractor.of_module(torch.nn.Identity(), "pixels")(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_a_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert weights_fingerprint(first) != weights_fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert weights_fingerprint(first) == weights_fingerprint(second)
    assert weights_fingerprint(first.bfloat16()) != weights_fingerprint(second)


def test_reference_statistics_are_cached_by_content(extractor, tmp_path):
    images = RealImages.of(digits(), ImageFormat(8, 1), num_images=50)
    first = reference_summary(images, extractor, PartialState(cpu=True), batch_size=16, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = reference_summary(images, extractor, PartialState(cpu=True), batch_size=7, cache_dir=tmp_path)
    np.testing.assert_array_equal(first.covariance, again.covariance)
    assert path.stat().st_mtime_ns == written
    fewer = RealImages.of(digits(), ImageFormat(8, 1), num_images=49)
    train = RealImages.of(digits("train"), ImageFormat(8, 1), num_images=50)
    assert len({images.content(), fewer.content(), train.content()}) == 3
    whole = summary(load_digits_split("test")[0][:50], extractor)
    np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.covariance, whole.covariance, rtol=1e-4, atol=1e-4)


def test_images_are_read_in_order_with_their_labels():
    images = RealImages.of(digits(), ImageFormat(8, 1))
    stored = StoredImages(digits(), ImageFormat(8, 1))
    batch = images.read(range(7, 12))
    assert batch.class_labels.tolist() == images.labels()[7:12] == [stored[row].label for row in range(7, 12)]
    assert torch.equal(batch.levels[2], stored[9].levels)
    assert Path(images.names()[0]).suffix == ".png"
    with pytest.raises(ValueError, match=r"num_images must be 1 \.\.\. 297 for data set .*, got 298"):
        RealImages.of(digits(), ImageFormat(8, 1), num_images=298)


def test_labels_are_matched_with_the_model_by_name():
    def config(names):
        return TarFlowConfig(num_classes=len(names), id2label=dict(enumerate(names)))

    turned = [str(digit) for digit in range(9, -1, -1)]
    numbering = label_numbering(digits(), config(turned))
    assert renumber(torch.tensor([0, 3, -1]), numbering).tolist() == [9, 6, -1]
    numbered = label_numbering(digits(), TarFlowConfig(num_classes=10))
    assert numbered.tolist() == list(range(10))
    assert label_numbering(digits(), TarFlowConfig()) is None
    with pytest.raises(ValueError, match="classes that the model does not know"):
        label_numbering(digits(), config(["cat", "dog"]))
