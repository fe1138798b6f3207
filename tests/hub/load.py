"""Client: loads what `push` left on the Hub, in every way; prints what it got."""

import json
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel

from hub.client import refusal, samples
from tarflow_hf import TarFlowModel, TarFlowPipeline

load = TarFlowPipeline.from_pretrained


def load_versions() -> dict[str, object]:
    commit = HfApi().list_repo_refs("alice/flow").tags[0].target_commit
    revisions = {name: load("alice/flow", revision=name) for name in ("v1", "dev", "refs/pr/1", commit)}
    return {
        "samples": samples(load("alice/flow")),
        "mode": load("alice/flow").transformer.training,
        "tag": samples(revisions["v1"]),
        "commit": samples(revisions[commit]),
        "guidance": [revisions[name].config.guidance_scale for name in ("v1", "dev", "refs/pr/1")],
        "sharded": samples(load("alice/sharded")),
        "given model": samples(load("alice/flow", transformer=load("alice/flow").transformer, guidance_scale=1.0)),
    }


def load_weights() -> dict[str, str]:
    half = load("alice/flow", variant="bf16")
    return {
        "plain": str(load("alice/flow").transformer.dtype),
        "variant": str(half.transformer.dtype),
        "dtype": str(load("alice/flow", dtype=torch.float16).transformer.dtype),
        "variant and dtype": str(load("alice/flow", variant="bf16", dtype=torch.float32).transformer.dtype),
        "device map": str(load("alice/flow", device_map="cpu").transformer.device),
    }


def load_places() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as cache:
        empty = refusal(lambda: load("alice/flow", cache_dir=cache, local_files_only=True))
        load("alice/flow", cache_dir=cache)
        load("alice/flow", cache_dir=cache, local_files_only=True)
        other_variant = refusal(lambda: load("alice/flow", variant="bf16", cache_dir=cache, local_files_only=True))
        downloaded = sorted(path.name for path in Path(cache).glob("*/snapshots/*/transformer/*"))
    return {"empty cache": empty, "other variant": other_variant, "downloaded": downloaded}


def load_models() -> dict[str, object]:
    whole = load("alice/flow").transformer
    models = {
        "auto": AutoModel.from_pretrained("alice/flow", subfolder="transformer"),
        "auto, variant": AutoModel.from_pretrained("alice/flow", subfolder="transformer", variant="bf16"),
        "own class": TarFlowModel.from_pretrained("alice/flow", subfolder="transformer"),
        "bare": AutoModel.from_pretrained("alice/bare"),
    }
    config = AutoConfig.from_pretrained("alice/flow", subfolder="transformer")
    weight = whole.blocks[0].proj_in.weight
    return {
        "types": [type(model).__name__ for model in models.values()],
        "dtypes": [str(model.dtype) for model in models.values()],
        "equal": [torch.equal(model.float().blocks[0].proj_in.weight, weight) for model in models.values()],
        "config": [type(config).__name__, config.id2label == whole.config.id2label],
    }


def load_refused() -> dict[str, list[str]]:
    calls = {
        "missing": lambda: load("alice/nothing"),
        "missing, anonymous": lambda: load("alice/nothing", token=False),
        "private, anonymous": lambda: load("alice/secret", token=False),
        "private, stranger": lambda: load("alice/secret", token="hf_bob"),
        "private, owner": lambda: load("alice/secret", token="hf_alice"),
        "wrong token": lambda: load("alice/flow", token="hf_wrong", force_download=True),
        "no such branch": lambda: load("alice/flow", revision="nowhere"),
        "no such variant": lambda: load("alice/flow", variant="fp8"),
        "no such folder": lambda: load("runs/digits/2025/pipeline"),
        "not a pipeline": lambda: load("alice/empty"),
        "another pipeline": lambda: load("alice/other"),
        "index cut short": lambda: load("alice/index"),
        "weights cut short": lambda: load("alice/short"),
        "header cut short": lambda: load("alice/header"),
        "shard missing": lambda: load("alice/shard"),
    }
    return {name: refusal(call) for name, call in calls.items()}


def main() -> None:
    facts = {
        "refused": load_refused(),
        "versions": load_versions(),
        "weights": load_weights(),
        "places": load_places(),
        "models": load_models(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
