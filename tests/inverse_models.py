"""Tiny learned inverses for the tests."""

import torch

from tarflow_hf import TarFlowInverseConfig, TarFlowInverseModel
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint


def tiny_inverse(flow, *, seed=3, std=0.2, **overrides):
    """An inverse of a flow, in its dtype and in evaluation mode, whose weights are all random: it has learned nothing.

    It says that it was trained, so that a pipeline takes it.
    """
    sizes = {"hidden_size": 16, "num_layers": flow.config.num_blocks + 1, "head_dim": 8, "mlp_ratio": 2}
    about = {"flow_fingerprint": flow_fingerprint(flow.blocks), "num_training_steps": 1, "max_guidance_scale": 4.0}
    inverse = TarFlowInverseModel(TarFlowInverseConfig(flow=flow.config, **(sizes | about | overrides)))
    inverse = inverse.to(flow.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in inverse.parameters():
            parameter.normal_(std=std, generator=generator)
        inverse.state_scale.uniform_(0.5, 2.0, generator=generator)
    return inverse
