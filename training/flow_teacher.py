"""A frozen flow transformer as the teacher of a U-Net on the same latents (arXiv 1503.02531).

What a U-Net should predict of one picture's noisy latents is mostly chance: the picture is one of many that
fit. A trained teacher predicts the mean of them, which is what its student has to learn.
"""

from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from torch import Tensor

from interactdiff.errors import RecipeError
from interactdiff.fingerprints import weights_digest
from interactdiff.training.compiling import compile_each_shape
from interactdiff.training.dit import flow_inputs, unpacked
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
    def velocity(self, noisy: Tensor, signal: Tensor, texts: list[str]) -> Tensor:
        """[B, C, H, W] v that it predicts, whole captions given, float32.

        Args:
            noisy: latents a x + s n, [B, C, H, W].
            signal: [B] a squared, with s squared the rest of 1.
            texts: B captions.
        """
        kept = signal.double()[:, None, None, None]
        clean, spread = kept.sqrt().to(noisy), (1 - kept).sqrt().to(noisy)
        time, scaled = spread / (clean + spread), noisy / (clean + spread)
        short, long = self.text.tokens(texts)
        states, pooled = self.text.states(short, long)
        states = states[:, : self.text.length(long)]
        tokens = self.transformer(**flow_inputs(scaled, time.flatten(), states, pooled)).sample
        return velocity_of_flow(unpacked(tokens.float(), *noisy.shape[2:]), scaled, time, clean, spread)
