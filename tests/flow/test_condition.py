"""A condition that is a vector: what it does against the oracle, what stands for none, and what is refused."""

import json

import oracle
import pytest
import torch
from conftest import random_images, random_latents, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError

from tarflow_hf import Guidance, TarFlowConfig, TarFlowPipeline, adapt
from tarflow_hf.flow.inputs import checked_condition, class_ids

ABOUT = {
    "condition_dim": 2,
    "condition_names": ["brightness", "slant"],
    "condition_mean": [10.0, -3.0],
    "condition_std": [2.0, 0.5],
}
VECTORS = torch.tensor([[11.0, -3.5], [7.0, -2.0], [10.0, -3.0]], dtype=torch.float64)
MASK = torch.tensor([True, True, False])


def condition_pipeline(**overrides):
    pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, **(ABOUT | overrides)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("num_classes", [0, 4])
def test_both_directions_equal_the_oracle_with_classes_and_alone(num_classes):
    model = tiny_model(num_classes=num_classes, num_blocks=2, layers_per_block=1, **ABOUT)
    images, labels = random_images(model), torch.tensor([0, -1, 2]) if num_classes else None
    output = model(images, labels, None, VECTORS, MASK)
    latents = random_latents(model)
    decoded = model.decode(
        latents, labels, condition=VECTORS, condition_mask=MASK, guidance=Guidance(1.5), tolerance=0, max_batch=2
    )
    for index, given in enumerate(MASK.tolist()):
        label, vector = labels[index].item() if num_classes else None, VECTORS[index] if given else None
        expected, log_det = oracle.encode(model, images[index], label, condition=vector)
        torch.testing.assert_close(output.latents[index], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.log_det[index], log_det, rtol=0, atol=1e-10)
        expected = oracle.decode(model, latents[index], label, weight=0.5, condition=vector)
        torch.testing.assert_close(decoded[index], expected, rtol=0, atol=1e-10)


def test_none_is_a_mask_of_none_and_a_learned_vector():
    model = tiny_model(**ABOUT)
    images = random_images(model)
    without = model.log_prob(images)
    assert model.log_prob(images, condition=VECTORS, condition_mask=torch.zeros(3, dtype=torch.bool)).equal(without)
    assert not torch.isclose(model.log_prob(images, condition=VECTORS), without).any()
    model.log_prob(images, condition=VECTORS, condition_mask=MASK).sum().backward()
    for block in model.blocks:
        for parameter in block.condition_embedding.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0


def test_guidance_pushes_away_from_none():
    model, latents = tiny_model(**ABOUT), random_latents(tiny_model())
    arguments = {"condition": VECTORS, "tolerance": 0}
    assert not model.decode(latents, guidance=Guidance(2.0), **arguments).allclose(model.decode(latents, **arguments))
    without = model.decode(latents, guidance=Guidance(2.0), tolerance=0)
    torch.testing.assert_close(without, model.decode(latents, tolerance=0))


def test_the_configuration_survives_json_and_says_nothing_where_there_is_none(tmp_path):
    config = tiny_config(**ABOUT)
    config.save_pretrained(tmp_path)
    assert TarFlowConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["condition_names"] == ["brightness", "slant"]
    assert "condition_" not in tiny_config().to_json_string()
    assert not any("condition" in name for name in tiny_model().state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"condition_dim": -1}, "condition_dim must be 0"),
        ({"condition_names": ["a"]}, r"condition_names must have condition_dim=2 values, got \['a'\]"),
        ({"condition_names": ["a", "a"]}, "condition_names must differ"),
        ({"condition_std": [1.0, 0.0]}, r"condition_std must be finite and above 0, got \[1.0, 0.0\]"),
        ({"condition_mean": [1.0, float("nan")]}, "condition_mean must be finite"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**(ABOUT | overrides))


