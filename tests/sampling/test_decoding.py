"""The window solver against the plain sequential loop, on a small nonlinear causal system."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tarflow_hf.flow.sampling import solver
from tarflow_hf.flow.sampling.solver import solve

TOKENS, DIM = 12, 3


def causal_system(seed, strength=0.5):
    """A predictor whose row i depends on all rows up to i, and that keeps what it read, as a network with a cache."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(TOKENS, TOKENS, DIM, 2 * DIM, generator=generator, dtype=torch.float64) * strength
    kept = torch.full((2, TOKENS, DIM), float("nan"), dtype=torch.float64)

    def predict(tokens, start):
        stop = start + tokens.shape[1]
        kept[:, start:stop] = tokens
        shift, log_scale = [], []
        for i in range(start, stop):
            output = torch.einsum("btd,tde->be", kept[:, : i + 1], mixing[i, : i + 1]).tanh()
            shift.append(output[:, :DIM])
            log_scale.append(0.5 * output[:, DIM:])
        return torch.stack(shift, 1), torch.stack(log_scale, 1)

    return predict, torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64)


def sequential(predict, latents):
    tokens = latents.clone()
    for i in range(TOKENS - 1):
        shift, log_scale = predict(tokens[:, i : i + 1], i)
        tokens[:, i + 1] = latents[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]
    return tokens


@given(seed=st.integers(0, 999), window=st.one_of(st.none(), st.integers(1, 2 * TOKENS)))
def test_every_window_gives_the_sequential_answer_at_tolerance_zero(seed, window):
    predict, latents = causal_system(seed)
    solved, sweeps = solve(predict, latents, window=window, tolerance=0)
    torch.testing.assert_close(solved, sequential(predict, latents), rtol=0, atol=1e-12)
    assert 1 <= sweeps <= TOKENS - 1


@given(seed=st.integers(0, 999), window=st.one_of(st.none(), st.integers(2, TOKENS)))
def test_the_error_follows_the_tolerance(seed, window):
    predict, latents = causal_system(seed, strength=0.1)
    expected = sequential(predict, latents)
    solved, sweeps = solve(predict, latents, window=window, tolerance=1e-4)
    assert (solved - expected).abs().max() < 1e-3
    assert sweeps <= TOKENS - 1


def test_the_exact_prefix_grows_by_at_least_one_token_a_sweep():
    predict, latents = causal_system(3, strength=2.0)
    expected, starts = sequential(predict, latents), []

    def watched(tokens, start):
        starts.append(start)
        torch.testing.assert_close(tokens[:, 0], expected[:, start], rtol=0, atol=1e-12)
        return predict(tokens, start)

    solve(watched, latents, window=4, tolerance=0)
    assert all(later > earlier for earlier, later in zip(starts, starts[1:], strict=False))


def test_one_token_at_a_time_is_sequential_decoding():
    predict, latents = causal_system(5)
    solved, sweeps = solve(predict, latents, window=1)
    assert solved.equal(sequential(predict, latents))
    assert sweeps == TOKENS - 1


def test_an_easy_system_takes_few_sweeps():
    predict, latents = causal_system(7, strength=0.01)
    _, sweeps = solve(predict, latents, window=TOKENS, tolerance=1e-3)
    assert sweeps <= 4


def test_what_is_not_finite_does_not_stop_the_solver():
    predict, latents = causal_system(9)

    def poisoned(tokens, start):
        shift, log_scale = predict(tokens, start)
        return shift + float("nan"), log_scale

    solved, sweeps = solve(poisoned, latents, window=4)
    assert sweeps < TOKENS - 1
    assert solved[:, 1:].isnan().all()


