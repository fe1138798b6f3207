"""Latents of a diffusers autoencoder: scaling, padding, encoded data sets, and the pipeline around them."""

import json

import pytest
import torch
from conftest import tiny_model
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from tarflow_hf import TarFlowPipeline
from tarflow_hf.hub.autoencoders import load_autoencoder
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.latent_data import (
    LatentDataError,
    StoredLatents,
    collate_latents,
    encode_images,
    fingerprint,
)
from tarflow_hf.images.latents import (
    check_autoencoder,
    crop_to_size,
    decode_latents,
    encode_moments,
    latent_scaling,
    pad_to_grid,
    spatial_factor,
)
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data

DC_BLOCKS = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
}


def tiny_vae(kind="kl", channels=1, **options):
    """An autoencoder of two pixels a latent with random weights."""
    torch.manual_seed(0)
    shape = {"in_channels": channels, "latent_channels": 2} | options
    if kind == "kl":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = AutoencoderKL(out_channels=channels, block_out_channels=(8, 8), norm_num_groups=4, **blocks, **shape)
    elif kind == "tiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        vae = AutoencoderTiny(out_channels=channels, **sizes, **counts, **shape)
    else:
        sizes = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}
        layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
        vae = AutoencoderDC(encoder_out_shortcut=False, **sizes, **layers, **DC_BLOCKS, **shape)
    return vae.eval()


