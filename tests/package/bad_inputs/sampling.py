"""Sampling calls, decoding and likelihoods."""

import math

import torch
from conftest import random_images, random_latents, tiny_model
from inverse_models import tiny_inverse

from bad_inputs import Bad
from tarflow_hf import Guidance, TarFlowPipeline, denoise
from tarflow_hf.flow.sampling.denoising import even_levels
from tarflow_hf.flow.sampling.nonfinite import NonFiniteError

NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "7"}


def pipeline():
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32, id2label=NAMES))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def condition(name, message, value):
    """A row: a pipeline of four classes and two numbers an image is called with this condition."""

    def run(folder):
        pipe = TarFlowPipeline(tiny_model(dtype=torch.float32, condition_dim=2))
        pipe.set_progress_bar_config(disable=True)
        pipe([0, 1], condition=value)

    return Bad(f"condition {name}", run, ValueError, message)


def call(name, message, error=ValueError, **arguments):
    """A row: a pipeline of four classes is called."""
    return Bad(name, lambda folder: pipeline()(**({"class_labels": [0, 1]} | arguments)), error, message)


def one_pass(name, message, **arguments):
    """A row: a pipeline with a learned inverse is called to decode in one pass."""

    def run(folder):
        pipe = pipeline()
        pipe.register_modules(inverse=tiny_inverse(pipe.transformer))
        pipe([0, 1], decoder="one_pass", **arguments)

    return Bad(name, run, ValueError, message)


def error_of(name, message, *given, **arguments):
    """A row: how far one pass is from the exact image is asked of latents."""

    def run(folder):
        pipe = pipeline()
        pipe.register_modules(inverse=tiny_inverse(pipe.transformer))
        pipe.reconstruction_error(*given, **arguments)

    return Bad(f"the error of one pass, {name}", run, ValueError, message)


def decode(name, message, change, error=ValueError, **arguments):
    """A row: latents of three images are changed and decoded."""

    def run(folder):
        model = tiny_model()
        model.decode(change(random_latents(model)), torch.tensor([0, 1, 2]), **arguments)

    return Bad(name, run, error, message)


def log_prob(name, message, change, labels=(0, 1, 2)):
    """A row: the likelihood of three images that are changed."""

    def run(folder):
        model = tiny_model()
        model.log_prob(change(random_images(model)), torch.tensor(labels))

    return Bad(name, run, ValueError, message)


def put(place, value):
    """A change of one number."""

    def change(values):
        values[place] = value
        return values

    return change


def same(values):
    return values


def far_latents():
    latents = torch.zeros(2, 16, 4)
    latents[1, 3] = 1e38
    return latents


def broken(pipe, step, block, tensors):
    return {"latents": torch.zeros(1, 1)}


def far_step(folder):
    pipe = pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[1].proj_out.weight.mul_(1e4)
    pipe([0, 1], generator=torch.Generator().manual_seed(0), denoising_strength=0.0)


def half(folder):
    pipe = pipeline()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.layers[0].mlp.up_proj.weight.mul_(300)
            block.layers[0].mlp.down_proj.weight.mul_(300)
    pipe.to(torch.float16)([0, 1], generator=torch.Generator().manual_seed(0))


GENERATOR = torch.Generator()

