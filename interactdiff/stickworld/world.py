"""stickworld: a seeded world of pictograms in which people act on objects.

The vocabulary, the geometry of a scene and the wording of its caption. Drawing is in `render`.
Actions come in groups that share one distribution of boxes, so that within a group only pose and contact
tell the actions apart.
"""

import random
from dataclasses import dataclass

from interactdiff.scene import Box, Interaction

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 48),
    "orange": (248, 144, 24),
    "yellow": (252, 218, 50),
    "green": (38, 158, 72),
    "blue": (34, 98, 216),
    "purple": (146, 62, 184),
}
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "park": ("in the park", "on the grass in the park"),
    "street": ("on the street", "in the street"),
    "snow": ("in the snow", "on the snow"),
}
BACKGROUNDS: tuple[str, ...] = tuple(PLACES)
# Width over height of each object's box.
OBJECTS: dict[str, float] = {
    "ball": 1.0,
    "bike": 1.45,
    "boat": 1.2,
    "box": 1.1,
    "car": 1.6,
    "chair": 0.85,
    "dog": 1.3,
    "horse": 1.15,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "beside": ("kicking", "pushing", "pulling", "feeding"),
    "atop": ("riding", "standing on"),
    "overhead": ("lifting", "balancing"),
    "at hand": ("carrying", "hitting"),
}
ACTIONS: tuple[str, ...] = tuple(action for actions in GROUPS.values() for action in actions)
GROUP_OF: dict[str, str] = {action: group for group, actions in GROUPS.items() for action in actions}
HELD_OUT = 2**31  # scenes for scoring have seeds from here on; training draws below it

_PERSON = ("a person in {}", "a person wearing {}", "someone in {}", "a person in a {} shirt")


@dataclass(frozen=True)
class Triplet:
    """One interaction as planned: boxes are xyxy in [0, 1], `facing` is "left" or "right"."""

    action: str
    object: str
    subject_colour: str
    object_colour: str
    subject_box: Box
    object_box: Box
    facing: str

    @property
    def group(self) -> str:
        """Name of the group of actions that share this triplet's box geometry."""
        return GROUP_OF[self.action]


@dataclass(frozen=True)
class WorldScene:
    """One or two triplets in front of a background, with its caption."""

    background: str
    triplets: tuple[Triplet, ...]
    caption: str
    seed: int

    @property
    def caption_without_verb(self) -> str:
        """The same content with no action word: what the action swap prompts with."""
        return caption(self.background, self.triplets, wording(self.seed), verbs=False)

    def interactions(self, colours: bool = True, action: bool = True) -> tuple[Interaction, ...]:
        """The scene as a user would ask for it.

        Args:
            colours: name the colours in the phrases ("person in blue", "red bike").
            action: name the action; False leaves it null (boxes only).
        """
        return tuple(
            Interaction(
                subject=f"person in {t.subject_colour}" if colours else "person",
                action=t.action if action else None,
                object=f"{t.object_colour} {t.object}" if colours else t.object,
                subject_box=t.subject_box,
                object_box=t.object_box,
            )
            for t in self.triplets
        )


def wording(seed: int) -> random.Random:
    """What words a scene's caption: apart from what draws the scene, or the wording would tell the action."""
    return random.Random(f"wording {seed}")


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def caption(
    background: str,
    triplets: tuple[Triplet, ...],
    rng: random.Random,
    verbs: bool = True,
    colours: bool = True,
) -> str:
    """Describe a scene in words, with varied wording."""
    clauses = []
    for t in triplets:
        person = rng.choice(_PERSON).format(t.subject_colour) if colours else "a person"
        person = person.replace("a orange", "an orange")
        thing = article(f"{t.object_colour} {t.object}" if colours else t.object)
        clauses.append(f"{person} {t.action} {thing}" if verbs else f"{person} and {thing}")
    place = rng.choice(PLACES[background])
    text = " and ".join(clauses)
    return f"{place}, {text}" if rng.random() < 0.3 else f"{text} {place}"


def _layout(group: str, aspect: float, rng: random.Random) -> tuple[Box, Box]:
    """Boxes of person and object, facing right, in units of the person's height with feet at y = 1.

    Depends on the group and never on the action.
    """
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


def sample_scene(seed: int, n_interactions: int | None = None) -> WorldScene:
    """Draw a scene; the same seed gives the same scene.

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
                subject_colour=rng.choice(tuple(COLOURS)),
                object_colour=rng.choice(tuple(COLOURS)),
                subject_box=subject_box,
                object_box=object_box,
                facing=facing,
            )
        )
    rng.shuffle(triplets)
    triplets = tuple(triplets)
    return WorldScene(background, triplets, caption(background, triplets, wording(seed)), seed)
