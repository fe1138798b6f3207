"""What a pipeline makes of images and of samples, with an autoencoder or without one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from tarflow_hf.configuration_tarflow import NoiseType
from tarflow_hf.images.arrays import shown, to_data_units
from tarflow_hf.images.latents import Autoencoder, decode_latents, flow_input, image_channels, image_shape
from tarflow_hf.images.processing import as_shown


class PipelineImages:
    """The images of a pipeline: those that its transformer models, or those that an autoencoder makes of its samples.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.image_shape, pipe.num_channels
        ((8, 8), 1)
    """

    transformer: Any
    vae: Autoencoder | None
    config: Any
    image_processor: Any
    _execution_device: Any

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return int(self.transformer.config.num_channels if self.vae is None else image_channels(self.vae))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return image_shape(self.vae, self.transformer.config, self.config["image_size"])

    @torch.no_grad()
    def latent_log_prob(
        self,
        images: PIL.Image.Image | Sequence[PIL.Image.Image] | torch.Tensor,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """log p(z | y) of the autoencoder's standardised latents of images. It is no density of the images.

        It knows nothing of what the autoencoder adds or loses, and compares only images under one autoencoder. A
        pipeline without one has `transformer.log_prob`, the exact log p(x | y).

        Args:
            images: As in `invert`, and so are the labels.
            class_labels: As in `invert`.

        Returns:
            (images,) float32 nats of the posterior's mean, at the lowest level of a flow with noise conditioning.

        Raises:
            ValueError: If the pipeline has no autoencoder.
        """
        if self.vae is None:
            raise ValueError("latent_log_prob needs a pipeline with vae; log p(x) of pixels is transformer.log_prob")
        labels = self.prepare_class_labels(class_labels)  # type: ignore[attr-defined]  # of the pipeline
        latents = self._flow_input(images)
        return self.transformer.log_prob(latents, labels, self.transformer.lowest_noise_level(latents))

    @property
    def noise_type(self) -> NoiseType:
        """How levels are found in the images: by the transformer's training noise; decoded ones lie on no grid."""
        return self.transformer.config.noise_type if self.vae is None else "gaussian"

    @torch.no_grad()
    def decoded(self, samples: torch.Tensor) -> torch.Tensor:
        """Images, nominally in [-1, 1], of the transformer's samples: themselves, decoded, or what arrays look like.

        Args:
            samples: (images, channels, height, width) pixels, standardised latents, or arrays in the model's units.
        """
        if self.transformer.config.value_scale is not None:
            return shown(samples)
        return samples if self.vae is None else decode_latents(self.vae, samples, self.image_shape)

    def pictures(self, samples: torch.Tensor) -> list[PIL.Image.Image]:
        """What samples look like, also those of arrays: black to white is three deviations around the mean.

        Args:
            samples: (images, channels, height, width), as a call with `output_type="latent"` gives them.

        Example:
            >>> config = TarFlowConfig(image_size=8, num_channels=5, hidden_size=64, value_mean=[0.0] * 5,
            ...     value_scale=[1.0] * 5, num_blocks=2, layers_per_block=1)
            >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
            >>> pipe.pictures(torch.zeros(2, 5, 8, 8))[0].mode
            'L'
        """
        return list(self._output(samples, "pil"))

    def state_images(self, patches: torch.Tensor) -> torch.Tensor:
        """What a state of sampling looks like: its patches put together, and decoded where there is an autoencoder.

        Args:
            patches: (images, tokens, patch_dim) latents on their way, as `callback_on_step_end` gets them.

        Returns:
            (images, channels, height, width); what the last block gives is about [-1, 1].
        """
        return self.decoded(self.transformer.unpatchify(patches))

    def _flow_input(self, images: PIL.Image.Image | Sequence[PIL.Image.Image] | torch.Tensor) -> torch.Tensor:
        """Images as the transformer takes them, on its device; arrays in its dtype, float32 at least."""
        size, device = self.config["image_size"], self._execution_device
        if self.transformer.config.value_scale is None:
            return flow_input(images, self.vae, self.transformer.config, size, device)
        scaled = flow_input(images, None, self.transformer.config, size, torch.device("cpu"))
        return scaled.to(device, torch.promote_types(self.transformer.dtype, torch.float32))

    def _output(self, samples: torch.Tensor, output_type: str) -> Any:  # noqa: ANN401  # images as output_type says
        """Samples of the transformer as a call gives them; arrays in the units of their data."""
        if self.transformer.config.value_scale is not None and output_type in ("np", "pt"):
            values = to_data_units(samples, self.transformer.config)
            return values.movedim(1, -1).cpu().numpy() if output_type == "np" else values
        if output_type != "latent":
            images = self.decoded(samples)
            lost = samples.flatten(1).isfinite().all(1) & ~images.flatten(1).isfinite().all(1)
            if lost.any():
                raise ValueError(
                    f"the autoencoder's images {lost.nonzero().flatten().tolist()[:10]} are not finite, their latents "
                    "are: its weights are damaged, or their type does not hold what it computes "
                    "(float16 overflows above 65504: pipe.vae.to(torch.float32))"
                )
            samples = as_shown(images, self.noise_type)
        with np.errstate(invalid="ignore"):  # what is not finite was said aloud
            return self.image_processor.postprocess(samples, output_type=output_type)


__all__ = ["PipelineImages"]
