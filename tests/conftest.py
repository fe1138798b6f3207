"""Tiny real models for the tests, in float64 where mathematics is tested, and the settings of hypothesis."""

import os
from functools import cache

import hypothesis
import pytest
import torch

from tarflow_hf import TarFlowConfig, TarFlowModel, TarFlowPipeline
from tarflow_hf.flow import products

# readline, which pytest-xdist's processes import, exports the size of a terminal that is not there, and older versions
# of tqdm cut their bars to that.
os.environ.pop("COLUMNS", None)
hypothesis.settings.register_profile("tarflow", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tarflow")


def tiny_config(**overrides):
    """A configuration of a few thousand weights."""
    sizes = {
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "hidden_size": 16,
        "num_blocks": 3,
        "layers_per_block": [1, 2, 1],
        "head_dim": 8,
        "mlp_ratio": 2,
        "num_classes": 4,
        "noise_std": 0.1,
    }
    return TarFlowConfig(**(sizes | overrides))


def tiny_model(*, seed=0, dtype=torch.float64, std=0.2, **overrides):
    """A model in evaluation mode whose weights are all random, so that every path matters."""
    model = TarFlowModel(tiny_config(**overrides)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05 if "proj_out" in name else std, generator=generator)
        if model.config.volume_preserving:
            model.prior_variance.uniform_(0.5, 2.0, generator=generator)
    return model


def random_images(model, batch=3, *, seed=1):
    """Images in [-1, 1] that fit a model."""
    config = model.config
    shape = (batch, config.num_channels, config.image_height, config.image_width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=model.dtype) * 2 - 1


def random_latents(model, batch=3, *, seed=2):
    """Latents that fit a model."""
    shape = (batch, model.config.num_tokens, model.config.patch_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)


def seeded(*seeds):
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quiet_pipeline(model, **defaults):
    """A pipeline without a progress bar."""
    pipe = TarFlowPipeline(transformer=model, **defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def onednn_chosen(monkeypatch):
    """Large products are oneDNN's, whatever the processor; a PyTorch that was built without it has nothing to test."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The tiny run of `training_runs` that nobody interrupts, by its number of processes; each is made once."""
    from training_runs import Run

    return cache(lambda processes: Run(tmp_path_factory.mktemp("whole") / "run", processes=processes).finish())


@pytest.fixture
def model():
    """A class-conditional model of three blocks in float64."""
    return tiny_model()
