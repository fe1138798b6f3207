"""A checkpoint of a model of any kind becomes a pipeline of the same probabilities."""

import inspect
import json
import shutil

import pytest
import torch
from conftest import random_images
from diffusers import AutoencoderTiny
from transformers import PretrainedConfig

from tarflow_hf import TarFlowConfig, TarFlowPipeline
from tarflow_hf.training.checkpoints import DamagedCheckpointError, write_checkpoint
from tarflow_hf.training.export import export, load_pipeline
from tarflow_hf.training.latents import flow_config
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.start import load_source, start_model
from tarflow_hf.training.trained_part import without_adapters

SHAPE = {"image_size": 8, "num_channels": 1, "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1}
BASE = SHAPE | {"data": "user/digits", "max_steps": 10, "ema_decay": 0.9, "posthoc_ema": [0.1, 0.2]}
CONDITION = {
    "condition_dim": 2,
    "condition_names": ["slant", "stroke"],
    "condition_mean": [1.0, 2.0],
    "condition_std": [0.5, 3.0],
}
ARRAYS = {"value_mean": [3.0], "value_scale": [0.5]}
KINDS = {
    "arrays": {"array_layout": "chw", "horizontal_flip": False, "denoising_strength": 0.0},
    "rectangle": {"image_size": [4, 12]},
    "condition": {"class_conditional": False},
    "adapters": {"lora": {"rank": 2, "targets": ["qkv_proj", "up_proj"]}, "freeze": ["blocks.0.*"]},
    "volume preserving": {"volume_preserving": True},
    "levels of noise": {"noise_conditioning": True, "noise_range": [0.05, 0.2]},
}


def write(folder, options, condition, vae=None):
    """A checkpoint as a run writes it, of random weights: its model and its average."""
    arguments = make_arguments(BASE | options)
    names = ["a", "b"] if arguments.model.class_conditional else []
    config = flow_config(arguments, names, vae, **condition)
    models = []
    for seed in range(3):
        model, _ = start_model(config, arguments.start, arguments.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        models.append(model.eval())
    raw, ema, posthoc = (dict(model.state_dict()) for model in models)
    state = {"model": raw, "ema": {"num_updates": 10, "average": ema}, "progress": {"step": 10}}
    state["posthoc"] = {"0.1": {"num_updates": 10, "origin": 0, "average": posthoc}}
    about = arguments.fixed() | {"class_names": names, "num_images": 20}
    about |= {"condition": condition} if condition else {}
    options = arguments.published(folder)
    return write_checkpoint(folder / "checkpoints", 10, state, about, keep=1, options=options), models


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_any_kind_is_rebuilt(tmp_path, kind):
    condition = {"condition": CONDITION, "arrays": ARRAYS}.get(kind, {})
    checkpoint, models = write(tmp_path / "run", KINDS[kind], condition)
    given = {"condition": torch.tensor([[1.0, 4.0], [0.0, 1.0], [2.0, 2.0]])} if kind == "condition" else {}
    if kind != "condition":
        given["class_labels"] = torch.tensor([0, 1, -1])
    if kind == "levels of noise":
        given["noise_level"] = torch.full((3,), 0.1)
    images = random_images(models[0])
    for weights, model in zip(("raw", "ema", "posthoc"), models, strict=True):
        length = {"ema_length": 0.1} if weights == "posthoc" else {}
        export(checkpoint, tmp_path / weights, weights=weights, **length)
        found = TarFlowPipeline.from_pretrained(tmp_path / weights).transformer
        expected = without_adapters(model)
        own = inspect.signature(TarFlowConfig.__init__).parameters.keys()
        for name in (own - inspect.signature(PretrainedConfig.__init__).parameters.keys()) | {"id2label"}:
            assert getattr(found.config, name) == getattr(expected.config, name), name
        assert not any("lora" in name for name in found.state_dict())
        torch.testing.assert_close(
            found.log_prob(images, **given), expected.log_prob(images, **given), rtol=0, atol=1e-3
        )


def test_a_checkpoint_of_a_run_on_latents_takes_the_autoencoder_of_the_run(tmp_path):
    sizes = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1]}
    sizes |= {"num_decoder_blocks": [1, 1], "latent_channels": 2, "in_channels": 1, "out_channels": 1}
    vae = AutoencoderTiny(**sizes)
    run = tmp_path / "run"
    checkpoint, models = write(run, {"vae": "./gone", "patch_size": 1, "image_size": [8, 12]}, {}, vae)
    with pytest.raises(OSError, match=r"the autoencoder of the run is not in .*run/vae"):
        export(checkpoint, tmp_path / "out")
    vae.save_pretrained(run / "vae")
    export(checkpoint, tmp_path / "out")
    pipe = TarFlowPipeline.from_pretrained(tmp_path / "out")
    assert all(pipe.vae.state_dict()[name].equal(tensor) for name, tensor in vae.state_dict().items())
    assert pipe.transformer.config.image_size == (4, 6)
    images = random_images(models[1])
    torch.testing.assert_close(pipe.transformer.log_prob(images), models[1].log_prob(images), rtol=0, atol=1e-4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a", generator=torch.Generator().manual_seed(0)).images[0].size == (12, 8)


def test_a_checkpoint_that_was_copied_out_of_its_run_is_exported_and_trained_on(tmp_path):
    checkpoint, models = write(tmp_path / "run", {}, {})
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert export(tmp_path / "copy", tmp_path / "out") == "average with decay 0.9, after 10 steps"
    images = random_images(models[1])
    for found in (
        load_pipeline(tmp_path / "copy").transformer,
        load_source(str(tmp_path / "copy"), make_arguments(BASE).model),
    ):
        torch.testing.assert_close(found.log_prob(images), models[1].log_prob(images), rtol=0, atol=1e-4)
    (tmp_path / "copy" / "checkpoint.json").write_text(json.dumps({"step": 10}))
    with pytest.raises(DamagedCheckpointError, match=r"copy/checkpoint.json must hold 'configuration'"):
        export(tmp_path / "copy", tmp_path / "again")
