"""What a running call of a pipeline tells of itself, and what its callbacks get and leave."""

import pytest
import torch
from conftest import quiet_pipeline, seeded, tiny_model
from diffusers.callbacks import SDCFGCutoffCallback

from tarflow_hf.flow.sampling.nonfinite import NonFiniteError
from tarflow_hf.flow.sampling.running import call_back, tensors_for

LABELS = [0, 1]


def one_generator():
    return seeded(0)[0]


@pytest.fixture
def pipe():
    return quiet_pipeline(tiny_model(dtype=torch.float32), denoising_strength=0.0)


def test_before_and_after_a_call_a_pipeline_tells_of_none_and_of_the_last(pipe):
    assert (pipe.num_timesteps, pipe.guidance_scale, pipe._guidance_scale) == (0, 1.0, 1.0)
    assert (pipe.do_classifier_free_guidance, pipe.interrupt, pipe._interrupt) == (False, False, False)
    seen = []

    def inner(pipe, step, block, tensors):
        seen.append(("inner", pipe.guidance_scale, pipe.do_classifier_free_guidance))

    def outer(pipe, step, block, tensors):
        if step == 0:
            pipe(0, generator=one_generator(), guidance_scale=3.0, callback_on_step_end=inner)
        seen.append(("outer", pipe._guidance_scale, pipe._interrupt))
        pipe._interrupt = step == 1

    pipe(LABELS, generator=one_generator(), guidance_scale=2.0, callback_on_step_end=outer)
    assert seen == [("inner", 3.0, True)] * 3 + [("outer", 2.0, False)] * 2
    assert (pipe.guidance_scale, pipe._guidance_scale, pipe.interrupt, pipe._interrupt) == (2.0, 2.0, True, True)


def test_where_no_call_has_run_no_scale_guides(pipe):
    pipe._guidance_scale = 3.0
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance) == (3.0, False)


def test_what_was_lost_before_the_last_callback_is_not_told_again(pipe):
    latents = torch.zeros(3, 4, 2)
    latents[1, 2, 0] = torch.nan
    with pipe.running(1.0, num_timesteps=1, can_guide=False):
        assert call_back(lambda *given: None, pipe, 0, 0, latents, warn=False) is latents
        with pytest.raises(NonFiniteError, match=r"images \[0\] are not finite"):
            call_back(
                lambda *given: {"latents": latents.index_fill(0, torch.tensor([0]), torch.inf)},
                pipe,
                0,
                0,
                latents,
                warn=False,
            )


def test_what_a_callback_of_diffusers_asks_for_besides_is_empty():
    asks = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    tensors = tensors_for(asks, torch.zeros(1, 4, 2))
    assert {name: tensor.numel() for name, tensor in tensors.items()} == {"prompt_embeds": 0, "latents": 8}


def test_a_callback_may_return_the_latents_themselves():
    pipe, images = quiet_pipeline(tiny_model(), denoising_strength=0.0), []
    for returned in (lambda latents: 0.5 * latents, lambda latents: {"latents": 0.5 * latents}):
        call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        images.append(pipe(1, callback_on_step_end=lambda p, s, b, t, f=returned: f(t["latents"]), **call).images)
    assert images[0].equal(images[1])
    with pytest.raises(ValueError, match="callback_on_step_end must return None or a dict"):
        pipe(1, callback_on_step_end=lambda *_: torch.zeros(2))
