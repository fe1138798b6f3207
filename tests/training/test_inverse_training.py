"""Training of a learned inverse: its lessons, that it learns, and that a run goes on with the same bits."""

import json
import math
import signal
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from conftest import quiet_pipeline, random_images, random_latents, tiny_model
from diffusers import AutoencoderTiny
from inverse_models import tiny_inverse
from safetensors.torch import load_file
from training_runs import Run, command, kill_and_restart

from examples.train_inverse import main
from tarflow_hf import Guidance, TarFlowPipeline
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint
from tarflow_hf.flow.sampling.guided_encoding import checked_batch
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, collate
from tarflow_hf.images.latent_data import collate_latents
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.features import load_feature_extractor
from tarflow_hf.training import inverse as inverse_module
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.inverse import InverseRun
from tarflow_hf.training.inverse_arguments import InverseArguments, check_condition
from tarflow_hf.training.inverse_lessons import Teacher
from tarflow_hf.training.inverse_start import set_state_scale, start_inverse

pytestmark = pytest.mark.xdist_group("runs")
CLASSIFIER = "examples/data/digits_classifier.py:digits_classifier"
DIGITS = "examples/data/digits"
LABELS = torch.tensor([0, 3, -1])


def teacher(flow, sweeps=2, weights=None, **defaults):
    return Teacher(quiet_pipeline(flow, **defaults), sweeps=sweeps, **(weights or {}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline of a tiny flow of digits."""
    folder = tmp_path_factory.mktemp("flow") / "pipe"
    flow = tiny_model(dtype=torch.float32, num_classes=10)
    TarFlowPipeline(transformer=flow, guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_latent(tmp_path_factory):
    """A pipeline of a tiny flow of a tiny autoencoder's latents of the digits, in half precision as a showcase is."""
    folder = tmp_path_factory.mktemp("latent_flow") / "pipe"
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "latent_channels": 2}
    blocks = {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    vae = AutoencoderTiny(in_channels=1, out_channels=1, scaling_factor=0.8, **channels, **blocks)
    flow = tiny_model(dtype=torch.float32, num_classes=10, image_size=4, num_channels=2, patch_size=2)
    pipe = TarFlowPipeline(transformer=flow, vae=vae, denoising_strength=0.0, temperature=0.5, image_size=7)
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


def options(saved, folder, **changes):
    return command(folder, "train_inverse", flow=saved, **changes)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(folder, expected):
    one, other = (load_file(place / "inverse/model.safetensors") for place in (folder, expected))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


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
    for sweeps in (1, 4, 14, 15):
        corrected = teacher(flow, sweeps).corrected(batch, guesses, guidance)
        errors.append(max((one - other).abs().max() for one, other in zip(corrected, decoded, strict=True)))
    assert errors[3] < 1e-9 < errors[1] < errors[0]
    assert errors[2] < 0.1 * errors[1]
    for one, other in zip(teacher(flow, 1).corrected(batch, decoded, guidance), decoded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_exact_states_are_made_token_by_token():
    """Fifteen sweeps make sixteen tokens exact; a pass for each token costs less and starts from no guess."""
    flow, latents, read = tiny_model(), random_latents(tiny_model()), []
    for block in flow.blocks:
        block.register_forward_pre_hook(lambda block, inputs: read.append(inputs[0].shape[1]))
    batch = checked_batch(flow, latents, LABELS, None)
    guesses = [torch.full_like(latents, torch.nan)] * flow.config.num_blocks
    corrected = teacher(flow, 15).corrected(batch, guesses, None)
    assert read == [1] * 15 * flow.config.num_blocks
    assert corrected[-1].isfinite().all()


@pytest.mark.parametrize("times", [1, 3])
def test_the_loss_is_none_for_what_the_flow_itself_would_say(times):
    flow = tiny_model()
    own = teacher(flow, guidance_scale=2.0)
    clean, latents = random_images(flow), random_latents(flow, 3 * times)
    noisy = clean + 0.1 * torch.randn_like(clean)
    labels = LABELS.flip(0).repeat(times)
    lesson = own.lesson((noisy, LABELS), clean, latents, labels, guidance_scale=3.0)
    output = tiny_inverse(flow)(lesson.latents, lesson.labels, guidance_scale=lesson.guidance_scale)
    loss, error = own.loss(lesson, output, torch.ones(3, dtype=torch.float64))
    assert loss > 0.1
    assert error > 0.1
    drawn = [p for p, _ in flow.decode_blocks(latents, labels, guidance=Guidance(3.0), tolerance=0)]
    call = {"guidance_scale": 3.0, "tolerance": 0.0, "output_type": "latent"}
    images = own.pipe(labels.tolist(), latents=latents, **call).images
    output.states = tuple(torch.cat([real, own_]) for real, own_ in zip(lesson.states, drawn, strict=True))
    output.patches = torch.cat([flow.patchify(clean), flow.patchify(images)])
    loss, error = own.loss(lesson, output, torch.ones(3, dtype=torch.float64))
    assert loss < 1e-10
    assert error < 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_real_images_are_taught_as_the_pipeline_gives_them(strength):
    flow = tiny_model()
    clean, latents = random_images(flow), random_latents(flow)
    noisy = clean + 0.1 * torch.randn_like(clean)
    own = teacher(flow, denoising_strength=strength)
    lesson = own.lesson((noisy, LABELS), clean, latents, LABELS, guidance_scale=1.0)
    wanted = flow.patchify((1 - strength) * noisy + strength * clean)
    torch.testing.assert_close(lesson.images, wanted, rtol=0, atol=1e-12)


def test_what_is_told_no_condition_is_denoised_without_one():
    flow = tiny_model(num_classes=0, condition_dim=2, condition_mean=[0.0, 0.0], condition_std=[1.0, 1.0])
    own, clean, latents = teacher(flow), random_images(flow), random_latents(flow, 6)
    vectors = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.7, 1.0]], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    lesson = own.lesson((clean, None, None, vectors, mask), clean, latents, None, guidance_scale=1.0)
    assert lesson.condition[3:].equal(vectors[[0, 0, 1, 1, 2, 2]])
    assert lesson.condition_mask.tolist() == [True, False, True, True, True, False, False, True, True]
    found = own.denoised(latents, lesson)
    for row in range(6):
        told = None if row in (2, 3) else lesson.condition[3 + row][None]
        alone = own.pipe.denoise(flow.unpatchify(latents[row][None]), None, 1.0, condition=told)
        torch.testing.assert_close(found[row], flow.patchify(alone)[0], rtol=0, atol=1e-9)


def test_weights_of_the_image_and_of_features_count_what_they_say():
    flow = tiny_model(dtype=torch.float32)
    features = load_feature_extractor(CLASSIFIER)
    clean, latents = random_images(flow), random_latents(flow)
    found = {}
    for image_weight, feature_weight in [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (0.0, 2.0)]:
        weights = {"image_weight": image_weight, "features": features, "feature_weight": feature_weight}
        own = teacher(flow, weights=weights, denoising_strength=0.0)
        lesson = own.lesson((clean, LABELS), clean, latents, LABELS, guidance_scale=1.0)
        output = tiny_inverse(flow)(lesson.latents, lesson.labels)
        found[image_weight, feature_weight], _ = own.loss(lesson, output, torch.full((3,), 2.0))
    none = found.pop((0.0, 0.0))
    extra = {weights: (loss - none).item() for weights, loss in found.items()}
    images = flow.unpatchify(output.patches)
    guesses = [state[3:] for state in output.states]
    corrected = own.corrected(checked_batch(flow, latents, LABELS, None), guesses, None)[-1]
    aim = torch.cat([clean, flow.unpatchify(corrected)])
    square = 2 * torch.nn.functional.huber_loss(images / 2, aim / 2, delta=3.0).item()
    assert extra[1.0, 0.0] == pytest.approx(square, rel=1e-4)
    assert extra[3.0, 0.0] == pytest.approx(3 * square, rel=1e-4)
    one, other = (features.network(127.5 * (values + 1)) for values in (images, aim))
    relative = ((one - other).norm(dim=1) / other.norm(dim=1)).square().mean().item()
    assert extra[0.0, 1.0] == pytest.approx(relative, rel=1e-4)
    assert extra[0.0, 2.0] == pytest.approx(2 * relative, rel=1e-4)


def test_flows_that_cannot_be_inverted_yet_are_refused():
    with pytest.raises(ValueError, match="flow must be a model with one noise level, got one with noise_conditioning"):
        teacher(tiny_model(noise_conditioning=True))


def test_a_run_learns_and_leaves_a_pipeline_with_its_inverse(saved, tmp_path):
    folder = tmp_path / "run"
    assert main(options(saved, folder, max_steps=60, checkpoint_every=60)) == 0
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert {"validation_error_at_guidance_1", "validation_error_at_guidance_4"} <= rows(folder)[-1].keys()
    pipe = TarFlowPipeline.from_pretrained(folder)
    assert pipe.inverse.config.num_training_steps == 60
    assert pipe(3, decoder="one_pass").images[0].size == (8, 8)
    assert (folder / "decoders.png").is_file()
    page = (folder / "README.md").read_text()
    for part in ("![Samples](decoders.png)", "learned inverse", "train_inverse.py recipe.yaml", "| max_steps | 60 |"):
        assert part in page
    assert main([str(folder / "recipe.yaml"), "--output_dir", str(folder)]) == 0
    assert rows(folder)[-1]["step"] == 60
    assert [row["step"] for row in rows(folder)].count(60) == 2
    state = torch.load(folder / "checkpoints/step-00000060/state.pt", weights_only=True)
    assert state["ema"]["average"]["proj_out.weight"].equal(
        load_file(folder / "inverse/model.safetensors")["proj_out.weight"]
    )


def test_features_of_a_named_network_change_what_is_learned_and_belong_to_the_run(saved, tmp_path):
    few = {"max_steps": 4, "perceptual": CLASSIFIER}
    assert main(options(saved, tmp_path / "plain", max_steps=4, perceptual="null")) == 0
    assert main(options(saved, tmp_path / "run", **few)) == 0
    one, other = (load_file(tmp_path / name / "inverse/model.safetensors") for name in ("plain", "run"))
    assert not one["proj_out.weight"].equal(other["proj_out.weight"])
    with pytest.raises(Exception, match="another run: .*perceptual"):
        main(options(saved, tmp_path / "plain", **few))


def test_a_flow_of_latents_learns_from_encoded_images_and_decodes_by_its_autoencoder(saved_latent, tmp_path):
    folder = tmp_path / "run"
    longer = {"max_steps": 60, "learning_rate": 5e-3, "checkpoint_every": 60, "perceptual": CLASSIFIER}
    assert main(options(saved_latent, folder, **longer)) == 0
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    pipe = TarFlowPipeline.from_pretrained(folder)
    assert pipe.inverse.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    call = {"latents": pipe.prepare_latents(1, torch.Generator().manual_seed(0)), "decoder": "one_pass"}
    assert pipe(3, **call).images[0].size == (7, 7)
    patches = pipe.inverse(call["latents"], torch.tensor([3])).patches
    expected = pipe.decoded(pipe.transformer.unpatchify(patches)).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pipe(3, **call, output_type="pt").images, expected, rtol=0, atol=1e-6)


