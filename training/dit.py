"""The embedded diffusion transformer: a small Flux, trained on pictures and their captions.

Rectified flow: of x_s = (1 - s) x + s n the transformer predicts n - x (arXiv 2209.03003; arXiv 2403.03206,
section 3).
"""

import copy
import random
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from pydantic import model_validator
from torch import Tensor, nn

from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.stickworld.captions import caption
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import SIZE
from interactdiff.stickworld.world import HELD_OUT
from interactdiff.training.compiling import compile_each_shape
from interactdiff.training.config import (
    Count,
    Flag,
    Location,
    Number,
    OptionalLocation,
    Positive,
    Rate,
    RecipeConfig,
    Share,
    arguments_named,
    arguments_of,
)
from interactdiff.training.dit_text import TextParts
from interactdiff.training.perceptual import PerceptualConfig, perceptual_loss_of
from interactdiff.training.recipe import Recipe
from interactdiff.training.text import save_text_encoder
from interactdiff.training.tokenizer import make_portable
from interactdiff.training.transfer import transferred
from interactdiff.training.word_attention import WordAttention, WordRegions
from interactdiff.training.world_data import CaptionedLatents, Sizes, cached_renders, grid

_SEEN, _READ = 600, 4000  # renders and captions by which a transformer is transferred
_NAMED = 0.05  # how often its captions name an attribute: one that the old encoders do not know tells nothing


def packed(latents: Tensor) -> Tensor:
    """[B, C, H, W] latents to the [B, H/2 * W/2, 4C] tokens that `FluxPipeline` makes of them."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H/2 * W/2, 4C] tokens to the [B, C, H, W] latents that they were `packed` from.

    `FluxPipeline._unpack_latents` counts in pixels of an autoencoder of factor 8, and this has other ones.
    """
    grid = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def image_ids(latents: Tensor, device: torch.device | None = None) -> Tensor:
    """[H/2 * W/2, 3] places of the tokens of [B, C, H, W] latents, as `FluxPipeline` has them."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, device or latents.device, torch.float32)


def flow_inputs(noisy: Tensor, times: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
    """What a `FluxTransformer2DModel` is called with.

    Args:
        noisy: latents, [B, C, H, W].
        times: [B] in [0, 1]; 1 is noise alone.
        text: [B, T, D] states of the text.
        pooled: [B, P] pooled state of the text.
    """
    return {
        "hidden_states": packed(noisy),
        "timestep": times,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "img_ids": image_ids(noisy),
        "txt_ids": torch.zeros(text.shape[1], 3, device=noisy.device),
    }


@torch.no_grad()
def encoded(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """[B, T, D] states of texts and their [B, P] pooled state, as the pipeline draws by them."""
    length = call_arguments(pipe, texts).get("max_sequence_length", 512)
    text, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=length)
    return text, pooled


class FlowBatch:
    """Noisy latents of rectified flow, what a transformer is called with, and what it should predict.

    Args:
        latents: x, [B, C, H, W].
        text: [B, T, D] states of the text.
        pooled: [B, P] pooled state of the text.
        generator: source of the noise and of the times.
        logits: mean and standard deviation of the times' logit-normal density (arXiv 2403.03206, section
            3.1), whose mean above 0 leans to noise, where text and layout are decided; None spreads them
            evenly.
    """

    def __init__(
        self,
        latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        generator: torch.Generator,
        logits: tuple[float, float] | None = None,
    ):
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        density, (mean, deviation) = ("logit_normal", logits) if logits else ("none", (0.0, 1.0))
        times: Any = compute_density_for_timestep_sampling(
            density, len(latents), mean, deviation, device=generator.device, generator=generator
        )
        times = times.to(latents)
        share = times[:, None, None, None]
        self.times, self.noisy = times, (1 - share) * latents + share * noise
        self.target = packed(noise - latents)
        self.inputs = flow_inputs(self.noisy, times, text, pooled)

    def loss(self, predicted: Tensor) -> Tensor:
        """Squared error of the predicted flow."""
        return F.mse_loss(predicted.float(), self.target)

    def estimate(self, predicted: Tensor) -> Tensor:
        """[B, C, H, W] latents that a predicted flow comes from."""
        flow = unpacked(predicted.float(), *self.noisy.shape[2:])
        return self.noisy - self.times[:, None, None, None] * flow


def start_at_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero what modulates, gates and leaves: every block starts as if it were not there (adaLN-zero, DiT)."""
    for name, module in transformer.named_modules():
        ends = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
        if ends or name == "proj_out":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class DitConfig(PerceptualConfig):
    """The keys of `DitRecipe`, beside those of `PerceptualConfig`.

    Attributes:
        cache_dir: where renders, captions and latents are kept.
        sizes: of pictures, see `CaptionedLatents`.
        text: a pipeline folder with both tokenizers and text encoders, and the autoencoder.
        transformer: arguments of its class.
        pooled_dropout: share of the examples without the pooled caption.
        whole_text: share of the steps whose texts keep all their padding, as pipelines pass it; else it is
            cut to the longest text, and a step is up to 1.6 times as fast.
        compile: whether to compile the transformer.
        init_from: pipeline folder to go on from, or null.
        transfer_from: pipeline folder of another autoencoder and other text encoders to go on from, or null
            (`interactdiff.training.transfer`). Like `init_from` it decides the transformer's sizes.
        empty_caption: probability.
        word_attention: weight of `WordAttention.loss`; 0 leaves it out.
        logit_mean: of the times' logit-normal density, see `FlowBatch`.
        logit_std: its standard deviation.
        shift: of the sampler.
        guidance_scale: of samples.
        sample_steps: denoising steps of samples.
    """

    may_change: ClassVar[frozenset[str]] = RecipeConfig.may_change | {"guidance_scale", "shift"}

    cache_dir: Location
    sizes: Sizes
    text: Location
    transformer: Annotated[
        dict[str, Any], arguments_of(FluxTransformer2DModel, arguments_named(FluxTransformer2DModel))
    ]
    pooled_dropout: Share
    whole_text: Share = 1.0
    compile: Flag
    init_from: OptionalLocation = None
    transfer_from: OptionalLocation = None
    empty_caption: Share
    word_attention: Rate = 0.0
    logit_mean: Number
    logit_std: Rate
    shift: Positive
    guidance_scale: Rate
    sample_steps: Count = 30

    @model_validator(mode="after")
    def _one_start(self) -> "DitConfig":
        if self.init_from and self.transfer_from:
            raise ValueError(f"transfer_from: expected none beside init_from, got {self.transfer_from!r}")
        return self


