"""What a picture looks like while it is drawn: latents decoded small, quickly."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

SIDE = 32  # latents of the longer side that a full VAE decodes; a tiny one decodes all of them


@torch.no_grad()
def preview(pipeline: Any, latents: Tensor, height: int, width: int) -> Image.Image | None:
    """A picture of latents that are still noisy, for the eye alone.

    A VAE that is not a tiny one decodes at most `SIDE` latents a side, which is quick and less sharp.

    Args:
        pipeline: from text.
        latents: of one picture, as the pipeline's callback gives them.
        height: of the picture in pixels.
        width: likewise.

    Returns:
        The picture; None for a VAE of another kind (Flux2's, Qwen-Image's), or one that diffusers would have
        to cast first (SDXL's in float16).
    """
    vae: Any = pipeline.vae
    config: Any = vae.config
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        return None
    if vae.dtype == torch.float16 and getattr(config, "force_upcast", False):
        return None
    if hasattr(pipeline, "_unpack_latents"):  # Flux calls tokens what others call latents
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    longer = max(latents.shape[-2:])
    if longer > SIDE and not isinstance(vae, AutoencoderTiny):
        latents = F.interpolate(latents, scale_factor=SIDE / longer, mode="area")
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = latents.to(vae.dtype) / config.scaling_factor + shift
    decoded = vae.decode(cast(Any, latents), return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded)[0]
