"""The names of weights in the authors' checkpoints (TarFlow and iTARFlow) and in ours, in both directions."""

import re

import torch

from tarflow_hf.modeling_tarflow import TarFlowModel

_LAYER_NAMES = {
    "attention.norm": "attention_norm",
    "attention.qkv": "attention.qkv_proj",
    "attention.proj": "attention.out_proj",
    "mlp.norm": "mlp_norm",
    "mlp.main.0": "mlp.up_proj",
    "mlp.main.2": "mlp.down_proj",
}
_NOISE_NAMES = {"0": "up_proj", "2": "down_proj"}
LAYER_KEY = re.compile(
    rf"blocks\.(\d{{1,9}})\.(?:attn|head)_blocks\.(\d{{1,9}})\."
    rf"({'|'.join(map(re.escape, _LAYER_NAMES))})\.(weight|bias)"
)
NOISE_KEY = re.compile(r"blocks\.(\d+)\.time_embed\.mlp\.([02])\.(weight|bias)")
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(proj_in\.weight|proj_in\.bias|proj_out\.weight|proj_out\.bias)")
_POSITION_KEY = re.compile(r"blocks\.(\d+)\.pos_embed")
CLASS_KEY = re.compile(r"blocks\.(\d+)\.class_embed")
_MASK_KEY = re.compile(r"blocks\.\d+\.attn_mask")
HEAD_DIM = 64


def our_name(key: str, *, volume_preserving: bool) -> str | None:
    """Our name for a key of the authors' state dict; None for what is dropped.

    Args:
        key: A key of the authors' state dict.
        volume_preserving: Whether the model keeps the prior variance.

    Raises:
        ValueError: If the key is unknown.

    Example:
        >>> our_name("blocks.3.attn_blocks.0.mlp.main.2.weight", volume_preserving=False)
        'blocks.3.layers.0.mlp.down_proj.weight'
        >>> our_name("blocks.3.attn_mask", volume_preserving=False) is None
        True
    """
    if key == "var":
        return "prior_variance" if volume_preserving else None
    if _MASK_KEY.fullmatch(key):
        return None
    if match := LAYER_KEY.fullmatch(key):
        block, layer, module, kind = match.groups()
        return f"blocks.{block}.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    if match := NOISE_KEY.fullmatch(key):
        return f"blocks.{match[1]}.noise_embedding.mlp.{_NOISE_NAMES[match[2]]}.{match[3]}"
    if match := _BLOCK_KEY.fullmatch(key):
        return f"blocks.{match[1]}.{match[2]}"
    if match := _POSITION_KEY.fullmatch(key):
        return f"blocks.{match[1]}.position_embedding"
    if match := CLASS_KEY.fullmatch(key):
        return f"blocks.{match[1]}.class_embedding.weight"
    raise ValueError(f"the checkpoint has the unknown key {key!r}")


def reference_state_dict(model: TarFlowModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the authors' keys, so that their code can run them beside ours.

    Args:
        model: A model whose `head_dim` is 64, the only one that their code has.

    Returns:
        Weights by the authors' names.

    Raises:
        ValueError: If the heads have another width, or the model has a condition vector.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> state = reference_state_dict(TarFlowModel(config))
        >>> state["blocks.0.attn_blocks.0.attention.qkv.weight"].shape
        torch.Size([192, 64])
    """
    config = model.config
    if config.head_dim != HEAD_DIM:
        raise ValueError(f"the authors' code needs head_dim={HEAD_DIM}, got {config.head_dim}")
    if config.condition_dim:
        raise ValueError(f"the authors' code knows no condition vectors, got condition_dim={config.condition_dim}")
    layers = {ours: theirs for theirs, ours in _LAYER_NAMES.items()}
    list_name = "head_blocks" if config.noise_conditioning else "attn_blocks"
    state = {"var": torch.ones(config.num_tokens, config.patch_dim)}
    for name, tensor in model.state_dict().items():
        if match := re.fullmatch(r"(blocks\.\d+\.)layers\.(\d+)\.(.+)\.(weight|bias)", name):
            key = f"{match[1]}{list_name}.{match[2]}.{layers[match[3]]}.{match[4]}"
        else:
            key = name.replace("position_embedding", "pos_embed").replace("class_embedding.weight", "class_embed")
            key = key.replace("noise_embedding.mlp.up_proj", "time_embed.mlp.0")
            key = key.replace("noise_embedding.mlp.down_proj", "time_embed.mlp.2")
        state["var" if name == "prior_variance" else key] = tensor[:, None] if key.endswith("class_embed") else tensor
    for block in range(config.num_blocks if config.num_classes else 0):
        silent = torch.zeros(config.num_classes, 1, config.hidden_size)  # of a block that is not told the class
        state.setdefault(f"blocks.{block}.class_embed", silent)
    mask = torch.ones(config.num_tokens, config.num_tokens).tril()
    return state | {f"blocks.{block}.attn_mask": mask for block in range(config.num_blocks)}


__all__ = ["CLASS_KEY", "HEAD_DIM", "LAYER_KEY", "NOISE_KEY", "our_name", "reference_state_dict"]
