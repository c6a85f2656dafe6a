"""Draws scenes: what happens, who and what they are, and where they stand.

Boxes depend on the groups of actions and never on the actions; appearances depend on nothing but the seed.
"""

import random
from dataclasses import dataclass

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import sample_object_appearance, sample_person_appearance
from interactdiff.stickworld.world import BACKGROUNDS, GROUPS, OBJECTS, Triplet, WorldEntity, WorldScene

MOST_INTERACTIONS, MOST_ENTITIES = 3, 2
MOST_THINGS = 2 * MOST_INTERACTIONS + MOST_ENTITIES  # persons and objects of a scene
_INTERACTIONS = (0.08, 0.44, 0.32, 0.16)  # probabilities of 0, 1, 2, 3
_ENTITIES = (0.55, 0.30, 0.15)
_LONE_PERSON = 0.35  # probability that an entity is a person


@dataclass(frozen=True)
class _Unit:
    """What stands together, in units of the person's or the object's height, with its feet at y = 1.

    `boxes` are of person and object facing right, or of the one entity.
    """

    boxes: tuple[Box, ...]
    weight: float  # of the width that it gets in its row

    @property
    def extent(self) -> Box:
        x0, y0, x1, y1 = zip(*self.boxes, strict=True)
        return min(x0), min(y0), max(x1), max(y1)


def _interaction(group: str, aspect: float, rng: random.Random) -> _Unit:
    """Boxes of person and object that a group's actions share."""
    width = rng.uniform(0.54, 0.64)
    person = (0.0, 0.0, width, 1.0)

    def sized(widest: float, highest: float) -> tuple[float, float]:
        height = min(highest, widest / aspect) * rng.uniform(0.62, 1.05)
        return height * aspect, height

    if group == "beside":
        w, h = sized(0.85, 0.70)
        x = width - rng.uniform(0.0, 0.08)
        thing = (x, 1.0 - h, x + w, 1.0)
    elif group == "atop":
        w, h = sized(1.15, 0.75)
        x = width / 2 - w / 2 + rng.uniform(-0.06, 0.06)
        covered = rng.uniform(0.15, 0.40) if rng.random() < 0.7 else rng.uniform(0.40, 0.72)
        y = 1.0 - covered * h
        thing = (x, y, x + w, y + h)
    elif group == "overhead":
        w, h = sized(0.85, 0.52)
        x = width / 2 - w / 2 + rng.uniform(-0.05, 0.05)
        y = rng.uniform(0.01, 0.06)
        thing = (x, y - h, x + w, y)
    else:  # at hand
        w, h = sized(0.66, 0.52)
        x = width - rng.uniform(0.10, 0.20)
        y = 0.50 - h / 2 + rng.uniform(-0.05, 0.05)
        thing = (x, y, x + w, y + h)
    return _Unit((person, thing), rng.uniform(0.85, 1.15))


def _place(unit: _Unit, cell: Box, rng: random.Random) -> tuple[tuple[Box, ...], str]:
    """Put a unit into a cell of the frame: its boxes there, and where it faces."""
    left, top, right, bottom = unit.extent
    width, height = right - left, bottom - top
    room_x, room_y = cell[2] - cell[0] - 0.02, cell[3] - cell[1] - 0.02
    least = 0.72 if cell[3] - cell[1] > 0.7 else 0.88  # in two rows what is small would be too small
    scale = min(room_x / width, room_y / height, 0.9) * rng.uniform(least, 1.0)
    x0 = cell[0] + 0.01 + rng.uniform(0.0, room_x - scale * width)
    lowest = cell[3] - 0.01
    floor = rng.uniform(max(cell[1] + 0.01 + scale * height, lowest - 0.16 * (cell[3] - cell[1])), lowest)
    facing = rng.choice(("left", "right"))

    def to_frame(box: Box) -> Box:
        a, b = (box[0] - left) * scale, (box[2] - left) * scale
        if facing == "left":
            a, b = width * scale - b, width * scale - a
        lift = floor - (height + top) * scale
        return (x0 + a, lift + box[1] * scale, x0 + b, lift + box[3] * scale)

    return tuple(to_frame(box) for box in unit.boxes), facing


