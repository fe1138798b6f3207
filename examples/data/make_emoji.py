"""Makes examples/data/emoji/{train,test}.parquet: emoji in three styles, 64x64 RGB on white, in 9 categories.

    python examples/data/make_emoji.py [FOLDER]

needs `pip install "tarflow_hf[train]"`, npm, and a network or an npm mirror. The pictures come from the npm packages
`emoji-datasource-google` (Apache 2.0), `emoji-datasource-twitter` (CC BY 4.0) and `@lobehub/fluent-emoji-3d` (MIT):
10,934 of them, skin tones included. Styles and tones of one emoji are much alike, so every tenth emoji, in all its
variants, is held out.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from tarflow_hf.images.reading import convert_image, open_image

PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
SIDE = 64
HELD_OUT = 10  # every tenth emoji


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


def pictures(roots: dict[str, Path]) -> Iterator[tuple[bool, str, Path]]:
    """For every picture: whether it is held out, its category, and its file."""
    emoji = json.loads((roots["google"] / "emoji.json").read_text())
    for style, root in roots.items():
        for number, entry in enumerate(emoji):
            if entry["category"] == "Component":  # skin tones by themselves
                continue
            for variant in (entry, *entry.get("skin_variations", {}).values()):
                path = picture_path(style, root, variant["image"])
                if path is not None:
                    yield number % HELD_OUT == 0, entry["category"], path


def main(folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        roots = {style: unpack(package, Path(temporary) / style) for style, package in PACKAGES.items()}
        found = list(pictures(roots))
        names = sorted({category for _, category, _ in found})
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        for split in ("train", "test"):
            chosen = [(category, path) for held_out, category, path in found if held_out == (split == "test")]
            columns = {
                "image": [{"bytes": png(path), "path": None} for _, path in chosen],
                "label": [category for category, _ in chosen],
            }
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
            print(f"{folder / split}.parquet: {len(chosen)} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "emoji")
