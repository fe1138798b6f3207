"""Checkpoints of the authors' code that hold something else."""

from pathlib import Path

import torch

from bad_inputs import Bad
from tarflow_hf import convert_reference_checkpoint

FIXTURE = Path(__file__).parents[2] / "fixtures" / "uncond_model_4_64_3_2_0.10.pth"
KEY = "blocks.0.proj_in.weight"
LAYER = "blocks.0.attn_blocks.{}.mlp.main.0.weight"


def checkpoint(name, change, message, error=ValueError):
    """A row: a sound checkpoint is changed, then converted; a change may give all that the file holds."""

    def call(folder):
        path = folder / FIXTURE.name
        state = torch.load(FIXTURE, weights_only=True)
        content = change(state)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(state if content is None else content, path)
        convert_reference_checkpoint(path, image_size=16, num_channels=1)

    return Bad(name, call, error, rf"{FIXTURE.name}.*{message}")


def one(key, make):
    """Changes one tensor."""
    return lambda state: state.update({key: make(state.get(key))})


def classes(state):
    """Class vectors of which one is stored, and 2^33 are claimed."""
    for block in range(3):
        state[f"blocks.{block}.class_embed"] = torch.zeros(1, 1, 64).expand(2**33, 1, 64)


def flipped(state):
    """A file of the right length, with one bit changed on its way."""
    content = bytearray(FIXTURE.read_bytes())
    content[30_000] ^= 1
    return bytes(content)


def renumbered(state):
    return {index: tensor for index, tensor in enumerate(state.values())}


def whole(state):
    state.update({key: tensor.long() for key, tensor in state.items()})


ROWS = [
    Bad(
        "no file",
        lambda _: convert_reference_checkpoint("no.pth", image_size=16),
        FileNotFoundError,
        "no checkpoint file at no.pth",
    ),
    checkpoint("an empty file", lambda _: b"", "the file is empty"),
    checkpoint("text", lambda _: b"weights\n", "is not a complete PyTorch checkpoint|holds more than tensors"),
    checkpoint("half a file", lambda _: FIXTURE.read_bytes()[:20_000], "not a complete PyTorch checkpoint"),
    checkpoint("a flipped bit", flipped, r"the file is damaged: .*data/\d+ has not the checksum"),
    checkpoint("a list", lambda _: [torch.ones(1)], "must hold a dict of tensors, got list"),
    checkpoint("no tensors", lambda _: {}, "blocks 0, 1, ... without a gap, got .."),
    checkpoint("text at a key", one("note", lambda _: "mine"), "must hold a dict of tensors, got str at 'note'"),
    checkpoint("numbers as keys", renumbered, "dict of tensors by name, got the key 0"),
    checkpoint("whole numbers", whole, "must hold floating point numbers, got torch.int64"),
    checkpoint("complex numbers", one(KEY, lambda tensor: tensor.to(torch.complex64)), f"{KEY} must hold float"),
    checkpoint("truth values", one(KEY, torch.Tensor.bool), f"{KEY} must hold floating point numbers, got torch.bool"),
    checkpoint("an infinity", one(KEY, lambda tensor: tensor / 0), f"{KEY} must be finite"),
    checkpoint("a NaN", one(KEY, lambda tensor: tensor * float("nan")), f"{KEY} must be finite: 1024 of 1024 numbers"),
    checkpoint("a sparse tensor", one(KEY, torch.Tensor.to_sparse), f"{KEY} must be a plain tensor"),
    checkpoint("a tensor elsewhere", one(KEY, lambda tensor: tensor.to("meta")), f"{KEY} must be a plain tensor"),
    checkpoint("no rows", one(KEY, lambda _: torch.zeros(0, 4)), f"{KEY} must hold at least one number"),
    checkpoint("no columns", one(KEY, lambda _: torch.zeros(64, 0)), f"{KEY} must hold at least one number"),
    checkpoint("no tokens", one("blocks.0.pos_embed", lambda _: torch.zeros(0, 64)), "pos_embed must hold at least"),
    checkpoint("one number for many", one(KEY, lambda _: torch.zeros(1, 1).expand(64, 2**30)), "only 1 numbers of it"),
    checkpoint("2^33 classes", classes, "class_embed claims shape .8589934592, 1, 64., and only 64 numbers of it"),
    checkpoint("layer 99999", one(LAYER.format(99999), lambda _: torch.ones(1)), "block 0 must have the layers 0, 1"),
    checkpoint("layer 10^12", one(LAYER.format(10**12), lambda _: torch.ones(1)), "the unknown key"),
    checkpoint(
        "a block's layers missing",
        lambda state: [state.pop(key) for key in list(state) if ".1.attn_bl" in key] and None,
        "blocks 0, 1, ... without a gap, got .0, 2",
    ),
    checkpoint("a key unknown", one("blocks.0.extra", lambda _: torch.ones(1)), "the unknown key 'blocks.0.extra'"),
    checkpoint("a key missing", lambda state: [state.pop("blocks.1.proj_out.bias")] and None, "lacks 1 tensors"),
    checkpoint("another shape", one("blocks.1.proj_in.bias", lambda _: torch.ones(3)), "must have shape .64,., got"),
    *(
        Bad(
            f"{name} {value!r}",
            lambda _, sizes={"image_size": 16} | {name: value}: convert_reference_checkpoint(FIXTURE, **sizes),
            ValueError,
            f"{name} must be at least 1, got {value!r}",
        )
        for name, value in [("num_channels", 0), ("num_channels", -3), ("image_size", 0), ("image_size", "16")]
    ),
]
