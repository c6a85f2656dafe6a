"""The interaction adapter: tokens and fusers, trained on a frozen base (paper section 3.4).

The caption is kept, stripped of its verbs or dropped, so that the adapter has to say what the caption does
not; the whole conditioning is nulled at times for the unconditional half of guidance, and the action alone at
times for boxes without an action.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from interactdiff import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import encode_phrases
from interactdiff.interaction.tokens import scene_phrases, scene_tensors
from interactdiff.picture import overlay
from interactdiff.scene import Interaction
from interactdiff.stickworld.world import HELD_OUT, WorldScene, sample_scene
from interactdiff.training.base import cached_latents, sampler, text_states, velocity_loss
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import cached_renders, grid


def varied_interactions(scene: WorldScene, rng: random.Random, null_action: float) -> tuple[Interaction, ...]:
    """A scene's interactions in random order, with colours or without, at times without the action."""
    asked = scene.interactions(colours=rng.random() < 0.8, action=rng.random() >= null_action)
    return tuple(rng.sample(asked, len(asked)))


def varied_prompt(scene: WorldScene, rng: random.Random, keep: float, strip: float) -> str:
    """The caption with probability `keep`, without its verbs with probability `strip`, else empty."""
    draw = rng.random()
    if draw < keep:
        return scene.caption
    return scene.caption_without_verb if draw < keep + strip else ""


def in_random_slots(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Move each image's interactions to slots drawn anew: a world with few of them trains every slot.

    Args:
        tensors: the laid out scenes, [B, N, ...] each.
        generator: CPU source of the draw.
    """
    rows, slots = tensors["masks"].shape
    order = torch.rand(rows, slots, generator=generator).argsort(dim=1)
    return {name: t[torch.arange(rows)[:, None], order] for name, t in tensors.items()}


class AdapterRecipe(Recipe):
    """Trains an `InteractionAdapter` on a frozen pipeline.

    Extra configuration keys: `base` (pipeline folder), `cache_dir`, `renders`, `adapter` (arguments of
    `InteractionAdapter.for_unet`), `init_from` (adapter to go on from, or null), `keep_caption`,
    `strip_caption`, `null_all`, `null_action` (probabilities), `timestep_power`, `guidance_scale` (of
    samples), `export_to`.
    """

    def build(self) -> nn.Module:
        config = self.config
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(config["base"], safety_checker=None)
        self.pipe.scheduler = sampler()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(self.device, torch.float32)
        for module in (self.pipe.vae, self.pipe.text_encoder, self.pipe.unet):
            module.requires_grad_(False).eval()
        self.pipe.unet.to(memory_format=torch.channels_last)
        renders = cached_renders(Path(config["cache_dir"]), config["renders"])
        self.latents = cached_latents(Path(config["cache_dir"]), self.pipe.vae, renders)
        if config["init_from"]:
            adapter = InteractionAdapter.from_pretrained(config["init_from"]).float()
        else:
            adapter = InteractionAdapter.for_unet(self.pipe.unet, **config["adapter"])
        self.features: dict[str, Tensor] = {}
        self.handle = attach(self.pipe, adapter.train())
        return adapter

    def batch(self, step: int) -> dict[str, Any]:
        config = self.config
        rng = random.Random(config["seed"] * 1_000_003 + step)
        chosen = [rng.randrange(len(self.latents)) for _ in range(config["batch_size"])]
        prompts, asked = [], []
        for index in chosen:
            scene = sample_scene(index)
            nulled = rng.random() < config["null_all"]
            prompts.append(
                "" if nulled else varied_prompt(scene, rng, config["keep_caption"], config["strip_caption"])
            )
            asked.append(() if nulled else varied_interactions(scene, rng, config["null_action"]))
        return {
            "latents": self.latents[chosen].float().to(self.device),
            "prompts": prompts,
            "interactions": asked,
        }

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        pipe, config = self.pipe, self.config
        with torch.no_grad():
            text = text_states(pipe.tokenizer, pipe.text_encoder, batch["prompts"])
        tensors = in_random_slots(self._scene_tensors(batch["interactions"]), generator)
        self.handle.set_tokens(self.model(**tensors))
        return velocity_loss(pipe.unet, batch["latents"], text, generator, config["timestep_power"])

    def _scene_tensors(self, scenes: Sequence[Sequence[Interaction]]) -> dict[str, Tensor]:
        new = [phrase for phrase in scene_phrases(scenes) if phrase not in self.features]
        with torch.autocast(self.device.type, enabled=False):
            self.features |= encode_phrases(self.pipe.tokenizer, self.pipe.text_encoder, new)
        slots = self.config["adapter"]["max_interactions"]
        return scene_tensors(scenes, self.features, slots)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        scenes = [sample_scene(HELD_OUT + n) for n in range(8)]
        asked = [scene.interactions() for scene in scenes]
        self.handle.set_scene(asked)
        drawn = self.pipe(
            [scene.caption_without_verb for scene in scenes],
            num_inference_steps=30,
            guidance_scale=self.config["guidance_scale"],
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        self.handle.clear()
        plain = grid(drawn.cpu() * 2 - 1, 8)
        side = plain.height
        rows = [overlay(plain.crop((n * side, 0, (n + 1) * side, side)), a) for n, a in enumerate(asked)]
        sheet = Image.new("RGB", (sum(r.width for r in rows[:4]), 2 * rows[0].height))
        for n, row in enumerate(rows):
            sheet.paste(row, (n % 4 * row.width, n // 4 * row.height))
        return sheet

    def export(self) -> None:
        adapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
        InteractionAdapter.from_tensors(adapter.config, half).save_pretrained(self.config["export_to"])
