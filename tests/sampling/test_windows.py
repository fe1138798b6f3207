"""The choice of the window: wide where it pays, sequential where it does not, and never for long what costs more."""

import math

import pytest
import torch
from conftest import random_latents, tiny_model

from tarflow_hf import Guidance, TarFlowConfig
from tarflow_hf.flow.sampling import windows
from tarflow_hf.flow.sampling.windows import (
    _EXPECTED_CONTRACTION,
    _PATIENCE,
    _PROBE_SHARE,
    _SLOWEST_CONTRACTION,
    AdaptiveWindow,
    token_cost,
)

TOKENS = 200


def play(token_cost, contraction, tolerance=1e-3):
    """Solves a made block whose changes shrink by `contraction` a sweep; its cost in one-token sweeps."""
    chooser = AdaptiveWindow(token_cost, tolerance)
    solved, cost, seen = 0, 0.0, [0] * TOKENS
    while solved < TOKENS:
        width = chooser.width(TOKENS - solved)
        assert 1 <= width <= TOKENS - solved
        cost += 1 + token_cost * (width - 1)
        changes = []
        for token in range(solved, solved + width):
            changes.append(contraction ** seen[token])
            seen[token] += 1
        accepted = 1
        while accepted < width and changes[accepted - 1] <= tolerance:
            accepted += 1
        if width > 1:
            chooser.observe(changes, accepted)
        solved += accepted
    return cost


@pytest.mark.parametrize("contraction", [0.1, 0.3, 0.5])
def test_where_tokens_cost_nothing_the_whole_block_is_solved_at_once(contraction):
    assert play(0.0, contraction) <= math.log(1e-3) / math.log(contraction) + 2


@pytest.mark.parametrize("cost", [0.02, 0.05])
def test_where_tokens_are_cheap_and_the_block_is_easy_windows_pay(cost):
    assert play(cost, 0.2) < 0.6 * TOKENS


