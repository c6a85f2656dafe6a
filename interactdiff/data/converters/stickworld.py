"""Renders of the embedded world: real pictures with exact boxes, made here."""

import io
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from interactdiff.data.converters.base import Converted, Options
from interactdiff.data.records import ImageRecord, Inline
from interactdiff.errors import DataError
from interactdiff.scene_checks import shown
from interactdiff.stickworld.captions import caption
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT, WorldEntity, WorldScene, wording

REFERENCES = "references"


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Render scenes of stickworld.

    Args:
        source: their seeds, FIRST:LAST, without the last one; from 2**31 on they are held out for scores.
        options: `size`, `colours`, `subjects`.
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

    With `options.subjects` some of its persons and objects are subjects too, each with a reference picture.

    Args:
        scene: of stickworld.
        name: of its picture, a PNG.
        options: `size`, `colours`, `subjects`.
    """
    picture = _png(Image.fromarray(render(scene, options.size).image))
    items = (*scene.interactions(options.colours), *scene.lone_entities(options.colours))
    things, rng = scene.things, random.Random(f"subjects {scene.seed}")
    chosen = sorted(rng.sample(range(len(things)), min(options.subjects, len(things))))
    prompt = caption(scene, wording(scene.seed), undescribed=chosen).text if chosen else scene.caption
    record = ImageRecord(name, Inline(picture), (prompt,), items, source="stickworld")
    row = record.to_row()
    references = {}
    for n in chosen:
        path = f"{REFERENCES}/{name.removesuffix('.png')}-{n}.png"
        references[path] = _png(reference(things[n], rng, scene.seed >= HELD_OUT, options.size))
        row.setdefault("subjects", []).append(
            {"phrase": things[n].name, "image": path, "box": list(things[n].box)}
        )
    return Converted(name, picture, row, references=references)


def reference(thing: WorldEntity, rng: random.Random, held_out: bool, size: int) -> Image.Image:
    """A person or an object in another scene, transparent where it is not.

    Nothing hides it there: an object stands alone, and a person is painted over what he or she acts on.

    Args:
        thing: which.
        rng: draws the scene.
        held_out: whether the scene is one of those held out for scores.
        size: height and width in pixels.
    """
    counts = rng.choice(((0, 1), (1, 0))) if thing.name == "person" else (0, 1)
    while True:
        scene = sample_scene(rng.randrange(HELD_OUT) + HELD_OUT * held_out, *counts)
        if scene.things[0].name == thing.name:
            break
    drawn = render(scene, size, (thing.appearance, *[None] * (len(scene.things) - 1)))
    alpha = drawn.things[0].mask.astype(np.uint8) * 255
    return Image.fromarray(np.dstack([drawn.image, alpha]))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
