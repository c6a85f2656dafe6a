"""Renders of the embedded world: real pictures with exact boxes, made here."""

import io
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from interactdiff.data.converters.base import Converted, Options
from interactdiff.errors import DataError
from interactdiff.scene_checks import shown
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Render scenes of stickworld.

    Args:
        source: their seeds, FIRST:LAST, without the last one; from 2**31 on they are held out for scores.
        options: `size`.
        notes: counts what is left out: nothing.
    """
    first, colon, last = source.partition(":")
    if (
        not colon
        or not first.isdecimal()
        or not last.isdecimal()
        or not int(first) < int(last) <= 2 * HELD_OUT
    ):
        raise DataError(f"expected seeds FIRST:LAST such as 0:1000, got {shown(source)}")
    for seed in range(int(first), int(last)):
        scene = sample_scene(seed)
        file = io.BytesIO()
        Image.fromarray(render(scene, options.size).image).save(file, format="PNG")
        items = {"interactions": scene.interactions(), "entities": scene.lone_entities()}
        row = {"prompt": scene.caption, **{key: [_values(one) for one in items[key]] for key in items}}
        yield Converted(f"{seed:010d}.png", file.getvalue(), {**row, "source": "stickworld"})


def _values(item: object) -> dict[str, object]:
    """An item's values but for those that have their defaults."""
    return {k: v for k, v in vars(item).items() if (k, v) not in (("strength", 1.0), ("action_region", None))}
