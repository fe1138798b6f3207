"""What a model takes and what it refuses: each check at the edges of its range, and what its message names."""

import math
import re
import warnings

import pytest
import torch
from conftest import tiny_config

from tarflow_hf.flow import inputs
from tarflow_hf.flow.class_names import confusing_ids

CONFIG = tiny_config(num_blocks=2, layers_per_block=1)
LATENTS = torch.zeros(3, 16, 4)
IMAGES = torch.zeros(3, 1, 8, 8)


def refused(message):
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("value", [1, 1.5, torch.tensor(2), torch.tensor(2.5), math.inf])
def test_numbers_are_numbers(value):
    assert inputs.is_number(value) is True
    assert inputs.is_finite(value) is bool(value != math.inf)


@pytest.mark.parametrize(
    "value", [True, "1", None, 1j, torch.tensor(True), torch.tensor(1j), torch.tensor([1.0]), torch.ones(1, 1)]
)
def test_what_is_no_number_is_none(value):
    assert not inputs.is_number(value)
    assert not inputs.is_finite(value)


def test_whole_numbers_are_no_truth_values():
    assert inputs.is_whole(3)
    assert not inputs.is_whole(True)
    assert not inputs.is_whole(3.0)


def test_there_is_one_generator_or_one_for_each_image():
    one = torch.Generator()
    for generator in (None, one, [one, one]):
        inputs.check_generator(generator, 2)
    with refused("2 images, 1 generators"):
        inputs.check_generator([one], 2)
    with refused(r"got 7; a seed becomes one by"):
        inputs.check_generator(7, 2)
    with refused("got 'b'"):
        inputs.check_generator([one, "b"], 2)


def test_images_have_the_size_of_the_model_and_are_floats():
    inputs.check_pixel_values(IMAGES, CONFIG)
    inputs.check_pixel_values(IMAGES[:0], CONFIG)
    with refused("got list"):
        inputs.check_pixel_values([0.0], CONFIG)
    for wrong in (IMAGES[0], torch.zeros(3, 2, 8, 8), torch.zeros(3, 1, 8, 9), IMAGES[None]):
        with refused(re.escape(f"got {tuple(wrong.shape)}")):
            inputs.check_pixel_values(wrong, CONFIG)
    with refused(r"floating point in \[-1, 1\], got torch.uint8"):
        inputs.check_pixel_values(IMAGES.byte(), CONFIG)


def test_latents_are_counted():
    assert inputs.count_latents(LATENTS) == 3
    assert inputs.count_latents(torch.zeros(5)) == 5
    for wrong in (torch.tensor(1.0), [1], None):
        with refused("latents must be a tensor"):
            inputs.count_latents(wrong)


def test_latents_have_the_size_of_the_model_and_their_number():
    inputs.check_latents(LATENTS, CONFIG)
    inputs.check_latents(LATENTS, CONFIG, batch=3)
    with refused(r"shape \(batch=2, tokens=16, patch_dim=4\), got \(3, 16, 4\)"):
        inputs.check_latents(LATENTS, CONFIG, batch=2)
    for wrong in (LATENTS[:, 1:], LATENTS[..., 1:], LATENTS[0], LATENTS[None]):
        with refused(r"shape \(batch, tokens=16, patch_dim=4\)"):
            inputs.check_latents(wrong, CONFIG)
    with refused("torch.int64 with 0 non-finite"):
        inputs.check_latents(LATENTS.long(), CONFIG)
    bad = LATENTS.clone()
    bad[1, 2, 0], bad[1, 2, 3] = math.nan, math.inf
    with refused("torch.float32 with 2 non-finite"):
        inputs.check_latents(bad, CONFIG)


