"""Words a scene: which attributes are named, and how."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interactdiff.stickworld.appearance import Appearance, PersonAppearance

if TYPE_CHECKING:
    from interactdiff.stickworld.world import WorldScene

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "park": ("in the park", "on the grass in the park"),
    "street": ("on the street", "in the street"),
    "snow": ("in the snow", "on the snow"),
}
NAMED = 0.25  # how likely an attribute other than the colour is named
_ADJECTIVES = {"stripes": "striped", "dots": "dotted", "checks": "checked"}
_PATTERNS = {"stripes": "stripes", "dots": "dots", "checks": "checks", "star": "a star"}


@dataclass(frozen=True)
class Described:
    """A person or an object in a caption.

    Attributes:
        name: "person" or the object's.
        attributes: what the caption says of it, by the attribute's name.
        span: first and last + 1 character of its words in the caption.
    """

    name: str
    attributes: dict[str, str]
    span: tuple[int, int]


@dataclass(frozen=True)
class Caption:
    """A scene in words.

    Attributes:
        text: the caption.
        things: what it says of each person and object, in the order of `WorldScene.things`.
        actions: the action of each triplet, None where it is left out, in the scene's order.
        background: what it says of the place, None where it says nothing.
    """

    text: str
    things: tuple[Described, ...]
    actions: tuple[str | None, ...]
    background: str | None


def article(words: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def phrase(name: str, look: Appearance, colours: bool = True) -> str:
    """The short phrase of a person or an object: "person in blue", "red bike"; without colours its name."""
    if not colours:
        return name
    return f"person in {look.colour}" if name == "person" else f"{look.colour} {name}"


def named_attributes(
    look: Appearance, rng: random.Random, colours: bool = True, likelihood: float = NAMED
) -> dict[str, str]:
    """Choose what to say of an appearance: the colour, and each other attribute with a probability.

    A second colour is said with its pattern only, and the colour of headwear with that.
    """
    named = {}
    for attribute, value in look.attributes().items():
        likely = colours if attribute == "colour" else rng.random() < likelihood
        if attribute == "second_colour":
            likely = likely or rng.random() < 0.4  # as its pattern has to be named too
            likely = likely and "pattern" in named
        if attribute == "headwear_colour":
            likely = likely or rng.random() < 0.4
            likely = likely and "headwear" in named
        if likely and not (attribute == "pattern" and value == "plain" and rng.random() < 0.5):
            named[attribute] = value
    return named


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _clothing(noun: str, named: dict[str, str], rng: random.Random) -> str:
    """A shirt or an object with its colours and pattern, without an article."""
    colour, pattern, second = (named.get(name) for name in ("colour", "pattern", "second_colour"))
    words = [colour] if colour else []
    if pattern == "plain":
        words.insert(0, "plain")
    elif pattern in _ADJECTIVES and second is None and rng.random() < 0.5:
        words.insert(rng.randrange(len(words) + 1), _ADJECTIVES[pattern])
        pattern = None
    text = " ".join([*words, noun])
    if pattern in _PATTERNS:
        marks = _PATTERNS[pattern]
        if second:
            marks = article(f"{second} star") if pattern == "star" else f"{second} {marks}"
        text += f" with {marks}"
    return text


def describe_object(name: str, named: dict[str, str], rng: random.Random) -> str:
    """An object in words, with its article."""
    return article(_clothing(name, named, rng))


def describe_person(named: dict[str, str], rng: random.Random) -> str:
    """A person in words: what is worn, then hair and skin."""
    worn = []
    more = (
        "trousers" in named or named.get("headwear", "none") != "none"
    )  # "in blue and white trousers" are one
    if "pattern" in named or ("colour" in named and (more or rng.random() < 0.4)):
        worn.append(article(_clothing("shirt", named, rng)))
    elif "colour" in named:
        worn.append(named["colour"])
    if named.get("headwear", "none") != "none":
        hat = " ".join(filter(None, [named.get("headwear_colour"), named["headwear"]]))
        worn.append(article(hat))
    if "trousers" in named:
        worn.append(f"{named['trousers']} trousers")
    traits = []
    if "hair" in named or "hair_colour" in named:
        traits.append(" ".join(filter(None, [named.get("hair"), named.get("hair_colour"), "hair"])))
    if "skin" in named:
        traits.append(f"{named['skin']} skin")
    if named.get("headwear") == "none":
        traits.append("no hat")
    text = rng.choice(("a person", "someone"))
    if traits and rng.random() < 0.5:
        text += f" with {_joined(traits)}"
        traits = []
    if worn:
        text += f" {rng.choice(('in', 'wearing'))} {_joined(worn)}"
    if traits:
        text += f"{',' if worn else ''} with {_joined(traits)}"
    return text


def caption(
    scene: "WorldScene",
    rng: random.Random,
    verbs: bool = True,
    colours: bool = True,
    place: bool = True,
    undescribed: Collection[int] = (),
    likelihood: float = NAMED,
) -> Caption:
    """Describe a scene in words, with varied wording.

    Args:
        scene: what is described.
        rng: decides wording and which attributes are named.
        verbs: whether actions are named.
        colours: whether first colours are named.
        place: whether the background is named.
        undescribed: numbers of the things of which no attribute is named.
        likelihood: of an attribute other than the colour to be named.
    """
    pieces: list[tuple[str, int | None]] = []  # words, and the number of the thing that they are of
    where = rng.choice(PLACES[scene.background])
    first = place and rng.random() < 0.3
    if first:
        pieces.append((f"{where}, ", None))
    things, named, words = scene.things, [], []
    for number, thing in enumerate(things):
        left_out = number in undescribed
        named.append({} if left_out else named_attributes(thing.appearance, rng, colours, likelihood))
        is_person = isinstance(thing.appearance, PersonAppearance)
        words.append(
            describe_person(named[-1], rng) if is_person else describe_object(thing.name, named[-1], rng)
        )
    clauses = [(2 * n, t.action) for n, t in enumerate(scene.triplets)]
    clauses += [(n, None) for n in range(2 * len(scene.triplets), len(things))]
    for clause, (n, action) in enumerate(clauses):
        if clause:
            pieces.append(
                (" and " if rng.random() < 0.5 else ", and " if clause == len(clauses) - 1 else ", ", None)
            )
        pieces.append((words[n], n))
        if action is not None:
            pieces += [(f" {action} " if verbs else " and ", None), (words[n + 1], n + 1)]
    if place and not first:
        pieces.append((f" {where}", None))
    text, spans = "", {}
    for words_, n in pieces:
        if n is not None:
            spans[n] = (len(text), len(text) + len(words_))
        text += words_
    return Caption(
        text,
        tuple(Described(things[n].name, named[n], spans[n]) for n in range(len(things))),
        tuple(t.action if verbs else None for t in scene.triplets),
        scene.background if place else None,
    )
