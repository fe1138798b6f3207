"""transformers' image processor: what training does to an image, saved with the model and found by its Auto class."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline

from tarflow_hf import TarFlowImageProcessor, TarFlowModel, TarFlowPipeline
from tarflow_hf.images.processing import ImageFormat, preprocess_image, to_pixel_values


def pictures():
    """A photo-like, a transparent, a grey 16-bit and a palette image, none of the model's size."""
    levels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)
    sixteen = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    return [Image.fromarray(levels[..., :3]), Image.fromarray(levels, "RGBA"), sixteen, Image.new("P", (9, 40), 3)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["short_side", "adm"])
def test_does_what_training_does(channels, resize):
    image_format = ImageFormat(8, channels, resize)
    expected = torch.stack([to_pixel_values(preprocess_image(image, image_format)) for image in pictures()])
    processor = TarFlowImageProcessor(8, channels, resize)
    assert processor(pictures(), return_tensors="pt").pixel_values.equal(expected)
    assert processor(pictures()[0], return_tensors="np").pixel_values.shape == (1, channels, 8, 8)
    assert len(processor(pictures()).pixel_values) == 4


@pytest.mark.parametrize("resize", ["short_side", "adm"])
def test_a_pipeline_inverts_what_the_processor_sees(resize):
    model = tiny_model(dtype=torch.float32, num_channels=3, resize=resize)
    seen = TarFlowImageProcessor.of(model.config)(pictures(), return_tensors="pt").pixel_values
    pipe = TarFlowPipeline(model)
    assert pipe.invert(pictures()).equal(pipe.invert(seen))


def test_takes_files_arrays_and_tensors(tmp_path):
    photo = pictures()[0]
    photo.save(tmp_path / "photo.png")
    levels = np.array(photo)
    processor = TarFlowImageProcessor(8, 3)
    expected = processor(photo, return_tensors="pt").pixel_values
    for source in (
        tmp_path / "photo.png",
        (tmp_path / "photo.png").read_bytes(),
        levels,
        torch.from_numpy(levels).movedim(-1, 0),
    ):
        assert processor([source], return_tensors="pt").pixel_values.equal(expected)
        assert processor(source, return_tensors="pt").pixel_values.equal(expected)
    with pytest.raises(ValueError, match="uint8 levels.*float32"):
        processor(levels.astype(np.float32) / 255)
    with pytest.raises(ValueError, match="at least one image"):
        processor([])


def test_is_saved_with_the_model_and_found_by_the_auto_class(tmp_path):
    model = tiny_model(dtype=torch.float32, resize="adm")
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is TarFlowImageProcessor
    assert (processor.image_size, processor.num_channels, processor.resize) == (8, 1, "adm")
    assert AutoConfig.from_pretrained(tmp_path).resize == "adm"


def test_a_feature_pipeline_gives_latents(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    photo = pictures()[0]
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    features = extract(photo, return_tensors=True)
    pixel_values = TarFlowImageProcessor.of(model.config)(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert features.equal(TarFlowModel.from_pretrained(tmp_path)(pixel_values).latents)


def test_a_model_of_other_channels_has_no_processor(tmp_path):
    tiny_model(dtype=torch.float32, num_channels=2).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert TarFlowModel.from_pretrained(tmp_path).config.num_channels == 2
