"""Five hundred damaged files, the same ones every time: each is refused by name, or read as what it says.

A file is damaged at random places: bytes flipped, cut, doubled, put in, numbers and words exchanged. Whoever reads it
raises its expected error with the file's name, or what it returns is compared with the file by another reader. No file
may take more than a few seconds or more memory than a sound one takes, whatever it claims.
"""

import io
import json
import random
import re
import resource
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from bad_inputs import saved_pipeline
from safetensors.torch import load_file

from tarflow_hf import ImageFormat, TarFlowModel, TarFlowPipeline, convert_reference_checkpoint, preprocess_image
from tarflow_hf.training.recipes import parse_arguments

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/fixtures/cond_model_2_128_2_1_0.05.pth"
WORDS = [b"null", b"1e999", b"[]", b"{}", b'"x"', b"-1", b"true", b"NaN", b"9" * 30, b"0", b"[[[[", b".inf", b"&a *a"]
SECONDS, MEGABYTES = 5, 300


def damaged(content, chance):
    """The bytes, damaged in one to three ways at random places."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(content) + 1)
        stop = min(len(content), start + chance.choice([1, 2, 8, 64, 1000]))
        match chance.randrange(7):
            case 0:
                flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in content[start:stop])
                content = content[:start] + flipped + content[stop:]
            case 1:
                content = content[:start]
            case 2:
                content = content[:start] + content[stop:]
            case 3:
                content = content[:stop] + content[start:]
            case 4:
                content = content[:start] + chance.randbytes(stop - start) + content[stop:]
            case 5:
                content = content[:start] + bytes(stop - start) + content[stop:]
            case _:  # a number or word of text, where there is one
                found = list(re.finditer(rb"[\w.\"-]+", content[:4000]))
                place = chance.choice(found) if found else None
                if place is not None:
                    content = content[: place.start()] + chance.choice(WORDS) + content[place.end() :]
    return content


class Weights:
    """Safetensors of a model; half of them damaged in the header alone, whose every byte means something."""

    error, name = OSError, "model.safetensors"

    def __init__(self, folder):
        self.folder = saved_pipeline(folder) / "transformer"
        self.path = self.folder / self.name

    def damage(self, content, chance):
        start = 8 + int.from_bytes(content[:8], "little") if chance.random() < 0.5 else len(content)
        return damaged(content[:start], chance) + content[start:]

    def read(self):
        loaded = TarFlowModel.from_pretrained(self.folder).state_dict()
        for name, tensor in load_file(self.path).items():
            assert tensor.isfinite().all()
            assert torch.equal(loaded[name], tensor)


class Config:
    """The settings of a model."""

    error, name = OSError, "config.json"
    damage = staticmethod(damaged)

    def __init__(self, folder):
        self.folder = saved_pipeline(folder) / "transformer"
        self.path = self.folder / self.name

    def read(self):
        config = TarFlowModel.from_pretrained(self.folder).config
        for name, value in json.loads(self.path.read_text()).items():
            if name in ("id2label", "auto_map", "architectures", "transformers_version"):
                continue
            assert json.loads(json.dumps(getattr(config, name))) == value


class Index:
    """The settings of a pipeline."""

    error, name = OSError, "model_index.json"
    damage = staticmethod(damaged)

    def __init__(self, folder):
        self.folder = saved_pipeline(folder)
        self.path = self.folder / self.name

    def read(self):
        pipe = TarFlowPipeline.from_pretrained(self.folder)
        for name, value in json.loads(self.path.read_text()).items():
            if name in pipe.sampling_defaults and value is not None:
                assert pipe.sampling_defaults[name] == value


class Recipe:
    """A recipe of the trainer."""

    error, name = ValueError, "digits.yaml"
    damage = staticmethod(damaged)

    def __init__(self, folder):
        self.path = folder / self.name
        self.path.write_bytes((ROOT / "examples/recipes/digits.yaml").read_bytes())

    def read(self):
        flat = parse_arguments([str(self.path)], default_recipe="nowhere.yaml").flat()
        for name, value in yaml.safe_load(self.path.read_bytes()).items():
            if name not in ("data", "eval_data"):
                assert flat[name] == (float(value) if isinstance(flat[name], float) else value)


class Checkpoint:
    """A checkpoint of the authors' code."""

    error, name = ValueError, CHECKPOINT.name
    damage = staticmethod(damaged)

    def __init__(self, folder):
        self.path = folder / self.name
        self.path.write_bytes(CHECKPOINT.read_bytes())

    def read(self):
        model = convert_reference_checkpoint(self.path, image_size=8)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


class Image:
    """A picture; whoever reads it knows its name, so the error need not."""

    error, name = (OSError, ValueError), ""

    def __init__(self, folder):
        self.path = folder / "picture"
        colours = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        self.formats = []
        for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
            buffer = io.BytesIO()
            PIL.Image.fromarray(colours).save(buffer, kind)
            self.formats.append(buffer.getvalue())
        self.path.write_bytes(self.formats[0])

    def damage(self, content, chance):
        return damaged(chance.choice(self.formats), chance)

    def read(self):
        pixels = preprocess_image(self.path.read_bytes(), ImageFormat(8, 3))
        assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.uint8)


def outcome(reader):
    """The error that reading raises, if it raises one; a wrong result is no error, but a failure of the test."""
    try:
        reader.read()
    except AssertionError:
        raise
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, on what it reads nevertheless
@pytest.mark.parametrize(
    ("door", "files"), [(Weights, 100), (Config, 90), (Index, 60), (Recipe, 100), (Checkpoint, 50), (Image, 100)]
)
def test_damaged_files_are_refused_by_name_or_read_as_what_they_say(door, files, tmp_path):
    reader = door(tmp_path)
    sound = reader.path.read_bytes()
    reader.read()
    refused = 0
    for index in range(files):
        content = reader.damage(sound, random.Random(f"{door.__name__} {index}"))
        reader.path.write_bytes(content)
        memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        refusal = outcome(reader)
        refused += refusal is not None
        assert refusal is None or (isinstance(refusal, reader.error) and reader.name in str(refusal)), (index, refusal)
        assert time.process_time() - started < SECONDS, f"file {index}"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEGABYTES * 1024, f"file {index}"
    print(f"{door.__name__}: {refused} of {files} refused")
    assert files / 4 < refused
