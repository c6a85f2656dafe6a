"""The image tower of stickworld's subject encoders: it stands in for CLIP's, which never saw such pictures.

A CLIP vision model that learns to tell the kind and the looks of a person or an object in a close-up. The
classifier sees only the mean of the tokens. An untrained attention computes nearly that mean, so the encoder
has this information from the start.
"""

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT, WorldScene
from interactdiff.subject.config import CLIP_LARGE
from interactdiff.subject.encoder import in_clip_units, squared
from interactdiff.subject.foreground import foreground
from interactdiff.subject.items import Subject
from interactdiff.training.config import Count, Location, Rate, RecipeConfig, arguments_of
from interactdiff.training.latent_reader import HEADS as CELL_HEADS
from interactdiff.training.latent_reader import IGNORED, answers_of, reading_loss
from interactdiff.training.recipe import Recipe
from interactdiff.training.subject_config import Shrinking, new_tower
from interactdiff.training.world_data import as_images, cached_pictures

HEADS = {name: answers for name, answers in CELL_HEADS.items() if name != "action"}
"""What is read of a close-up, and the answers."""
LOOKED_AT = 256  # close-ups that decide whether those in the cache are as they would be drawn now


class LooksReader(nn.Module):
    """An image tower, and what reads `HEADS` off the mean of its last hidden states.

    Args:
        vision: of the tower, what a `CLIPVisionConfig` takes.
    """

    def __init__(self, vision: dict[str, Any]):
        super().__init__()
        self.tower = new_tower(**vision).requires_grad_(True)
        self.out = nn.Linear(self.tower.config.hidden_size, sum(map(len, HEADS.values())))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, answers] logits of each of `HEADS` for [B, 3, S, S] pictures in [-1, 1]."""
        states = self.tower(in_clip_units(images / 2 + 0.5), output_hidden_states=True).hidden_states[-1]
        logits = self.out(F.layer_norm(states, states.shape[-1:]).mean(1)).float()
        return dict(zip(HEADS, logits.split([len(answers) for answers in HEADS.values()], 1), strict=True))


def portrait(seed: int) -> WorldScene:
    """A scene whose first person or object nothing hides: alone, or a person in front of an object."""
    return sample_scene(seed, *((1, 0) if seed % 3 == 0 else (0, 1)))


def close_ups(seeds: Sequence[int], size: int) -> np.ndarray:
    """[N, size, size, 3] uint8: the first person or object of each scene, as an image tower sees it."""
    pictures = []
    for seed in seeds:
        scene = portrait(seed)
        drawn = render(scene, size)
        mask = Image.fromarray(drawn.things[0].mask.astype(np.uint8) * 255)
        subject = Subject(scene.things[0].name, Image.fromarray(drawn.image), mask)
        pictures.append(np.asarray(squared(foreground(subject).seen(close_up=True), size)))
    return np.stack(pictures)


def looks(seeds: Sequence[int]) -> Tensor:
    """[N, heads] the answers of the first person or object of each scene; `IGNORED` where there is none."""
    kept = [n for n, name in enumerate(CELL_HEADS) if name in HEADS]
    return answers_of([portrait(seed) for seed in seeds])[:, 0, kept]


class ImageTowerConfig(RecipeConfig):
    """The keys of `ImageTowerRecipe`.

    Attributes:
        batch_size: close-ups of a step.
        cache_dir: where they are kept.
        portraits: how many.
        held_out: how many others the accuracies in the log are of.
        vision: of the tower, what a `CLIPVisionConfig` takes.
        rotation: degrees by which a close-up is turned, at most, either way.
        scale: by which share it is smaller, at most.
    """

    batch_size: Count
    cache_dir: Location
    portraits: Count
    held_out: Count
    vision: Annotated[dict[str, Any], arguments_of(new_tower, CLIP_LARGE)]
    rotation: Rate = 15.0
    scale: Shrinking = 0.25


class ImageTowerRecipe(Recipe[ImageTowerConfig]):
    """Trains a `LooksReader` on renders, and exports its tower as transformers loads it."""

    config_type = ImageTowerConfig

    def build(self) -> nn.Module:
        reader, seeds = LooksReader(self.config.vision), range(self.config.portraits)
        self.side: int = reader.tower.config.image_size
        folder = Path(self.config.cache_dir)
        self.pictures = cached_pictures(folder, "close-ups", close_ups, seeds, self.side, LOOKED_AT)
        self.answers, self.accuracies = looks(seeds), dict[str, float]()
        return reader

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config.seed, step))
        chosen = np.sort(rng.integers(len(self.pictures), size=self.config.batch_size))
        images = as_images(self.pictures[chosen]).to(self.device)
        return {"images": images, "answers": self.answers[chosen].to(self.device)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # coordinates of 8 bits would be too coarse
            images = augmented(batch["images"], self.config.rotation, self.config.scale, generator)
        return reading_loss(self.model(images), batch["answers"])

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        seeds = range(HELD_OUT, HELD_OUT + self.config.held_out)
        return as_images(close_ups(seeds, self.side)), looks(seeds)

    @torch.no_grad()
    def sample(self) -> None:
        """No picture: the accuracies."""
        images, answers = self._held_out
        parts = [self.model(part.to(self.device)) for part in images.split(64)]
        for n, name in enumerate(HEADS):
            there = answers[:, n] != IGNORED
            said = torch.cat([part[name].argmax(1).cpu() for part in parts])
            if there.any():
                self.accuracies[name] = (said == answers[:, n])[there].float().mean().item()

    def scores(self) -> dict[str, float]:
        """The share of held-out close-ups of which each head is right."""
        return self.accuracies

    def export(self) -> None:
        tower = copy.deepcopy(self.accelerator.unwrap_model(self.model).tower)
        tower.half().save_pretrained(self.config.export_to)


def augmented(images: Tensor, rotation: float, scale: float, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S] in [-1, 1], mirrored half of the time, turned and reduced, white around them.

    Args:
        images: square.
        rotation: degrees, at most, either way.
        scale: by which share they are smaller, at most; below 1.
        generator: draws how.
    """
    turn, size, flip = torch.rand(3, len(images), generator=generator, device=generator.device).to(images)
    angle, by = (2 * turn - 1) * rotation * math.pi / 180, 1 / (1 - size * scale)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * by, -angle.sin() * by
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * by, angle.cos() * by
    theta[:, :, 0] *= torch.where(flip < 0.5, -1.0, 1.0)[:, None]
    where = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, where, align_corners=False)  # beyond its edges the sampler has zeros
