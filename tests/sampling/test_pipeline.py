"""The pipeline: labels, reproducibility, output types, callbacks, saving, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from conftest import quiet_pipeline, random_images, random_latents, seeded, tiny_model
from PIL import Image

from tarflow_hf import Guidance, TarFlowPipeline

NAMES = {0: "cat", 1: "dog, hound", 2: "bird, hound dog", 3: "7"}


def make_pipeline(*, dtype=torch.float32, **overrides):
    return quiet_pipeline(tiny_model(dtype=dtype, **({"id2label": NAMES} | overrides)), guidance_scale=1.5)


@pytest.fixture
def pipe():
    """A conditional pipeline in float32."""
    return make_pipeline()


def sample(pipe, labels=(0, 1, 2), seeds=(1, 2, 3), **arguments):
    return pipe(list(labels), generator=seeded(*seeds), **({"output_type": "pt"} | arguments)).images


def test_a_call_is_decode_then_denoise(pipe):
    latents, labels = random_latents(pipe.transformer), torch.tensor([0, 1, 2])
    images = pipe([0, 1, 2], latents=latents, guidance_scale=2.0, denoising_strength=0, output_type="latent").images
    assert images.equal(pipe.transformer.decode(latents, labels, guidance=Guidance(2.0)))
    denoised = pipe([0, 1, 2], latents=latents, guidance_scale=2.0, denoising_strength=1, output_type="latent").images
    images.requires_grad_()
    (score,) = torch.autograd.grad(pipe.transformer.log_prob(images, labels).sum(), images)
    torch.testing.assert_close(denoised, images + 0.1**2 * score)


def test_class_names_synonyms_and_ids_name_the_same_class(pipe):
    expected = sample(pipe, [0, 1, 3])
    assert sample(pipe, ["cat", "hound", "7"]).equal(expected)
    assert sample(pipe, ["cat", "dog, hound", 3]).equal(expected)
    ids = torch.tensor([0, 1, 3])
    assert pipe(ids, generator=seeded(1, 2, 3), output_type="pt").images.equal(expected)
    assert pipe(ids.numpy(), generator=seeded(1, 2, 3), output_type="pt").images.equal(expected)


def test_images_of_a_label_stand_next_to_each_other(pipe):
    images = pipe(["cat", 2], num_images_per_label=2, generator=seeded(1, 2, 3, 4), output_type="pt").images
    assert images.equal(sample(pipe, [0, 0, 2, 2], [1, 2, 3, 4]))
    assert len(pipe(num_images_per_label=3).images) == 3
    assert len(pipe(2).images) == len(pipe("cat").images) == len(pipe().images) == 1


def test_minus_one_is_no_label(pipe):
    without = pipe(generator=seeded(1), output_type="pt").images
    assert pipe(-1, generator=seeded(1), guidance_scale=1.0, output_type="pt").images.equal(without)


def test_the_same_generator_gives_the_same_images(pipe):
    first, second = (pipe([0, 1], generator=seeded(5)[0], output_type="pt").images for _ in range(2))
    assert first.equal(second)
    assert not first.equal(pipe([0, 1], generator=seeded(6)[0], output_type="pt").images)


@pytest.mark.parametrize(("tolerance", "difference"), [(0, 1e-5), (1e-3, 5e-3)])
def test_an_image_depends_on_its_own_generator_alone(pipe, tolerance, difference):
    together = sample(pipe, tolerance=tolerance)
    for index in range(3):
        alone = sample(pipe, [index], [index + 1], tolerance=tolerance)
        assert (alone[0] - together[index]).abs().max() <= difference


def test_guidance_scale_one_is_no_guidance(pipe):
    latents = random_latents(pipe.transformer)
    plain = pipe.transformer.decode(latents, torch.tensor([0, 1, 2]))
    arguments = {"latents": latents, "denoising_strength": 0, "output_type": "latent"}
    assert pipe([0, 1, 2], guidance_scale=1.0, **arguments).images.equal(plain)
    assert not pipe([0, 1, 2], guidance_scale=2.0, **arguments).images.equal(plain)


def test_guidance_without_labels_comes_from_the_attention_temperature():
    pipe = make_pipeline(num_classes=0, id2label=None)
    latents = random_latents(pipe.transformer)
    plain, same, guided = (
        pipe(latents=latents, guidance_scale=scale, attention_temperature=temperature, output_type="pt").images
        for scale, temperature in [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5)]
    )
    assert same.equal(plain)
    assert not guided.equal(plain)


def test_output_types(pipe):
    pictures = sample(pipe, output_type="pil")
    arrays = sample(pipe, output_type="np")
    tensors = sample(pipe, output_type="pt")
    raw = sample(pipe, output_type="latent")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 3
    assert arrays.shape == (3, 8, 8, 1)
    assert tensors.shape == raw.shape == (3, 1, 8, 8)
    torch.testing.assert_close((raw / 2 + 0.5).clamp(0, 1), tensors)
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.array(pictures[0]), (arrays[0, :, :, 0] * 255).round().astype("uint8"))
    (images,) = sample_tuple(pipe)
    assert images.equal(tensors)
    assert make_pipeline(num_channels=3)(0).images[0].mode == "RGB"
    with pytest.raises(ValueError, match="output_type='pil' needs a model of 1 or 3 channels, got num_channels=2"):
        make_pipeline(num_channels=2)(0)


def sample_tuple(pipe):
    return pipe([0, 1, 2], generator=seeded(1, 2, 3), output_type="pt", return_dict=False)


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def watch(pipeline, step, block, tensors):
        assert pipeline is pipe
        seen.append((step, block, tuple(tensors["latents"].shape)))

    images = sample(pipe, callback_on_step_end=watch)
    shape = (3, 16, 4)
    assert seen == [(0, 2, shape), (1, 1, shape), (2, 0, shape), (3, -1, shape)]
    assert images.equal(sample(pipe))

    def blank(pipeline, step, block, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if block == -1 else tensors

    assert sample(pipe, callback_on_step_end=blank).equal(torch.full((3, 1, 8, 8), 0.5))

    def restart(pipeline, step, block, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

    zeros = torch.zeros(3, 16, 4)
    blocks = pipe.transformer.decode_blocks(zeros, torch.tensor([0, 1, 2]), guidance=Guidance(1.5))
    next(blocks)
    blocks.send(zeros)
    expected, _ = next(blocks)
    replaced = sample(pipe, callback_on_step_end=restart, denoising_strength=0, output_type="latent")
    assert replaced.equal(pipe.transformer.unpatchify(expected))


def test_an_interrupt_stops_after_the_present_step(pipe):
    seen = []

    def stop(pipeline, step, block, tensors):
        seen.append(step)
        pipeline._interrupt = step == 1

    images = sample(pipe, callback_on_step_end=stop)
    assert seen == [0, 1]
    assert images.shape == (3, 1, 8, 8)
    assert pipe.interrupt
    assert sample(pipe).equal(sample(make_pipeline()))


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    sample(pipe)
    assert "4/4" in capsys.readouterr().err
    sample(pipe, denoising_strength=0)
    assert "3/3" in capsys.readouterr().err


def test_saved_defaults_are_used_where_the_call_is_silent(tmp_path):
    pipe = TarFlowPipeline(
        tiny_model(dtype=torch.float32, id2label=NAMES),
        guidance_scale=3.0,
        guidance_schedule="constant",
        attention_temperature=0.5,
        denoising_strength=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not loaded.transformer.training
    assert loaded.transformer.config.id2label == NAMES
    explicit = sample(
        make_pipeline(),
        guidance_scale=3.0,
        guidance_schedule="constant",
        attention_temperature=0.5,
        denoising_strength=0.7,
    )
    assert sample(loaded).equal(explicit)
    assert not sample(loaded, denoising_strength=0.0).equal(explicit)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["guidance_scale"] == 3.0
    assert index["denoising_strength"] == 0.7


def test_the_temperature_scales_what_is_drawn_and_is_saved(tmp_path):
    pipe = make_pipeline()
    latents = 0.5 * pipe.prepare_latents(3, seeded(0, 1, 2))
    asked = {"num_images_per_label": 3, "output_type": "latent", "guidance_scale": 2.0}
    wanted = pipe(1, latents=latents, **asked).images
    assert pipe(1, generator=seeded(0, 1, 2), temperature=0.5, **asked).images.equal(wanted)
    TarFlowPipeline(pipe.transformer, temperature=0.5).save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(1, generator=seeded(0, 1, 2), **asked).images.equal(wanted)
    assert loaded(1, latents=latents, **asked).images.equal(wanted)  # those given are taken as they are
    assert "`temperature=0.5`" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="give temperature or latents"):
        pipe(1, latents=latents, temperature=0.5, **asked)


def test_the_default_denoising_fits_the_noise_of_training():
    assert TarFlowPipeline(tiny_model()).config["denoising_strength"] == 1.0
    uniform = TarFlowPipeline(tiny_model(noise_type="uniform"))
    assert uniform.config["denoising_strength"] == 0.0
    with pytest.raises(ValueError, match="denoising_strength must be 0 for a model trained with uniform noise, got 1"):
        uniform(0, denoising_strength=1)


def test_dtype_and_variants(tmp_path):
    pipe = make_pipeline(hidden_size=32)
    expected = sample(pipe)
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant="bf16")
    half = sample(pipe)
    assert half.dtype == torch.float32
    assert (half - expected).square().mean().sqrt() < 0.02
    loaded = TarFlowPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == torch.bfloat16
    assert sample(loaded).equal(half)
    assert pipe.to("cpu", torch.float32).transformer.dtype == torch.float32


def test_model_offloading_runs_every_step_through_the_hooks(pipe):
    expected = sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert sample(pipe).equal(expected)


def test_latents_of_an_image_decode_to_it():
    pipe = make_pipeline(dtype=torch.float32)
    images = random_images(pipe.transformer)
    latents = pipe.invert(images, ["cat", 1, -1])
    again = pipe(
        ["cat", 1, -1], latents=latents, guidance_scale=1.0, denoising_strength=0, tolerance=0, output_type="latent"
    )
    assert (again.images - images).abs().max() < 1e-5
    picture = Image.fromarray(np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3))
    assert pipe.invert(picture).shape == (1, 16, 4)
    assert pipe.invert([picture, picture], [0, 1]).shape == (2, 16, 4)
    with pytest.raises(ValueError, match=r"class_labels must be \(2,\) integers"):
        pipe.invert([picture, picture], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 4}, r"class_labels must be -1 \(no label\) \.\.\. 3, got 4"),
        ({"class_labels": [0, -2]}, r"class_labels must be -1 .* got -2"),
        ({"class_labels": "wolf"}, "class name 'wolf' is unknown; the model's names are 'cat'"),
        ({"class_labels": [1.5]}, "class_labels must be class ids or names, got 1.5"),
        ({"class_labels": [True]}, "class_labels must be class ids or names, got True"),
        ({"class_labels": []}, "class_labels must name at least one class, got an empty list"),
        ({"class_labels": torch.tensor([], dtype=torch.long)}, "got an empty list"),
        ({"class_labels": [[0, 1]]}, "class_labels must be class ids or names"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1, got 0"),
        ({"guidance_scale": 0.9}, "guidance_scale.* at least 1 .* got 0.9"),
        ({"attention_temperature": -1.0}, "attention_temperature must be finite and above 0, got -1.0"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule.* got 'cosine'"),
        ({"denoising_strength": -0.5}, "denoising_strength must be finite and at least 0, got -0.5"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": "1"}, "temperature must be finite and above 0, got '1'"),
        ({"window": 0}, "window must be None or at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be a finite number of at least 0, got -1.0"),
        ({"output_type": "jpeg"}, "output_type must be one of .* got 'jpeg'"),
        ({"latents": torch.zeros(1, 4, 16)}, r"\(batch=1, tokens=16, patch_dim=4\), got \(1, 4, 16\)"),
        ({"latents": torch.full((1, 16, 4), float("nan"))}, "latents must be finite .* 64 non-finite values"),
        ({"class_labels": [0, 1], "latents": torch.zeros(1, 16, 4)}, r"latents must have shape \(batch=2, "),
        ({"class_labels": [0, 1], "generator": seeded(1)}, "2 images, 1 generators"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among \['latents'\], got \['noise'\]"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_synonym_of_several_classes_is_refused():
    pipe = make_pipeline(id2label={0: "crane, bird", 1: "crane, machine", 2: "c", 3: "d"})
    with pytest.raises(ValueError, match=r"'crane' fits the classes \[0, 1\], choose by id"):
        pipe("crane")


def test_labels_for_an_unconditional_model_are_refused():
    with pytest.raises(ValueError, match="class_labels must be None for an unconditional model, got 3"):
        make_pipeline(num_classes=0, id2label=None)(3)


def test_bad_defaults_are_refused():
    with pytest.raises(ValueError, match="guidance_scale.* got 0.5"):
        TarFlowPipeline(tiny_model(), guidance_scale=0.5)


def test_a_missing_or_truncated_checkpoint_is_refused(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="model.safetensors|incomplete|deserializ"):
        TarFlowPipeline.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        TarFlowPipeline.from_pretrained(tmp_path)
