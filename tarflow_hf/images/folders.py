"""Local folders of image files: which files are images, and which split and class each of them belongs to.

Class folders are class folders, whatever the files in them are called. What is left out is counted aloud.
"""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from tarflow_hf.images.extras import installed_by

with installed_by("train", "eval"):
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_OF_DATASETS = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".zip", ".tar", ".gz", ".lance", ".py")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderImages:
    """The image files of one split of a folder.

    Args:
        paths: The files, in order.
        labels: The class of each, by its number; empty without class folders.
        class_names: Names of the class folders: as numbers where all of them are some, else as text.

    Example:
        >>> images = FolderImages(("a/0.png", "b/1.png"), (0, 1), ("a", "b"))
        >>> images.dataset().features["label"].names
        ['a', 'b']
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    def dataset(self) -> datasets.Dataset:
        """The files as rows with the columns `image` and, of class folders, `label`."""
        columns: dict[str, list[object]] = {"image": [{"bytes": None, "path": path} for path in self.paths]}
        kinds: dict[str, object] = {"image": datasets.Image()}
        if self.class_names:
            columns["label"] = list(self.labels)
            kinds["label"] = datasets.ClassLabel(names=list(self.class_names))
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def image_endings() -> frozenset[str]:
    """The endings of files, in small letters, that are read as images: those of `datasets`, and AVIF where Pillow can.

    Example:
        >>> ".png" in image_endings()
        True
    """
    avif = {".avif"} if "avif" in features.modules and features.check("avif") else set()
    known = Image.registered_extensions()
    return frozenset(avif | {ending.lower() for ending in ImageFolder.EXTENSIONS if ending.lower() in known})


def folder_images(folder: Path, endings: frozenset[str] | None = None) -> dict[str, FolderImages] | None:
    """The images of a folder by split, or None where the folder is one that `datasets` has to read.

    That is one with parquet, metadata or archive files, or without any image. Otherwise: where the folders in it are
    called train and test (or as `datasets` calls splits), they are splits, and class folders are in them; else folders
    are classes, and the only split is `train`. Without folders the files are told apart by split if every single one
    has a split in its name. Links to folders are followed. Hidden files and those of other endings are left out, and
    counted in one line.

    Args:
        folder: The folder.
        endings: Endings of the files, in small letters; None: those of images.

    Returns:
        Images by the name of the split.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for name in ("0", "1", "10", "2"):
        ...     Path("digits", name).mkdir(parents=True)
        ...     Image.new("L", (8, 8)).save(f"digits/{name}/scan_40 train.png")
        >>> found = folder_images(Path("digits"))
        >>> found.keys(), found["train"].class_names
        (dict_keys(['train']), ('0', '1', '2', '10'))
    """
    files, left_out = _walk(folder)
    endings = endings or image_endings()
    images = [path for path in files if path.suffix.lower() in endings]
    if not images or any(path.suffix.lower() in _OF_DATASETS for path in files):
        return None
    left_out += Counter(
        path.suffix.lower() or "without ending" for path in files if path.suffix.lower() not in endings
    )
    splits = _by_split(folder, images)
    aside = len(images) - sum(map(len, splits.values()))
    left_out += Counter({"in folders beside the splits": aside} if aside else {})
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
        logger.warning(
            "%s: %d images; %d files are left out: %s", folder, len(images) - aside, left_out.total(), kinds
        )
    names = _class_names(splits)
    numbers = {name: number for number, name in enumerate(names)}
    return {
        split: FolderImages(
            tuple(map(str, paths)), tuple(numbers[path.parent.name] for path in paths) if names else (), names
        )
        for split, paths in splits.items()
    }


def _walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Files in order, links to folders followed, and how many of which kind were passed over."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        hidden = [name for name in subfolders if name.startswith((".", "__"))]
        for name in hidden:
            left_out["hidden"] += sum(len(inner) for _, _, inner in os.walk(os.path.join(place, name)))
        kept = []
        for name in sorted(set(subfolders) - set(hidden)):
            path = os.path.join(place, name)
            above = {os.path.realpath(parent) for parent in (Path(place), *Path(place).parents)}
            if not os.path.islink(path) or os.path.realpath(path) not in above:  # else there would be no end
                kept.append(name)
        subfolders[:] = kept
        for name in sorted(names):
            file = Path(place, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif not file.is_file():
                left_out["broken links"] += 1
            elif name.upper() not in ("README.MD", "LICENSE", "LICENSE.TXT"):
                files.append(file)
    return files, left_out


def _by_split(folder: Path, images: list[Path]) -> dict[str, list[Path]]:
    """Images by split: by the folders in `folder` if they are splits; where there are none, by the names of files."""
    tops = {path: path.relative_to(folder).parts[0] for path in images}
    folders = {top for path, top in tops.items() if path.parent != folder}
    found = {_SPLIT_OF[top.lower()] for top in folders if top.lower() in _SPLIT_OF}
    if folders and (len(found) > 1 or (found and len(folders) == 1)):
        splits = {path: _SPLIT_OF.get(top.lower()) for path, top in tops.items()}
    elif not folders:
        named = {path: _split_in_name(path.stem) for path in images}
        splits = named if all(named.values()) else dict.fromkeys(images, "train")
    else:
        splits = dict.fromkeys(images, "train")
    order = [name for name in _SPLITS if name in splits.values()]
    return {name: [path for path in images if splits[path] == name] for name in order}


def _split_in_name(stem: str) -> str | None:
    words = [word for word in re.split(r"[^a-z]+", stem.lower()) if word in _SPLIT_OF]
    return _SPLIT_OF[words[0]] if words else None


def _class_names(splits: dict[str, list[Path]]) -> tuple[str, ...]:
    """Names of the folders that images of all splits lie in; none unless all lie equally deep in several."""
    paths = [path for images in splits.values() for path in images]
    names = {path.parent.name for path in paths}
    if len(names) < 2 or len({len(path.parts) for path in paths}) > 1 or names <= set(_SPLIT_OF):
        return ()
    numeric = all(re.fullmatch(r"[0-9]+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numeric else (0, name)))


__all__ = ["FolderImages", "folder_images", "image_endings"]
