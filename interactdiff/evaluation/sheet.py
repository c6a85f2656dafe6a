"""A sheet of the best, the median and the worst pictures, with the boxes of their layouts and those found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from interactdiff.evaluation.detection import PictureDetections, PixelBox, in_pixels
from interactdiff.evaluation.hoi import iou
from interactdiff.evaluation.hoi_matching import Outcomes
from interactdiff.evaluation.hoi_protocols import LEAST_IOU
from interactdiff.evaluation.layout_detection import PictureSet, found_in
from interactdiff.evaluation.report import CEILING, ROWS

if TYPE_CHECKING:
    from interactdiff.evaluation.layout import Layout
    from interactdiff.evaluation.layout_run import Evaluation, LayoutRun

ACROSS = 8  # pictures of each kind
CELL, GAP, TITLE, LINE = 256, 12, 26, 15  # pixels
WANTED, RIGHT, ELSEWHERE, OTHER = "#0057d9", "#007a3d", "#b35c00", "#d6006c"
WORDS = 3  # lines of them below a picture


@dataclass(frozen=True)
class SheetPicture:
    """A picture of the sheet: its score in 0..1, and what was found in it."""

    score: float
    layout: "Layout"
    found: PictureDetections
    image: Image.Image


def picture_scores(outcomes: Outcomes) -> np.ndarray:
    """[S] in 0..1: of what each picture should show, the share found, by `exact`; NaN if it should nothing.

    Of pictures with equal shares, those whose right detections are surer come first by a small part.
    """
    bit = 1 << outcomes.protocols.index("exact")
    right = (outcomes.correct & bit) > 0
    wanted = outcomes.wanted
    top = outcomes.score[right].max(initial=1e-12)
    sureness = np.bincount(outcomes.picture[right], outcomes.score[right] / top, minlength=outcomes.pictures)
    with np.errstate(invalid="ignore"):
        return (outcomes.hits("exact") + 0.01 * sureness) / np.where(wanted, 1.01 * wanted, np.nan)


def chosen(scores: np.ndarray, count: int = ACROSS) -> dict[str, list[int]]:
    """Numbers of the best, the median and the worst pictures, each best first and no picture twice.

    Where there are fewer than three times `count`, each kind has about a third of them.
    """
    order = [int(n) for n in np.argsort(-scores, kind="stable") if not np.isnan(scores[n])]
    ends = min(count, max(1, (len(order) + 1) // 3))
    between = order[ends : len(order) - ends]
    start = max(0, (len(between) - count) // 2)
    rows = {
        "best": order[:ends],
        "median": between[start : start + count],
        "worst": order[max(ends, len(order) - ends) :],
    }
    return {kind: numbers for kind, numbers in rows.items() if numbers}


def evaluation_sheet(run: "LayoutRun", evaluation: "Evaluation") -> Image.Image:
    """The sheet of an evaluation: of the adapter's pictures, else of the first row beside the ceiling."""
    names = [name for name in evaluation.sets if name != CEILING] or list(evaluation.sets)
    name = "adapter" if "adapter" in names else names[0]
    pictures = evaluation.sets[name][0]
    scores = picture_scores(evaluation.rows[name].outcomes[0])
    numbers = chosen(scores)
    wanted = {number for of_kind in numbers.values() for number in of_kind}
    by_number = dict(_looked_up(run, evaluation, pictures, wanted, scores))
    rows = {kind: [by_number[number] for number in of_kind] for kind, of_kind in numbers.items()}
    seed = f", seed {pictures.seed}" if len(evaluation.sets[name]) > 1 else ""
    return sheet(rows, f"{ROWS.get(name, name)}{seed}, {run.data.name}, detector {run.detector_name}")


def _looked_up(
    run: "LayoutRun",
    evaluation: "Evaluation",
    pictures: PictureSet,
    wanted: set[int],
    scores: np.ndarray,
) -> Iterator[tuple[int, SheetPicture]]:
    rows = found_in(run.data.layouts, pictures, evaluation.looking(pictures))
    for number, (layout, found) in enumerate(rows):
        if number in wanted:
            picture = pictures.picture(layout)
            size = found.size or layout.size or (CELL, CELL)
            image = picture.open() if picture.there else Image.new("RGB", size, "white")
            yield number, SheetPicture(float(scores[number]), layout, found, image)