def test_there_is_a_guess_for_each_block_or_none():
    inputs.check_guesses(None, LATENTS, CONFIG)
    inputs.check_guesses([LATENTS, LATENTS], LATENTS, CONFIG)
    for wrong in ([LATENTS], [LATENTS] * 3, [LATENTS, LATENTS[:2]], []):
        with refused("guesses must be 2 tensors, one for each block"):
            inputs.check_guesses(wrong, LATENTS, CONFIG)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"noise_std": 0.1}, 11.0),
        ({"noise_std": 0.5}, 15.0),
        ({"noise_std": 0.1, "noise_range": (0.2, 0.75)}, 11.0),  # a range that the model does not know
        ({"noise_std": 0.1, "noise_range": (0.2, 0.75), "noise_conditioning": True}, 17.5),
        ({"noise_std": 0.0}, 10.0),
    ],
)
def test_images_far_outside_are_named_by_ten_times_the_range_with_noise(changes, limit):
    config, images = tiny_config(**changes), IMAGES.double()
    images[1, 0, 3, 3] = -limit
    inputs.check_density(torch.zeros(3), images, config)
    images[1, 0, 3, 3] = -limit * (1 + 1e-12)
    images[2, 0, 0, 0] = limit + 1
    images[2, 0, 0, 1] = 1.5
    with refused(
        r"images \[1, 2\] are far from it: in image 1 1 of 64 values are outside, from -1.* to 0, and 0 are not"
    ):
        inputs.check_density(torch.zeros(3), images, config)


def test_a_density_that_is_not_finite_names_its_images_and_their_numbers():
    images = IMAGES.clone().requires_grad_()
    with torch.no_grad():
        images[2, 0, 0, :2] = math.nan
        images[2, 0, 1, 1] = -3.0
    message = (
        r"^invert needs .*images \[2\] have no finite density: in image 2 1 of 64 .*, from -3 to 0, and 2 are not"
    )
    with refused(message):
        inputs.check_density(torch.tensor([0.0, 1.0, math.nan]), images, CONFIG, of="invert")
    of_tokens = torch.zeros(3, 16, 4)
    of_tokens[1, 7, 2] = math.inf
    with refused(r"^log_prob needs .*images \[1\] have no finite density"):
        inputs.check_density(of_tokens, IMAGES, CONFIG)
    with refused(r"images \[0, 2\].*none of them finite, and 64 are not finite; `to_pixel_values`"):
        inputs.check_density(torch.tensor([math.nan, 0.0, -math.inf]), IMAGES + math.nan, CONFIG)


def test_arrays_may_be_far_from_their_mean_but_not_infinite():
    config = tiny_config(value_mean=[5.0], value_scale=[2.0])
    inputs.check_density(torch.zeros(3), IMAGES + 1e6, config)
    with refused(r"units of value_scale around value_mean, and images \[1\].*`to_model_units`"):
        inputs.check_density(torch.tensor([0.0, math.nan, 0.0]), IMAGES, config)


def test_nothing_is_looked_at_where_there_are_no_numbers():
    inputs.check_density(torch.zeros(3, device="meta"), torch.zeros(3, 1, 8, 8, device="meta"), CONFIG)

    def density(images):
        inputs.check_density(images.sum((1, 2, 3)) * math.nan, images, CONFIG)
        return images.sum()

    assert torch.func.grad(density)(IMAGES).equal(torch.ones_like(IMAGES))
    compiled = torch.compile(density, backend="eager", fullgraph=True)
    assert compiled(IMAGES) == 0


def test_callbacks_are_functions_that_ask_for_known_tensors():
    inputs.check_callback(None, ["latents"], ["latents", "labels"])
    inputs.check_callback(print, [], ["latents"])
    with refused("must be a function or None, got 3"):
        inputs.check_callback(3, [], ["latents"])
    for asked, told in (("latents", "got 'latents'"), (["seed", 3], r"got \['3', 'seed'\]"), (7, r"got \['7'\]")):
        with refused(told):
            inputs.check_callback(print, asked, ["latents"])


def test_latents_of_a_callback_replace_those_of_the_step_in_their_type():
    for nothing in (None, {}):
        if nothing is not None:
            assert inputs.replaced_latents(LATENTS, nothing) is LATENTS
    found = inputs.replaced_latents(LATENTS, {"latents": torch.ones(3, 16, 4, dtype=torch.float64)})
    assert found.dtype == torch.float32
    assert found.eq(1).all()
    with refused(r"may return \['latents'\] in its dict, got \['image'\]"):
        inputs.replaced_latents(LATENTS, {"image": 1})
    for wrong, told in (({"latents": LATENTS[:1]}, r"\(1, 16, 4\)"), ({"latents": 3}, "'latents': 3"), (7, "7")):
        with refused(told):
            inputs.replaced_latents(LATENTS, wrong)


