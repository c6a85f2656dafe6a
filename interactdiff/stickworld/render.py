"""Draws a stickworld scene, with exact ground truth.

Shapes are painted at `OVERSAMPLING` times the size and averaged down, first as dark outlines, then filled.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from interactdiff.scene import Box
from interactdiff.stickworld.objects import PAINTERS, Colour, Points
from interactdiff.stickworld.poses import POSES, Pose
from interactdiff.stickworld.world import COLOURS, Triplet, WorldScene

OVERSAMPLING = 4
OUTLINE: Colour = (26, 26, 38)
SKIN: Colour = (242, 190, 150)
TROUSERS: Colour = (70, 74, 100)
ROPE: Colour = (120, 78, 40)
FOOD: Colour = (255, 250, 235)


@dataclass(frozen=True)
class Thing:
    """A person or an object as drawn: `box` xyxy in [0, 1] is tight on `mask`.

    `mask` [S, S] bool is the whole silhouette, parts hidden by other things included.
    """

    name: str
    colour: str
    box: Box
    mask: np.ndarray


@dataclass(frozen=True)
class Rendering:
    """`image` uint8 [S, S, 3]; things 2i and 2i + 1 are subject and object of triplet i."""

    image: np.ndarray
    things: tuple[Thing, ...]


class _Canvas:
    """Paints outlined shapes in pixels of the oversampled picture, on it and on a mask."""

    def __init__(self, size: int):
        self.size = size
        self.scale = size * OVERSAMPLING
        self.image = Image.new("RGB", (self.scale, self.scale))
        self.draw = ImageDraw.Draw(self.image)
        self.outline = max(2.0, 0.85 * self.scale / 96)
        self.start_mask()

    def start_mask(self) -> None:
        self.mask = Image.new("L", (self.scale, self.scale))
        self._mask_draw = ImageDraw.Draw(self.mask)

    def take_mask(self) -> np.ndarray:
        coverage = np.asarray(self.mask.reduce(OVERSAMPLING))
        self.start_mask()
        return coverage >= 128

    def stroke(self, points: Points, width: float, fill: Colour) -> None:
        """Round-capped line, outlined outside its width."""
        for colour, radius in ((OUTLINE, width / 2 + self.outline), (fill, width / 2)):
            for draw, ink in ((self.draw, colour), (self._mask_draw, 255)):
                draw.line(points, fill=ink, width=round(2 * radius), joint="curve")
                for x, y in points:
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)

    def disc(self, box: Box, fill: Colour) -> None:
        """Ellipse, outlined inside its box."""
        x0, y0, x1, y1 = box
        o = self.outline
        self.draw.ellipse(box, fill=OUTLINE)
        self._mask_draw.ellipse(box, fill=255)
        if x1 - x0 > 2 * o and y1 - y0 > 2 * o:
            self.draw.ellipse((x0 + o, y0 + o, x1 - o, y1 - o), fill=fill)

    def polygon(self, points: Points, fill: Colour) -> None:
        """Polygon, outlined around its edge."""
        self.draw.polygon(points, fill=fill)
        self._mask_draw.polygon(points, fill=255)
        ring = (*points, points[0], points[1])
        width = round(2 * self.outline * 0.75)
        self.draw.line(ring, fill=OUTLINE, width=width, joint="curve")
        self._mask_draw.line(ring, fill=255, width=width, joint="curve")


class _ObjectBrush:
    """Maps the unit square to a box, mirrored when facing left; see `objects.Brush`."""

    def __init__(self, canvas: _Canvas, box: Box, facing: str):
        self.canvas = canvas
        inset = canvas.outline * 0.75
        self.x0, self.y0 = box[0] * canvas.scale + inset, box[1] * canvas.scale + inset
        self.width = (box[2] - box[0]) * canvas.scale - 2 * inset
        self.height = (box[3] - box[1]) * canvas.scale - 2 * inset
        self.mirrored = facing == "left"

    def _point(self, x: float, y: float) -> tuple[float, float]:
        return self.x0 + (1.0 - x if self.mirrored else x) * self.width, self.y0 + y * self.height

    def polygon(self, points: Points, fill: Colour) -> None:
        self.canvas.polygon(tuple(self._point(*p) for p in points), fill)

    def ellipse(self, box: Box, fill: Colour) -> None:
        (xa, y0), (xb, y1) = self._point(box[0], box[1]), self._point(box[2], box[3])
        self.canvas.disc((min(xa, xb), y0, max(xa, xb), y1), fill)

    def line(self, points: Points, width: float, fill: Colour) -> None:
        self.canvas.stroke(tuple(self._point(*p) for p in points), width * self.height, fill)


def _fit(values: list[tuple[float, float]], low: float, high: float) -> tuple[float, float]:
    """Offset and scale that put the extent of marks (position, radius) exactly on [low, high]."""
    offset, scale = low, high - low
    for _ in range(8):
        first = min(offset + scale * u - r for u, r in values)
        last = max(offset + scale * u + r for u, r in values)
        stretch = (high - low) / (last - first)
        scale *= stretch
        offset = low + (offset - first) * stretch
    return offset, scale


def _paint_person(canvas: _Canvas, pose: Pose, triplet: Triplet) -> None:
    x0, y0, x1, y1 = (v * canvas.scale for v in triplet.subject_box)
    height = y1 - y0
    limb, head, torso = 0.085 * height, 0.115 * height, 0.20 * height
    edge = canvas.outline
    bowl = (0.10 * height, 0.06 * height)

    marks = [(pose.head, head), (pose.neck, torso / 2 + edge), (pose.hip, torso / 2 + edge)]
    for joints in (pose.far_arm, pose.near_arm, pose.far_leg, pose.near_leg):
        marks += [(joint, limb / 2 + edge) for joint in joints]
    xs, ys = [(p[0], r) for p, r in marks], [(p[1], r) for p, r in marks]
    if pose.prop == "bowl":
        xs.append((pose.near_arm[1][0] + 0.10, bowl[0]))
    if pose.prop == "rope":
        xs.append((1.0, 0.015 * height + edge))
    (ax, bx), (ay, by) = _fit(xs, x0, x1), _fit(ys, y0, y1)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = ax + bx * point[0]
        return (x0 + x1 - x if triplet.facing == "left" else x), ay + by * point[1]

    def limb_of(root: tuple[float, float], joints: tuple, colour: Colour) -> None:
        canvas.stroke((at(root), at(joints[0]), at(joints[1])), limb, colour)

    shirt = COLOURS[triplet.subject_colour]
    neck, hip = at(pose.neck), at(pose.hip)
    shoulder = (pose.neck[0] * 0.85 + pose.hip[0] * 0.15, pose.neck[1] * 0.85 + pose.hip[1] * 0.15)
    limb_of(shoulder, pose.far_arm, SKIN)
    limb_of(pose.hip, pose.far_leg, TROUSERS)
    limb_of(pose.hip, pose.near_leg, TROUSERS)
    if pose.prop == "rope":
        canvas.stroke((at(pose.near_arm[1]), at((1.0, pose.near_arm[1][1] + 0.12))), 0.03 * height, ROPE)
    canvas.stroke((neck, hip), torso, shirt)
    cx, cy = at(pose.head)
    canvas.disc((cx - head, cy - head, cx + head, cy + head), SKIN)
    if pose.prop == "bowl":
        hand_x, hand_y = at((pose.near_arm[1][0] + 0.10, pose.near_arm[1][1]))
        canvas.disc((hand_x - bowl[0], hand_y - bowl[1] * 1.6, hand_x + bowl[0], hand_y + bowl[1]), FOOD)
    limb_of(shoulder, pose.near_arm, SKIN)


def _paint_background(canvas: _Canvas, name: str, rng: random.Random) -> None:
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


def _thing(canvas: _Canvas, name: str, colour: str) -> Thing:
    mask = canvas.take_mask()
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(v) / canvas.size for v in corners)
    return Thing(name, colour, (x0, y0, x1, y1), mask)


def render(scene: WorldScene, size: int = 96) -> Rendering:
    """Draw a scene.

    Args:
        scene: what to draw; its seed also sets small variations of the background.
        size: height and width S of the picture in pixels.
    """
    canvas = _Canvas(size)
    _paint_background(canvas, scene.background, random.Random(scene.seed))
    things = []
    for triplet in scene.triplets:
        brush = _ObjectBrush(canvas, triplet.object_box, triplet.facing)
        PAINTERS[triplet.object](brush, COLOURS[triplet.object_colour])
        thing = _thing(canvas, triplet.object, triplet.object_colour)
        _paint_person(canvas, POSES[triplet.action], triplet)
        things += [_thing(canvas, "person", triplet.subject_colour), thing]
    return Rendering(np.asarray(canvas.image.reduce(OVERSAMPLING)), tuple(things))
