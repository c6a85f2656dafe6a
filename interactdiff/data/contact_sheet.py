"""`interactdiff data show`: pictures and boxes as training sees them, on one sheet."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from interactdiff.data.framing import Framing
from interactdiff.data.order import mixed, permuted
from interactdiff.data.reading import Records
from interactdiff.errors import DataError
from interactdiff.picture import overlay
from interactdiff.scene_items import Entity, Interaction

CELL = 480  # pixels: the longer side of a picture on the sheet
_GAP, _LINES, _FONT = 16, 4, 17


def contact_sheet(
    records: Records, framing: Framing, count: int = 16, seed: int = 0, flipped: bool = False
) -> Image.Image:
    """Put pictures on a sheet, each cropped and with the boxes that are left, its caption below.

    A control image stands in its lower right corner, cropped alike.

    Args:
        records: the data.
        framing: the sizes of training.
        count: pictures at most, chosen by the seed.
        seed: which ones.
        flipped: show them mirrored, as half of training sees them.

    Raises:
        DataError: no picture can be read.
    """
    total = len(records)
    chosen = sorted(permuted(n, total, mixed(seed)) for n in range(min(count, total)))
    columns = min(4, len(chosen))
    height = CELL + _GAP + _LINES * (_FONT + 5)
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (CELL + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    errors: list[str] = []
    for place, number in enumerate(chosen):
        corner = _GAP + place % columns * (CELL + _GAP), _GAP + place // columns * (height + _GAP)
        try:
            picture, text = _cell(records, number, framing, flipped)
        except DataError as error:
            picture, text = Image.new("RGB", (CELL, CELL), "#dddddd"), f"{number}: {error}"
            errors.append(text)
        sheet.paste(picture, (corner[0] + (CELL - picture.width) // 2, corner[1] + CELL - picture.height))
        _write(sheet, text, (corner[0], corner[1] + CELL + 6))
    if len(errors) == len(chosen):
        raise DataError(f"expected pictures that can be read, got none: {errors[0]}")
    return sheet


def _cell(records: Records, number: int, framing: Framing, flipped: bool) -> tuple[Image.Image, str]:
    record, sides = records[number], (int(records.widths[number]), int(records.heights[number]))
    placement = framing.place(*sides, record.items, flipped)
    items = framing.items(placement, record.items)
    image = placement.apply(record.open())
    scale = CELL / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    if record.control is not None:
        inset = placement.apply(record.open_control()).resize((image.width // 3, image.height // 3))
        image.paste(inset, (image.width - inset.width, image.height - inset.height))
    kinds: dict[Any, list[Any]] = {Interaction: [], Entity: [], None: []}
    for item in items:
        kinds[type(item) if type(item) in kinds else None].append(item)
    drawn = overlay(image, *(tuple(kinds[kind]) for kind in (Interaction, Entity, None)))
    prompt = placement.prompt(record.prompt, record.items, items) or "(no caption)"
    dropped = len(record.items) - len(items)
    left_out = f", {dropped} of {len(record.items)} items left out" if dropped else ""
    height, width = placement.size
    return drawn, f"{record.name}, {width} x {height}{left_out}\n{prompt}"


def _write(sheet: Image.Image, text: str, corner: tuple[int, int]) -> None:
    """Write a name and a caption below a picture, broken into lines."""
    font: Any = ImageFont.load_default(size=_FONT)
    canvas = ImageDraw.Draw(sheet)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += _broken(canvas, paragraph, font)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][:-1] + "…"]
    for number, line in enumerate(lines):
        colour = "#666666" if number == 0 else "black"
        canvas.text((corner[0], corner[1] + number * (_FONT + 5)), line, fill=colour, font=font)


def _broken(canvas: ImageDraw.ImageDraw, text: str, font: Any) -> Sequence[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and canvas.textlength(longer, font) > CELL:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]
