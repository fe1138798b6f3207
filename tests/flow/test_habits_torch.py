"""What users of torch type by habit: transforms of functions, integers of every type as labels."""

import pytest
import torch
from conftest import random_images, random_latents, tiny_model
from torch.func import functional_call, grad, jacrev, jvp, vmap

from tarflow_hf import TarFlowPipeline

LABELS = torch.tensor([0, 1, 3])
INTEGERS = "uint8 int8 int16 int32 int64 uint16 uint32 uint64".split()


@pytest.mark.parametrize("kind", [{}, {"volume_preserving": True}])
def test_gradients_of_each_sample(kind):
    model = tiny_model(**kind)
    images, parameters = random_images(model), dict(model.named_parameters())

    def loss(parameters, image, label):
        return functional_call(model, parameters, (image[None], label[None])).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, LABELS)
    for index in range(len(images)):
        one = model(images[index : index + 1], LABELS[index : index + 1]).loss
        for name, gradient in zip(parameters, torch.autograd.grad(one, list(model.parameters())), strict=True):
            assert torch.allclose(found[name][index], gradient, atol=1e-12)


def test_maps_over_everything_that_a_density_is_of():
    extra = {"noise_conditioning": True, "noise_range": (0.02, 0.4), "condition_dim": 2}
    model = tiny_model(**extra)
    given = (random_images(model), LABELS, torch.tensor([0.1, 0.2, 0.3]).double(), torch.randn(3, 2).double())
    mask = torch.tensor([True, False, True])
    mapped = vmap(lambda *each: model.log_prob(*(value[None] for value in each))[0])(*given, mask)
    assert torch.allclose(mapped, model.log_prob(*given, mask), atol=1e-10)


def test_the_score_and_the_determinant_of_the_jacobian():
    model = tiny_model()
    images = random_images(model).requires_grad_()
    scores = vmap(grad(lambda image: model.log_prob(image[None])[0]))(images.detach())
    assert torch.allclose(scores, torch.autograd.grad(model.log_prob(images).sum(), images)[0], atol=1e-10)
    jacobian = jacrev(lambda image: model(image[None]).latents.flatten())(images[0].detach()).reshape(64, 64)
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], model(images[:1]).log_det[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch compiles some of its own rules by it
def test_derivatives_in_a_direction():
    model = tiny_model()
    images = random_images(model)
    direction = random_latents(model).reshape(images.shape)
    _, along = jvp(lambda pixels: model.log_prob(pixels), (images,), (direction,))
    small = 1e-5 * direction
    assert torch.allclose(along, (model.log_prob(images + small) - model.log_prob(images - small)) / 2e-5, rtol=1e-6)


def test_compiled_whole_without_a_break():
    model = tiny_model()
    images = random_images(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(images, LABELS).latents.equal(model(images, LABELS).latents)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_are_integers_of_any_type(dtype):
    model = tiny_model()
    images, labels = random_images(model), LABELS.to(getattr(torch, dtype))
    latents = model(images, LABELS).latents
    assert model(images, labels).latents.equal(latents)
    assert model.decode(latents, labels, window=1).equal(model.decode(latents, LABELS, window=1))
    pipe = TarFlowPipeline(model)
    assert pipe.invert(images, labels).equal(latents)
    assert pipe.prepare_class_labels(labels).tolist() == [0, 1, 3]
    for call in (model, model.log_prob, pipe.invert):
        with pytest.raises(ValueError, match="-1.* ?3, got 4"):
            call(images, (LABELS + torch.tensor([0, 0, 1])).to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0, 3.0]), r"\(3,\) integers, got shape \(3,\) of torch.float32"),
        (torch.tensor([True, False, True]), "of torch.bool"),
        (torch.tensor([[0, 1, 3]]), r"got shape \(1, 3\)"),
        ([0, 1, 3], "a tensor of 3 integers, got list"),
        (torch.tensor([0, 1, 2**63], dtype=torch.uint64), "got 9223372036854775808"),
        (torch.tensor([0, 1, 255], dtype=torch.uint8), "got 255"),
    ],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"class_labels must be .*{message}"):
        tiny_model()(random_images(tiny_model()), labels)


def test_numbers_in_place_of_tensors_are_refused_by_name():
    model = tiny_model(noise_conditioning=True, noise_range=(0.02, 0.4), condition_dim=2)
    images, levels = random_images(model), torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="noise_level must be a tensor of 3 numbers, got float"):
        model(images, noise_level=0.1)
    with pytest.raises(ValueError, match="condition must be a tensor of .* numbers, got list"):
        model(images, noise_level=levels, condition=[[0.0, 1.0]] * 3)
    with pytest.raises(ValueError, match="condition_mask must be a tensor of 3 booleans, got list"):
        model(images, noise_level=levels, condition=torch.zeros(3, 2), condition_mask=[True] * 3)
