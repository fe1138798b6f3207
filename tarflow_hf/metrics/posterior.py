"""What an image says about its class or condition: log p(x|y) for all y, Bayes' rule, and how far to trust it."""

import math
from dataclasses import dataclass

import torch

from tarflow_hf.modeling_tarflow import TarFlowModel


@torch.no_grad()
def class_log_prob(
    model: TarFlowModel, pixel_values: torch.Tensor, *, pairs_per_pass: int | None = None
) -> torch.Tensor:
    """Log-density of each image under each class, log p(x|y).

    Images and classes are paired and go through the model as one batch, `pairs_per_pass` pairs at a time. A model with
    noise conditioning is asked at the lowest of its levels.

    Args:
        model: A class-conditional model.
        pixel_values: (batch, channels, height, width) images in the [-1, 1] pixel space.
        pairs_per_pass: Most pairs of image and class in a pass, which bounds memory; None for all in one pass.

    Returns:
        (batch, num_classes) log-densities in nats.

    Raises:
        ValueError: If the model is unconditional, or `pairs_per_pass` is below 1.

    Example:
        >>> from tarflow_hf import TarFlowConfig
        >>> config = TarFlowConfig(
        ...     image_size=4, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1, num_classes=3
        ... )
        >>> class_log_prob(TarFlowModel(config).eval(), torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 3])
    """
    num_classes = model.config.num_classes
    if num_classes == 0:
        raise ValueError("model must be class-conditional, got num_classes=0")
    if pairs_per_pass is not None and pairs_per_pass < 1:
        raise ValueError(f"pairs_per_pass must be None or at least 1, got {pairs_per_pass}")
    pairs = torch.arange(len(pixel_values) * num_classes, device=pixel_values.device)
    parts = []
    for part in pairs.split(pairs_per_pass or max(len(pairs), 1)):
        images = pixel_values[part // num_classes]
        parts.append(model.log_prob(images, part % num_classes, model.lowest_noise_level(images)))
    return torch.cat(parts).unflatten(0, (len(pixel_values), num_classes))


@torch.no_grad()
def condition_log_prob(
    model: TarFlowModel,
    pixel_values: torch.Tensor,
    conditions: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    pairs_per_pass: int = 256,
) -> torch.Tensor:
    """Log-density of each image under each of its conditions, log p(x|c), for [`class_posterior`] over a grid of them.

    Args:
        model: A model with a condition. One with noise conditioning is asked at the lowest of its levels.
        pixel_values: (batch, channels, height, width) images in the [-1, 1] pixel space.
        conditions: (batch, n, condition_dim) conditions to try, or (n, condition_dim) for all images.
        class_labels: (batch,) class ids, where they are known.
        pairs_per_pass: Most pairs of image and condition in a pass, which bounds memory.

    Returns:
        (batch, n) log-densities in nats.

    Raises:
        ValueError: If the model has no condition, `conditions` do not fit, or `pairs_per_pass` is below 1.

    Example:
        >>> from tarflow_hf import TarFlowConfig
        >>> config = TarFlowConfig(
        ...     image_size=4, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1, condition_dim=1
        ... )
        >>> grid = torch.linspace(-2, 2, 5)[:, None]
        >>> condition_log_prob(TarFlowModel(config).eval(), torch.zeros(2, 1, 4, 4), grid).shape
        torch.Size([2, 5])
    """
    for name, value in {"pixel_values": pixel_values, "conditions": conditions}.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    count, size = len(pixel_values), model.config.condition_dim
    if size == 0:
        raise ValueError("model must have a condition, got condition_dim=0")
    if pairs_per_pass < 1:
        raise ValueError(f"pairs_per_pass must be at least 1, got {pairs_per_pass}")
    given = conditions.expand(count, -1, -1) if conditions.ndim == 2 else conditions
    if given.ndim != 3 or given.shape[0] != count or given.shape[2] != size:
        raise ValueError(
            f"conditions must be ({count}, n, {size}) or (n, {size}) for {count} images, got {tuple(conditions.shape)}"
        )
    tried = given.shape[1]
    parts = []
    for part in torch.arange(count * tried, device=pixel_values.device).split(pairs_per_pass):
        images = pixel_values[part // tried]
        labels = None if class_labels is None else class_labels[part // tried]
        condition = given.flatten(0, 1)[part]
        parts.append(model.log_prob(images, labels, model.lowest_noise_level(images), condition=condition))
    return torch.cat(parts).unflatten(0, (count, tried))


def central_interval(grid: torch.Tensor, posterior: torch.Tensor, mass: float) -> torch.Tensor:
    """The interval between the (1 - mass) / 2 and the (1 + mass) / 2 quantile of probabilities on an even grid.

    Each probability is spread evenly over its cell, half a step to both sides of its point.

    Args:
        grid: (n,) or (batch, n) points, evenly spaced and rising, at least two.
        posterior: (batch, n) probabilities of the points.
        mass: Share of the probability in the interval, in (0, 1).

    Returns:
        (batch, 2) lower and upper ends, float64.

    Raises:
        ValueError: If the grid is not even, does not fit the posterior, or the mass is not in (0, 1).

    Example:
        >>> central_interval(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.full((1, 4), 0.25), 0.5)
        tensor([[0.5000, 2.5000]], dtype=torch.float64)
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must be in (0, 1), got {mass}")
    points = grid.double().expand(posterior.shape) if grid.shape[-1] == posterior.shape[-1] else grid.double()
    steps = points.diff(dim=-1)
    if points.shape != posterior.shape or points.shape[-1] < 2 or not (steps > 0).all():
        raise ValueError(f"grid must be {posterior.shape[-1]} rising points, at least two, got {tuple(grid.shape)}")
    if not torch.allclose(steps, steps[..., :1].expand_as(steps), rtol=1e-3, atol=0):
        raise ValueError("grid must be evenly spaced")
    step, below = steps[..., :1], posterior.double().cumsum(dim=-1)
    ends = []
    for level in ((1 - mass) / 2, (1 + mass) / 2):
        wanted = level * below[..., -1:]
        cell = torch.searchsorted(below, wanted).clamp(max=below.shape[-1] - 1)
        share = below.gather(-1, cell), posterior.double().gather(-1, cell)
        ends.append(points.gather(-1, cell) + step * (0.5 - (share[0] - wanted) / share[1]))
    return torch.cat(ends, dim=-1)


def class_posterior(
    log_prob: torch.Tensor, class_prior: torch.Tensor | None = None, *, temperature: float = 1.0
) -> torch.Tensor:
    """Class probabilities by Bayes' rule: p(y|x) = p(x|y)^(1/t) p(y) / sum_y' p(x|y')^(1/t) p(y').

    Log-densities of thousands of dimensions differ by many nats, so the rule is almost always sure of itself, also
    where it is wrong. A temperature t above 1 makes it milder without changing its order; see [`fit_temperature`].

    Args:
        log_prob: (batch, num_classes) log p(x|y) in nats, of [`class_log_prob`].
        class_prior: (num_classes,) positive p(y); None for equal classes. Need not sum to 1.
        temperature: t, above 0; 1 is Bayes' rule itself.

    Returns:
        (batch, num_classes) probabilities, float64.

    Raises:
        ValueError: If the prior does not fit or the temperature is not positive.

    Example:
        >>> class_posterior(torch.tensor([[0.0, 0.0]]), torch.tensor([3.0, 1.0]))
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    scores = log_prob.double() / temperature
    if class_prior is not None:
        if class_prior.shape != log_prob.shape[1:] or not (class_prior > 0).all():
            raise ValueError(f"class_prior must be {log_prob.shape[1]} positive numbers, got {class_prior.tolist()}")
        scores = scores + class_prior.to(scores).log()
    return scores.softmax(dim=1)


def fit_temperature(log_prob: torch.Tensor, class_labels: torch.Tensor) -> float:
    """The temperature of [`class_posterior`] with the lowest log loss, found by bisection of its convex derivative.

    Args:
        log_prob: (batch, num_classes) log p(x|y) in nats, of images that nothing else is measured on.
        class_labels: (batch,) their classes.

    Returns:
        A temperature between 1e-6 and 1e6.

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2.

    Example:
        >>> log_prob = torch.tensor([[0.0, -60.0], [0.0, -60.0], [0.0, -60.0], [-60.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])  # the third image is read wrong, as surely as the others right
        >>> temperature = fit_temperature(log_prob, labels)
        >>> class_posterior(log_prob, temperature=temperature)[0]  # right three times out of four
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    scores = log_prob.double()
    of_label = scores.gather(1, class_labels[:, None])[:, 0]
    low, high = math.log(1e-6), math.log(1e6)  # of the inverse temperature b; d loss / d b = E_p[s] - s_label rises
    for _ in range(100):
        middle = (low + high) / 2
        expected = (torch.softmax(scores * math.exp(middle), dim=1) * scores).sum(1)
        low, high = (low, middle) if (expected - of_label).mean() > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


@dataclass(frozen=True)
class Calibration:
    """How class probabilities compare with what came out.

    Args:
        accuracy: Share of images whose most probable class is theirs.
        log_loss: Mean of -log p(label) in nats.
        expected_error: Mean over images of |accuracy - confidence| of their bin, the expected calibration error.
        bin_confidence: (num_bins,) mean highest probability of the images in each bin of it; nan for an empty bin.
        bin_accuracy: (num_bins,) share of them that are right; nan for an empty bin.
        bin_count: (num_bins,) how many they are.

    Example:
        >>> posterior = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> found = calibration(posterior, torch.tensor([0, 1]), num_bins=2)
        >>> found.bin_confidence, found.bin_accuracy, found.bin_count
        ([nan, 0.75], [nan, 0.5], [0, 2])
    """

    accuracy: float
    log_loss: float
    expected_error: float
    bin_confidence: list[float]
    bin_accuracy: list[float]
    bin_count: list[int]


def log_loss(log_prob: torch.Tensor, class_labels: torch.Tensor) -> float:
    """Mean of -log p(y|x) by Bayes' rule with equal classes, of scores, whose probabilities may underflow.

    Args:
        log_prob: (batch, num_classes) log p(x|y) in nats.
        class_labels: (batch,) true classes.

    Example:
        >>> log_loss(torch.tensor([[0.0, -800.0]]), torch.tensor([1]))
        800.0
    """
    return float(-log_prob.double().log_softmax(dim=1).gather(1, class_labels[:, None]).mean())


def calibration(posterior: torch.Tensor, class_labels: torch.Tensor, *, num_bins: int = 15) -> Calibration:
    """Accuracy, log loss and expected calibration error of class probabilities.

    ECE = sum over bins of n_bin / n |accuracy_bin - confidence_bin|, in `num_bins` equal bins of the highest
    probability.

    Args:
        posterior: (batch, num_classes) probabilities.
        class_labels: (batch,) true classes 0 ... num_classes - 1.
        num_bins: Bins of (0, 1], at least 1.

    Returns:
        The measures, and the bins of a reliability diagram.

    Raises:
        ValueError: If the labels do not fit the probabilities.

    Reference: Guo et al., arXiv 1706.04599, equation 3.

    Example:
        >>> posterior = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
        >>> found = calibration(posterior, torch.tensor([0, 0, 1, 1]), num_bins=1)
        >>> found.accuracy, round(found.log_loss, 3), round(found.expected_error, 3)
        (0.75, 0.439, 0.05)
    """
    if class_labels.shape != posterior.shape[:1] or len(class_labels) == 0:
        raise ValueError(f"class_labels must be ({len(posterior)},) and not empty, got {tuple(class_labels.shape)}")
    if class_labels.min() < 0 or class_labels.max() >= posterior.shape[1]:
        raise ValueError(f"class_labels must be in 0 ... {posterior.shape[1] - 1}, got {class_labels.tolist()}")
    confidence, predicted = posterior.double().max(dim=1)
    right = (predicted == class_labels).double()
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1  # confidence 1 may round above 1
    count, accuracy, mean_confidence = (
        torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins.cpu(), values.cpu())
        for values in (torch.ones_like(right), right, confidence)
    )
    gap = (accuracy - mean_confidence).abs().sum() / len(right)
    of_label = posterior.double().gather(1, class_labels[:, None])
    return Calibration(
        accuracy=float(right.mean()),
        log_loss=float(-of_label.log().mean()),
        expected_error=float(gap),
        bin_confidence=(mean_confidence / count).tolist(),
        bin_accuracy=(accuracy / count).tolist(),
        bin_count=count.long().tolist(),
    )


__all__ = [
    "Calibration",
    "calibration",
    "central_interval",
    "class_log_prob",
    "class_posterior",
    "condition_log_prob",
    "fit_temperature",
    "log_loss",
]
