"""The embedded text-to-image base: a U-Net, trained on pictures and their captions alone.

The U-Net predicts v = a n - s x (arXiv 2202.00512) of noisy latents a x + s n, on a cosine schedule that ends
in noise alone (arXiv 2305.08891). A narrow U-Net copies noise badly; this asks for none of it where layout is
decided.
"""

import copy
import hashlib
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
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
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.world import HELD_OUT, WorldScene
from interactdiff.training.recipe import Recipe
from interactdiff.training.text import save_text_encoder
from interactdiff.training.world_data import as_images, cached_renders, grid

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


def velocity_loss(
    denoiser: nn.Module,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
    timestep_power: float,
) -> Tensor:
    """Squared error of the predicted v.

    Args:
        denoiser: a `UNet2DConditionModel`.
        latents: x, [B, C, H, W].
        text: [B, L, D] states of the text encoder.
        generator: CPU source of the noise and of the timesteps.
        timestep_power: timesteps are 1000 u^power with u uniform in [0, 1); below 1 leans to high noise,
            where text and layout are decided.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    uniform = torch.rand(len(latents), generator=generator)
    timesteps = (uniform**timestep_power * 1000).long().clamp(max=999).to(latents.device)
    noisy = schedule().add_noise(latents, noise, cast(Any, timesteps))
    predicted = denoiser(noisy, timesteps, text).sample
    return F.mse_loss(predicted.float(), schedule().get_velocity(latents, noise, cast(Any, timesteps)))


def sampler() -> DPMSolverMultistepScheduler:
    """The sampler that fits the loss, and adds noise on its way: a small model's early errors are mended."""
    # steps_offset is not read with trailing timesteps; Stable Diffusion pipelines warn without it.
    return DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1, algorithm_type="sde-dpmsolver++")


@torch.no_grad()
def cached_latents(folder: Path, vae: Any, renders: np.ndarray) -> Tensor:
    """Latents of renders, computed once for each encoder and each look of the world.

    Returns:
        [N, C, H, W] float16 on the CPU.
    """
    made_of = hashlib.sha256(renders[:32].tobytes())
    for parameter in vae.encoder.parameters():
        made_of.update(parameter.detach().cpu().numpy().tobytes())
    path = folder / f"latents-{len(renders)}-{made_of.hexdigest()[:12]}.npy"
    if not path.exists():
        parts = []
        for first in range(0, len(renders), 250):
            images = as_images(renders[first : first + 250]).to(vae.device)
            parts.append(vae.encode(images).latents.half().cpu().numpy())
        aside = path.with_suffix(".aside.npy")
        np.save(aside, np.concatenate(parts))
        aside.rename(path)
    return torch.from_numpy(np.load(path))


def varied_caption(scene: WorldScene, rng: random.Random, empty: float) -> str:
    """A caption in random wording: at times without verbs, without colours, as keywords, or empty."""
    draw = rng.random()
    if draw < empty:
        return ""
    if draw > 0.95:
        words = [f"{t.object_colour} {t.object}" for t in scene.triplets] + [scene.background]
        return ", ".join(words)
    verbs, colours = rng.random() < 0.85, rng.random() < 0.92
    return caption(scene.background, scene.triplets, rng, verbs=verbs, colours=colours)


def text_states(tokenizer: PreTrainedTokenizerBase, encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """[B, L, D] states of the prompts, padded to the encoder's length as Stable Diffusion pads them."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids.to(encoder.device)).last_hidden_state


class BaseRecipe(Recipe):
    """Trains a U-Net on captions; it never sees a box.

    Extra configuration keys: `cache_dir`, `renders`, `vae` (folder), `text` (folder with `tokenizer` and
    `text_encoder`), `unet` (arguments of its class), `compile` (whether to compile the U-Net), `init_from`
    (pipeline folder to go on from, or null), `empty_caption` (probability), `timestep_power`,
    `guidance_scale` (of samples), `export_to`.
    """

    def build(self) -> nn.Module:
        config = self.config
        self.vae = AutoencoderTiny.from_pretrained(config["vae"]).float().to(self.device).eval()
        self.vae.requires_grad_(False)
        renders = cached_renders(Path(config["cache_dir"]), config["renders"])
        self.latents = cached_latents(Path(config["cache_dir"]), self.vae, renders)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(config["text"], subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(config["text"], subfolder="text_encoder").eval()
        self.text_encoder.float().to(self.device).requires_grad_(False)
        make: Any = UNet2DConditionModel  # annotated with tuples of one
        if config["init_from"]:
            unet = make.from_pretrained(config["init_from"], subfolder="unet").float()
        else:
            unet = make(**config["unet"])
        unet.to(memory_format=torch.channels_last)
        if config["compile"]:
            unet.compile()
        return unet

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config["seed"] * 1_000_003 + step)
        chosen = [rng.randrange(len(self.latents)) for _ in range(self.config["batch_size"])]
        empty = self.config["empty_caption"]
        captions = [varied_caption(sample_scene(index), rng, empty) for index in chosen]
        return {"latents": self.latents[chosen].float().to(self.device), "captions": captions}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            text = text_states(self.tokenizer, self.text_encoder, batch["captions"])
        return velocity_loss(self.model, batch["latents"], text, generator, self.config["timestep_power"])

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
            num_inference_steps=30,
            guidance_scale=self.config["guidance_scale"],
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return grid(drawn.cpu() * 2 - 1, 8)

    def export(self) -> None:
        pipe = self.pipeline()
        for name in ("vae", "text_encoder", "unet"):
            half = copy.deepcopy(getattr(pipe, name)).to(torch.float16, memory_format=torch.contiguous_format)
            setattr(pipe, name, half)
        pipe.save_pretrained(self.config["export_to"], safe_serialization=True)
        save_text_encoder(pipe.text_encoder, Path(self.config["export_to"]))
