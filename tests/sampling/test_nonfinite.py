"""Images that stop being finite: where it is noticed, who is told, and what is drawn in their place."""

import copy
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_pipeline, random_images, random_latents, seeded, tiny_model

from tarflow_hf import Guidance
from tarflow_hf.flow.sampling.nonfinite import (
    NonFinite,
    NonFiniteError,
    NonFiniteWarning,
    find_nonfinite,
    finite_steps,
)

LABELS = [0, 1, 2, 3]
LOSING = 8.0  # the guidance at which some images are lost, and few of them twice


def make_pipeline(*, seed=2, **overrides):
    """A pipeline whose labels matter much, so that guidance loses some images at a scale and all at a higher one."""
    model = tiny_model(seed=seed, dtype=torch.float32, **overrides)
    with torch.no_grad():
        for block in model.blocks:
            block.class_embedding.weight.mul_(4)
    return quiet_pipeline(model, denoising_strength=0.0)


@pytest.fixture
def pipe():
    return make_pipeline()


def sample(pipe, generator, **arguments):
    settings = {"guidance_scale": LOSING, "guidance_schedule": "constant", "output_type": "latent"} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        return pipe([0, 1, 2, 3] * 8, generator=generator, **settings).images


def finite_rows(images):
    return images.isfinite().flatten(1).all(1)


def one_generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("window", [None, 1, 16])
def test_lost_images_alone_are_drawn_anew(pipe, many, window):
    def generator():
        return seeded(*range(32)) if many else one_generator()

    before = sample(pipe, generator(), window=window, on_nonfinite="warn")
    kept = finite_rows(before)
    assert 2 <= int((~kept).sum()) <= 20
    after = sample(pipe, generator(), window=window)
    assert after.isfinite().all()
    assert after[kept].equal(before[kept])
    assert sample(pipe, generator(), window=window).equal(after)


def test_a_redrawn_image_comes_from_its_own_generator(pipe):
    generators = seeded(*range(32))
    before = sample(pipe, seeded(*range(32)), on_nonfinite="warn")
    after = sample(pipe, generators, tolerance=0)
    lost = int((~finite_rows(before)).nonzero()[0])
    alone = seeded(lost)[0]
    pipe.prepare_latents(1, alone)  # what was lost
    image = pipe(
        LABELS[lost % 4],
        generator=alone,
        guidance_scale=LOSING,
        guidance_schedule="constant",
        tolerance=0,
        output_type="latent",
    ).images
    torch.testing.assert_close(image[0], after[lost], rtol=1e-3, atol=1e-3)
    assert torch.rand(1, generator=alone).equal(torch.rand(1, generator=generators[lost]))


def test_other_generators_go_on_as_if_nothing_had_been_redrawn(pipe):
    one, other = one_generator(), one_generator()
    sample(pipe, one)
    sample(pipe, other, on_nonfinite="warn")
    assert torch.rand(1, generator=one).equal(torch.rand(1, generator=other))
    first, second = sample(pipe, one), sample(pipe, one)
    assert not first.equal(second)


def test_refinement_noise_of_the_others_stays():
    pipe = make_pipeline(noise_conditioning=True, noise_range=(0.1, 0.3))
    arguments = {
        "denoising_strength": 0.5,
        "num_refinement_steps": 3,
        "refinement_noise": 1.0,
        "guidance_scale": LOSING,
    }
    arguments["guidance_scale"] = 6.0
    before = sample(pipe, one_generator(), on_nonfinite="warn", **arguments)
    kept = finite_rows(before)
    assert 1 <= int((~kept).sum()) <= 20
    after = sample(pipe, one_generator(), **arguments)
    assert after.isfinite().all()
    assert after[kept].equal(before[kept])


def test_what_remains_after_three_times_is_an_error(pipe):
    calls = []
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *given, **named: calls.append(given[0]) or prepare(*given, **named)
    with pytest.raises(
        NonFiniteError, match="3 times before with other noise: lower guidance_scale .it is 1000.0"
    ) as error:
        sample(pipe, one_generator(), guidance_scale=1000.0)
    assert calls[0] == 32
    assert 3 <= len(calls) - 1
    assert "images [" in str(error.value)
    assert "after block 2, first at token" in str(error.value)


