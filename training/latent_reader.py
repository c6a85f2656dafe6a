"""A network that reads latents of stickworld: what is in each cell, what it does and what it looks like.

`PerceptualLoss` compares its features of the latents that a denoiser estimates with those of the clean ones.
It is trained on latents of renders alone, and no pipeline needs it.
"""

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from interactdiff.stickworld.attribute_reader import PERSON_HEADS, Residual, conv
from interactdiff.stickworld.detector import KINDS
from interactdiff.stickworld.layouts import MOST_THINGS, sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import ACTIONS, HELD_OUT, WorldScene
from interactdiff.training.config import Count, Location, Rate, RecipeConfig
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import (
    as_images,
    cached_latents,
    cached_masks,
    cached_renders,
    packed_masks,
    scenes,
    unpacked_masks,
)

HEADS: dict[str, tuple[str, ...]] = {
    "kind": ("background", *KINDS),
    "action": ("none", *ACTIONS),
    **PERSON_HEADS,  # the patterns of objects are among those of shirts
}
"""What is read of a cell, and the answers. The action is that of the interaction that a thing is part of."""
IGNORED = -100  # cross entropy's own: where something is not there to be read
_COVERED = 0.4  # share of a cell from which on a thing is in it


class LatentReader(ModelMixin, ConfigMixin):
    """Convolutions down to a quarter of the latents' grid for context, and back up to a half of it.

    Args:
        channels: C of the latents.
        widths: channels at the latents' grid, a half and a quarter of it; multiples of 8.
    """

    @register_to_config
    def __init__(self, channels: int = 8, widths: Sequence[int] = (64, 128, 160)):
        super().__init__()
        a, b, c = widths
        self.fine = nn.Sequential(conv(channels, a), Residual(a))
        self.middle = nn.Sequential(conv(a, b, 2), Residual(b), Residual(b))
        self.coarse = nn.Sequential(conv(b, c, 2), Residual(c))
        self.to_middle = nn.Conv2d(c, b, 1)
        self.merge = Residual(b)
        self.out = nn.Conv2d(b, sum(map(len, HEADS.values())), 1)

    def features(self, latents: Tensor) -> tuple[Tensor, ...]:
        """[B, width, h, w] features of [B, C, H, W] latents: three grids from fine to coarse, and one merged.

        H and W are multiples of 4.
        """
        fine = self.fine(latents)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        merged = self.merge(middle + F.interpolate(self.to_middle(coarse), scale_factor=2.0))
        return fine, middle, coarse, merged

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """[B, answers, H/2, W/2] logits of each of `HEADS` for [B, C, H, W] latents."""
        logits = self.out(self.features(latents)[-1]).float()
        return dict(zip(HEADS, logits.split([len(answers) for answers in HEADS.values()], 1), strict=True))


