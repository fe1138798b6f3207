"""Arrays of numbers as data, and models of them."""

from io import BytesIO

import datasets
import numpy as np
import torch
from conftest import tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError as Misfit
from PIL import Image

from bad_inputs import Bad
from examples import app, evaluate, latents, sweep, train_inverse
from tarflow_hf import TarFlowPipeline
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.arrays import load_array, to_data_units, to_model_units
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.recipes import make_arguments

SOUND = np.random.default_rng(0).normal(size=(6, 2, 4, 4))
UNITS = {"value_mean": [1.0], "value_scale": [2.0]}
CONDITION = {"condition_columns": ("b",)}


def with_value(value, place=(3, 1, 2, 0)):
    changed = SOUND.copy()
    changed[place] = value
    return changed


def load(place, layout="chw", *, labels=False, **options):
    arguments = DataArguments(data=str(place), array_layout=layout, horizontal_flip=False, **options)
    return load_image_data(arguments, class_conditional=labels)[0]


def archive(ending="npz"):
    content = BytesIO()
    (np.savez if ending == "npz" else np.save)(content, SOUND)
    return content.getvalue()


def file(name, array, message, layout="chw", error=ValueError, **options):
    """A row: a `.npy` file of this array is to be loaded."""

    def call(folder):
        np.save(folder / "fields.npy", array, allow_pickle=True)
        load(folder / "fields.npy", layout, **options)

    return Bad(name, call, error, message)


def content(name, data, message, ending="npy"):
    """A row: a file with these bytes is to be loaded."""

    def call(folder):
        (folder / f"fields.{ending}").write_bytes(data)
        load(folder / f"fields.{ending}")

    return Bad(name, call, ValueError, message)


def several(name, message, *, labels=False, arrays, **options):
    """A row: a `.npz` file with these arrays is to be loaded."""

    def call(folder):
        np.savez(folder / "fields.npz", **arrays)
        load(folder / "fields.npz", labels=labels, **options)

    return Bad(name, call, ValueError, message)


def folder_of(name, arrays, message):
    """A row: a folder with a `.npy` file for each of these is to be loaded."""

    def call(folder):
        for index, array in enumerate(arrays):
            np.save(folder / f"{index}.npy", array)
        load(folder)

    return Bad(name, call, ValueError, message)


def rows(name, values, message, layout="hw"):
    """A row: a column of nested lists is to be loaded."""

    def call(folder):
        datasets.Dataset.from_dict({"field": values}).save_to_disk(folder / "set")
        load(folder / "set", layout, image_column="field")

    return Bad(name, call, ValueError, message)


def option(name, message, **options):
    """A row: the options of a run on arrays."""
    values = {"data": "x", "max_steps": 1, "array_layout": "chw", "horizontal_flip": False, **options}
    return Bad(name, lambda folder: make_arguments(values), ValueError, message)


def model(name, call, message):
    """A row: something is asked of a pipeline of arrays with one channel of 8x8."""
    return Bad(
        name,
        lambda folder: call(TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, num_classes=0, **UNITS))),
        ValueError,
        message,
    )


def measured(name, message, *line, **config):
    """A row: a saved model is to be measured."""

    def call(folder):
        TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, **config)).save_pretrained(folder / "pipe")
        np.save(folder / "a.npy", np.random.default_rng(0).normal(size=(4, 1, 8, 8)))
        evaluate.main([str(folder / "pipe"), "--data", str(folder / "a.npy"), "--split", "train", *line])

    return Bad(name, call, ValueError, message)


def too_few_channels(folder):
    np.save(folder / "fields.npy", SOUND)
    StoredImages(load(folder / "fields.npy"), ImageFormat(4, 3))


def twice(folder):
    np.save(folder / "train.npy", SOUND)
    np.savez(folder / "train.npz", a=SOUND)
    load(folder)


def two_kinds(folder):
    np.savez(folder / "train.npz", a=SOUND, labels=[0, 1, 0, 1, 0, 1])
    np.savez(folder / "test.npz", a=SOUND, labels=["a", "b"] * 3)
    load(folder, labels=True)


