"""Pipelines as folders: what is saved over what, and what an incomplete folder says. No Hub."""

import inspect
import json
import os
import re
import resource
from dataclasses import fields

import pytest
import torch
from conftest import tiny_config, tiny_model
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from tarflow_hf import TarFlowConfig, TarFlowModel, TarFlowPipeline
from tarflow_hf.hub import repositories
from tarflow_hf.hub.checkpoint_files import Place
from tarflow_hf.hub.download import DownloadOptions
from tarflow_hf.hub.model_files import check_model_files, expected_shapes

WEIGHTS = "transformer/model.safetensors"
SHAPES = [
    {},
    {"num_classes": 0, "volume_preserving": True},
    {"noise_conditioning": True, "image_size": (8, 4)},
    {"condition_dim": 3, "layers_per_block": 2},
]


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
    with pytest.raises(ValueError, match="max_shard_size must be"):
        pipe.save_pretrained(folder, max_shard_size="much")
    assert contents(folder) == before
    with pytest.raises(ValueError, match="max_shard_size must be"):
        pipe.save_pretrained(tmp_path / "new", max_shard_size="much")
    assert not (tmp_path / "new").exists()


def test_weights_that_could_not_be_loaded_again_replace_nothing(pipe, folder):
    before = contents(folder)
    with torch.no_grad():
        pipe.transformer.blocks[1].proj_in.bias[3] = float("nan")
    with pytest.raises(OSError, match=r"not saved to .*1 of 16 numbers of blocks\.1\.proj_in\.bias are not finite"):
        pipe.save_pretrained(folder)
    assert contents(folder) == before


def test_what_an_interrupted_save_has_left_is_removed_but_not_another_process_save(pipe, folder):
    for name in (".saving-abc", f".saving-{os.getpid()}-abc", ".saving-4194304-abc", f".saving-{os.getppid()}-abc"):
        (folder / name / "pipe").mkdir(parents=True)
    pipe.save_pretrained(folder)
    assert [path.name for path in folder.glob(".saving-*")] == [f".saving-{os.getppid()}-abc"]


def test_a_model_with_other_classes_is_drawn_anew_saved_and_loaded(folder, tmp_path):
    """The number of classes changes by either word for it; their names are renewed with it."""
    for word in ("num_classes", "num_labels"):
        arguments = {word: 5, "ignore_mismatched_sizes": True}
        model = TarFlowModel.from_pretrained(folder / "transformer", **arguments)
        assert model.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
        assert model.config.label2id == {f"LABEL_{index}": index for index in range(5)}
        model(torch.zeros(1, 1, 8, 8), torch.tensor([4])).loss.backward()
        TarFlowPipeline(transformer=model).save_pretrained(tmp_path / word)
        loaded = TarFlowPipeline.from_pretrained(tmp_path / word).transformer
        assert torch.equal(loaded.blocks[0].class_embedding.weight, model.blocks[0].class_embedding.weight)
        assert torch.equal(loaded.blocks[0].proj_in.weight, load_file(folder / WEIGHTS)["blocks.0.proj_in.weight"])
    named = TarFlowModel.from_pretrained(
        folder, subfolder="transformer", num_classes=2, id2label={0: "cat", 1: "dog"}, ignore_mismatched_sizes=True
    )
    assert named.config.label2id == {"cat": 0, "dog": 1}


def test_a_model_is_loaded_from_its_own_folder_in_shards_and_with_what_transformers_reports(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weights(tmp_path / "..")) == 0
    model, report = TarFlowModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.name_or_path == str(tmp_path)
    for loaded in (model, AutoModel.from_pretrained(tmp_path), TarFlowModel.from_pretrained(tmp_path, dtype="auto")):
        assert torch.equal(loaded.blocks[1].proj_in.weight, pipe.transformer.blocks[1].proj_in.weight)
    state = model.state_dict()
    assert TarFlowModel.from_pretrained(None, config=model.config, state_dict=state).config.num_blocks == 3


def test_settings_that_transformers_writes_are_known(pipe, folder):
    path = folder / "transformer" / "config.json"
    written = {
        "_name_or_path": "x",
        "torch_dtype": "float32",
        "architectures": ["TarFlowModel"],
        "return_dict": True,
        "output_hidden_states": False,
        "problem_type": None,
        "transformers_version": "5.23.0",
        "_commit_hash": None,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    assert TarFlowPipeline.from_pretrained(folder).transformer.dtype == torch.float32
    assert AutoConfig.from_pretrained(folder / "transformer").num_blocks == 3
    config = TarFlowConfig.from_pretrained(folder / "transformer", hidden_size=32)
    assert TarFlowConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert TarFlowConfig.from_dict(config.to_dict(), return_unused_kwargs=True, other=1)[1] == {"other": 1}


def test_every_argument_that_diffusers_takes_is_known():
    """One that were not would be refused as misspelt."""
    source = inspect.getsource(DiffusionPipeline.from_pretrained) + inspect.getsource(DiffusionPipeline.download)
    taken = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', source)) - {"use_safetensors", "variant"}
    assert taken <= repositories._OF_LOADING | {item.name for item in fields(DownloadOptions)}


@pytest.mark.parametrize("overrides", SHAPES)
def test_the_shapes_expected_of_the_weights_are_those_of_the_model(overrides):
    config = tiny_config(**overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in TarFlowModel(config).state_dict().items()}
    assert expected_shapes(config, "config.json") == shapes


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_weights_of_a_quantizer_are_left_to_it(folder, method):
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))
    state = load_file(folder / WEIGHTS)
    state["blocks.0.proj_in.weight"] = state["blocks.0.proj_in.weight"].to(torch.int8)
    save_file(state | {"blocks.0.proj_in.scale": torch.ones(16)}, folder / WEIGHTS, metadata={"format": "pt"})
    check_model_files(folder / "transformer", Place("mine", "transformer/"))
    state["blocks.1.proj_in.bias"][0] = float("inf")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OSError, match="mine: transformer/model.safetensors is damaged: 1 of 16 numbers"):
        check_model_files(folder / "transformer", Place("mine", "transformer/"))


def test_a_refusal_is_quick_and_small_whatever_is_claimed(folder):
    """Memory in Python's and torch's hands; the time is that of reading headers, which the counts bound."""
    config = folder / "transformer" / "config.json"
    sound = json.loads(config.read_text())
    for claim in ({"num_blocks": 10**6}, {"layers_per_block": 10**6}, {"hidden_size": 2**20}, {"num_classes": 10**6}):
        config.write_text(json.dumps(sound | claim))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refusal(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


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
