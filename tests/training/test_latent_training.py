"""Training on latents: the recipe's `vae`, what a run logs and saves, and the training of an autoencoder."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file
from training_runs import TINY

from examples.encode import main as encode
from examples.train import main
from examples.train_vae import AutoencoderRun, parse
from examples.train_vae import main as train_vae
from tarflow_hf import TarFlowPipeline
from tarflow_hf.hub.autoencoders import load_autoencoder
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.latent_data import LatentBatch, LatentDataError, fingerprint
from tarflow_hf.images.latents import encode_moments
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import Augmenter, add_training_noise
from tarflow_hf.training.autoencoder import (
    AutoencoderArguments,
    reconstruct,
    reconstruction_loss,
    trainable_parameters,
    variance_penalty,
)
from tarflow_hf.training.export import export
from tarflow_hf.training.latents import flow_config
from tarflow_hf.training.lock import RunLock, RunLockedError
from tarflow_hf.training.recipes import make_arguments, parse_arguments

DIGITS = str(Path("examples/data/digits").resolve())
SIZES = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
    "latent_channels": 2,
}
VAE_RUN = {"data": DIGITS, "eval_split": "test", "image_size": 8, "num_channels": 1, "cache_images": True}
VAE_RUN |= {"max_steps": 6, "log_every": 2, "eval_every": 3, "eval_images": 20, "autoencoder_config": SIZES}


@pytest.fixture
def vae_folder(tmp_path):
    torch.manual_seed(0)
    AutoencoderTiny(in_channels=1, out_channels=1, scaling_factor=0.8, **SIZES).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def flow_run(folder, vae, **options):
    values = TINY | {"max_steps": 8, "eval_every": 4, "output_dir": folder, "vae": vae, "patch_size": 2} | options
    main([text for name, value in values.items() for text in (f"--{name}", str(value))])


def vae_run(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = path.with_suffix(".yaml")
    recipe.write_text(json.dumps(VAE_RUN | {"output_dir": str(path)} | options))
    assert train_vae([str(recipe)]) == 0
    return path


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_latents_saves_a_pipeline_of_images_and_names_its_numbers(tmp_path, vae_folder):
    run = tmp_path / "run"
    flow_run(run, vae_folder, noise_std=0.3)
    pipe = TarFlowPipeline.from_pretrained(run)
    assert fingerprint(pipe.vae) == fingerprint(load_autoencoder(str(vae_folder)))
    assert (pipe.transformer.config.image_size, pipe.transformer.config.num_channels) == (4, 2)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("7", generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)
    export(run / "checkpoints" / "step-00000008", tmp_path / "exported")
    exported = load_file(tmp_path / "exported/transformer/model.safetensors")
    saved = load_file(run / "transformer/model.safetensors")
    assert all(exported[name].equal(saved[name]) for name in saved)
    assert fingerprint(TarFlowPipeline.from_pretrained(tmp_path / "exported").vae) == fingerprint(pipe.vae)
    names = {name for row in rows(run) for name in row}
    assert {"latent_nats_per_dim", "validation_latent_nats_per_dim"} <= names
    assert not any("bits" in name for name in names)
    page = (run / "README.md").read_text()
    assert "latents" in page
    assert "bits_per_dim" not in page
    assert "1 channels" not in page
    assert "8x8 grey images" in page
    assert (run / "samples.png").is_file()


def test_a_stopped_run_on_latents_goes_on_bit_by_bit(tmp_path, vae_folder):
    flow_run(tmp_path / "whole", vae_folder, horizontal_flip="true")
    for steps in (4, 8):  # the planned length decides the learning rate: stop by taking a checkpoint away
        flow_run(tmp_path / "parts", vae_folder, horizontal_flip="true")
        newest = max((tmp_path / "parts" / "checkpoints").glob("step-*"))
        if steps == 4:
            for path in newest.iterdir():
                path.unlink()
            newest.rmdir()
    first, second = (load_file(tmp_path / name / "transformer/model.safetensors") for name in ("whole", "parts"))
    assert all(first[name].equal(second[name]) for name in first)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()


def test_data_are_encoded_once_and_found_by_the_training(tmp_path, vae_folder, capsys):
    options = TINY | {"vae": vae_folder, "patch_size": 2, "output_dir": tmp_path / "run"}
    options |= {"latents_dir": tmp_path / "latents"}
    encode(["examples/recipes/digits.yaml", *(f"--{name}={value}" for name, value in options.items())])
    first, *spreads = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'latents'}: 1500 images;")
    assert [line.split(":")[0] for line in spreads] == ["1500 latents of 2x4x4", "20 latents of 2x4x4"]
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    flow_run(tmp_path / "run", vae_folder, latents_dir=tmp_path / "latents")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()} == written
    with pytest.raises(ValueError, match="vae must name an autoencoder"):
        encode(["examples/recipes/digits.yaml"])


def test_an_autoencoder_in_half_precision_encodes_in_float32(tmp_path, vae_folder):
    load_autoencoder(str(vae_folder)).half().save_pretrained(tmp_path / "half")
    vae = load_autoencoder(str(tmp_path / "half"))
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_another_autoencoder_is_refused(tmp_path, vae_folder):
    flow_run(tmp_path / "run", vae_folder, max_steps=2)
    vae = AutoencoderTiny.from_pretrained(vae_folder)
    vae.register_to_config(scaling_factor=0.9)
    vae.save_pretrained(vae_folder)
    with pytest.raises(LatentDataError, match="holds latents of something else: vae was"):
        flow_run(tmp_path / "run", vae_folder, max_steps=2)


def test_the_flow_has_the_shape_of_the_latents():
    values = {
        "data": DIGITS,
        "max_steps": 1,
        "image_size": [28, 20],
        "num_channels": 1,
        "patch_size": 1,
        "vae": "./vae",
    }
    arguments = make_arguments(values)
    vae = AutoencoderTiny(in_channels=1, out_channels=1, **(SIZES | {"latent_channels": 3}))
    config = flow_config(arguments, ["a", "b"], vae)
    assert (config.image_size, config.num_channels, config.num_classes) == ((14, 10), 3, 2)
    with pytest.raises(ValueError, match="num_channels=1 must be the vae's in_channels, 3"):
        flow_config(arguments, [], AutoencoderTiny(**SIZES))
    with pytest.raises(ValueError, match="latents_dir and latent_source need vae"):
        make_arguments({"data": DIGITS, "max_steps": 1, "latent_source": "posterior"})
    with pytest.raises(ValueError, match="vae and streaming=true contradict each other"):
        make_arguments({"data": DIGITS, "max_steps": 1, "streaming": True, "vae": "./vae"})


def test_a_draw_from_the_posterior_has_its_variance_and_that_of_the_noise():
    config = flow_config(make_arguments({"data": DIGITS, "max_steps": 1, "noise_std": 0.3}), [], None)
    mean, spread = torch.full((500, 2, 4, 4), 1.5), torch.full((500, 2, 4, 4), 0.4)
    noisy = add_training_noise(mean, config, seeds=list(range(500)), spread=spread)
    assert abs(noisy.mean().item() - 1.5) < 0.02
    assert abs(noisy.std().item() - 0.5) < 0.01  # sqrt(0.4^2 + 0.3^2)

    settings = OptimizationArguments(batch_size=4, max_steps=1)
    moments = torch.stack([mean[:4], spread[:4]], dim=1)[:, None]  # one view
    batch = LatentBatch(moments, torch.full((4,), -1))
    augmenters = [
        Augmenter(config, settings, horizontal_flip=False, device=torch.device("cpu"), latent_source=source)
        for source in ("mean", "posterior")
    ]
    at_mean, drawn = (augment(batch, 0, slice(0, 4))[0] for augment in augmenters)
    torch.testing.assert_close((drawn - 1.5) / 0.5, (at_mean - 1.5) / 0.3)  # the same normal numbers


def test_an_autoencoder_learns_and_its_latents_have_variance_one(tmp_path):
    run = vae_run(tmp_path / "run", max_steps=60, eval_every=60, learning_rate=5e-3, ema_decay=0.9)
    found = rows(run)
    assert found[-1]["validation_clean_rms"] < 0.75 * next(row["rms"] for row in found if "rms" in row)
    assert found[-1]["validation_clean_rms"] < found[-1]["validation_noisy_rms"]
    vae = load_autoencoder(str(run))
    data, _ = load_image_data(DataArguments(data=DIGITS), class_conditional=False)
    images = StoredImages(data, replace(AutoencoderArguments().image_format, image_size=8, num_channels=1))
    levels = torch.stack([images[row].levels for row in range(200)]) / 127.5 - 1
    mean, _ = encode_moments(vae, levels)
    assert 0.9 < mean.square().mean().sqrt() < 1.1
    for name in ("clean", "noisy"):
        assert (run / f"{name}_reconstructions.png").is_file()


def test_an_autoencoders_run_goes_on_bit_by_bit(tmp_path):
    whole = vae_run(tmp_path / "whole")
    parts = vae_run(tmp_path / "parts")
    newest = max((parts / "checkpoints").glob("step-*"))
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    vae_run(parts)
    name = "diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / name), load_file(parts / name)
    assert all(first[tensor].equal(second[tensor]) for tensor in first)
    assert rows(whole) == rows(parts)


def test_an_autoencoder_s_run_stops_with_the_status_of_one_that_goes_on(tmp_path, monkeypatch):
    whole, take = vae_run(tmp_path / "whole"), AutoencoderRun.take_step

    def stopped(run, pixel_values):
        take(run, pixel_values)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderRun, "take_step", stopped)
        recipe = tmp_path / "parts.yaml"
        recipe.write_text(json.dumps(VAE_RUN | {"output_dir": str(parts)}))
        assert train_vae([str(recipe)]) == 143
    assert rows(vae_run(parts)) == rows(whole)


def test_an_autoencoder_s_run_overwrites_nothing_of_others_and_sees_images_as_its_flow_will(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is there already and of no run: move it away"):
        vae_run(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == "mine\n"
    (tmp_path / "run/metrics.jsonl").unlink()
    with RunLock(tmp_path / "run", lost=print), pytest.raises(RunLockedError):
        vae_run(tmp_path / "run")
    with pytest.raises(ValueError, match="condition_columns must be left out: an autoencoder is told nothing but"):
        vae_run(tmp_path / "other", condition_columns=["label"])
    folders = [vae_run(tmp_path / resize, resize=resize, image_size=6) for resize in ("short_side", "adm")]
    assert rows(folders[0]) != rows(folders[1])


def test_fine_tuning_the_decoder_leaves_the_latents_alone(tmp_path, vae_folder):
    before = AutoencoderTiny.from_pretrained(vae_folder)
    run = vae_run(
        tmp_path / "tuned",
        init_from=str(vae_folder),
        autoencoder_config=None,
        freeze_encoder=True,
        feature_weight=0.1,
    )
    after = load_autoencoder(str(run))
    assert all(a.equal(b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True))
    assert after.config["scaling_factor"] == 0.8
    with pytest.raises(ValueError, match="feature_weight=0.1 needs freeze_encoder=true"):
        AutoencoderArguments(feature_weight=0.1)


def test_the_loss_is_what_it_says():
    torch.manual_seed(0)
    vae = AutoencoderTiny(in_channels=1, out_channels=1, **SIZES)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    arguments = AutoencoderArguments(latent_noise=0.0, l1_weight=0.5, variance_weight=2.0)
    loss, error = reconstruction_loss(vae, images, arguments, torch.Generator().manual_seed(0))
    mean = vae.encode(images).latents
    difference = vae.decode(mean).sample - images
    channel = mean.transpose(0, 1).flatten(1)
    variance = channel.var(1, correction=0)
    penalty = (0.5 * (channel.mean(1) ** 2 + variance - variance.log() - 1)).mean()
    torch.testing.assert_close(error, difference.square().mean())
    torch.testing.assert_close(loss, error + 0.5 * difference.abs().mean() + 2.0 * penalty)
    torch.testing.assert_close(variance_penalty(mean), penalty)
    torch.testing.assert_close(reconstruct(vae, images), vae.decode(mean).sample)
    assert len(trainable_parameters(vae, arguments)) == len(list(vae.parameters()))


def test_an_autoencoder_learns_on_the_grid_of_the_flow_to_come(tmp_path):
    """6x6 pixels are 3x3 latents; a flow with patches of two sees 4x4, of padded images, and so does the training."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(in_channels=1, out_channels=1, **SIZES).eval()
    images = torch.rand(2, 1, 6, 6) * 2 - 1
    seen = []
    hook = vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    arguments = AutoencoderArguments(latent_noise=0.0, l1_weight=0.0, variance_weight=0.0, grid_multiple=2)
    loss, _ = reconstruction_loss(vae, images, arguments, torch.Generator().manual_seed(0))
    decoded = reconstruct(vae, images, multiple=2)
    hook.remove()
    assert seen == [(8, 8), (8, 8)]
    assert decoded.shape == images.shape
    torch.testing.assert_close(loss, (decoded - images).square().mean())
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(decoded, vae.decode(vae.encode(padded).latents).sample[..., 1:7, 1:7])
    run = vae_run(tmp_path / "run", image_size=6, grid_multiple=2, max_steps=2)
    assert (run / "noisy_reconstructions.png").is_file()
    with pytest.raises(ValueError, match="grid_multiple must be at least 1, got 0"):
        AutoencoderArguments(grid_multiple=0)


