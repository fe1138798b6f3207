"""Sampling with a learned inverse: one pass, first guesses for the exact solver, and the exact error of each image."""

import pytest
import torch
from conftest import quiet_pipeline, random_latents, seeded, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from inverse_models import tiny_inverse
from torch._dynamo.utils import counters

from tarflow_hf import Guidance, TarFlowInverseConfig, TarFlowInverseModel, TarFlowPipeline
from tarflow_hf.flow.inverse.configuration import LEARNED_SETTINGS
from tarflow_hf.flow.sampling.guided_encoding import checked_batch, guided_latents
from tarflow_hf.flow.sampling.one_pass import InverseMismatchError

LABELS = [0, 3, -1]


@pytest.fixture
def pipe():
    flow = tiny_model()
    return quiet_pipeline(flow, inverse=tiny_inverse(flow), guidance_scale=2.0)


@pytest.mark.parametrize(
    "guidance", [None, Guidance(2.5), Guidance(1.7, "constant", 0.5), Guidance(3.0, rule="product")]
)
@pytest.mark.parametrize("overrides", [{}, {"volume_preserving": True}, {"noise_conditioning": True}])
def test_guided_encoding_undoes_guided_decoding(guidance, overrides):
    flow = tiny_model(**overrides)
    latents, labels = random_latents(flow), torch.tensor(LABELS)
    images = flow.decode(latents, labels, guidance=guidance, tolerance=0)
    encoded = guided_latents(flow, checked_batch(flow, flow.patchify(images), labels, None), guidance)
    torch.testing.assert_close(encoded, latents, rtol=0, atol=1e-9)


def test_guided_encoding_without_guidance_is_encoding():
    flow = tiny_model()
    latents, labels = random_latents(flow), torch.tensor(LABELS)
    patches = flow.patchify(flow.decode(latents, labels))
    encoded = guided_latents(flow, checked_batch(flow, patches, labels, None), None)
    torch.testing.assert_close(encoded, flow(flow.unpatchify(patches), labels).latents, rtol=0, atol=1e-12)


