"""Sizes of a transformer that stay when its weights are made to fit other data, each with the reason."""

from tarflow_hf.configuration_tarflow import TarFlowConfig

FIXED_SIZES = {
    "patch_size": "patches of another size are other tokens: no weight of the source has a place among them",
    "hidden_size": "every matrix has another shape, and no rule says which unit stands for which",
    "head_dim": "the same numbers, cut into other heads, attend to something else",
    "mlp_ratio": "the MLPs have other units, and no rule says which stands for which",
    "num_blocks": "the blocks are steps of one map: with one more or less it is another map",
    "layers_per_block": "the layers are steps of one map: with one more or less it is another map",
    "num_conditioned_blocks": "a block that was not told class and condition has no vector for them",
    "volume_preserving": "blocks that scale and blocks that only shift have different priors, which no rule converts",
}


def differing_sizes(source: TarFlowConfig, target: TarFlowConfig) -> dict[str, tuple[object, object]]:
    """What no rule converts and is another in the target, by name: the source's value and the target's.

    Args:
        source: The source's configuration.
        target: The target's.

    Example:
        >>> differing_sizes(TarFlowConfig(patch_size=2, num_blocks=4), TarFlowConfig(patch_size=4, num_blocks=8))
        {'patch_size': (2, 4), 'num_blocks': (4, 8)}
    """
    one_number = isinstance(source.layers_per_block, int) and isinstance(target.layers_per_block, int)

    def value(config: TarFlowConfig, name: str) -> object:
        return config.block_depths if name == "layers_per_block" and not one_number else getattr(config, name)

    pairs = {name: (value(source, name), value(target, name)) for name in FIXED_SIZES}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


__all__ = ["FIXED_SIZES", "differing_sizes"]
