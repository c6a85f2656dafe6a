"""Renders of the embedded world: real pictures with exact boxes, made here."""

import io
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from interactdiff.data.converters.base import Converted, Options
from interactdiff.data.records import ImageRecord, Inline
from interactdiff.errors import DataError
from interactdiff.scene_checks import shown
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT, WorldScene


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Render scenes of stickworld.

    Args:
        source: their seeds, FIRST:LAST, without the last one; from 2**31 on they are held out for scores.
        options: `size`, `colours`.
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
        yield rendered(sample_scene(seed), f"{seed:010d}.png", options)


def rendered(scene: WorldScene, name: str, options: Options) -> Converted:
    """A scene's render, and the row of what it shows: its interactions, and its entities that do nothing.

    Args:
        scene: of stickworld.
        name: of its picture, a PNG.
        options: `size`, `colours`.
    """
    file = io.BytesIO()
    Image.fromarray(render(scene, options.size).image).save(file, format="PNG")
    items = (*scene.interactions(options.colours), *scene.lone_entities(options.colours))
    record = ImageRecord(name, Inline(file.getvalue()), (scene.caption,), items, source="stickworld")
    return Converted(name, file.getvalue(), record.to_row())
