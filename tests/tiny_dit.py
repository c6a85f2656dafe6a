"""Tiny Flux and SD3 pipelines with random weights: real classes, nothing to fetch."""

from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.training.tokenizer import make_t5_tokenizer

make_flux, make_sd3, make_vae, make_clip_config, make_flux_pipeline, make_sd3_pipeline = cast(
    Any,
    (
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        AutoencoderKL,
        CLIPTextConfig,
        FluxPipeline,
        StableDiffusion3Pipeline,
    ),
)
T5_WIDTH = 12
CLIP_WIDTH = 16
TEXT_LENGTH = 10


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every layer matters."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter.data, std=0.15)
        else:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def tiny_flux(**options: Any) -> FluxTransformer2DModel:
    """One joint block and two single blocks of two heads; `options` go to the class."""
    shape = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": CLIP_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return cast(FluxTransformer2DModel, shaken(make_flux(**shape | options), 0))


def tiny_sd3(**options: Any) -> SD3Transformer2DModel:
    """SD3.5's blocks: two joint ones, the first with an attention of the image alone."""
    shape = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * CLIP_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * CLIP_WIDTH,
        "out_channels": 4,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return cast(SD3Transformer2DModel, shaken(make_sd3(**shape | options), 1))


def tiny_vae() -> AutoencoderKL:
    """Halves the picture once: 32 px are 16 x 16 latents, 8 x 8 tokens."""
    torch.manual_seed(2)
    return make_vae(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        shift_factor=0.0,
    ).eval()


def clip_config(tokenizer: CLIPTokenizer, width: int = CLIP_WIDTH) -> CLIPTextConfig:
    """Of a text encoder of one layer."""
    return make_clip_config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_flux_pipeline(tokenizer: CLIPTokenizer, **options: Any) -> FluxPipeline:
    """A stock Flux pipeline of 32 px pictures; `options` go to the transformer."""
    t5 = make_t5_tokenizer(TEXT_LENGTH)
    torch.manual_seed(3)
    width = {"d_model": T5_WIDTH, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipeline = make_flux_pipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(t5), **width)).eval(),
        tokenizer_2=t5,
        transformer=tiny_flux(**options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3_pipeline(tokenizer: CLIPTokenizer, **options: Any) -> StableDiffusion3Pipeline:
    """A stock SD3 pipeline of 32 px pictures without T5; `options` go to the transformer."""
    torch.manual_seed(4)
    pipeline = make_sd3_pipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=tiny_sd3(**options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipe: Any, size: tuple[int, int] = (32, 32), prompt: str = "a dog", seed: int = 0, **arguments: Any
) -> Tensor:
    """A picture's latents from a seed's noise."""
    arguments = {"num_inference_steps": 2} | arguments
    if hasattr(pipe, "transformer"):
        arguments |= {"max_sequence_length": TEXT_LENGTH}
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    return pipe(
        prompt, height=height, width=width, output_type="latent", generator=generator, **arguments
    ).images


def flux_inputs() -> dict[str, Tensor]:
    """What a tiny Flux is called with."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return {
        "hidden_states": torch.randn(2, 64, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 16),
        "img_ids": torch.stack([torch.zeros(64), y.flatten(), x.flatten()], 1),
        "txt_ids": torch.zeros(5, 3),
    }


def sd3_inputs() -> dict[str, Tensor]:
    """What a tiny SD3 is called with."""
    return {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
    }


def trained_layers(denoiser: Any, config: ClearConfig) -> ClearAdapter:
    """Layers that differ from the base's, as training would leave them."""
    return shaken(ClearAdapter.for_denoiser(denoiser, config), 7)  # type: ignore[return-value]


def trained_joint_adapter(transformer: Any, **joint: Any) -> InteractionAdapter:
    """An adapter that acts, as training would leave it: every parameter random; `joint` of `JointConfig`."""
    adapter = InteractionAdapter.for_transformer(
        transformer, max_interactions=3, hidden=16, **{"token_dim": 8, "parts": 2} | joint
    )
    shaken(adapter, 8)
    for reader in adapter.cross_attentions.values():
        reader.alpha.data.fill_(1.0)
        reader.to_v.weight.data *= 5
    return adapter


make_tiny_vae = cast(Any, AutoencoderTiny)


def tiny_autoencoder(channels: int, levels: int = 2) -> Any:
    """One convolution block a level, so that no pixel depends on one farther away than a few latents."""
    torch.manual_seed(5)
    shape = {f"{part}_block_out_channels": (8,) * levels for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    return make_tiny_vae(latent_channels=channels, **shape, **blocks).eval()
