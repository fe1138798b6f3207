"""Makes examples/data/emoji/{train,test}.parquet: emoji in three styles, 64x64 RGB on white, in 9 categories.

The column `label` has the category (`Food & Drink`), the text column `subcategory` a finer class, in 79 of which the
categories fall (`Food & Drink: food-fruit`), and `name` the emoji itself, by the name that chats know
(`Food & Drink: pizza`); a recipe takes them by `label_column: name`.

    python examples/data/make_emoji.py [FOLDER] [--one_tone | --by_name]

needs `pip install "tarflow_hf[train]"`, npm, and a network or an npm mirror. The pictures come from the npm packages
`emoji-datasource-google` (Apache 2.0), `emoji-datasource-twitter` (CC BY 4.0) and `@lobehub/fluent-emoji-3d` (MIT):
10,934 of them, skin tones included. Styles and tones of one emoji are much alike, so every tenth emoji, in all its
variants, is held out.

`--one_tone` writes 5,664 pictures to examples/data/emoji_one_tone: of an emoji with skin tones each style has one, and
the tones take turns. With all of them three of five pictures are of people and hands.

`--by_name` writes the same pictures to examples/data/emoji_by_name, for a model whose classes are the emoji: of every
tenth emoji one style is held out, the styles by turns, and the others are trained on.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from tarflow_hf.images.reading import convert_image, open_image

PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
SIDE = 64
HELD_OUT = 10  # every tenth emoji
SMALLEST = 8  # emoji of a subcategory; what is smaller is put together, for each category


def unpack(package: str, folder: Path) -> Path:
    """Downloads an npm package and unpacks it; the folder with its content."""
    folder.mkdir()
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def picture_path(style: str, root: Path, name: str) -> Path | None:
    """Where a style keeps the picture with a name such as `1f600.png`; None if it has none."""
    if style != "fluent":
        paths = [root / "img" / style / "64" / name]
    else:  # named without the mark that asks for a picture instead of a character
        stem = name.removesuffix(".png")
        paths = [root / "assets" / f"{variant}.webp" for variant in (stem, stem.replace("-fe0f", ""))]
    return next((path for path in paths if path.is_file()), None)


def png(path: Path) -> bytes:
    """The picture as PNG of the right size, on white."""
    resized = open_image(path).convert("RGBA").resize((SIDE, SIDE), PILImage.Resampling.LANCZOS)
    file = BytesIO()
    convert_image(resized, 3).save(file, "PNG")
    return file.getvalue()


class Picture(NamedTuple):
    """A picture of an emoji in one style: whether it is held out, its classes and its file."""

    held_out: bool
    category: str
    subcategory: str
    name: str
    path: Path


def pictures(roots: dict[str, Path], one_tone: bool, by_name: bool) -> Iterator[Picture]:
    """Every picture, style by style; with `one_tone` an emoji once in each style.

    Held out is every tenth emoji, with `by_name` in one style: of those that come in all.
    """
    emoji = json.loads((roots["google"] / "emoji.json").read_text())
    sizes = Counter(entry["subcategory"] for entry in emoji)
    for turn, (style, root) in enumerate(roots.items()):
        for number, entry in enumerate(emoji):
            category, subcategory = entry["category"], entry["subcategory"]
            if category == "Component":  # skin tones by themselves
                continue
            subcategory = f"{category}: {subcategory if sizes[subcategory] >= SMALLEST else 'other'}"
            variants = (entry, *entry.get("skin_variations", {}).values())
            paths = [path for each in variants if (path := picture_path(style, root, each["image"]))]
            held_out = number % HELD_OUT == 0
            if held_out and by_name:
                complete = all(picture_path(*each, entry["image"]) for each in roots.items())
                held_out = complete and turn == number // HELD_OUT % len(roots)
            for place, path in enumerate(paths):
                if not one_tone or place == (number + turn) % len(paths):
                    yield Picture(held_out, category, subcategory, f"{category}: {entry['short_name']}", path)


def main(argv: Sequence[str]) -> None:
    """Writes both files, over what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where to write [emoji, emoji_one_tone, emoji_by_name beside this script]"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--one_tone", action="store_true", help="every emoji once in each style")
    kinds.add_argument("--by_name", action="store_true", help="the same; every tenth emoji held out in one style only")
    options = parser.parse_args(argv)
    kind = "emoji_by_name" if options.by_name else "emoji_one_tone" if options.one_tone else "emoji"
    folder = options.folder or Path(__file__).parent / kind
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        roots = {style: unpack(package, Path(temporary) / style) for style, package in PACKAGES.items()}
        found = list(pictures(roots, options.one_tone or options.by_name, options.by_name))
        categories = ClassLabel(names=sorted({each.category for each in found}))
        features = Features(
            {"image": Image(), "label": categories, "subcategory": Value("string"), "name": Value("string")}
        )
        for split in ("train", "test"):
            chosen = [each for each in found if each.held_out == (split == "test")]
            columns = {
                "image": [{"bytes": png(each.path), "path": None} for each in chosen],
                "label": [each.category for each in chosen],
                "subcategory": [each.subcategory for each in chosen],
                "name": [each.name for each in chosen],
            }
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
            print(f"{folder / split}.parquet: {len(chosen)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
