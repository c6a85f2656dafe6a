"""The embedded text-to-image base: a U-Net, trained on pictures and their captions.

The U-Net predicts v = a n - s x (arXiv 2202.00512) of noisy latents a x + s n, on a cosine schedule that ends
in noise alone (arXiv 2305.08891). A narrow U-Net copies noise badly; this asks for none of it where layout is
decided.
"""

import copy
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizerFast, PreTrainedTokenizerBase  # pyright: ignore[reportAttributeAccessIssue]

from interactdiff.errors import RecipeError
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import SIZE
from interactdiff.stickworld.world import HELD_OUT
from interactdiff.training.compiling import compile_each_shape
from interactdiff.training.config import (
    Count,
    Flag,
    Location,
    OptionalLocation,
    Positive,
    Rate,
    RecipeConfig,
    Share,
    arguments_named,
    arguments_of,
)
from interactdiff.training.flow_teacher import FlowTeacher
from interactdiff.training.perceptual import PerceptualConfig, perceptual_loss_of
from interactdiff.training.recipe import Recipe
from interactdiff.training.text import save_text_encoder
from interactdiff.training.tokenizer import make_portable, token_ids
from interactdiff.training.word_attention import WordAttention, WordRegions
from interactdiff.training.world_data import CaptionedLatents, Sizes, grid

SCHEDULE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@cache
def schedule() -> DDPMScheduler:
    """The noise schedule that the U-Net is trained on."""
    return DDPMScheduler(**SCHEDULE)


class VelocityBatch:
    """Noisy latents, their timesteps, and the v that a U-Net should predict of them.

    Args:
        latents: x, [B, C, H, W].
        generator: source of the noise and of the timesteps.
        timestep_power: timesteps are 1000 u^power with u uniform in [0, 1); below 1 leans to high noise,
            where text and layout are decided.
    """

    def __init__(self, latents: Tensor, generator: torch.Generator, timestep_power: float):
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        uniform = torch.rand(len(latents), generator=generator, device=generator.device)
        self.timesteps = (uniform**timestep_power * 1000).long().clamp(max=999).to(latents.device)
        self.noisy = schedule().add_noise(latents, noise, cast(Any, self.timesteps))
        self.target = schedule().get_velocity(latents, noise, cast(Any, self.timesteps))

    @property
    def signal(self) -> Tensor:
        """[B] share of the latents in the variance of the noisy ones."""
        return schedule().alphas_cumprod.to(self.timesteps.device)[self.timesteps]

    def predict(self, denoiser: nn.Module, text: Tensor) -> Tensor:
        """The v that a `UNet2DConditionModel` predicts with [B, L, D] states of the text, float32."""
        return denoiser(self.noisy, self.timesteps, text).sample.float()

    def loss(self, predicted: Tensor) -> Tensor:
        """Squared error of the predicted v."""
        return F.mse_loss(predicted, self.target)

    def estimate(self, predicted: Tensor) -> Tensor:
        """[B, C, H, W] latents that a predicted v comes from (arXiv 2202.00512, section 4)."""
        signal = self.signal[:, None, None, None].to(predicted)
        return signal.sqrt() * self.noisy - (1 - signal).sqrt() * predicted


def sampler() -> DPMSolverMultistepScheduler:
    """The sampler that fits the loss, and adds noise on its way: a small model's early errors are mended."""
    # steps_offset is not read with trailing timesteps; Stable Diffusion pipelines warn without it.
    return DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1, algorithm_type="sde-dpmsolver++")


