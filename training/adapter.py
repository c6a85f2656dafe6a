"""The interaction adapter, trained on a frozen base, a U-Net or Flux (paper section 3.4).

The caption is kept, stripped of its verbs or dropped, so that the adapter has to say what the caption does
not; the whole conditioning is nulled at times for the unconditional half of guidance, and the action alone at
times for boxes without an action.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from pydantic import model_validator
from torch import Tensor, nn

from interactdiff import attach
from interactdiff.errors import RecipeError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import pipeline_phrases
from interactdiff.interaction.tokens import scene_phrases
from interactdiff.picture import overlay
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.scene import Box, Entity, Interaction
from interactdiff.stickworld.captions import describe_object, describe_person, named_attributes, phrase
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import SIZE
from interactdiff.stickworld.world import HELD_OUT, WorldEntity, WorldScene
from interactdiff.training.base import VelocityBatch, sampler, text_states
from interactdiff.training.config import (
    Count,
    Location,
    MeanAndDeviation,
    OptionalLocation,
    Positive,
    Rate,
    RecipeConfig,
    Share,
    refusal,
)
from interactdiff.training.dit import FlowBatch, encoded
from interactdiff.training.interaction_config import OF_A_TRANSFORMER, OF_A_UNET, AdapterSizes
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import cached_latents, cached_renders, grid, scenes


def varied_items(
    scene: WorldScene, rng: random.Random, null_action: float, slack: float
) -> tuple[Interaction | Entity, ...]:
    """A scene's interactions and entities as users would give them, in random order.

    With colours or without, at times with more of their appearance, without the action, or left out.

    Args:
        scene: the scene.
        rng: what decides.
        null_action: probability of an interaction without its action.
        slack: standard deviation of a box's edges about the true ones, in shares of the box's side; boxes
            drawn by hand are rather too large than too small.
    """

    def words(thing: WorldEntity) -> str:
        colours = rng.random() < 0.8
        if rng.random() < 0.5:
            return phrase(thing.name, thing.appearance, colours)
        named = named_attributes(thing.appearance, rng, colours)
        described = (
            describe_person(named, rng) if thing.name == "person" else describe_object(thing.name, named, rng)
        )
        return described.removeprefix("a ").removeprefix("an ")

    def box(true: Box) -> Box:
        x, y = slack * (true[2] - true[0]), slack * (true[3] - true[1])
        x0, y0 = true[0] - rng.gauss(0.5, 1) * x, true[1] - rng.gauss(0.5, 1) * y
        x1, y1 = true[2] + rng.gauss(0.5, 1) * x, true[3] + rng.gauss(0.5, 1) * y
        return max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1)

    items: list[Interaction | Entity] = []
    for t in scene.triplets:
        subject, obj = t.entities
        action = None if rng.random() < null_action else t.action
        items.append(Interaction(words(subject), action, words(obj), box(t.subject_box), box(t.object_box)))
    items += [Entity(words(entity), box(entity.box)) for entity in scene.entities]
    kept = [item for item in items if rng.random() < 0.9] or items
    return tuple(rng.sample(kept, len(kept)))


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
        generator: source of the draw, on the tensors' device.
    """
    rows, slots = tensors["masks"].shape
    order = torch.rand(rows, slots, generator=generator, device=generator.device).argsort(dim=1)
    first = torch.arange(rows, device=order.device)[:, None]
    return {name: t[first, order] for name, t in tensors.items()}


class AdapterConfig(RecipeConfig):
    """The keys of `AdapterRecipe`.

    Attributes:
        batch_size: pictures of a step.
        base: pipeline folder or Hub id.
        cache_dir: where renders and latents are kept.
        renders: how many.
        adapter: its sizes.
        init_from: adapter to go on from, or null.
        keep_caption: probability of the whole caption.
        strip_caption: probability of the caption without its verbs; otherwise there is none.
        null_all: probability of an example without any conditioning.
        null_action: probability of an interaction without its action.
        slack: of boxes, see `varied_items`.
        guidance_scale: of samples.
        sample_steps: denoising steps of samples.
        timestep_power: of a U-Net, see `VelocityBatch`.
        logits: of a transformer, see `FlowBatch`.
    """

    batch_size: Count
    base: Location
    cache_dir: Location
    renders: Count
    adapter: AdapterSizes
    init_from: OptionalLocation = None
    keep_caption: Share
    strip_caption: Share
    null_all: Share
    null_action: Share
    slack: Rate
    guidance_scale: Rate
    sample_steps: Count = 30
    timestep_power: Positive = 1.0
    logits: MeanAndDeviation = None

    @model_validator(mode="after")
    def _captions_are_shared_out(self) -> "AdapterConfig":
        if (both := self.keep_caption + self.strip_caption) > 1 + 1e-9:
            raise refusal("keep_caption and strip_caption of at most 1 in all", both)
        return self