def all_bad(folder):
    for index in range(2):
        np.save(folder / f"{index}.npy", with_value(np.nan)[3])
    load(folder, skip_bad_images=True)


def archives(folder):
    np.savez(folder / "first.npz", a=SOUND[0])
    load(folder)


def other_held_out(folder):
    np.save(folder / "fields.npy", SOUND)
    np.save(folder / "others.npy", SOUND[..., :3])
    load(folder / "fields.npy", eval_data=str(folder / "others.npy"), eval_split="train")


def swept(folder):
    model = tiny_model(dtype=torch.float32, num_classes=0, **UNITS)
    TarFlowPipeline(transformer=model).save_pretrained(folder / "pipe")
    np.save(folder / "a.npy", np.random.default_rng(0).normal(size=(4, 8, 8)))
    line = [folder / "pipe", "--data", folder / "a.npy", "--split", "train", "--array_layout", "hw"]
    extractor = "examples/data/digits_classifier.py:digits_classifier"
    sweep.main([*map(str, line), "--feature_extractor", extractor, "--guidance_scale", "1"])


def inverse(folder):
    model = tiny_model(dtype=torch.float32, num_classes=0, **UNITS)
    TarFlowPipeline(transformer=model).save_pretrained(folder / "pipe")
    np.save(folder / "a.npy", np.random.default_rng(0).normal(size=(4, 8, 8)))
    options = {"flow": folder / "pipe", "data": folder / "a.npy", "array_layout": "hw", "horizontal_flip": False}
    options |= {"perceptual": "null"}
    train_inverse.main([text for name, value in options.items() for text in (f"--{name}", str(value))])