def test_the_noise_of_a_variational_autoencoder_adds_to_that_of_its_posterior():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
    vae = AutoencoderKL(in_channels=1, out_channels=1, **blocks, **shape)
    arguments = AutoencoderArguments(l1_weight=0.0, variance_weight=0.0, kl_weight=1.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    loss, error = reconstruction_loss(vae, images, arguments, generator)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(loss - error, posterior.kl().mean() / posterior.mean[0].numel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_noise": -1.0}, "latent_noise must be at least 0, got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"sead": 1}, "unknown option 'sead'"),
        ({"autoencoder": "VQModel"}, "autoencoder must be one of AutoencoderKL, AutoencoderTiny, AutoencoderDC"),
        ({"autoencoder_config": [1]}, "autoencoder_config must be a mapping"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        vae_run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fashion", "emoji"])
def test_the_recipes_of_latents_fit_their_autoencoders(name):
    recipes = Path("examples/recipes/latents")
    data, options = parse(["--data", "anywhere", str(recipes / f"{name}_vae.yaml")])
    vae = options.new_autoencoder().eval()
    arguments = parse_arguments([str(recipes / f"{name}.yaml")], default_recipe="nowhere.yaml")
    assert Path(arguments.data.vae).name == Path(options.output_dir).name
    config = flow_config(arguments, ["a", "b"], vae)
    channels = {"fashion": 8, "emoji": 4}[name]
    assert (config.image_size, config.num_channels, config.num_tokens) == (8, channels, 16)
    images = torch.zeros(1, options.num_channels, options.image_size, options.image_size)
    assert encode_moments(vae, images, config.patch_size)[0].shape == (1, channels, 8, 8)
    assert reconstruct(vae, images).shape == images.shape
    assert arguments.model.noise_std == options.latent_noise
