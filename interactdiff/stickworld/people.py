"""Paints persons: a pose fitted to a box, and what the person looks like."""

import math
from collections.abc import Sequence

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import (
    COLOURS,
    HAIR_COLOURS,
    SECOND_COLOURS,
    SKINS,
    TROUSERS,
    Colour,
    PersonAppearance,
)
from interactdiff.stickworld.canvas import OUTLINE, Canvas
from interactdiff.stickworld.poses import Pose

ROPE: Colour = (120, 78, 40)
FOOD: Colour = (255, 250, 235)
# In shares of a person's height: width of limbs, radius of the head, width of the torso.
BUILD = (0.088, 0.135, 0.26)
# How far hair and headwear reach from the middle of the head, in its radii: up, to the front, to the back.
_HAIR_REACH = {"short": (1.15, 1.1, 1.15), "long": (1.15, 1.1, 1.5), "curly": (1.42, 1.42, 1.42)}
_HAIR_REACH["spiky"] = (1.82, 1.8, 1.82)
_HEADWEAR_REACH = {"none": (0.0, 0.0, 0.0), "cap": (1.52, 1.85, 1.15), "crown": (1.68, 1.0, 1.0)}
_HEADWEAR_REACH["top hat"] = (2.0, 1.45, 1.45)
_BRIM = 0.5  # radii of the head that headwear begins above its middle
Mark = tuple[float, float, float]  # a position in 0..1 and how far the drawing reaches below and above it


def _fit(marks: list[Mark], low: float, high: float) -> tuple[float, float]:
    """Offset and scale that put the extent of marks exactly on [low, high]."""
    offset, scale = low, high - low
    for _ in range(8):
        first = min(offset + scale * u - before for u, before, _ in marks)
        last = max(offset + scale * u + after for u, _, after in marks)
        stretch = (high - low) / (last - first)
        scale *= stretch
        offset = low + (offset - first) * stretch
    return offset, scale


