"""The data sets of published checkpoints: names of their classes, and what a page says about them."""

import json
import re
from os import PathLike
from pathlib import Path

from tarflow_hf.hub.model_card import TrainingData

_CLASS_NAMES = Path(__file__).with_name("class_names")

KNOWN_DATA = {
    "digits": TrainingData(
        "scikit-learn's hand-written digits",
        description=(
            "1,797 grey images of 8x8 pixels with 17 levels, from the UCI data set Optical Recognition of Handwritten "
            "Digits by E. Alpaydin and C. Kaynak (CC BY 4.0); 1,500 for training and 297 held out."
        ),
        biases="Thirteen people wrote the digits, and the held-out ones are by the same hands.",
    ),
    "digits_inverted": TrainingData(
        "scikit-learn's hand-written digits, black on white",
        description=(
            "The 1,797 grey images of 8x8 pixels of the UCI data set Optical Recognition of Handwritten Digits by E. "
            "Alpaydin and C. Kaynak (CC BY 4.0), inverted: 255 minus each level; 1,500 for training and 297 held out."
        ),
        biases="Thirteen people wrote the digits, and the held-out ones are by the same hands.",
    ),
    "fashion_mnist": TrainingData(
        "Fashion-MNIST",
        hub_id="zalando-datasets/fashion_mnist",
        description="70,000 grey images of 28x28 pixels of clothes in 10 classes, by Zalando Research (MIT).",
        biases="They are catalogue pictures of one shop, centred on an empty background.",
    ),
    "fashion_5_to_9": TrainingData(
        "Fashion-MNIST's classes 5 to 9, 60 images of each",
        hub_id="zalando-datasets/fashion_mnist",
        description=(
            "300 grey images of 28x28 pixels of shoes, shirts and bags, and 5,000 held out, of Fashion-MNIST by "
            "Zalando Research (MIT)."
        ),
        biases="They are catalogue pictures of one shop, centred on an empty background.",
    ),
    "photo_strips": TrainingData(
        "strips of photographs",
        description=(
            "82,176 strips of 16x32 pixels of 27 desktop backgrounds, photographs of the Debian packages "
            "lomiri-wallpapers-16.04 and mate-backgrounds (CC0, CC BY, CC BY-SA or GPL 2, each file for itself); "
            "7,646 of them, from other parts of the same photographs, are held out."
        ),
        biases="27 photographs of landscapes, plants and walls are all that it has seen.",
    ),
    "elevation": TrainingData(
        "tiles of a digital elevation model",
        description=(
            "5,395 tiles of 16x16 heights in metres, 3 seconds of arc apart, of the land around the Jacksboro fault "
            "in Tennessee, a map that comes with matplotlib as `jacksboro_fault_dem.npz`; they overlap, and 415 tiles "
            "of other stripes of the same map are held out."
        ),
        biases="One map of 31 by 32 kilometres is all that it has seen.",
    ),
    "emoji": TrainingData(
        "emoji in three styles",
        description=(
            "10,934 pictures of 64x64 pixels in 9 categories, on white: Google's Noto (Apache 2.0), Twitter's Twemoji "
            "(CC BY 4.0) and Microsoft's Fluent 3D (MIT). An emoji is held out in all styles and skin tones at once."
        ),
        biases="Pictures of people and hands count several times, once for each skin tone.",
    ),
    "emoji_by_name": TrainingData(
        "emoji in three styles, each a class",
        description=(
            "5,664 pictures of 64x64 pixels of 1,906 emoji, on white: Google's Noto (Apache 2.0), Twitter's Twemoji "
            "(CC BY 4.0) and Microsoft's Fluent 3D (MIT), each in one skin tone. Of every tenth emoji one style is "
            "held out, and the others are trained on."
        ),
        biases="A name has two or three pictures, and samples stay near them.",
    ),
    "afhq": TrainingData(
        "AFHQ",
        hub_id="huggan/AFHQ",
        description=(
            "Animal Faces HQ: 16,130 photographs of the faces of cats, dogs and wild animals, of 512x512 pixels "
            "(CC BY-NC 4.0)."
        ),
        biases="They are well-lit close-ups; big cats, foxes and wolves stand for all wild animals.",
    ),
    "imagenet64": TrainingData(
        "down-sampled ImageNet 64x64",
        description=(
            "The photographs of ILSVRC 2012 made smaller by van den Oord et al. (arXiv 1601.06759), 1.28 million for "
            "training and 50,000 held out, without labels; image-net.org gives them for non-commercial research."
        ),
        biases=(
            "They were collected on the web before 2012, most of them in North America and Europe; people are in many "
            "pictures."
        ),
    ),
    "imagenet-1k": TrainingData(
        "ImageNet",
        hub_id="ILSVRC/imagenet-1k",
        description=(
            "ILSVRC 2012: 1.28 million photographs from the web in 1,000 classes, for non-commercial research."
        ),
        biases=(
            "They were collected on the web before 2012, most of them in North America and Europe; more than a tenth "
            "of the classes are breeds of dogs; people are in many pictures without being labelled."
        ),
    ),
}


def training_data(data: str) -> TrainingData:
    """What a page says about a data set: a known one, another one of the Hub, or files of one's own.

    Args:
        data: A Hub name, or a path whose last part names the data.

    Returns:
        Name, description and biases, as far as they are known.

    Example:
        >>> training_data("huggan/AFHQ").name
        'AFHQ'
        >>> training_data("my/photos").name
        'my/photos'
    """
    name = Path(data).name.lower()
    if name in KNOWN_DATA:
        return KNOWN_DATA[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not Path(data).exists():
        return TrainingData(data, hub_id=data, description="The data set's own page states its licence.")
    return TrainingData(f"images that are not published ({name})")


def named_data() -> list[str]:
    """The keys of `KNOWN_DATA` whose classes have names.

    Example:
        >>> named_data()
        ['afhq', 'digits', 'digits_inverted', 'emoji', 'fashion_5_to_9', 'fashion_mnist', 'imagenet-1k']
    """
    return sorted(path.stem for path in _CLASS_NAMES.glob("*.txt"))


def class_names(data: str) -> list[str]:
    """The class names of a known data set, in the order of the ids.

    Args:
        data: One of `named_data`.

    Returns:
        The names.

    Example:
        >>> class_names("imagenet-1k")[207]
        'golden retriever'
    """
    return read_class_names(_CLASS_NAMES / f"{data}.txt")


def read_class_names(path: str | PathLike[str]) -> list[str]:
    """Class names from a file: one a line (lines with # are left out), a JSON list, or JSON from id to name.

    Args:
        path: The file.

    Returns:
        The names in the order of the ids.

    Raises:
        ValueError: If the ids are not 0, 1, ..., or what is read are not names.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("names.json").write_text('["cat", "dog"]')
        >>> read_class_names("names.json")
        ['cat', 'dog']
    """
    text = Path(path).read_text(encoding="utf-8")
    if not text.lstrip().startswith(("{", "[")):
        return [line for line in text.splitlines() if line and not line.startswith("#")]
    names = json.loads(text)
    if isinstance(names, dict):
        expected = [str(index) for index in range(len(names))]
        if sorted(names) != sorted(expected):
            raise ValueError(f"{path} must name the ids 0 ... {len(names) - 1}, got {', '.join(list(names)[:10])}")
        names = [names[index] for index in expected]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold names, got {names[:3]}")
    return names


__all__ = ["KNOWN_DATA", "class_names", "named_data", "read_class_names", "training_data"]
