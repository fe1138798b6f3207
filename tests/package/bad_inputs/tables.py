"""Data sets whose files are damaged, or whose columns are not what they are named for."""

import tarfile
from io import BytesIO

import datasets
import numpy as np
from PIL import Image

from bad_inputs import Bad
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data

TEXT, COUNT, IMAGE = datasets.Value("string"), datasets.Value("int64"), datasets.Image()
KIND = datasets.ClassLabel(names=["cat", "dog"])


def write(path, features, **columns):
    """A parquet file of three rows: grey images, and the columns that are given."""
    columns = {"image": [Image.new("L", (8, 8), 9)] * 3} | columns
    features = datasets.Features({"image": IMAGE} | features)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def table(name, message, features, columns, *, labels=True, held_out=None, **options):
    """A row: a table with these columns is training data."""

    def call(folder):
        write(folder / "train.parquet", features, **columns)
        if held_out is not None:
            write(folder / "test.parquet", features, **held_out)
        load_image_data(DataArguments(data=str(folder), **options), class_conditional=labels)

    return Bad(name, call, ValueError, message)


def file(name, message, ending, damage, **options):
    """A row: a file of a data set is damaged."""

    def call(folder):
        path = folder / f"mine.{ending}"
        write(folder / "mine.parquet", {})
        with tarfile.open(folder / "mine.tar", "w") as tar:
            for member in ("0.png", "1.png"):
                content = BytesIO()
                Image.new("L", (8, 8), 9).save(content, "PNG")
                entry = tarfile.TarInfo(member)
                entry.size = len(content.getvalue())
                tar.addfile(entry, BytesIO(content.getvalue()))
        (folder / "mine.jsonl").write_text('{"image": \n')
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))
        place = path if ending != "jsonl" else folder / "only"
        if ending == "jsonl":
            place.mkdir()
            path.rename(place / "train.jsonl")
        load_image_data(DataArguments(data=str(place), **options), class_conditional=False)

    return Bad(name, call, OSError, message)


LISTS = {"kind": datasets.List(COUNT)}, {"kind": [[0], [1], [0]]}
NUMBERS = {"size": datasets.Value("float32")}, {"size": [0.0, 1.0, 2.0]}
GREY = {"grey": datasets.Array2D((8, 8), "uint8")}, {"grey": [np.zeros((8, 8), dtype=np.uint8)] * 3}
ROWS = [
    table(
        "lists of labels", "label_column='kind' must hold a class name or id in each row", *LISTS, label_column="kind"
    ),
    table("labels that are the images", "image_column and label_column must differ", {}, {}, label_column="image"),
    table(
        "a condition that is the image",
        "each named once, got 'image'",
        {},
        {},
        labels=False,
        condition_columns=("image",),
    ),
    table("a condition twice", "got 'size' among", *NUMBERS, labels=False, condition_columns=("size", "size")),
    table("numbers for images", "image_column='size' must hold images", *NUMBERS, labels=False, image_column="size"),
    table("arrays for images", "image_column='grey' must hold images", *GREY, labels=False, image_column="grey"),
    table("class names twice", "class_names must differ, got", {}, {}, class_names=("cat", "dog", "cat")),
    table(
        "a label without a name",
        "label_column='kind': label 'cow' is not one of the 2 classes",
        {"kind": TEXT},
        {"kind": ["cat", "dog", "cow"]},
        label_column="kind",
        class_names=("cat", "dog"),
    ),
    *(
        table(
            f"held-out labels of {wrong}",
            f"label_column='kind': label {wrong!r} is not one of the 2 classes",
            {"kind": kind},
            {"kind": sound},
            held_out={"kind": [*sound[:2], wrong]},
            label_column="kind",
            eval_split="test",
        )
        for kind, sound, wrong in [(TEXT, ["cat", "dog", "cat"], "cow"), (COUNT, [0, 1, 0], 7)]
    ),
    file("a parquet file cut short", r"mine.parquet' cannot be read: .*", "parquet", lambda data: data[:-99]),
    file("a parquet file of nothing", r"mine.parquet' cannot be read: .*", "parquet", lambda data: b""),
    file("a page for a parquet file", r"mine.parquet' cannot be read: .*", "parquet", lambda data: b"<html>" * 9),
    file(
        "a parquet file with damaged data",
        r"mine.parquet' cannot be read: .*",
        "parquet",
        lambda data: data[:4] + bytes(byte ^ 255 for byte in data[4:200]) + data[200:],
    ),
    file("a tar cut short", "mine.tar' cannot be read: unexpected end", "tar", lambda data: data[:560]),
    file("a tar of nothing", "mine.tar' cannot be read: empty file", "tar", lambda data: b""),
    file("text for a tar", "mine.tar' cannot be read: ", "tar", lambda data: b"x" * 512),
    file("broken lines", "only' cannot be read: JSON parse error", "jsonl", None),
    file("a stream of broken lines", "only' cannot be read: JSON parse error", "jsonl", None, streaming=True),
]