def latent_pipeline(kind="kl", size=15, channels=1, **scaling):
    vae = tiny_vae(kind, channels, **scaling)
    model = tiny_model(dtype=torch.float32, image_size=8, num_channels=2)
    pipe = TarFlowPipeline(transformer=model, vae=vae, image_size=size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count=3, channels=1, size=15):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoding_and_decoding_through_the_pipeline_is_the_autoencoders_own_reconstruction(kind, channels):
    """Encode, flow to noise, flow back and decode: the flow in between changes nothing."""
    pipe = latent_pipeline(kind, channels=channels, scaling_factor=0.7)
    images = pictures(channels=channels)
    vae = pipe.vae
    encoded = vae.encode(torch.nn.functional.pad(images, (0, 1, 0, 1), mode="replicate"))
    raw = encoded.latent_dist.mode() if kind == "kl" else encoded[0]
    expected = vae.decode(raw).sample[..., :15, :15]

    noise = pipe.invert(images, [0, 1, 2])
    returned = pipe([0, 1, 2], latents=noise, denoising_strength=0.0, tolerance=1e-6, output_type="pt").images
    torch.testing.assert_close(returned, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    latents = pipe([0, 1, 2], latents=noise, denoising_strength=0.0, tolerance=1e-6, output_type="latent").images
    torch.testing.assert_close(latents, raw * 0.7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_a_saved_pipeline_has_its_autoencoder(tmp_path, kind):
    pipe = latent_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", type(pipe.vae).__name__]
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert fingerprint(loaded.vae) == fingerprint(pipe.vae)
    first, second = (
        each(1, generator=torch.Generator().manual_seed(0), output_type="pt").images for each in (pipe, loaded)
    )
    assert first.equal(second)
    assert first.shape == (1, 1, 15, 15)
    half = TarFlowPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.vae.dtype == half.transformer.dtype == torch.bfloat16
    assert half(1, output_type="pil").images[0].size == (15, 15)


def test_each_part_is_loaded_in_the_type_of_its_own_file(tmp_path):
    latent_pipeline("tiny").to(torch.float16).save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.float16, torch.float16)
    loaded.vae.to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    for dtype in (None, "auto"):
        again = TarFlowPipeline.from_pretrained(tmp_path / "again", dtype=dtype)
        assert (again.transformer.dtype, again.vae.dtype) == (torch.float16, torch.bfloat16)
    whole = TarFlowPipeline.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert (whole.transformer.dtype, whole.vae.dtype) == (torch.float32, torch.float32)


def test_what_is_saved_does_not_tell_where_its_parts_lay(tmp_path):
    latent_pipeline("tiny").save_pretrained(tmp_path / "here")
    pipe = TarFlowPipeline.from_pretrained(tmp_path / "here")
    pipe.register_modules(vae=load_autoencoder(str(tmp_path / "here")))
    pipe.save_pretrained(tmp_path / "there")
    TarFlowPipeline.from_pretrained(tmp_path / "there").save_pretrained(tmp_path / "elsewhere")
    for name in ("there", "elsewhere"):
        files = [path for path in (tmp_path / name).rglob("*") if path.suffix in (".json", ".md", ".py")]
        assert len(files) >= 7
        assert not [path for path in files if str(tmp_path) in path.read_text()]


def test_the_former_names_of_an_autoencoders_attention_are_known(tmp_path):
    tiny_vae("kl").save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state.items():
        new = next((key.replace(f".{now}.", f".{then}.") for now, then in former.items() if f".{now}." in key), key)
        renamed[new] = tensor
    assert len(renamed.keys() - state.keys()) == 16  # weights and biases of the encoder and of the decoder
    save_file(renamed, weights)
    assert fingerprint(load_autoencoder(str(tmp_path))) == fingerprint(tiny_vae("kl"))


def test_a_pipeline_of_pixels_is_saved_as_before(tmp_path):
    TarFlowPipeline(transformer=tiny_model(dtype=torch.float32)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert "vae" not in index
    assert "image_size" not in index
    assert TarFlowPipeline.from_pretrained(tmp_path).vae is None


def test_slices_give_the_same_images():
    pipe = latent_pipeline()
    whole = pipe([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
    pipe.vae.enable_slicing()
    sliced = pipe([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=0)


def test_log_prob_is_named_after_the_latents():
    pipe = latent_pipeline()
    images = pictures()
    latents, _ = encode_moments(pipe.vae, images)
    expected = pipe.transformer.log_prob(latents, torch.arange(3))
    torch.testing.assert_close(pipe.latent_log_prob(images, [0, 1, 2]), expected)
    with pytest.raises(ValueError, match="needs a pipeline with vae"):
        TarFlowPipeline(transformer=tiny_model(dtype=torch.float32)).latent_log_prob(images)
    with pytest.raises(
        ValueError, match=r"must be \(images, channels, height, width\) of 1x15x15, got \(3, 1, 8, 8\)"
    ):
        pipe.latent_log_prob(images[..., :8, :8])


def test_a_flow_and_an_autoencoder_must_fit():
    model = tiny_model(dtype=torch.float32, image_size=8, num_channels=1)
    with pytest.raises(ValueError, match="num_channels=2, the latent channels of the vae, got 1"):
        TarFlowPipeline(transformer=model, vae=tiny_vae())
    with pytest.raises(
        ValueError,
        match="image_size must be 13 to 16 for a grid of 8 latents of 2 pixels each in patches of 2, got 12",
    ):
        check_autoencoder(tiny_vae(), tiny_model(image_size=8, num_channels=2).config, 12)
    with pytest.raises(ValueError, match="image_size must be None without vae"):
        TarFlowPipeline(transformer=model, image_size=8)
    with pytest.raises(ValueError, match="must be an image autoencoder of diffusers"):
        TarFlowPipeline(transformer=model, vae=tiny_model(dtype=torch.float32))


def test_scaling_is_the_autoencoders_own():
    shift, scale = latent_scaling(tiny_vae(scaling_factor=0.5, shift_factor=0.25))
    assert (shift.item(), scale.item()) == (0.25, 0.5)
    shift, scale = latent_scaling(tiny_vae(latents_mean=[1.0, 2.0], latents_std=[0.5, 4.0]))
    assert shift.flatten().tolist() == [1.0, 2.0]
    assert scale.flatten().tolist() == [2.0, 0.25]
    with pytest.raises(ValueError, match="must be finite and above 0"):
        latent_scaling(tiny_vae(scaling_factor=-1.0))


def test_standardised_latents_decode_to_the_reconstruction():
    vae = tiny_vae(latents_mean=[1.0, 2.0], latents_std=[0.5, 4.0])
    images = pictures(size=16)
    mean, std = encode_moments(vae, images)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(mean[:, 1], (posterior.mean[:, 1] - 2) / 4)
    torch.testing.assert_close(std[:, 0], posterior.std[:, 0] * 2)
    torch.testing.assert_close(decode_latents(vae, mean, (16, 16)), vae.decode(posterior.mean).sample)


def test_padding_is_undone():
    images = pictures(size=15)
    padded = pad_to_grid(images, tiny_vae())
    assert padded.shape[-2:] == (16, 16)
    assert crop_to_size(padded, (15, 15)).equal(images)
    assert spatial_factor(tiny_vae("dc")) == 2
    with pytest.raises(ValueError, match="must be at most 16x16"):
        crop_to_size(padded, (17, 16))


def digits(rows=20):
    where = DataArguments(data="./examples/data/digits", eval_split="test")
    _, data = load_image_data(where, class_conditional=True, eval_images=rows)
    return StoredImages(data, ImageFormat(image_size=8, num_channels=1))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_an_encoded_data_set_is_what_the_autoencoder_gives(tmp_path, kind):
    vae, images = tiny_vae(kind), digits()
    encode_images(vae, images, tmp_path, "train", mirrored=True, batch_size=3, shard_size=8)
    stored = StoredLatents(tmp_path, "train")
    assert len(stored) == 20
    batch = collate_latents([stored[row] for row in (19, 0, 7)])
    assert batch.class_labels.tolist() == [images[row].label for row in (19, 0, 7)]
    levels = torch.stack([images[row].levels for row in (19, 0, 7)]) / 127.5 - 1
    levels[1] = levels[1].flip(2)
    mean, std = batch.select(torch.tensor([False, True, False]), torch.device("cpu"))
    expected_mean, expected_std = encode_moments(vae, levels)
    torch.testing.assert_close(mean, expected_mean, atol=1e-5, rtol=1e-4)
    assert (std is None) == (kind == "tiny")
    if std is not None:
        torch.testing.assert_close(std, expected_std, atol=1e-5, rtol=1e-4)


def test_encoding_goes_on_where_it_stopped_and_processes_share_it(tmp_path):
    vae, images = tiny_vae("tiny"), digits()
    options = {"mirrored": False, "shard_size": 8}
    encode_images(vae, images, tmp_path / "whole", "train", **options)
    folder = tmp_path / "parts"
    encode_images(vae, images, folder, "train", **options, process_index=0, num_processes=2)
    with pytest.raises(LatentDataError, match="train-00001.safetensors cannot be read"):
        StoredLatents(folder, "train")
    before = (folder / "train-00000.safetensors").stat().st_mtime_ns
    encode_images(vae, images, folder, "train", **options, process_index=1, num_processes=2)
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns == before
    for path in folder.glob("*.safetensors"):
        first, second = load_file(path), load_file(tmp_path / "whole" / path.name)
        assert all(first[name].equal(second[name]) for name in second)


def test_latents_of_something_else_are_refused(tmp_path):
    vae, images = tiny_vae("tiny"), digits()
    encode_images(vae, images, tmp_path, "train", mirrored=False)
    other = tiny_vae("tiny")
    with torch.no_grad():
        other.encoder.layers[0].weight[0] += 1
    with pytest.raises(LatentDataError, match="holds latents of something else: vae was '[0-9a-f]{16}' and is now"):
        encode_images(other, images, tmp_path, "train", mirrored=False)
    with pytest.raises(LatentDataError, match="num_images was 20 and is now 19"):
        encode_images(vae, digits(19), tmp_path, "train", mirrored=False)
    with pytest.raises(LatentDataError, match="views was 1 and is now 2"):
        encode_images(vae, images, tmp_path, "train", mirrored=True)
    with pytest.raises(LatentDataError, match="no latents of the split 'test'"):
        StoredLatents(tmp_path, "test")
    batch = collate_latents([StoredLatents(tmp_path, "train")[0]])
    with pytest.raises(LatentDataError, match="needs latents of mirrored images"):
        batch.select(torch.tensor([True]), torch.device("cpu"))
    with torch.no_grad():
        vae.encoder.layers[0].weight.fill_(float("nan"))
    with pytest.raises(LatentDataError, match="latents of rows 0 to 19 are not finite"):
        encode_images(vae, images, tmp_path / "other", "train", mirrored=False)


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_autoencoders_are_loaded_from_folders(tmp_path, kind):
    vae = tiny_vae(kind)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        assert fingerprint(load_autoencoder(str(place))) == fingerprint(vae)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_autoencoder(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"has no config.json, neither itself nor in vae/"):
        load_autoencoder(str(tmp_path))
