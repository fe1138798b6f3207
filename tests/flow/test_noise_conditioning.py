"""Models that are told the noise level: against the authors' numbers, the literal oracle, and what they refuse."""

from pathlib import Path

import oracle
import pytest
import torch
from conftest import random_images, random_latents, tiny_config, tiny_model
from safetensors import safe_open

from tarflow_hf import Guidance, TarFlowConfig, TarFlowModel, TarFlowPipeline, convert_reference_checkpoint
from tarflow_hf.conversion.checkpoint import reference_state_dict
from tarflow_hf.flow.likelihood import nats_per_dim
from tarflow_hf.flow.sampling.denoising import even_levels
from tarflow_hf.metrics.likelihood import log_prob_draws
from tarflow_hf.metrics.posterior import class_log_prob

FIXTURES = Path(__file__).parents[1] / "fixtures"
LEVELS = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)
LABELS = torch.tensor([0, 3, -1])
GUIDANCE = {
    "cond": None,
    "cfg1.5_annealed_linear_scale": Guidance(2.5, "linear", rule="scale"),
    "cfg1.5_const_linear_scale": Guidance(2.5, "constant", rule="scale"),
    "cfg1.5_const_gaussian_product_first_flow": Guidance(2.5, "constant", rule="product", num_guided_blocks=1),
}


def convert(path=FIXTURES / "itarflow_cond.pth", **arguments):
    return convert_reference_checkpoint(path, **({"image_size": 8, "noise_range": (0.01, 0.3)} | arguments))


