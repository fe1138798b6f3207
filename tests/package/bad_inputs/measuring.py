"""What the measuring commands and functions are given: options, references, features."""

import numpy as np
import torch
from conftest import tiny_config, tiny_model

from bad_inputs import Bad
from examples import benchmark, evaluate, posterior, progress, sweep
from tarflow_hf import TarFlowImageProcessor, save_image_grid
from tarflow_hf.flow.inputs import class_id
from tarflow_hf.metrics.distances import kernel_distance, overlap
from tarflow_hf.metrics.features import FeatureExtractor, load_feature_extractor
from tarflow_hf.metrics.measure import Dequantization
from tarflow_hf.metrics.posterior import condition_log_prob
from tarflow_hf.metrics.statistics import FeatureSummary, Moments, UniformSample


def reference(name, write, message, error=ValueError):
    """A row: a file that is to be a reference."""

    def call(folder):
        write(folder / "stats.npz")
        FeatureSummary.load(folder / "stats.npz")

    return Bad(name, call, error, rf"stats\.npz.*{message}")


def arrays(**values):
    return lambda path: np.savez(path, **values)


def bad(name, call, message, error=ValueError):
    return Bad(name, lambda folder: call(), error, message)


VARY = ["gone", "--data", "gone", "--vary", "slant"]


def input_of(*told):
    """What `benchmark.py input` is told."""
    return lambda: benchmark.main(["input", *told])


SOUND = {"mu": np.zeros(2), "sigma": np.eye(2)}
DISTANCE = ["gone", "--data", "gone", "--metrics", "frechet_distance"]

ROWS = [
    reference("a folder", lambda path: path.mkdir(), "it is a folder", FileNotFoundError),
    reference("no file", lambda path: None, "nothing there", FileNotFoundError),
    reference("text", lambda path: path.write_text("mu sigma"), "must be an .npz file with 'mu' and 'sigma'"),
    reference("empty", lambda path: path.write_bytes(b""), "must be an .npz file"),
    reference("images", arrays(arr_0=np.zeros(2)), r"must hold 'mu' and 'sigma', it holds \['arr_0'\]"),
    reference("not square", arrays(mu=np.zeros(2), sigma=np.eye(3)), r"got \(2,\) and \(3, 3\)"),
    reference(
        "not symmetric", arrays(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]])), "differs by 0.5 at 0, 1"
    ),
    reference("of variances below 0", arrays(mu=np.zeros(2), sigma=-np.eye(2)), "no variance below 0, got -1"),
    reference("not finite", arrays(mu=np.full(2, np.nan), sigma=np.eye(2)), "must be finite"),
    reference("objects", arrays(mu=np.array([{}], dtype=object), sigma=np.eye(1)), "damaged .npz file"),
    reference("words", arrays(mu=np.array(["a", "b"]), sigma=np.eye(2)), "could not convert"),
    reference("a count of words", arrays(**SOUND, num_samples=np.array("many")), "invalid literal"),
    bad("two samples", lambda: evaluate.main([*DISTANCE, "--num_samples", "2"]), "--num_samples must be at least 6"),
    bad("no sample", lambda: evaluate.main([*DISTANCE, "--num_samples", "0"]), "at least 6 for the distances, got 0"),
    bad("a sweep of five", lambda: sweep.main(["gone", "--data", "gone", "--num_samples", "5"]), "got 5"),
    bad("progress by one", lambda: progress.main(["gone", "--num_samples", "1"]), "got 1"),
    bad("an input in no rounds", input_of("--rounds", "0"), "rounds must be at least 1, got 0"),
    bad("an input in no steps", input_of("--steps", "0"), "steps must be at least 1, got 0"),
    bad(
        "an input beside no run",
        input_of("--metrics", "a.jsonl"),
        "metrics must name .* no a.jsonl",
        FileNotFoundError,
    ),
    bad("an input without an option", input_of("--batch_sise", "8"), "2", SystemExit),
    bad("a posterior on two points", lambda: posterior.main([*VARY, "--grid", "2"]), "2", SystemExit),
    bad("a posterior of one image", lambda: posterior.main([*VARY, "--num_images", "1"]), "2", SystemExit),
    bad("no draws", lambda: Dequantization(num_draws=0), "num_noise_draws must be at least 1, got 0"),
    bad("an unknown extractor", lambda: load_feature_extractor("vgg"), "must be inception, .* got 'vgg'"),
    bad("an extractor that is gone", lambda: load_feature_extractor("a.py:f"), "not a file", FileNotFoundError),
    bad(
        "levels that are numbers",
        lambda: FeatureExtractor.of_module(torch.nn.Flatten(), "x")(torch.zeros(1, 1, 2, 2)),
        "levels must be uint8",
    ),
    bad(
        "features that are pictures",
        lambda: FeatureExtractor.of_module(torch.nn.Identity(), "x")(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)),
        "must give",
    ),
    bad("no features", lambda: Moments.of(np.zeros((0, 3))), "at least one vector, got 0"),
    bad("features in a row", lambda: Moments.of(np.zeros(3)), r"shape \(batch, num_features\)"),
    bad("features not finite", lambda: Moments.of(np.full((1, 2), np.inf)), "row 0 of 1 is not"),
    bad(
        "samples of two capacities",
        lambda: UniformSample.of(np.eye(2), 0, 1).merge(UniformSample.of(np.eye(2), 2, 2)),
        "capacity 1 and 2",
    ),
    bad("one sample against one", lambda: kernel_distance(np.eye(1), np.eye(1)), "at least 2 samples, got 1 and 1"),
    bad("five neighbours of three", lambda: overlap(np.eye(3), np.eye(3)), "at least 6 samples, got 3 and 3"),
    bad("another width", lambda: kernel_distance(np.eye(2), np.eye(3)), "as many features"),
    bad("a class beyond the last", lambda: class_id(4, tiny_config()), "-1 .* 3, got 4"),
    bad("no such class name", lambda: class_id("zebra", tiny_config()), "'zebra' is unknown"),
    bad("half a class", lambda: class_id(0.5, tiny_config()), "class ids or names, got 0.5"),
    *(
        bad(f"features {name}", lambda values=values: kernel_distance(values, np.eye(3)), f"features must be .*{got}")
        for name, values, got in [
            ("of nothing", None, "got NoneType"),
            ("in a tensor", torch.eye(3), "got Tensor"),
            ("of whole numbers", np.eye(3, dtype=int), "got int"),
            ("of complex numbers", np.eye(3, dtype=complex), "got complex128"),
            ("with a NaN", np.full((3, 3), np.nan), "finite, and some are not"),
        ]
    ),
    bad(
        "overlap of what is not finite",
        lambda: overlap(np.full((9, 3), np.inf), np.ones((9, 3))),
        "features must be finite",
    ),
    bad(
        "conditions in a list",
        lambda: condition_log_prob(tiny_model(condition_dim=1), torch.zeros(1, 1, 8, 8), [[0.0]]),
        "conditions must be a tensor, got list",
    ),
    bad(
        "a grid of a tensor",
        lambda: save_image_grid(torch.zeros(2, 1, 8, 8), "grid.png", columns=2),
        "images must be a list of Pillow's, .* got Tensor",
    ),
    bad(
        "no image to process",
        lambda: TarFlowImageProcessor(image_size=8, num_channels=1)(None),
        "images must be an image, .* got NoneType",
    ),
]
