"""Pictures as latents of a pipeline's VAE, without noise."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@torch.no_grad()
def picture_latents(vae: Any, picture: Image.Image, device: torch.device | None = None) -> Tensor:
    """Latents of a picture: what its distribution is centred on, shifted and scaled as a denoiser has them.

    Where the VAE's own values overflow in float16 (`force_upcast`), as SDXL's do, it encodes in float32, as
    diffusers' pipelines have it.

    Args:
        vae: of a pipeline, with a KL or a tiny autoencoder's interface.
        picture: RGB, of sides that the VAE takes.
        device: where the VAE computes; None for where it is, which is elsewhere while it is offloaded.

    Returns:
        [1, C, h, w] float32, on that device.
    """
    dtype, config = vae.dtype, vae.config
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    is_raised = dtype == torch.float16 and getattr(config, "force_upcast", False)
    if is_raised:
        vae.to(torch.float32)
    try:
        encoded = vae.encode(pixels.to(device or vae.device, vae.dtype))
    finally:
        if is_raised:
            vae.to(dtype)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * config.scaling_factor
