"""A tiny Stable Diffusion, a tiny SDXL and adapters with random weights: real classes, nothing to fetch."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from ranks import own_lock_of_progress_bars
from tiny import Graphs, trained_adapter
from tiny_dit import clip_config, tiny_flux_pipeline, tiny_sd3_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import interactdiff
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.registry import methods

own_lock_of_progress_bars()
TEXT_WIDTH = 24
TEXT_2_WIDTH = 16  # of SDXL's second text encoder, before and after its projection
TIME_ID_WIDTH = 8  # of each of the six numbers that SDXL is told of a picture's size
make_unet: Any = UNet2DConditionModel  # diffusers annotates tuples of any length as tuples of one
make_vae, make_text_config, make_pipeline, make_xl_pipeline = cast(
    Any, (AutoencoderKL, CLIPTextConfig, StableDiffusionPipeline, StableDiffusionXLPipeline)
)


def tiny_unet(text_width: int, **options: Any) -> UNet2DConditionModel:
    """Two levels of different width and heads, one of them with two blocks a transformer: 11 sites."""
    torch.manual_seed(0)
    return make_unet(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    return make_vae(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


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
    return tiny_unet(TEXT_WIDTH)


@pytest.fixture
def pipe(unet: UNet2DConditionModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """A stock pipeline of 16 px pictures, 8x8 latents."""
    torch.manual_seed(1)
    pipeline = make_pipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, TEXT_WIDTH)).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def xl_pipe(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """SDXL's classes at the sizes of `pipe`, with the text features of two encoders one after the other."""
    unet = tiny_unet(
        TEXT_WIDTH + TEXT_2_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_2_WIDTH + 6 * TIME_ID_WIDTH,
    )
    torch.manual_seed(4)
    pipeline = make_xl_pipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, TEXT_WIDTH)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, TEXT_2_WIDTH)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def adapter(unet: UNet2DConditionModel) -> InteractionAdapter:
    """Acts, and with grid positions, where more can go wrong."""
    return trained_adapter(unet)


@pytest.fixture
def xl_adapter(xl_pipe: StableDiffusionXLPipeline) -> InteractionAdapter:
    """As `adapter`, for `xl_pipe`."""
    return trained_adapter(xl_pipe.unet)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def base(request: pytest.FixtureRequest) -> Any:
    """A text to image pipeline of each base; SD 2.x has linear projections and predicts v."""
    pipeline = request.getfixturevalue("xl_pipe" if request.param == "sdxl" else "pipe")
    if request.param == "sd2":
        pipeline.unet = tiny_unet(TEXT_WIDTH, use_linear_projection=True)
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type="v_prediction"
        )
    return pipeline


@pytest.fixture
def flux_pipe(tokenizer: CLIPTokenizer) -> Any:
    """A stock Flux pipeline of 32 px pictures: 8 x 8 image tokens, 10 text tokens."""
    return tiny_flux_pipeline(tokenizer)


@pytest.fixture
def sd3_pipe(tokenizer: CLIPTokenizer) -> Any:
    """A stock SD3.5 pipeline of 32 px pictures: 8 x 8 image tokens."""
    return tiny_sd3_pipeline(tokenizer)


@pytest.fixture(params=["flux_pipe", "sd3_pipe"])
def dit_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A backend for `torch.compile` that counts, where nothing has been compiled yet."""
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.fixture
def badge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One more folder of the package, with a method in it; the class of its items."""
    shutil.copytree(Path(__file__).parent / "toy/badge", tmp_path / "methods/badge")
    monkeypatch.setattr(interactdiff, "__path__", [*interactdiff.__path__, str(tmp_path / "methods")])
    methods.cache_clear()
    yield importlib.import_module("interactdiff.badge.items").Badge
    methods.cache_clear()
    for name in [name for name in sys.modules if name.startswith("interactdiff.badge")]:
        del sys.modules[name]
    vars(interactdiff).pop("badge", None)


@pytest.fixture
def badge_weights(badge: Any, tmp_path: Path) -> Path:
    """A saved adapter of badges that acts strongly."""
    adapter = importlib.import_module("interactdiff.badge.adapter").BadgeAdapter(3.0)
    adapter.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"
