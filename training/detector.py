"""The detector that scores stickworld pictures, trained on renders only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from interactdiff.stickworld.detector import COLOUR_NAMES, KINDS, Detector, Maps, cell_middles
from interactdiff.stickworld.world import ACTIONS, WorldScene, sample_scene
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import cached_renders

_MOST = 2  # triplets in a scene
_REACH = 1 / 24  # standard deviation of a centre's heat, one cell


class DetectorRecipe(Recipe):
    """Trains a `Detector` on renders that are blurred, made noisy and recoloured a little.

    Extra configuration keys: `cache_dir`, `renders`, `model` (arguments of `Detector`), `export_to`.
    """

    def build(self) -> nn.Module:
        count = self.config["renders"]
        self.renders = cached_renders(Path(self.config["cache_dir"]), count)
        self.truth = scene_truth([sample_scene(seed) for seed in range(count)])
        return Detector(**self.config["model"])

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config["seed"], step))
        chosen = np.sort(rng.integers(len(self.renders), size=self.config["batch_size"]))
        pixels = torch.from_numpy(self.renders[chosen]).permute(0, 3, 1, 2).float() / 255
        truth = {
            name: values[torch.from_numpy(chosen)].to(self.device) for name, values in self.truth.items()
        }
        return {"images": pixels, "truth": truth}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        images = roughened(batch["images"], generator).to(self.device)
        return detection_loss(self.model(images), batch["truth"])

    @torch.no_grad()
    def sample(self) -> Image.Image:
        pixels = np.array(self.renders[:16])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(self.device) / 255
        detector = self.accelerator.unwrap_model(self.model)
        sheet = Image.new("RGB", (8 * 192, 2 * 192))
        for i, found in enumerate(detector.detect(images)):
            picture = Image.fromarray(pixels[i]).resize((192, 192))
            draw = ImageDraw.Draw(picture)
            for triplet in found.triplets:
                for thing, ink in ((triplet.person, "black"), (triplet.object, "white")):
                    draw.rectangle([192 * v for v in thing.box], outline=ink)
                text = f"{triplet.action} {triplet.object.colour} {triplet.object.name} {triplet.score:.2f}"
                draw.text((192 * triplet.person.box[0], 192 * triplet.person.box[1]), text, fill="black")
            sheet.paste(picture, (i % 8 * 192, i // 8 * 192))
        return sheet

    def export(self) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(self.config["export_to"])


def scene_truth(scenes: list[WorldScene]) -> dict[str, Tensor]:
    """What the detector should say of scenes, padded to two triplets.

    Returns:
        present [S, 2] bool; boxes [S, 2, 2, 4] xyxy in 0..1, of person and object; kinds [S, 2] and actions
        [S, 2] indices; colours [S, 2, 2] indices, of person and object.
    """
    count = len(scenes)
    truth = {
        "present": torch.zeros(count, _MOST, dtype=torch.bool),
        "boxes": torch.full((count, _MOST, 2, 4), -9.0),  # where nothing is, far from every cell
        "kinds": torch.zeros(count, _MOST, dtype=torch.long),
        "actions": torch.zeros(count, _MOST, dtype=torch.long),
        "colours": torch.zeros(count, _MOST, 2, dtype=torch.long),
    }
    for i, scene in enumerate(scenes):
        for j, t in enumerate(scene.triplets):
            truth["present"][i, j] = True
            truth["boxes"][i, j] = torch.tensor([t.subject_box, t.object_box])
            truth["kinds"][i, j] = KINDS.index(t.object)
            truth["actions"][i, j] = ACTIONS.index(t.action)
            colours = (COLOUR_NAMES.index(t.subject_colour), COLOUR_NAMES.index(t.object_colour))
            truth["colours"][i, j] = torch.tensor(colours)
    return truth


def detection_loss(maps: Maps, truth: dict[str, Tensor]) -> Tensor:
    """Focal loss of the heatmaps, and around each centre the losses of what belongs to the thing there.

    Args:
        maps: what the detector says.
        truth: as `scene_truth` has it, of as many pictures.
    """
    middles = cell_middles(maps.heat.device)
    boxes = truth["boxes"]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2  # [B, 2 triplets, 2 roles, 2]
    squared = (middles - centres[..., None, None]).square().sum(3)  # [B, 2 triplets, 2 roles, G, G]
    # from the cell that holds the centre, so that its target is 1
    glow = torch.exp(-(squared - squared.amin((-1, -2), keepdim=True)) / (2 * _REACH**2))
    glow = glow * truth["present"][:, :, None, None, None]
    kinds = F.one_hot(truth["kinds"], len(KINDS))[..., None, None]  # [B, 2, 1 + O, 1, 1]
    objects_heat = (glow[:, :, 1, None] * kinds).amax(1)
    target = torch.cat([glow[:, :, 0].amax(1)[:, None], objects_heat[:, 1:]], 1)
    loss = focal_loss(maps.heat, target) / truth["present"].sum()

    weight, owner = glow.max(1)  # [B, 2 roles, G, G]: the thing of each role that a cell speaks for
    weight = weight * (weight > 0.3)
    weight = weight / weight.sum((0, 2, 3), keepdim=True).clamp(min=1e-6)
    batch = torch.arange(len(owner), device=owner.device)[:, None, None]
    for role in (0, 1):
        share, mine = weight[:, role], owner[:, role]
        box = boxes[batch, mine, role].permute(0, 3, 1, 2)
        here = torch.cat([middles - box[:, :2], box[:, 2:] - middles], 1)
        loss = loss + 10 * (share * (maps.boxes[:, role] - here).abs().sum(1)).sum()
        colour = truth["colours"][batch, mine, role]
        loss = loss + (share * F.cross_entropy(maps.colours[:, role], colour, reduction="none")).sum()
    share, mine = weight[:, 0], owner[:, 0]
    action = truth["actions"][batch, mine]
    loss = loss + (share * F.cross_entropy(maps.actions, action, reduction="none")).sum()
    towards = centres[batch, mine, 1].permute(0, 3, 1, 2) - middles
    return loss + 4 * (share * (maps.towards - towards).abs().sum(1)).sum()


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Summed over everything; CenterNet's equation 1 with alpha 2 and beta 4, where target 1 is a centre."""
    sure = F.logsigmoid(logits)
    unsure = F.logsigmoid(-logits)
    hit = target > 0.999
    missed = -(unsure.exp().square() * sure)[hit].sum()
    false = -((1 - target) ** 4 * sure.exp().square() * unsure)[~hit].sum()
    return missed + false


def roughened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] made less clean, so that the detector does not rely on exact pixels.

    Each is blurred or scaled down and up again, recoloured, and given fine and coarse noise, all by a random
    amount; a quarter stay as they are.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count, _, size, _ = images.shape
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    small = F.interpolate(images, scale_factor=float(uniform(0.5, 0.9, 1)), mode="bilinear", antialias=True)
    coarse = F.interpolate(small, (size, size), mode="bilinear")
    softened = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, blurred, coarse)
    rough = images.lerp(softened, uniform(0, 1, count, 1, 1, 1))
    rough = rough * uniform(0.88, 1.12, count, 3, 1, 1) + uniform(-0.07, 0.07, count, 3, 1, 1)
    fine = torch.randn(images.shape, generator=generator)
    patches = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    patches = F.interpolate(patches, (size, size), mode="bilinear")
    rough = rough + uniform(0, 0.06, count, 1, 1, 1) * fine + uniform(0, 0.08, count, 1, 1, 1) * patches
    clean = torch.rand(count, 1, 1, 1, generator=generator) < 0.25
    return torch.where(clean, images, rough.clamp(0, 1))
