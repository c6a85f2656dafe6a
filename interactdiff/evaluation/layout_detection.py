"""Lets a detector look at the pictures of layouts, shared out over processes and kept for the next run."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from interactdiff.errors import DataError
from interactdiff.evaluation.detection import (
    HoiDetector,
    Picture,
    PictureDetections,
    read_rows,
    to_row,
)
from interactdiff.evaluation.detection_files import DetectionFile
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_drawing import Ranks, batches
from interactdiff.files import write_aside


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one row and seed.

    Attributes:
        row: its name.
        seed: of the noise; 0 for pictures that were not drawn here.
        picture: of a layout.
    """

    row: str
    seed: int
    picture: Callable[[Layout], Picture]


@dataclass(frozen=True)
class Looking:
    """How pictures are looked at.

    Attributes:
        detector: that looks.
        folder: where what it finds is kept, DIR/ROW/seed-N/BATCH.jsonl; it belongs to this detector alone.
        batch_size: pictures at a time.
    """

    detector: HoiDetector
    folder: Path
    batch_size: int

    def batch_file(self, pictures: PictureSet, number: int) -> Path:
        """Where what is found in a batch is."""
        return self.folder / pictures.row / f"seed-{pictures.seed}" / f"{number:06}.jsonl"


def detections_folder(out: Path, detector: HoiDetector, table: ClassTable) -> Path:
    """A folder for what a detector finds: another one for other weights, calibration or classes."""
    decides = [detector.name, detector.digest, getattr(detector, "scale", None), table.classes]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return out / "detections" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', detector.name)[:60]}-{digest}"


def look(
    layouts: Sequence[Layout], pictures: PictureSet, looking: Looking, ranks: Ranks, progress: bool = False
) -> None:
    """Detect what is in this process's share of pictures, but for those that have been looked at.

    Raises:
        DataError: a picture is missing or damaged.
    """
    if isinstance(looking.detector, DetectionFile):
        return
    todo = list(batches(len(layouts), looking.batch_size, ranks))
    title = f"{pictures.row}, seed {pictures.seed}, detections"
    for number, numbers in tqdm(todo, unit="batch", desc=title, disable=not progress):
        batch = [pictures.picture(layouts[one]) for one in numbers]
        sums = [zlib.crc32(one.read()) for one in batch]
        file = looking.batch_file(pictures, number)
        if _kept(file, batch, sums):
            continue
        found = looking.detector.detect(batch)
        rows = [
            to_row(one.file_name, what, crc32=crc) for one, what, crc in zip(batch, found, sums, strict=True)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{row}\n" for row in rows)
        write_aside(file, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


def found_in(
    layouts: Sequence[Layout], pictures: PictureSet, looking: Looking
) -> Iterator[tuple[Layout, PictureDetections]]:
    """What is found in all pictures, one after the other, once all processes have looked.

    Raises:
        DataError: what is kept of a batch is damaged.
    """
    for number, numbers in batches(len(layouts), looking.batch_size, Ranks()):
        batch = [layouts[one] for one in numbers]
        if isinstance(looking.detector, DetectionFile):
            found = looking.detector.detect([pictures.picture(layout) for layout in batch])
            yield from zip(batch, found, strict=True)
            continue
        rows = read_rows(looking.batch_file(pictures, number))
        for layout, (name, found_there, _) in zip(batch, rows, strict=True):
            if name != layout.file_name:
                raise DataError(f"expected detections in {layout.file_name}, got some in {name}")
            yield layout, found_there


def _kept(file: Path, batch: Sequence[Picture], sums: Sequence[int]) -> bool:
    """Whether a file holds what is found in these very pictures."""
    try:
        rows = [(name, more.get("crc32")) for name, _, more in read_rows(file)]
    except DataError:
        return False
    return rows == [(one.file_name, crc) for one, crc in zip(batch, sums, strict=True)]
