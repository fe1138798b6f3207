"""Adapters by PEFT: train, save, load, merge, several at once; and what a pipeline does with them."""

import pytest
import torch
from conftest import random_images, tiny_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from tarflow_hf import TarFlowModel, TarFlowPipeline

LABELS = torch.tensor([0, 1, 3])


def lora(**options):
    return LoraConfig(r=2, lora_alpha=4, target_modules=["qkv_proj", "up_proj"], **options)


def trained(model, steps=3):
    """A few steps of what requires gradients."""
    images = random_images(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(images, LABELS).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "config", [lora(), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])]
)
def test_an_adapter_is_trained_saved_loaded_and_merged(config, tmp_path):
    base, images = tiny_model(), random_images(tiny_model())
    model = trained(get_peft_model(tiny_model(), config))
    adapted = model(images, LABELS).latents
    assert not torch.allclose(adapted, base(images, LABELS).latents)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).double()
    assert torch.allclose(loaded(images, LABELS).latents, adapted)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(images, LABELS).latents, adapted, atol=1e-9)
    assert (merged.decode(adapted, LABELS, window=1) - images).abs().max() < 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by_peft", [False, True])
def test_gradients_pass_under_activation_checkpointing(reentrant, by_peft):
    def gradients(checkpointed):
        model = tiny_model()
        wrapped = get_peft_model(model, lora(init_lora_weights=False)) if by_peft else model
        if not by_peft:
            model.add_adapter(lora(init_lora_weights=False))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        wrapped.train()(random_images(model), LABELS).loss.backward()
        return {name: item.grad for name, item in model.named_parameters() if item.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 2 * 2 * 4
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, recomputed[name])


def test_a_pipeline_loads_several_adapters_and_fuses_them(tmp_path):
    pipe = TarFlowPipeline(tiny_model())
    images = random_images(pipe.transformer)

    def latents():
        return pipe.transformer(images, LABELS).latents.detach()

    plain, seen = latents(), {}
    for name in ("thick", "thin"):
        pipe.transformer.add_adapter(lora(init_lora_weights=False), name)
        pipe.set_adapters(name)
        seen[name] = latents()
        layers = pipe.transformer.get_adapter_state_dict(name)
        settings = pipe.transformer.peft_config[name].to_dict()
        pipe.save_lora_weights(tmp_path / name, layers, transformer_lora_adapter_metadata=settings)
        pipe.delete_adapters(name)
    pipe.unload_lora_weights()
    assert torch.allclose(latents(), plain, atol=1e-12)
    for name in seen:
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        assert torch.allclose(latents(), seen[name], atol=1e-6)
    assert pipe.get_list_adapters() == {"transformer": ["thick", "thin"]}
    pipe.set_adapters(["thick", "thin"], [0.5, 0.5])
    both = latents()
    assert not torch.allclose(both, seen["thick"])
    pipe.set_adapters("thick")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(latents(), seen["thick"], atol=1e-6)
    pipe.save_pretrained(tmp_path / "fused")
    loaded = TarFlowPipeline.from_pretrained(tmp_path / "fused").transformer
    assert torch.allclose(loaded(images, LABELS).latents, seen["thick"], atol=1e-6)


