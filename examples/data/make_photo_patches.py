"""Makes examples/data/photo_patches/{train,test}.parquet: parts of photographs, 32x32 RGB, in three scales.

    python examples/data/make_photo_patches.py PHOTOGRAPHS [FOLDER]

PHOTOGRAPHS is what `data` of a recipe may be, such as a folder of images. Each one is made 192, 384 and 768 pixels
high (or wide, where that is less), and cut into parts that overlap the more the smaller it is, so that every scale
gives about as many. The right eighth of a photograph is held out: no part lies on both sides.

The photographs of `examples/showcase/photos` are nine of Debian's package `lomiri-wallpapers-16.04`, under CC BY 4.0
and CC0 1.0; its page names them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.reading import convert_image, open_image
from tarflow_hf.images.sources import load_image_data

SIDE = 32
SHORTER_SIDES = (192, 384, 768)  # of the photograph
STEPS = 24  # from part to part, along the shorter side
SHARE = 7 / 8  # of the width that is trained on


def parts(photograph: PILImage.Image) -> Iterator[tuple[bool, PILImage.Image]]:
    """For every part: whether it is held out, and its pixels. None of a scale that is larger than the photograph."""
    for shorter in SHORTER_SIDES:
        factor = shorter / min(photograph.size)
        if factor > 1:
            continue
        size = round(photograph.width * factor), round(photograph.height * factor)
        scaled = photograph.resize(size, PILImage.Resampling.LANCZOS)
        border = round(scaled.width * SHARE)
        for top in range(0, scaled.height - SIDE + 1, shorter // STEPS):
            for left in range(0, scaled.width - SIDE + 1, shorter // STEPS):
                if left + SIDE <= border or left >= border:
                    yield left >= border, scaled.crop((left, top, left + SIDE, top + SIDE))


def png(image: PILImage.Image) -> bytes:
    """The pixels as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def main(argv: Sequence[str]) -> None:
    """Writes both files, over what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder of images, or another data set")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parent / "photo_patches", help="[beside this script]"
    )
    options = parser.parse_args(argv)
    data, _ = load_image_data(DataArguments(data=options.photographs), class_conditional=False)
    found: dict[bool, list[bytes]] = {False: [], True: []}
    for row in data.rows:
        cell = row[data.image_column]
        photograph = convert_image(open_image(cell["path"] if cell["bytes"] is None else cell["bytes"]), 3)
        for held_out, part in parts(photograph):
            found[held_out].append(png(part))
    if not all(found.values()):
        raise ValueError(f"no image of {options.photographs} has a shorter side of at least {SHORTER_SIDES[0]} pixels")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, files in (("train", found[False]), ("test", found[True])):
        cells = {"image": [{"bytes": file, "path": None} for file in files]}
        path = options.folder / f"{name}.parquet"
        Dataset.from_dict(cells, features=Features({"image": Image()})).to_parquet(path)
        print(f"{path}: {len(files)} parts")


if __name__ == "__main__":
    main(sys.argv[1:])