ROWS = [
    condition("that is text", "condition must be 2 numbers an image, got 'ab'", "ab"),
    condition("of text", r"condition must be 2 numbers an image, got \['1', '2'\]", ["1", "2"]),
    condition("by name", "condition must be 2 numbers an image, got {'a': 1}", {"a": 1}),
    condition("with a gap", r"condition must be 2 numbers an image, got \[None, 1\]", [None, 1]),
    condition("of several lengths", r"condition must be 2 numbers an image, got \[\[1, 2\], \[3\]\]", [[1, 2], [3]]),
    condition("of truth values", "condition must be 2 real numbers an image, got torch.bool", [True, False]),
    condition("of complex numbers", "condition must be 2 real numbers an image, got torch.complex", [1j, 2.0]),
    condition("too long", r"condition must have condition_dim=2 numbers an image, got \(3,\)", [1.0, 2.0, 3.0]),
    condition("for three", "condition must be one, or one for each of 2 labels, got 3", [[1.0, 2.0]] * 3),
    condition("beyond float32", r"condition must be finite, got \[inf, 1.0\]", [1e39, 1.0]),
    condition("that is no number", r"condition must be finite, got \[nan, 1.0\]", [math.nan, 1.0]),
    call("a decoder that is none", "decoder must be one of .*'one_pass'.*, got 'fast'", decoder="fast"),
    call(
        "one pass without an inverse",
        "needs a pipeline with an inverse, see .*; this one has none",
        decoder="one_pass",
    ),
    call("refined without an inverse", "decoder='refined' needs a pipeline with an inverse", decoder="refined"),
    call("an error of what is exact", "max_error needs decoder='one_pass'.*got decoder='exact'", max_error=0.1),
    call("an error below none", "max_error must be finite and above 0, got -1", max_error=-1, decoder="one_pass"),
    one_pass("guidance that was not learned", "guidance_scale must be at most 4.0 .*, got 5", guidance_scale=5),
    one_pass(
        "another schedule", "guidance_schedule must be linear with .*, got constant", guidance_schedule="constant"
    ),
    one_pass("noise that was learned away", "denoising_strength must be 1.0 with .*, got 0.0", denoising_strength=0.0),
    one_pass("a window without a solver", "window must be None with decoder='one_pass'.*, got 4", window=4),
    call("a seed for a generator", r"generator must be a torch.Generator or a list .* got 5; a seed", generator=5),
    call("a tuple of generators", "generator must be a torch.Generator or a list", generator=(GENERATOR, GENERATOR)),
    call("a list of seeds", "generator must be a torch.Generator or a list .* got 1", generator=[1, 2]),
    call("too few generators", "2 images, 1 generators", generator=[GENERATOR]),
    call(
        "too many generators, with latents", "2 images, 6 generators", generator=[GENERATOR] * 6, latents=far_latents()
    ),
    call("a list of counts", r"num_images_per_label must be at least 1, got \[1, 2\]", num_images_per_label=[1, 2]),
    call("half an image", "num_images_per_label must be at least 1, got 1.5", num_images_per_label=1.5),
    call("a truth value for a count", "num_images_per_label must .* got True", num_images_per_label=True),
    call("guidance in quotes", r"guidance_scale\) must be finite and at least 1 .* got '2'", guidance_scale="2"),
    call("guidance of each image", r"guidance_scale\) must be finite .* got \[2.0, 3.0\]", guidance_scale=[2.0, 3.0]),
    call("infinite guidance", "guidance_scale.* got inf", guidance_scale=math.inf),
    call("a temperature that is no number", "attention_temperature .* got nan", attention_temperature=math.nan),
    call("a temperature in quotes", "attention_temperature .* got '1'", attention_temperature="1"),
    call("part of a block", "num_guided_blocks must be None or at least 1, got 1.5", num_guided_blocks=1.5),
    call("more blocks than there are", "num_guided_blocks must be at most num_blocks=3, got 4", num_guided_blocks=4),
    call("a callback in quotes", "callback_on_step_end must be a function or None, got 'x'", callback_on_step_end="x"),
    call(
        "a callback that misspells",
        r"may return \['latents'\] in its dict, got \['latent'\]",
        callback_on_step_end=lambda pipe, step, block, tensors: {"latent": tensors["latents"]},
    ),
    call("a number for tensor names", r"must be among .* got \['3'\]", callback_on_step_end_tensor_inputs=3),
    Bad(
        "levels to be inverted",
        lambda _: pipeline().invert(torch.full((1, 1, 8, 8), 255.0), [0]),
        ValueError,
        r"invert needs pixel_values in \[-1, 1\] .* images \[0\] ",
    ),
    call("a rule that is none", "guidance_rule.* got 'sum'", guidance_rule="sum"),
    call("an empty rule", r"guidance_rule.* got ''", guidance_rule=""),
    call("a list for a rule", r"guidance_rule.* got \[\]", guidance_rule=[]),
    call("latents without numbers", "dense tensor .* got a meta one", latents=torch.zeros(2, 16, 4, device="meta")),
    call("sparse latents", "dense tensor .* got a torch.sparse_coo one", latents=torch.zeros(2, 16, 4).to_sparse()),
    error_of("no latents", r"latents must be a tensor \(batch, tokens, patch_dim\), got None", None, [0, 1]),
    error_of("text for guidance", "guidance_scale.* got 'x'", torch.zeros(2, 16, 4), guidance_scale="x"),
    Bad(
        "refinement without end",
        lambda _: even_levels((0.1, 0.2), num_steps=10**9),
        ValueError,
        r"num_refinement_steps\) must be at most 10000, got 1000000000",
    ),
    call("denoising in quotes", "denoising_strength must .* got '1'", denoising_strength="1"),
    call("half a refinement step", "num_refinement_steps.* got 1.0", num_refinement_steps=1.0),
    call("one level for a list", "refinement_levels must fall .* got 0.1", refinement_levels=0.1),
    call("a level in quotes", r"refinement_levels must fall .* got \['0.1'\]", refinement_levels=["0.1"]),
    call("refinement noise in quotes", "refinement_noise.* got '0.5'", refinement_noise="0.5"),
    call("half a window", "window must be None or at least 1, got 2.5", window=2.5),
    call("a window in quotes", "window must be None or at least 1, got '4'", window="4"),
    call("a tolerance in quotes", "tolerance must be a finite number of at least 0, got '1e-3'", tolerance="1e-3"),
    call("an unknown way with what is lost", "on_nonfinite must be one of .* got 'skip'", on_nonfinite="skip"),
    call("an unknown output", "output_type must be one of .* got None", output_type=None),
    call("one string of tensor names", "must be among .* got 'latents'", callback_on_step_end_tensor_inputs="latents"),
    call("a callback's latents of another shape", r"got \(1, 1\)", callback_on_step_end=broken),
    call("latents as a list", r"latents must be a tensor \(batch, tokens, patch_dim\), got \[1\]", latents=[1]),
    call("integer latents", "latents must be finite floating point", latents=torch.zeros(2, 16, 4, dtype=torch.long)),
    call("a label of no kind", r"class_labels must be class ids or names, got \(0,\)", class_labels=[(0,), 1]),
    call(
        "a fraction among labels", "class_labels must be class ids or names, got 0.5", class_labels=["cat", None, 0.5]
    ),
    call(
        "latents that overflow",
        r"images \[1\] are not finite after block \d, first at token \d+ in the order of the block",
        NonFiniteError,
        latents=far_latents(),
        on_nonfinite="redraw",
    ),
    Bad(
        "a model that overflows", far_step, NonFiniteError, "images .* after block 1, .* as 3 times before with other"
    ),
    Bad("half precision that overflows", half, NonFiniteError, "float16 overflows above 65504: use bfloat16"),
    decode("one infinite latent", "latents must be finite .* with 1 non-finite", put((1, 2, 3), math.inf)),
    decode("latents of another model", r"\(batch, tokens=16, patch_dim=4\), got \(3, 16, 3\)", lambda z: z[..., :3]),
    decode("a scale for guidance", "guidance must be a Guidance, .* got 2.0", same, guidance=2.0),
    decode("guidance in a dictionary", "guidance must be a Guidance, .* got {'scale'", same, guidance={"scale": 2.0}),
    *(
        Bad(
            f"a noise level of {level}",
            lambda _, level=level: tiny_model(noise_conditioning=True).log_prob(
                torch.zeros(2, 1, 8, 8), noise_level=torch.tensor([0.1, level])
            ),
            ValueError,
            f"noise_level must be finite and above 0, got {level}",
        )
        for level in (math.inf, math.nan, 0.0)
    ),
    decode("half a batch", "max_batch must be None or at least 1, got 0.5", same, max_batch=0.5),
    decode(
        "a latent that overflows", r"images \[2\] are not finite after block 2", put((2, 3), 1e300), NonFiniteError
    ),
    Bad(
        "a compiled shape that varies",
        lambda folder: tiny_model().compile_decoding(dynamic=True),
        ValueError,
        r"compile_decoding sets \['dynamic'\] by itself",
    ),
    Bad("guidance of a dictionary", lambda folder: Guidance({}), ValueError, r"guidance_scale.* got \{\}"),
    Bad(
        "a chunk in quotes",
        lambda folder: denoise(lambda images, rows: images.sum(), torch.zeros(1, 1, 1, 1), 0.1, chunk_size="2"),
        ValueError,
        "chunk_size must be None or at least 1, got '2'",
    ),
    log_prob("pixels from 0 to 255", r"images \[0, 1, 2\] .* 0 ... 255", lambda images: (images + 1) * 127.5),
    log_prob("one pixel that is no number", r"images \[1\] .* 1 are not finite", put((1, 0, 2, 3), math.nan)),
    log_prob("one pixel far off", r"images \[2\] are far .* 1 of 64 values are outside", put((2, 0, 0, 0), 50.0)),
    log_prob(
        "images as a list", r"pixel_values must be a tensor \(batch, .* got list", lambda images: images.tolist()
    ),
    log_prob("images of eight bits", "pixel_values must be floating point", lambda images: images.to(torch.uint8)),
    log_prob("labels of other images", r"class_labels must be \(3,\) integers, got shape \(2,\)", same, labels=(0, 1)),
]