def test_labels_are_integers_in_range_and_none_is_minus_one():
    def checked(labels, config=CONFIG):
        return inputs.checked_labels(labels, IMAGES, config, check_range=True)

    assert checked(None).tolist() == [-1, -1, -1]
    assert checked(None, tiny_config(num_classes=0)) is None
    assert checked(torch.tensor([-1, 0, 3])).tolist() == [-1, 0, 3]
    assert checked(torch.tensor([0, 1, 3], dtype=torch.uint8)).dtype == torch.int64
    assert checked(torch.tensor([0, 1, 3], dtype=torch.uint64)).tolist() == [0, 1, 3]
    with refused("must be None for an unconditional model"):
        checked(torch.tensor([0, 0, 0]), tiny_config(num_classes=0))
    with refused("tensor of 3 integers, got list"):
        checked([0, 1, 2])
    for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(2).long(), torch.zeros(3, 1).long()):
        with refused(re.escape(f"got shape {tuple(wrong.shape)} of {wrong.dtype}")):
            checked(wrong)
    for wrong, first in (([0, -2, 9], -2), ([4, 1, -5], 4), ([-1, 3, 7], 7)):
        with refused(rf"in -1 ... 3, got {first}$"):
            checked(torch.tensor(wrong))
    assert inputs.checked_labels(torch.tensor([9, 9, 9]), IMAGES, CONFIG, check_range=False).tolist() == [9, 9, 9]
    largest = torch.tensor([0, -1, 1]).view(torch.uint64)
    with refused(rf"got {2**64 - 1}$"):  # as a signed number it would be "no label"
        checked(largest)


def test_what_torch_func_follows_is_told_from_what_it_does_not():
    seen = []

    def look(x):
        seen.append((inputs.is_transformed(x), inputs.is_traced(x)))
        return x.sum()

    look(IMAGES)
    torch.func.grad(look)(IMAGES)
    assert seen == [(False, False), (True, True)]
    assert torch.compile(lambda x: x + inputs.is_traced(x), backend="eager")(torch.zeros(1)) == 1
    assert torch.compile(lambda x: x + inputs.is_transformed(x), backend="eager")(torch.zeros(1)) == 0


def test_noise_levels_are_positive_numbers_one_for_each_image():
    told = tiny_config(noise_conditioning=True)
    assert inputs.checked_noise_levels(None, IMAGES, CONFIG) is None
    levels = torch.tensor([0.1, 0.2, 1e-9])
    found = inputs.checked_noise_levels(levels.half() + 1, IMAGES.bfloat16(), told)
    assert found.dtype == torch.float32
    assert inputs.checked_noise_levels(levels, IMAGES.double(), told).dtype == torch.float64
    with refused("must be given for a model with noise_conditioning=True"):
        inputs.checked_noise_levels(None, IMAGES, told)
    with refused("must be None for a model with noise_conditioning=False"):
        inputs.checked_noise_levels(levels, IMAGES, CONFIG)
    with refused("tensor of 3 numbers, got float"):
        inputs.checked_noise_levels(0.1, IMAGES, told)
    for wrong in (levels[:2], levels[:, None], levels.long()):
        with refused(re.escape(f"got shape {tuple(wrong.shape)} of {wrong.dtype}")):
            inputs.checked_noise_levels(wrong, IMAGES, told)
    for lowest in (0.0, -1.0):
        with refused(f"must be finite and above 0, got {lowest}"):
            inputs.checked_noise_levels(torch.tensor([0.1, lowest, 0.1]), IMAGES, told)


ABOUT = {"condition_dim": 2, "condition_mean": [10.0, -3.0], "condition_std": [2.0, 0.5]}


