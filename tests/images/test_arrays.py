"""Arrays of numbers in place of images: every kind of file gives the same values, scaled and back."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarflow_hf import TarFlowConfig, TarFlowPipeline
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.arrays import Arrays, describe, read_array, shown, to_data_units, to_model_units
from tarflow_hf.images.batches import StoredImages, StreamedImages
from tarflow_hf.images.sources import load_image_data

ARRAYS = np.random.default_rng(0).normal([250, -3], [20, 0.5], size=(24, 8, 6, 2)).astype(np.float32)  # hwc
LABELS = np.array(["calm", "storm", "gale"])[np.arange(24) % 3]
NUMBERS = {"calm": 0, "gale": 1, "storm": 2}  # in the order of the names


def numpy_file(folder, layout):
    stored = {"hwc": ARRAYS, "chw": ARRAYS.transpose(0, 3, 1, 2), "hw": ARRAYS[..., 0]}[layout]
    np.savez(folder / "fields.npz", fields=stored, labels=LABELS)
    return folder / "fields.npz"


def split_files(folder, layout):
    """A file for each split."""
    (folder / "both").mkdir()
    numpy_file(folder, layout).rename(folder / "both/train.npz")
    np.save(folder / "both/test.npy", np.zeros((3, 2, 2, 2)))
    return folder / "both"


def numpy_folder(folder, layout):
    for index, array in enumerate(ARRAYS):
        place = folder / "set" / LABELS[index]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{index:02d}.npy", array if layout == "hwc" else array.transpose(2, 0, 1))
    return folder / "set"


def parquet_file(folder, layout):
    stored = ARRAYS if layout == "hwc" else ARRAYS.transpose(0, 3, 1, 2)
    features = {
        "field": datasets.Array3D(stored.shape[1:], "float32"),
        "label": datasets.ClassLabel(names=sorted(NUMBERS)),
    }
    content = {"field": list(stored), "label": [NUMBERS[name] for name in LABELS]}
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def lists_column(folder, layout):
    """Nested lists, whose column has to be named."""
    stored = ARRAYS if layout == "hwc" else ARRAYS.transpose(0, 3, 1, 2)
    rows = datasets.Dataset.from_dict({"field": stored.tolist(), "label": [NUMBERS[name] for name in LABELS]})
    rows.cast_column("label", datasets.ClassLabel(names=sorted(NUMBERS))).save_to_disk(folder / "saved")
    return folder / "saved"


def load(place, layout, **options):
    arguments = DataArguments(data=str(place), array_layout=layout, horizontal_flip=False, **options)
    return load_image_data(arguments, class_conditional=True)[0]


def by_content(samples):
    return sorted((tuple(sample.levels.flatten().tolist()), sample.label) for sample in samples)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("make", [numpy_file, split_files, numpy_folder, parquet_file, lists_column])
def test_every_source_and_layout_gives_the_same_scaled_values(make, layout, tmp_path):
    options = {"image_column": "field"} if make is lists_column else {}
    data = load(make(tmp_path, layout), layout, **options)
    assert data.arrays.shape == (2, 8, 6)
    assert data.class_names == tuple(sorted(NUMBERS))
    np.testing.assert_allclose(data.arrays.value_mean, ARRAYS.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(data.arrays.value_scale, ARRAYS.std((0, 1, 2), dtype=np.float64), rtol=1e-6)
    samples = list(StoredImages(data, data.arrays.format))
    expected = (ARRAYS.astype(np.float64) - data.arrays.value_mean) / data.arrays.value_scale
    whole = torch.from_numpy(expected.astype(np.float32)).movedim(3, 1)
    found = by_content(samples)
    assert [label for _, label in found] == [
        label
        for _, label in sorted(
            (tuple(array.flatten().tolist()), NUMBERS[name]) for array, name in zip(whole, LABELS, strict=True)
        )
    ]
    torch.testing.assert_close(
        torch.tensor([values for values, _ in found]), torch.tensor(sorted(whole.flatten(1).tolist()))
    )


def test_one_channel_needs_no_axis_of_its_own(tmp_path):
    data = load(numpy_file(tmp_path, "hw"), "hw")
    assert data.arrays.shape == (1, 8, 6)
    np.testing.assert_allclose(data.arrays.value_mean, ARRAYS[..., 0].mean(dtype=np.float64), rtol=1e-6)


def test_a_stream_gives_what_a_stored_set_gives(tmp_path):
    place = parquet_file(tmp_path, "hwc")
    stored, streamed = load(place, "hwc"), load(place, "hwc", streaming=True)
    assert streamed.arrays == stored.arrays
    stream = StreamedImages(
        streamed,
        stored.arrays.format,
        batch_size=24,
        process_index=0,
        num_processes=1,
        taken=0,
        seed=0,
        shuffle_buffer=5,
        skip_bad_images=False,
    )
    batch = next(iter(stream))
    samples = list(StoredImages(stored, stored.arrays.format))
    assert sorted(batch.levels.flatten(1).tolist()) == sorted(sample.levels.flatten().tolist() for sample in samples)


def test_the_scaling_of_the_data_is_that_of_the_training_data(tmp_path):
    np.savez(tmp_path / "held_out.npz", fields=ARRAYS[:5] + 1000)
    arguments = DataArguments(
        data=str(numpy_file(tmp_path, "hwc")),
        eval_data=str(tmp_path / "held_out.npz"),
        eval_split="train",
        array_layout="hwc",
        horizontal_flip=False,
    )
    data, held_out = load_image_data(arguments, class_conditional=False)
    assert held_out.arrays == data.arrays
    images = StoredImages(held_out, data.arrays.format)
    assert images[0].levels.mean() > 20  # far from what it was trained on, and said so


def test_a_scaling_that_is_given_is_taken(tmp_path):
    data = load(numpy_file(tmp_path, "hwc"), "hwc", value_mean=(273.15, 0.0), value_scale=(10.0, 2.0))
    first = StoredImages(data, data.arrays.format)[0].levels
    expected = (ARRAYS[0, ..., 0].astype(np.float64) - 273.15) / 10
    torch.testing.assert_close(first[0], torch.from_numpy(expected.astype(np.float32)))
    torch.testing.assert_close(first[1], torch.from_numpy(ARRAYS[0, ..., 1] / 2))


scales = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=4)


@given(scales=scales, mean=st.floats(-1e3, 1e3))
@settings(max_examples=50)
def test_to_model_units_undoes_to_data_units(scales, mean):
    config = TarFlowConfig(
        image_size=4, num_channels=len(scales), value_mean=[mean + index for index in range(len(scales))],
        value_scale=scales,
    )  # fmt: skip
    values = torch.randn(2, len(scales), 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_model_units(to_data_units(values, config), config), values, rtol=1e-6, atol=1e-6)
    per_channel = to_data_units(torch.ones_like(values), config)[0, :, 0, 0].tolist()
    assert per_channel == pytest.approx([mean + index + scale for index, scale in enumerate(scales)])


def test_moments_over_arrays_are_those_of_all_numbers():
    parts = [ARRAYS[:1], ARRAYS[1:7], ARRAYS[7:]]
    for part in parts:
        part = part.astype(np.float64) * 1e3 + 1e6  # far from 0, where sums of squares would lose all digits
        found = describe([(str(index), array.tolist()) for index, array in enumerate(part)], "hwc")
        np.testing.assert_allclose(found.value_mean, part.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(found.value_scale, part.std((0, 1, 2)), rtol=1e-9)


def array_pipeline(channels=2):
    means, stds = [100.0 * (index + 1) for index in range(channels)], [10.0, 0.5, 3.0, 7.0, 1.0][:channels]
    return TarFlowPipeline(
        transformer=tiny_model(
            dtype=torch.float32, num_channels=channels, num_classes=0, value_mean=means, value_scale=stds
        )
    )


def test_a_pipeline_gives_data_units_and_takes_them_back(tmp_path):
    pipe = array_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe = TarFlowPipeline.from_pretrained(tmp_path)

    def call(output_type):
        return pipe(
            num_images_per_label=3,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
            denoising_strength=0,
        ).images

    latent, values = call("latent"), call("pt")
    torch.testing.assert_close(values, to_data_units(latent, pipe.transformer.config))
    np.testing.assert_array_equal(call("np"), values.movedim(1, -1).numpy())
    latents = pipe.prepare_latents(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pipe.invert(values), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (5, "L")])
def test_pictures_show_three_deviations_around_the_mean(channels, mode):
    values = torch.zeros(1, channels, 8, 8)
    values[0, 0, 0, 0], values[0, 0, 0, 1], values[0, 0, 0, 2] = 3.0, -3.0, 100.0
    (picture,) = array_pipeline(channels).pictures(values)
    levels = np.asarray(picture)[..., 0] if mode == "RGB" else np.asarray(picture)
    assert picture.mode == mode
    assert levels[0, :4].tolist() == [255, 0, 255, 128]
    assert isinstance(picture, Image.Image)
    assert shown(values).shape == (1, 3 if channels == 3 else 1, 8, 8)


def test_of_a_row_everything_is_read_exactly():
    rows = [[0.1 + 2**-40, 5.0], [1e-30, -7.25]]
    assert read_array(rows, "hw").tolist() == [rows]
    arrays = Arrays("hw", (1, 2, 2), (1e6,), (1e-3,))
    offsets = np.array([[0.001, 0.002], [0.003, 0.004]])
    torch.testing.assert_close(
        arrays.values((offsets + 1e6).tolist())[0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("mean", "scale"), [(1e6, 1e-3), (0.0, 1e-12), (-1e7, 1e39)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samples_keep_what_is_small_beside_their_mean(mean, scale, dtype):
    """float32 has steps of 0.06 at a million, and ends at 3e38."""
    model = tiny_model(dtype=torch.float32, num_classes=0, value_mean=[mean], value_scale=[scale]).to(dtype)
    pipe = TarFlowPipeline(transformer=model)

    def call(output_type):
        generator = torch.Generator().manual_seed(0)
        return pipe(num_images_per_label=3, generator=generator, output_type=output_type, denoising_strength=0).images

    values = call("np")
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, call("latent").double().movedim(1, -1).numpy() * scale + mean)
    assert values.std() / scale == pytest.approx(call("latent").double().std(correction=0).item(), rel=1e-6)
    latents = pipe.invert(call("pt"))
    assert latents.dtype == torch.float32
    if dtype == torch.float32:
        expected = pipe.prepare_latents(3, torch.Generator().manual_seed(0))
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float16, ">f4", ">i2", np.float64, np.longdouble])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_kind_of_number_is_read_exactly(kind, order, tmp_path):
    numbers = (np.random.default_rng(0).uniform(0, 200, (7, 2, 4, 6)) + np.longdouble(2) ** -40).astype(kind)
    np.save(tmp_path / "fields.npy", np.asarray(numbers, order=order))
    arguments = DataArguments(data=str(tmp_path / "fields.npy"), array_layout="chw", horizontal_flip=False)
    data, _ = load_image_data(arguments, class_conditional=False)
    found = [read_array(row["array"], "chw") for row in data.rows]
    np.testing.assert_array_equal(np.stack(found), numbers.astype(np.float64))


def test_labels_of_all_files_are_numbered_together_and_minus_one_is_none(tmp_path):
    np.savez(tmp_path / "train.npz", fields=ARRAYS[:4], labels=np.array([10, 2, -1, 3]))
    np.savez(tmp_path / "test.npz", fields=ARRAYS[4:6], labels=np.array([10, 3]))
    arguments = DataArguments(data=str(tmp_path), eval_split="test", array_layout="hwc", horizontal_flip=False)
    data, held_out = load_image_data(arguments, class_conditional=True)
    assert data.class_names == held_out.class_names == ("2", "3", "10")
    assert [data.label_id(label) for label in data.rows["labels"]] == [2, 0, -1, 1]
    assert [held_out.label_id(label) for label in held_out.rows["labels"]] == [2, 1]


def test_labels_may_be_bytes(tmp_path):
    np.savez(tmp_path / "fields.npz", fields=ARRAYS, labels=LABELS.astype("S"))
    assert load(tmp_path / "fields.npz", "hwc").class_names == tuple(sorted(NUMBERS))


def test_a_file_of_arrays_may_hold_what_they_are_conditioned_on(tmp_path):
    speeds, places = np.arange(24), np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    np.savez(tmp_path / "fields.npz", fields=ARRAYS, labels=LABELS, speed=speeds, place=places)
    data = load(tmp_path / "fields.npz", "hwc", condition_columns=("speed", "place"))
    assert data.condition["condition_names"] == ["speed", "place[0]", "place[1]"]
    assert StoredImages(data, data.arrays.format)[5].condition == (5.0, *map(float, places[5]))


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_arrays_are_left_out_where_that_is_asked_for(streaming, tmp_path):
    for index, array in enumerate(ARRAYS):
        place = tmp_path / "set" / f"{index:02d}.npy"
        place.parent.mkdir(exist_ok=True)
        np.save(place, {3: np.full_like(array, np.nan), 5: array[:4], 7: array * 1j}.get(index, array))
    arguments = DataArguments(
        data=str(tmp_path / "set"),
        array_layout="hwc",
        horizontal_flip=False,
        skip_bad_images=True,
        streaming=streaming,
    )
    data, _ = load_image_data(arguments, class_conditional=False)
    sound = np.delete(ARRAYS, [3, 5, 7], axis=0)
    assert data.arrays.shape == (2, 8, 6)
    np.testing.assert_allclose(data.arrays.value_mean, sound.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    if not streaming:
        images = StoredImages(data, data.arrays.format, skip_bad_images=True)
        assert [images[row].bad_rows for row in (2, 3, 5, 7)] == [(), (3,), (5,), (7,)]


def test_a_configuration_of_images_says_nothing_of_arrays(tmp_path):
    assert not {"value_mean", "value_scale"} & tiny_config().to_dict().keys()
    config = replace(tiny_config(), value_mean=[1.0], value_scale=[2])
    config.save_pretrained(tmp_path)
    assert TarFlowConfig.from_pretrained(tmp_path).value_scale == [2]
