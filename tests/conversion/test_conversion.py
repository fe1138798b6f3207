"""Converted checkpoints against what the reference implementation computed, and what the converter refuses."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tarflow_hf import Guidance, convert_reference_checkpoint
from tarflow_hf.conversion.checkpoint import reference_state_dict
from tarflow_hf.flow.likelihood import bits_per_dim, normal_log_prob
from tarflow_hf.flow.sampling.denoising import denoise

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["cond_model_2_128_2_1_0.05", "uncond_model_4_64_3_2_0.10", "vp_model_2_64_2_1_0.07"]
SIZES = {NAMES[0]: (8, 3), NAMES[1]: (16, 1), NAMES[2]: (8, 3)}
GUIDANCE = {
    "null": (None, False),
    "cond": (None, True),
    "cfg1.5_const": (Guidance(2.5, "constant"), True),
    "cfg1.5_annealed": (Guidance(2.5, "linear"), True),
    "cfg1.5_annealed_shift_only": (Guidance(2.5, "linear", apply_to="shift"), True),
    "cfg1.5_annealed_scale_only": (Guidance(2.5, "linear", apply_to="log_scale"), True),
    "cfg1.5_annealed_temp0.5": (Guidance(2.5, "linear", 0.5), True),
    "null_cfg0.7_temp0.5_annealed": (Guidance(1.7, "linear", 0.5), False),
    "null_cfg0.7_temp1.5_const": (Guidance(1.7, "constant", 1.5), False),
}


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """A converted model and the tensors recorded from the reference."""
    image_size, num_channels = SIZES[request.param]
    model = convert_reference_checkpoint(
        FIXTURES / f"{request.param}.pth", image_size=image_size, num_channels=num_channels
    )
    with safe_open(FIXTURES / f"{request.param}.safetensors", "pt") as file:
        return model, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def labels_of(tensors, branch):
    return {"cond": tensors.get("class_labels"), "dropped": tensors.get("class_labels_with_dropped"), "null": None}[
        branch
    ]


def branches(tensors):
    return [branch for branch in ("cond", "null", "dropped") if f"encode.{branch}.z" in tensors]


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_encoding(golden):
    model, tensors = golden
    assert branches(tensors)
    for branch in branches(tensors):
        output = model(tensors["pixel_values"], labels_of(tensors, branch), output_hidden_states=True)
        assert_close(output.latents, tensors[f"encode.{branch}.z"], 1e-5)
        assert_close(output.log_det / model.config.num_dims, tensors[f"encode.{branch}.logdet_mean"], 1e-5)
        assert_close(output.loss, tensors[f"encode.{branch}.loss"].squeeze(), 1e-5)
        for block, latents in enumerate(output.hidden_states):
            assert_close(latents, tensors[f"encode.{branch}.block{block}"], 1e-5)


def test_bits_per_dimension(golden):
    """The reference takes the standard normal prior always, also where it has learned another (a bug of its own)."""
    model, tensors = golden
    for branch in branches(tensors):
        output = model(tensors["pixel_values"], labels_of(tensors, branch))
        log_prob = normal_log_prob(output.latents) + output.log_det
        expected = tensors[f"encode.{branch}.bits_per_dim"]
        assert_close(bits_per_dim(log_prob, model.config.num_dims), expected, 1e-5)
        ours = bits_per_dim(model.log_prob(tensors["pixel_values"], labels_of(tensors, branch)), model.config.num_dims)
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5) != model.config.volume_preserving


@pytest.mark.parametrize("window", [1, 4, 16, None])
def test_decoding(golden, window):
    model, tensors = golden
    assert model.config.num_tokens == 16  # the widest window, which None does not choose at tolerance 0
    names = [name for name in GUIDANCE if f"decode.{name}.image" in tensors]
    assert {"null"} < set(names)
    for name in names:
        guidance, labelled = GUIDANCE[name]
        labels = tensors["class_labels"] if labelled else None
        images = model.decode(tensors["noise"], labels, guidance=guidance, window=window, tolerance=0)
        assert_close(images, tensors[f"decode.{name}.image"], 2e-4)


def test_every_recorded_decoding_is_compared(golden):
    _, tensors = golden
    recorded = {key.split(".", 1)[1].removesuffix(".image") for key in tensors if key.endswith(".image")}
    assert recorded <= set(GUIDANCE)


def test_block_by_block(golden):
    model, tensors = golden
    branch = "cond" if "decode.cond.seq1" in tensors else "null"
    steps = model.decode_blocks(tensors["noise"], labels_of(tensors, branch), window=4, tolerance=0)
    for step, (patches, _) in enumerate(steps, start=1):
        assert_close(model.unpatchify(patches), tensors[f"decode.{branch}.seq{step}"], 2e-4)
    assert step == model.config.num_blocks


@pytest.mark.parametrize("strength", [1.0, 0.9])
def test_denoising(golden, strength):
    """The reference's score, too, is that of the standard normal prior."""
    model, tensors = golden
    labels = tensors.get("class_labels")

    def log_prob(images, rows):
        output = model(images, None if labels is None else labels[rows])
        return normal_log_prob(output.latents) + output.log_det

    expected = tensors[f"denoise.m{strength}"]
    for chunk_size in (None, 2):
        noise_std = model.config.noise_std
        denoised = denoise(log_prob, tensors["noisy"], noise_std, strength=strength, chunk_size=chunk_size)
        assert_close(denoised, expected, 1e-4)
    assert not torch.allclose(tensors["noisy"], expected, rtol=0, atol=1e-3)


