"""The parts of a block: attention of narrow numbers and empty batches, what conditions a block, its cache."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from tarflow_hf import TarFlowModel
from tarflow_hf.flow.blocks import TarFlowConditionEmbedding, eager_attention_forward


def test_eager_attention_takes_the_softmax_of_narrow_numbers_in_float32():
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    query, module = query * 6, torch.nn.Module()
    module.is_causal = False
    found, weights = eager_attention_forward(module, query, key, value, None, scaling=0.5)
    logits = (query @ key.transpose(2, 3) * 0.5).float()
    assert weights.dtype == found.dtype == torch.bfloat16
    assert torch.equal(weights, logits.softmax(-1).bfloat16())
    assert torch.equal(found, (weights @ value).transpose(1, 2))


def test_of_one_query_eager_attention_sees_every_key():
    query = torch.randn(1, 2, 1, 4)
    key = value = torch.randn(1, 2, 3, 4)
    _, weights = eager_attention_forward(torch.nn.Module(), query, key, value, None, scaling=1.0)
    assert (weights > 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_empty_batch_gives_empty_predictions_that_take_gradients(implementation):
    model = tiny_model(condition_dim=2)
    model.set_attn_implementation(implementation)
    block, patches = model.blocks[1], torch.zeros(0, 5, 4, dtype=torch.float64)
    condition = block.condition(torch.zeros(0, dtype=torch.long), vector=torch.zeros(0, 2, dtype=torch.float64))
    shift, log_scale = block(patches, condition)
    assert shift.shape == log_scale.shape == (0, 5, 4)
    attention = block.layers[0].attention
    result = attention(torch.zeros(0, 5, 16, dtype=torch.float64), None, None, None, 0)
    assert result.shape == (0, 5, 16)
    result.sum().backward()
    assert not attention.out_proj.weight.grad.any()


def test_blocks_turn_around_one_by_one():
    blocks = TarFlowModel(tiny_config(num_blocks=6, layers_per_block=1)).blocks
    assert [block.reverse for block in blocks] == [False, True, False, True, False, True]


def test_a_block_that_is_told_nothing_has_no_embedding():
    model = TarFlowModel(tiny_config(num_classes=3, condition_dim=2, num_conditioned_blocks=1))
    assert [block.is_conditioned for block in model.blocks] == [False, False, True]
    for block in model.blocks[:2]:
        assert block.class_embedding is None
        assert block.condition_embedding is None
        assert block.condition(torch.tensor([0]), vector=torch.zeros(1, 2)) is None


def test_each_part_of_a_condition_may_be_left_out():
    model = tiny_model(num_classes=3, condition_dim=2, noise_conditioning=True)
    block = model.blocks[0]
    labels = torch.tensor([2, -1])
    level = torch.tensor([0.1, 0.2], dtype=torch.float64)
    vector = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], dtype=torch.float64)
    parts = block.class_embedding(labels), block.noise_embedding(level), block.condition_embedding(vector)
    assert block.condition(None) is None
    for given, expected in (
        ((labels, None, None), parts[0]),
        ((None, level, None), parts[1]),
        ((None, None, vector), parts[2]),
        ((labels, level, vector), parts[0] + parts[1] + parts[2]),
    ):
        torch.testing.assert_close(block.condition(*given), expected)
    bare = tiny_model(num_classes=0).blocks[0]
    assert bare.condition(labels, level, vector) is None


def test_a_condition_is_read_in_the_type_of_the_weights_and_told_in_that_of_the_computation():
    embedding = TarFlowConditionEmbedding(2, 8)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    given = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    assert embedding(given.double()).dtype == torch.float32
    assert torch.equal(embedding(given)[1, 0], embedding.no_condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(given).dtype == torch.bfloat16
    assert embedding.bfloat16()(given).dtype == torch.bfloat16


def test_a_cache_of_zeros_has_a_slot_for_each_token_of_each_head():
    config = tiny_config(image_size=(8, 12), hidden_size=16, head_dim=8)
    cache = TarFlowModel(config).blocks[1].zero_cache(3)
    assert [tuple(layer.shape) for layer in cache.layers] == [(3, 2 * 2, 24, 8)] * 2
    assert TarFlowModel(config).blocks[0].zero_cache(1).layers[0].shape == (1, 4, 24, 8)
