"""How many images fit into what sampling may use: the estimates against what is really kept."""

import pytest
import torch
from conftest import random_latents, tiny_config, tiny_model

from tarflow_hf import Guidance
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.sampling.memory import decoding_max_batch, denoising_chunk_size, working_bytes

CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_keys_and_values_of_the_deepest_block_are_what_decoding_keeps(branches, dtype, monkeypatch):
    kept = []
    update = KeyValueCache.update

    def watched(cache, *args):
        result = update(cache, *args)
        kept.append(sum(layer.numel() * layer.element_size() for layer in cache.layers))
        return result

    monkeypatch.setattr(KeyValueCache, "update", watched)
    model = tiny_model(dtype=dtype, layers_per_block=[1, 3, 2])
    guidance = Guidance(2.0) if branches == 2 else None
    model.decode(random_latents(model, 4), torch.tensor([0, 1, 2, 3]), guidance=guidance)
    assert decoding_max_batch(model.config, branches, dtype, CPU) == 2 * GIB // (max(kept) // 4)


def test_denoising_counts_all_layers_or_those_of_the_deepest_block():
    config = tiny_config(layers_per_block=[1, 3, 2])  # 16 tokens of 16 numbers, MLP twice as wide
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        layer = 16 * 16 * (12 + 2 * 2) * size
        assert denoising_chunk_size(config, dtype, CPU) == 2 * GIB // (layer * 6)
        assert denoising_chunk_size(config, dtype, CPU, recompute=True) == 2 * GIB // (layer * 3)


def test_one_image_is_always_taken():
    config = tiny_config(image_size=1024, hidden_size=1024, head_dim=64, layers_per_block=64)
    assert working_bytes(CPU) == 2 * GIB
    assert decoding_max_batch(config, 2, torch.float32, CPU) == 1
    assert denoising_chunk_size(config, torch.float32, CPU) == 1


def test_half_of_what_a_gpu_has_free_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1001, 4000))
    assert working_bytes(torch.device("cuda")) == 500
