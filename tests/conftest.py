"""A tiny Stable Diffusion with random weights, and an adapter for it: real classes, nothing to fetch."""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny import trained_adapter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from interactdiff.interaction.adapter import InteractionAdapter

TEXT_WIDTH = 24


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """Spells words letter by letter; takes 24 tokens."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokens = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Two levels of different width and heads, one of them with two blocks a transformer: 11 sites."""
    torch.manual_seed(0)
    make: Any = UNet2DConditionModel  # diffusers annotates tuples of any length as tuples of one
    return make(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@pytest.fixture
def pipe(unet: UNet2DConditionModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """A stock pipeline of 16 px pictures, 8x8 latents."""
    torch.manual_seed(1)
    make_text_config, make_vae, make_pipeline = cast(
        Any, (CLIPTextConfig, AutoencoderKL, StableDiffusionPipeline)
    )
    text_config = make_text_config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = make_vae(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    pipeline = make_pipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def adapter(unet: UNet2DConditionModel) -> InteractionAdapter:
    """Acts, and with grid positions, where more can go wrong."""
    return trained_adapter(unet)
