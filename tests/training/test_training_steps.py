"""One training step after the other: the authors' losses, the schedule, the average, and what is never done."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from tarflow_hf import TarFlowModel, convert_reference_checkpoint
from tarflow_hf.flow.likelihood import bits_per_dim
from tarflow_hf.images.batches import ImageBatch
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import Augmenter
from tarflow_hf.training.ema import ExponentialMovingAverage
from tarflow_hf.training.progress import NonFiniteTrainingError, Progress
from tarflow_hf.training.schedule import Schedule, learning_rate
from tarflow_hf.training.sharding import tensor_state
from tarflow_hf.training.trainer import Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def make_trainer(model=None, *, total_steps=100, warmup_steps=0, **options):
    settings = OptimizationArguments(**({"max_steps": total_steps, "learning_rate": 1e-2} | options))
    torch.manual_seed(0)
    model = model or TarFlowModel(tiny_config())
    return Trainer(Accelerator(cpu=True), model, settings, Schedule(total_steps, warmup_steps))


def make_batch(count=8, *, seed=0, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return to_pixel_values(levels), labels if labelled else None


def snapshot(trainer):
    return {name: tensor.clone() for name, tensor in tensor_state(trainer.model).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_first_fifty_losses_are_the_authors():
    """Same initial weights, images, noise and dropped labels, AdamW with a constant learning rate, float32."""
    recorded = load_file(FIXTURES / "digits_training.safetensors")
    model = convert_reference_checkpoint(
        FIXTURES / "digits_training_init.pth", image_size=8, num_channels=1, noise_type="gaussian", noise_std=0.1
    ).train()
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    trainer = make_trainer(model, learning_rate=1e-3, min_learning_rate=1e-3)
    losses = []
    for step in range(50):
        rows = recorded["image_index"][step]
        noisy = images[rows] + 0.1 * recorded["noise"][step]
        kept = labels[rows].masked_fill(recorded["label_dropped"][step], -1)
        losses.append(trainer.step([(noisy, kept)]).loss)
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), recorded["losses"], rtol=0, atol=1e-4)


def test_the_learning_rate_rises_falls_and_never_rises_again():
    rates = [learning_rate(step, highest=1.0, lowest=0.01, warmup_steps=10, total_steps=50) for step in range(200)]
    assert rates[0] == 0.01
    assert rates[10] == 1.0
    assert math.isclose(rates[5], 0.505)
    assert math.isclose(rates[30], 0.505)
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[:11]))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:51]))
    assert set(rates[50:]) == {0.01}


def test_a_warmup_as_long_as_the_training_is_allowed():
    assert learning_rate(5, highest=1.0, lowest=0.0, warmup_steps=10, total_steps=10) == 0.5
    assert learning_rate(10, highest=1.0, lowest=0.0, warmup_steps=10, total_steps=10) == 0.0


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    pixel_values, labels = make_batch()
    whole, parts = make_trainer(), make_trainer()
    for _ in range(3):
        expected = whole.step([(pixel_values, labels)])
        result = parts.step(list(zip(pixel_values.split(2), labels.split(2), strict=True)))
        assert math.isclose(result.loss, expected.loss, rel_tol=1e-5)
        assert math.isclose(result.grad_norm, expected.grad_norm, rel_tol=1e-4)
    for name, tensor in tensor_state(whole.model).items():
        assert torch.allclose(tensor_state(parts.model)[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_are_exchanged_with_the_last_part_alone(parts, monkeypatch):
    trainer, order = make_trainer(), []
    no_sync, backward = trainer.accelerator.no_sync, trainer.accelerator.backward
    monkeypatch.setattr(trainer.accelerator, "no_sync", lambda model: order.append("apart") or no_sync(model))
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: order.append("backward") or backward(loss))
    pixel_values, labels = make_batch()
    trainer.step(list(zip(pixel_values.split(8 // parts), labels.split(8 // parts), strict=True)))
    assert order == ["apart", "backward"] * (parts - 1) + ["backward"]


def test_an_average_with_decay_zero_is_the_model():
    trainer = make_trainer(ema_decay=0.0)
    trainer.step([make_batch()])
    assert_same(trainer.ema.average, snapshot(trainer))
    for decay in (-1e-9, 1.0):
        with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got"):
            ExponentialMovingAverage(trainer.model, decay=decay)


def test_reported_bits_are_those_of_the_loss():
    trainer = make_trainer()
    result = trainer.step([make_batch()])
    num_dims = trainer.model.config.num_dims
    log_prob = -num_dims * (result.loss + 0.5 * math.log(2 * math.pi))
    assert math.isclose(result.bits_per_dim, bits_per_dim(torch.tensor(log_prob), num_dims).item(), rel_tol=1e-5)


def test_gradients_are_clipped_to_the_limit():
    free, clipped = make_trainer(adam_beta1=0.0), make_trainer(adam_beta1=0.0, max_grad_norm=1e-3)
    before, results = snapshot(free), [trainer.step([make_batch()]) for trainer in (free, clipped)]
    assert results[0].grad_norm == results[1].grad_norm > 1e-3
    moments = [
        torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state_dict()["state"].values()]).norm()
        for trainer in (free, clipped)
    ]
    assert math.isclose(moments[0], results[0].grad_norm, rel_tol=1e-4)
    assert math.isclose(moments[1], 1e-3, rel_tol=1e-4)
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensor_state(free.model).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    trainer = make_trainer(TarFlowModel(tiny_config(volume_preserving=True)), ema_decay=0.9)
    trainer.step([make_batch()])
    before, average = snapshot(trainer), {n: t.clone() for n, t in trainer.ema.average.items()}
    moments = trainer.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    pixel_values, labels = make_batch(seed=1)
    pixel_values[3, 0, 5, 5] = bad
    result = trainer.step([(pixel_values, labels)])
    assert result.skipped
    assert_same(snapshot(trainer), before)
    assert_same(trainer.ema.average, average)
    assert torch.equal(trainer.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert (trainer.progress.step, trainer.progress.skipped_steps, trainer.progress.bad_steps) == (2, 1, 1)
    assert not trainer.step([make_batch(seed=2)]).skipped
    assert (trainer.progress.skipped_steps, trainer.progress.bad_steps, trainer.progress.window_steps) == (1, 0, 2)


def test_too_many_bad_steps_in_a_row_end_the_run():
    trainer = make_trainer(max_bad_steps=2)
    bad = (torch.full((2, 1, 8, 8), math.nan), None)
    trainer.step([bad])
    trainer.step([make_batch()])
    trainer.step([bad])
    with pytest.raises(NonFiniteTrainingError, match="2 steps in a row, up to step 4"):
        trainer.step([bad])


def test_averages_of_the_window_leave_skipped_steps_out():
    progress = Progress(window_loss=6.0, window_bits=9.0, window_steps=3)
    assert progress.close_window() == {"loss": 2.0, "bits_per_dim": 3.0}
    assert all(math.isnan(value) for value in progress.close_window().values())


def test_the_prior_variance_follows_the_latents_of_the_whole_batch():
    model = TarFlowModel(tiny_config(volume_preserving=True))
    pixel_values, labels = make_batch()
    with torch.no_grad():
        mean_square = model(pixel_values, labels).latents.square().mean(0)
    trainer = make_trainer(model)
    trainer.step(list(zip(pixel_values.split(4), labels.split(4), strict=True)))
    assert torch.allclose(model.prior_variance, 0.9 + 0.1 * mean_square, atol=1e-6)


def test_the_average_holds_parameters_and_buffers():
    model = TarFlowModel(tiny_config(volume_preserving=True))
    ema = ExponentialMovingAverage(model, 0.5)
    start = {name: tensor.clone() for name, tensor in tensor_state(model).items()}
    assert "prior_variance" in start
    with torch.no_grad():
        for tensor in tensor_state(model).values():
            tensor.add_(1)
    ema.update(model)
    decay = 2 / 11  # (1 + n) / (10 + n) is below the decay in the first update
    for name, tensor in ema.average.items():
        assert torch.allclose(tensor, decay * start[name] + (1 - decay) * (start[name] + 1)), name
    for _ in range(20):
        ema.update(model)
    assert torch.allclose(ema.average["prior_variance"], torch.full((), 2.0), atol=1e-4)


def test_the_average_is_lent_and_the_own_weights_come_back_bit_by_bit():
    trainer = make_trainer(TarFlowModel(tiny_config(volume_preserving=True)), ema_decay=0.9)
    for seed in range(3):
        trainer.step([make_batch(seed=seed)])
    own, average = snapshot(trainer), {name: t.clone() for name, t in trainer.ema.average.items()}
    assert any(not torch.equal(own[name], average[name]) for name in own)
    with trainer.evaluation_model() as model:
        assert not model.training
        assert_same(snapshot(trainer), average)
    assert trainer.model.training
    assert_same(snapshot(trainer), own)
    assert_same(trainer.ema.average, average)


def test_an_average_of_another_model_is_refused():
    ema = ExponentialMovingAverage(TarFlowModel(tiny_config()), 0.9)
    other = ExponentialMovingAverage(TarFlowModel(tiny_config(num_blocks=2, layers_per_block=1)), 0.9)
    with pytest.raises(ValueError, match="of another model"):
        ema.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="ema_decay must be in"):
        ExponentialMovingAverage(TarFlowModel(tiny_config()), 1.0)


def test_a_saved_state_goes_on_bit_by_bit():
    def make():
        return make_trainer(TarFlowModel(tiny_config(volume_preserving=True)), ema_decay=0.9, warmup_steps=3)

    whole = make()
    for seed in range(3):
        whole.step([make_batch(seed=seed)])
    state = whole.state()
    torch.manual_seed(5)
    resumed = make()
    resumed.load_state(state)
    for seed in range(3, 6):
        assert whole.step([make_batch(seed=seed)]) == resumed.step([make_batch(seed=seed)])
    assert_same(snapshot(whole), snapshot(resumed))
    assert_same(whole.ema.average, resumed.ema.average)
    assert whole.progress == resumed.progress


def test_a_compiled_model_trains_alike():
    """Captured as one graph and run without a C++ compiler; a trainer with compile=True hands the graph to one."""
    torch.manual_seed(0)
    compiled = TarFlowModel(tiny_config())
    compiled.compile(backend="eager", fullgraph=True)
    plain, other = make_trainer(), make_trainer(compiled)
    for seed in range(3):
        expected, result = plain.step([make_batch(seed=seed)]), other.step([make_batch(seed=seed)])
        assert math.isclose(result.loss, expected.loss, rel_tol=1e-5)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"precision": "bfloat16"}])
def test_saving_memory_or_time_trains_alike(options):
    plain, other = make_trainer(), make_trainer(**options)
    for seed in range(5):
        expected, result = plain.step([make_batch(seed=seed)]), other.step([make_batch(seed=seed)])
        tolerance = 0 if "activation_checkpointing" in options else 0.02
        assert math.isclose(result.loss, expected.loss, rel_tol=tolerance, abs_tol=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in other.model.parameters())


def augmented(model_options, count=6, **options):
    config = tiny_config(**model_options)
    flip = options.pop("horizontal_flip", True)
    options = {"max_steps": 1, "batch_size": count, "seed": 3, "label_drop": 0.3} | options
    augmenter = Augmenter(config, OptimizationArguments(**options), horizontal_flip=flip, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    batch = ImageBatch(levels, torch.arange(count) % 4)
    return augmenter, batch


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_augmentation_depends_on_the_place_in_the_batch_and_not_on_its_division(noise_type):
    augmenter, batch = augmented({"noise_type": noise_type})
    pixel_values, labels = augmenter(batch, 7, slice(0, 6))
    for part in (slice(0, 2), slice(2, 6)):
        divided = ImageBatch(batch.levels[part], batch.class_labels[part])
        part_values, part_labels = augmenter(divided, 7, part)
        assert torch.equal(part_values, pixel_values[part])
        assert torch.equal(part_labels, labels[part])
    assert torch.equal(augmenter(batch, 7, slice(0, 6))[0], pixel_values)
    assert not torch.equal(augmenter(batch, 8, slice(0, 6))[0], pixel_values)


def test_flips_noise_and_dropped_labels_are_as_asked():
    augmenter, batch = augmented({"noise_std": 0.0}, count=400)
    pixel_values, labels = augmenter(batch, 0, slice(0, 400))
    images = to_pixel_values(batch.levels)
    flipped = (pixel_values == images.flip(3)).flatten(1).all(1)
    assert ((pixel_values == images).flatten(1).all(1) | flipped).all()
    assert 150 < flipped.sum() < 250
    dropped = labels == -1
    assert 80 < dropped.sum() < 160
    assert torch.equal(labels[~dropped], batch.class_labels[~dropped])
    still, batch = augmented({"noise_std": 0.5}, count=400, horizontal_flip=False, label_drop=0.0)
    noisy, labels = still(batch, 0, slice(0, 400))
    noise = noisy - to_pixel_values(batch.levels)
    assert math.isclose(noise.std().item(), 0.5, rel_tol=0.02)
    assert torch.equal(labels, batch.class_labels)


def test_an_unconditional_model_gets_no_labels():
    augmenter, batch = augmented({"num_classes": 0})
    assert augmenter(batch, 0, slice(0, 6))[1] is None
