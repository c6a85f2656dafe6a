"""How a picture is brought to a training size: aspect buckets or a square crop, and boxes that follow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

from PIL import Image

from interactdiff.data.boxes import area, box_fields, clamped, with_boxes
from interactdiff.data.words import swap_sides, triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box

_ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)  # width over height, each also turned
_SMALLER = (1.0, 0.75, 0.5, 0.25)  # of the resolution, for pictures that would have to be enlarged too much
_NO_PHRASES = ("action_region",)  # fields of text that are no words


@dataclass(frozen=True)
class Placement:
    """Which part of a picture training sees, and at what size.

    Attributes:
        window: xyxy of that part in pixels of the picture as shown; need not be whole numbers.
        source: width and height of the picture as shown, in pixels.
        size: height and width of the result, in pixels.
        flipped: whether it is mirrored, left for right.
    """

    window: Box
    source: tuple[int, int]
    size: tuple[int, int]
    flipped: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        """Cut the window out of a picture and resize it in one step (bicubic, with antialiasing).

        A picture of another size than was noted is cut at the same shares of its sides.
        """
        scale = [got / noted for got, noted in zip(image.size, self.source, strict=True)] * 2
        window = tuple(edge * by for edge, by in zip(self.window, scale, strict=True))
        x0, y0, x1, y1 = window
        window = (x0, y0, min(x1, image.width), min(y1, image.height))  # rounding of the last bit
        made = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=window)
        return made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else made

    def box(self, box: Box) -> Box:
        """A box of the picture in shares of the result; edges outside are below 0 or above 1."""
        (x0, y0, x1, y1), (width, height) = self.window, self.source
        left, right = ((edge * width - x0) / (x1 - x0) for edge in (box[0], box[2]))
        top, bottom = ((edge * height - y0) / (y1 - y0) for edge in (box[1], box[3]))
        return (1 - right, top, 1 - left, bottom) if self.flipped else (left, top, right, bottom)

    def item(self, item: Any, min_box: float = 0.0, min_visible: float = 0.0) -> Any:
        """An item with its boxes in the result and its words mirrored with the picture.

        Args:
            item: with boxes in shares of the picture.
            min_box: least area of a box, in shares of the result's.
            min_visible: least share of a box that has to be inside.

        Returns:
            The item; None where one of its boxes is too small or too little of it is left.
        """
        boxes = {}
        for name in box_fields(type(item)):
            if (given := getattr(item, name)) is None:
                continue
            moved = self.box(given)
            inside = clamped(moved)
            if area(inside) <= 0 or area(inside) < min_box or area(inside) < min_visible * area(moved):
                return None
            boxes[name] = inside
        if self.flipped:
            boxes |= {name: swap_sides(phrase) for name, phrase in phrases_of_item(item)}
        return with_boxes(item, boxes)

    def prompt(self, prompt: str, before: Sequence[Any], after: Sequence[Any]) -> str:
        """The caption of the result: without the clauses of items that are left out, mirrored if it is.

        Args:
            prompt: the picture's caption; clauses go only if it is the one that `triplet_caption` makes.
            before: the items of the picture.
            after: those of the result.
        """
        if len(after) < len(before) and prompt and prompt == triplet_caption(before):
            return triplet_caption(after)  # already mirrored, as its items are
        return swap_sides(prompt) if self.flipped else prompt


@dataclass(frozen=True)
class Framing:
    """The sizes of training, and which picture gets which.

    Attributes:
        resolution: pixels; every bucket has about the area of a square of this side.
        multiple: that sides are multiples of: 64 for U-Nets, 16 for transformers.
        square: a centre crop to a square in place of buckets (the paper's way).
        min_box: least area of a box in shares of the picture's; what is smaller is left out.
        min_visible: least share of a box that has to be left by the crop.
        max_enlarge: how much a picture is enlarged at most, before it gets a smaller bucket. Not for squares.
    """

    resolution: int = 512
    multiple: int = 64
    square: bool = False
    min_box: float = 0.001
    min_visible: float = 0.5
    max_enlarge: float = 1.25

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.resolution < self.multiple or self.resolution % self.multiple:
            raise DataError(
                f"expected a resolution that is a multiple of {self.multiple} pixels, got {self.resolution}"
            )

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths in pixels; those of the resolution come first."""
        if self.square:
            return ((self.resolution, self.resolution),)
        sizes = []
        for share in _SMALLER:
            sizes += aspect_buckets(max(self.multiple, self.resolution * share), self.multiple)
        return tuple(dict.fromkeys(sizes))

    def bucket(self, width: int, height: int) -> int:
        """The number of the bucket of a picture: the nearest in aspect of those that it is large enough for.

        Args:
            width: of the picture as shown, in pixels.
            height: likewise.
        """
        best = self.buckets[0]
        for share in () if self.square else _SMALLER:
            sizes = aspect_buckets(max(self.multiple, self.resolution * share), self.multiple)
            best = min(sizes, key=lambda size: abs(height * size[1] - width * size[0]))
            if max(best[0] / height, best[1] / width) <= self.max_enlarge:
                break
        return self.buckets.index(best)

    def place(self, width: int, height: int, items: Sequence[Any] = (), flipped: bool = False) -> Placement:
        """Which part of a picture is seen: as much as fits the bucket, nearest to the middle of its boxes.

        Args:
            width: of the picture as shown, in pixels.
            height: likewise.
            items: whose boxes the window is moved to; a square crop stays in the centre.
            flipped: whether the result is mirrored.
        """
        size = self.buckets[self.bucket(width, height)]
        scale = max(size[0] / height, size[1] / width)
        seen = min(float(width), size[1] / scale), min(float(height), size[0] / scale)
        middle = (0.5, 0.5) if self.square else _middle(items)
        starts = []
        for extent, length, at in zip(seen, (width, height), middle, strict=True):
            starts.append(min(max(at * length - extent / 2, 0.0), length - extent))
        window = (starts[0], starts[1], starts[0] + seen[0], starts[1] + seen[1])
        return Placement(window, (width, height), size, flipped)

    def items(self, placement: Placement, items: Sequence[Any]) -> tuple[Any, ...]:
        """The items of the result, without those that the crop leaves too little of."""
        placed = (item.placed(items) if hasattr(item, "placed") else item for item in items)
        moved = (placement.item(item, self.min_box, self.min_visible) for item in placed)
        return tuple(item for item in moved if item is not None)


def phrases_of_item(item: Any) -> Iterator[tuple[str, str]]:
    """The phrases of an item, with the names of their fields."""
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(value, str) and field.name not in _NO_PHRASES:
            yield field.name, value


@cache
def aspect_buckets(resolution: float, multiple: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths of about the area of a square, for aspects up to 2 either way.

    As `diffusers.training_utils.generate_aspect_ratio_buckets`, which older versions lack.

    Args:
        resolution: side of the square in pixels.
        multiple: that sides are multiples of.
    """
    sizes = []
    for aspect in _ASPECTS:
        for ratio in dict.fromkeys((aspect, 1 / aspect)):
            height = (resolution**2 / ratio) ** 0.5
            sides = (max(multiple, round(side / multiple) * multiple) for side in (height, height * ratio))
            sizes.append(tuple(sides))
    return tuple(dict.fromkeys(sizes))


def _middle(items: Sequence[Any]) -> tuple[float, float]:
    """The middle of the smallest box around all boxes; of the picture if there is none."""
    boxes = [getattr(item, name) for item in items for name in box_fields(type(item))]
    boxes = [box for box in boxes if box is not None]
    if not boxes:
        return 0.5, 0.5
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0) + max(x1)) / 2, (min(y0) + max(y1)) / 2
