"""Training of a learned inverse: its lessons, that it learns, and that a run goes on with the same bits."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import quiet_pipeline, random_images, random_latents, tiny_model
from inverse_models import tiny_inverse
from safetensors.torch import load_file

from examples.train_inverse import main
from tarflow_hf import Guidance, TarFlowPipeline
from tarflow_hf.flow.sampling.guided_encoding import checked_batch
from tarflow_hf.training.inverse_lessons import Teacher

LABELS = torch.tensor([0, 3, -1])
TINY = {
    "hidden_size": 16,
    "head_dim": 8,
    "mlp_ratio": 2,
    "num_layers": 4,
    "batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 3e-3,
    "ema_decay": 0.9,
    "log_every": 3,
    "eval_every": 50,
    "checkpoint_every": 4,
}


def teacher(flow, sweeps=2, **defaults):
    return Teacher(quiet_pipeline(flow, **defaults), sweeps=sweeps)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline of a tiny flow of digits."""
    folder = tmp_path_factory.mktemp("flow") / "pipe"
    flow = tiny_model(dtype=torch.float32, num_classes=10)
    TarFlowPipeline(transformer=flow, guidance_scale=2.0).save_pretrained(folder)
    return folder


def options(saved, folder, **changes):
    values = TINY | {"flow": saved, "output_dir": folder} | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize("overrides", [{}, {"volume_preserving": True}])
def test_states_of_real_images_are_what_exact_decoding_goes_through(overrides):
    flow = tiny_model(**overrides)
    latents, states = teacher(flow).encode((random_images(flow), LABELS))
    decoded = [patches for patches, _ in flow.decode_blocks(latents, LABELS, tolerance=0)]
    for state, expected in zip(states, decoded, strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("guidance", [None, Guidance(3.0)])
@pytest.mark.parametrize("overrides", [{}, {"volume_preserving": True}])
def test_sweeps_lead_to_guided_decoding_and_stay_there(guidance, overrides):
    flow = tiny_model(**overrides)
    latents = random_latents(flow)
    batch = checked_batch(flow, latents, LABELS, None)
    decoded = [patches for patches, _ in flow.decode_blocks(latents, LABELS, guidance=guidance, tolerance=0)]
    guesses = [torch.zeros_like(latents)] * flow.config.num_blocks
    errors = []
    for sweeps in (1, 4, 15):
        corrected = teacher(flow, sweeps).corrected(batch, guesses, guidance)
        errors.append(max((one - other).abs().max() for one, other in zip(corrected, decoded, strict=True)))
    assert errors[2] < 1e-9 < errors[1] < errors[0]
    for one, other in zip(teacher(flow, 1).corrected(batch, decoded, guidance), decoded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_loss_is_none_for_what_the_flow_itself_would_say():
    flow = tiny_model()
    own = teacher(flow, guidance_scale=2.0)
    clean, latents = random_images(flow), random_latents(flow)
    noisy = clean + 0.1 * torch.randn_like(clean)
    lesson = own.lesson((noisy, LABELS), clean, latents, LABELS.flip(0), guidance_scale=3.0)
    output = tiny_inverse(flow)(lesson.latents, lesson.labels, guidance_scale=lesson.guidance_scale)
    loss, error = own.loss(lesson, output, torch.ones(3, dtype=torch.float64))
    assert loss > 0.1
    assert error > 0.1
    drawn = [p for p, _ in flow.decode_blocks(latents, LABELS.flip(0), guidance=Guidance(3.0), tolerance=0)]
    images = own.pipe([-1, 3, 0], latents=latents, guidance_scale=3.0, tolerance=0.0, output_type="latent").images
    output.states = tuple(torch.cat([real, own_]) for real, own_ in zip(lesson.states, drawn, strict=True))
    output.patches = torch.cat([flow.patchify(clean), flow.patchify(images)])
    loss, error = own.loss(lesson, output, torch.ones(3, dtype=torch.float64))
    assert loss < 1e-10
    assert error < 1e-6


def test_flows_that_cannot_be_inverted_yet_are_refused():
    with pytest.raises(
        ValueError, match="flow must be a model of pixels with one noise level, got one with noise_con"
    ):
        teacher(tiny_model(noise_conditioning=True))


def test_a_run_learns_and_leaves_a_pipeline_with_its_inverse(saved, tmp_path):
    folder = tmp_path / "run"
    assert main(options(saved, folder, max_steps=60, checkpoint_every=60)) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert {"error_at_guidance_1", "error_at_guidance_4"} <= rows[-1].keys()
    pipe = TarFlowPipeline.from_pretrained(folder)
    assert pipe.inverse.config.num_training_steps == 60
    assert pipe(3, decoder="one_pass").images[0].size == (8, 8)
    assert (folder / "decoders.png").is_file()
    state = torch.load(folder / "checkpoints/step-00000060/state.pt", weights_only=True)
    assert state["ema"]["average"]["proj_out.weight"].equal(
        load_file(folder / "inverse/model.safetensors")["proj_out.weight"]
    )


def test_a_run_that_is_killed_or_stopped_goes_on_with_the_same_bits(saved, tmp_path):
    assert main(options(saved, tmp_path / "whole")) == 0
    command = [sys.executable, "-m", "examples.train_inverse", *options(saved, tmp_path / "cut")]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = 4 if number == signal.SIGKILL else 8
        while process.poll() is None and not (tmp_path / f"cut/checkpoints/step-{steps:08d}/checkpoint.json").exists():
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() in (code, 0)  # on a slow machine it may have come to the end
    assert main(options(saved, tmp_path / "cut")) == 0
    one, other = (load_file(tmp_path / name / "inverse/model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_another_flow_or_option_is_no_run_to_go_on_from(saved, tmp_path):
    assert main(options(saved, tmp_path / "run", max_steps=4)) == 0
    with pytest.raises(Exception, match="another run: .*sweeps"):
        main(options(saved, tmp_path / "run", max_steps=4, sweeps=3))
    TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, num_classes=10, seed=5)).save_pretrained(
        tmp_path / "pipe"
    )
    with pytest.raises(Exception, match="another run: .*flow_fingerprint"):
        main(options(tmp_path / "pipe", tmp_path / "run", max_steps=4))