@pytest.mark.parametrize(
    ("condition", "mask", "message"),
    [
        (VECTORS[:, :1], None, r"condition must be \(3, 2\) .* \(brightness, slant\), got shape \(3, 1\)"),
        (VECTORS[:2], None, r"condition must be \(3, 2\)"),
        (VECTORS.long(), None, "condition must be .* of torch.int64"),
        (VECTORS.where(MASK[:, None], torch.nan), None, "condition must be finite .* in row 2"),
        (VECTORS, MASK[:2], r"condition_mask must be \(3,\) booleans"),
        (None, MASK, "condition_mask must be None where there is no condition"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(condition, mask, message):
    model = tiny_model(**ABOUT)
    with pytest.raises(ValueError, match=message):
        model(random_images(model), condition=condition, condition_mask=mask)
    with pytest.raises(ValueError, match=message):
        model.decode(random_latents(model), condition=condition, condition_mask=mask)


def test_the_pipeline_takes_conditions_saves_them_and_inverts(tmp_path):
    pipe = condition_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    calls = [
        p([1, 2], condition=VECTORS[:2], generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, loaded)
    ]
    assert calls[0].equal(calls[1])
    one = pipe([1, 2], num_images_per_label=2, condition=[11.0, -3.5], latents=random_latents(pipe.transformer, 4))
    assert len(one.images) == 4
    assert len(pipe(condition=VECTORS.numpy(), num_images_per_label=2).images) == 6
    images = random_images(pipe.transformer, 2)
    latents = pipe.invert(images, condition=[11.0, -3.5])
    again = pipe(latents=latents, condition=VECTORS[[0, 0]], denoising_strength=0, output_type="latent").images
    torch.testing.assert_close(again, images, atol=1e-4, rtol=0)
    assert not pipe.invert(images).allclose(latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": [1.0]}, r"condition must have condition_dim=2 numbers an image, got \(1,\)"),
        ({"condition": [1.0, float("nan")]}, "condition must be finite"),
        ({"class_labels": [1, 2], "condition": VECTORS}, "one for each of 2 labels, got 3"),
    ],
)
def test_the_pipeline_refuses_conditions_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        condition_pipeline()(**arguments)


def test_a_pipeline_without_a_condition_takes_none():
    pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32))
    with pytest.raises(ValueError, match="condition must be None for a model without one"):
        pipe(condition=[1.0])


def test_the_score_of_denoising_is_that_of_the_condition():
    pipe, images = condition_pipeline(), random_images(tiny_model(dtype=torch.float32))
    vectors = VECTORS.float()
    found = pipe.denoise(images, None, 1.0, condition=vectors)
    images.requires_grad_()
    (score,) = torch.autograd.grad(pipe.transformer.log_prob(images, condition=vectors).sum(), images)
    torch.testing.assert_close(found, (images + 0.1**2 * score).detach())


def test_a_condition_comes_and_goes_without_changing_the_density():
    plain = tiny_model()
    images = random_images(plain)
    given, adaptation = adapt(plain, **ABOUT)
    for arguments in ({}, {"condition": VECTORS, "condition_mask": MASK}):
        torch.testing.assert_close(given.log_prob(images, **arguments), plain.log_prob(images), rtol=0, atol=1e-9)
    assert adaptation.count("fresh") == 15
    model = tiny_model(**ABOUT)
    without, _ = adapt(model, condition_dim=0, condition_names=None, condition_mean=None, condition_std=None)
    torch.testing.assert_close(without.log_prob(images), model.log_prob(images), rtol=0, atol=1e-9)
    other, _ = adapt(model, condition_mean=[9.0, 1.0], condition_std=[1.0, 4.0])
    expected = model.log_prob(images, condition=VECTORS)
    torch.testing.assert_close(other.log_prob(images, condition=VECTORS), expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="the condition cannot change from .*'slant'.* to .*'width'"):
        adapt(model, condition_names=["brightness", "width"])


def test_a_condition_without_mean_and_deviation_is_taken_as_it_is():
    given = torch.tensor([[2.0, -3.0]])
    images = torch.zeros(1, 1, 8, 8)
    assert checked_condition(given, None, images, tiny_config(condition_dim=2)).equal(given)
    scaled = tiny_config(condition_dim=2, condition_std=[2.0, 3.0])
    assert checked_condition(given, None, images, scaled).equal(torch.tensor([[1.0, -1.0]]))


def test_no_labels_are_for_no_images_alone():
    assert class_ids([], tiny_config(), 0) == []
    for num_images in (None, 1):
        with pytest.raises(ValueError, match="at least one class, got an empty list"):
            class_ids([], tiny_config(), num_images)


def test_what_a_call_is_given_goes_to_the_device_of_the_model():
    pipe = condition_pipeline(num_classes=4)
    latents = random_latents(pipe.transformer)
    pipe.transformer.to("meta")  # the one other device that is everywhere
    for prepared in (
        pipe.prepare_condition(VECTORS.tolist()),
        pipe.prepare_class_labels([0, 1, 2]),
        pipe.prepare_latents(3, latents=latents),
        pipe.prepare_latents(3),
    ):
        assert prepared.device.type == "meta"
        assert len(prepared) == 3