def sheet(rows: Mapping[str, Sequence[SheetPicture]], title: str) -> Image.Image:
    """Draw the sheet.

    Args:
        rows: pictures by what they are.
        title: above them.
    """
    across = max((len(pictures) for pictures in rows.values()), default=1)
    height = TITLE + CELL + WORDS * LINE + GAP
    canvas = Image.new("RGB", (across * (CELL + GAP) + GAP, 2 * TITLE + GAP + len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = _font(17), _font(12)
    draw.text((GAP, GAP), title, "black", large)
    legend = (
        ("layout", WANTED),
        ("found at its boxes", RIGHT),
        ("found elsewhere", ELSEWHERE),
        ("another class", OTHER),
    )
    x = GAP
    for words, colour in legend:
        draw.text((x, GAP + TITLE), words, colour, small)
        x += int(draw.textlength(words, small)) + 2 * GAP
    for row, (kind, pictures) in enumerate(rows.items()):
        top = 2 * TITLE + GAP + row * height
        for column, one in enumerate(pictures):
            left = GAP + column * (CELL + GAP)
            draw.text((left, top + 6), f"{kind} {column + 1}: {100 * one.score:.0f}%", "black", small)
            canvas.paste(_with_boxes(one), (left, top + TITLE))
            words = [f"{i.subject} {i.action or '-'} {i.object}" for i in one.layout.interactions]
            for number, line in enumerate(words[:WORDS]):
                if number == WORDS - 1 and len(words) > WORDS:
                    line = f"and {len(words) - WORDS + 1} more"
                place = (left, top + TITLE + CELL + number * LINE)
                draw.text(place, _shortened(draw, line, small), "black", small)
    return canvas


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    while len(text) > 2 and draw.textlength(text, font) > CELL:
        text = text[:-2] + "…"
    return text


def _with_boxes(one: SheetPicture) -> Image.Image:
    """The picture in its cell: dashed boxes of the layout, solid ones of the surest pairs, as many."""
    scale = CELL / max(one.image.size)
    inner = (max(1, round(one.image.width * scale)), max(1, round(one.image.height * scale)))
    resampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    cell = Image.new("RGB", (CELL, CELL), "#eeeeee")
    cell.paste(one.image.resize(inner, resampling), (0, 0))
    draw = ImageDraw.Draw(cell)
    size = one.found.size or one.image.size
    across, down = inner[0] / size[0], inner[1] / size[1]
    most = max(1, len(one.layout.interactions))
    labels = []
    pairs = [(pair, thing) for pair in one.found.pairs if (thing := one.found.object_of(pair)) is not None]
    for pair, thing in sorted(pairs, key=lambda both: -both[0].score)[:most]:
        person = one.found.persons[pair.person]
        colour = _colour(one, pair.verb, thing.name, person.box, thing.box, size)
        for x0, y0, x1, y1 in (person.box, thing.box):
            draw.rectangle(_ordered(x0 * across, y0 * down, x1 * across, y1 * down), outline=colour, width=2)
        words = f"{pair.verb} {thing.name} {pair.score:.2f}"
        labels.append((words, person.box[0] * across, person.box[1] * down, colour))
    for interaction in one.layout.interactions:
        for share in (interaction.subject_box, interaction.object_box):
            x0, y0, x1, y1 = in_pixels(share, inner)
            _dashed(draw, (x0, y0, x1 - 1, y1 - 1), WANTED)
    for label in labels:
        _label(draw, *label)
    return cell


def _colour(
    one: SheetPicture, verb: str, thing: str, person: PixelBox, object_: PixelBox, size: tuple[int, int]
) -> str:
    """Whether a pair that is found is what an interaction of the layout says, and where it says."""
    same = [i for i in one.layout.interactions if (i.action, i.object) == (verb, thing)]

    def near(share: PixelBox, found: PixelBox) -> bool:
        return iou(in_pixels(share, size), found) >= LEAST_IOU

    if any(near(i.subject_box, person) and near(i.object_box, object_) for i in same):
        return RIGHT
    return ELSEWHERE if same else OTHER


def _ordered(x0: float, y0: float, x1: float, y1: float) -> PixelBox:
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, colour: str) -> None:
    font = _font(11)
    width = draw.textlength(text, font)
    x, y = max(0, min(x, CELL - width - 4)), max(0, min(y, CELL - 15))
    draw.rectangle((x, y, x + width + 4, y + 14), fill=colour)
    draw.text((x + 2, y), text, "white", font)


def _dashed(draw: ImageDraw.ImageDraw, box: PixelBox, colour: str, dash: int = 6) -> None:
    x0, y0, x1, y1 = box
    for start, end in (
        ((x0, y0), (x1, y0)),
        ((x0, y1), (x1, y1)),
        ((x0, y0), (x0, y1)),
        ((x1, y0), (x1, y1)),
    ):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for at in range(0, int(length), 2 * dash):
            a, b = at / length, min((at + dash) / length, 1)
            draw.line(
                [
                    (start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share)
                    for share in (a, b)
                ],
                fill=colour,
                width=2,
            )
