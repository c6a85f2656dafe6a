"""A picture with something over it: the layout, what a detector finds, or attention maps."""

import threading
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from interactdiff.evaluation.world import packaged_detector
from interactdiff.interaction.maps import ROLES, AttentionMaps
from interactdiff.picture import enlarged, overlay
from interactdiff.scene import Entity, Interaction, Scene
from interactdiff.stickworld.detector import Detections

VIEWS = ("Picture", "Layout", "Detections", "Attention")
MIN_SCORE = 0.3  # least score of a person, an object or an interaction that is shown
# cold to hot, for eyes that do not tell red from green as well
HEAT = np.array([[12, 7, 66], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)

_DETECTING = threading.Lock()


_loaded_detector = cache(packaged_detector)


def detections_in(image: Image.Image) -> Detections:
    """What the packaged detector finds in a picture."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
    with torch.no_grad():
        return _loaded_detector().detect(pixels.permute(2, 0, 1)[None])[0]


def detections_over(image: Image.Image) -> tuple[Image.Image, str]:
    """The detections drawn over the picture, and in words.

    Of a person's interactions the one with the highest score is shown; persons and objects without any stand
    alone.
    """
    found = detections_in(image)
    interactions, persons, objects = [], set(), set()
    for one in found.triplets:
        if one.score < MIN_SCORE or one.person in persons:
            continue
        persons.add(one.person)
        objects.add(one.object)
        who, what = (f"{end.colour} {end.name} {end.score:.2f}" for end in (one.person, one.object))
        interactions.append(
            Interaction(who, f"{one.action} {one.score:.2f}", what, one.person.box, one.object.box)
        )
    lone = [
        one
        for one in (*found.persons, *found.objects)
        if one not in persons | objects and one.score >= MIN_SCORE
    ]
    entities = tuple(Entity(f"{one.colour} {one.name} {one.score:.2f}", one.box) for one in lone)
    words = [f"{one.subject}, {one.action}, {one.object}" for one in interactions]
    words += [one.phrase for one in entities]
    return overlay(image, tuple(interactions), entities), "; ".join(words) or "nothing above the least score"


@lru_cache(16)
def detections_in_file(path: Path) -> tuple[Image.Image, str]:
    """The same of a picture's file, whose pixels never change; one at a time, whoever asks.

    Raises:
        FileNotFoundError: it is gone.
    """
    with _DETECTING, Image.open(path) as image:
        return detections_over(image.convert("RGB"))


def attention_over(
    image: Image.Image, maps: AttentionMaps, role: str, slot: int, step: int | None = None
) -> Image.Image:
    """The picture in grey, and over it how much each region attends to a token, the hottest as 1.

    Args:
        image: the picture.
        maps: recorded as it was drawn.
        role: of the token.
        slot: which of the scene's items.
        step: a recorded step; None is the mean of all.

    Raises:
        ValueError: there is no such token or step.
    """
    weights = maps.of(role, slot, step)
    big = enlarged(image)
    size = (big.height, big.width)
    heat = F.interpolate((weights / weights.amax().clamp_min(1e-12))[None, None], size, mode="bicubic")[0, 0]
    at = heat.clamp(0, 1).numpy() * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    colours = HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (at - low)[..., None]
    grey = np.asarray(big.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * colours).round().astype(np.uint8))


def recorded_tokens(scene: Scene) -> list[tuple[str, str]]:
    """The tokens whose attention was recorded: how people read them, and `role slot`."""
    found = []
    for slot, item in enumerate((*scene.interactions, *scene.entities)):
        if isinstance(item, Entity):
            found.append((f"entity: {item.phrase}", f"subject {slot}"))
            continue
        number = f"{slot + 1} " if len(scene.interactions) > 1 else ""
        for role, phrase in zip(ROLES, (item.subject, item.action, item.object), strict=True):
            if phrase is not None:
                found.append((f"{number}{role}: {phrase}", f"{role} {slot}"))
    return found
