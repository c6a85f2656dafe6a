"""Object pictograms: painters that fill the unit square (x, y in [0, 1] downwards, facing right)."""

from collections.abc import Callable
from typing import Protocol

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import COLOURS, SECOND_COLOURS, Appearance, Colour
from interactdiff.stickworld.canvas import Canvas, Points

DARK: Colour = (44, 44, 58)
PALE: Colour = (246, 246, 240)


class Brush(Protocol):
    """Draws outlined shapes in the unit square of one thing."""

    def polygon(self, points: Points, fill: Colour) -> None:
        """Filled polygon."""
        ...

    def ellipse(self, box: tuple[float, float, float, float], fill: Colour) -> None:
        """Filled ellipse in an xyxy box."""
        ...

    def line(self, points: Points, width: float, fill: Colour) -> None:
        """Round-capped line; `width` in units of the thing's height."""
        ...


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _wheel(brush: Brush, x: float, radius_x: float, y0: float) -> None:
    brush.ellipse((x - radius_x, y0, x + radius_x, 1.0), DARK)
    inset_x, inset_y = radius_x * 0.5, (1.0 - y0) * 0.25
    brush.ellipse((x - radius_x + inset_x, y0 + inset_y, x + radius_x - inset_x, 1.0 - inset_y), PALE)


def ball(brush: Brush, colour: Colour) -> None:
    """A ball of one colour."""
    brush.ellipse((0.0, 0.0, 1.0, 1.0), colour)


def bike(brush: Brush, colour: Colour) -> None:
    """Two wheels and a frame whose middle is filled, so that it can bear a pattern."""
    for x in (0.22, 0.78):
        brush.ellipse((x - 0.22, 0.36, x + 0.22, 1.0), DARK)
        brush.ellipse((x - 0.12, 0.51, x + 0.12, 0.85), PALE)
    brush.line(((0.22, 0.68), (0.40, 0.62)), 0.13, colour)
    brush.line(((0.78, 0.68), (0.68, 0.10), (0.84, 0.08)), 0.13, colour)
    brush.line(((0.36, 0.26), (0.35, 0.20)), 0.10, colour)
    brush.polygon(((0.30, 0.26), (0.74, 0.26), (0.56, 0.76), (0.40, 0.76)), colour)
    brush.line(((0.26, 0.16), (0.44, 0.16)), 0.13, DARK)
    brush.line(((0.70, 0.07), (0.86, 0.07)), 0.13, DARK)


def boat(brush: Brush, colour: Colour) -> None:
    """A hull with one sail."""
    brush.line(((0.50, 0.03), (0.50, 0.70)), 0.06, DARK)
    brush.polygon(((0.56, 0.04), (0.92, 0.56), (0.56, 0.56)), PALE)
    brush.polygon(((0.44, 0.14), (0.44, 0.56), (0.14, 0.56)), colour)
    brush.polygon(((0.0, 0.66), (1.0, 0.66), (0.80, 1.0), (0.20, 1.0)), colour)


def box(brush: Brush, colour: Colour) -> None:
    """A parcel with pale tape."""
    brush.polygon(_rectangle(0.0, 0.0, 1.0, 1.0), colour)
    brush.polygon(_rectangle(0.40, 0.0, 0.60, 1.0), PALE)
    brush.polygon(_rectangle(0.0, 0.0, 1.0, 0.24), colour)


def car(brush: Brush, colour: Colour) -> None:
    """A car from its side."""
    brush.polygon(((0.20, 0.42), (0.32, 0.0), (0.70, 0.0), (0.84, 0.42)), colour)
    brush.polygon(((0.31, 0.38), (0.38, 0.12), (0.48, 0.12), (0.48, 0.38)), PALE)
    brush.polygon(((0.55, 0.38), (0.55, 0.12), (0.65, 0.12), (0.73, 0.38)), PALE)
    brush.polygon(((0.0, 0.46), (0.20, 0.38), (0.84, 0.38), (1.0, 0.50), (1.0, 0.80), (0.0, 0.80)), colour)
    for x in (0.24, 0.76):
        _wheel(brush, x, 0.13, 0.58)


def chair(brush: Brush, colour: Colour) -> None:
    """A chair from its side, its broad back to the right."""
    brush.line(((0.12, 0.66), (0.12, 0.96)), 0.11, colour)
    brush.line(((0.88, 0.66), (0.88, 0.96)), 0.11, colour)
    brush.polygon(_rectangle(0.52, 0.0, 1.0, 0.56), colour)
    brush.polygon(_rectangle(0.0, 0.52, 1.0, 0.74), colour)