class _Head:
    """Hair, face and headwear, around a head of radius `radius` at `middle` that faces `sign` (1: right)."""

    def __init__(self, canvas: Canvas, middle: tuple[float, float], radius: float, sign: int):
        self.canvas, self.middle, self.radius, self.sign = canvas, middle, radius, sign

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in radii of the head, x to the front and y downwards."""
        return self.middle[0] + self.sign * x * self.radius, self.middle[1] + y * self.radius

    def on_arc(self, degrees: float, reach: float) -> tuple[float, float]:
        """A point around the head: 0 is the front, 90 the top, 180 the back."""
        angle = math.radians(degrees)
        return self.at(reach * math.cos(angle), -reach * math.sin(angle))

    def behind(self, look: PersonAppearance) -> None:
        if look.hair == "long":
            points = (self.at(-0.5, -0.2), self.at(-0.85, 0.75), self.at(-0.8, 1.6))
            self.canvas.stroke(points, 0.9 * self.radius, HAIR_COLOURS[look.hair_colour])

    def in_front(self, look: PersonAppearance) -> None:
        self.canvas.dot(*self.at(0.45, 0.1), 0.14 * self.radius, OUTLINE)
        self._hair(look.hair, HAIR_COLOURS[look.hair_colour], look.headwear != "none")
        if look.headwear_colour is not None:
            self._headwear(look.headwear, COLOURS[look.headwear_colour])

    def _hair(self, shape: str, colour: Colour, covered: bool) -> None:
        """`covered`: only what headwear leaves to be seen sticks out."""
        arc = [self.on_arc(degrees, 1.1) for degrees in range(28, 206, 8)]
        cap = (*arc, self.at(-0.35, 0.25), self.at(-0.25, -0.3), self.at(0.5, -0.35))
        if shape == "spiky":
            for start in (-12, 144, 182) if covered else (28, 68, 108, 148):
                spike = (self.on_arc(start, 0.8), self.on_arc(start + 20, 1.8), self.on_arc(start + 40, 0.8))
                self.canvas.polygon(spike, colour)
        self.canvas.polygon(cap, colour)
        if shape == "curly":
            places = (14, 32, 146, 164, 182, 200, 218) if covered else tuple(range(34, 214, 18))
            for degrees in places:
                x, y = self.on_arc(degrees, 1.0)
                r = 0.42 * self.radius
                self.canvas.disc((x - r, y - r, x + r, y + r), colour)
            for degrees in places:  # over the outlines within
                self.canvas.dot(*self.on_arc(degrees, 0.82), 0.34 * self.radius, colour)

    def _headwear(self, kind: str, colour: Colour) -> None:
        if kind == "cap":
            dome = (self.on_arc(n, 1.0) for n in range(0, 181, 12))
            lifted = tuple((x, y - _BRIM * self.radius) for x, y in dome)
            self.canvas.polygon(lifted, colour)
            brim = (self.at(0.2, -_BRIM - 0.3), self.at(1.7, -_BRIM - 0.12), self.at(1.75, -_BRIM + 0.12))
            self.canvas.polygon((*brim, self.at(0.2, -_BRIM + 0.12)), colour)
        elif kind == "crown":
            spikes = ((-1.0, 1.1), (-0.5, 0.55), (0.0, 1.15), (0.5, 0.55), (1.0, 1.1))
            top = tuple(self.at(x * 0.95, -_BRIM - y) for x, y in spikes)
            self.canvas.polygon((self.at(-0.85, -_BRIM + 0.1), *top, self.at(0.85, -_BRIM + 0.1)), colour)
        else:
            crown = ((-0.8, 1.45), (0.8, 1.45), (0.75, 0.0), (-0.75, 0.0))
            self.canvas.polygon(tuple(self.at(x, -_BRIM - y) for x, y in crown), colour)
            brim = ((-1.4, 0.2), (1.4, 0.2), (1.4, -0.1), (-1.4, -0.1))
            self.canvas.polygon(tuple(self.at(x, -_BRIM - y) for x, y in brim), colour)


def _reach(look: PersonAppearance) -> tuple[float, float, float]:
    """Of head, hair and headwear from the middle of the head, in radii: up, to the front, to the back."""
    hair, hat = _HAIR_REACH[look.hair], _HEADWEAR_REACH[look.headwear]
    if look.headwear != "none":
        hair = (0.0, *hair[1:])
    elif look.hair == "spiky":  # the spike to the front is for what headwear leaves to be seen
        hair = (hair[0], 1.25, hair[2])
    up, front, back = (max(1.0, a, b) for a, b in zip(hair, hat, strict=True))
    return up, front, back


def paint_person(canvas: Canvas, pose: Pose, look: PersonAppearance, box: Box, facing: str) -> None:
    """Paint a person whose silhouette fills a box.

    Args:
        canvas: what is painted on.
        pose: the joints.
        look: what the person looks like.
        box: xyxy in [0, 1].
        facing: "left" or "right".
    """
    x0, y0, x1, y1 = (v * canvas.scale for v in box)
    height = y1 - y0
    limb, head, torso = (v * height for v in BUILD)
    edge = canvas.outline
    bowl = (0.10 * height, 0.06 * height)
    up, front, back = (v * head for v in _reach(look))

    xs: list[Mark] = [(pose.head[0], back, front)]
    ys: list[Mark] = [(pose.head[1], up, head)]
    for joint in (pose.neck, pose.hip):
        xs.append((joint[0], torso / 2 + edge, torso / 2 + edge))
        ys.append((joint[1], torso / 2 + edge, torso / 2 + edge))
    for joint in (j for joints in (pose.far_arm, pose.near_arm, pose.far_leg, pose.near_leg) for j in joints):
        xs.append((joint[0], limb / 2 + edge, limb / 2 + edge))
        ys.append((joint[1], limb / 2 + edge, limb / 2 + edge))
    if pose.prop == "bowl":
        xs.append((pose.near_arm[1][0] + 0.10, bowl[0], bowl[0]))
    if pose.prop == "rope":
        xs.append((1.0, 0.015 * height + edge, 0.015 * height + edge))
    (ax, bx), (ay, by) = _fit(xs, x0, x1), _fit(ys, y0, y1)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = ax + bx * point[0]
        return (x0 + x1 - x if facing == "left" else x), ay + by * point[1]

    def paint_limb(root: tuple[float, float], joints: Sequence[tuple[float, float]], colour: Colour) -> None:
        canvas.stroke((at(root), at(joints[0]), at(joints[1])), limb, colour)

    skin, trousers = SKINS[look.skin], TROUSERS[look.trousers]
    neck, hip = at(pose.neck), at(pose.hip)
    shoulder = (pose.neck[0] * 0.85 + pose.hip[0] * 0.15, pose.neck[1] * 0.85 + pose.hip[1] * 0.15)
    paint_limb(shoulder, pose.far_arm, skin)
    paint_limb(pose.hip, pose.far_leg, trousers)
    paint_limb(pose.hip, pose.near_leg, trousers)
    if pose.prop == "rope":
        canvas.stroke((at(pose.near_arm[1]), at((1.0, pose.near_arm[1][1] + 0.12))), 0.03 * height, ROPE)
    canvas.stroke((neck, hip), torso, COLOURS[look.colour])
    canvas.end_cloth()
    cx, cy = at(pose.head)
    above = _Head(canvas, (cx, cy), head, -1 if facing == "left" else 1)
    above.behind(look)
    canvas.disc((cx - head, cy - head, cx + head, cy + head), skin)
    above.in_front(look)
    if pose.prop == "bowl":
        hand_x, hand_y = at((pose.near_arm[1][0] + 0.10, pose.near_arm[1][1]))
        canvas.disc((hand_x - bowl[0], hand_y - bowl[1] * 1.6, hand_x + bowl[0], hand_y + bowl[1]), FOOD)
    paint_limb(shoulder, pose.near_arm, skin)
    if look.second_colour is not None:
        middle = ((neck[0] + hip[0]) / 2, (neck[1] + hip[1]) / 2)
        length = math.hypot(hip[0] - neck[0], hip[1] - neck[1]) or 1.0
        along = ((hip[0] - neck[0]) / length * torso, (hip[1] - neck[1]) / length * torso)
        canvas.decorate(
            look.pattern, SECOND_COLOURS[look.second_colour], middle, (along[1], -along[0]), along
        )
