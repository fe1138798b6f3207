"""Class and condition told to the blocks next to the noise alone: the same as silent vectors in the others."""

import pytest
import torch
from conftest import random_images, random_latents, seeded, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError

from tarflow_hf import Guidance, TarFlowConfig, TarFlowPipeline
from tarflow_hf.conversion import convert_reference_checkpoint, reference_state_dict
from tarflow_hf.training.adaptation import adapt_to

BOTH = {"num_classes": 4, "condition_dim": 2}
LABELS = torch.tensor([0, 3, -1])
VECTORS = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def silenced(model):
    """The model with all blocks told, and vectors of zeros in those that were not."""
    config = tiny_config(**BOTH | {"num_blocks": 3, "layers_per_block": 1})
    whole = type(model)(config).double().eval()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in whole.state_dict().items()}
    whole.load_state_dict(zeros | model.state_dict())
    return whole


@pytest.fixture
def model():
    return tiny_model(num_conditioned_blocks=1, num_blocks=3, layers_per_block=1, **BOTH)


@pytest.mark.parametrize("count", [None, 1, 2, 3])
def test_the_blocks_next_to_the_noise_are_told(count):
    model = tiny_model(num_conditioned_blocks=count, num_blocks=3, layers_per_block=1, **BOTH)
    told = [block.is_conditioned for block in model.blocks]
    assert told == [index >= 3 - (count or 3) for index in range(3)]
    assert told == [block.class_embedding is not None for block in model.blocks]
    assert told == [block.condition_embedding is not None for block in model.blocks]


def test_blocks_that_are_told_nothing_are_those_with_silent_vectors(model):
    whole, images, latents = silenced(model), random_images(model), random_latents(model)
    expected = whole.log_prob(images, LABELS, None, VECTORS)
    torch.testing.assert_close(model.log_prob(images, LABELS, None, VECTORS), expected, rtol=0, atol=1e-10)
    settings = {"condition": VECTORS, "guidance": Guidance(3.0), "tolerance": 0}
    decoded, wanted = model.decode(latents, LABELS, **settings), whole.decode(latents, LABELS, **settings)
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=1e-10)
    assert not decoded.equal(model.decode(latents, LABELS, condition=VECTORS, tolerance=0))


@pytest.mark.parametrize(("temperature", "branches"), [(1.0, {2: 2, 1: 1, 0: 1}), (0.5, {2: 2, 1: 2, 0: 2})])
def test_guidance_costs_a_second_branch_only_where_it_can_act(model, temperature, branches):
    seen = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: len(inputs[0]) // 3}))
    model.decode(random_latents(model), LABELS, guidance=Guidance(2.0, attention_temperature=temperature))
    assert seen == branches


def test_a_pipeline_saves_it_loads_it_and_inverts(model, tmp_path):
    pipe = TarFlowPipeline(transformer=model.float())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.config.num_conditioned_blocks == 1
    call = {"condition": VECTORS[:2].tolist(), "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe([0, 3], generator=seeded(0, 1), **call).images
    assert loaded([0, 3], generator=seeded(0, 1), **call).images.equal(images)


def test_the_configuration_says_it_only_where_it_says_something():
    assert "num_conditioned_blocks" not in tiny_config().to_dict()
    config = tiny_config(num_conditioned_blocks=2)
    assert TarFlowConfig.from_dict(config.to_dict()).num_conditioned_blocks == 2
    for count in (0, -1, config.num_blocks + 1):
        with pytest.raises(StrictDataclassClassValidationError, match="num_conditioned_blocks must be 1"):
            tiny_config(num_conditioned_blocks=count)


def test_classes_and_conditions_come_change_and_go_in_the_blocks_that_are_told(model):
    images = random_images(model)
    names = {index: name for index, name in enumerate("ab")}
    other = tiny_config(
        num_conditioned_blocks=1, num_blocks=3, layers_per_block=1, num_classes=2, id2label=names, condition_dim=0
    )
    changed, _ = adapt_to(model, other)
    alone, _ = adapt_to(model, tiny_config(num_conditioned_blocks=1, num_blocks=3, layers_per_block=1, num_classes=0))
    expected = model.log_prob(images)
    torch.testing.assert_close(changed.log_prob(images), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.log_prob(images), expected, rtol=0, atol=1e-10)
    back, _ = adapt_to(alone, model.config)
    torch.testing.assert_close(back.log_prob(images, LABELS, None, VECTORS), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="num_conditioned_blocks cannot change from 1 to None: a block that was not"):
        adapt_to(model, tiny_config(num_blocks=3, layers_per_block=1, **BOTH))


def test_in_the_authors_format_the_other_blocks_have_silent_vectors(tmp_path):
    sizes = {"num_channels": 1, "hidden_size": 64, "head_dim": 64, "num_blocks": 2, "layers_per_block": 1}
    model = tiny_model(num_classes=4, num_conditioned_blocks=1, image_size=8, dtype=torch.float32, **sizes)
    torch.save(reference_state_dict(model), tmp_path / "cond_model_2_64_2_1_0.10.pth")
    converted = convert_reference_checkpoint(tmp_path / "cond_model_2_64_2_1_0.10.pth", image_size=8, num_channels=1)
    images = random_images(model)
    assert [block.is_conditioned for block in converted.blocks] == [True, True]
    torch.testing.assert_close(converted.log_prob(images, LABELS), model.log_prob(images, LABELS), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="the authors' code knows no condition vectors, got condition_dim=2"):
        reference_state_dict(tiny_model(condition_dim=2, **sizes))