@pytest.mark.parametrize("window", [None, 2, 4, TOKENS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lost_image_holds_up_no_other(window, value):
    predict, latents = causal_system(9, strength=0.05)
    expected, sweeps = solve(predict, latents, window=window)
    latents[1] = value
    solved, with_lost = solve(predict, latents, window=window)
    torch.testing.assert_close(solved[0], expected[0], rtol=0, atol=1e-2)
    assert not solved[1].isfinite().any()
    assert with_lost <= sweeps


def test_what_is_not_finite_for_a_while_is_solved_in_the_end():
    """A token far into a window may overflow while those before it are not solved yet: none behind it is accepted."""
    predict, latents = causal_system(3, strength=2.0)
    expected = sequential(predict, latents)

    def overflowing(tokens, start):
        shift, log_scale = predict(tokens, start)
        wrong = (tokens - expected[:, start : start + tokens.shape[1]]).abs().amax((0, 2)) > 1e-9
        shift[:, wrong] = float("nan")
        return shift, log_scale

    for window in (2, 5, TOKENS):
        solved, sweeps = solve(overflowing, latents, window=window, tolerance=0)
        torch.testing.assert_close(solved, expected, rtol=0, atol=1e-12)
        assert sweeps == TOKENS - 1


def chain(tokens=TOKENS):
    """A system that is solved token after token: each is its latent and half of the token before."""
    reads = []

    def predict(seen, start):
        reads.append((start, seen.shape[1]))
        return 0.5 * seen, torch.zeros_like(seen)

    return predict, torch.ones(1, tokens, 1, dtype=torch.float64), reads


def test_a_token_is_accepted_where_its_predecessors_changed_by_no_more_than_the_tolerance():
    """Changes of whole numbers: 1 is accepted at tolerance 1, and 0 at tolerance 0, by which nothing has changed."""

    def constant(seen, start):  # every token is its latent, as the first guess says
        return torch.zeros_like(seen), torch.zeros_like(seen)

    def shifted(seen, start):  # every token is its latent and 1, which the first sweep changes and finds
        return torch.ones_like(seen), torch.zeros_like(seen)

    latents = torch.ones(1, TOKENS, 1, dtype=torch.float64)
    assert solve(constant, latents, window=TOKENS, tolerance=0)[1] == 1
    assert solve(shifted, latents, window=TOKENS, tolerance=1)[1] == 1
    assert solve(shifted, latents, window=TOKENS, tolerance=0.999)[1] == 2
    assert solve(shifted, latents, window=TOKENS, tolerance=0)[1] == 2


@pytest.mark.parametrize(("window", "tokens", "sweeps"), [(1, 6, 5), (2, 6, 5), (3, 6, 5), (6, 6, 5), (2, 2, 1)])
def test_sweeps_of_a_chain_are_counted(window, tokens, sweeps):
    """At tolerance 0 each sweep settles one more token, and the window is cut where the tokens end."""
    predict, latents, reads = chain(tokens)
    assert solve(predict, latents, window=window, tolerance=0)[1] == sweeps == len(reads)
    assert reads[0] == (0, min(window, tokens - 1))
    assert max(start + count for start, count in reads) == tokens - 1


def test_the_whole_window_but_its_last_token_decides():
    """Where nothing changes a window of three slides by three: four windows for eleven tokens."""

    def constant(seen, start):
        return torch.zeros_like(seen), torch.zeros_like(seen)

    latents = torch.ones(1, TOKENS, 1, dtype=torch.float64)
    for window, sweeps in ((1, 11), (2, 6), (3, 4), (4, 3), (11, 1)):
        assert solve(constant, latents, window=window, tolerance=0)[1] == sweeps


def test_a_window_of_one_reads_no_number_back(monkeypatch):
    """One token is solved whatever it changed by: no number is waited for, at any position."""
    predict, latents, _ = chain()
    read = []
    monkeypatch.setattr(solver, "_changes", lambda *args: read.append(args) or [0.0])
    solve(predict, latents, window=1)
    assert read == []


def test_latents_are_not_written_to():
    predict, latents = causal_system(11)
    copy = latents.clone()
    solve(predict, latents)
    assert latents.equal(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be None or at least 1, got 0"),
        ({"tolerance": -1e-3}, "tolerance must be a finite number of at least 0, got -0.001"),
        ({"tolerance": float("inf")}, "tolerance must be a finite number of at least 0, got inf"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number of at least 0, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    predict, latents = causal_system(13)
    with pytest.raises(ValueError, match=message):
        solve(predict, latents, **arguments)


def test_a_token_that_is_far_off_is_read_as_it_is_where_none_is_guessed():
    latents = torch.ones(1, 4, 1, dtype=torch.float64)
    latents[0, 1] = 1e20  # beyond what guesses are read as
    tokens, _ = solve(lambda tokens, start: (0.5 * tokens, torch.zeros_like(tokens)), latents, window=1)
    assert tokens.flatten().tolist() == [1.0, 1e20 + 0.5, 1 + 0.5 * (1e20 + 0.5), 1 + 0.5 * (1 + 0.5 * (1e20 + 0.5))]


def test_the_iteration_starts_at_the_guess():
    predict, latents = causal_system(5)
    expected = sequential(predict, latents)
    guess = expected.clone()
    guess[:, 0] = 99.0  # x_0 is known, whatever is guessed
    solved, sweeps = solve(predict, latents, guess=guess, window=TOKENS, tolerance=1e-9)
    torch.testing.assert_close(solved, expected, rtol=0, atol=1e-12)
    assert sweeps == 1
    assert guess[:, 0].eq(99.0).all()


@pytest.mark.parametrize("run", [1, 2, 4])
def test_tokens_that_a_sweep_solves_in_passing_are_told_to_the_chooser(run, monkeypatch):
    class InPassing(solver.Sweep):
        def width(self, wanted, num_tokens):
            return 1

        def __call__(self, predict, tokens, latents, solved, width, wild):
            taken = min(run, TOKENS - solved)
            for place in range(solved, solved + taken):
                super().__call__(predict, tokens, latents, place, 1, wild)
            return taken, None

    skipped = []
    monkeypatch.setattr(solver.AdaptiveWindow, "skip", lambda chooser, tokens: skipped.append(tokens))
    predict, latents = causal_system(5)
    solved, sweeps = solve(predict, latents, sweep=InPassing())
    torch.testing.assert_close(solved, sequential(predict, latents), rtol=0, atol=1e-12)
    assert sweeps == TOKENS - 1
    assert sum(skipped) + len(range(1, TOKENS, run)) == TOKENS - 1
    assert all(skipped)


def test_guesses_that_are_read_are_finite_and_not_too_large_to_square():
    nan, inf = float("nan"), float("inf")
    guesses = torch.tensor([nan, inf, -inf, 2e15, -2e15, 1e15, 5.0], dtype=torch.float64)
    assert solver.readable(guesses).tolist() == [0.0, 1e15, -1e15, 1e15, -1e15, 1e15, 5.0]
    for shape, changed in (((1, 2, 1), True), ((2, 1, 3), False)):
        wild = torch.full(shape, inf)
        assert solver._readable(wild, wild=False) is wild
        assert solver._readable(wild, wild=True).isfinite().all() == changed


def test_what_stays_has_not_changed():
    values = torch.tensor([[[1.0], [float("nan")], [float("inf")]]])
    assert solver.changes(values, values).tolist() == [0.0, 0.0, 0.0]


def test_a_token_lost_in_one_image_changes_by_what_it_does_in_the_others():
    tokens = torch.zeros(2, 3, 1)
    tokens[0, 1] = float("nan")

    def predict(seen, start):
        return torch.tensor([[[float("nan")], [2.0]], [[0.5], [3.0]]]), torch.zeros_like(seen)

    assert solver.Sweep()(predict, tokens, torch.zeros_like(tokens), 1, 2, True) == (1, [0.5, 3.0])


class Recorded(solver.Sweep):
    """Sweeps that write down what they are called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, predict, tokens, latents, solved, width, wild):
        self.calls.append((solved, width, wild))
        return super().__call__(predict, tokens, latents, solved, width, wild)


@pytest.mark.parametrize(
    ("window", "value", "wild"),
    [(None, 1.0, False), (2, 1.0, False), (1, 1.0, False), (None, 1e15, True), (2, 1e16, True), (1, 1e16, False)],
)
def test_guesses_are_looked_at_where_several_are_read_and_one_is_far_off(window, value, wild):
    def constant(seen, start):
        return torch.zeros_like(seen), torch.zeros_like(seen)

    latents = torch.ones(1, TOKENS, 1, dtype=torch.float64)
    latents[0, 5] = value
    sweep = Recorded()
    solve(constant, latents, window=window, sweep=sweep)
    assert {call[2] for call in sweep.calls} == {wild}


@pytest.mark.parametrize(("change", "wild"), [(1e15, True), (1e16, True), (9e14, False)])
def test_guesses_are_looked_at_once_a_change_was_too_large(change, wild):
    """The token in the middle goes far off; the others change by little."""

    def predict(seen, start):
        shift = torch.zeros_like(seen)
        shift[:, max(5 - start, 0) : max(6 - start, 0)] = change
        return shift, torch.zeros_like(seen)

    sweep = Recorded()
    solve(predict, torch.zeros(1, TOKENS, 1, dtype=torch.float64), window=TOKENS, tolerance=0, sweep=sweep)
    assert [call[2] for call in sweep.calls] == [False] + [wild] * (len(sweep.calls) - 1)
    assert len(sweep.calls) > 1


def test_by_default_a_token_may_change_by_a_thousandth_and_costs_nothing():
    def shifted(by):
        return lambda seen, start: (torch.full_like(seen, by), torch.zeros_like(seen))

    latents = torch.ones(1, TOKENS, 1, dtype=torch.float64)
    assert solve(shifted(0.0009), latents)[1] == 1
    assert solve(shifted(0.5), latents)[1] == 2


def test_the_chooser_learns_from_the_tokens_that_are_left(monkeypatch):
    predict, latents = causal_system(5)
    sweep, learned = Recorded(), []
    observe = solver.AdaptiveWindow.observe
    monkeypatch.setattr(solver.AdaptiveWindow, "observe", lambda *args: (learned.append(args[1]), observe(*args))[1])

    def spoiled(tokens, start):
        shift, log_scale = predict(tokens, start)
        if start == 0:
            shift[:, -1] = float("nan")  # what has just become no number is nothing to learn from
        return shift, log_scale

    solve(spoiled, latents, sweep=sweep)
    assert all(width <= TOKENS - solved for solved, width, _ in sweep.calls)
    assert learned[0][-1] == 0
    assert all(change >= 0 for changes in learned for change in changes)
