"""The mathematics of TarFlow written out literally, one image and one token at a time: the oracle of the tests.

Nothing is shared with the library but the names of the weights. There is no mask and no cache: the prediction for a
token runs the transformer anew on the tokens before it.
"""

import math

import torch


def patches_of(image, patch_size):
    """(channels, height, width) -> list of patches in raster order, each flattened as channel, row, column."""
    channels, height, width = image.shape
    patches = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            numbers = [
                image[channel, top + row, left + column]
                for channel in range(channels)
                for row in range(patch_size)
                for column in range(patch_size)
            ]
            patches.append(torch.stack(numbers))
    return torch.stack(patches)


def image_of(patches, num_channels, patch_size, height, width):
    """The inverse of `patches_of`."""
    image = patches.new_zeros(num_channels, height, width)
    columns = width // patch_size
    for index, patch in enumerate(patches):
        top, left = index // columns * patch_size, index % columns * patch_size
        for position, number in enumerate(patch):
            channel, rest = divmod(position, patch_size**2)
            row, column = divmod(rest, patch_size)
            image[channel, top + row, left + column] = number
    return image


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(hidden, weights, prefix, head_dim, temperature):
    qkv = hidden @ weights[prefix + "qkv_proj.weight"].T + weights[prefix + "qkv_proj.bias"]
    query, key, value = qkv.chunk(3, dim=-1)
    result = torch.zeros_like(query)
    for first in range(0, query.shape[-1], head_dim):
        head = slice(first, first + head_dim)
        for i in range(len(hidden)):
            logits = torch.stack([query[i, head] @ key[j, head] for j in range(i + 1)])
            probabilities = (logits / math.sqrt(head_dim) / temperature).softmax(0)
            result[i, head] = sum(p * value[j, head] for j, p in enumerate(probabilities))
    return result @ weights[prefix + "out_proj.weight"].T + weights[prefix + "out_proj.bias"]


def noise_vector(weights, prefix, size, level):
    half = size // 2
    phases = [torch.log(level) * 10000 ** (-j / half) for j in range(half)]
    waves = torch.stack([torch.sin(phase) for phase in phases] + [torch.cos(phase) for phase in phases])
    inner = gelu(weights[prefix + "up_proj.weight"] @ waves + weights[prefix + "up_proj.bias"])
    return weights[prefix + "down_proj.weight"] @ inner + weights[prefix + "down_proj.bias"]


def condition_vector(weights, prefix, config, condition):
    if condition is None:
        return weights[prefix + "no_condition"]
    means, stds = config.condition_mean or [0] * len(condition), config.condition_std or [1] * len(condition)
    numbers = torch.stack([(c - mean) / std for c, mean, std in zip(condition, means, stds, strict=True)])
    inner = gelu(weights[prefix + "up_proj.weight"] @ numbers + weights[prefix + "up_proj.bias"])
    return weights[prefix + "down_proj.weight"] @ inner + weights[prefix + "down_proj.bias"]


def predict_next(model, block, tokens, label, temperature=1.0, level=None, condition=None):
    """The (shift, log_scale) of the token that follows `tokens`, (n, patch_dim) in the block's order."""
    config, weights = model.config, dict(model.named_parameters())
    prefix = f"blocks.{block}."
    positions = weights[prefix + "position_embedding"]
    positions = positions.flip(0) if block % 2 else positions
    hidden = tokens @ weights[prefix + "proj_in.weight"].T + weights[prefix + "proj_in.bias"]
    hidden = hidden + positions[: len(tokens)]
    if config.num_classes:
        table = weights[prefix + "class_embedding.weight"]
        hidden = hidden + (table.mean(0) if label is None or label == -1 else table[label])
    if config.condition_dim:
        hidden = hidden + condition_vector(weights, prefix + "condition_embedding.", config, condition)
    if level is not None:
        hidden = hidden + noise_vector(weights, prefix + "noise_embedding.mlp.", config.hidden_size, level)
    for layer in range(config.block_depths[block]):
        name = f"{prefix}layers.{layer}."
        normed = layer_norm(hidden, weights[name + "attention_norm.weight"], weights[name + "attention_norm.bias"])
        hidden = hidden + attention(normed, weights, name + "attention.", config.head_dim, temperature)
        normed = layer_norm(hidden, weights[name + "mlp_norm.weight"], weights[name + "mlp_norm.bias"])
        inner = gelu(normed @ weights[name + "mlp.up_proj.weight"].T + weights[name + "mlp.up_proj.bias"])
        hidden = hidden + inner @ weights[name + "mlp.down_proj.weight"].T + weights[name + "mlp.down_proj.bias"]
    output = hidden[-1] @ weights[prefix + "proj_out.weight"].T + weights[prefix + "proj_out.bias"]
    if config.volume_preserving:
        return output, torch.zeros_like(output)
    return output[config.patch_dim :], output[: config.patch_dim]


def encode(model, image, label=None, *, level=None, condition=None):
    """One image -> latents (tokens, patch_dim) and log-determinant."""
    tokens = patches_of(image, model.config.patch_size)
    log_det = tokens.new_zeros(())
    for block in range(model.config.num_blocks):
        tokens = tokens.flip(0) if block % 2 else tokens
        encoded = [tokens[0]]
        for i in range(1, len(tokens)):
            shift, log_scale = predict_next(model, block, tokens[:i], label, level=level, condition=condition)
            encoded.append((tokens[i] - shift) * torch.exp(-log_scale))
            log_det = log_det - log_scale.sum()
        tokens = torch.stack(encoded)
        tokens = tokens.flip(0) if block % 2 else tokens
    return tokens, log_det


def decode(
    model,
    latents,
    label=None,
    *,
    weight=0.0,
    annealed=True,
    temperature=1.0,
    parts=("shift", "log_scale"),
    level=None,
    condition=None,
):
    """Latents (tokens, patch_dim) of one image -> image; `weight` is the paper's guidance weight w."""
    config = model.config
    tokens = latents * model.prior_variance.sqrt() if config.volume_preserving else latents
    for block in reversed(range(config.num_blocks)):
        tokens = tokens.flip(0) if block % 2 else tokens
        decoded = [tokens[0]]
        for i in range(1, len(tokens)):
            seen = torch.stack(decoded)
            shift, log_scale = predict_next(model, block, seen, label, level=level, condition=condition)
            if weight > 0:
                other_shift, other_log_scale = predict_next(model, block, seen, None, temperature, level)
                strength = weight * i / (len(tokens) - 1) if annealed else weight
                if "shift" in parts:
                    shift = shift + strength * (shift - other_shift)
                if "log_scale" in parts:
                    log_scale = log_scale + strength * (log_scale - other_log_scale)
            decoded.append(tokens[i] * torch.exp(log_scale) + shift)
        tokens = torch.stack(decoded)
        tokens = tokens.flip(0) if block % 2 else tokens
    return image_of(tokens, config.num_channels, config.patch_size, config.image_height, config.image_width)