def text_states(tokenizer: PreTrainedTokenizerBase, encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """[B, L, D] states of the prompts."""
    return encoder(token_ids(tokenizer, texts).to(encoder.device)).last_hidden_state


class PooledDropout:
    """Leaves the pooled caption out of half of the examples of a U-Net that is trained.

    A caption that reaches every layer with the timestep says early what belongs where, but attention then
    never learns to look at words (`addition_embed_type: text`).
    """

    def __init__(self, unet: UNet2DConditionModel, share: float):
        self.share, self.kept = share, torch.ones(1)
        if (embedding := unet.add_embedding) is None:
            got = f"addition_embed_type {unet.config['addition_embed_type']}"
            raise RecipeError(f"expected a U-Net with addition_embed_type text, got {got}")
        embedding.register_forward_hook(lambda module, _, output: self._drop(module, cast(Tensor, output)))

    def draw(self, rows: int, generator: torch.Generator) -> None:
        """Choose the examples of the next call."""
        self.kept = (torch.rand(rows, 1, generator=generator, device=generator.device) >= self.share).float()

    def _drop(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * self.kept.to(output) if module.training else output


class BaseConfig(PerceptualConfig):
    """The keys of `BaseRecipe`, beside those of `PerceptualConfig`.

    Attributes:
        cache_dir: where renders, captions and latents are kept.
        sizes: of pictures, see `CaptionedLatents`.
        vae: folder of the autoencoder.
        text: folder with `tokenizer` and `text_encoder`.
        unet: arguments of its class.
        pooled_dropout: share of the examples without the pooled caption.
        compile: whether to compile the U-Net.
        init_from: pipeline folder to go on from, or null.
        teacher: folder of a Flux pipeline on the same latents, whose predictions the U-Net learns in place of
            the pictures' own v, or null; see `FlowTeacher`.
        empty_caption: probability.
        word_attention: weight of `WordAttention.loss`; 0 leaves it out.
        timestep_power: see `VelocityBatch`.
        guidance_scale: of samples.
        sample_steps: denoising steps of samples.
    """

    may_change: ClassVar[frozenset[str]] = RecipeConfig.may_change | {"guidance_scale"}

    cache_dir: Location
    sizes: Sizes
    vae: Location
    text: Location
    unet: Annotated[dict[str, Any], arguments_of(UNet2DConditionModel, arguments_named(UNet2DConditionModel))]
    pooled_dropout: Share
    compile: Flag
    init_from: OptionalLocation = None
    teacher: OptionalLocation = None
    empty_caption: Share
    word_attention: Rate = 0.0
    timestep_power: Positive
    guidance_scale: Rate
    sample_steps: Count = 30


class BaseRecipe(Recipe[BaseConfig]):
    """Trains a U-Net on captions. It sees no box; silhouettes enter its loss alone."""

    config_type = BaseConfig

    def build(self) -> nn.Module:
        config = self.config
        self.vae = AutoencoderTiny.from_pretrained(config.vae).float().to(self.device).eval()
        self.vae.requires_grad_(False)
        attended = config.word_attention > 0
        self.data = CaptionedLatents(Path(config.cache_dir), self.vae, config.sizes, attended)
        self.tokenizer: Any = CLIPTokenizerFast.from_pretrained(config.text, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(config.text, subfolder="text_encoder").eval()
        self.text_encoder.float().to(self.device).requires_grad_(False)
        self.teacher = FlowTeacher(config.teacher, self.vae, config.compile) if config.teacher else None
        make: Any = UNet2DConditionModel  # annotated with tuples of one
        if config.init_from:
            unet = make.from_pretrained(config.init_from, subfolder="unet").float()
        else:
            unet = make(**config.unet)
        self.pooled = PooledDropout(unet, config.pooled_dropout)
        self.word_attention = WordAttention(unet) if attended else None
        self.perceptual = perceptual_loss_of(self.config, self.data, self.device)
        unet.to(memory_format=torch.channels_last)
        if config.compile:
            compile_each_shape(unet)
        return unet

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config.seed * 1_000_003 + step)
        drawn = self.data.batch(rng, self.config.empty_caption)
        tokens = token_ids(self.tokenizer, drawn.texts).to(self.device)
        latents = drawn.latents.to(self.device)
        batch: dict[str, Any] = {"latents": latents, "tokens": tokens, "captions": drawn.texts}
        if self.word_attention is not None:
            batch["regions"] = WordRegions.of(drawn, self.tokenizer, tokens.shape[1], self.device)
        return batch

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            text = self.text_encoder(batch["tokens"]).last_hidden_state
        self.pooled.draw(len(text), generator)
        noised = VelocityBatch(batch["latents"], generator, self.config.timestep_power)
        predicted = noised.predict(self.model, text)
        if self.teacher is not None:
            with self.accelerator.autocast():
                noised.target = self.teacher.velocity(noised.noisy, noised.signal, batch["captions"])
        loss = noised.loss(predicted)
        if self.word_attention is not None and self.model.training:
            attended = self.word_attention.loss(batch["regions"], noised.signal)
            loss = loss + self.config.word_attention * attended
        if self.perceptual is not None and self.model.training:
            clean, noise = noised.signal.sqrt(), (1 - noised.signal).sqrt()
            with self.accelerator.autocast():
                seen = self.perceptual.loss(
                    batch["latents"], noised.estimate(predicted), noise / (clean + noise)
                )
            loss = loss + self.config.perceptual * seen
        return loss

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline around the parts as they are now."""
        make: Any = StableDiffusionPipeline  # annotated with one autoencoder and one kind of scheduler
        return make(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.accelerator.unwrap_model(self.model),
            scheduler=sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @torch.no_grad()
    def sample(self) -> Image.Image:
        captions = [sample_scene(HELD_OUT + n).caption for n in range(16)]
        pipe: Any = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            captions,
            height=SIZE,
            width=SIZE,
            num_inference_steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return grid(drawn.cpu() * 2 - 1, 8)

    def export(self) -> None:
        pipe = self.pipeline()
        for name in ("vae", "text_encoder", "unet"):
            half = copy.deepcopy(getattr(pipe, name)).to(torch.float16, memory_format=torch.contiguous_format)
            setattr(pipe, name, half)
        pipe.save_pretrained(self.config.export_to, safe_serialization=True)
        save_text_encoder(pipe.text_encoder, Path(self.config.export_to))
        make_portable(Path(self.config.export_to))
