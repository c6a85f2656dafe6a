"""How much of what persons and objects look like is right in pictures."""

from collections.abc import Mapping, Sequence

from interactdiff.evaluation.hoi import at_box
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.world import WorldEntity, WorldScene


def found_at(found: Detections, thing: WorldEntity) -> Found | None:
    """What is found of a thing's kind at its box; see `at_box`."""
    return at_box(found.persons if thing.name == "person" else found.objects, thing.name, thing.box)


def shown_attributes(found: Found) -> dict[str, str]:
    """What was found of a thing's looks, the colour included."""
    return {"colour": found.colour, **found.attributes}


def right_attributes(found: Found | None, wanted: Mapping[str, str]) -> int:
    """How many of the attributes wanted are those found; none where nothing was found."""
    if found is None:
        return 0
    shown = shown_attributes(found)
    return sum(shown.get(name) == value for name, value in wanted.items())


def head_accuracies(found: Sequence[Detections], scenes: Sequence[WorldScene]) -> dict[str, float]:
    """How often each head of the detector is right on pictures of scenes.

    Args:
        found: by picture.
        scenes: that the pictures show.

    Returns:
        person and object: shares of those that are found at their boxes as what they are. action, and
        person.NAME and object.NAME for every attribute: shares of those found, and of those that have the
        attribute, of which it is right.
    """
    right: dict[str, int] = {}
    total: dict[str, int] = {}

    def count(name: str, hit: bool) -> None:
        right[name] = right.get(name, 0) + hit
        total[name] = total.get(name, 0) + 1

    for picture, scene in zip(found, scenes, strict=True):
        for n, thing in enumerate(scene.things):
            kind = "person" if thing.name == "person" else "object"
            seen = found_at(picture, thing)
            count(kind, seen is not None)
            if seen is None:
                continue
            if kind == "person":
                acts = n < 2 * len(scene.triplets)
                count("action", seen.action == (scene.triplets[n // 2].action if acts else None))
            for name, value in thing.appearance.attributes().items():
                count(f"{kind}.{name}", right_attributes(seen, {name: value}) == 1)
    return {name: right[name] / total[name] for name in sorted(total)}
