"""Words of captions: their sides swapped when a picture is mirrored, and captions made of interactions."""

import re
from collections.abc import Sequence
from typing import Any

from interactdiff.scene_items import Interaction
from interactdiff.stickworld.captions import article

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_LETTERING = re.compile(r"\b(says|saying|text|texts|logo|logos|letters|lettering)\b", re.IGNORECASE)
_SWAPPED = {"left": "right", "right": "left"}


def names_side(text: str) -> bool:
    """Whether a text speaks of left or right."""
    return _SIDES.search(text) is not None


def swap_sides(text: str) -> str:
    """Left for right and right for left, whole words, in the case that they are in."""

    def swapped(found: re.Match[str]) -> str:
        word = _SWAPPED[found[0].lower()]
        if found[0].isupper():
            return word.upper()
        return word.capitalize() if found[0][0].isupper() else word

    return _SIDES.sub(swapped, text)


def speaks_of_lettering(text: str) -> bool:
    """Whether a text speaks of words in the picture, which mirroring would make unreadable."""
    return _LETTERING.search(text) is not None


def triplet_caption(items: Sequence[Any]) -> str:
    """One clause for each interaction, joined by commas, in their order: "a person is riding a bike".

    An action of "with" (HICO-DET's `no_interaction`), or none, makes "a person with a bike".
    """
    clauses = []
    for one in items:
        if isinstance(one, Interaction):
            verb = f"is {one.action}" if one.action not in (None, "with") else "with"
            clauses.append(f"{article(one.subject)} {verb} {article(one.object)}")
    return ", ".join(clauses)
