"""Client: trains two steps, then pushes in every way; prints what the repositories look like afterwards."""

import json
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard

from hub.client import refusal, samples, tiny_pipeline
from tarflow_hf import TarFlowPipeline, conversion
from tarflow_hf.hub.background_push import BackgroundPush
from tarflow_hf.hub.push import push_folder

api = HfApi()


def titles(repo: str, revision: str | None = None) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo, revision=revision)]


def weights(repo: str, revision: str | None = None) -> list[str]:
    return sorted(name for name in api.list_repo_files(repo, revision=revision) if "safetensors" in name)


def push_once(pipe: TarFlowPipeline) -> dict[str, object]:
    commit = pipe.push_to_hub("alice/flow", tag="v1")
    again = pipe.push_to_hub("alice/flow")
    return {
        "files": api.list_repo_files("alice/flow"),
        "titles": titles("alice/flow"),
        "tag": [tag.target_commit for tag in api.list_repo_refs("alice/flow").tags] == [commit.oid],
        "second push without a change": again.oid == commit.oid,
        "card": str(ModelCard.load("alice/flow")),
        "private": api.model_info("alice/flow").private,
    }


def push_variants(pipe: TarFlowPipeline) -> dict[str, object]:
    half = TarFlowPipeline(transformer=tiny_pipeline().transformer.to(torch.bfloat16))
    half.push_to_hub("alice/flow", variant="bf16")
    pipe.push_to_hub("alice/sharded")
    whole = weights("alice/sharded")
    pipe.push_to_hub("alice/sharded", max_shard_size="20KB")
    return {"variants": weights("alice/flow"), "whole": whole, "sharded": weights("alice/sharded")}


def push_elsewhere(pipe: TarFlowPipeline) -> dict[str, object]:
    pipe.push_to_hub("alice/secret", private=True)
    other = tiny_pipeline(guidance_scale=2.0)
    other.push_to_hub("alice/flow", revision="dev", commit_message="Guide by default")
    proposed = other.push_to_hub("alice/flow", create_pr=True)
    other.push_to_hub("alice/flow", revision="refs/pr/1", commit_message="Second thoughts")
    return {
        "secret is private": api.model_info("alice/secret").private,
        "branch": titles("alice/flow", "dev")[0],
        "pull request": proposed.pr_revision,
        "main unchanged": "Guide by default" not in titles("alice/flow"),
        "refused": refusal(lambda: other.push_to_hub("alice/flow", revision="dev", create_pr=True)),
        "not mine": refusal(lambda: other.push_to_hub("bob/flow")),
    }


def push_over_edits(pipe: TarFlowPipeline) -> dict[str, object]:
    pipe.push_to_hub("alice/edited")
    card = ModelCard.load("alice/edited")
    card.data.license = "mit"
    card.data.tags = ["mine"]
    card.text += "\nSeen by a person.\n"
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="alice/edited")
    tiny_pipeline(guidance_scale=3.0).push_to_hub("alice/edited")
    after = ModelCard.load("alice/edited")
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        Path(folder, "samples.png").write_bytes(b"a picture")
        Path(folder, ".env").write_text("HF_TOKEN=hf_secret")
        Path(folder, "notes.txt").write_text("mine")
        Path(folder, "link").symlink_to("/etc/passwd")
        Path(folder, "checkpoints").mkdir()
        Path(folder, "checkpoints", "state.bin").write_bytes(b"large")
        push_folder(folder, "alice/edited", commit_message="From a folder")
        push_folder(folder, "alice/folder")
    return {
        "text kept": after.text == card.text,
        "license": after.data.license,
        "tags": after.data.tags,
        "text kept by push_folder": ModelCard.load("alice/edited").text == card.text,
        "folder": api.list_repo_files("alice/folder"),
        "folder's card": ModelCard.load("alice/folder").text,
    }


def push_nothing(pipe: TarFlowPipeline) -> dict[str, object]:
    """Folders that are refused before anything is made on the Hub: why, and what there is afterwards."""
    refused = {}
    with tempfile.TemporaryDirectory() as parent:
        for index, name in enumerate(("transformer/model.safetensors", "transformer/config.json", "README.md")):
            folder = Path(parent, str(index))
            pipe.save_pretrained(folder)
            (folder / name).unlink()
            refused[name] = refusal(lambda folder=folder: push_folder(folder, "alice/never"))
        (folder / "README.md").symlink_to("/etc/passwd")
        refused["link"] = refusal(lambda: push_folder(folder, "alice/never"))
    return {"refused": refused, "made": api.repo_exists("alice/never")}


def push_model(pipe: TarFlowPipeline) -> dict[str, object]:
    pipe.transformer.push_to_hub("alice/bare")
    return {"files": api.list_repo_files("alice/bare")}


def push_converted() -> dict[str, object]:
    checkpoint = Path(__file__).parents[1] / "fixtures" / "cond_model_2_128_2_1_0.05.pth"
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "out")
        arguments = [str(checkpoint), str(folder), "--image_size", "8", "--private"]
        conversion.main([*arguments, "--push_to_hub", "alice/converted"])
    return {"classes": TarFlowPipeline.from_pretrained("alice/converted").transformer.config.num_classes}


def push_in_the_background(pipe: TarFlowPipeline) -> dict[str, object]:
    uploads = BackgroundPush("alice/run", private=True)
    nothing = uploads.wait()
    begun = [uploads.start(pipe.save_pretrained, "Step 1")]
    uploads.wait()
    guided = TarFlowPipeline(transformer=pipe.transformer, guidance_scale=2.0)
    begun.append(uploads.start(guided.save_pretrained, "Step 2"))
    last = uploads.wait()
    refused = BackgroundPush("bob/run")
    refused.start(pipe.save_pretrained, "Step 1")
    failed = refused.wait()
    return {
        "nothing": nothing,
        "begun": begun,
        "titles": titles("alice/run"),
        "last": last is not None and last.oid == api.model_info("alice/run").sha,
        "after a failure": [failed, refused.start(pipe.save_pretrained, "Step 2")],
    }


def push_broken(pipe: TarFlowPipeline) -> None:
    """Repositories that cannot be loaded, each for another reason."""

    def upload(repo: str, **files: bytes) -> None:
        api.create_repo(repo)
        for name, content in files.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo)

    upload("alice/empty", **{"README.md": b"# Nothing\n"})
    upload("alice/other", **{"model_index.json": b'{"_class_name": "DDPMPipeline"}', "unet/model.safetensors": b"?"})
    upload("alice/index", **{"model_index.json": b'{"_class_name": '})
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "short")
        pipe.save_pretrained(folder)
        whole = (folder / "transformer/model.safetensors").read_bytes()
        for repo, content in {"alice/short": whole[:-100], "alice/header": whole[:50]}.items():
            (folder / "transformer/model.safetensors").write_bytes(content)
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=folder)
    pipe.push_to_hub("alice/shard", max_shard_size="20KB")
    api.delete_file(weights("alice/shard")[0], repo_id="alice/shard")


def main() -> None:
    pipe = tiny_pipeline()
    facts = {
        "samples": samples(pipe),
        "once": push_once(pipe),
        "variants": push_variants(pipe),
        "elsewhere": push_elsewhere(pipe),
        "edits": push_over_edits(pipe),
        "nothing": push_nothing(pipe),
        "model": push_model(pipe),
        "converted": push_converted(),
        "background": push_in_the_background(pipe),
    }
    push_broken(pipe)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