def test_noise_and_sizes_are_read(golden):
    model, _ = golden
    config = model.config
    read = {
        (config.patch_size, config.hidden_size, config.num_blocks, config.layers_per_block, config.noise_std),
    }
    assert read <= {(2, 128, 2, 1, 0.05), (4, 64, 3, 2, 0.1), (2, 64, 2, 1, 0.07)}
    assert config.volume_preserving == (config.noise_std == 0.07)
    assert config.num_classes == {0.05: 5, 0.1: 0, 0.07: 4}[config.noise_std]
    assert not model.training


@pytest.fixture
def checkpoint(tmp_path):
    """Writes an altered copy of the unconditional checkpoint and returns its path."""

    def write(alter, name="uncond_model_4_64_3_2_0.10.pth"):
        state = torch.load(FIXTURES / f"{NAMES[1]}.pth", weights_only=True)
        alter(state)
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return write


def convert(path, **arguments):
    return convert_reference_checkpoint(path, **({"image_size": 16, "num_channels": 1} | arguments))


def test_noise_from_name_or_argument(checkpoint):
    unchanged = lambda state: None  # noqa: E731
    config = convert(checkpoint(unchanged, "uncond_model_4_64_3_2_uniform.pth")).config
    assert (config.noise_type, config.noise_std) == ("uniform", 0.0)
    config = convert(checkpoint(unchanged, "weights.pth"), noise_std=0.3).config
    assert (config.noise_type, config.noise_std) == ("gaussian", 0.3)
    config = convert(checkpoint(unchanged), noise_type="uniform").config
    assert config.noise_type == "uniform"
    with pytest.raises(ValueError, match=r"'weights.pth' does not carry the noise .* give noise_type and noise_std"):
        convert(checkpoint(unchanged, "weights.pth"))
    with pytest.raises(ValueError, match="noise_std must be given"):
        convert(checkpoint(unchanged, "weights.pth"), noise_type="gaussian")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), "unknown key 'extra'"),
        (lambda s: s.pop("blocks.1.proj_in.bias"), "lacks 1 tensors, among them the one for 'blocks.1.proj_in.bias'"),
        (lambda s: s.pop("blocks.0.pos_embed"), "lacks the key 'blocks.0.pos_embed'"),
        (
            lambda s: s.update({"blocks.2.proj_out.bias": torch.zeros(5)}),
            r"blocks.2.proj_out.bias must have shape \(32,\)",
        ),
        (
            lambda s: s.update(var=torch.full((16, 16), 2.0)),
            "var must be one in a model that is not volume preserving",
        ),
        (lambda s: s.update({"blocks.0.proj_out.weight": torch.zeros(7, 64)}), "proj_out.weight must have 32 rows"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")], r"without a gap, got \[0, 2\]"),
        (lambda s: s.clear(), r"without a gap, got \[\]"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(checkpoint, alter, message):
    with pytest.raises(ValueError, match=message):
        convert(checkpoint(alter))


def test_an_image_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="image_size=32 and num_channels=1 do not fit .* 16 tokens of 16 numbers"):
        convert(FIXTURES / f"{NAMES[1]}.pth", image_size=32)
    with pytest.raises(ValueError, match="image_size=16 and num_channels=3 do not fit"):
        convert(FIXTURES / f"{NAMES[1]}.pth", num_channels=3)


class Payload:
    def __reduce__(self):
        return print, ("code of the checkpoint was run",)


def test_broken_and_unsafe_files_are_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        convert(tmp_path / "uncond_model_4_64_3_2_0.10.pth")
    path = tmp_path / "uncond_model_4_64_3_2_0.10.pth"
    whole = (FIXTURES / f"{NAMES[1]}.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a complete PyTorch checkpoint"):
        convert(path)
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match="holds more than tensors and is not loaded"):
        convert(path)
    path.write_bytes(pickle.dumps({"weight": Payload()}))
    with pytest.raises(ValueError, match="holds more than tensors|is not a complete PyTorch checkpoint"):
        convert(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_back_under_the_authors_keys(name):
    image_size, num_channels = SIZES[name]
    model = convert_reference_checkpoint(FIXTURES / f"{name}.pth", image_size=image_size, num_channels=num_channels)
    state = reference_state_dict(model)
    original = torch.load(FIXTURES / f"{name}.pth", weights_only=True)
    assert state.keys() == original.keys()
    assert all(tensor.equal(original[key]) for key, tensor in state.items())