class DitRecipe(Recipe[DitConfig]):
    """Trains a `FluxTransformer2DModel` on captions. It sees no box; silhouettes enter its loss alone."""

    config_type = DitConfig

    def build(self) -> nn.Module:
        config = self.config
        self.text = TextParts(config.text, self.device)
        self.vae: Any = AutoencoderTiny.from_pretrained(config.text, subfolder="vae").float()
        self.vae.to(self.device).eval().requires_grad_(False)
        attended = config.word_attention > 0
        self.data = CaptionedLatents(Path(config.cache_dir), self.vae, config.sizes, attended)
        make: Any = FluxTransformer2DModel
        if config.init_from:
            transformer = make.from_pretrained(config.init_from, subfolder="transformer").float()
        elif config.transfer_from:
            transformer = self._transferred(config.transfer_from)
        else:
            transformer = make(**config.transformer)
            start_at_identity(transformer)
        self.word_attention = WordAttention(transformer) if attended else None
        self.perceptual = perceptual_loss_of(config, self.data, self.device)
        if config.compile:
            compile_each_shape(transformer)
        return transformer

    def _transferred(self, folder: str) -> FluxTransformer2DModel:
        size, one = next(iter(self.config.sizes.items()))
        renders = cached_renders(Path(self.config.cache_dir), one.renders, size, one.most)[:_SEEN]
        rng = random.Random(self.config.seed)
        captions = [caption(sample_scene(seed), rng, likelihood=_NAMED).text for seed in range(_READ)]
        return transferred(folder, self.vae, self.text, renders, captions)

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config.seed * 1_000_003 + step)
        drawn = self.data.batch(rng, self.config.empty_caption)
        short, long = self.text.tokens(drawn.texts)
        length = long.shape[1] if rng.random() < self.config.whole_text else self.text.length(long)
        batch = {"latents": drawn.latents.to(self.device), "tokens": (short, long), "length": length}
        if self.word_attention is not None:
            batch["regions"] = WordRegions.of(drawn, self.text.tokenizer_2, length, self.device)
        return batch

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        config = self.config
        text, pooled = self.text.states(*batch["tokens"])
        text = text[:, : batch["length"]]
        kept = torch.rand(len(text), 1, generator=generator, device=generator.device) >= config.pooled_dropout
        pooled = pooled * kept.to(pooled)
        logits = config.logit_mean, config.logit_std
        flow = FlowBatch(batch["latents"], text, pooled, generator, logits)
        predicted = self.model(**flow.inputs).sample
        loss = flow.loss(predicted)
        if self.word_attention is not None and self.model.training:
            attended = self.word_attention.loss(batch["regions"], 1 - flow.times**3)  # at much noise too
            loss = loss + config.word_attention * attended
        if self.perceptual is not None and self.model.training:
            with self.accelerator.autocast():
                seen = self.perceptual.loss(batch["latents"], flow.estimate(predicted), flow.times)
            loss = loss + config.perceptual * seen
        return loss

    def pipeline(self) -> FluxPipeline:
        """The stock pipeline around the parts as they are now."""
        make: Any = FluxPipeline
        return make(
            vae=self.vae,
            text_encoder=self.text.text_encoder,
            tokenizer=self.text.tokenizer,
            text_encoder_2=self.text.text_encoder_2,
            tokenizer_2=self.text.tokenizer_2,
            transformer=self.accelerator.unwrap_model(self.model),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.config.shift, stochastic_sampling=True),
        )

    @torch.no_grad()
    def sample(self) -> Image.Image:
        captions = [sample_scene(HELD_OUT + n).caption for n in range(16)]
        pipe: Any = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        drawn = repeatable_call(
            pipe,
            **call_arguments(pipe, captions, guidance_scale=self.config.guidance_scale),
            height=SIZE,
            width=SIZE,
            num_inference_steps=self.config.sample_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return grid(drawn.cpu() * 2 - 1, 8)

    def export(self) -> None:
        pipe: Any = self.pipeline()
        for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).half())
        pipe.save_pretrained(self.config.export_to, safe_serialization=True)
        for name in ("text_encoder", "text_encoder_2"):
            save_text_encoder(getattr(pipe, name), Path(self.config.export_to), name)
        make_portable(Path(self.config.export_to))
