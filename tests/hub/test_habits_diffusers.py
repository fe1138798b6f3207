"""What users of diffusers type by habit."""

import copy
import json
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import random_images, random_latents, tiny_model
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks.group_offloading import GroupOffloadingHook
from diffusers.training_utils import EMAModel
from inverse_models import tiny_inverse

from tarflow_hf import TarFlowModel, TarFlowPipeline
from tarflow_hf import pipeline_tarflow as pipeline_module
from tarflow_hf.flow.offloading import held


def make_pipe(**overrides):
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32, std=0.1, **overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **arguments):
    arguments = {"guidance_scale": 2.0, "output_type": "latent", "window": 1} | arguments
    return pipe([1, 2], generator=torch.Generator().manual_seed(0), **arguments).images


def test_the_arguments_of_saving_and_loading_are_those_of_diffusers(tmp_path, caplog):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path, safe_serialization=True, variant="fp16", max_shard_size="10KB")
    loaded = TarFlowPipeline.from_pretrained(tmp_path, use_safetensors=True, variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    assert sample(loaded).equal(sample(pipe))
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        TarFlowPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=False)
    pipe.save_pretrained(tmp_path / "other", safe_serialization=False)
    assert "safetensors weights are written all the same" in caplog.text
    assert (tmp_path / "other/transformer/model.safetensors").is_file()
    with pytest.raises(ValueError, match="no argument 'foo'"):
        TarFlowPipeline.from_pretrained(tmp_path, variant="fp16", foo=3)
    with pytest.raises(ValueError, match="no argument 'private' without push_to_hub=True"):
        pipe.save_pretrained(tmp_path, private=True)


def test_a_callback_reads_and_changes_what_the_call_goes_by():
    pipe, seen = make_pipe(), []

    def look(pipe, step, block, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        pipe._guidance_scale = 1.0
        return tensors

    changed = sample(pipe, callback_on_step_end=look)
    assert seen == [(4, 2.0, True, False), *[(4, 1.0, False, False)] * 3]
    assert changed.equal(sample(pipe, num_guided_blocks=1))
    assert not changed.equal(sample(pipe))

    def begin(pipe, step, block, tensors):
        pipe._guidance_scale = 3.0

    late = sample(pipe, guidance_scale=1.0, callback_on_step_end=begin)
    assert pipe.guidance_scale == 3.0
    assert not late.equal(sample(pipe, guidance_scale=1.0))


def test_diffusers_own_cutoff_ends_guidance():
    pipe = make_pipe()
    cut = sample(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25))
    assert cut.equal(sample(pipe, num_guided_blocks=2))


def test_a_pipe_is_made_from_a_pipe():
    pipe = make_pipe()
    other = TarFlowPipeline.from_pipe(pipe, guidance_scale=3.0)
    assert other.transformer is pipe.transformer
    assert other.config["guidance_scale"] == 3.0
    assert DiffusionPipeline.from_pipe is not None


def test_an_average_of_the_weights_is_kept_and_lent():
    model = make_pipe().transformer
    ema = EMAModel(model.parameters(), decay=0.5)
    before = model.blocks[0].proj_in.weight.clone()
    with torch.no_grad():
        model.blocks[0].proj_in.weight.add_(1.0)
    ema.step(model.parameters())
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert not model.blocks[0].proj_in.weight.equal(before)
    ema.restore(model.parameters())
    assert model.blocks[0].proj_in.weight.equal(before + 1)


@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize("how", ["model", "buffers too", "sequential", "a group of two blocks", "blocks", "leaves"])
def test_offloaded_models_give_the_same_numbers(how, volume_preserving, tmp_path):
    pipe = make_pipe(volume_preserving=volume_preserving)
    images, labels = random_images(pipe.transformer), torch.tensor([0, 1, 2])
    expected, density = sample(pipe), pipe.transformer.log_prob(images, labels).detach()
    model = pipe.transformer
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "buffers too":
        cpu_offload(model, "cpu", offload_buffers=True)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert model.blocks[0].proj_in.weight.device.type == "meta"
    elif how == "leaves":
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    else:  # weights that are on the disk are none in memory: what computes with them there is seen
        size = 1 if how == "blocks" else 2
        model.enable_group_offload(torch.device("cpu"), num_blocks_per_group=size, offload_to_disk_path=str(tmp_path))
    assert torch.allclose(sample(pipe), expected, atol=1e-6)
    assert torch.allclose(model.log_prob(images, labels), density, atol=1e-4)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator to offload from")