def test_conditions_are_standardised_in_float32_or_wider():
    config, given = tiny_config(**ABOUT), torch.tensor([[10.0, -3.0], [12.0, -3.5], [6.0, -2.0]])
    expected = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 2.0]])
    for of, dtype in ((IMAGES.bfloat16(), torch.float32), (IMAGES.double(), torch.float64)):
        found = inputs.checked_condition(given, None, of, config)
        assert found.dtype == dtype
        assert found.tolist() == expected.tolist()
        none = inputs.checked_condition(None, None, of, config)
        assert none.dtype == dtype
        assert none.shape == (3, 2)
        assert none.isnan().all()
    half = inputs.checked_condition(given.half(), torch.tensor([True, False, True]), IMAGES, config)
    assert half[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert half[1].isnan().all()
    plain = inputs.checked_condition(given, None, IMAGES, tiny_config(condition_dim=2))
    assert plain.tolist() == given.tolist()


def test_conditions_that_do_not_fit_are_refused():
    config, given, mask = tiny_config(**ABOUT), torch.zeros(3, 2), torch.tensor([True, False, True])
    assert inputs.checked_condition(None, None, IMAGES, CONFIG) is None
    for vector, which in ((given, None), (None, mask), (given, mask)):
        with refused("must be None for a model without one"):
            inputs.checked_condition(vector, which, IMAGES, CONFIG)
    with refused("condition_mask must be None where there is no condition"):
        inputs.checked_condition(None, mask, IMAGES, config)
    with refused(r"tensor of \(3, 2\) numbers, got list"):
        inputs.checked_condition([1], None, IMAGES, config)
    named = tiny_config(**ABOUT, condition_names=["height", "slant"])
    for wrong in (given[:2], given[:, :1], given.long()):
        with refused(re.escape(f"numbers (height, slant), got shape {tuple(wrong.shape)} of {wrong.dtype}")):
            inputs.checked_condition(wrong, None, IMAGES, named)
    bad = given.clone()
    bad[1, 0], bad[2, 1] = math.nan, math.inf
    with refused(r"got tensor\(\[nan, 0.\]\) in row 1$"):
        inputs.checked_condition(bad, None, IMAGES, config)
    with refused("tensor of 3 booleans, got list"):
        inputs.checked_condition(given, [True], IMAGES, config)
    for wrong in (mask[:2], mask.long(), mask[:, None]):
        with refused(re.escape(f"got shape {tuple(wrong.shape)} of {wrong.dtype}")):
            inputs.checked_condition(given, wrong, IMAGES, config)


NAMED = tiny_config(num_classes=4, id2label={0: "tabby, cat", 1: "lynx, cat", 2: "3", 3: "dog"})


def test_classes_are_asked_for_by_id_name_or_a_part_of_the_name():
    assert [inputs.class_id(label, NAMED) for label in (None, -1, 0, 3, "dog", "tabby", "tabby, cat", "3")] == [
        -1, -1, 0, 3, 3, 0, 0, 2,
    ]  # fmt: skip
    for label, told in ((4, r"-1 \(no label\) ... 3, got 4"), (-2, "got -2"), (True, "got True"), (1.0, "got 1.0")):
        with refused(told):
            inputs.class_id(label, NAMED)
    with refused(
        r"class name 'cat' fits the classes \[0, 1\], choose by id; the model's names are 'tabby, cat', 'lynx"
    ):
        inputs.class_id("cat", NAMED)
    grouped = tiny_config(num_classes=4, id2label=dict(enumerate(["Food: pie", "pie", "Food: fig", "Shape: fig"])))
    assert [inputs.class_id(label, grouped) for label in ("pie", "Food: pie", "Food: fig")] == [1, 0, 2]
    with refused(r"class name 'fig' fits the classes \[2, 3\], choose by id"):
        inputs.class_id("fig", grouped)
    with refused("class name 'Food' is unknown, did you mean 'Food: pie'"):
        inputs.class_id("Food", grouped)
    with refused(r"class name 'figg' is unknown, did you mean 'fig'\?; the model's names are 'Food: pie'"):
        inputs.class_id("figg", grouped)
    many = tiny_config(num_classes=12, id2label={index: f"class {index}" for index in range(12)})
    with refused("class name 'bird' is unknown; the model's names are 'class 0', .*, 'class 9', [.]{3}$"):
        inputs.class_id("bird", many)


def test_a_number_that_is_another_class_s_name_is_warned_of_once_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inputs.class_id(3, NAMED) == 3  # nobody asked for a warning
        assert inputs.class_id(1, NAMED, warn=True) == 1
        assert inputs.class_ids(torch.tensor([3]), NAMED) == [3]  # a tensor holds ids
        same = tiny_config(num_classes=2, id2label={0: "0", 1: "1"})
        assert inputs.class_ids([0, 1], same) == [0, 1]
    message = "the number 3 is the id of the class named 'dog'; the class named '3' has the id 2: give the string '3'"
    with pytest.warns(UserWarning, match=message):
        assert inputs.class_ids([3], NAMED) == [3]
    with pytest.warns(UserWarning, match=message):
        inputs.class_id(3, NAMED, warn=True)


def test_class_labels_come_alone_or_in_lists():
    assert inputs.class_ids("dog", NAMED) == [3]
    assert inputs.class_ids([0, None, "lynx"], NAMED) == [0, -1, 1]
    assert inputs.class_ids([], NAMED, num_images=0) == []
    for count in (None, 2):
        with refused("at least one class, got an empty list"):
            inputs.class_ids([], NAMED, num_images=count)
    with refused("must be None for an unconditional model, got 1"):
        inputs.class_ids(1, tiny_config(num_classes=0))


def test_conditions_of_a_call_are_one_for_all_or_one_for_each():
    config = tiny_config(condition_dim=2)
    assert inputs.condition_vectors([1, 2], config).tolist() == [[1.0, 2.0]]
    assert inputs.condition_vectors((1, 2.5), config, num_labels=3).tolist() == [[1.0, 2.5]] * 3
    each = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert inputs.condition_vectors(each, config, num_labels=2).dtype == torch.float32
    assert inputs.condition_vectors(each, config).tolist() == each.tolist()
    with refused("one for each of 3 labels, got 2"):
        inputs.condition_vectors(each, config, num_labels=3)
    with refused("must be None for a model without one"):
        inputs.condition_vectors([1, 2], CONFIG)
    for wrong, shape in (
        ([1, 2, 3], r"\(3,\)"),
        ([[[1, 2]]], r"\(1, 1, 2\)"),
        (torch.zeros(0, 2), r"\(0, 2\)"),
        (1, r"\(\)"),
    ):
        with refused(f"condition_dim=2 numbers an image, got {shape}"):
            inputs.condition_vectors(wrong, config)
    for wrong in ("ab", [[1, 2], [3]], [None, 1]):
        with refused("condition must be 2 numbers an image"):
            inputs.condition_vectors(wrong, config)
    for wrong in ([True, False], [1j, 2]):
        with refused("condition must be 2 real numbers an image"):
            inputs.condition_vectors(wrong, config)
    with refused(r"must be finite, got \[1.0, nan\]"):
        inputs.condition_vectors([1, math.nan], config)


def test_text_of_a_command_line_is_a_name_or_else_an_id():
    assert [inputs.class_of_text(text, NAMED) for text in ("dog", "3", "0", "-1")] == [3, 2, 0, -1]
    with refused("class name 'bird' is unknown"):
        inputs.class_of_text("bird", NAMED)
    with refused("got 12"):
        inputs.class_of_text("12", NAMED)


def test_names_that_are_other_ids_are_listed_up_to_a_number():
    assert confusing_ids({index: str(index) for index in range(20)}) == ""
    assert confusing_ids({1: "2", 0: "one", 2: "2"}) == "'2' has the id 1"
    shifted = {index: str(index + 1) for index in range(13)}
    assert confusing_ids(shifted).count("has the id") == 12
    assert confusing_ids(shifted).endswith("'12' has the id 11, and so on")
    assert confusing_ids(shifted, most=13).endswith("'13' has the id 12")
    assert confusing_ids(shifted, most=1) == "'1' has the id 0, and so on"