@pytest.fixture(scope="module")
def golden():
    """The authors' iTARFlow, converted, and what it computed."""
    with safe_open(FIXTURES / "itarflow_cond.safetensors", "pt") as file:
        return convert(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("branch", ["cond", "null"])
def test_encoding(golden, branch):
    model, tensors = golden
    labels, levels = tensors["class_labels"] if branch == "cond" else None, tensors["noise_std"]
    output = model(tensors["pixel_values"], labels, levels, output_hidden_states=True)
    assert_close(output.latents, tensors[f"encode.{branch}.z"], 1e-5)
    assert_close(output.log_det / model.config.num_dims, tensors[f"encode.{branch}.logdet_mean"], 1e-5)
    for block, latents in enumerate(output.hidden_states):
        assert_close(latents, tensors[f"encode.{branch}.block{block}"], 1e-5)
    weighted = (levels * nats_per_dim(output.latents, output.log_det)).mean()
    assert_close(weighted, tensors[f"encode.{branch}.loss_weight_t"], 1e-5)


@pytest.mark.parametrize("window", [1, 4, 16, None])
@pytest.mark.parametrize("name", GUIDANCE)
def test_decoding(golden, name, window):
    model, tensors = golden
    images = model.decode(
        tensors["noise"], tensors["class_labels"], guidance=GUIDANCE[name], window=window, tolerance=0
    )
    assert_close(images, tensors[f"decode.{name}.image"], 2e-4)


@pytest.mark.parametrize("name", list(GUIDANCE)[:3])
def test_block_by_block(golden, name):
    model, tensors = golden
    steps = model.decode_blocks(tensors["noise"], tensors["class_labels"], guidance=GUIDANCE[name], tolerance=0)
    for step, (patches, _) in enumerate(steps, start=1):
        assert_close(model.unpatchify(patches), tensors[f"decode.{name}.seq{step}"], 2e-4)
    assert step == 3


def test_each_refinement_step(golden):
    model, tensors = golden
    pipe = TarFlowPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    steps = []
    pipe(
        tensors["class_labels"],
        latents=tensors["noise"],
        num_refinement_steps=5,
        tolerance=0,
        callback_on_step_end=lambda pipe, step, block, tensors: steps.append((block, tensors["latents"])),
    )
    assert [block for block, _ in steps] == [2, 1, 0, -1, -2, -3, -4, -5]
    assert_close(model.unpatchify(steps[2][1]), tensors["decode.cond.image"], 2e-4)
    for index in range(5):
        assert_close(model.unpatchify(steps[3 + index][1]), tensors[f"refine.step{index}"], 1e-4)
    levels = [*even_levels(model.config.noise_range, 5), 0.0]
    assert_close(torch.tensor(levels), tensors["refine.sigmas"], 1e-6)


def test_every_recorded_decoding_is_compared(golden):
    _, tensors = golden
    assert {key.split(".", 1)[1].removesuffix(".image") for key in tensors if key.endswith("image")} == set(GUIDANCE)


def test_conversion_reads_sizes_and_goes_back_under_the_authors_keys(golden):
    config = golden[0].config
    assert (config.layers_per_block, config.num_classes, config.noise_range) == ([1, 1, 2], 5, (0.01, 0.3))
    original = torch.load(FIXTURES / "itarflow_cond.pth", weights_only=True)
    state = reference_state_dict(golden[0])
    assert state.keys() == original.keys()
    assert all(tensor.equal(original[key]) for key, tensor in state.items())


def test_the_older_key_layout_is_read_too(golden, tmp_path):
    original = torch.load(FIXTURES / "itarflow_cond.pth", weights_only=True)
    older = {key.replace("head_blocks", "attn_blocks"): tensor for key, tensor in original.items()}
    torch.save(older, tmp_path / "older.pth")
    model = convert(tmp_path / "older.pth")
    assert all(tensor.equal(golden[0].state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.save(original | {"blocks.0.shared_backbone.x": torch.zeros(1)}, tmp_path / "shared.pth")
    with pytest.raises(ValueError, match="unknown key 'blocks.0.shared_backbone.x'"):
        convert(tmp_path / "shared.pth")


def test_conversion_needs_the_range_of_the_levels_and_no_other_noise():
    with pytest.raises(ValueError, match="does not tell its levels: give noise_range"):
        convert(noise_range=None)
    with pytest.raises(ValueError, match="give noise_range in place of noise_type=None and noise_std=0.1"):
        convert(noise_std=0.1)
    with pytest.raises(ValueError, match="noise_range is for checkpoints with noise conditioning"):
        convert(FIXTURES / "cond_model_2_128_2_1_0.05.pth")


@pytest.mark.parametrize("num_classes", [0, 4])
def test_encoding_and_decoding_equal_the_oracle(num_classes):
    model = tiny_model(num_classes=num_classes, noise_conditioning=True, num_blocks=2, layers_per_block=[1, 2])
    images, latents = random_images(model), random_latents(model)
    labels = LABELS if num_classes else None
    output = model(images, labels, LEVELS)
    decoded = model.decode(latents, labels, noise_level=LEVELS, guidance=Guidance(2.0), window=4, tolerance=0)
    for index, level in enumerate(LEVELS):
        label = labels[index].item() if num_classes else None
        expected, log_det = oracle.encode(model, images[index], label, level=level)
        assert_close(output.latents[index], expected, 1e-10)
        assert_close(output.log_det[index], log_det, 1e-10)
        weight = 1.0 if num_classes else 0.0
        assert_close(decoded[index], oracle.decode(model, latents[index], label, weight=weight, level=level), 1e-10)


@pytest.mark.parametrize("max_batch", [None, 2])
def test_decoding_inverts_encoding_at_each_level(max_batch):
    model = tiny_model(noise_conditioning=True)
    images = random_images(model)
    latents = model(images, LABELS, LEVELS).latents
    decoded = model.decode(latents, LABELS, noise_level=LEVELS, tolerance=0, max_batch=max_batch)
    assert_close(decoded, images, 1e-10)
    assert not model.decode(latents, LABELS, noise_level=LEVELS.flip(0), tolerance=0).equal(decoded)


def test_the_highest_level_is_the_default_of_decoding():
    model = tiny_model(noise_conditioning=True, noise_range=(0.1, 0.5))
    latents = random_latents(model)
    highest = model.decode(latents, LABELS, noise_level=torch.full((3,), 0.5, dtype=torch.float64))
    assert model.decode(latents, LABELS).equal(highest)


def test_the_noise_embedding_trains_and_starts_from_the_identity():
    fresh = TarFlowModel(tiny_config(noise_conditioning=True)).double()
    images = random_images(fresh)
    assert fresh.unpatchify(fresh(images, LABELS, LEVELS).latents).equal(images)
    model = tiny_model(noise_conditioning=True).train()
    model(images, LABELS, LEVELS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_reduced_precision_keeps_the_level_in_float32():
    model = tiny_model(noise_conditioning=True, dtype=torch.float32, hidden_size=32)
    images = random_images(model)
    exact = model(images, LABELS, LEVELS.float()).latents
    half = model.to(torch.bfloat16)(images, LABELS, LEVELS.float())
    assert half.latents.dtype == torch.float32
    assert (half.latents - exact).square().mean().sqrt() < 0.05


def test_compiled_forward_agrees():
    model = tiny_model(noise_conditioning=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = random_images(model)
    assert_close(compiled(images, LABELS, LEVELS).latents, model(images, LABELS, LEVELS).latents, 1e-10)


def test_save_and_load(tmp_path):
    model = tiny_model(noise_conditioning=True, dtype=torch.float32, noise_range=[0.02, 0.4])
    model.save_pretrained(tmp_path)
    loaded = TarFlowModel.from_pretrained(tmp_path)
    assert loaded.config.noise_range == (0.02, 0.4)
    assert loaded.config.noise_conditioning
    images = random_images(model)
    levels = LEVELS.float()
    assert loaded(images, LABELS, levels).latents.equal(model(images, LABELS, levels).latents)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (None, "noise_level must be given for a model with noise_conditioning=True"),
        (torch.tensor([0.1, 0.2]), r"noise_level must be \(3,\) floating point numbers, got shape \(2,\)"),
        (torch.tensor([1, 2, 3]), r"noise_level must be \(3,\) floating point numbers"),
        (torch.tensor([0.1, 0.0, 0.2]), "noise_level must be finite and above 0, got 0.0"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels, message):
    model = tiny_model(noise_conditioning=True)
    images = random_images(model)
    with pytest.raises(ValueError, match=message):
        model(images, LABELS, levels)
    with pytest.raises(ValueError, match=message):
        model.log_prob(images, LABELS, levels)


def test_a_plain_model_refuses_levels(model):
    for call in (
        lambda: model.log_prob(random_images(model), LABELS, LEVELS),
        lambda: model.decode(random_latents(model), LABELS, noise_level=LEVELS),
    ):
        with pytest.raises(ValueError, match="noise_level must be None for a model with noise_conditioning=False"):
            call()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"noise_range": (0.3, 0.01)}, "noise_range must be two rising finite levels above 0"),
        ({"noise_range": (0.1,)}, "noise_range must be two rising finite levels above 0"),
        ({"noise_range": (0.0, 0.1)}, "noise_range must be two rising finite levels above 0"),
        ({"noise_type": "uniform"}, "noise_conditioning=True needs noise_type='gaussian'"),
        ({"volume_preserving": True}, "needs .* volume_preserving=False"),
        ({"hidden_size": 15, "head_dim": 5}, "noise_conditioning=True needs an even hidden_size, got 15"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        TarFlowConfig(noise_conditioning=True, **overrides)


def test_images_are_measured_at_the_lowest_level():
    model = tiny_model(noise_conditioning=True, noise_range=(0.02, 0.4))
    images = random_images(model)
    lowest = torch.full((3,), 0.02, dtype=torch.float64)
    assert model.lowest_noise_level(images).equal(lowest)
    assert tiny_model().lowest_noise_level(images) is None
    expected = torch.stack([model.log_prob(images, torch.full((3,), label), lowest) for label in range(4)], dim=1)
    torch.testing.assert_close(class_log_prob(model, images), expected)
    torch.testing.assert_close(class_log_prob(model, images, pairs_per_pass=5), expected)
    found = log_prob_draws(model, images[None], LABELS)
    torch.testing.assert_close(torch.from_numpy(found)[:, 0], model.log_prob(images, LABELS, lowest).detach())
