"""A model made to fit other data: equal to the source where that can be, and refused where no rule is right."""

from pathlib import Path

import pytest
import torch
from conftest import random_images, tiny_model
from peft import LoraConfig, get_peft_model

from examples import image_sizes
from tarflow_hf import TarFlowPipeline
from tarflow_hf.training.adaptation import adapt, adapt_to
from tarflow_hf.training.grids import interpolate_over_grid, positions_over_grid

NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "fish"}
LABELS = torch.tensor([0, 3, -1])


def origins(adaptation):
    return {weight.name: weight.origin for weight in adaptation.weights}


def same_density(model, other, images, labels=None, other_labels=None, **arguments):
    torch.testing.assert_close(
        other.log_prob(images, other_labels, **arguments), model.log_prob(images, labels), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}, {"volume_preserving": True}, {"image_size": (4, 8)}])
def test_nothing_changed_is_the_source_and_a_copy_of_it(overrides):
    model = tiny_model(**overrides)
    same, adaptation = adapt_to(model, model.config)
    images, labels = random_images(model), LABELS if model.config.num_classes else None
    assert same.log_prob(images, labels).equal(model.log_prob(images, labels))
    assert set(origins(adaptation).values()) == {"copied"}
    assert set(origins(adaptation)) == set(model.state_dict())
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    assert not torch.equal(next(model.parameters()), next(same.parameters()))


def test_classes_are_matched_by_name_and_new_ones_start_at_the_mean():
    model = tiny_model(id2label=NAMES)
    other, adaptation = adapt(model, class_names=["fish", "newt", "cat", "toad", "dog", "bird"])
    images = random_images(model, 4)
    torch.testing.assert_close(
        other.log_prob(images, torch.tensor([0, 2, 4, 5])), model.log_prob(images, torch.tensor([3, 0, 1, 2]))
    )
    same_density(model, other, images, None, torch.full((4,), 1))
    same_density(model, other, images, None, torch.full((4,), 3))
    same_density(model, other, images)  # each new one at the mean leaves the mean of all where it was
    changed = {name for name, origin in origins(adaptation).items() if origin != "copied"}
    assert changed == {f"blocks.{index}.class_embedding.weight" for index in range(3)}
    assert "4 of 6 classes matched by name" in str(adaptation)


def test_classes_come_and_go_without_changing_the_density():
    plain = tiny_model(num_classes=0)
    images = random_images(plain)
    labelled, adaptation = adapt(plain, class_names=["cat", "dog"])
    for labels in (None, torch.tensor([0, 1, -1])):
        same_density(plain, labelled, images, None, labels)
    assert origins(adaptation)["blocks.1.class_embedding.weight"] == "fresh"
    model = tiny_model(id2label=NAMES)
    without, adaptation = adapt(model, class_names=[])
    same_density(model, without, images)
    assert origins(adaptation)["blocks.1.class_embedding.weight"] == "left out"
    assert origins(adaptation)["blocks.1.proj_in.bias"] == "adapted"


def test_fresh_class_vectors_get_gradients_of_their_own():
    labelled, _ = adapt(tiny_model(num_classes=0), class_names=["cat", "dog"])
    labelled(random_images(labelled, 2), torch.tensor([0, 1])).loss.backward()
    first, second = labelled.blocks[0].class_embedding.weight.grad
    assert first.abs().sum() > 0
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("new", [(4, 7), (7, 4), (2, 2), (1, 9)])
def test_positions_of_every_block_are_interpolated_over_the_image(new):
    """A field that is linear in row and column stays so, corner on corner, flatter, in both orders of reading."""
    model = tiny_model(image_size=(6, 8))  # a grid of 3 x 4
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 3), torch.linspace(0, 1, 4), indexing="ij")
    for block in model.blocks:
        block.position_embedding.data = (rows + 10 * columns).flatten()[:, None].repeat(1, 16).double()
    wide, adaptation = adapt(model, image_size=(2 * new[0], 2 * new[1]))
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in new), indexing="ij")
    flatness = min(min(n, o) / max(n, o) for n, o in zip(new, (3, 4), strict=True))
    field = (rows + 10 * columns).flatten().double()
    expected = field.mean() + flatness * (field - field.mean())
    for index, block in enumerate(wide.blocks):
        torch.testing.assert_close(block.position_embedding[:, 5], expected, atol=1e-6, rtol=0)
        read = block.positions[:, 5]
        torch.testing.assert_close(read, expected.flip(0) if index % 2 else expected, atol=1e-6, rtol=0)
    assert origins(adaptation)["blocks.2.position_embedding"] == "adapted"
    assert f"from a grid of 3x4 to {new[0]}x{new[1]} patches" in str(adaptation)