def test_one_pass_gives_the_image_of_the_inverse(pipe):
    latents = random_latents(pipe.transformer)
    found = pipe(LABELS, latents=latents, decoder="one_pass", output_type="latent").images
    expected = pipe.inverse(latents, torch.tensor(LABELS), guidance_scale=2.0).patches
    assert found.equal(pipe.transformer.unpatchify(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_scale_is_allowed_in_every_type(dtype, given):
    flow = tiny_model()
    pipe = quiet_pipeline(flow, denoising_strength=0.0)
    pipe.register_modules(inverse=tiny_inverse(flow, max_guidance_scale=1.1))
    pipe.to(dtype=dtype)
    latents = random_latents(flow).to(given)
    images = pipe(LABELS, latents=latents, guidance_scale=1.1, decoder="one_pass", output_type="pt").images
    assert images.shape[0] == len(latents)


def test_a_compiled_inverse_has_one_graph_for_all_scales_and_labels(pipe):
    torch._dynamo.reset()
    counters.clear()
    latents = random_latents(pipe.transformer)
    calls = [{"guidance_scale": 1.5 + 0.5 * number, "class_labels": [number, -1, 2]} for number in range(4)]
    expected = [pipe(**call, latents=latents, decoder="one_pass", output_type="latent").images for call in calls]
    pipe.inverse.compile(backend="eager", fullgraph=True)
    for call, images in zip(calls, expected, strict=True):
        found = pipe(**call, latents=latents, decoder="one_pass", output_type="latent").images
        torch.testing.assert_close(found, images, rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("window", [1, 5, None])
def test_refined_is_exact_whatever_the_inverse_has_learned(pipe, guidance_scale, window):
    call = {"latents": random_latents(pipe.transformer), "guidance_scale": guidance_scale, "window": window}
    exact = pipe(LABELS, **call, output_type="latent").images
    refined = pipe(LABELS, **call, decoder="refined", output_type="latent").images
    torch.testing.assert_close(refined, exact, rtol=0, atol=2e-3)
    call |= {"tolerance": 0.0, "output_type": "latent"}
    torch.testing.assert_close(
        pipe(LABELS, **call, decoder="refined").images, pipe(LABELS, **call).images, rtol=0, atol=1e-9
    )


def test_the_true_states_as_first_guesses_leave_one_sweep_a_block_to_do():
    flow = tiny_model()
    latents, labels = random_latents(flow), torch.tensor(LABELS)
    states = [patches for patches, _ in flow.decode_blocks(latents, labels, tolerance=0)]
    sweeps = [count for _, count in flow.decode_blocks(latents, labels, guesses=states, window=16)]
    assert sweeps == [1] * flow.config.num_blocks
    batched = [patches for patches, _ in flow.decode_blocks(latents, labels, guesses=states, max_batch=2)]
    torch.testing.assert_close(batched[-1], states[-1], rtol=0, atol=1e-3)


def test_guesses_without_a_number_do_no_harm():
    flow = tiny_model()
    latents = random_latents(flow)
    guesses = [torch.full_like(latents, value) for value in (float("nan"), float("inf"), 1e30)]
    found = list(flow.decode_blocks(latents, guesses=guesses, window=16, tolerance=0))[-1][0]
    torch.testing.assert_close(flow.unpatchify(found), flow.decode(latents, tolerance=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("guesses", [[], [torch.zeros(3, 16, 4)] * 2, [torch.zeros(2, 16, 4)] * 3])
def test_guesses_of_another_number_or_shape_are_refused(guesses):
    flow = tiny_model()
    with pytest.raises(ValueError, match="guesses must be 3 tensors, one for each block, of shape"):
        next(flow.decode_blocks(random_latents(flow), guesses=guesses))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_error_is_none_for_an_inverse_that_gives_the_exact_states(pipe, guidance_scale):
    flow, latents, labels = pipe.transformer, random_latents(pipe.transformer), torch.tensor(LABELS)
    guidance = Guidance(guidance_scale)
    states = [patches for patches, _ in flow.decode_blocks(latents, labels, guidance=guidance, tolerance=0)]
    noise = 1e-3 * random_latents(flow, seed=9)

    class Exact(TarFlowInverseModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.states = (*states[:-1], states[-1] + self.strength * noise)
            return output

    pipe.inverse.__class__ = Exact
    errors = []
    for pipe.inverse.strength in (0.0, 1.0, 2.0):
        errors.append(pipe.reconstruction_error(latents, LABELS, guidance_scale=guidance_scale))
    assert (errors[0] < 1e-9).all()
    assert (errors[1] > 1e-4).all()
    torch.testing.assert_close(errors[2], 2 * errors[1], rtol=0.1, atol=0)


def test_what_is_rejected_is_drawn_anew_and_the_others_stay(pipe):
    call = {"decoder": "one_pass", "output_type": "latent", "guidance_scale": 1.0}
    latents = pipe.prepare_latents(12, seeded(*range(12)))
    labels = [0] * 12
    errors = pipe.reconstruction_error(latents, labels, guidance_scale=1.0)
    limit = errors.median().item()
    plain = pipe(labels, latents=latents, **call).images
    found = pipe(labels, generator=seeded(*range(12)), max_error=limit, **call).images
    kept = (errors <= limit).tolist()
    assert 0 < sum(kept) < 12
    assert [bool(one.equal(other)) for one, other in zip(found, plain, strict=True)] == kept
    with pytest.raises(ValueError, match=r"max_error=0.001: images \[0, .* had a larger error 21 times: raise it"):
        pipe(labels, generator=seeded(*range(12)), max_error=1e-3, **call)
    with pytest.raises(ValueError, match=r"images \[0, .* had a larger error: raise it"):
        pipe(labels, latents=latents, max_error=1e-3, **call)


def test_an_inverse_of_another_flow_is_a_named_error(pipe):
    flow = pipe.transformer
    with pytest.raises(InverseMismatchError, match="weights of the transformer are not those it has learned"):
        TarFlowPipeline(transformer=tiny_model(seed=1), inverse=pipe.inverse)
    for change, message in [
        ({"image_size": 4}, "one of a flow with image_size=8, and the transformer has image_size=4"),
        ({"num_classes": 5}, "one of a flow with num_classes=4, and the transformer has num_classes=5"),
        ({"noise_std": 0.2}, "one of a flow with noise_std=0.1, and the transformer has noise_std=0.2"),
    ]:
        with pytest.raises(InverseMismatchError, match=message):
            TarFlowPipeline(transformer=tiny_model(**change), inverse=pipe.inverse)
    pipe.register_modules(transformer=tiny_model(seed=1))  # after the pipeline was made
    with pytest.raises(InverseMismatchError, match="weights of the transformer"):
        pipe(0, decoder="one_pass")
    new = TarFlowInverseModel(TarFlowInverseConfig(flow=flow.config, hidden_size=16, head_dim=8, num_layers=4))
    for decoder in ("one_pass", "refined"):
        with pytest.raises(InverseMismatchError, match="needs a trained inverse: this one has num_training_steps=0"):
            quiet_pipeline(flow, inverse=new)(0, decoder=decoder)


def test_settings_that_were_learned_outlive_the_pipeline_s_own(pipe, tmp_path):
    settings = dict(pipe.config)
    pipe.inverse.config.learned_settings = {name: settings[name] for name in LEARNED_SETTINGS}
    pipe.save_pretrained(tmp_path)
    for changes in ({"denoising_strength": 0.0}, {"guidance_schedule": "constant"}):
        loaded = TarFlowPipeline.from_pretrained(tmp_path, **changes)
        ((name, other),) = changes.items()
        with pytest.raises(
            ValueError, match=rf"{name} must be {settings[name]} with decoder='one_pass'.*, got {other}"
        ):
            loaded(1, decoder="one_pass")
        learned = {name: settings[name]}
        loaded(1, decoder="one_pass", **learned, output_type="latent")
    with pytest.raises(StrictDataclassClassValidationError, match=r"learned_settings must have .* got \['strength'\]"):
        TarFlowInverseConfig(flow=pipe.transformer.config, learned_settings={"strength": 1})


def test_a_pipeline_with_an_inverse_comes_back_and_one_without_says_nothing_of_it(pipe, tmp_path):
    pipe.to(torch.float32).save_pretrained(tmp_path / "both")
    index = (tmp_path / "both" / "model_index.json").read_text()
    assert '"inverse": [\n    "tarflow_hf",\n    "TarFlowInverseModel"\n  ]' in index
    assert "learned inverse" in (tmp_path / "both" / "README.md").read_text()
    loaded = TarFlowPipeline.from_pretrained(tmp_path / "both")
    assert type(loaded.inverse) is TarFlowInverseModel
    loaded.set_progress_bar_config(disable=True)
    call = {"generator": torch.Generator().manual_seed(0), "decoder": "one_pass", "output_type": "latent"}
    found = loaded(1, **call).images
    call["generator"].manual_seed(0)
    torch.testing.assert_close(found, pipe(1, **call).images, rtol=0, atol=1e-6)
    pipe.register_modules(inverse=None)
    pipe.save_pretrained(tmp_path / "alone")
    assert "inverse" not in (tmp_path / "alone" / "model_index.json").read_text()
    assert "learned inverse" not in (tmp_path / "alone" / "README.md").read_text()
    assert TarFlowPipeline.from_pretrained(tmp_path / "alone").inverse is None


@pytest.mark.parametrize("settings", [{"guidance_rule": "log_scale"}, {"num_refinement_steps": 1}])
def test_what_was_learned_may_be_said_again_by_its_name(pipe, settings):
    pipe(1, decoder="one_pass", output_type="latent", **settings)
    with pytest.raises(ValueError, match="refinement_levels must be None with decoder='one_pass'"):
        pipe(1, decoder="one_pass", refinement_levels=[0.1])
    with pytest.raises(ValueError, match="guidance_rule must be None with decoder='one_pass'"):
        pipe(1, decoder="one_pass", guidance_rule="product")
