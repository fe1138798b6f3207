"""The conversion command: a complete pipeline folder, or none and a line that says why."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from reference_layout import reference_state

from tarflow_hf import TarFlowPipeline, convert_reference_checkpoint
from tarflow_hf.conversion import main
from tarflow_hf.hub.known_data import class_names, read_class_names

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "cond_model_2_128_2_1_0.05.pth"
SIZE = ["--image_size", "8"]


@pytest.fixture
def small(tmp_path):
    """A checkpoint of the authors' layout with three classes."""
    path = tmp_path / "afhq_model_4_64_2_1_0.07.pth"
    torch.save(reference_state(image_size=8, patch_size=4, width=64, blocks=2, layers=1, num_classes=3), path)
    return path


def refused(capsys, *arguments):
    """The command's complaint; nothing may be left beside the checkpoint's folder."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 2], generator=torch.Generator().manual_seed(3), output_type="pt").images


def test_folder_samples_what_the_checkpoint_does(tmp_path):
    main([str(CHECKPOINT), str(tmp_path / "out"), *SIZE])
    model = convert_reference_checkpoint(CHECKPOINT, image_size=8)
    pipe = TarFlowPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(sample(pipe), sample(TarFlowPipeline(transformer=model)))
    assert pipe.transformer.config.noise_std == 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_variants_defaults_and_page(small, tmp_path):
    main(
        [str(small), str(tmp_path / "afhq"), *SIZE, "--dataset", "afhq", "--variant", "fp16", "bf16"]
        + ["--guidance_scale", "4.4", "--denoising_strength", "1.4"]
    )
    load = TarFlowPipeline.from_pretrained
    pipes = [load(tmp_path / "afhq", variant=variant) for variant in (None, "fp16", "bf16")]
    assert [pipe.transformer.dtype for pipe in pipes] == [torch.float32, torch.float16, torch.bfloat16]
    assert pipes[0].transformer.config.id2label == {0: "cat", 1: "dog", 2: "wild"}
    assert pipes[0].transformer.config.label2id["wild"] == 2
    assert (pipes[1].config.guidance_scale, pipes[1].config.denoising_strength) == (4.4, 1.4)
    weights = [pipe.transformer.blocks[0].proj_in.weight for pipe in pipes]
    assert torch.equal(weights[1], weights[0].half())
    assert torch.equal(weights[2], weights[0].bfloat16())
    card = ModelCard.load(tmp_path / "afhq" / "README.md")
    assert "Animal Faces HQ" in card.text
    assert "`guidance_scale=4.4`" in card.text


def test_a_checkpoint_that_is_told_the_noise_level(tmp_path, capsys):
    checkpoint = CHECKPOINT.with_name("itarflow_cond.pth")
    options = ["--guidance_rule", "product", "--num_refinement_steps", "3"]
    main([str(checkpoint), str(tmp_path / "out"), *SIZE, "--noise_range", "0.01", "0.3", *options])
    pipe = TarFlowPipeline.from_pretrained(tmp_path / "out")
    model = convert_reference_checkpoint(checkpoint, image_size=8, noise_range=(0.01, 0.3))
    expected = TarFlowPipeline(transformer=model, guidance_rule="product", num_refinement_steps=3)
    assert torch.equal(sample(pipe), sample(expected))
    page = (tmp_path / "out" / "README.md").read_text()
    assert "a standard deviation from 0.01 to 0.3" in page
    assert "`guidance_rule='product'`, `num_refinement_steps=3`" in page
    assert "give noise_range" in refused(capsys, checkpoint, tmp_path / "none", *SIZE)


def test_half_precision_alone(small, tmp_path):
    main([str(small), str(tmp_path / "half"), *SIZE, "--dtype", "float16"])
    assert TarFlowPipeline.from_pretrained(tmp_path / "half").transformer.dtype == torch.float16


def test_class_names_from_a_file(small, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"0": "one", "1": "two", "2": "three"}))
    main([str(small), str(tmp_path / "out"), *SIZE, "--id2label", str(names)])
    assert TarFlowPipeline.from_pretrained(tmp_path / "out").transformer.config.id2label[2] == "three"
    names.write_text('["one", "two"]')
    assert read_class_names(names) == ["one", "two"]
    names.write_text('{"1": "one", "2": "two"}')
    with pytest.raises(ValueError, match=r"must name the ids 0 \.\.\. 1"):
        read_class_names(names)


def test_known_class_names():
    assert class_names("afhq") == ["cat", "dog", "wild"]
    names = class_names("imagenet-1k")
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[207], names[999]) == (
        "tench, Tinca tinca",
        "golden retriever",
        "toilet tissue, toilet paper, bathroom tissue",
    )


def test_uniform_noise_of_the_file_name(tmp_path):
    path = tmp_path / "imagenet64_model_4_64_1_1_uniform.pth"
    torch.save(reference_state(image_size=8, patch_size=4, width=64, blocks=1, layers=1), path)
    main([str(path), str(tmp_path / "out"), *SIZE, "--dataset", "imagenet-1k"])
    config = TarFlowPipeline.from_pretrained(tmp_path / "out").transformer.config
    assert (config.noise_type, config.num_classes) == ("uniform", 0)


def test_checkpoint_in_the_format_of_old_torch(small, tmp_path):
    torch.save(torch.load(small), small, _use_new_zipfile_serialization=False)
    main([str(small), str(tmp_path / "out"), *SIZE])
    assert TarFlowPipeline.from_pretrained(tmp_path / "out").transformer.config.num_classes == 3


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_what_cannot_be_converted_leaves_nothing(small, tmp_path, capsys):
    out, state = tmp_path / "out", torch.load(small)
    tmp_path.joinpath("names.txt").write_text("cat\ndog\n")
    before = sorted(tmp_path.iterdir())

    def changed(**changes):
        torch.save({key: value for key, value in (state | changes).items() if value is not None}, small)

    assert "image_size=16 and num_channels=3 do not fit" in refused(capsys, small, out, "--image_size", 16)
    assert "1000 classes" not in refused(capsys, small, out, *SIZE, "--dataset", "imagenet-1k")
    assert "2 class names" in refused(capsys, small, out, *SIZE, "--id2label", tmp_path / "names.txt")
    assert "unrecognized arguments: --vriant" in refused(capsys, small, out, *SIZE, "--vriant", "fp16")
    assert "no checkpoint file" in refused(capsys, tmp_path / "no_model_1_1_1_1_0.1.pth", out, *SIZE)
    changed(**{"blocks.0.extra": torch.ones(1)})
    assert "unknown key 'blocks.0.extra'" in refused(capsys, small, out, *SIZE)
    changed(**{"blocks.1.proj_in.bias": None})
    assert "blocks.1.proj_in.bias" in refused(capsys, small, out, *SIZE)
    changed(**{"blocks.1.proj_in.bias": torch.full((64,), 1e5)})
    assert "blocks.1.proj_in.bias has values that are not finite in torch.float16" in refused(
        capsys, small, out, *SIZE, "--variant", "fp16"
    )
    small.write_bytes(small.read_bytes()[:1000])
    assert "not a complete PyTorch checkpoint" in refused(capsys, small, out, *SIZE)
    changed(**{"blocks.0.proj_in.weight": RunsCode()})
    assert "holds more than tensors and is not loaded: Unsupported global: GLOBAL print" in refused(
        capsys, small, out, *SIZE
    )
    with small.open("wb") as file:
        pickle.dump({"blocks.0.proj_in.weight": RunsCode()}, file)
    assert "holds more than tensors and is not loaded" in refused(capsys, small, out, *SIZE)
    assert "must not be printed" not in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_refused_and_kept(small, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    main([str(small), str(out), *SIZE])
    saved = (out / "transformer" / "model.safetensors").read_bytes()
    assert "is there already" in refused(capsys, small, out, *SIZE)
    assert (out / "transformer" / "model.safetensors").read_bytes() == saved
