"""Draws a stickworld scene, with exact ground truth.

Shapes are painted at `canvas.OVERSAMPLING` times the size and averaged down, first as dark outlines, then
filled.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import COLOURS, Appearance, Colour, PersonAppearance
from interactdiff.stickworld.canvas import OVERSAMPLING, Canvas
from interactdiff.stickworld.objects import paint_object
from interactdiff.stickworld.people import paint_person
from interactdiff.stickworld.poses import IDLE, POSES
from interactdiff.stickworld.world import WorldEntity, WorldScene

SIZE = 128  # height and width in pixels, unless another size is wanted


@dataclass(frozen=True)
class Thing:
    """A person or an object as drawn: `box` xyxy in [0, 1] is tight on `mask`.

    `mask` [S, S] bool is the whole silhouette, parts hidden by other things included.
    """

    name: str
    appearance: Appearance
    box: Box
    mask: np.ndarray

    @property
    def colour(self) -> str:
        """The first colour."""
        return self.appearance.colour


@dataclass(frozen=True)
class Rendering:
    """`image` uint8 [S, S, 3]; things in the order of `WorldScene.things`."""

    image: np.ndarray
    things: tuple[Thing, ...]


def _paint_background(canvas: Canvas, name: str, rng: random.Random) -> None:
    s, draw = canvas.scale, canvas.draw
    horizon = rng.uniform(0.52, 0.60) * s

    def band(top: float, bottom: float, colour: Colour) -> None:
        draw.rectangle((0, top, s, bottom), fill=colour)

    if name == "beach":
        band(0, s, (196, 232, 250))
        band(horizon, s, (120, 196, 226))
        band(horizon + 0.16 * s, s, (246, 228, 182))
        x = rng.uniform(0.1, 0.9) * s
        draw.ellipse((x - 0.08 * s, 0.04 * s, x + 0.08 * s, 0.20 * s), fill=(255, 238, 150))
    elif name == "park":
        band(0, s, (214, 238, 248))
        band(horizon, s, (188, 222, 150))
        for x in (rng.uniform(0.08, 0.42) * s, rng.uniform(0.58, 0.92) * s):
            draw.rectangle(
                (x - 0.018 * s, horizon - 0.10 * s, x + 0.018 * s, horizon + 0.04 * s), fill=(170, 140, 110)
            )
            draw.ellipse(
                (x - 0.11 * s, horizon - 0.32 * s, x + 0.11 * s, horizon - 0.06 * s), fill=(158, 200, 138)
            )
    elif name == "street":
        band(0, s, (226, 228, 240))
        x = -rng.uniform(0.0, 0.12) * s
        for top in (0.30, 0.16, 0.36, 0.22, 0.32):
            draw.rectangle((x, top * s, x + 0.19 * s, s), fill=(200, 200, 214))
            x += 0.24 * s
        band(horizon + 0.06 * s, s, (176, 176, 184))
        band(horizon + 0.06 * s, horizon + 0.12 * s, (214, 210, 204))
    else:
        band(0, s, (208, 222, 240))
        x = rng.uniform(0.2, 0.8) * s
        peak = ((x - 0.55 * s, horizon), (x, 0.18 * s), (x + 0.55 * s, horizon))
        draw.polygon(peak, fill=(178, 196, 222))
        band(horizon, s, (246, 249, 253))


def _thing(canvas: Canvas, entity: WorldEntity) -> Thing:
    mask = canvas.silhouette()
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(v) / canvas.size for v in corners)
    return Thing(entity.name, entity.appearance, (x0, y0, x1, y1), mask)


def _paint(canvas: Canvas, entity: WorldEntity, action: str | None) -> Thing:
    look = entity.appearance
    canvas.start(COLOURS[look.colour] if look.second_colour is not None else None)
    if isinstance(look, PersonAppearance):
        pose = IDLE if action is None else POSES[action]
        paint_person(canvas, pose, look, entity.box, entity.facing)
    else:
        paint_object(canvas, entity.name, look, entity.box, entity.facing)
    return _thing(canvas, entity)


def render(
    scene: WorldScene, size: int = SIZE, appearances: Sequence[Appearance | None] | None = None
) -> Rendering:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: height and width S of the picture in pixels.
        appearances: in place of the scene's own, see `WorldScene.with_appearances`: the same persons and
            objects in any scene.
    """
    if appearances is not None:
        scene = scene.with_appearances(tuple(appearances))
    canvas = Canvas(size)
    _paint_background(canvas, scene.background, random.Random(scene.background_seed))
    things, count = scene.things, 2 * len(scene.triplets)
    units = [[2 * n + 1, 2 * n] for n in range(len(scene.triplets))]  # a person is painted over the object
    units += [[n] for n in range(count, len(things))]
    units.sort(key=lambda unit: max(things[n].box[3] for n in unit))  # what stands lower is nearer
    drawn: dict[int, Thing] = {}
    for n in (n for unit in units for n in unit):
        action = scene.triplets[n // 2].action if n < count else None
        drawn[n] = _paint(canvas, things[n], action)
    image = np.asarray(canvas.image.reduce(OVERSAMPLING))
    return Rendering(image, tuple(drawn[n] for n in range(len(things))))
