"""One block on its way back: batches in parts, its two branches against separate passes, and what the parts cost."""

from contextlib import contextmanager

import pytest
import torch
from conftest import random_latents, tiny_model

from tarflow_hf import Guidance
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.sampling.branches import Batch, invert_block, invert_in_parts, predictor
from tarflow_hf.flow.sampling.compiled import CompiledSweep

TOLD = {"num_classes": 4, "condition_dim": 2, "noise_conditioning": True}
SOLVER = {"window": 4, "tolerance": 0.0, "token_cost": 0.1}


def batch_of(model, count=3, *, told=True, guess=False):
    """Latents with a class, a noise level and a condition each, the last one without class and condition."""
    latents = random_latents(model, count)
    if not told:
        return Batch(latents, None, None)
    labels = torch.arange(count) % 4
    condition = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels[-1], condition[-1] = -1, torch.nan
    return Batch(latents, labels, torch.linspace(0.1, 0.3, count).double(), condition, latents + 1 if guess else None)


def cache():
    return KeyValueCache(16)


@pytest.mark.parametrize(("parts", "sizes"), [(0, [5]), (1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5)])
@pytest.mark.parametrize("told", [True, False])
def test_a_batch_is_split_with_all_that_belongs_to_its_images(parts, sizes, told):
    batch = batch_of(tiny_model(**TOLD), 5, told=told, guess=True)
    found = batch.split(parts)
    assert [len(part.latents) for part in found] == sizes
    for name in ("latents", "labels", "noise_level", "condition", "guess"):
        values = [getattr(part, name) for part in found]
        if getattr(batch, name) is None:
            assert values == [None] * len(sizes)
        else:
            torch.testing.assert_close(torch.cat(values), getattr(batch, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("told", [True, False])
def test_images_are_taken_with_all_that_belongs_to_them(told):
    batch = batch_of(tiny_model(**TOLD), 5, told=told, guess=True)
    taken = batch.take([3, 0])
    for name in ("latents", "labels", "noise_level", "condition", "guess"):
        values = getattr(batch, name)
        found = getattr(taken, name)
        assert found is None if values is None else torch.equal(found, values[[3, 0]]), name


def separate(block, batch, labels, condition, tokens, start, scale=None):
    """A branch as a pass of its own, over all tokens before."""
    told = block.condition(labels, batch.noise_level, condition)
    query_scale = None if scale is None else tokens.new_full((len(tokens), 1, 1, 1), scale)
    shift, log_scale = block(tokens, told, query_scale=query_scale)
    return shift[:, start:], log_scale[:, start:]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("start", [0, 3])
def test_without_guidance_the_labelled_branch_runs_alone(told, start):
    model = tiny_model(**(TOLD if told else {"num_classes": 0}))
    block, batch = model.blocks[1], batch_of(model, told=told)
    predict = predictor(block, batch, None, cache())
    assert (predict.guidance, predict.weights, predict.query_scale) == (None, None, None)
    tokens = batch.latents[:, :9]
    predict(tokens[:, :start], 0) if start else None
    shift, log_scale = predict(tokens[:, start:], start)
    wanted = separate(block, batch, batch.labels, batch.condition, tokens, start)
    torch.testing.assert_close((shift, log_scale), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("start", [0, 3])
def test_both_branches_run_as_one_batch(temperature, schedule, told, start):
    model = tiny_model(**(TOLD if told else {"num_classes": 0}))
    block, batch = model.blocks[1], batch_of(model, told=told)
    guidance = Guidance(2.5, schedule, temperature)
    predict = predictor(block, batch, guidance, cache())
    tokens = batch.latents[:, :9]
    predict(tokens[:, :start], 0) if start else None
    found = predict(tokens[:, start:], start)
    labelled = separate(block, batch, batch.labels, batch.condition, tokens, start)
    none = None if not told else torch.full((3,), -1)
    unconditioned = None if not told else torch.full((3, 2), torch.nan, dtype=torch.float64)
    scale = None if temperature == 1 else 1 / temperature
    unlabelled = separate(block, batch, none, unconditioned, tokens, start, scale)
    weights = guidance.weights(start + 1, 10, 16, dtype=torch.float64)
    torch.testing.assert_close(found, guidance.combine(labelled, unlabelled, weights), rtol=0, atol=1e-12)
    assert (predict.query_scale is None) is (temperature == 1)


@pytest.mark.parametrize("guidance", [None, Guidance(1.5)])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_block_is_solved_for_what_it_encodes(guidance, compiled):
    model = tiny_model(**TOLD)
    block, batch = model.blocks[0], batch_of(model)
    torch._dynamo.reset()
    sweep = CompiledSweep({"backend": "eager"}) if compiled else None
    solved, sweeps = invert_block(block, batch, guidance, cache(), sweep, **SOLVER)
    if guidance is None:
        told = block.condition(batch.labels, batch.noise_level, batch.condition)
        shift, log_scale = block(solved[:, :-1], told)
        encoded = torch.cat([solved[:, :1], (solved[:, 1:] - shift) * (-log_scale).exp()], dim=1)
        torch.testing.assert_close(encoded, batch.latents, rtol=0, atol=1e-10)
    one_by_one, _ = invert_block(block, batch, guidance, cache(), window=1, tolerance=0.0, token_cost=0.1)
    torch.testing.assert_close(solved, one_by_one, rtol=0, atol=1e-10)
    assert 1 <= sweeps <= 16


def test_a_guess_that_is_the_answer_saves_sweeps():
    model = tiny_model()
    block, latents = model.blocks[0], random_latents(model, 2)
    labels = torch.tensor([0, 1])
    solved, sweeps = invert_block(block, Batch(latents, labels, None), None, cache(), **SOLVER | {"window": 16})
    known = Batch(latents, labels, None, guess=solved)
    again, fewer = invert_block(block, known, None, cache(), **SOLVER | {"window": 16})
    torch.testing.assert_close(again, solved, rtol=0, atol=1e-12)
    assert fewer < sweeps


@pytest.mark.parametrize(("guidance", "branches"), [(None, 1), (Guidance(1.5), 2)])
@pytest.mark.parametrize(("most", "sizes"), [(2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (9, [5])])
def test_parts_are_as_large_as_they_may_be_and_cost_both_branches(guidance, branches, most, sizes):
    model = tiny_model(**TOLD)
    block, batch = model.blocks[1], batch_of(model, 5)
    costs, contexts = [], []

    def token_cost(*, rows):
        costs.append(rows)
        return 0.1

    @contextmanager
    def gradient_free():
        contexts.append(True)
        with torch.no_grad():
            yield

    options = {"window": 4, "tolerance": 0.0}
    found, sweeps = invert_in_parts(
        block, batch, guidance, cache(), most=most, gradient_free=gradient_free, token_cost=token_cost, **options
    )
    parts = [
        invert_block(block, part, guidance, cache(), token_cost=0.1, **options) for part in batch.split(len(sizes))
    ]
    assert costs == [branches * size for size in sizes]
    assert len(contexts) == len(sizes)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.cat([tokens for tokens, _ in parts]).detach(), rtol=0, atol=1e-12)
    assert sweeps == max(count for _, count in parts)


def test_the_sweeps_of_parts_are_the_most_of_them():
    """An image that is the same everywhere is solved sooner than one that is not."""
    model = tiny_model(num_classes=0)
    for parameter in model.blocks[0].parameters():
        parameter.data *= 0.3
    latents = random_latents(model, 2)
    latents[1] *= 1e-4
    options = {"window": 16, "tolerance": 1e-6}
    single = [
        invert_block(model.blocks[0], Batch(latents[[index]], None, None), None, cache(), token_cost=0.1, **options)[1]
        for index in (0, 1)
    ]
    assert single[0] > single[1]
    _, sweeps = invert_in_parts(
        model.blocks[0],
        Batch(latents, None, None),
        None,
        cache(),
        most=1,
        gradient_free=torch.no_grad,
        token_cost=lambda rows: 0.1,
        **options,
    )
    assert sweeps == single[0]


@torch.no_grad()
def test_compiled_sweeps_have_a_cache_for_both_branches(monkeypatch):
    model = tiny_model(num_classes=4)
    block, made = model.blocks[0], []
    inner = block.zero_cache
    monkeypatch.setattr(block, "zero_cache", lambda rows: made.append(rows) or inner(rows))
    torch._dynamo.reset()
    batch = Batch(random_latents(model, 3), torch.tensor([0, 1, 2]), None)
    for guidance in (None, Guidance(2.0)):
        invert_block(block, batch, guidance, cache(), CompiledSweep({"backend": "eager"}), **SOLVER)
    assert made == [3, 6]