def test_labels_are_numbered_as_the_flow_numbers_its_classes(tmp_path):
    names = dict(enumerate("9876543210"))
    pipe = quiet_pipeline(tiny_model(dtype=torch.float32, num_classes=10, id2label=names))
    data = DataArguments(data=DIGITS, horizontal_flip=False)
    images, _ = load_image_data(data, class_conditional=True)
    settings = OptimizationArguments(batch_size=8, max_steps=1, label_drop=0.0)
    own = InverseArguments(flow="here", output_dir=str(tmp_path), hidden_size=16, num_layers=4, head_dim=8)
    run = InverseRun(data, settings, own, Accelerator(cpu=True), pipe, images)
    stored = StoredImages(images, ImageFormat(8, 1))
    batch = collate([stored[row] for row in range(8)])
    assert run.lesson(batch, 0, slice(0, 8)).labels[:8].equal(9 - batch.class_labels)


def test_a_step_draws_so_many_latents_for_each_image_wherever_the_image_is_computed(tmp_path):
    pipe = quiet_pipeline(tiny_model(dtype=torch.float32, num_classes=10))
    data = DataArguments(data=DIGITS, horizontal_flip=False)
    images, _ = load_image_data(data, class_conditional=True)
    settings = OptimizationArguments(batch_size=8, max_steps=1)
    shape = {"hidden_size": 16, "num_layers": 4, "head_dim": 8, "drawn_per_image": 3}
    own = InverseArguments(flow="here", output_dir=str(tmp_path), **shape)
    run = InverseRun(data, settings, own, Accelerator(cpu=True), pipe, images)
    stored = StoredImages(images, ImageFormat(8, 1))

    def drawn(start, stop):
        batch = collate([stored[row] for row in range(start, stop)])
        lesson = run.lesson(batch, 0, slice(start, stop))
        assert len(lesson.images) == stop - start
        assert (lesson.guidance_scale[: stop - start] == 1).all()
        return [part[stop - start :] for part in (lesson.latents, lesson.labels, lesson.guidance_scale)]

    whole = drawn(0, 8)
    assert len(whole[0]) == 24
    assert len(whole[0].flatten(1).unique(dim=0)) == 24
    for one, *parts in zip(whole, drawn(0, 2), drawn(2, 8), strict=True):
        assert one.equal(torch.cat(parts))