def test_interpolation_to_the_same_grid_and_of_a_constant():
    values = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolate_over_grid(values, (3, 4), (3, 4)), values)
    constant = torch.full((12, 2), 3.0)
    assert interpolate_over_grid(constant, (3, 4), (5, 9)).unique().tolist() == [3.0]
    lone = interpolate_over_grid(torch.tensor([[1.0], [2.0]]), (1, 2), (3, 2))
    assert lone.flatten().tolist() == [1, 2] * 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [((3, 4), (6, 8), 0.5), ((3, 4), (3, 8), 0.5), ((6, 4), (3, 1), 0.25), ((3, 4), (30, 20), 0.1)],
)
def test_positions_of_another_scale_are_nearer_to_their_mean(old, new, expected):
    values = torch.randn(old[0] * old[1], 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert positions_over_grid(values, old, old).equal(values)
    placed, found = interpolate_over_grid(values, old, new), positions_over_grid(values, old, new)
    torch.testing.assert_close(found.mean(0), placed.mean(0))
    share = (found - found.mean(0)) / (placed - placed.mean(0))
    torch.testing.assert_close(share, torch.full_like(share, expected))


def test_a_prior_variance_stays_positive_and_between_its_values():
    model = tiny_model(volume_preserving=True)
    wide, _ = adapt(model, image_size=(10, 14))
    assert wide.prior_variance.shape == (35, 4)
    assert model.prior_variance.min() <= wide.prior_variance.min()
    assert wide.prior_variance.max() <= model.prior_variance.max()


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_grey_on_all_channels_has_the_source_s_latents_on_all_channels(volume_preserving):
    grey = tiny_model(volume_preserving=volume_preserving)
    colour, _ = adapt(grey, num_channels=3)
    images = random_images(grey)
    expected, found = grey(images, LABELS), colour(images.repeat(1, 3, 1, 1), LABELS)
    latents = colour.unpatchify(found.latents)
    torch.testing.assert_close(latents, grey.unpatchify(expected.latents).repeat(1, 3, 1, 1))
    torch.testing.assert_close(found.log_det, 3 * expected.log_det)
    back, _ = adapt(colour, num_channels=1)
    same_density(grey, back, images, LABELS, LABELS)


def test_colour_to_grey_sees_a_grey_image_as_the_first_block_saw_it_in_colour():
    colour = tiny_model(num_channels=3)
    grey, _ = adapt(colour, num_channels=1)
    images = random_images(grey)
    seen = colour.blocks[0].proj_in(colour.patchify(images.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(grey.blocks[0].proj_in(grey.patchify(images)), seen)


def test_the_noise_level_comes_and_goes_without_changing_the_density():
    plain = tiny_model()
    told, adaptation = adapt(plain, noise_conditioning=True, noise_range=(0.05, 0.4))
    images = random_images(plain)
    same_density(plain, told, images, LABELS, LABELS, noise_level=torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64))
    assert "was Gaussian of 0.1 and is now Gaussian of levels 0.05 to 0.4" in str(adaptation)
    told = tiny_model(noise_conditioning=True)
    plain, _ = adapt(told, noise_conditioning=False, noise_std=0.2)
    expected = told.log_prob(images, LABELS, torch.full((3,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(plain.log_prob(images, LABELS), expected, rtol=0, atol=1e-9)


def test_another_noise_is_the_same_weights_and_said():
    model = tiny_model()
    other, adaptation = adapt(model, noise_type="uniform")
    same_density(model, other, random_images(model))
    assert adaptation.remarks == ("The training noise was Gaussian of 0.1 and is now uniform.",)


def test_several_changes_at_once_decode_what_they_encode():
    model = tiny_model(id2label=NAMES, noise_conditioning=True)
    other, _ = adapt(
        model, class_names=["dog", "newt"], image_size=(4, 10), num_channels=3, noise_conditioning=False, noise_std=0.1
    )
    images, labels = random_images(other, 2), torch.tensor([1, -1])
    decoded = other.decode(other(images, labels).latents, labels, tolerance=0)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "patch_size cannot change from 2 to 4: patches of another size are other tokens"),
        ({"hidden_size": 32}, "hidden_size cannot change from 16 to 32: every matrix"),
        ({"num_blocks": 4, "layers_per_block": 1}, "num_blocks cannot change from 3 to 4"),
        ({"layers_per_block": 1}, r"layers_per_block cannot change from \[1, 2, 1\] to \[1, 1, 1\]"),
        ({"volume_preserving": True}, "volume_preserving cannot change from False to True: blocks that scale"),
        ({"class_names": ["cat", "dog", "cat"]}, "class names of the target collide.*: cat"),
        ({"num_clases": 4}, "adapt cannot change 'num_clases'; give class_names"),
        ({"num_classes": 5}, "adapt cannot change 'num_classes'; give class_names"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model(), **changes)


def test_channels_without_a_rule_and_a_told_noise_without_a_level_are_refused():
    with pytest.raises(ValueError, match="num_channels cannot change from 3 to 4: only from grey"):
        adapt(tiny_model(num_channels=3), num_channels=4)
    with pytest.raises(ValueError, match="the source is told its noise level: give .* got 'uniform'"):
        adapt(tiny_model(noise_conditioning=True), noise_conditioning=False, noise_type="uniform")


def test_a_table_of_sizes_has_the_model_itself_where_the_size_is_its_own(tmp_path, capsys):
    TarFlowPipeline(tiny_model(dtype=torch.float32, image_size=8, num_classes=10)).save_pretrained(tmp_path)
    options = ["--data", str(Path(image_sizes.__file__).parent / "data" / "digits"), "--num_images", "6"]
    image_sizes.main([str(tmp_path), *options, "--sizes", "8", "4x12"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["8 x 8", "4 x 12"]
    assert rows[0][1] != rows[0][2] == rows[0][3]
    assert len(set(rows[1])) == 4


def test_other_units_are_said_and_change_no_weight():
    source = tiny_model(num_classes=0)
    target, adaptation = adapt(source, value_mean=[280.0], value_scale=[12.5])
    assert adaptation.remarks == ("What the model sees was 8-bit images and is now (value - [280.0]) / [12.5].",)
    images = random_images(source)
    assert torch.equal(source.log_prob(images), target.log_prob(images))
    _, back = adapt(target, value_mean=None, value_scale=None)
    assert back.remarks == ("What the model sees was (value - [280.0]) / [12.5] and is now 8-bit images.",)
    with pytest.raises(ValueError, match="num_channels of arrays cannot change from 1 to 3"):
        adapt(target, num_channels=3, value_mean=[0.0] * 3, value_scale=[1.0] * 3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile, when first imported
def test_a_model_with_adapters_or_in_a_wrapping_is_no_source():
    lora = LoraConfig(r=2, target_modules=["qkv_proj"])
    with pytest.raises(ValueError, match="adapters are attached to the model"):
        adapt(get_peft_model(tiny_model(), lora))
    with pytest.raises(ValueError, match="must have the weights of its configuration and no others, got another"):
        adapt(torch.compile(tiny_model()))
    short = tiny_model()
    del short.blocks[0].class_embedding.weight
    with pytest.raises(ValueError, match="got another blocks.0.class_embedding.weight"):
        adapt(short)
