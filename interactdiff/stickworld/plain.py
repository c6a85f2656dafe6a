"""The plain world that the packaged U-Net of 96 px was trained on: undecorated pictograms, one or two
interactions, no entities. It goes when models of the whole world take their place."""

import random
from dataclasses import dataclass

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import COLOURS, Appearance, PersonAppearance
from interactdiff.stickworld.captions import PLACES, Caption, Described, article
from interactdiff.stickworld.world import (
    BACKGROUNDS,
    GROUPS,
    OBJECTS,
    Triplet,
    WorldScene,
)

_PERSON = ("a person in {}", "a person wearing {}", "someone in {}", "a person in a {} shirt")


@dataclass(frozen=True)
class PlainScene(WorldScene):
    """One or two interactions of undecorated pictograms."""

    @property
    def background_seed(self) -> int | str:
        """What draws small variations of the background."""
        return self.seed

    def in_words(self, rng: random.Random, verbs: bool = True) -> Caption:
        """Describe the scene in words, with varied wording."""
        clauses = []
        for t in self.triplets:
            person = rng.choice(_PERSON).format(t.subject_colour).replace("a orange", "an orange")
            thing = article(f"{t.object_colour} {t.object}")
            clauses.append(f"{person} {t.action} {thing}" if verbs else f"{person} and {thing}")
        place = rng.choice(PLACES[self.background])
        text = " and ".join(clauses)
        text = f"{place}, {text}" if rng.random() < 0.3 else f"{text} {place}"
        things = tuple(
            Described(thing.name, {"colour": thing.appearance.colour}, (0, len(text)))
            for thing in self.things
        )
        return Caption(
            text, things, tuple(t.action if verbs else None for t in self.triplets), self.background
        )


def _layout(group: str, aspect: float, rng: random.Random) -> tuple[Box, Box]:
    """Boxes of person and object, facing right, in units of the person's height with feet at y = 1."""
    width = rng.uniform(0.54, 0.62)
    person = (0.0, 0.0, width, 1.0)

    def sized(limit_w: float, limit_h: float) -> tuple[float, float]:
        height = min(limit_h, limit_w / aspect) * rng.uniform(0.9, 1.05)
        return height * aspect, height

    if group == "beside":
        w, h = sized(0.72, 0.56)
        x = width - rng.uniform(0.02, 0.06)
        return person, (x, 1.0 - h, x + w, 1.0)
    if group == "atop":
        w, h = sized(0.90, 0.62)
        x = width / 2 - w / 2 + rng.uniform(-0.04, 0.04)
        y = 1.0 - rng.uniform(0.22, 0.30) * h
        return person, (x, y, x + w, y + h)
    if group == "overhead":
        w, h = sized(0.72, 0.45)
        x = width / 2 - w / 2 + rng.uniform(-0.03, 0.03)
        y = rng.uniform(0.02, 0.05)
        return person, (x, y - h, x + w, y)
    w, h = sized(0.58, 0.46)  # at hand
    x = width - rng.uniform(0.12, 0.18)
    y = 0.50 - h / 2 + rng.uniform(-0.04, 0.04)
    return person, (x, y, x + w, y + h)


def _place(group: str, obj: str, cell: tuple[float, float], rng: random.Random) -> tuple[Box, Box, str]:
    """Put a layout into the part of the frame between the x-coordinates `cell`."""
    person, thing = _layout(group, OBJECTS[obj], rng)
    left, top = min(person[0], thing[0]), min(person[1], thing[1])
    width, height = max(person[2], thing[2]) - left, max(person[3], thing[3]) - top
    room_x, room_y = cell[1] - cell[0] - 0.02, 0.94
    largest = min(room_x / width, room_y / height, 0.72)
    scale = largest * rng.uniform(0.86, 1.0)
    x0 = cell[0] + 0.01 + rng.uniform(0.0, room_x - scale * width)
    bottom = rng.uniform(max(0.02 + scale * height, 0.84), 0.975)
    facing = rng.choice(("left", "right"))

    def to_frame(box: Box) -> Box:
        a, b = (box[0] - left) * scale, (box[2] - left) * scale
        if facing == "left":
            a, b = width * scale - b, width * scale - a
        lift = bottom - (height + top) * scale
        return (x0 + a, lift + box[1] * scale, x0 + b, lift + box[3] * scale)

    return to_frame(person), to_frame(thing), facing


def sample_plain_scene(seed: int, n_interactions: int | None = None) -> PlainScene:
    """Draw a scene of the plain world; the same seed gives the same scene.

    Args:
        seed: scenes for scoring start at `HELD_OUT`.
        n_interactions: 1 or 2; None draws it.
    """
    rng = random.Random(seed)
    count = n_interactions if n_interactions is not None else rng.choice((1, 1, 2))
    background = rng.choice(BACKGROUNDS)
    cells = [(0.0, 1.0)] if count == 1 else [(0.0, 0.51), (0.49, 1.0)]
    triplets = []
    for cell in cells:
        group = rng.choice(tuple(GROUPS))
        action = rng.choice(GROUPS[group])
        obj = rng.choice(tuple(OBJECTS))
        subject_box, object_box, facing = _place(group, obj, cell, rng)
        triplets.append(
            Triplet(
                action=action,
                object=obj,
                subject_appearance=PersonAppearance(rng.choice(tuple(COLOURS))),
                object_appearance=Appearance(rng.choice(tuple(COLOURS))),
                subject_box=subject_box,
                object_box=object_box,
                facing=facing,
            )
        )
    rng.shuffle(triplets)
    return PlainScene(background, tuple(triplets), seed)