def test_without_an_accelerator_the_device_of_offloading_is_named():
    with pytest.raises(RuntimeError, match="accelerator"):
        make_pipe().enable_sequential_cpu_offload()


def test_layers_are_stored_in_eight_bits_and_the_projections_are_not():
    pipe = make_pipe()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    block = pipe.transformer.blocks[0]
    assert block.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert block.proj_in.weight.dtype == torch.float32
    assert sample(pipe).isfinite().all()
    latents = random_latents(pipe.transformer)
    assert pipe.transformer.decode(latents).dtype == torch.float32


def test_the_repository_names_the_image_processor(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "transformer/preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "modeling_tarflow.TarFlowImageProcessor"}


@pytest.mark.parametrize("dtype", [torch.float16, "float16", {"transformer": "float16", "default": "float32"}])
def test_types_of_weights_are_asked_for_by_name_too(dtype, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    assert TarFlowPipeline.from_pretrained(tmp_path, dtype=dtype).dtype == torch.float16
    assert TarFlowPipeline.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be torch.float32, .* or 'auto', got 'half16'"):
        TarFlowPipeline.from_pretrained(tmp_path, dtype="half16")


def test_a_folder_that_is_the_other_kind_is_told_apart(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    with pytest.raises(OSError, match='its model is in subfolder="transformer"'):
        TarFlowModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="it is a model alone: TarFlowModel.from_pretrained loads it"):
        TarFlowPipeline.from_pretrained(tmp_path / "transformer")


def test_what_training_scripts_of_diffusers_call_on_a_model():
    model = make_pipe().transformer.train()
    images = random_images(model)
    expected = model(images).loss
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert model(images).loss.allclose(expected)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        assert model.eval()(images).loss.allclose(expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_pipelines_are_copied_and_pickled(clone):
    pipe = make_pipe()
    other = clone(pipe)
    assert other.transformer is not pipe.transformer
    other.set_progress_bar_config(disable=True)
    assert sample(other).equal(sample(pipe))


def test_defaults_that_are_numbers_of_numpy_or_torch_are_saved_as_plain_ones(tmp_path):
    defaults = {"guidance_scale": np.float32(2), "temperature": torch.tensor(0.5), "denoising_strength": np.int64(1)}
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32), **defaults)
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: saved[name] for name in defaults} == {
        "guidance_scale": 2.0,
        "temperature": 0.5,
        "denoising_strength": 1,
    }


def test_a_pipeline_that_is_moved_in_inference_mode_denoises_and_one_that_was_made_there_says_why_not():
    pipe = make_pipe()
    expected = sample(pipe)
    with torch.inference_mode():
        moved, made = copy.copy(pipe).to("cpu", torch.float64), make_pipe()
        assert sample(moved).allclose(expected.double(), atol=1e-3)
    assert sample(moved).allclose(expected.double(), atol=1e-3)
    with pytest.raises(ValueError, match=r"made outside of torch.inference_mode\(\) .* denoising_strength=0"):
        sample(made)
    assert sample(made, denoising_strength=0.0).isfinite().all()


def make_latent_pipe():
    stages = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    stages |= {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **stages).eval()
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32, std=0.1, num_channels=2), vae=vae, image_size=15)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_of_another_ones_parts_keeps_autoencoder_and_inverse():
    pipe = make_latent_pipe()
    other = TarFlowPipeline.from_pipe(pipe, guidance_scale=1.5)
    other.set_progress_bar_config(disable=True)
    assert sample(other, output_type="pt").equal(sample(pipe, output_type="pt"))
    assert (other.config.guidance_scale, other.config.image_size) == (1.5, 15)
    inverted = make_pipe()
    inverted.register_modules(inverse=tiny_inverse(inverted.transformer))
    assert TarFlowPipeline.from_pipe(inverted).inverse is inverted.inverse
    assert TarFlowPipeline.from_pipe(inverted, inverse=None).inverse is None


