"""Detections that something else made, from files: ours, FGAHOI's and QPIC's, PViC's and UPT's.

The way to score with detectors that no longer install. No pickle is executed: files that are one are refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from interactdiff.data.classes import SUBJECT, coco_objects, hico_classes
from interactdiff.errors import DataError, ModelError
from interactdiff.evaluation.detection import (
    DetectedPair,
    Instance,
    Picture,
    PictureDetections,
    by_name,
    from_row,
)
from interactdiff.scene_checks import shown

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz")
MAT_FILES = tuple(f"detections_{number:02}.mat" for number in range(1, 81))
MAT_COLUMNS = 9  # human box, object box, score


@dataclass(frozen=True)
class DetectionFile:
    """Detections read from a file, as a `HoiDetector`.

    Attributes:
        name: what tables call it.
        find: what the file says of a picture, by its file name; None if nothing.
        size: width and height of the pictures that the boxes are of, where the file does not say; None is
            each picture's own size.
    """

    name: str
    find: Callable[[str], PictureDetections | None]
    size: tuple[int, int] | None = None
    digest: ClassVar[str] = ""

    def detect(self, pictures: Sequence[Picture]) -> list[PictureDetections]:
        """What the file says of each picture; nothing is found in those that it does not name."""
        rows = {one.file_name: found for one in pictures if (found := self.find(one.file_name)) is not None}
        return [
            found if found.size is not None else replace(found, size=self.size or picture.shown_size)
            for found, picture in zip(by_name(rows, pictures), pictures, strict=True)
        ]


def load_detections(path: Path, size: tuple[int, int] | None = None) -> DetectionFile:
    """Detections of a file, whose kind its name and content tell.

    Args:
        path: JSON lines as `detection.to_row` writes them (.jsonl); what FGAHOI or QPIC collect in `preds`,
            as JSON (.json); or the folder with the 80 .mat files that PViC and UPT write for HICO-DET.
        size: see `DetectionFile`.

    Raises:
        DataError: it is missing, damaged, or of another kind.
    """
    name = f"file:{path.name}"
    if path.is_dir():
        return DetectionFile(name, _mat_files(path), size)
    if not path.exists():
        raise DataError(f"expected detections at {path}, got no such file")
    if path.suffix == ".jsonl":
        return DetectionFile(name, _json_lines(path), size)
    if path.suffix == ".json":
        return DetectionFile(name, _predictions(path).get, size)
    kind = f"a {path.suffix} file, which holds a pickle" if path.suffix in PICKLES else shown(path.suffix)
    raise DataError(
        f"expected detections as .jsonl, .json or a folder of .mat files, got {kind}: pickles are "
        f"not executed, so write its content as JSON where it was made"
    )


def _json_lines(path: Path) -> Callable[[str], PictureDetections | None]:
    """Rows are read when they are wanted; what is kept is where each begins."""
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as lines:
        place = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                name, _, _ = _parsed(line, path, number)
                if name in places:
                    raise DataError(
                        f"{path}, line {number}: expected each picture once, got {name!r} of line "
                        f"{places[name][1]} again"
                    )
                places[name] = (place, number)
            place += len(line)

    def find(name: str) -> PictureDetections | None:
        if name not in places:
            return None
        place, number = places[name]
        with path.open("rb") as lines:
            lines.seek(place)
            return _parsed(lines.readline(), path, number)[1]

    return find


def _parsed(line: bytes, path: Path, number: int) -> tuple[str, PictureDetections, dict[str, Any]]:
    try:
        return from_row(line.decode("utf-8"), f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: expected UTF-8, got {error.reason}") from None


def _predictions(path: Path) -> Mapping[str, PictureDetections]:
    """FGAHOI's and QPIC's: objects count from 0 in COCO's order, verbs from 0 in HICO-DET's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"expected JSON in {path}, got {error}") from None
    rows = content.get("preds") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f"expected a list of predictions in {path}, got {shown(rows)}")
    names, verbs = tuple(coco_objects().values()), hico_classes().verbs
    found: dict[str, PictureDetections] = {}
    for number, row in enumerate(rows, start=1):
        try:
            boxes = [
                Instance(names[_index(one["category_id"], 80)], _edges(one["bbox"]), 1.0)
                for one in row["predictions"]
            ]
            pairs = tuple(
                DetectedPair(
                    _index(one["subject_id"], len(boxes)),
                    _index(one["object_id"], len(boxes)),
                    verbs[_index(one["category_id"], len(verbs))],
                    float(one["score"]),
                )
                for one in row["hoi_prediction"]
            )
            found[row["filename"]] = PictureDetections(None, tuple(boxes), tuple(boxes), pairs)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise DataError(
                f"{path}, picture {number}: expected filename, predictions (bbox, category_id from 0) and "
                f"hoi_prediction (subject_id, object_id, category_id from 0, score), got {kind}: {error}"
            ) from None
    return found


def _index(value: Any, count: int) -> int:
    if not 0 <= int(value) < count:
        raise ValueError(f"{value} of {count}")
    return int(value)


def _edges(box: Any) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return x0, y0, x1, y1


def _mat_files(folder: Path) -> Callable[[str], PictureDetections | None]:
    """PViC's and UPT's cache: a file for each object, a row for each of its classes, a column for a picture.

    Columns are the pictures of HICO-DET's test set in the order of their numbers; boxes end with their last
    pixel, counted from 0.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ModelError(
            "expected scipy to read .mat files, got none: pip install 'interactdiff[eval]'"
        ) from None
    if missing := [name for name in MAT_FILES if not (folder / name).is_file()]:
        raise DataError(f"expected {MAT_FILES[0]} to {MAT_FILES[-1]} in {folder}, got none of {missing[0]}")
    table = hico_classes()
    cells: list[tuple[int, np.ndarray]] = []
    for number, name in enumerate(MAT_FILES):
        of_object = [hoi for hoi, (_, thing) in enumerate(table.numbers) if thing == number]
        try:
            boxes = loadmat(folder / name)["all_boxes"]
        except Exception as error:  # damaged files raise as many kinds of errors as there are damages
            kind = type(error).__name__
            raise DataError(f"expected all_boxes in {folder / name}, got {kind}: {error}") from None
        if boxes.ndim != 2 or len(boxes) != len(of_object):
            raise DataError(
                f"expected {len(of_object)} rows of {table.objects[number]} in {folder / name}, got "
                f"an array of {list(boxes.shape)}"
            )
        cells += zip(of_object, boxes, strict=True)

    def find(file_name: str) -> PictureDetections | None:
        digits = re.search(r"_(\d{8})\.\w+$", file_name)
        if digits is None:
            raise DataError(f"expected names as HICO_test2015_00000001.jpg for .mat files, got {file_name}")
        column = int(digits[1]) - 1
        persons, objects, pairs = [], [], []
        for hoi, row in cells:
            if column >= len(row) or not row[column].size:
                continue
            verb, thing = table.classes[hoi]
            if row[column].shape[-1] != MAT_COLUMNS:
                raise DataError(
                    f"{folder}, {file_name}: expected rows of {MAT_COLUMNS} numbers, got {row[column].shape}"
                )
            for line in np.asarray(row[column], dtype=float):
                pairs.append(DetectedPair(len(persons), len(objects), verb, float(line[8])))
                persons.append(Instance(SUBJECT, _edges(line[:4]), 1.0))
                objects.append(Instance(thing, _edges(line[4:8]), 1.0))
        return PictureDetections(None, tuple(persons), tuple(objects), tuple(pairs), inclusive=True)

    return find
