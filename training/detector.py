"""The detector that scores stickworld pictures, trained on renders only."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from torch import Tensor, nn

from interactdiff.evaluation.attributes import head_accuracies
from interactdiff.stickworld.attribute_reader import OBJECT_HEADS, PERSON_HEADS
from interactdiff.stickworld.detector import KINDS, Detections, Detector, Maps, cell_middles
from interactdiff.stickworld.layouts import MOST_ENTITIES, MOST_INTERACTIONS, sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import ACTIONS, HELD_OUT, WorldScene
from interactdiff.training.config import (
    Count,
    Location,
    RecipeConfig,
    arguments_named,
    arguments_of,
)
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import cached_renders

_MOST = MOST_INTERACTIONS + MOST_ENTITIES  # persons, and objects, in a scene
_REACH = 1 / 32  # standard deviation of a centre's heat, one cell
_JITTER = 0.06  # of a side of a crop, as a share of the box: the boxes that are found are not exact
_LATENT_NOISE = 0.1  # most noise on latents of variance 1
_HEADS = (PERSON_HEADS, OBJECT_HEADS)


class DetectorConfig(RecipeConfig):
    """The keys of `DetectorRecipe`.

    Attributes:
        batch_size: pictures of a step.
        cache_dir: where renders are kept.
        renders: how many.
        held_out: how many renders are for the accuracies.
        autoencoders: folders of `AutoencoderTiny`s; half of the pictures are passed through one of them.
        model: arguments of `Detector`.
    """

    batch_size: Count
    cache_dir: Location
    renders: Count
    held_out: Count
    autoencoders: tuple[Location, ...] = ()
    model: Annotated[dict[str, Any], arguments_of(Detector, arguments_named(Detector))]


class DetectorRecipe(Recipe[DetectorConfig]):
    """Trains a `Detector` on renders that are blurred, made noisy and recoloured a little.

    Beside each sample sheet a line of `accuracy.jsonl` tells the accuracy of every head on held-out renders,
    as they are and passed through each autoencoder.
    """

    config_type = DetectorConfig

    def build(self) -> nn.Module:
        count = self.config.renders
        detector = Detector(**self.config.model)
        self.renders = cached_renders(Path(self.config.cache_dir), count, detector.size)
        self.truth = scene_truth([sample_scene(seed) for seed in range(count)])
        self.autoencoders: list[Any] = []
        for folder in self.config.autoencoders:
            autoencoder = AutoencoderTiny.from_pretrained(folder).float().requires_grad_(False).eval()
            self.autoencoders.append(autoencoder.to(self.device))
        self.held_out = [sample_scene(HELD_OUT + n) for n in range(self.config.held_out)]
        self.held_out_renders: np.ndarray | None = None  # drawn when they are first looked at
        return detector

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config.seed, step))
        chosen = np.sort(rng.integers(len(self.renders), size=self.config.batch_size))
        truth = {
            name: values[torch.from_numpy(chosen)].to(self.device) for name, values in self.truth.items()
        }
        return {"images": as_pictures(self.renders[chosen]).to(self.device), "truth": truth}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        images, truth = batch["images"], batch["truth"]
        half = len(images) // 2 if self.autoencoders else 0
        parts = images[:half].tensor_split(max(1, len(self.autoencoders)))
        passed = [self.autoencoded(*one, generator) for one in zip(parts, self.autoencoders, strict=False)]
        images = roughened(torch.cat([*passed, images[half:]]), generator)
        boxes = tuple(shaken(boxes, generator) for boxes in present_boxes(truth))
        maps = self.model(images, boxes)
        return detection_loss(maps, truth) + attribute_loss(maps.attributes, truth)

    @torch.no_grad()
    def autoencoded(
        self, images: Tensor, autoencoder: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1], encoded and decoded; a generator adds noise to the latents."""
        latents = autoencoder.encode(2 * images.to(self.device) - 1).latents
        if generator is not None:
            amount = _LATENT_NOISE * _uniform(generator, 0, 1, len(latents), 1, 1, 1)
            latents = latents + (amount * _normal(generator, *latents.shape)).to(latents)
        return (autoencoder.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        if self.held_out_renders is None:
            size = self.accelerator.unwrap_model(self.model).size
            self.held_out_renders = np.stack([render(scene, size).image for scene in self.held_out])
        row: dict[str, Any] = {"step": self.step}
        found = self._found()
        row["renders"] = head_accuracies(found, self.held_out)
        for folder, autoencoder in zip(self.config.autoencoders, self.autoencoders, strict=True):
            row[folder] = head_accuracies(self._found(autoencoder), self.held_out)
        with (self.output / "accuracy.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        return sheet(self.held_out_renders, found)

    def _found(self, autoencoder: Any = None) -> list[Detections]:
        """What is in the held-out renders, passed through an autoencoder if there is one."""
        assert self.held_out_renders is not None
        detector = self.accelerator.unwrap_model(self.model)
        found: list[Detections] = []
        for first in range(0, len(self.held_out_renders), 32):
            images = as_pictures(self.held_out_renders[first : first + 32])
            found += detector.detect(self.autoencoded(images, autoencoder) if autoencoder else images)
        return found

    def export(self) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(self.config.export_to)


def as_pictures(pixels: np.ndarray) -> Tensor:
    """[B, S, S, 3] uint8 to [B, 3, S, S] float32 in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255


def sheet(pixels: np.ndarray, found: list[Detections]) -> Image.Image:
    """The first sixteen pictures with the triplets that are found in them."""
    paper = Image.new("RGB", (8 * 192, 2 * 192))
    for i in range(min(16, len(found))):
        picture = Image.fromarray(pixels[i]).resize((192, 192))
        draw = ImageDraw.Draw(picture)
        for triplet in found[i].triplets:
            for thing, ink in ((triplet.person, "black"), (triplet.object, "white")):
                draw.rectangle([192 * v for v in thing.box], outline=ink)
            text = f"{triplet.action} {triplet.object.colour} {triplet.object.name} {triplet.score:.2f}"
            draw.text((192 * triplet.person.box[0], 192 * triplet.person.box[1]), text, fill="black")
        paper.paste(picture, (i % 8 * 192, i // 8 * 192))
    return paper


def scene_truth(scenes: list[WorldScene]) -> dict[str, Tensor]:
    """What the detector should say of scenes, padded to five persons and five objects.

    Returns:
        present [S, 2, 5] bool, of persons and of objects; boxes [S, 2, 5, 4] xyxy in 0..1; kinds [S, 5]
        indices of objects; actions [S, 5] of persons, the one beyond `ACTIONS` for none; targets [S, 5] the
        object that a person acts on; attributes [S, 2, 5, A] indices in the order of `PERSON_HEADS` and
        `OBJECT_HEADS`, -1 for one that the thing does not have.
    """
    count, most = len(scenes), max(map(len, _HEADS))
    truth = {
        "present": torch.zeros(count, 2, _MOST, dtype=torch.bool),
        "boxes": torch.full((count, 2, _MOST, 4), -9.0),  # where nothing is, far from every cell
        "kinds": torch.zeros(count, _MOST, dtype=torch.long),
        "actions": torch.full((count, _MOST), len(ACTIONS)),
        "targets": torch.full((count, _MOST), -1),
        "attributes": torch.full((count, 2, _MOST, most), -1),
    }
    for i, scene in enumerate(scenes):
        numbers = [0, 0]
        for thing in scene.things:
            role = int(thing.name != "person")
            j, numbers[role] = numbers[role], numbers[role] + 1
            truth["present"][i, role, j] = True
            truth["boxes"][i, role, j] = torch.tensor(thing.box)
            if role:
                truth["kinds"][i, j] = KINDS.index(thing.name)
            shown = thing.appearance.attributes()
            for k, (name, values) in enumerate(_HEADS[role].items()):
                if name in shown:
                    truth["attributes"][i, role, j, k] = values.index(shown[name])
        for j, triplet in enumerate(scene.triplets):  # which come first among persons and among objects
            truth["actions"][i, j] = ACTIONS.index(triplet.action)
            truth["targets"][i, j] = j
    return truth


def present_boxes(truth: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of the persons and of the objects that are there: boxes [N, 4], and [N] the pictures they are of."""
    found = []
    for role in (0, 1):
        pictures, numbers = truth["present"][:, role].nonzero(as_tuple=True)
        found.append((truth["boxes"][pictures, role, numbers], pictures))
    return found


def shaken(boxes: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes and their pictures, each side of a box moved by up to `_JITTER` of the box."""
    xyxy, pictures = boxes
    sides = (xyxy[:, 2:] - xyxy[:, :2]).repeat(1, 2)
    return xyxy + _uniform(generator, -_JITTER, _JITTER, *xyxy.shape).to(xyxy) * sides, pictures


def attribute_loss(attributes: tuple[dict[str, Tensor], ...], truth: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every attribute, averaged over the things that have it and summed.

    Args:
        attributes: what the detector says of all persons, and of all objects, that are there.
        truth: as `scene_truth` has it.
    """
    loss = truth["boxes"].new_zeros(())
    for role, logits in enumerate(attributes):
        wanted = truth["attributes"][:, role][truth["present"][:, role]]
        for k, values in enumerate(logits.values()):
            total = F.cross_entropy(values, wanted[:, k], ignore_index=-1, reduction="sum")
            loss = loss + total / (wanted[:, k] >= 0).sum().clamp(min=1)
    return loss


def detection_loss(maps: Maps, truth: dict[str, Tensor]) -> Tensor:
    """Focal loss of the heatmaps, and around each centre the losses of what belongs to the thing there.

    Args:
        maps: what the detector says.
        truth: as `scene_truth` has it, of as many pictures.
    """
    middles = cell_middles(maps.heat.shape[-1], maps.heat.device)
    boxes, present = truth["boxes"], truth["present"]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2  # [B, 2 roles, 5, 2]
    squared = (middles - centres[..., None, None]).square().sum(3)  # [B, 2 roles, 5, G, G]
    # from the cell that holds the centre, so that its target is 1
    glow = torch.exp(-(squared - squared.amin((-1, -2), keepdim=True)) / (2 * _REACH**2))
    glow = glow * present[..., None, None]
    kinds = F.one_hot(truth["kinds"], len(KINDS))[..., None, None]  # [B, 5, 1 + O, 1, 1]
    objects_heat = (glow[:, 1, :, None] * kinds).amax(1)
    target = torch.cat([glow[:, 0].amax(1)[:, None], objects_heat[:, 1:]], 1)
    loss = focal_loss(maps.heat, target) / (present.sum() / 2)

    weight, owner = glow.max(2)  # [B, 2 roles, G, G]: the thing of each role that a cell speaks for
    weight = weight * (weight > 0.3)
    batch = torch.arange(len(owner), device=owner.device)[:, None, None]
    for role in (0, 1):
        box = boxes[batch, role, owner[:, role]].permute(0, 3, 1, 2)
        here = torch.cat([middles - box[:, :2], box[:, 2:] - middles], 1)
        loss = loss + 10 * mean_over((maps.boxes[:, role] - here).abs().sum(1), weight[:, role])
    mine = owner[:, 0]
    action = truth["actions"][batch, mine]
    loss = loss + mean_over(F.cross_entropy(maps.actions, action, reduction="none"), weight[:, 0])
    aim = truth["targets"][batch, mine]
    towards = centres[batch, 1, aim.clamp(min=0)].permute(0, 3, 1, 2) - middles
    return loss + 4 * mean_over((maps.towards - towards).abs().sum(1), weight[:, 0] * (aim >= 0))


def mean_over(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of values; 0 where nothing has weight."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Summed over everything; CenterNet's equation 1 with alpha 2 and beta 4, where target 1 is a centre."""
    sure = F.logsigmoid(logits)
    unsure = F.logsigmoid(-logits)
    hit = target > 0.999
    missed = -(unsure.exp().square() * sure)[hit].sum()
    false = -((1 - target) ** 4 * sure.exp().square() * unsure)[~hit].sum()
    return missed + false


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device)


def roughened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] made less clean, so that the detector does not rely on exact pixels.

    Each is blurred or scaled down and up again, recoloured, and given fine and coarse noise, all by a random
    amount; a quarter stay as they are.
    """
    count, _, size, _ = images.shape
    each = (count, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    scale = float(_uniform(generator, 0.5, 0.9, 1))
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    coarse = F.interpolate(small, (size, size), mode="bilinear")
    softened = torch.where(_uniform(generator, 0, 1, *each) < 0.5, blurred, coarse)
    rough = images.lerp(softened, _uniform(generator, 0, 1, *each))
    rough = rough * _uniform(generator, 0.88, 1.12, count, 3, 1, 1)
    rough = rough + _uniform(generator, -0.07, 0.07, count, 3, 1, 1)
    fine = _normal(generator, *images.shape)
    patches = _normal(generator, count, 3, size // 8, size // 8)
    patches = F.interpolate(patches, (size, size), mode="bilinear")
    rough = rough + _uniform(generator, 0, 0.06, *each) * fine
    rough = rough + _uniform(generator, 0, 0.08, *each) * patches
    clean = _uniform(generator, 0, 1, *each) < 0.25
    return torch.where(clean, images, rough.clamp(0, 1))