class AdapterRecipe(Recipe[AdapterConfig]):
    """Trains an `InteractionAdapter` on a frozen pipeline."""

    config_type = AdapterConfig

    def build(self) -> nn.Module:
        config = self.config
        self.pipe: Any = load_pipeline(config.base, self.device, torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.in_unet = hasattr(self.pipe, "unet")
        self._check_keys()
        if self.in_unet:
            self.pipe.scheduler = sampler()
            self.pipe.unet.to(memory_format=torch.channels_last)
        renders = cached_renders(Path(config.cache_dir), config.renders)
        self.latents = cached_latents(Path(config.cache_dir), self.pipe.vae, renders)
        self.scenes = scenes(config.renders)
        sizes: dict[str, Any] = config.adapter.model_dump(exclude_unset=True)
        if config.init_from:
            adapter = InteractionAdapter.from_pretrained(config.init_from).float()
        elif self.in_unet:
            adapter = InteractionAdapter.for_unet(self.pipe.unet, **sizes)
        elif isinstance(self.pipe.transformer, FluxTransformer2DModel):
            adapter = InteractionAdapter.for_transformer(self.pipe.transformer, **sizes)
        else:
            kind = type(self.pipe).__name__
            raise RecipeError(f"expected a base with a U-Net or a Flux transformer, got a {kind}")
        self.features: dict[str, Tensor] = {}
        self.encode: Any = pipeline_phrases(self.pipe, adapter.config.feature_dim)
        self.handle = attach(self.pipe, adapter.train())
        return adapter

    def _check_keys(self) -> None:
        """Refuse keys that are for the other kind of base."""
        others = OF_A_TRANSFORMER if self.in_unet else OF_A_UNET
        found = [f"adapter.{name}" for name in self.config.adapter.model_fields_set & others]
        found += ["logits" if self.in_unet else "timestep_power"] * (
            ("logits" if self.in_unet else "timestep_power") in self.config.model_fields_set
        )
        if found:
            kind = "U-Net" if self.in_unet else "transformer"
            raise RecipeError(f"expected keys for the {kind} of {self.config.base}, got {', '.join(found)}")

    def batch(self, step: int) -> dict[str, Any]:
        config = self.config
        rng = random.Random(config.seed * 1_000_003 + step)
        chosen = [rng.randrange(len(self.latents)) for _ in range(config.batch_size)]
        prompts, items = [], []
        for index in chosen:
            scene = self.scenes[index]
            nulled = rng.random() < config.null_all
            prompts.append(
                "" if nulled else varied_prompt(scene, rng, config.keep_caption, config.strip_caption)
            )
            items.append(() if nulled else varied_items(scene, rng, config.null_action, config.slack))
        return {
            "latents": self.latents[chosen].float().to(self.device),
            "prompts": prompts,
            "items": items,
        }

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        tensors = in_random_slots(self._scene_tensors(batch["items"]), generator)
        self.handle["interaction"].set_tokens(self.model(**tensors))
        loss = self._loss_in_unet if self.in_unet else self._loss_in_transformer
        return loss(batch["latents"], batch["prompts"], generator)

    def _loss_in_unet(self, latents: Tensor, prompts: list[str], generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            text = text_states(self.pipe.tokenizer, self.pipe.text_encoder, prompts)
        noised = VelocityBatch(latents, generator, self.config.timestep_power)
        return noised.loss(noised.predict(self.pipe.unet, text))

    def _loss_in_transformer(self, latents: Tensor, prompts: list[str], generator: torch.Generator) -> Tensor:
        text, pooled = encoded(self.pipe, prompts)
        flow = FlowBatch(latents, text, pooled, generator, self.config.logits)
        if self.pipe.transformer.config.guidance_embeds:
            flow.inputs["guidance"] = torch.full_like(flow.inputs["timestep"], self.config.guidance_scale)
        return flow.loss(self.pipe.transformer(**flow.inputs).sample)

    def _scene_tensors(self, scenes: Sequence[Sequence[Interaction | Entity]]) -> dict[str, Tensor]:
        new = [phrase for phrase in scene_phrases(scenes) if phrase not in self.features]
        if new:
            with torch.autocast(self.device.type, enabled=False):
                self.features |= self.encode(new)
        return self.handle["interaction"].adapter.scene_tensors(scenes, self.features)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        held_out = [sample_scene(HELD_OUT + n) for n in range(8)]
        items = [(*scene.interactions(), *scene.lone_entities()) for scene in held_out]
        self.handle.set_scene(items)
        captions = [scene.caption_without_verb for scene in held_out]
        drawn = repeatable_call(
            self.pipe,
            **call_arguments(self.pipe, captions, guidance_scale=self.config.guidance_scale),
            height=SIZE,
            width=SIZE,
            num_inference_steps=self.config.sample_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        self.handle.clear()
        plain = grid(drawn.cpu() * 2 - 1, 8)
        side = plain.height
        rows = [
            overlay(
                plain.crop((n * side, 0, (n + 1) * side, side)), scene.interactions(), scene.lone_entities()
            )
            for n, scene in enumerate(held_out)
        ]
        sheet = Image.new("RGB", (sum(r.width for r in rows[:4]), 2 * rows[0].height))
        for n, row in enumerate(rows):
            sheet.paste(row, (n % 4 * row.width, n // 4 * row.height))
        return sheet

    def export(self) -> None:
        adapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
        InteractionAdapter.from_tensors(adapter.config, half).save_pretrained(self.config.export_to)
