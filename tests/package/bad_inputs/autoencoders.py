"""Autoencoders of pipelines, damaged as models are, and loaded with them or by themselves."""

import json
import shutil
from functools import cache
from tempfile import TemporaryDirectory

import torch
from conftest import tiny_model
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from bad_inputs import Bad
from bad_inputs.loading import setting, text
from tarflow_hf import TarFlowPipeline, push_folder
from tarflow_hf.hub.autoencoders import load_autoencoder

CONFIG, INDEX, WEIGHTS = "vae/config.json", "model_index.json", "vae/diffusion_pytorch_model.safetensors"
KEY = "decoder.layers.0.bias"


@cache
def _saved():
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **sizes, **counts)
    folder = TemporaryDirectory()
    TarFlowPipeline(tiny_model(dtype=torch.float32, num_channels=2), vae=vae.eval()).save_pretrained(folder.name)
    return folder


def vae(name, damage, message, load=TarFlowPipeline.from_pretrained):
    """A row: the autoencoder of a saved pipeline is damaged, and the pipeline loaded."""

    def call(parent):
        folder = shutil.copytree(_saved().name, parent / "pipe")
        damage(folder)
        load(str(folder))

    return Bad(name, call, OSError, message)


def tensors(change):
    """Saves the weights again, changed."""

    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return damage


def one(key, value):
    return tensors(lambda state: state.update({key: value}))


def scaled(message, **values):
    return vae(f"scaling of {values}", setting(CONFIG, **values), f"{CONFIG} is damaged: it makes no Auto.*{message}")


def shards(content):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return damage


def whole(state):
    state.update({key: tensor.long() for key, tensor in state.items()})


ROWS = [
    vae("no configuration", lambda folder: (folder / CONFIG).unlink(), f"incomplete: it has no {CONFIG}"),
    vae("a listed configuration", text(CONFIG, "[]"), f"{CONFIG} must hold a JSON object"),
    vae("no class", setting(CONFIG, _class_name=...), "_class_name must be an autoencoder of diffusers, got None"),
    vae("a class of another kind", setting(CONFIG, _class_name="UNet2DModel"), "must be an auto.* got 'UNet2DModel'"),
    vae("a class that is code", setting(CONFIG, _class_name="os.system"), "must be an autoenc.* got 'os.system'"),
    vae("another class", setting(CONFIG, _class_name="VQModel"), "expected AutoencoderTiny, got VQModel"),
    vae("an index of another library", setting(INDEX, vae=["os", "AutoencoderTiny"]), "vae must be a class of diff"),
    vae("a setting misspelt", setting(CONFIG, scaling_facto=0.5), "no setting 'scaling_facto', did you mean 'scaling"),
    vae("a setting of text", setting(CONFIG, latent_channels="2"), f"{CONFIG} is damaged: it makes no Autoencoder"),
    vae(
        "10^6 blocks", setting(CONFIG, num_decoder_blocks=[1, 10**6]), r"num_decoder_blocks must be at most \d+, got 1"
    ),
    vae("2^40 channels", setting(CONFIG, latent_channels=2**40), "latent_channels must be at most 1048576, got 10995"),
    vae("other channels", setting(CONFIG, latent_channels=3), "must be 8 x 3 x 3 x 3, got 8 x 2 x 3 x 3"),
    vae("no weights", lambda folder: (folder / WEIGHTS).unlink(), f"has no weights: neither {WEIGHTS}"),
    vae("weights cut short", lambda folder: (folder / WEIGHTS).write_bytes(b"short"), f"{WEIGHTS} is cut short"),
    vae("a NaN", tensors(lambda state: state[KEY].fill_(float("nan"))), f"numbers of {KEY} are not finite"),
    vae("a tensor missing", tensors(lambda state: state.pop(KEY)), f"autoencoder lack 1 tensors, among them {KEY}"),
    vae("a tensor more", one("extra", torch.ones(1)), "has 1 tensors that an autoencoder of .* among them extra"),
    vae("another shape", one(KEY, torch.ones(3, 3)), f"{KEY} must be 8, got 3 x 3"),
    vae("whole numbers", tensors(whole), "must be one of F64, F32, F16, BF16, got I64"),
    vae("shards above", shards({"metadata": {}, "weight_map": {KEY: "../x"}}), r"'\.\./x' is no name of a shard"),
    vae("shards of nothing", shards({}), "weight_map must name the file of each tensor, got None"),
    scaled("above 0, got scale .0.0.", scaling_factor=0),
    scaled("above 0, got scale .-1.0.", scaling_factor=-1.0),
    scaled("must be numbers, one or one a channel, got .0.0. and .'x'.", scaling_factor="x"),
    scaled("both latents_mean and latents_std, or neither", latents_mean=[0.0, 0.0]),
    scaled("one or one a channel", latents_mean=[0.0] * 3, latents_std=[1.0] * 3),
    scaled("above 0", latents_mean=[0.0, 0.0], latents_std=[0.0, 1.0]),
    vae(
        "alone with a NaN",
        one(KEY, torch.full((8,), torch.nan)),
        r"^vae='.*pipe': diffusion_p.* 8 of 8",
        load_autoencoder,
    ),
    vae(
        "alone and misspelt", setting(CONFIG, scaling_facto=1.0), r"^vae=.*config.json .* mean 'scal", load_autoencoder
    ),
    vae(
        "pushed with a NaN", one(KEY, torch.full((8,), torch.nan)), "8 of 8", lambda at: push_folder(at, "alice/never")
    ),
]