@pytest.mark.parametrize("cost", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("contraction", [0.5, 0.8, 0.95, 1.0])
def test_a_hard_block_takes_little_longer_than_sequential_decoding(cost, contraction):
    assert play(cost, contraction) < 1.1 * TOKENS


def test_where_tokens_cost_as_much_as_sweeps_decoding_is_sequential():
    assert play(1.0, 0.1) == TOKENS
    assert play(0.01, 0.1, tolerance=0) == TOKENS


def test_what_is_not_finite_falls_back_to_sequential_decoding():
    chooser = AdaptiveWindow(0.0, 1e-3)
    assert chooser.width(10) == 10
    chooser.observe([math.nan] * 10, 1)
    assert chooser.width(9) == 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_change_is_nothing_to_learn_from(value):
    """Neither as the change before nor as the one after: what contracts is measured between finite ones."""
    chooser = AdaptiveWindow(0.0, 1e-3)
    for changes in ([1.0] * 8, [value] * 8, [1.0] * 8):
        chooser.observe(changes, 0)
    assert chooser.width(8) == 8  # as if nothing had been seen but the last
    assert chooser._log_contractions == []
    chooser.observe([0.5] * 8, 0)
    assert chooser._log_contractions == [math.log(0.5)]


def test_an_infinite_change_anywhere_in_the_window_makes_it_sequential():
    for changes in ([math.inf, 0.0, 0.0], [0.0, 0.0, math.inf]):
        chooser = AdaptiveWindow(0.0, 1e-3)
        chooser.observe(changes, 0)
        assert chooser.width(3) == 1


def test_a_token_costs_more_in_a_larger_batch_and_on_a_cpu():
    def cost(rows, device="cpu", dtype=torch.float32):
        return token_cost(TarFlowConfig(hidden_size=768), rows=rows, dtype=dtype, device=torch.device(device))

    assert 0 < cost(1) < cost(8) < cost(64) < 1
    assert cost(8, "cuda", torch.bfloat16) < cost(8, "cuda") < cost(8)


@pytest.mark.parametrize("batch", [1, 8])
def test_the_chosen_windows_stay_within_the_tolerance(batch):
    model = tiny_model(image_size=16)
    latents = random_latents(model, batch)
    labels = torch.arange(batch) % 4
    expected = model.decode(latents, labels, guidance=Guidance(2.0), window=1)
    decoded = model.decode(latents, labels, guidance=Guidance(2.0), tolerance=1e-4)
    assert (decoded - expected).abs().max() < 5e-3


def test_a_width_that_a_sweep_does_not_take_is_not_reckoned_with():
    """Of eight tokens four are taken: at the expected contraction of 0.3 they need six sweeps, which do not pay."""
    assert AdaptiveWindow(0.0, 1e-3).width(8) == 8
    assert AdaptiveWindow(0.0, 1e-3, lambda wanted: min(wanted, 4)).width(8) == 1


def test_tokens_solved_in_passing_count_among_those_before_the_next_try():
    plain, passing = AdaptiveWindow(0.5, 1e-6), AdaptiveWindow(0.5, 1e-6)
    sizes = []
    for chooser, solved in ((plain, 1), (passing, 4)):
        assert chooser.width(1000) == 1
        before = chooser._sequential_sweeps_left
        for _ in range(3):
            assert chooser.width(1000) == 1
            chooser.skip(solved - 1)
        sizes.append(before - chooser._sequential_sweeps_left)
    assert sizes == [3, 12]


@pytest.mark.parametrize("cost", [0.1, 0.5])
def test_a_try_that_does_not_pay_is_followed_by_so_many_sweeps_that_it_costs_a_share_of_them(cost):
    chooser = AdaptiveWindow(cost, 1e-6)
    assert chooser.width(1000) == 1
    widest = round(3 / cost)
    assert chooser._sequential_sweeps_left == math.ceil(2 * (1 + cost * (widest - 1)) / _PROBE_SHARE)


def test_what_contracts_is_measured_on_the_tokens_of_both_sweeps():
    for before, after in (([1.0] * 4, [0.5] * 2), ([1.0] * 2, [0.5] * 4)):
        chooser = AdaptiveWindow(0.0, 1e-3)
        chooser.observe(before, 0)
        chooser.observe(after, 0)
        assert chooser._log_contractions == [math.log(0.5)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("mlp_ratio", "rows"), [(4, 1), (2, 6)])
def test_the_estimate_is_a_fixed_rule_so_that_the_same_call_gives_the_same_images(
    monkeypatch, compiled, mlp_ratio, rows
):
    config, threads = TarFlowConfig(hidden_size=128, mlp_ratio=mlp_ratio), torch.get_num_threads()
    weights = (4 + 2 * mlp_ratio) * 128**2

    def cost(device, dtype):
        return token_cost(config, rows=rows, dtype=dtype, device=torch.device(device), compiled=compiled)

    def expected(overhead, bandwidth, rate, elementwise, count, size):
        token = count * (2 * weights / rate + elementwise * 128)
        return token / (overhead + weights * size / bandwidth + token)

    for onednn, rate in ((True, 2.5e11), (False, 1e11)):
        monkeypatch.setattr(windows, "onednn_is_faster", lambda onednn=onednn: onednn)
        rule = (10e-6, 1.2e10, 6e10, 20e-9) if compiled else (55e-6, 2.9e10, rate, 12e-9)
        assert cost("cpu", torch.float32) == expected(*rule, math.ceil(rows / threads), 4)
    assert cost("cuda", torch.float32) == expected(100e-6, 2e12, 4e13, 1e-12, rows, 4)
    assert cost("cuda", torch.bfloat16) == expected(100e-6, 2e12, 3e14, 1e-12, rows, 2)


def sweeps_to_go(change, contraction, tolerance=1e-3):
    """s with change r^(s - 1) = tolerance: the sweep that shows the last change, and those that shrink it."""
    return math.log(tolerance / change) / math.log(contraction) + 1


def test_the_sweeps_to_go_follow_from_the_last_change_and_the_mean_contraction():
    chooser = AdaptiveWindow(0.0, 1e-3)
    assert chooser._sweeps_to_go() == pytest.approx(sweeps_to_go(1.0, _EXPECTED_CONTRACTION))
    chooser.observe([0.3, 0.3], 0)
    assert chooser._sweeps_to_go() == pytest.approx(sweeps_to_go(0.3, _EXPECTED_CONTRACTION))
    chooser.observe([0.15, 0.15], 0)
    assert chooser._sweeps_to_go() == pytest.approx(sweeps_to_go(0.15, 0.5))
    chooser.observe([0.15 / 8, 0.15 / 8], 0)
    assert chooser._sweeps_to_go() == pytest.approx(sweeps_to_go(0.15 / 8, math.sqrt(0.5 / 8)))
    chooser.observe([1e-9, 1e-3], 0)  # the largest counts, and at the tolerance one sweep is left
    assert chooser._sweeps_to_go() == 1


def test_a_block_that_hardly_contracts_is_reckoned_with_the_slowest_contraction():
    chooser = AdaptiveWindow(0.0, 1e-3)
    chooser.observe([1.0], 0)
    chooser.observe([0.999], 0)
    assert chooser._sweeps_to_go() == pytest.approx(sweeps_to_go(0.999, _SLOWEST_CONTRACTION))


def test_a_try_comes_when_the_sequential_sweeps_before_it_are_over():
    chooser = AdaptiveWindow(0.5, 1e-6)
    chooser.width(1000)
    count = chooser._sequential_sweeps_left
    left = []
    for _ in range(count + 1):
        assert chooser.width(1000) == 1
        left.append(chooser._sequential_sweeps_left)
    assert left == [*range(count - 1, -1, -1), count]
    chooser.skip(count + 5)
    assert chooser._sequential_sweeps_left == 0


def test_a_token_dearer_than_all_else_leaves_a_window_of_one():
    chooser = AdaptiveWindow(10.0, 1e-3)
    assert chooser.width(5) == 1
    assert chooser._sequential_sweeps_left == math.ceil(2 / _PROBE_SHARE)


def test_a_window_that_just_does_not_pay_is_none():
    cost = 2 * _PATIENCE - 1
    assert 1 + cost == 2 * _PATIENCE  # without rounding
    for dearer, width in ((0.0, 1), (-0.01, 2)):
        chooser = AdaptiveWindow(cost + dearer, 1e-3)
        chooser.observe([1e-3, 1e-3], 0)  # one sweep to go
        assert chooser.width(2) == width


def test_rows_are_shared_by_the_threads(monkeypatch):
    def cost(rows):
        return token_cost(TarFlowConfig(), rows=rows, dtype=torch.float32, device=torch.device("cpu"))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = [cost(rows) for rows in (1, 2, 3)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [cost(rows) for rows in (3, 6, 7)] == alone
    arguments = {"rows": 3, "dtype": torch.float32, "device": torch.device("cpu")}
    assert cost(3) == token_cost(TarFlowConfig(), compiled=False, **arguments)
