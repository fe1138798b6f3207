"""Images that are no squares: every part follows (height, width), and squares are what they were."""

import json

import numpy as np
import oracle
import pytest
import torch
from conftest import random_images, random_latents, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarflow_hf import Guidance, TarFlowConfig, TarFlowModel, TarFlowPipeline
from tarflow_hf.hub.model_card import Page, render
from tarflow_hf.images.processing import ImageFormat, preprocess_image, resize_and_crop

SHAPES = [(4, 8), (8, 4), (2, 10)]


def image_pipeline(image_size):
    pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, image_size=image_size, std=0.05))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("image_size", SHAPES)
@pytest.mark.parametrize("overrides", [{}, {"volume_preserving": True}, {"num_channels": 3}])
def test_both_directions_equal_the_oracle(image_size, overrides):
    model = tiny_model(image_size=image_size, **overrides)
    images, labels = random_images(model, 2), torch.tensor([2, -1])
    output = model(images, labels)
    for index, image in enumerate(images):
        latents, log_det = oracle.encode(model, image, labels[index].item())
        torch.testing.assert_close(output.latents[index], latents, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.log_det[index], log_det, rtol=0, atol=1e-10)
    latents = random_latents(model, 2)
    decoded = model.decode(latents, labels, guidance=Guidance(1.5), tolerance=0)
    for index, image in enumerate(decoded):
        expected = oracle.decode(model, latents[index], labels[index].item(), weight=0.5)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-10)


@settings(max_examples=20)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 3), seed=st.integers(0, 99))
def test_decode_inverts_encode(rows, columns, patch, seed):
    model = tiny_model(seed=seed, image_size=(rows * patch, columns * patch), patch_size=patch, num_channels=2)
    images = random_images(model, 2, seed=seed)
    assert model.unpatchify(model.patchify(images)).equal(images)
    decoded = model.decode(model(images).latents, tolerance=0)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-9)


def test_the_log_determinant_is_that_of_the_jacobian():
    model = tiny_model(image_size=(2, 6))
    image = random_images(model, 1)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: model(flat.view_as(image)).latents.flatten(), image.flatten()
    )
    torch.testing.assert_close(model(image).log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


def test_a_pair_survives_json_and_a_square_stays_a_number(tmp_path):
    config = tiny_config(image_size=(4, 8))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [4, 8]
    loaded = TarFlowConfig.from_pretrained(tmp_path)
    assert (loaded.image_size, loaded.grid_size, loaded.num_tokens) == ((4, 8), (2, 4), 8)
    assert loaded.to_dict() == config.to_dict()
    assert tiny_config(image_size=[8, 8]).to_json_string() == tiny_config(image_size=8).to_json_string()
    assert '"image_size": 8,' in tiny_config(image_size=8).to_json_string()


@pytest.mark.parametrize("image_size", [(4, 7), (4,), (4, 8, 8), (0, 4), 0])
def test_a_size_that_cannot_be_is_refused(image_size):
    with pytest.raises(StrictDataclassClassValidationError, match="image_size"):
        tiny_config(image_size=image_size)


def test_an_image_lying_on_its_side_is_refused():
    model = tiny_model(image_size=(4, 8))
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(batch, \(1, 4, 8\)\), got \(2, 1, 8, 4\)"):
        model(random_images(model, 2).transpose(2, 3))


@pytest.mark.parametrize("image_size", SHAPES)
def test_the_pipeline_saves_samples_denoises_and_inverts(tmp_path, image_size):
    pipe = image_pipeline(image_size)
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [p([0, 3], generator=torch.Generator().manual_seed(0)).images for p in (pipe, loaded)]
    assert [image.size for image in images[0]] == [image_size[::-1]] * 2
    assert all(np.array_equal(np.array(one), np.array(other)) for one, other in zip(*images, strict=True))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8))
    pixels = pipe(latents=pipe.invert(photo), denoising_strength=0, output_type="pil").images[0]
    difference = np.array(photo.convert("L")).astype(int) - np.array(pixels).astype(int)
    assert np.abs(difference).max() <= 1


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    method=st.sampled_from(["short_side", "adm"]),
)
def test_any_image_is_resized_to_cover_and_cropped(size, target, method):
    image = Image.new("L", size, 200)
    result = resize_and_crop(image, target, method)
    assert result.size == target[::-1]
    assert result.getextrema() == (200, 200)  # no border of another colour: it covered


def test_the_middle_of_a_long_image_is_kept():
    levels = np.tile(np.repeat(np.arange(3, dtype=np.uint8) * 100, 10), (10, 1))  # three squares side by side
    found = preprocess_image(Image.fromarray(levels), ImageFormat((10, 10), 1))
    assert found.unique().tolist() == [100]
    upright = preprocess_image(Image.fromarray(levels.T), ImageFormat((10, 10), 1))
    assert upright.equal(found.transpose(1, 2))


def test_the_page_says_which_side_is_which():
    text = render(Page("user/wide", TarFlowConfig(image_size=(16, 32)), num_parameters=1)).text
    assert text.count("16x32 (height x width)") == 1
    assert "One size only, 16x32 pixels (height x width)." in text
    assert "height x width" not in render(Page("user/square", TarFlowConfig(image_size=16), num_parameters=1)).text


def test_a_rectangle_of_squares_has_as_many_weights_as_tokens():
    wide, square = TarFlowModel(tiny_config(image_size=(4, 16))), TarFlowModel(tiny_config(image_size=8))
    assert {name: tensor.shape for name, tensor in wide.state_dict().items()} == {
        name: tensor.shape for name, tensor in square.state_dict().items()
    }
