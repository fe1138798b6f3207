"""Bayes' rule over classes: against the one-class-at-a-time computation, closed forms and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from tarflow_hf import TarFlowConfig, TarFlowModel
from tarflow_hf.metrics.posterior import (
    calibration,
    central_interval,
    class_log_prob,
    class_posterior,
    condition_log_prob,
    fit_temperature,
    log_loss,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TarFlowConfig(
        image_size=4, num_channels=2, hidden_size=32, head_dim=16, num_blocks=2, layers_per_block=1, num_classes=3
    )
    model = TarFlowModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("pairs_per_pass", [None, 1, 4, 15, 99])
def test_all_classes_at_once_equal_one_at_a_time(model, images, pairs_per_pass):
    found = class_log_prob(model, images, pairs_per_pass=pairs_per_pass)
    for label in range(3):
        expected = model.log_prob(images, torch.full((5,), label))
        torch.testing.assert_close(found[:, label], expected, rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    assert found.std(dim=1).min() > 0.01  # the classes matter


def test_bayes_rule_with_a_prior():
    log_prob = torch.tensor([[-1000.0, -1001.0, -1003.0], [5.0, 5.0, 5.0]])
    prior = torch.tensor([0.2, 0.3, 0.5])
    weights = torch.tensor([[1.0, math.exp(-1), math.exp(-3)], [1, 1, 1]], dtype=torch.float64) * prior.double()
    torch.testing.assert_close(class_posterior(log_prob, prior), weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(class_posterior(log_prob, prior * 7), class_posterior(log_prob, prior))


def test_two_gaussian_classes_have_a_logistic_posterior():
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)
    log_prob = torch.stack([-0.5 * (x - mean) ** 2 for mean in (-1.0, 1.0)], dim=1)
    torch.testing.assert_close(class_posterior(log_prob)[:, 1], torch.sigmoid(2 * x))


def test_the_fitted_temperature_undoes_an_exaggeration():
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(4000, 5, dtype=torch.float64, generator=generator) * 2
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(honest * 30, labels) == pytest.approx(30, rel=0.1)
    raw = calibration(class_posterior(honest * 30), labels)
    tempered = calibration(class_posterior(honest * 30, temperature=fit_temperature(honest * 30, labels)), labels)
    assert raw.expected_error > 0.2
    assert tempered.expected_error < 0.03
    assert tempered.accuracy == raw.accuracy
    assert tempered.log_loss < raw.log_loss


def test_calibration_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    posterior = (3 * torch.randn(500, 4, generator=generator)).softmax(1)
    labels = torch.randint(0, 4, (500,), generator=generator)
    found = calibration(posterior, labels, num_bins=10)
    expected = multiclass_calibration_error(posterior, labels, num_classes=4, n_bins=10)
    assert found.expected_error == pytest.approx(float(expected), rel=1e-5)
    assert found.accuracy == pytest.approx(float((posterior.argmax(1) == labels).float().mean()))
    assert sum(found.bin_count) == 500


def test_a_sure_and_right_posterior_is_calibrated():
    found = calibration(torch.eye(3), torch.arange(3))
    assert (found.accuracy, found.log_loss, found.expected_error) == (1.0, 0.0, 0.0)
    assert found.bin_count[-1] == 3


def test_bad_input_is_named(model, images):
    unconditional = TarFlowModel(
        TarFlowConfig(image_size=4, num_channels=2, hidden_size=32, head_dim=16, num_blocks=1, layers_per_block=1)
    )
    with pytest.raises(ValueError, match="class-conditional, got num_classes=0"):
        class_log_prob(unconditional, images.float())
    with pytest.raises(ValueError, match="pairs_per_pass must be None or at least 1, got 0"):
        class_log_prob(model, images, pairs_per_pass=0)
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        class_posterior(torch.zeros(1, 2), temperature=0)
    with pytest.raises(ValueError, match="class_prior must be 2 positive numbers"):
        class_posterior(torch.zeros(1, 2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"class_labels must be \(1,\)"):
        calibration(torch.ones(1, 2) / 2, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"in 0 ... 1, got \[2\]"):
        calibration(torch.ones(1, 2) / 2, torch.tensor([2]))


@pytest.mark.parametrize("pairs_per_pass", [1, 4, 99])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_all_conditions_at_once_equal_one_at_a_time(images, num_classes, pairs_per_pass):
    torch.manual_seed(0)
    shape = {"image_size": 4, "num_channels": 2, "hidden_size": 32, "head_dim": 16, "num_blocks": 2}
    config = TarFlowConfig(**shape, layers_per_block=1, num_classes=num_classes, condition_dim=2)
    model = TarFlowModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    labels = torch.arange(5) % 3 if num_classes else None
    own = torch.randn(5, 4, 2, dtype=torch.float64)
    found = condition_log_prob(model, images, own, class_labels=labels, pairs_per_pass=pairs_per_pass)
    for place in range(4):
        expected = model.log_prob(images, labels, condition=own[:, place])
        torch.testing.assert_close(found[:, place], expected, rtol=1e-12, atol=1e-12)
    shared = condition_log_prob(model, images, own[1], class_labels=labels)
    torch.testing.assert_close(shared[1], found[1], rtol=1e-12, atol=1e-12)
    assert found.std(dim=1).min() > 0.01  # the condition matters
    with pytest.raises(ValueError, match=r"conditions must be \(5, n, 2\) or \(n, 2\) for 5 images, got \(4, 3\)"):
        condition_log_prob(model, images, torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="pairs_per_pass must be at least 1, got 0"):
        condition_log_prob(model, images, own, pairs_per_pass=0)


def test_a_model_without_a_condition_has_no_posterior_of_it(model, images):
    with pytest.raises(ValueError, match="model must have a condition, got condition_dim=0"):
        condition_log_prob(model, images, torch.zeros(4, 1))


def test_intervals_of_gaussian_posteriors_are_those_of_the_normal_distribution():
    mean, std = torch.tensor([-1.0, 0.3], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    grid = mean[:, None] + std[:, None] * torch.linspace(-8, 8, 801, dtype=torch.float64)
    posterior = class_posterior(-0.5 * ((grid - mean[:, None]) / std[:, None]) ** 2)
    expected = torch.stack([mean - 1.6448536 * std, mean + 1.6448536 * std], dim=1)
    torch.testing.assert_close(central_interval(grid, posterior, 0.9), expected, rtol=0, atol=1e-4)


def test_the_interval_of_a_right_model_holds_the_true_value_as_often_as_it_says():
    """c ~ N(0, 1) and x = c + N(0, 0.5^2): on a grid of c with that prior the 90 % interval is right in 90 %."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 1, dtype=torch.float64, generator=generator)
    x = true + 0.5 * torch.randn(4000, 1, dtype=torch.float64, generator=generator)
    grid = torch.linspace(-5, 5, 201, dtype=torch.float64)
    posterior = class_posterior(-0.5 * ((x - grid) / 0.5) ** 2, (-0.5 * grid**2).exp())
    ends = central_interval(grid, posterior, 0.9)
    inside = (ends[:, :1] <= true) & (true <= ends[:, 1:])
    assert inside.double().mean() == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(
    ("grid", "mass", "message"),
    [
        ([0.0, 1.0, 2.0], 1.0, r"mass must be in \(0, 1\), got 1.0"),
        ([0.0, 1.0], 0.9, r"grid must be 3 rising points, at least two, got \(2,\)"),
        ([0.0, 2.0, 1.0], 0.9, "grid must be 3 rising points"),
        ([0.0, 1.0, 3.0], 0.9, "grid must be evenly spaced"),
    ],
)
def test_grids_and_masses_that_cannot_be_are_refused(grid, mass, message):
    with pytest.raises(ValueError, match=message):
        central_interval(torch.tensor(grid), torch.full((1, 3), 1 / 3), mass)


def test_the_loss_of_a_class_that_is_out_of_the_question_is_a_number():
    scores, labels = torch.tensor([[0.0, -800.0], [1.0, 1.0]]), torch.tensor([1, 0])
    assert log_loss(scores, labels) == pytest.approx((800 + math.log(2)) / 2)
    posterior = class_posterior(scores[1:])
    assert log_loss(scores[1:], labels[1:]) == pytest.approx(calibration(posterior, labels[1:]).log_loss)