def answers_of(read: Sequence[WorldScene]) -> Tensor:
    """[N, MOST_THINGS, heads] the answer's index for each person and object of scenes; `IGNORED` without."""
    answers = torch.full((len(read), MOST_THINGS, len(HEADS)), IGNORED)
    for row, scene in zip(answers, read, strict=True):
        for n, thing in enumerate(scene.things):
            action = scene.triplets[n // 2].action if n < 2 * len(scene.triplets) else "none"
            values = {"kind": thing.name, "action": action, **thing.appearance.attributes()}
            for head, (name, known) in enumerate(HEADS.items()):
                if name in values:
                    row[n, head] = known.index(values[name])
    return answers


def cell_answers(answers: Tensor, masks: Tensor, side: int) -> Tensor:
    """[B, heads, side, side] the answer's index for every cell; the background's other heads are `IGNORED`.

    Args:
        answers: [B, K, heads] of the persons and objects, see `answers_of`.
        masks: [B, K, S, S] in [0, 1], their silhouettes; the last of those in a cell is the one it is of.
        side: of the grid.
    """
    covered = F.adaptive_avg_pool2d(masks, side) > _COVERED
    cells = torch.full((len(answers), answers.shape[2], side, side), IGNORED, device=answers.device)
    cells[:, 0] = 0
    for here, answer in zip(covered.unbind(1), answers.unbind(1), strict=True):
        cells = torch.where(here[:, None], answer[:, :, None, None], cells)
    return cells


class LatentReaderConfig(RecipeConfig):
    """The keys of `LatentReaderRecipe`.

    Attributes:
        batch_size: pictures of a step.
        cache_dir: where renders, silhouettes and latents are kept.
        renders: how many, of `size` pixels.
        size: height and width of the pictures.
        vae: folder of the autoencoder whose latents are read.
        widths: of `LatentReader`.
        latent_noise: standard deviation up to which latents bear noise.
    """

    batch_size: Count
    cache_dir: Location
    renders: Count
    size: Count
    vae: Location
    widths: tuple[Count, Count, Count]
    latent_noise: Rate


class LatentReaderRecipe(Recipe[LatentReaderConfig]):
    """Trains a `LatentReader` on latents of renders and on what the renderer knows of each cell."""

    config_type = LatentReaderConfig

    def build(self) -> nn.Module:
        config, cache = self.config, Path(self.config.cache_dir)
        vae: Any = AutoencoderTiny.from_pretrained(config.vae).float().to(self.device).eval()
        self.latents = cached_latents(cache, vae, cached_renders(cache, config.renders, config.size))
        self.masks = cached_masks(cache, config.renders)
        self.answers = answers_of(scenes(config.renders))
        self.vae = vae.requires_grad_(False)
        return LatentReader(self.latents.shape[1], config.widths)

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config.seed, step))
        chosen = rng.integers(len(self.latents), size=self.config.batch_size)
        latents = self.latents[chosen].float()
        cells = cell_answers(self.answers[chosen], unpacked_masks(self.masks[chosen]), latents.shape[2] // 2)
        return {"latents": latents.to(self.device), "cells": cells.to(self.device)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        latents = batch["latents"]
        most = torch.rand(len(latents), 1, 1, 1, generator=generator, device=generator.device)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device)
        read = self.model(latents + (self.config.latent_noise * most * noise).to(latents))
        return reading_loss(read, batch["cells"])

    @cached_property
    @torch.no_grad()
    def _held_out(self) -> tuple[Tensor, Tensor]:
        seeds = range(HELD_OUT, HELD_OUT + 64)
        held_out = [sample_scene(seed) for seed in seeds]
        images = as_images(np.stack([render(scene, self.config.size).image for scene in held_out]))
        latents = self.vae.encode(images.to(self.device)).latents
        cells = cell_answers(answers_of(held_out), unpacked_masks(packed_masks(seeds)), latents.shape[2] // 2)
        return latents, cells.to(self.device)

    @torch.no_grad()
    def sample(self) -> None:
        """No picture: logs the share of held-out cells of persons and objects that each head reads right."""
        latents, cells = self._held_out
        line: dict[str, float] = {"step": self.step}
        for n, (name, logits) in enumerate(self.model(latents).items()):
            there = (cells[:, n] != IGNORED) & (cells[:, 0] > 0)
            line[name] = (logits.argmax(1) == cells[:, n])[there].float().mean().item()
        with (self.output / "read.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def export(self) -> None:
        model = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        model.half().save_pretrained(self.config.export_to)


def reading_loss(read: dict[str, Tensor], answers: Tensor) -> Tensor:
    """The sum over heads of the cross entropy of logits with the right answers.

    Args:
        read: for each head [B, answers, ...] logits, of cells [B, answers, h, w] or of pictures [B, answers].
        answers: [B, heads, ...] the right answers' indices; `IGNORED` where there is nothing to be read.
    """
    losses = [
        F.cross_entropy(logits, right, ignore_index=IGNORED)
        for logits, right in zip(read.values(), answers.unbind(1), strict=True)
        if (right != IGNORED).any()
    ]
    return torch.stack(losses).sum()
