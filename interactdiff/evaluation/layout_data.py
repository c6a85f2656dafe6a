"""Layouts to evaluate: which there are, and which classes they are scored by."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from interactdiff.data.classes import SUBJECT, hico_classes
from interactdiff.data.converters.base import Options, Pictures, PixelBoxes
from interactdiff.data.hico_det import (
    JSON_FORMS,
    AnnotatedPicture,
    find_annotations,
    picture_folders,
    read_annotations,
)
from interactdiff.data.pictures import SUFFIXES
from interactdiff.data.reading import Records, splits
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.layout import Layout
from interactdiff.scene_items import Interaction

HICO = "hico"
HICO_FOLDER = "HICO_DET"  # the environment variable that says where it is
TEST = "test"


@dataclass(frozen=True)
class LayoutData:
    """Layouts of one split.

    Attributes:
        name: what tables call the data.
        split: likewise.
        layouts: in the file's order.
        table: the classes that they are scored by.
        of: how many layouts there are, of which these may be some.
    """

    name: str
    split: str
    layouts: tuple[Layout, ...]
    table: ClassTable
    of: int

    def limited(self, count: int) -> "LayoutData":
        """Some of the layouts, see `limited`; classes of their own words are those that are left."""
        layouts = limited(self.layouts, count)
        table = self.table if self.table.rare is not None else ClassTable.of(layouts)
        return replace(self, layouts=layouts, table=table)


def open_data(
    data: str,
    split: str | None = None,
    classes: str | None = None,
    form: str = "shares",
    columns: Mapping[str, str] | None = None,
) -> LayoutData:
    """The layouts of a data set in any form that `interactdiff.data` reads, or of HICO-DET's annotations.

    Pictures need not be there.

    Args:
        data: a folder with annotations of HICO-DET; "hico": the folder that $HICO_DET names, else ./hico; or
            see `interactdiff.data.reading.open_source`.
        split: which part; None is "test", or the only one that there is.
        classes: "hico" scores data of another form by HICO-DET's 600 classes, whose words it has to use; None
            by those of annotations of HICO-DET, and else by those that occur.
        form: of the boxes, see `interactdiff.data.boxes.FORMS`; not of HICO-DET's annotations.
        columns: of parquet, see `interactdiff.data.tables.Table`.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    folder = Path(data)
    if data == HICO:
        folder = Path(os.environ.get(HICO_FOLDER, data))
        if not folder.is_dir():
            raise DataError(
                f"expected HICO-DET in the folder that ${HICO_FOLDER} names, or in ./{HICO}, got no folder"
            )
    if (annotations := _annotations(folder, split or TEST)) is not None:
        split, named, table = split or TEST, f"HICO-DET, {annotations.name}", ClassTable.hico()
        layouts = tuple(_of_annotations(folder, annotations, split))
    else:
        path = str(folder) if data == HICO else data
        there = splits(path) if folder.exists() else [TEST]  # else it is on the Hub
        if split is not None and there == [None]:
            raise DataError(f"expected data with splits for --split {split}, got {path} without any")
        split = split or (there[0] if len(there) == 1 else TEST)
        table = ClassTable.hico() if classes == HICO else None
        layouts = tuple(_of_records(Records.open(path, split, form, columns, need_pictures=False), table))
        split = split or TEST
        table = table or ClassTable.of(layouts)
        named = folder.resolve().name if folder.exists() else data
    if not layouts:
        raise DataError(f"expected layouts in {folder}, got none")
    _check_names(layouts, folder)
    return LayoutData(named, split, layouts, table, len(layouts))


def _annotations(folder: Path, split: str) -> Path | None:
    """HICO-DET's annotations: JSON before the mat file, since reading it needs no further package."""
    return find_annotations(folder, split, JSON_FORMS.get(split, ())) if folder.is_dir() else None


@dataclass(frozen=True)
class _RecordPicture:
    """The picture of a record, which is read again whenever it is needed."""

    records: Records
    number: int

    def read(self) -> bytes:
        """All bytes of the encoded picture."""
        return self.records[self.number].stored.read()


