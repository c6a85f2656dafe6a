"""Boxes in other forms than shares of width and height: read if users say so, recognised if they do not."""

from dataclasses import fields, replace
from functools import cache
from typing import Any

from interactdiff.scene_checks import Box, as_float

FORMS = ("shares", "pixels", "percent", "shares-xywh", "pixels-xywh", "percent-xywh")
Size = tuple[int, int]
"""Width and height in pixels."""


@cache
def box_fields(kind: type) -> tuple[str, ...]:
    """The fields of a kind of item that are boxes: `box`, and those that end in `_box`."""
    return tuple(field.name for field in fields(kind) if field.name.split("_")[-1] == "box")


def with_boxes(item: Any, boxes: dict[str, Box]) -> Any:
    """The same item with other boxes, by the names of its fields."""
    return replace(item, **boxes)


def area(box: Box) -> float:
    """Area of a box, in shares of the picture's; 0 if its edges are not in order."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def clamped(box: Box) -> Box:
    """The part of a box that is in the picture; its edges are equal where nothing of it is."""
    x0, y0, x1, y1 = (min(1.0, max(0.0, edge)) for edge in box)
    return (x0, y0, x1, y1)


def numbers(value: Any) -> Box | None:
    """Four finite numbers, or None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    edges = [as_float(edge) for edge in value]
    if any(edge is None or edge != edge or abs(edge) == float("inf") for edge in edges):
        return None
    return tuple(edges)  # type: ignore[return-value]


def to_shares(value: Any, form: str, size: Size | None) -> Any:
    """A box of another form as x0, y0, x1, y1 in shares; what is no four numbers comes back as it is.

    Args:
        value: as JSON has it.
        form: one of `FORMS`.
        size: width and height of the picture as shown, which only pixels need.
    """
    if form == "shares" or (edges := numbers(value)) is None:
        return value
    unit, _, sides = form.partition("-")
    if sides:
        x, y, width, height = edges
        edges = (x, y, x + width, y + height)
    if unit == "percent":
        return [edge / 100 for edge in edges]
    if unit == "pixels":
        if size is None:
            return value
        return [edge / side for edge, side in zip(edges, (*size, *size), strict=True)]
    return list(edges)


def likely_form(value: Any, size: Size | None) -> str | None:
    """Which other form a box that is refused as shares is most likely in; None if it fits none of them."""
    if (edges := numbers(value)) is None or min(edges) < 0:
        return None
    x0, y0, x1, y1 = edges
    in_order = x0 < x1 and y0 < y1
    if max(edges) <= 1:  # one pair of edges the wrong way round is rather a slip
        sides = x0 >= x1 > 0 and y0 >= y1 > 0 and x0 + x1 <= 1 and y0 + y1 <= 1
        return "shares-xywh" if sides else None
    end_x, end_y = (x1, y1) if in_order else (x0 + x1, y0 + y1)
    tail = "" if in_order else "-xywh"
    if size is not None and max(end_x, end_y) <= 100 and max(size) > 200:
        return f"percent{tail}"
    if size is not None and end_x <= size[0] and end_y <= size[1]:
        return f"pixels{tail}"
    return None