def _cells(weights: list[float], rng: random.Random) -> list[Box]:
    """A cell of the frame for each unit: side by side, in two rows where they are many."""
    order = list(range(len(weights)))
    rng.shuffle(order)
    rows = [order]
    if sum(weights) > 2.3:
        split = rng.uniform(0.48, 0.54)
        half = len(order) // 2
        if rng.random() < 0.5:
            half = len(order) - half
        rows, bands = [order[:half], order[half:]], [(0.0, split), (split - 0.02, 1.0)]
    else:
        bands = [(0.0, 1.0)]
    cells: list[Box] = [(0.0, 0.0, 1.0, 1.0)] * len(weights)
    for row, (top, bottom) in zip(rows, bands, strict=True):
        total, x = sum(weights[n] for n in row), 0.0
        for n in row:
            width = weights[n] / total
            cells[n] = (max(0.0, x - 0.01), top, min(1.0, x + width + 0.01), bottom)
            x += width
    return cells


def sample_scene(seed: int, n_interactions: int | None = None, n_entities: int | None = None) -> WorldScene:
    """Draw a scene; the same seed and counts give the same scene.

    Args:
        seed: scenes for scoring start at `HELD_OUT`.
        n_interactions: 0 to 3; None draws it.
        n_entities: 0 to 2; None draws it. A scene without interactions has at least one.
    """
    rng = random.Random(seed)
    looks = random.Random(f"appearance {seed}")
    drawn = rng.choices(range(MOST_INTERACTIONS + 1), _INTERACTIONS)[0]
    interactions = drawn if n_interactions is None else n_interactions
    drawn = rng.choices(range(MOST_ENTITIES + 1), _ENTITIES)[0]
    entities = drawn if n_entities is None else n_entities
    if not interactions:
        entities = max(1, entities)
    background = rng.choice(BACKGROUNDS)
    acts, units, names = [], [], []
    for _ in range(interactions):
        group, obj = rng.choice(tuple(GROUPS)), rng.choice(tuple(OBJECTS))
        acts.append((rng.choice(GROUPS[group]), obj))
        units.append(_interaction(group, OBJECTS[obj], rng))
    for _ in range(entities):
        names.append("person" if rng.random() < _LONE_PERSON else rng.choice(tuple(OBJECTS)))
        aspect = rng.uniform(0.44, 0.54) if names[-1] == "person" else OBJECTS[names[-1]]
        units.append(_Unit(((0.0, 0.0, aspect, 1.0),), rng.uniform(0.45, 0.75)))
    placed = []
    for unit, cell in zip(units, _cells([unit.weight for unit in units], rng), strict=True):
        if len(unit.boxes) == 1 and cell[3] - cell[1] > 0.4:  # an entity is not larger than an actor's object
            x0, _, x1, y1 = cell
            cell = (x0, y1 - rng.uniform(0.45, 0.95) * (y1 - cell[1]), x1, y1)
        placed.append(_place(unit, cell, rng))
    triplets = tuple(
        Triplet(
            action=action,
            object=obj,
            subject_appearance=sample_person_appearance(looks),
            object_appearance=sample_object_appearance(looks),
            subject_box=boxes[0],
            object_box=boxes[1],
            facing=facing,
        )
        for (action, obj), (boxes, facing) in zip(acts, placed[:interactions], strict=True)
    )
    lone = tuple(
        WorldEntity(
            name,
            sample_person_appearance(looks) if name == "person" else sample_object_appearance(looks),
            boxes[0],
            facing,
        )
        for name, (boxes, facing) in zip(names, placed[interactions:], strict=True)
    )
    return WorldScene(background, triplets, seed, lone)
