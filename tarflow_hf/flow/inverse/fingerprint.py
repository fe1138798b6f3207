"""Which flow an inverse belongs to: a few numbers of the flow's weights that others do not share."""

from contextlib import ExitStack
from typing import cast

import torch
from accelerate.utils import align_module_device
from torch import nn

from tarflow_hf.flow.offloading import held

_TOLERANCE = 0.005  # rounding to bfloat16 moves a number by a fifth of that; weights changed by 2 % move it by more
_READ = ("position_embedding", "proj_in.weight", "proj_out.weight")  # which quantizers and adapters leave as they are


@torch.no_grad()
def flow_fingerprint(blocks: nn.ModuleList) -> list[float]:
    """A number for each block of a flow: its weights w along a fixed direction, sum_i w_i cos(i) / |w|.

    The positions and the projections in and out are read, so that the numbers are the same, up to rounding, in every
    dtype of the weights and under quantisation.

    Args:
        blocks: The blocks of a [`TarFlowModel`].

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config)
        >>> ours, other = flow_fingerprint(model.blocks), flow_fingerprint(TarFlowModel(config).blocks)
        >>> same_flow(ours, flow_fingerprint(model.bfloat16().blocks)), same_flow(ours, other)
        (True, False)
    """
    numbers = []
    for block in blocks:
        with ExitStack() as onloaded:
            for module in (block, block.proj_in, block.proj_out):  # whose weights may be offloaded
                onloaded.enter_context(align_module_device(cast(nn.Module, module)))
            onloaded.enter_context(held(block))
            found = torch.cat([block.get_parameter(name).detach().cpu().double().flatten() for name in _READ])
        direction = torch.arange(len(found), dtype=torch.float64).cos()
        numbers.append((found @ direction / found.norm().clamp_min(1e-12)).item())
    return numbers


def same_flow(fingerprint: list[float], other: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of their dtypes.

    Args:
        fingerprint: Of one flow.
        other: Of another.

    Example:
        >>> same_flow([0.5, -1.25], [0.5004, -1.2502])
        True
    """
    pairs = list(zip(fingerprint, other, strict=False))
    return len(fingerprint) == len(other) and all(abs(one - two) <= _TOLERANCE for one, two in pairs)


__all__ = ["flow_fingerprint", "same_flow"]
