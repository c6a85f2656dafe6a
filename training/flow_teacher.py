"""A frozen flow transformer as the teacher of a U-Net on the same latents (arXiv 1503.02531).

What a U-Net should predict of one picture's noisy latents is mostly chance: the picture is one of many that
fit. A trained teacher predicts the mean of them, which is what its student has to learn.
"""

from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from interactdiff.errors import RecipeError
from interactdiff.fingerprints import weights_digest
from interactdiff.training.compiling import compile_each_shape
from interactdiff.training.dit import flow_inputs
from interactdiff.training.dit_text import TextParts


def velocity_of_flow(flow: Tensor, noisy: Tensor, time: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """What a flow says of v.

    Args:
        flow: predicted of noisy latents at their time, [B, C, H, W].
        noisy: (1 - time) x + time n, [B, C, H, W].
        time: [B, 1, 1, 1].
        signal: a of the diffusion's latents a x + s n, [B, 1, 1, 1].
        spread: s of them, [B, 1, 1, 1].

    Returns:
        v = a n - s x (arXiv 2202.00512), [B, C, H, W], with the x and n that the flow n - x implies.
    """
    return signal * (noisy + (1 - time) * flow) - spread * (noisy - time * flow)


class FlowTeacher:
    """A Flux pipeline that says what v of a U-Net's noisy latents is.

    Args:
        folder: of the pipeline.
        vae: the student's autoencoder.
        compiled: whether to compile the transformer.

    Raises:
        RecipeError: its latents are another encoder's.
    """

    def __init__(self, folder: str, vae: AutoencoderTiny, compiled: bool):
        own: Any = AutoencoderTiny.from_pretrained(folder, subfolder="vae").float()
        device = cast(Any, vae).device
        if weights_digest(own.encoder) != weights_digest(vae.encoder):
            raise RecipeError(
                f"expected a teacher with the encoder of the recipe's vae, got another in {folder}"
            )
        self.text = TextParts(folder, device)
        load: Any = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        self.transformer: Any = load.float().eval().to(device).requires_grad_(False)
        if compiled:
            compile_each_shape(self.transformer)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, timesteps: Tensor, schedule: DDPMScheduler, texts: list[str]) -> Tensor:
        """The v that it predicts, whole captions given.

        Args:
            noisy: latents a x + s n, [B, C, H, W].
            timesteps: [B] of the schedule.
            schedule: says a and s.
            texts: B captions.
        """
        kept = schedule.alphas_cumprod.to(noisy.device)[timesteps].double()[:, None, None, None]
        signal, spread = kept.sqrt().to(noisy.dtype), (1 - kept).sqrt().to(noisy.dtype)
        time, scaled = spread / (signal + spread), noisy / (signal + spread)
        short, long = self.text.tokens(texts)
        states, pooled = self.text.states(short, long)
        states = states[:, : self.text.length(long)]
        tokens = self.transformer(**flow_inputs(scaled, time.flatten(), states, pooled)).sample
        height, width = noisy.shape[2:]
        flow = FluxPipeline._unpack_latents(tokens.to(noisy.dtype), height, width, 1)
        return velocity_of_flow(flow, scaled, time, signal, spread)
