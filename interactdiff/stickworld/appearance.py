"""What persons and objects look like beyond a scene's words: who they are, in any pose, place and size."""

import random
from dataclasses import dataclass

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (222, 45, 48),
    "orange": (248, 144, 24),
    "yellow": (252, 218, 50),
    "green": (38, 158, 72),
    "blue": (34, 98, 216),
    "purple": (146, 62, 184),
}
SECOND_COLOURS: dict[str, Colour] = {
    "white": (250, 250, 246),
    "black": (40, 38, 46),
    "yellow": COLOURS["yellow"],
    "blue": COLOURS["blue"],
}
HAIR_SHAPES = ("short", "long", "curly", "spiky")
HAIR_COLOURS: dict[str, Colour] = {
    "black": (44, 38, 44),
    "brown": (128, 76, 38),
    "blond": (244, 206, 96),
    "grey": (166, 168, 178),
}
HEADWEAR = ("none", "cap", "crown", "top hat")
SHIRT_PATTERNS = ("plain", "stripes", "dots", "checks", "star")
OBJECT_PATTERNS = ("plain", "stripes", "dots", "star")
TROUSERS: dict[str, Colour] = {"grey": (92, 96, 122), "brown": (132, 88, 54), "white": (234, 232, 224)}
SKINS: dict[str, Colour] = {"light": (246, 202, 166), "tan": (196, 136, 90), "dark": (112, 70, 48)}
_LEAST_CONTRAST = 130.0  # distance in RGB between a colour and the second colour on it


@dataclass(frozen=True)
class Appearance:
    """What an object looks like.

    Attributes:
        colour: of `COLOURS`.
        pattern: of `OBJECT_PATTERNS`.
        second_colour: of `SECOND_COLOURS`, of the pattern; None where the pattern is plain.
    """

    colour: str
    pattern: str = "plain"
    second_colour: str | None = None

    def attributes(self) -> dict[str, str]:
        """Each attribute that can be seen, by its name, the colour first."""
        shown = {"colour": self.colour, "pattern": self.pattern, "second_colour": self.second_colour}
        return {name: value for name, value in shown.items() if value is not None}


@dataclass(frozen=True)
class PersonAppearance(Appearance):
    """What a person looks like; `colour` and the pattern are those of the shirt.

    Attributes:
        pattern: of `SHIRT_PATTERNS`.
        hair: of `HAIR_SHAPES`.
        hair_colour: of `HAIR_COLOURS`.
        headwear: of `HEADWEAR`.
        headwear_colour: of `COLOURS`; None without headwear.
        trousers: of `TROUSERS`.
        skin: of `SKINS`.
    """

    hair: str = "short"
    hair_colour: str = "brown"
    headwear: str = "none"
    headwear_colour: str | None = None
    trousers: str = "grey"
    skin: str = "light"

    def attributes(self) -> dict[str, str]:
        """Each attribute that can be seen, by its name, the colour first."""
        names = ("hair", "hair_colour", "headwear", "headwear_colour", "trousers", "skin")
        shown = {name: getattr(self, name) for name in names}
        return super().attributes() | {name: value for name, value in shown.items() if value is not None}


PERSON_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "pattern": SHIRT_PATTERNS,
    "second_colour": tuple(SECOND_COLOURS),
    "hair": HAIR_SHAPES,
    "hair_colour": tuple(HAIR_COLOURS),
    "headwear": HEADWEAR,
    "headwear_colour": tuple(COLOURS),
    "trousers": tuple(TROUSERS),
    "skin": tuple(SKINS),
}
"""What a person's attributes can be, beside the colour."""
OBJECT_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "pattern": OBJECT_PATTERNS,
    "second_colour": tuple(SECOND_COLOURS),
}
"""What an object's attributes can be, beside the colour."""


def _second_colour(colour: str, rng: random.Random) -> str:
    """One that stands out from the first; blue on yellow would be yellow on blue."""

    def contrast(second: str) -> float:
        pairs = zip(COLOURS[colour], SECOND_COLOURS[second], strict=True)
        return sum((a - b) ** 2 for a, b in pairs) ** 0.5

    known = [second for second in SECOND_COLOURS if contrast(second) > _LEAST_CONTRAST]
    return rng.choice([second for second in known if (colour, second) != ("yellow", "blue")])


def _often(usual: str, others: tuple[str, ...], rng: random.Random) -> str:
    """One half of the time what is usual, else another."""
    return usual if rng.random() < 0.5 else rng.choice([other for other in others if other != usual])


def _clothing(patterns: tuple[str, ...], rng: random.Random) -> tuple[str, str, str | None]:
    """Colour, pattern and second colour; half is plain."""
    colour, pattern = rng.choice(tuple(COLOURS)), _often("plain", patterns, rng)
    return colour, pattern, None if pattern == "plain" else _second_colour(colour, rng)


def sample_object_appearance(rng: random.Random) -> Appearance:
    """Draw an object's appearance."""
    return Appearance(*_clothing(OBJECT_PATTERNS, rng))


def sample_person_appearance(rng: random.Random) -> PersonAppearance:
    """Draw a person's appearance; half go without headwear."""
    headwear = _often("none", HEADWEAR, rng)
    return PersonAppearance(
        *_clothing(SHIRT_PATTERNS, rng),
        hair=rng.choice(HAIR_SHAPES),
        hair_colour=rng.choice(tuple(HAIR_COLOURS)),
        headwear=headwear,
        headwear_colour=None if headwear == "none" else rng.choice(tuple(COLOURS)),
        trousers=rng.choice(tuple(TROUSERS)),
        skin=rng.choice(tuple(SKINS)),
    )
