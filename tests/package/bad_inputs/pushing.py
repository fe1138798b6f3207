"""Folders that are not to be uploaded: all is refused before the Hub is asked, which these tests have none of."""

import torch

from bad_inputs import Bad, saved_pipeline
from bad_inputs.loading import CONFIG, INDEX, WEIGHTS, numbers, one, setting, shards, text
from tarflow_hf import push_folder
from tarflow_hf.hub.push import PushOptions


def push(name, damage, message, error=OSError, **options):
    """A row: a saved pipeline is damaged, then uploaded."""

    def call(parent):
        folder = saved_pipeline(parent)
        damage(folder)
        push_folder(folder, "alice/never", **options)

    return Bad(name, call, error, message)


def linked(path, target):
    def damage(folder):
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target)

    return damage


def broken_variant(folder):
    (folder / "transformer/model.fp16.safetensors").write_bytes(b"short")


ROWS = [
    Bad(
        "no folder",
        lambda _: push_folder("nothing", "alice/never"),
        OSError,
        "nothing is not a TarFlow",
    ),
    push("weights missing", lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    push("weights cut short", lambda folder: (folder / WEIGHTS).write_bytes(b"short"), "is cut short"),
    push("weights with a NaN", numbers(float("nan")), "are not finite"),
    push("weights with a tensor more", one("blocks.9.extra", torch.ones(1)), "among them blocks.9.extra"),
    push("a variant cut short", broken_variant, "model.fp16.safetensors is cut short"),
    push(
        "shards above the folder",
        shards(lambda index, _: index.update(weight_map={"x": "../x"})),
        "is no name of",
    ),
    push("index with a key misspelt", setting(INDEX, guidance_scal=2.0), "unknown key 'guidance_scal', did you mean"),
    push("index of a guidance below 1", setting(INDEX, guidance_scale=-3.0), f"{INDEX} is damaged: .*guidance_scale"),
    push("index without a model", setting(INDEX, transformer=...), "incomplete: it lacks transformer"),
    push("an autoencoder that is not there", setting(INDEX, vae=["diffusers", "AutoencoderKL"]), "no vae/config.json"),
    push("a shim missing", lambda folder: (folder / "pipeline.py").unlink(), "it has no pipeline.py, which save_pre"),
    push(
        "an image processor cut short", text("transformer/preprocessor_config.json", "{"), "config.json is cut short"
    ),
    push(
        "an image processor without a size",
        text("transformer/preprocessor_config.json", '{"num_channels": 1}'),
        "transformer/preprocessor_config.json is incomplete: it lacks image_size",
    ),
    push("an adapter cut short", text("adapter_model.safetensors", "x"), "adapter_model.safetensors is cut short"),
    push("config missing", lambda folder: (folder / CONFIG).unlink(), "it has no transformer/config.json"),
    push("config with an unknown key", setting(CONFIG, num_block=3), "did you mean 'num_blocks'"),
    push("index of a list", text(INDEX, "[]"), "model_index.json must hold a JSON object"),
    push("page missing", lambda folder: (folder / "README.md").unlink(), "is incomplete: it has no README.md"),
    push("page of broken metadata", text("README.md", "---\na: [\n---\n# Mine\n"), "README.md is damaged"),
    push("page linked from outside", linked("README.md", "/etc/passwd"), "README.md is a link that leaves the folder"),
    push("weights linked from outside", linked("transformer/x.safetensors", "/etc/passwd"), "is a link that leaves"),
    push("a request to a branch", lambda _: None, "revision must be None", ValueError, create_pr=True, revision="dev"),
    Bad("an unknown option", lambda _: PushOptions(branch="x"), TypeError, "unexpected keyword argument 'branch'"),
    *(
        push(f"{name}={value!r}", lambda folder: None, f"{name} must be .*got {value!r}", ValueError, **{name: value})
        for name, value in [
            ("tag", 5),
            ("revision", 5),
            ("private", "yes"),
            ("commit_message", 5),
            ("create_pr", "no"),
        ]
    ),
    push("an unknown argument", lambda _: None, "no argument 'tagg', did you mean 'tag'", ValueError, tagg="v1"),
    *(
        Bad(
            f"folder {place!r}",
            lambda _, place=place: push_folder(place, "alice/never"),
            ValueError,
            "folder must be a",
        )
        for place in (None, 5, "", b"pipe")
    ),
    Bad(
        "no repository",
        lambda parent: push_folder(saved_pipeline(parent), None),
        ValueError,
        "repo_id must be the name of a repository, got None",
    ),
]