def test_offloaded_pipelines_are_saved_and_decode_in_one_pass(tmp_path):
    pipe, latent = make_pipe(), make_latent_pipe()
    pipe.register_modules(inverse=tiny_inverse(pipe.transformer))
    one_pass = {"decoder": "one_pass", "window": None}
    expected = [sample(pipe, **one_pass), sample(latent)]
    for name, each, arguments in [("pixels", pipe, one_pass), ("latents", latent, {})]:
        each.enable_sequential_cpu_offload(device="cpu")
        each.save_pretrained(tmp_path / name)
        found = [each, TarFlowPipeline.from_pretrained(tmp_path / name)]
        found[1].set_progress_bar_config(disable=True)
        wanted = expected.pop(0)
        assert all(sample(one, **arguments).allclose(wanted, atol=1e-5) for one in found)


def test_an_autoencoder_that_overflows_gives_no_black_images():
    pipe = make_latent_pipe()
    torch.nn.init.constant_(pipe.vae.decoder.layers[0].weight, float("inf"))
    with pytest.raises(ValueError, match=r"autoencoder's images \[0, 1\] are not finite, their latents are"):
        sample(pipe, output_type="pil")
    assert sample(pipe).isfinite().all()


def test_weights_on_their_way_on_a_stream_are_waited_for():
    """A stand-in for a group whose weights are copied by CUDA, which there is none of here."""
    happened = []

    class Group(SimpleNamespace):
        def onload_(self):
            happened.append("copy begins")

        def offload_(self):
            happened.append("away")

    stream = SimpleNamespace(synchronize=lambda: happened.append("copy ends"))
    layer = torch.nn.Linear(2, 2)
    hook = GroupOffloadingHook.__new__(GroupOffloadingHook)
    hook.group = Group(onload_leader=layer, offload_leader=layer, stream=stream)
    layer._diffusers_hook = SimpleNamespace(hooks={"group_offloading": hook})
    with held(layer):
        happened.append("computes")
    assert happened == ["copy begins", "copy ends", "computes", "away"]
    assert hook.group.onload_leader is layer


def test_a_model_that_is_offloaded_as_a_whole_is_brought_in_before_its_blocks_are_called():
    """A callback may have called another model, which sends this one away; guided encoding calls blocks too."""
    pipe = make_pipe()
    pipe.register_modules(inverse=tiny_inverse(pipe.transformer))
    model, calls = pipe.transformer, []
    model._hf_hook = SimpleNamespace(pre_forward=lambda module, *_: calls.append(module))
    for _ in model.decode_blocks(random_latents(model)):
        calls.append("block")
    assert calls[1:] == [model, "block"] * model.config.num_blocks
    calls.clear()
    pipe.reconstruction_error(random_latents(model), [0, 1, 2])
    assert calls[0] is model


@pytest.mark.parametrize("overrides", [{"noise_conditioning": True}, {"condition_dim": 2, "num_classes": 0}])
def test_layers_are_stored_in_eight_bits_beside_embeddings_of_numbers(overrides):
    model = tiny_model(dtype=torch.float32, **overrides)
    latents = random_latents(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    given = {"condition": torch.zeros(3, 2)} if model.config.condition_dim else {}
    assert model.decode(latents, **given).isfinite().all()
    assert model.blocks[0].layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


def test_labels_may_be_tensors_one_by_one():
    pipe = make_pipe()
    calls = [{"generator": torch.Generator().manual_seed(0), "output_type": "pt"} for _ in range(2)]
    one, other = pipe([torch.tensor(2), 1], **calls[0]), pipe([2, 1], **calls[1])
    assert one.images.equal(other.images)


def test_guidance_that_cannot_act_is_said(caplog):
    pipe = make_pipe()
    with caplog.at_level(logging.WARNING):
        pipeline_module.logger.addHandler(caplog.handler)
        pipe(None, guidance_scale=1.0)
        pipe([1], guidance_scale=3.0)
        assert "has no effect" not in caplog.text
        pipe(None, guidance_scale=3.0)
        pipeline_module.logger.removeHandler(caplog.handler)
    assert "guidance_scale=3.0 has no effect on images without labels or conditions" in caplog.text
