"""Blocks without the machinery around a module's call: the same numbers, and nothing of a user's is passed over."""

import copy
import functools

import pytest
import torch
from conftest import random_latents, tiny_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface

from tarflow_hf.flow import products
from tarflow_hf.flow.bare import bare
from tarflow_hf.flow.blocks import TarFlowLayer, TarFlowLayerNorm, TarFlowMLP
from tarflow_hf.flow.kv_cache import KeyValueCache


def both(block, called, *, dtype=torch.float64, query_scale=None):
    """What a block and what stands for it predict, in windows of two tokens behind a cache and one behind that."""
    patches = random_latents(tiny_model(), 2)[:, :5].to(torch.promote_types(dtype, torch.float32))
    found = []
    for module in (block, called):
        cache, parts = KeyValueCache(16), []
        for start, stop in ((0, 2), (2, 4), (4, 5)):
            given = {"start": start, "query_scale": query_scale, "past_key_values": cache}
            parts.append(torch.cat(module(patches[:, start:stop], **given), dim=-1))
        found.append(torch.cat(parts, dim=1))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changed", [{}, {"volume_preserving": True}, {"num_classes": 3, "condition_dim": 2}])
def test_it_computes_what_the_block_does_to_the_last_bit(dtype, attention, changed):
    model = tiny_model(**changed).to(dtype)
    model.set_attn_implementation(attention)
    scale = torch.full((2, 1, 1, 1), 0.7, dtype=torch.promote_types(dtype, torch.float32))
    for block in model.blocks:
        assert bare(block, 2) is not block
        with torch.inference_mode():
            expected, found = both(block, bare(block, 2), dtype=dtype, query_scale=scale)
        assert torch.equal(found, expected)


def test_under_autocast_too():
    block = tiny_model().float().blocks[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = both(block, bare(block, 2), dtype=torch.float32)
    assert torch.equal(found, expected)


def test_the_stand_in_has_whatever_the_module_has():
    attention = tiny_model().blocks[0].layers[0].attention
    assert list(bare(attention, 2).parameters()) == list(attention.parameters())
    assert not hasattr(bare(attention, 2), "no_such_name")


def test_attention_functions_of_a_user_are_called():
    seen = []

    def counted(module, query, key, value, attention_mask, scaling, **kwargs):
        module.seen = True
        seen.append((module.layer_idx, next(module.parameters()).dtype))
        weights = (query @ key.mT * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("counted", counted)
    model = tiny_model()
    model.set_attn_implementation("counted")
    model.decode(random_latents(model, 1), window=1)
    assert all(layer.attention.seen for block in model.blocks for layer in block.layers)
    assert len(seen) == sum(len(block.layers) for block in model.blocks) * 15
    assert set(seen) == {(index, torch.float64) for index in range(max(len(block.layers) for block in model.blocks))}


def hooked(model, seen):
    model.blocks[0].layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))


def replaced(model, seen):
    class Counted(nn.Linear):
        def forward(self, inputs):
            seen.append(inputs.shape[1])
            return super().forward(inputs)

    mlp = model.blocks[0].layers[0].mlp
    counted = Counted(mlp.up_proj.in_features, mlp.up_proj.out_features, dtype=torch.float64)
    counted.load_state_dict(mlp.up_proj.state_dict())
    mlp.up_proj = counted


def compiled(model, seen):
    def backend(graph, inputs):
        def run(*args):
            seen.append(1)
            return graph.forward(*args)

        return run

    model.blocks[0].layers[0].mlp.compile(backend=backend)


def patched(model, seen):
    mlp = model.blocks[0].layers[0].mlp

    class Counted(type(mlp)):
        def forward(self, hidden_states):
            seen.append(hidden_states.shape[1])
            return super().forward(hidden_states)

    mlp.__class__ = Counted


@pytest.mark.parametrize("change", [hooked, replaced, compiled, patched])
def test_what_a_user_put_into_a_block_is_called_for_each_token(change):
    model, seen = tiny_model(), []
    expected = model.decode(random_latents(model, 1), window=1)
    change(model, seen)
    found = model.decode(random_latents(model, 1), window=1)
    assert seen == [1] * 15
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_hooks_of_all_modules_are_called():
    model, seen = tiny_model(), []
    with register_module_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__)):
        model.decode(random_latents(model, 1), window=1)
    assert seen.count("TarFlowMLP") == sum(len(block.layers) for block in model.blocks) * 15


@pytest.mark.parametrize("kind", [TarFlowMLP, TarFlowLayer, TarFlowLayerNorm])
@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_set_on_a_class_is_called(monkeypatch, kind, name, wrapped):
    model, seen = tiny_model(), []
    model.decode(random_latents(model, 1), window=1)
    before = getattr(kind, name)

    def counted(self, *args, **kwargs):
        seen.append(type(self))
        return before(self, *args, **kwargs)

    monkeypatch.setattr(kind, name, functools.wraps(before)(counted) if wrapped else counted)
    model.decode(random_latents(model, 1), window=1)
    per_layer = 2 if kind is TarFlowLayerNorm else 1
    assert seen == [kind] * sum(len(block.layers) for block in model.blocks) * 15 * per_layer


def test_a_stand_in_can_be_copied():
    block = tiny_model().blocks[0]
    copied = copy.deepcopy(bare(block, 2))
    with torch.inference_mode():
        expected, found = both(block, copied)
    assert torch.equal(found, expected)


def test_weights_that_change_between_calls_are_seen():
    model = tiny_model()
    latents = random_latents(model, 1)
    before = model.decode(latents, window=1)
    with torch.no_grad():
        model.blocks[0].proj_out.bias += 0.1
    assert not torch.allclose(model.decode(latents, window=1), before)


def packed_parts(called):
    return [part for layer in called.layers for part in (layer.mlp.up_proj, layer.attention.qkv_proj)]


@pytest.mark.usefixtures("onednn_chosen")
def test_weights_are_packed_where_many_rows_are_read():
    block = tiny_model(hidden_size=64, head_dim=16, mlp_ratio=4, dtype=torch.float32).blocks[0]
    rows = 2**20 // (64 * 192)
    patches = torch.randn(rows + 1, 3, tiny_model().config.patch_dim, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        few, many = bare(block, rows), bare(block, rows + 1)
        found = torch.cat(many(patches, past_key_values=KeyValueCache(16)), dim=-1)
        expected = torch.cat(block(patches, past_key_values=KeyValueCache(16)), dim=-1)
    kinds = [type(part).__name__ for part in packed_parts(few)]
    assert kinds == ["PackedLinear", "_BareLinear"] * len(block.layers)
    assert all(isinstance(part, products.PackedLinear) for part in packed_parts(many))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert not any(isinstance(part, products.PackedLinear) for part in packed_parts(bare(block, rows + 1)))
