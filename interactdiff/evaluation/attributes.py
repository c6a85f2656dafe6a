"""How much of what persons and objects look like is right in pictures."""

from collections.abc import Mapping, Sequence

import numpy as np

from interactdiff.evaluation.bootstrap import Share
from interactdiff.evaluation.hoi import found_at
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.world import WorldScene


def right_attributes(found: Found | None, wanted: Mapping[str, str]) -> int:
    """How many of the attributes wanted, the colour among them, are found; 0 where nothing was found."""
    if found is None:
        return 0
    shown = {"colour": found.colour, **found.attributes}
    return sum(shown.get(name) == value for name, value in wanted.items())


def identity(found: Sequence[Detections], scenes: Sequence[WorldScene]) -> Share:
    """Of the attributes of persons and objects, the colour included, the share that is right at their boxes.

    Args:
        found: by picture.
        scenes: that the pictures should show; their appearances are those wanted.
    """
    right, total = np.zeros(len(scenes)), np.zeros(len(scenes))
    for n, (picture, scene) in enumerate(zip(found, scenes, strict=True)):
        for thing in scene.things:
            wanted = thing.appearance.attributes()
            right[n] += right_attributes(found_at(picture, thing), wanted)
            total[n] += len(wanted)
    return Share(right, total)


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
            match = found_at(picture, thing)
            count(kind, match is not None)
            if match is None:
                continue
            if kind == "person":
                acts = n < 2 * len(scene.triplets)
                count("action", match.action == (scene.triplets[n // 2].action if acts else None))
            for name, value in thing.appearance.attributes().items():
                count(f"{kind}.{name}", right_attributes(match, {name: value}) == 1)
    return {name: right[name] / total[name] for name in sorted(total)}
