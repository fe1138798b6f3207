"""Adapters that are damaged or of another model, and how they are asked for; a pipeline is left as it was."""

import json

import torch
from conftest import random_images, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from bad_inputs import Bad
from tarflow_hf import TarFlowPipeline

WEIGHTS, KEY = "pytorch_lora_weights.safetensors", "transformer.blocks.0.layers.0.attention.qkv_proj.lora_A.weight"


def adapter(folder):
    """An adapter in both formats: in `folder/file` that of diffusers, in `folder/peft` that of PEFT."""
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    lora = LoraConfig(r=4, target_modules=["qkv_proj", "out_proj"])
    pipe.transformer.add_adapter(lora, "own")
    pipe.save_lora_weights(
        folder / "file",
        pipe.transformer.get_adapter_state_dict("own"),
        transformer_lora_adapter_metadata=lora.to_dict(),
    )
    pipe.transformer.save_pretrained(folder / "peft")


def of_diffusers(folder):
    return folder / "file"


def peft(folder):
    return folder / "peft"


def cut(path, size=99):
    return content(path, lambda data: data[:size])


def load(name, message, damage=lambda folder: None, source=of_diffusers, error=ValueError, **arguments):
    """A row: an adapter is damaged and loaded beside none, or beside another one; both times nothing may change."""

    def call(folder):
        adapter(folder)
        pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
        pipe.load_lora_weights(folder / "file", adapter_name="former")
        alone = TarFlowPipeline(tiny_model(dtype=torch.float32))
        images = random_images(alone.transformer)
        before = [each.transformer(images).latents for each in (alone, pipe)]
        damage(folder)
        try:
            try:
                pipe.load_lora_weights(source(folder), **({"adapter_name": "new"} | arguments))
            finally:
                alone.load_lora_weights(source(folder), **({"adapter_name": "new"} | arguments))
        finally:
            assert all(
                each.transformer(images).latents.equal(b) for each, b in zip((alone, pipe), before, strict=True)
            )
            assert pipe.get_active_adapters() == ["former"]
            alone.save_pretrained(folder / "alone")

    return Bad(name, call, error, message)


def weights(change):
    def damage(folder):
        state = load_file(folder / "file" / WEIGHTS)
        change(state)
        save_file(state, folder / "file" / WEIGHTS)

    return damage


def one(value):
    return weights(lambda state: state.update({KEY: value}))


def content(path, change):
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def settings(**values):
    return content("peft/adapter_config.json", lambda text: json.dumps(json.loads(text) | values).encode())


def attached(name, message, do):
    """A row: something is done to a pipeline with one adapter."""

    def call(folder):
        adapter(folder)
        pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
        pipe.load_lora_weights(folder / "file", adapter_name="own")
        do(pipe)

    return Bad(name, call, ValueError, message)


ROWS = [
    load(
        "a file cut short",
        f"{WEIGHTS} is cut short",
        content(f"file/{WEIGHTS}", lambda data: data[:99]),
        error=OSError,
    ),
    load("a file of nothing", f"{WEIGHTS} is cut short", content(f"file/{WEIGHTS}", lambda data: b""), error=OSError),
    load("a missing weight", "the adapter does not fit: ", weights(lambda state: state.pop(KEY))),
    load("another shape", "the adapter does not fit: .*other shapes", one(torch.ones(4, 5))),
    load("no rank", "", one(torch.ones(0, 16))),
    load(
        "a number that is none", f"numbers of {KEY} are not finite", one(torch.full((4, 16), torch.nan)), error=OSError
    ),
    load("whole numbers", f"{KEY} must be a floating point tensor, got torch.int64", one(torch.ones(4, 16).long())),
    load(
        "a surplus weight",
        "the adapter does not fit: ",
        weights(lambda state: state.update({f"{KEY}.more": torch.ones(1)})),
    ),
    load(
        "PEFT weights cut short",
        "adapter_model.safetensors is cut short",
        cut("peft/adapter_model.safetensors"),
        peft,
        OSError,
    ),
    load(
        "PEFT settings cut short",
        "adapter_config.json is cut short or not JSON",
        cut("peft/adapter_config.json"),
        peft,
        OSError,
    ),
    load(
        "no method of PEFT",
        "adapter_config.json .* peft_type must be .* got None",
        settings(peft_type=None),
        peft,
        OSError,
    ),
    load("an unknown method", "the adapter does not fit: KeyError: 'X'", settings(peft_type="X"), peft),
    load("a rank of text", "the adapter does not fit: TypeError", settings(r="x"), peft),
    load("another rank", "the adapter does not fit: .*other shapes", settings(r=8), peft),
    load("targets of another model", "the adapter does not fit: .*not found", settings(target_modules=["to_q"]), peft),
    load(
        "weights that can run code",
        "adapter_model.safetensors; other files of weights can run code",
        lambda folder: (folder / "peft/adapter_model.safetensors").rename(folder / "peft/adapter_model.bin"),
        peft,
        FileNotFoundError,
    ),
    *(
        load(
            f"from {place!r}", "pretrained_model_name_or_path_or_dict must be a folder or", source=lambda _, p=place: p
        )
        for place in (None, 5, "", b"lora", [])
    ),
    *(
        load(f"as {name!r}", f"adapter_name must be text without dots, got {name!r}", adapter_name=name)
        for name in (5, "", "a.b")
    ),
    load("by an unknown argument", "has no argument 'revison', did you mean 'revision'", revison="v1"),
    load("by a number for a file", "weight_name must be the name of a file, got 5", weight_name=5),
    attached(
        "delete no adapter", r"adapter_names must be among \['own'\], got 'x'", lambda pipe: pipe.delete_adapters("x")
    ),
    attached("delete a number", r"adapter_names must be among \['own'\], got 5", lambda pipe: pipe.delete_adapters(5)),
    attached("fuse no adapter", r"\['own'\], got \['x'\]", lambda pipe: pipe.fuse_lora(adapter_names=["x"])),
    attached("fuse by text", "lora_scale must be finite, got 'x'", lambda pipe: pipe.fuse_lora(lora_scale="x")),
]
