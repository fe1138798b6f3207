"""In what a density is told: bits of pixels, nats of latents, nats of arrays in the units of their data."""

import math

import pytest
import torch
from conftest import tiny_config

from tarflow_hf.flow.likelihood import DensityUnit, bits_per_dim

ARRAYS = {"num_channels": 2, "value_mean": [5.0, -1.0], "value_scale": [10.0, 0.5]}
UNITS = {
    "pixels": DensityUnit.of(tiny_config()),
    "latents": DensityUnit.of(tiny_config(), latent=True),
    "arrays": DensityUnit.of(tiny_config(**ARRAYS)),
}


def test_each_kind_has_names_of_its_own_and_only_pixels_have_bits():
    found = {kind: (unit.kind, unit.name, unit.text, unit.short, unit.nats) for kind, unit in UNITS.items()}
    assert found == {
        "pixels": ("pixels", "bits_per_dim", "bits per dimension", "bits/dim", math.log(2)),
        "latents": ("latents", "latent_nats_per_dim", "nats per dimension of latents", "nats/dim", 1.0),
        "arrays": ("arrays", "nats_per_dim", "nats per dimension", "nats/dim", 1.0),
    }
    assert [unit.num_dims for unit in UNITS.values()] == [64, 64, 128]
    assert DensityUnit(8) == DensityUnit(8, "pixels", 0.0)
    with pytest.raises(AttributeError):
        DensityUnit(8).num_dims = 9


@pytest.mark.parametrize(("scales", "mean"), [([10.0, 0.1], 0.0), ([math.e, 1.0], 0.5), ([math.e**3] * 2, 3.0)])
def test_arrays_are_told_in_the_units_of_their_data(scales, mean):
    """Of v = x s + m with x uniform on [0, 1]^d the density is 1 / s, channel by channel: log s nats each."""
    unit = DensityUnit.of(tiny_config(**ARRAYS | {"value_scale": scales}))
    assert unit.log_scale == pytest.approx(mean, abs=1e-12)
    assert unit.per_dim(torch.zeros(2, dtype=torch.float64)).tolist() == pytest.approx([mean, mean])
    assert unit.per_dim(torch.tensor([-128.0])).item() == pytest.approx(1 + mean)


def test_what_is_measured_in_bits_is_renamed_with_its_unit():
    log_prob = torch.tensor([-100.0, 30.0], dtype=torch.float64)
    for unit in UNITS.values():
        bits = bits_per_dim(log_prob, unit.num_dims)
        expected = unit.per_dim(log_prob)
        for value, wanted in zip(bits.tolist(), expected.tolist(), strict=True):
            metrics = {"loss": 1.5, "bits_per_dim": value, "validation_bits_per_dim": value}
            found = unit.named(metrics)
            assert found.pop("loss") == 1.5
            assert found == pytest.approx({unit.name: wanted, f"validation_{unit.name}": wanted}, abs=1e-12)
    assert UNITS["pixels"].per_dim(log_prob).equal(bits_per_dim(log_prob, 64))
    assert UNITS["latents"].per_dim(log_prob).tolist() == [100 / 64, -30 / 64]
