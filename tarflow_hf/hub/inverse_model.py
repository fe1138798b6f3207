"""TarFlowInverseModel: the learned inverse of a flow as it is loaded and saved by name."""

from transformers import AutoModel
from transformers import PreTrainedModel as PreTrainedModel  # the name that diffusers looks for beside the model's

from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.inverse.network import TarFlowInverseOutput, TarFlowInverseTransformer
from tarflow_hf.hub.models import HubModel


class TarFlowInverseModel(HubModel, TarFlowInverseTransformer):
    """A learned inverse: a bidirectional transformer that turns a flow's latents into images in one pass.

    h = W_in z + positions + class + condition + guidance goes through transformer layers without a causal mask. They
    are cut into a part for each block of the flow, last block first, and one for the denoising. After its part, the
    latents before block k are read as u^k = s_k R_k norm(h), with s_k their root mean square; after the last part the
    clean image is. The flow can check the image, as encoding it must give back z, and correct it: the u^k are first
    guesses for the exact solver.

    Reference: after BiFlow, arXiv 2512.10953.

    Example:
        >>> flow = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, num_classes=10)
        >>> config = TarFlowInverseConfig(flow=flow, hidden_size=64, num_layers=3, max_guidance_scale=4.0)
        >>> inverse = TarFlowInverseModel(config).eval()
        >>> output = inverse(torch.randn(3, 16, 4), class_labels=torch.tensor([0, 7, -1]), guidance_scale=2.0)
        >>> output.patches.shape, output.states[0].shape
        (torch.Size([3, 16, 4]), torch.Size([3, 16, 4]))
    """


AutoModel.register(TarFlowInverseConfig, TarFlowInverseModel, exist_ok=True)

__all__ = ["TarFlowInverseModel", "TarFlowInverseOutput"]