def dog(brush: Brush, colour: Colour) -> None:
    """A dog: short legs, raised tail, hanging ear."""
    brush.line(((0.10, 0.40), (0.05, 0.10)), 0.12, colour)
    for x in (0.20, 0.34, 0.58, 0.70):
        brush.line(((x, 0.60), (x, 0.95)), 0.11, colour)
    brush.polygon(((0.10, 0.34), (0.66, 0.34), (0.78, 0.46), (0.74, 0.74), (0.12, 0.74)), colour)
    brush.ellipse((0.60, 0.04, 0.90, 0.54), colour)
    brush.polygon(((0.82, 0.24), (1.0, 0.26), (1.0, 0.46), (0.80, 0.48)), colour)
    brush.ellipse((0.60, 0.08, 0.72, 0.50), DARK)
    brush.ellipse((0.94, 0.24, 1.0, 0.34), DARK)


def horse(brush: Brush, colour: Colour) -> None:
    """A horse: long legs, long raised neck, dark mane and tail."""
    brush.line(((0.10, 0.42), (0.03, 0.72)), 0.10, DARK)
    for x in (0.17, 0.29, 0.57, 0.68):
        brush.line(((x, 0.60), (x, 0.96)), 0.09, colour)
    brush.polygon(((0.08, 0.36), (0.62, 0.36), (0.74, 0.44), (0.72, 0.68), (0.10, 0.68)), colour)
    brush.polygon(((0.52, 0.44), (0.66, 0.02), (0.82, 0.06), (0.74, 0.52)), colour)
    brush.polygon(((0.68, 0.04), (0.80, 0.04), (1.0, 0.22), (0.96, 0.34), (0.72, 0.24)), colour)
    brush.line(((0.50, 0.42), (0.58, 0.20), (0.66, 0.03)), 0.09, DARK)


PAINTERS: dict[str, Callable[[Brush, Colour], None]] = {
    "ball": ball,
    "bike": bike,
    "boat": boat,
    "box": box,
    "car": car,
    "chair": chair,
    "dog": dog,
    "horse": horse,
}
# Where an object shows its pattern best: the middle, x and y, and the size in shares of the object's height.
_PANELS: dict[str, tuple[float, float, float]] = {
    "ball": (0.5, 0.5, 0.80),
    "bike": (0.51, 0.46, 0.44),
    "boat": (0.5, 0.81, 0.40),
    "box": (0.22, 0.62, 0.55),
    "car": (0.5, 0.58, 0.46),
    "chair": (0.76, 0.27, 0.52),
    "dog": (0.40, 0.54, 0.44),
    "horse": (0.40, 0.52, 0.40),
}


class _ObjectBrush:
    """Maps the unit square to a box, mirrored when facing left; see `Brush`."""

    def __init__(self, canvas: Canvas, box: Box, facing: str):
        self.canvas = canvas
        inset = canvas.outline * 0.75
        self.x0, self.y0 = box[0] * canvas.scale + inset, box[1] * canvas.scale + inset
        self.width = (box[2] - box[0]) * canvas.scale - 2 * inset
        self.height = (box[3] - box[1]) * canvas.scale - 2 * inset
        self.mirrored = facing == "left"

    def point(self, x: float, y: float) -> tuple[float, float]:
        return self.x0 + (1.0 - x if self.mirrored else x) * self.width, self.y0 + y * self.height

    def polygon(self, points: Points, fill: Colour) -> None:
        self.canvas.polygon(tuple(self.point(*p) for p in points), fill)

    def ellipse(self, box: Box, fill: Colour) -> None:
        (xa, y0), (xb, y1) = self.point(box[0], box[1]), self.point(box[2], box[3])
        self.canvas.disc((min(xa, xb), y0, max(xa, xb), y1), fill)

    def line(self, points: Points, width: float, fill: Colour) -> None:
        self.canvas.stroke(tuple(self.point(*p) for p in points), width * self.height, fill)


def paint_object(canvas: Canvas, name: str, look: Appearance, box: Box, facing: str) -> None:
    """Paint an object whose silhouette fills a box.

    Args:
        canvas: what is painted on.
        name: of `PAINTERS`.
        look: what the object looks like.
        box: xyxy in [0, 1].
        facing: "left" or "right".
    """
    brush = _ObjectBrush(canvas, box, facing)
    PAINTERS[name](brush, COLOURS[look.colour])
    if look.second_colour is not None:
        x, y, size = _PANELS[name]
        length = size * brush.height
        colour = SECOND_COLOURS[look.second_colour]
        canvas.decorate(look.pattern, colour, brush.point(x, y), (length, 0.0), (0.0, length))
