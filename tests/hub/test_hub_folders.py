"""Pipelines as folders: what is saved over what, and what an incomplete folder says. No Hub."""

import json

import pytest
import torch
from conftest import tiny_model
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tarflow_hf import TarFlowPipeline


@pytest.fixture
def pipe():
    return TarFlowPipeline(transformer=tiny_model(dtype=torch.float32))


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def weights(folder):
    return sorted(path.name for path in folder.glob("transformer/*") if "safetensors" in path.name)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder, **arguments):
    with pytest.raises(OSError, match=str(folder)) as error:
        TarFlowPipeline.from_pretrained(folder, **arguments)
    return str(error.value)


def test_round_trip_keeps_weights_and_defaults(tmp_path):
    pipe = TarFlowPipeline(
        transformer=tiny_model(dtype=torch.float32), guidance_scale=3.0, guidance_schedule="constant"
    )
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    defaults = ("guidance_scale", "guidance_schedule", "attention_temperature", "denoising_strength")
    assert [loaded.config[name] for name in defaults] == [3.0, "constant", 1.0, 1.0]
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor)
    assert TarFlowPipeline.from_pretrained(tmp_path, guidance_scale=1.0).config.guidance_scale == 1.0


def test_generic_diffusers_pipeline_finds_the_class_through_the_shims(folder):
    assert type(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) is TarFlowPipeline


def test_each_variant_is_loaded_in_its_own_dtype_whatever_was_saved_last(pipe, folder):
    half = TarFlowPipeline(transformer=tiny_model(dtype=torch.bfloat16))
    half.save_pretrained(folder, variant="bf16")
    assert weights(folder) == ["model.bf16.safetensors", "model.safetensors"]
    assert TarFlowPipeline.from_pretrained(folder).transformer.dtype == torch.float32
    assert TarFlowPipeline.from_pretrained(folder, variant="bf16").transformer.dtype == torch.bfloat16


def test_weights_saved_in_another_shape_replace_the_former(pipe, folder):
    pipe.save_pretrained(folder, variant="x")
    pipe.save_pretrained(folder, max_shard_size="20KB")
    assert "model.safetensors" not in weights(folder)
    assert "model.x.safetensors" in weights(folder)
    TarFlowPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder, variant="x", max_shard_size="20KB")
    assert "model.x.safetensors" not in weights(folder)
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="x")
    assert weights(folder) == ["model.safetensors", "model.x.safetensors"]


def test_saving_that_fails_leaves_the_former_pipeline(pipe, folder, tmp_path):
    before = contents(folder)
    with pytest.raises(ValueError, match="Unit"):
        pipe.save_pretrained(folder, max_shard_size="much")
    assert contents(folder) == before
    with pytest.raises(ValueError, match="Unit"):
        pipe.save_pretrained(tmp_path / "new", max_shard_size="much")
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="save_directory must be a folder, got the file"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_page_keeps_what_a_person_wrote(pipe, folder):
    page = folder / "README.md"
    page.write_text(page.read_text().replace("library_name: diffusers", "library_name: mine") + "Seen by a person.\n")
    pipe.save_pretrained(folder)
    card = ModelCard.load(page)
    assert card.text.endswith("Seen by a person.\n")
    assert card.data.library_name == "mine"


def test_folder_in_the_plain_form_of_diffusers_is_loaded(folder):
    index = json.loads((folder / "model_index.json").read_text())
    plain = {"_class_name": "TarFlowPipeline", "transformer": ["tarflow_hf.modeling_tarflow", "TarFlowModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | plain))
    assert type(TarFlowPipeline.from_pretrained(folder)) is TarFlowPipeline


def test_what_is_missing_is_named(folder):
    assert "no weights of the variant 'fp8'" in refusal(folder, variant="fp8")
    path = folder / "transformer" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "blocks.1.proj_in" not in name}, path)
    assert "its weights lack 2 tensors, among them blocks.1.proj_in.bias" in refusal(folder)
    path.write_bytes((8).to_bytes(8, "little") + b"no json!")
    assert "transformer/model.safetensors is damaged, or not a safetensors file" in refusal(folder)
    path.write_bytes(b"")
    assert "transformer/model.safetensors is cut short" in refusal(folder)
    path.unlink()
    assert "no weights: neither transformer/model.safetensors nor shards" in refusal(folder)
    (folder / "transformer" / "config.json").write_text("{")
    assert "transformer/config.json is cut short or not JSON" in refusal(folder)
    (folder / "transformer" / "config.json").unlink()
    assert "it has no transformer/config.json" in refusal(folder)
    (folder / "model_index.json").unlink()
    assert "is not a TarFlow pipeline: it has no model_index.json" in refusal(folder)


def test_weights_are_not_needed_for_a_model_that_is_given(pipe, folder):
    (folder / "transformer" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights"):
        TarFlowPipeline.from_pretrained(folder)
    loaded = TarFlowPipeline.from_pretrained(folder, transformer=pipe.transformer)
    assert loaded.transformer is pipe.transformer
