"""Object pictograms: painters that fill the unit square (x, y in [0, 1] downwards, facing right)."""

from collections.abc import Callable
from typing import Protocol

Colour = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]
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
    """A beach ball: one colour with a pale band."""
    brush.ellipse((0.0, 0.0, 1.0, 1.0), colour)
    brush.polygon(((0.06, 0.38), (0.94, 0.38), (0.98, 0.5), (0.94, 0.62), (0.06, 0.62), (0.02, 0.5)), PALE)


def bike(brush: Brush, colour: Colour) -> None:
    """Two wheels and a thick frame."""
    for x in (0.22, 0.78):
        brush.ellipse((x - 0.22, 0.36, x + 0.22, 1.0), DARK)
        brush.ellipse((x - 0.12, 0.51, x + 0.12, 0.85), PALE)
    brush.line(((0.22, 0.68), (0.36, 0.30), (0.70, 0.30), (0.48, 0.68), (0.22, 0.68)), 0.13, colour)
    brush.line(((0.78, 0.68), (0.68, 0.10), (0.84, 0.08)), 0.13, colour)
    brush.line(((0.26, 0.20), (0.44, 0.20)), 0.13, DARK)
    brush.line(((0.36, 0.30), (0.35, 0.22)), 0.10, colour)
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
    """A chair from its side, its back to the right."""
    brush.line(((0.12, 0.60), (0.12, 0.96)), 0.11, colour)
    brush.line(((0.88, 0.60), (0.88, 0.96)), 0.11, colour)
    brush.polygon(_rectangle(0.78, 0.0, 1.0, 0.62), colour)
    brush.polygon(_rectangle(0.0, 0.48, 1.0, 0.66), colour)


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
