"""examples/data/make_emoji.py: which pictures are written, and which of them are held out."""

import json
from collections import Counter

import pytest
from PIL import Image

from examples.data.make_emoji import HELD_OUT, PACKAGES, picture_path, pictures, png

TONES = ("a", "b")


@pytest.fixture
def roots(tmp_path):
    """Forty emoji in three styles, as the packages have them; number 3 has two more tones, and 10 is no fluent one."""
    entries = [
        {"image": f"{number:02}.png", "category": "Food", "subcategory": "fruit", "short_name": f"fruit_{number}"}
        for number in range(40)
    ]
    entries[3]["skin_variations"] = {tone: {"image": f"03-{tone}.png"} for tone in TONES}
    entries.append({"image": "tone.png", "category": "Component", "subcategory": "skin", "short_name": "tone"})
    names = [each["image"] for entry in entries for each in (entry, *entry.get("skin_variations", {}).values())]
    folders = {style: tmp_path / style for style in PACKAGES}
    for style, folder in folders.items():
        for name in names:
            path = (
                folder / "assets" / f"{name[:-4]}.webp" if style == "fluent" else folder / "img" / style / "64" / name
            )
            if (style, name) != ("fluent", "10.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(path)
    (folders["google"] / "emoji.json").write_text(json.dumps(entries))
    return folders


def test_an_emoji_is_held_out_in_all_styles_and_tones(roots):
    found = list(pictures(roots, one_tone=False, by_name=False))
    assert len(found) == 40 * 3 - 1 + len(TONES) * 3
    assert {each.name for each in found if each.held_out} == {f"Food: fruit_{10 * ten}" for ten in range(4)}
    assert not {each.name for each in found if each.held_out} & {each.name for each in found if not each.held_out}
    assert {each.subcategory for each in found} == {"Food: fruit"}


def test_tones_take_turns_and_styles_too_in_what_is_held_out_by_name(roots):
    found = list(pictures(roots, one_tone=True, by_name=True))
    assert len(found) == 40 * 3 - 1
    assert len({each.path.stem for each in found if each.name == "Food: fruit_3"}) == 1 + len(TONES)
    held_out = [each for each in found if each.held_out]
    styles = {each.name: next(style for style in PACKAGES if style in each.path.parts) for each in held_out}
    turns = list(PACKAGES)
    expected = {
        f"Food: fruit_{HELD_OUT * turn}": turns[turn % 3] for turn in (0, 2, 3)
    }  # the one of a style less stays
    assert styles == expected
    left = Counter(each.name for each in found if not each.held_out)
    assert left == Counter({f"Food: fruit_{number}": 3 for number in range(40)}) - Counter(
        [*expected, "Food: fruit_10"]
    )


def test_a_transparent_picture_lies_on_white(roots):
    path = picture_path("twitter", roots["twitter"], "00.png")
    assert picture_path("fluent", roots["fluent"], "10.png") is None
    (path.parent / "sheet").write_bytes(png(path))
    with Image.open(path.parent / "sheet") as image:
        assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (64, 64), (255, 255, 255))