def test_a_pipeline_loads_what_peft_saved_and_refuses_what_does_not_fit(tmp_path):
    model = trained(get_peft_model(tiny_model(), lora()))
    model.save_pretrained(tmp_path)
    pipe = TarFlowPipeline(tiny_model())
    images = random_images(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    assert torch.allclose(pipe.transformer(images, LABELS).latents, model(images, LABELS).latents, atol=1e-6)
    with pytest.raises(ValueError, match="'default_0' is in use"):
        pipe.load_lora_weights(tmp_path, adapter_name="default_0")
    other = TarFlowPipeline(tiny_model(hidden_size=32))
    with pytest.raises((ValueError, RuntimeError), match="fit|size|shape"):
        other.load_lora_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="none is no adapter: there is nothing at this path"):
        other.load_lora_weights(tmp_path / "none")
    with pytest.raises(ValueError, match="no LoRA weights"):
        other.load_lora_weights({"blocks.0.proj_in.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("by_peft", [False, True])
def test_saving_with_an_adapter_attached_touches_nothing(by_peft, tmp_path):
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if by_peft:
        get_peft_model(pipe.transformer, lora())
    else:
        pipe.transformer.add_adapter(lora())
    with pytest.raises(ValueError, match="adapters are attached"):
        pipe.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_on_a_volume_preserving_model_leaves_its_prior():
    model = tiny_model(volume_preserving=True)
    before = model.prior_variance.clone()
    trained(get_peft_model(model, lora()))
    assert model.prior_variance.equal(before)


def test_after_the_last_adapter_is_deleted_a_pipeline_is_saved_as_before(tmp_path):
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    images = random_images(pipe.transformer)
    before = pipe.transformer(images, LABELS).latents
    trained(get_peft_model(tiny_model(dtype=torch.float32), lora())).save_pretrained(tmp_path / "peft")
    pipe.load_lora_weights(tmp_path / "peft", adapter_name="thick")
    pipe.delete_adapters(["thick"])
    pipe.save_pretrained(tmp_path / "pipe")
    assert TarFlowPipeline.from_pretrained(tmp_path / "pipe").transformer(images, LABELS).latents.equal(before)


@pytest.mark.parametrize("kind", ["whole", "leaf", "group"])
def test_adapters_are_loaded_into_pipelines_that_are_offloaded(kind, tmp_path):
    trained(get_peft_model(tiny_model(dtype=torch.float32), lora())).save_pretrained(tmp_path)

    def drawn(pipe):
        pipe.load_lora_weights(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        return pipe([1, 2], generator=torch.Generator().manual_seed(0), window=1, output_type="latent").images

    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    if kind == "whole":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "leaf":
        pipe.enable_sequential_cpu_offload(device="cpu")
    else:
        pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert drawn(pipe).allclose(drawn(TarFlowPipeline(tiny_model(dtype=torch.float32))), atol=1e-5)


def test_magnitudes_of_dora_are_loaded_from_both_formats(tmp_path):
    settings = LoraConfig(r=4, target_modules=["qkv_proj"], use_dora=True)
    model = trained(get_peft_model(tiny_model(), settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.mul_(1.5)
    model.save_pretrained(tmp_path / "peft")
    images = random_images(tiny_model())
    pipes = [TarFlowPipeline(tiny_model()), TarFlowPipeline(tiny_model())]
    pipes[0].load_lora_weights(tmp_path / "peft", adapter_name="own")
    pipes[0].save_lora_weights(
        tmp_path / "file",
        pipes[0].transformer.get_adapter_state_dict("own"),
        transformer_lora_adapter_metadata=settings.to_dict(),
    )
    pipes[1].load_lora_weights(tmp_path / "file")
    for pipe in pipes:
        assert torch.allclose(pipe.transformer(images, LABELS).latents, model(images, LABELS).latents, atol=1e-6)


def test_an_adapter_with_whole_layers_is_taken_off_again_and_not_fused(tmp_path):
    base, images = tiny_model(), random_images(tiny_model())
    expected = base(images, LABELS).latents
    model = trained(get_peft_model(tiny_model(), lora(modules_to_save=["class_embedding"])))
    adapted = model(images, LABELS).latents
    model.save_pretrained(tmp_path / "adapter")
    pipe = TarFlowPipeline(base)
    pipe.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(pipe.transformer(images, LABELS).latents, adapted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="adapters with modules_to_save have layers of their own"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="adapters are attached to the model"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe.transformer(images, LABELS).latents, expected, rtol=0, atol=1e-12)
    pipe.save_pretrained(tmp_path / "pipe")


def test_the_file_of_an_adapter_acts_as_strongly_as_its_folder(tmp_path):
    images, found = random_images(tiny_model()), []
    trained(get_peft_model(tiny_model(), lora())).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        pipe = TarFlowPipeline(tiny_model())
        pipe.load_lora_weights(place)
        found.append(pipe.transformer(images, LABELS).latents)
    assert found[0].equal(found[1])


def test_an_adapter_beside_a_model_is_refused_by_name(tmp_path):
    trained(get_peft_model(tiny_model(), lora())).save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds a model and an adapter \(adapter_config.json\): move the adapter"):
        TarFlowModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds a model and an adapter"):
        TarFlowModel.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match="adapter_config.json must name the model of the adapter, got None"):
        TarFlowModel.from_pretrained(tmp_path)
