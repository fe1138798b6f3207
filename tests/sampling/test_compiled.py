"""Compiled decoding: how many graphs there are, and that they give what uncompiled decoding and the oracle give."""

import copy
import pickle
from functools import partial

import oracle
import pytest
import torch
from conftest import quiet_pipeline, random_latents, tiny_model
from torch._dynamo.utils import counters

from tarflow_hf import Guidance
from tarflow_hf.flow.sampling.branches import Batch, predictor
from tarflow_hf.flow.sampling.compiled import CompiledSweep, owned

LABELS = torch.tensor([0, 3])


def updated(predict, tokens, latents, width):
    """The tokens after a sweep that is not compiled; one-token sweeps run four at a time."""
    with torch.compiler.set_stance("force_eager"):
        CompiledSweep({"backend": "eager"}, layers_per_graph=4)(predict, tokens, latents, 1, width, False)
    return tokens


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def allocations(call):
    """Pieces of memory that are claimed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in profile.profiler.kineto_results.events())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of its compiler, when first imported
def test_a_sweep_claims_its_memory_at_once():
    model = tiny_model(dtype=torch.float32, num_blocks=1, layers_per_block=1)
    model.compile_decoding(layers_per_graph=4, options={"cpp_wrapper": True})
    sweep, block, tokens = model.compiled_sweep, model.blocks[0], torch.randn(2, 16, model.config.patch_dim)
    with torch.inference_mode():
        latents = owned(tokens)
        predict = predictor(block, Batch(latents, LABELS, None), None, block.zero_cache(2), owned(block.positions))
        for width, most in ((1, 1), (4, 2)):  # a window's changes are another one
            expected = updated(predict, latents.clone(), latents, width)
            read = latents.clone()
            arguments = (predict, read, latents, 1, width, False)
            sweep(*arguments)
            torch.testing.assert_close(read[:, :5], expected[:, :5], rtol=0, atol=1e-5)
            assert allocations(partial(sweep, *arguments)) <= most


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of its compiler, when first imported
def test_one_graph_a_width_serves_all_blocks_and_calls():
    """By PyTorch's own compiler, which writes C++."""
    model = tiny_model(dtype=torch.float32, num_blocks=3, layers_per_block=1)
    pipe, latents = quiet_pipeline(model, denoising_strength=0.0), random_latents(model, 2)
    expected = [model.decode(latents, LABELS, guidance=Guidance(2.0), window=w, tolerance=0) for w in (1, 4)]
    wanted = oracle.decode(model, latents[0], 0, weight=1.0)
    model.compile_decoding(layers_per_graph=4)
    for window, images in zip((1, 4), expected, strict=True):
        found = model.decode(latents, LABELS, guidance=Guidance(2.0), window=window, tolerance=0)
        torch.testing.assert_close(found, images, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)
    assert graphs() == 2
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        pipe(
            [seed % 4, None],
            guidance_scale=2.0 + seed,
            guidance_schedule=("linear", "constant")[seed % 2],
            window=(1, 4, 5)[seed % 3],
            generator=generator,
            on_nonfinite="warn",
        )
    assert graphs() == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_conditioning": True, "noise_range": (0.1, 0.5)},
        {"volume_preserving": True, "num_classes": 0},
    ],
)
def test_fixed_shapes_give_the_sequential_answer(settings):
    model = tiny_model(num_blocks=2, layers_per_block=1, **settings)
    labels = LABELS if model.config.num_classes else None
    latents, guidance = random_latents(model, 2), Guidance(2.0, attention_temperature=0.7)
    expected = model.decode(latents, labels, guidance=guidance, window=1)
    model.compile_decoding(backend="eager")
    for window in (1, 3, 16, None):
        found = model.decode(latents, labels, guidance=guidance, window=window, tolerance=0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_graph_for_each_depth_width_and_number_of_rows():
    model = tiny_model(layers_per_block=[1, 2, 1])
    model.compile_decoding(backend="eager")
    counts = []
    for batch, window, guidance in ((2, 4, None), (2, 4, Guidance(2.0)), (4, 4, None), (2, 16, None)):
        model.decode(random_latents(model, batch), torch.zeros(batch).long(), window=window, guidance=guidance)
        counts.append(graphs())
    assert counts == [2, 4, 6, 8]  # guided rows combine, other rows do not
    other = tiny_model(layers_per_block=[1, 2, 1], seed=1)
    other.compile_decoding(backend="eager")
    other.decode(random_latents(other, 2), LABELS, window=4)
    assert graphs() == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_and_autocast(dtype):
    model = tiny_model(dtype=dtype, num_blocks=2, layers_per_block=1)
    latents = random_latents(model, 2).float()
    expected = model.decode(latents, LABELS, window=1)
    model.compile_decoding(backend="eager")
    torch.testing.assert_close(model.decode(latents, LABELS, window=1), expected, rtol=0, atol=0.05)
    model.float()
    model.compiled_sweep = None
    with torch.autocast("cpu", dtype):
        expected = model.decode(latents, LABELS, window=1)
        model.compile_decoding(backend="eager")
        torch.testing.assert_close(model.decode(latents, LABELS, window=1), expected, rtol=0, atol=0.05)


def test_a_lost_image_spoils_no_other_one():
    model = tiny_model(num_blocks=2, layers_per_block=1)
    latents = random_latents(model, 4)
    labels, kept = torch.zeros(4).long(), [0, 2, 3]
    expected = model.decode(latents, labels, window=1)
    model.compile_decoding(backend="eager")
    for window, max_batch in ((1, None), (4, None), (4, 2)):  # the second part of a batch takes the rows of the first
        steps = model.decode_blocks(latents, labels, window=window, tolerance=0, max_batch=max_batch)
        patches = next(steps)[0].clone()
        patches[1, 3] = float("nan")
        found, _ = [steps.send(patches), *steps][-1]
        assert found[1].isnan().any()
        torch.testing.assert_close(model.unpatchify(found)[kept], expected[kept], rtol=0, atol=1e-12)


def test_a_compiled_model_is_copied_pickled_and_saved(tmp_path):
    model = tiny_model(num_blocks=1, layers_per_block=1)
    model.compile_decoding(backend="eager", layers_per_graph=4)
    latents = random_latents(model, 2)
    expected = model.decode(latents, LABELS, window=4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.compiled_sweep.options == {"backend": "eager"}
        assert other.compiled_sweep.layers_per_graph == 4
        assert other.decode(latents, LABELS, window=4).equal(expected)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).compiled_sweep is None
