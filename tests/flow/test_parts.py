"""The parts of a block, one at a time: the eager attention, the projections in float32, and what counts as hooked."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn

from tarflow_hf.flow.blocks import TarFlowProjection, eager_attention_forward
from tarflow_hf.flow.kv_cache import KeyValueCache, span
from tarflow_hf.flow.offloading import is_hooked


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_eager_attention_is_causal_for_every_number_of_tokens(tokens):
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 2, 4, tokens, 8, generator=generator, dtype=torch.float64)
    attended, weights = eager_attention_forward(nn.Module(), query, key, value, None, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)
    assert weights.triu(1).eq(0).all()


def test_one_query_sees_all_keys_that_are_kept():
    query, key, value = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), torch.arange(8.0).view(1, 1, 4, 2)
    attended, weights = eager_attention_forward(nn.Module(), query, key, value, None, scaling=1.0)
    assert weights.flatten().tolist() == [0.25] * 4
    assert attended.flatten().tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (1, 3), (2, 6)])
def test_a_cached_token_may_see_itself_and_what_stands_before_it(start, stop):
    cache = KeyValueCache(6)
    cache.update(torch.zeros(1, 2, 6, 4), 0, 0)
    mask, whole = cache.mask(start, stop - start), cache.mask(torch.tensor(start), stop - start)
    visible = [[key <= query for key in range(6)] for query in range(start, stop)]
    assert whole.eq(0).tolist() == whole.isneginf().logical_not().tolist() == visible
    assert mask is None if stop - start == 1 else mask.equal(whole[:, :stop])


@pytest.mark.parametrize("head_dim", [1, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_of_fixed_shape_stores_what_a_growing_one_does(rows, head_dim):
    generator = torch.Generator().manual_seed(rows)
    grown, fixed = KeyValueCache(6), KeyValueCache.zeros(2, 2, 3, num_tokens=6, head_dim=head_dim, like=torch.zeros(1))
    grown.update(torch.zeros(2, 6, 1, head_dim), 0, 0)
    grown.update(torch.zeros(2, 6, 1, head_dim), 1, 0)
    for start, count in ((0, 2), (2, 3), (1, 3), (4, 1)):
        for layer in range(2):
            new = torch.randn(rows, 6, count, head_dim, generator=generator)
            read = grown.update(new, layer, start)
            whole = fixed.update(new, layer, torch.tensor(start))
            assert whole.shape == (rows, 6, 6, head_dim)
            assert whole[:, :, : start + count].equal(read)
    assert fixed.layers[0][rows:].eq(0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_span_is_the_same_by_number_and_by_tensor(dim):
    values = torch.arange(20).view(4, 5)
    for start in range(3):
        assert span(values, torch.tensor(start), 2, dim).equal(span(values, start, 2, dim))
    assert span(values, 1, 2, dim)._is_view()
    assert not span(values, torch.tensor(1), 2, dim)._is_view()


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [torch.float64, torch.float32, torch.bfloat16])
def test_a_projection_computes_in_float32_or_wider(weights, inputs):
    torch.manual_seed(0)
    projection = TarFlowProjection(5, 3).to(weights)
    numbers = torch.randn(4, 5, dtype=torch.float64).to(inputs)
    expected = F.linear(numbers.double(), projection.weight.double(), projection.bias.double())
    found = projection(numbers)
    assert found.dtype == (torch.float64 if torch.float64 in (weights, inputs) else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12 if found.dtype == torch.float64 else 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert projection(numbers).equal(found)


@pytest.mark.parametrize("kind", ["before", "after", "replaced"])
def test_any_one_hook_on_any_one_part_counts(kind):
    model = tiny_model()
    assert not is_hooked(model)
    part = model.blocks[1].layers[0].mlp.up_proj
    if kind == "before":
        part.register_forward_pre_hook(lambda module, inputs: None)
    elif kind == "after":
        part.register_forward_hook(lambda module, inputs, output: None)
    else:
        part.forward = part.forward
    assert is_hooked(model)


def test_projections_begin_within_the_root_of_their_inputs():
    projection = TarFlowProjection(16, 4000)
    for parameter in (projection.weight, projection.bias):
        assert -0.25 <= parameter.min() < -0.24
        assert 0.24 < parameter.max() <= 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_makes_a_cache_with_room_for_all_its_tokens(dtype):
    model = tiny_model(dtype=dtype, head_dim=4, layers_per_block=[1, 3, 2])
    cache = model.blocks[1].zero_cache(5)
    heads, width = model.config.num_attention_heads, model.config.head_dim
    assert [layer.shape for layer in cache.layers] == [(5, 2 * heads, model.config.num_tokens, width)] * 3
    assert all(layer.dtype == dtype and layer.eq(0).all() for layer in cache.layers)


def test_eager_attention_gives_the_type_of_its_queries_under_autocast():
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = eager_attention_forward(nn.Module(), query, key, value, None, scaling=0.3)
    assert weights.dtype == torch.float32