def test_the_latents_of_a_flow_s_own_autoencoder_are_what_it_is_taught(saved_latent, tmp_path):
    pipe = TarFlowPipeline.from_pretrained(saved_latent, dtype=torch.float32)
    data = DataArguments(data=DIGITS, horizontal_flip=False)
    images, _ = load_image_data(data, class_conditional=True)
    settings = OptimizationArguments(batch_size=64, max_steps=1, label_drop=0.0)
    shape = {"hidden_size": 16, "num_layers": 4, "head_dim": 8}
    own = InverseArguments(flow=str(saved_latent), output_dir=str(tmp_path), **shape)
    run = InverseRun(data, settings, own, Accelerator(cpu=True), pipe, images)
    stored = StoredImages(images, ImageFormat(7, 1))
    batch = collate([stored[row] for row in range(64)])
    lesson = run.lesson(collate_latents([run.latents[row] for row in range(64)]), 0, slice(0, 64))
    encoded = pipe.transformer.patchify(pipe._flow_input(batch.levels / 127.5 - 1))
    assert (lesson.images - encoded).std() == pytest.approx(pipe.transformer.config.noise_std, rel=0.05)
    drawn = lesson.latents[64:].flatten(1).std(dim=1)
    assert drawn.min() < 0.7 < 0.8 < drawn.max()  # at temperatures from the saved 0.5 to 1


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    """Runs that nothing stopped, on one process and on two."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        count: Run(folder / f"of_{count}", example="train_inverse", processes=count, flow=saved).finish().folder
        for count in (1, 2)
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_leave_no_trace(saved, whole, tmp_path, processes):
    options = {"seed": 1, "example": "train_inverse", "processes": processes, "flow": saved}
    run = kill_and_restart(tmp_path / "run", 2, **options)
    assert_same_weights(run.folder, whole[processes])
    assert rows(run.folder) == rows(whole[processes])


def test_two_processes_follow_the_losses_of_one_and_one_goes_on_for_both(saved, whole, tmp_path):
    run = Run(tmp_path / "run", example="train_inverse", processes=2, flow=saved)
    assert run.wait_for(5)
    run.signal(signal.SIGTERM, rank=1)
    assert run.join() == [143, 143]
    run = Run(tmp_path / "run", example="train_inverse", flow=saved, gradient_accumulation_steps=2).finish()
    for folder in (run.folder, whole[2]):
        for found, wanted in zip(rows(folder), rows(whole[1]), strict=True):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert math.isclose(found[name], value, rel_tol=1e-3, abs_tol=1e-4), (wanted["step"], name)


def test_another_flow_or_option_is_no_run_to_go_on_from(saved, tmp_path):
    assert main(options(saved, tmp_path / "run", max_steps=4)) == 0
    with pytest.raises(Exception, match="another run: .*sweeps"):
        main(options(saved, tmp_path / "run", max_steps=4, sweeps=3))
    with pytest.raises(Exception, match="another run: drawn_per_image was 'absent' and is now 2"):
        main(options(saved, tmp_path / "run", max_steps=4, drawn_per_image=2))
    TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, num_classes=10, seed=5)).save_pretrained(
        tmp_path / "pipe"
    )
    with pytest.raises(Exception, match="another run: .*flow_fingerprint"):
        main(options(tmp_path / "pipe", tmp_path / "run", max_steps=4))


def test_a_run_starts_from_another_inverse_and_needs_it_no_longer_once_it_has_a_checkpoint(saved, tmp_path):
    assert main(options(saved, tmp_path / "first", max_steps=6)) == 0
    few = {"init_from": tmp_path / "first", "learning_rate": 1e-9, "min_learning_rate": 1e-10}
    assert main(options(saved, tmp_path / "second", max_steps=1, **few)) == 0
    first, second = (load_file(tmp_path / name / "inverse/model.safetensors") for name in ("first", "second"))
    assert first["proj_out.weight"].abs().max() > 1e-3
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, rtol=0, atol=1e-7)
    assert "| init_from | first |" in (tmp_path / "second/README.md").read_text()
    assert "init_from" not in (tmp_path / "first/README.md").read_text()
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(options(saved, tmp_path / "second", max_steps=1, **few)) == 0


def test_what_is_no_start_is_refused_before_anything_is_written(saved, tmp_path):
    assert main(options(saved, tmp_path / "first", max_steps=2, checkpoint_every=1)) == 0
    for place, changes, message in (
        (tmp_path / "first", {"num_layers": 5}, "an inverse that does not fit: num_layers is 4 there and 5 here"),
        (saved, {}, "has no inverse: name a pipeline that examples/train_inverse.py made"),
    ):
        with pytest.raises(ValueError, match=message):
            main(options(saved, tmp_path / "run", max_steps=2, init_from=place, **changes))
    for name in ("model_index.json", "inverse/config.json"):
        (tmp_path / "first" / name).unlink()
    with pytest.raises(ValueError, match="init_from=.*step-00000002 is of a run that trains the inverse of a flow"):
        main(options(saved, tmp_path / "run", max_steps=2, init_from=tmp_path / "first"))
    assert not (tmp_path / "run").exists()


def test_states_stay_what_they_were_where_their_scale_changes():
    flow = tiny_model()
    inverse, latents = tiny_inverse(flow), random_latents(flow)
    before = inverse(latents, LABELS).states
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    set_state_scale(inverse, scale)
    assert inverse.state_scale.equal(scale)
    for one, other in zip(inverse(latents, LABELS).states, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": "test"}, "eval_split must be left out: an inverse is measured on latents that are drawn"),
        ({"posthoc_ema": "[0.05, 0.1]"}, "posthoc_ema must be left out"),
    ],
)
def test_options_without_a_meaning_are_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(options(saved, tmp_path / "run", max_steps=2, **changes))
    assert not (tmp_path / "run").exists()


def test_a_condition_is_the_flow_s_in_its_order():
    model = tiny_model(num_classes=0, condition_dim=2, condition_names=["width", "height"], dtype=torch.float32)
    data, flow = DataArguments(data=DIGITS, horizontal_flip=False), model.config
    images, _ = load_image_data(data, class_conditional=False)
    run = (data, OptimizationArguments(max_steps=1), InverseArguments(flow="here"), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="condition_columns must give the flow's width, height, got nothing"):
        InverseRun(*run, quiet_pipeline(model), images)
    check_condition({"condition_dim": 2, "condition_names": ["width", "height"]}, flow)
    for names in ([], ["height", "width"], ["width"]):
        condition = {"condition_dim": len(names), "condition_names": names} if names else {}
        with pytest.raises(ValueError, match="condition_columns must give the flow's width, height, got"):
            check_condition(condition, flow)


def test_classes_in_another_order_are_no_start(tmp_path):
    flows = [tiny_model(num_classes=2, id2label=dict(enumerate(names))) for names in ("ab", "ba")]
    configs = [tiny_inverse(flow).config for flow in flows]
    assert start_inverse(configs[0], None).config is configs[0]
    folder = tmp_path / "pipe"
    TarFlowPipeline(transformer=flows[0], inverse=tiny_inverse(flows[0])).save_pretrained(folder)
    assert start_inverse(configs[0], str(folder)).proj_in.weight.equal(tiny_inverse(flows[0]).proj_in.weight.float())
    with pytest.raises(ValueError, match="does not fit: class 0 is 'a' there and 'b' here"):
        start_inverse(configs[1], str(folder))


def test_a_fingerprint_that_another_machine_rounds_otherwise_is_of_the_same_flow(saved, tmp_path, monkeypatch):
    assert main(options(saved, tmp_path / "run", max_steps=4)) == 0
    for change, fits in ((1e-13, True), (1e-6, False)):
        monkeypatch.setattr(
            inverse_module,
            "flow_fingerprint",
            lambda blocks, change=change: [number * (1 + change) for number in flow_fingerprint(blocks)],
        )
        with nullcontext() if fits else pytest.raises(Exception, match="another run: .*flow_fingerprint"):
            assert main(options(saved, tmp_path / "run", max_steps=4)) == 0