ROWS = [
    file("not a number", with_value(np.nan), r"fields.npy.*must be finite, got nan at \(3, 1, 2, 0\)"),
    file("infinite", with_value(-np.inf), r"must be finite, got -inf at \(3, 1, 2, 0\)"),
    file("complex", SOUND * 1j, "must hold real numbers, got complex128"),
    file("truth values", SOUND > 0, "must hold real numbers, got bool"),
    file("text", SOUND.astype(str), "must hold real numbers, got <U"),
    file("dates", SOUND.astype("datetime64[s]"), "must hold real numbers, got datetime64"),
    file("objects", np.array([{"a": 1}, None]), "objects are never unpickled"),
    file("huge integers", np.full((2, 4, 4), 2**60), r"at most 2\^53 in size", "hw"),
    file("no axes", np.float64(3), r"must hold arrays \(number, chw\)|must have", "hw"),
    file("no rows", SOUND[:0], "at least one array"),
    file("no width", SOUND[..., :0], "got the shape"),
    file("other axes", SOUND, r"by array_layout, got the shape \(6, 2, 4, 4\)", "hw"),
    file(
        "one value everywhere", with_value(7.0, np.s_[:, 1]), "channel 1 of the arrays has the same value everywhere"
    ),
    file("squares that overflow", SOUND * 1e200, "channel 0 .* squares that float64 does not hold .* deviation inf"),
    file("squares that vanish", SOUND * 1e-170, "channel 0 .* squares that float64 does not hold .* deviation 0.0"),
    file(
        "one number far from all",
        with_value(1e39),
        r"in the range of float32 by \(value - value_mean\) / value_scale, got 1e\+39",
        value_mean=(0, 0),
        value_scale=(1, 1),
    ),
    file(
        "numbers for one channel", SOUND, "a number for each of 2 channels, got 1", value_mean=(1,), value_scale=(2,)
    ),
    content("an empty file", b"", "fields.npy must be one array of numbers"),
    content("text in a file", b"1,2,3\n", "fields.npy must be one array of numbers"),
    content("an empty archive", b"", "fields.npz must be", "npz"),
    content("a cut archive", archive()[:400], "fields.npz must be one array of numbers", "npz"),
    content("a damaged archive", archive().replace(b"\x93NUMPY", b"\x93NUMBY"), "fields.npz must be one array", "npz"),
    content("a cut file", archive("npy")[:500], "fields.npy must be one array of numbers"),
    content("a header that lies", archive("npy").replace(b"(6, 2, 4, 4)", b"(6, 2, 4,9**9)"), "fields.npy must be"),
    content(
        "a header of 10^15", archive("npy").replace(b"(6, 2, 4, 4), }", b"(9999999,99999,)}"), "fields.npy must be"
    ),
    content(
        "a length that is none",
        archive("npy").replace(b"(6, 2, 4, 4), }", b"(True, 2, 4,4)}"),
        "fields.npy must be one",
    ),
    content("a pickle", b"cos\nsystem\n(S'true'\ntR.", "objects are never unpickled"),
    several("two arrays", "name the one to use with image_column", arrays={"a": SOUND, "b": SOUND}),
    several("no such array", "name the one to use with image_column", arrays={"a": SOUND}, image_column="c"),
    several("too few labels", "must have a label for each", labels=True, arrays={"a": SOUND, "labels": [0, 1]}),
    several("labels below -1", "integers from 0 .*, got -2", arrays={"a": SOUND, "labels": [-2, 0, 1, 0, 1, 0]}),
    several("labels of none", "must name a class, got -1", labels=True, arrays={"a": SOUND, "labels": [-1] * 6}),
    several("no labels", "0 columns of class labels", labels=True, arrays={"a": SOUND}),
    several(
        "labels of numbers", "must hold integers .* or text, got float64", arrays={"a": SOUND, "labels": [0.5] * 6}
    ),
    several("a condition of text", "condition_columns b must hold", arrays={"a": SOUND, "b": ["x"] * 6}, **CONDITION),
    several("too short a condition", "for each of 6 arrays", arrays={"a": SOUND, "b": [1.0, 2.0]}, **CONDITION),
    several("no such condition", "condition_columns", arrays={"a": SOUND}, **CONDITION),
    Bad("two files of a split", twice, ValueError, "must hold one file for each split, got .*train.npy.*train.npz"),
    Bad("labels of two kinds", two_kinds, ValueError, "all integers or all text in test, train, got both"),
    Bad("archives one by one", archives, ValueError, "must hold .npy files, one for each array.* train.npz of all"),
    folder_of("another shape", [SOUND[0], SOUND[1, :, :3]], r"row 1 .* must all have the shape \(2, 4, 4\)"),
    Bad("nothing to read", all_bad, ValueError, "data must have at least one array that can be read"),
    folder_of("another number in a file", [SOUND[0], with_value(np.nan)[3]], "row 1 of data set .*must be finite"),
    folder_of(
        "fewer axes in a file", [SOUND[0], SOUND[1, 0]], r"row 1 .* needs arrays of 3 axes, got the shape \(4, 4\)"
    ),
    rows("lists of several lengths", [[[1.0, 2.0], [3.0]]], "nested lists of one length each"),
    rows("lists of other shapes", [[[1.0, 2.0]], [[3.0]]], r"row 1 .* must all have the shape \(1, 1, 2\)"),
    rows("lists with a hole", [[[1.0, None]], [[3.0, 4.0]]], "row 0 of data set"),
    rows("lists with text", [[["a", "b"]]], "must hold real numbers"),
    Bad(
        "arrays without a layout",
        lambda folder: [
            np.save(folder / "a.npy", SOUND),
            load_image_data(DataArguments(data=str(folder / "a.npy")), class_conditional=False),
        ],
        ValueError,
        r"say by array_layout \(chw, hwc or hw\)",
    ),
    Bad(
        "no such file of arrays", lambda folder: load(folder / "gone.npy"), FileNotFoundError, "no npy file .*gone.npy"
    ),
    Bad(
        "no such folder of arrays", lambda folder: load(folder / "gone"), FileNotFoundError, "no folder.* NumPy files"
    ),
    Bad("another number of channels", too_few_channels, ValueError, r"those of the arrays, 2 and \(4, 4\), got 3"),
    Bad("held-out arrays of another shape", other_held_out, ValueError, r"eval_split: arrays must have the shape"),
    Bad(
        "an archive for one array",
        lambda folder: [np.savez(folder / "a.npz", a=SOUND), load_array(folder / "a.npz")],
        ValueError,
        "got a .npz file",
    ),
    option("mirrored arrays", "horizontal_flip=false: nothing says that mirrored", horizontal_flip=True),
    option("an autoencoder of arrays", "array_layout and vae contradict each other", vae="./vae"),
    option("a layout that is none", "array_layout must be", array_layout="cwh"),
    option("a mean without a scale", "value_mean and value_scale go together", value_mean=[1]),
    option("a scale of 0", "value_scale must be finite and above 0", value_mean=[1], value_scale=[0]),
    option(
        "a scaling of images", "go together, with array_layout", array_layout=None, value_mean=[1], value_scale=[1]
    ),
    option("uniform noise on arrays", "array_layout cannot have noise_type=uniform", noise_type="uniform"),
    Bad("one mean for two channels", lambda folder: tiny_config(num_channels=2, **UNITS), Misfit, "num_channels=2"),
    Bad("a mean alone", lambda folder: tiny_config(value_mean=[1.0]), Misfit, "must be given together"),
    Bad("a negative scale", lambda folder: tiny_config(value_mean=[1], value_scale=[-1]), Misfit, "above 0"),
    model("arrays as pictures", lambda pipe: pipe(output_type="pil"), "output_type='pil' needs a model of 8-bit"),
    model("an array as a picture", lambda pipe: pipe.pictures(torch.zeros(1, 8, 8)), "to be shown, got .1, 8, 8."),
    model("a picture to invert", lambda pipe: pipe.invert(Image.new("L", (8, 8))), "must be a tensor in the units"),
    model("integers to invert", lambda pipe: pipe.invert(torch.zeros(1, 1, 8, 8).long()), "of floating point, got"),
    model("two channels to invert", lambda pipe: pipe.invert(torch.zeros(1, 2, 8, 8)), r"channels=1, height, width\)"),
    model("NaN to invert", lambda pipe: pipe.invert(torch.full((1, 1, 8, 8), torch.nan)), "images must be finite"),
    model(
        "NaN to measure",
        lambda pipe: pipe.transformer.log_prob(torch.full((1, 1, 8, 8), torch.inf)),
        "in units of value_scale around value_mean",
    ),
    Bad(
        "units of images",
        lambda folder: to_data_units(torch.zeros(1, 1, 8, 8), tiny_config()),
        ValueError,
        "of images",
    ),
    Bad(
        "an array as it is",
        lambda folder: to_model_units(torch.zeros(8, 8), tiny_config(**UNITS)),
        ValueError,
        "arrays",
    ),
    measured("arrays without a layout to measure", "model of arrays: it needs array_layout", num_classes=0, **UNITS),
    measured("a layout for images", "model of images: leave array_layout out", "--array_layout", "chw"),
    measured(
        "a distance of arrays",
        "distances of features need 8-bit images",
        *["--array_layout", "chw", "--metrics", "frechet_distance"],
        num_classes=0,
        **UNITS,
    ),
    Bad("a sweep over arrays", swept, ValueError, "distances of features need 8-bit images"),
    model(
        "a path between arrays",
        lambda pipe: [pipe.save_pretrained("pipe"), latents.main(["interpolate", "pipe", "a.npy", "b.npy"])],
        "interpolate takes image files, and pipe is a model of arrays",
    ),
    model(
        "a page of arrays",
        lambda pipe: [pipe.save_pretrained("shown"), app.load("shown")],
        "shown is a model of arrays, the page shows images",
    ),
    Bad("an inverse of arrays", inverse, ValueError, "flow=.*pipe' and data must be of images"),
]
