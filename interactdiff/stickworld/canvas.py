"""Paints outlined shapes at several times the size, on a picture and on the mask of one thing."""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import Colour

OVERSAMPLING = 4
OUTLINE: Colour = (26, 26, 38)
Points = tuple[tuple[float, float], ...]
Vector = tuple[float, float]


class Canvas:
    """A square picture that is painted in pixels of the oversampled size, and averaged down at the end.

    Args:
        size: height and width of the picture in pixels.
    """

    def __init__(self, size: int):
        self.size = size
        self.scale = size * OVERSAMPLING
        self.image = Image.new("RGB", (self.scale, self.scale))
        self.draw = ImageDraw.Draw(self.image)
        self.outline = max(2.0, 0.85 * self.scale / 96)
        self.start()

    def start(self, cloth: Colour | None = None) -> None:
        """Begin a thing, whose shapes of the colour `cloth` will bear a pattern."""
        self._mask = Image.new("L", (self.scale, self.scale))
        self._mask_draw = ImageDraw.Draw(self._mask)
        self._cloth_colour = cloth
        self._cloth = None if cloth is None else Image.new("L", (self.scale, self.scale))
        self._cloth_draw = None if self._cloth is None else ImageDraw.Draw(self._cloth)

    def end_cloth(self) -> None:
        """What is painted of the thing from now on bears no pattern, whatever its colour."""
        self._cloth_colour = None

    def silhouette(self) -> np.ndarray:
        """[S, S] bool: the pixels that the thing covers at least half of."""
        return np.asarray(self._mask.reduce(OVERSAMPLING)) >= 128

    def _inks(self, fill: Colour) -> list[tuple[ImageDraw.ImageDraw, Colour | int]]:
        inks: list[tuple[ImageDraw.ImageDraw, Colour | int]] = [(self.draw, fill), (self._mask_draw, 255)]
        if self._cloth_draw is not None:
            inks.append((self._cloth_draw, 255 if fill == self._cloth_colour else 0))
        return inks

    def stroke(self, points: Points, width: float, fill: Colour) -> None:
        """Round-capped line, outlined outside its width."""
        for colour, radius in ((OUTLINE, width / 2 + self.outline), (fill, width / 2)):
            for draw, ink in self._inks(colour):
                draw.line(points, fill=ink, width=round(2 * radius), joint="curve")
                for x, y in points:
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)

    def disc(self, box: Box, fill: Colour) -> None:
        """Ellipse, outlined inside its box."""
        x0, y0, x1, y1 = box
        o = self.outline
        for draw, ink in self._inks(OUTLINE):
            draw.ellipse(box, fill=ink)
        if x1 - x0 > 2 * o and y1 - y0 > 2 * o:
            for draw, ink in self._inks(fill):
                draw.ellipse((x0 + o, y0 + o, x1 - o, y1 - o), fill=ink)

    def polygon(self, points: Points, fill: Colour) -> None:
        """Polygon, outlined around its edge."""
        for draw, ink in self._inks(fill):
            draw.polygon(points, fill=ink)
        ring = (*points, points[0], points[1])
        for draw, ink in self._inks(OUTLINE):
            draw.line(ring, fill=ink, width=round(2 * self.outline * 0.75), joint="curve")

    def dot(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """A small disc without an outline."""
        for draw, ink in self._inks(fill):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)

    def decorate(self, pattern: str, colour: Colour, middle: Vector, across: Vector, down: Vector) -> None:
        """Put a pattern on what has been painted of the thing's cloth, and is not covered since.

        Args:
            pattern: "stripes", "dots", "checks" or "star".
            colour: of the pattern.
            middle: the pattern's origin in oversampled pixels; a star is centred there.
            across: the width of the cloth, as a vector in oversampled pixels.
            down: a vector of the same length at a right angle to it.
        """
        if self._cloth is None:
            return
        layer = Image.new("L", (self.scale, self.scale))
        draw = ImageDraw.Draw(layer)

        def at(u: float, v: float) -> Vector:
            return (
                middle[0] + u * across[0] + v * down[0],
                middle[1] + u * across[1] + v * down[1],
            )

        def quad(u0: float, v0: float, u1: float, v1: float) -> None:
            draw.polygon((at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)), fill=255)

        steps = range(-9, 10)
        if pattern == "stripes":
            for n in steps:
                quad(-3, (n - 0.2) * 0.46, 3, (n + 0.2) * 0.46)
        elif pattern == "checks":
            for n in steps:
                for m in steps:
                    if (n + m) % 2:
                        quad(0.3 * n, 0.3 * m, 0.3 * (n + 1), 0.3 * (m + 1))
        elif pattern == "dots":
            radius = 0.15 * math.hypot(*across)
            for n in steps:
                for m in steps:
                    x, y = at(0.46 * (n + 0.5), 0.46 * (m + 0.5))
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            angles = [math.pi * n / 5 for n in range(10)]
            radii = [0.46 if n % 2 == 0 else 0.2 for n in range(10)]
            star = [at(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]
            draw.polygon(star, fill=255)
        self.image.paste(colour, mask=ImageChops.multiply(layer, self._cloth))