def _of_records(records: Records, table: ClassTable | None) -> Iterator[Layout]:
    """The layouts of records; words that a given table does not have are refused."""
    for number, record in enumerate(records):
        for one in record.interactions:
            known = table is None or one.action is None or (one.action, one.object) in table.numbers
            if not known:
                raise DataError(
                    f"{records.source.name}, line {record.line}: expected words of HICO-DET, got "
                    f"{one.action!r} {one.object!r}"
                )
        width, height = int(records.widths[number]), int(records.heights[number])
        picture = (record.path or _RecordPicture(records, number)) if width else None
        size = (width, height) if width else None
        yield Layout(record.name, record.prompt, record.interactions, record.entities, size, picture=picture)


def _of_annotations(folder: Path, file: Path, split: str) -> Iterator[Layout]:
    """The layouts of HICO-DET's pictures that have a visible pair."""
    pictures = Pictures(folder, Options(skip_missing=True), Counter(), picture_folders(split))
    for annotated in read_annotations(file, split, Counter()):
        if annotated.pairs:
            try:
                yield _of_annotated(annotated, pictures.find(annotated.file_name))
            except DataError as error:
                raise DataError(f"{file}, {annotated.file_name}: {error}") from None


def _of_annotated(annotated: AnnotatedPicture, picture: Path | None) -> Layout:
    boxes, table = PixelBoxes(picture, annotated.size, "stored"), hico_classes()
    interactions = []
    for pair in annotated.pairs:
        person, thing = boxes.shares(*pair.person), boxes.shares(*pair.object)
        if person is None or thing is None:
            outside = list(pair.person if person is None else pair.object)
            width, height = boxes.size
            raise DataError(f"expected a box in a picture of {width} x {height}, got {outside}")
        interactions.append(Interaction(SUBJECT, *table.classes[pair.number], person, thing))
    labels = annotated.labels
    return Layout(
        annotated.file_name,
        triplet_caption(interactions),
        tuple(interactions),
        size=(boxes.info.width, boxes.info.height),
        objects=None if labels is None else frozenset(table.classes[number][1] for number in labels),
        picture=picture,
    )


def _check_names(layouts: Sequence[Layout], folder: Path) -> None:
    """Refuse two layouts that would be drawn to one file."""
    named: dict[str, str] = {}
    for layout in layouts:
        other = named.get(layout.stem)
        if other == layout.file_name:
            raise DataError(f"{folder}: expected each picture once, got {other} again")
        if other is not None:
            raise DataError(
                f"{folder}: expected names that differ in more than their ending, got {other} and "
                f"{layout.file_name}"
            )
        named[layout.stem] = layout.file_name


def limited(layouts: Sequence[Layout], count: int) -> tuple[Layout, ...]:
    """Some layouts, always the same ones, that show each class about as often.

    The class that is shown least so far chooses the next, by the hash of its file name; so a smaller choice
    is part of a larger one.
    """

    def order(number: int) -> str:
        return hashlib.sha256(layouts[number].file_name.encode()).hexdigest()

    classes_of = [{(one.action, one.object) for one in layout.interactions} for layout in layouts]
    waiting: dict[tuple[str | None, str], list[int]] = {}
    for number in sorted(range(len(layouts)), key=order, reverse=True):
        for name in classes_of[number]:
            waiting.setdefault(name, []).append(number)
    shown: Counter[tuple[str | None, str]] = Counter()
    chosen: set[int] = set()
    while len(chosen) < min(count, len(layouts)) and waiting:
        name = min(waiting, key=lambda one: (shown[one], one[0] or "", one[1]))
        number = waiting[name].pop()
        if not waiting[name]:
            del waiting[name]
        if number not in chosen:
            chosen.add(number)
            shown.update(classes_of[number])
    for number in sorted(range(len(layouts)), key=order):  # layouts of no class
        if len(chosen) >= min(count, len(layouts)):
            break
        chosen.add(number)
    return tuple(layouts[number] for number in sorted(chosen))


def drawn_pictures(folder: Path) -> Callable[[Layout], Path]:
    """Where something else has drawn layouts: their names, with any ending of pictures.

    A picture that is not there is at its layout's own name.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder of pictures at {folder}, got none")

    def picture(layout: Layout) -> Path:
        places = [folder / layout.file_name, *(folder / f"{layout.stem}{ending}" for ending in SUFFIXES)]
        return next((place for place in places if place.is_file()), places[0])

    return picture
