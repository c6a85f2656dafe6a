"""Whether what a layout names is in its boxes: mean IoU, AP50, and relations by a vision-language model."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from interactdiff.errors import ModelError
from interactdiff.evaluation.bootstrap import Share
from interactdiff.evaluation.detection import Instance, Picture, PixelBox, in_pixels
from interactdiff.evaluation.hoi import iou
from interactdiff.evaluation.hoi_protocols import LEAST_IOU
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.two_stage import BoxDetector

LEAST_SCORE = 0.25  # of an instance that counts for mean IoU
SAME_BOX = 0.7  # IoU above which two boxes of one name are one thing: data sets draw them once for each verb
GRID = 1000  # of the coordinates in questions
Answer = Callable[[Image.Image, str], str]
"""What a model says of a picture and a question."""


def wanted_boxes(layout: Layout, size: tuple[int, int]) -> list[tuple[str, PixelBox]]:
    """Names and boxes of what a layout holds, each thing once, in pixels."""
    kept: list[tuple[str, PixelBox]] = []
    for name, box in layout.named_boxes:
        pixels = in_pixels(box, size)
        if not any(name == other and iou(pixels, there) > SAME_BOX for other, there in kept):
            kept.append((name, pixels))
    return kept


def found_boxes(detector: BoxDetector, image: Image.Image, names: Sequence[str]) -> list[Instance]:
    """What of these names a detector finds in a picture."""
    return detector.boxes([image], tuple(dict.fromkeys(names)))[0] if names else []


def box_ious(wanted: Sequence[tuple[str, PixelBox]], found: Sequence[Instance]) -> list[float]:
    """IoU of each box with what is found for it, one to one within a name, the largest sum; else 0.

    Raises:
        ModelError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ModelError("expected scipy for mean IoU, got none: pip install 'interactdiff[eval]'") from None
    values = [0.0] * len(wanted)
    for name in {name for name, _ in wanted}:
        places = [n for n, (other, _) in enumerate(wanted) if other == name]
        there = [one for one in found if one.name == name and one.score >= LEAST_SCORE]
        if there:
            table = np.array([[iou(wanted[n][1], one.box) for one in there] for n in places])
            for row, column in zip(*linear_sum_assignment(-table), strict=True):
                values[places[row]] = float(table[row, column])
    return values


def mean_iou(
    detector: BoxDetector, pictures: Sequence[Picture], layouts: Sequence[Layout]
) -> dict[str, Share]:
    """Mean IoU of boxes, and the share of them above 0.5, by picture (MIG-Bench, with boxes for masks)."""
    total, summed, above = (np.zeros(len(layouts)) for _ in range(3))
    for number, (picture, layout) in enumerate(zip(pictures, layouts, strict=True)):
        image = picture.open()
        wanted = wanted_boxes(layout, image.size)
        values = box_ious(wanted, found_boxes(detector, image, [name for name, _ in wanted]))
        total[number], summed[number] = len(values), sum(values)
        above[number] = sum(value > LEAST_IOU for value in values)
    return {"miou": Share(summed, total), "miou_50": Share(above, total)}


def ap50(detector: BoxDetector, pictures: Sequence[Picture], layouts: Sequence[Layout]) -> float:
    """COCO's AP at an IoU of 0.5 of a detector's boxes, with the layouts as truth, by pycocotools.

    Raises:
        ModelError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ModelError(
            "expected pycocotools for AP50, got none: pip install 'interactdiff[eval]'"
        ) from None
    names = sorted({name for layout in layouts for name, _ in wanted_boxes(layout, (1, 1))})
    truth, results = [], []
    for number, (picture, layout) in enumerate(zip(pictures, layouts, strict=True), start=1):
        image = picture.open()
        for name, box in wanted_boxes(layout, image.size):
            values = _coco(number, names.index(name), box)
            truth.append({**values, "id": len(truth) + 1, "iscrowd": 0})
        for one in found_boxes(detector, image, names):
            results.append({**_coco(number, names.index(one.name), one.box), "score": one.score})
    if not truth or not results:
        return 0.0
    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(1, len(layouts) + 1)],
        "annotations": truth,
        "categories": [{"id": number} for number in range(len(names))],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        scores = COCOeval(coco, coco.loadRes(results), "bbox")
        scores.params.iouThrs = np.array([LEAST_IOU])
        scores.evaluate()
        scores.accumulate()
    precision = scores.eval["precision"][0, :, :, 0, -1]  # [recalls, categories], all areas
    return float(precision[precision > -1].mean())


def _coco(number: int, category: int, box: PixelBox) -> dict:
    x0, y0, x1, y1 = box
    sides = [x0, y0, x1 - x0, y1 - y0]
    return {"image_id": number, "category_id": category, "bbox": sides, "area": sides[2] * sides[3]}


def relation_score(answer: Answer, pictures: Sequence[Picture], layouts: Sequence[Layout]) -> Share:
    """The share of relations that a model says are shown, by picture: OverLayBench's SR_R.

    One question a picture, with all boxes and relations; an answer that is missing counts as no.

    Args:
        answer: of a vision-language model.
        pictures: one of each layout.
        layouts: whose interactions are the relations; those without an action are none.
    """
    yes, total = np.zeros(len(layouts)), np.zeros(len(layouts))
    for number, (picture, layout) in enumerate(zip(pictures, layouts, strict=True)):
        relations = list(_relations(layout))
        total[number] = len(relations)
        if relations:
            yes[number] = sum(_answers(answer(picture.open(), _question(relations)), len(relations)))
    return Share(yes, total)


def _relations(layout: Layout) -> Iterator[str]:
    for one in layout.interactions:
        if one.action is not None:
            subject, thing = (_on_grid(box) for box in (one.subject_box, one.object_box))
            yield f"the {one.subject} at {subject} is {one.action} the {one.object} at {thing}"


def _on_grid(box: PixelBox) -> str:
    return f"[{', '.join(str(round(edge * GRID)) for edge in box)}]"


def _question(relations: Sequence[str]) -> str:
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(relations, start=1))
    return (
        f"Boxes are [x0, y0, x1, y1] on a grid of {GRID} x {GRID} over the picture. For each numbered "
        f"statement, does the picture show it? Answer with one line each, as '1: yes' or '1: no'.\n{listed}"
    )


def _answers(text: str, count: int) -> list[bool]:
    """What is said of each number, the first time."""
    said: dict[int, bool] = {}
    for number, word in re.findall(r"(\d+)\s*[:.)-]*\s*(yes|no)\b", text, re.IGNORECASE):
        said.setdefault(int(number), word.lower() == "yes")
    return [said.get(number, False) for number in range(1, count + 1)]