def test_given_latents_are_not_redrawn(pipe):
    latents = random_latents(pipe.transformer, 4)
    latents[2, 5] = 1e38
    arguments = {"latents": latents, "guidance_scale": 3.0, "output_type": "latent"}
    with pytest.raises(NonFiniteError, match=r"images \[2\] are not finite after block \d, first at token \d+ in"):
        pipe(LABELS, **arguments)
    with pytest.warns(NonFiniteWarning, match=r"images \[2\] .* lower guidance_scale"):
        images = pipe(LABELS, on_nonfinite="warn", **arguments).images
    assert finite_rows(images).tolist() == [True, True, False, True]
    latents[2] = 0
    good = pipe(LABELS, **arguments, window=1).images
    torch.testing.assert_close(images[[0, 1, 3]], good[[0, 1, 3]], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_warning_is_the_only_one(pipe, output_type):
    latents = random_latents(pipe.transformer, 4)
    latents[2] = 1e38
    with pytest.warns(NonFiniteWarning) as caught:
        pipe(LABELS, latents=latents, guidance_scale=3.0, on_nonfinite="warn", output_type=output_type)
    assert [warning.category for warning in caught] == [NonFiniteWarning]


def test_raise_draws_nothing_anew(pipe):
    with pytest.raises(NonFiniteError, match="lower guidance_scale") as error:
        sample(pipe, one_generator(), on_nonfinite="raise")
    assert "times before" not in str(error.value)


def test_callbacks_see_the_redrawn_images_and_may_lose_some(pipe):
    seen = []

    def watch(pipe, step, block, tensors):
        seen.append((step, tuple(tensors["latents"].shape), bool(tensors["latents"].isfinite().all())))
        if step == 1:
            tensors["latents"][3] = math.nan
        return tensors

    images = sample(pipe, one_generator(), callback_on_step_end=watch)
    assert images.isfinite().all()
    assert seen == [(step, (32, 16, 4), True) for step in range(3)]
    before = sample(pipe, one_generator(), on_nonfinite="warn")
    kept = finite_rows(before)
    kept[3] = False
    torch.testing.assert_close(images[kept], before[kept], rtol=0, atol=5e-3)


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("interrupts", [True, False])
def test_what_the_last_callback_leaves_is_looked_at(pipe, returned, interrupts):
    def spoil(pipe, step, block, tensors):
        if step == (0 if interrupts else 2):
            latents = tensors["latents"].clone() if returned else tensors["latents"]
            latents[1, 4] = math.inf
            pipe._interrupt = interrupts
            return {"latents": latents} if returned else None
        return None

    where = r"images \[1\] are not finite after block \d, first at token \d+ .*: callback_on_step_end made them so"
    arguments = {"callback_on_step_end": spoil, "output_type": "latent", "guidance_scale": 1.0}
    with pytest.raises(NonFiniteError, match=where):
        pipe(LABELS, generator=one_generator(), **arguments)
    with pytest.warns(NonFiniteWarning, match=where):
        images = pipe(LABELS, generator=one_generator(), on_nonfinite="warn", **arguments).images
    assert finite_rows(images).tolist() == [True, False, True, True]


def test_what_a_callback_returns_must_fit(pipe):
    for returned, message in [
        ({"latents": torch.zeros(1)}, r"latents of shape \(1, 16, 4\), got \(1,\)"),
        (5, "must return None or a dict, .* got 5"),
        ({"latents": None}, "got {'latents': None}"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(0, callback_on_step_end=lambda *arguments, returned=returned: returned)


def test_denoising_that_loses_an_image_is_named(pipe):
    def far(pipe, step, block, tensors):
        if block == 0:
            tensors["latents"][1, 4] = 1e25
        return tensors

    with pytest.raises(NonFiniteError, match=r"images \[1\] are not finite after denoising step 1, first at token"):
        pipe(LABELS, callback_on_step_end=far, denoising_strength=1.0, on_nonfinite="raise")


def test_half_precision_that_overflows_says_so(pipe):
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.layers[0].mlp.up_proj.weight.mul_(300)
            block.layers[0].mlp.down_proj.weight.mul_(300)
    pipe.to(torch.float16)
    with pytest.raises(
        NonFiniteError, match="float16 overflows above 65504: use bfloat16; there is no guidance_scale"
    ):
        pipe(LABELS, generator=one_generator())


@pytest.mark.parametrize("window", [1, 16])
def test_decode_refuses_and_decode_blocks_goes_on(window):
    model = tiny_model()
    latents, labels = random_latents(model, 4), torch.tensor(LABELS)
    expected = [patches for patches, _ in model.decode_blocks(latents, labels, window=window)]
    sweeps = [sweeps for _, sweeps in model.decode_blocks(latents, labels, window=window)]
    blocks = model.decode_blocks(latents, labels, window=window)
    patches, _ = next(blocks)
    patches = patches.clone()
    patches[2, 7] = math.nan
    after, spoiled = [], []
    for _ in range(2):
        patches, number = blocks.send(patches)
        after.append(patches)
        spoiled.append(number)
    assert after[-1][[0, 1, 3]].isfinite().all()
    torch.testing.assert_close(after[-1][[0, 1, 3]], expected[-1][[0, 1, 3]], rtol=0, atol=5e-3)
    assert sum(spoiled) <= sum(sweeps[1:]) + 2
    latents[1, 3] = 1e300
    message = r"images \[1\] are not finite after block 2, first at token 4 in the order of the block: there is no gui"
    with pytest.raises(NonFiniteError, match=message):
        model.decode(latents, labels, window=window)


def test_the_scale_rule_loses_images_one_by_one():
    pipe, arguments = make_pipeline(seed=5), {"guidance_rule": "scale", "guidance_scale": 3.0}
    before = sample(pipe, one_generator(), on_nonfinite="warn", **arguments)
    assert 1 <= int((~finite_rows(before)).sum()) < 32
    after = sample(pipe, one_generator(), **arguments)
    assert after.isfinite().all()


def test_log_prob_names_what_has_no_density(pipe):
    model, images = pipe.transformer, random_images(pipe.transformer, 4)
    labels = torch.tensor(LABELS)
    assert model.log_prob(images + 0.5 * torch.randn(images.shape), labels).isfinite().all()
    for bad, message in [
        ((images + 1) * 127.5, r"images \[0, 1, 2, 3\] have no finite density: in image 0 64 of 64 values are out"),
        (
            images.index_fill(0, torch.tensor([2]), math.nan),
            r"images \[2\] have no .* in image 2 0 of 64 .* 64 are not",
        ),
        (images.index_fill(0, torch.tensor([1]), 1e30), r"images \[1\] .* 64 of 64 values are outside, from 1e\+30"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.log_prob(bad, labels)
        assert len(model.log_prob_of(model(bad, labels))) == 4  # a training step goes on to its own check


def test_log_prob_refuses_what_is_no_image_though_its_density_is_finite(model):
    images = random_images(model, 4).index_fill(0, torch.tensor([1]), 12.0)
    assert model.log_prob_of(model(images)).isfinite().all()
    with pytest.raises(ValueError, match=r"images \[1\] are far from it: in image 1 64 of 64 .* from 12 to 12"):
        model.log_prob(images)


def test_log_prob_runs_where_nothing_can_be_read(model):
    model.set_attn_implementation("eager")  # vmap has no rule for the other
    images = random_images(model, 3)
    expected = model.log_prob(images)
    each = torch.func.vmap(lambda image: model.log_prob(image[None])[0])(images)
    torch.testing.assert_close(each, expected)
    compiled = torch.compile(model.log_prob, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)
    assert model.to("meta").log_prob(images.to("meta")).shape == (3,)


def test_empty_batches_give_empty_results(pipe):
    model = pipe.transformer
    images, latents = torch.zeros(0, 1, 8, 8), torch.zeros(0, 16, 4)
    labels = torch.zeros(0, dtype=torch.long)
    output = model(images, labels)
    assert (output.latents.shape, output.log_det.shape, output.loss.item()) == ((0, 16, 4), (0,), 0.0)
    assert model.log_prob(images).shape == (0,)
    for guidance in (None, Guidance(2.0)):
        for window in (None, 1, 4):
            assert model.decode(latents, labels, guidance=guidance, window=window).shape == (0, 1, 8, 8)
    for strength in (0.0, 1.0):
        assert pipe(latents=latents, denoising_strength=strength).images == []
        assert pipe([], latents=latents, denoising_strength=strength, output_type="pt").images.shape == (0, 1, 8, 8)
    assert pipe(latents=latents, output_type="np", generator=[]).images.shape == (0, 8, 8, 1)
    assert pipe.invert(images).shape == pipe.invert([]).shape == pipe.invert([], []).shape == (0, 16, 4)


def test_an_interrupt_belongs_to_the_call_of_its_thread(pipe):
    steps = {"stopped": [], "other": []}
    both_run, stopped = threading.Barrier(2, timeout=30), threading.Event()

    def call(name, watch):
        pipe(LABELS, generator=one_generator(), callback_on_step_end=watch)

    def stop(pipe, step, block, tensors):
        steps["stopped"].append(step)
        both_run.wait()
        pipe._interrupt = True
        stopped.set()

    def go_on(pipe, step, block, tensors):
        if step == 0:
            both_run.wait()
            assert stopped.wait(30)
        steps["other"].append((step, pipe.interrupt))

    threads = [threading.Thread(target=call, args=arguments) for arguments in [("stopped", stop), ("other", go_on)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == {"stopped": [0], "other": [(0, False), (1, False), (2, False)]}


def test_a_call_that_starts_cancels_no_pending_stop(pipe):
    seen = []

    def stop(pipe, step, block, tensors):
        seen.append(step)
        pipe._interrupt = True
        pipe(0, generator=one_generator())  # a call inside the callback is one of its own
        assert pipe.interrupt

    pipe(LABELS, generator=one_generator(), callback_on_step_end=stop)
    assert seen == [0]


def test_a_thread_without_a_call_stops_those_that_run(pipe):
    seen, running, told = [], threading.Event(), threading.Event()

    def watch(pipe, step, block, tensors):
        seen.append(step)
        running.set()
        assert told.wait(30)

    thread = threading.Thread(target=lambda: pipe(LABELS, generator=one_generator(), callback_on_step_end=watch))
    thread.start()
    assert running.wait(30)
    pipe._interrupt = True
    told.set()
    thread.join()
    assert seen == [0]
    assert copy.deepcopy(pipe).interrupt


def test_ids_names_and_none_may_stand_in_one_list():
    pipe = make_pipeline(id2label={0: "cat", 1: "dog", 2: "bird", 3: "7"})
    assert pipe.prepare_class_labels(["7", None, 1, -1, "cat", np.int64(2)]).tolist() == [3, -1, 1, -1, 0, 2]
    assert pipe.prepare_class_labels([None, None], 2).tolist() == [-1] * 4
    assert len(pipe(["7", None], generator=one_generator()).images) == 2


def test_where_an_image_was_lost_is_told_in_the_order_that_is_read():
    patches = torch.zeros(2, 4, 3)
    patches[1, 1, 2] = torch.nan
    found = {block: find_nonfinite(patches, block) for block in (-2, -1, 0, 1, 2, 3)}
    assert {block: where.position for block, where in found.items()} == {-2: 1, -1: 1, 0: 1, 1: 2, 2: 1, 3: 2}
    after = "images [1] are not finite after"
    assert str(found[-1]) == f"{after} denoising step 1, first at token 1 in raster order"
    assert str(found[0]) == f"{after} block 0, first at token 1 in the order of the block"
    assert str(NonFinite([1], 1, 2, redraws=3)) == (
        f"{after} block 1, first at token 2 in the order of the block, as 3 times before with other noise"
    )


def test_what_was_given_up_goes_on_as_nothing_unless_it_is_mended():
    got = []

    def start(images, redraws):
        patches = torch.zeros(3, 2, 1)
        patches[[0, 2]] = torch.nan
        for block in (1, 0):
            got.append((yield block, patches))

    steps = finite_steps(start, [0, 1, 2], fail=lambda found: None, most_redraws=0)
    _, patches = next(steps)
    mended = patches.clone()
    mended[0] = 1.0
    mended[2, 0] = 1.0  # half of it is no mending
    steps.send(mended)
    assert got[0][:, :, 0].nan_to_num(-1).tolist() == [[1, 1], [0, 0], [-1, -1]]


def test_what_a_function_of_guidance_loses_is_the_named_error_too():
    model = tiny_model(dtype=torch.float32)
    latents, labels = random_latents(model), torch.tensor([0, 1, 2])
    latents[1] = 1e38
    for guidance in (lambda: Guidance(30.0), Guidance(30.0), Guidance(1.0), None):
        with pytest.raises(NonFiniteError) as error:
            model.decode(latents, labels, guidance=guidance)
        assert ("1.0" in str(error.value)) is False
