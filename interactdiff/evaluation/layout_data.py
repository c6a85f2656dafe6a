"""Layouts to evaluate: which there are, which classes they are scored by, and where their pictures are."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from interactdiff.data.hico import annotation_file, picture_file, read_hico
from interactdiff.data.layouts import PICTURES, Layout, metadata_file, read_layouts
from interactdiff.errors import DataError
from interactdiff.evaluation.hoi_classes import ClassTable

HICO = "hico"
HICO_FOLDER = "HICO_DET"  # the environment variable that says where it is


@dataclass(frozen=True)
class LayoutData:
    """Layouts of one split.

    Attributes:
        name: what tables call the data.
        split: likewise.
        layouts: in the file's order.
        table: the classes that they are scored by.
        picture: where a layout's picture is; None if it is not there.
        of: how many layouts there are, of which these may be some.
    """

    name: str
    split: str
    layouts: tuple[Layout, ...]
    table: ClassTable
    picture: Callable[[Layout], Path | None]
    of: int

    def limited(self, count: int) -> "LayoutData":
        """Some of the layouts, see `limited`; classes of their own words are those that are left."""
        layouts = limited(self.layouts, count)
        table = self.table if self.table.rare is not None else ClassTable.of(layouts)
        return replace(self, layouts=layouts, table=table)


def open_data(data: str, split: str = "test", classes: str | None = None) -> LayoutData:
    """The layouts of an image folder, or of HICO-DET.

    Args:
        data: a folder with `metadata.jsonl`, or with one in a folder named as the split; a folder with
            annotations of HICO-DET in JSON; or "hico": the folder that $HICO_DET names, else ./hico.
        split: which part.
        classes: "hico" scores an image folder by HICO-DET's 600 classes, whose words it has to use; None by
            those of annotations of HICO-DET, and else by those that occur.

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
    annotations = annotation_file(folder, split)
    if annotations is not None:
        layouts = tuple(read_hico(annotations, split))
        table = ClassTable.hico()
        named = f"HICO-DET, {annotations.name}"

        def picture(layout: Layout) -> Path | None:
            return picture_file(folder, layout.file_name)

    else:
        metadata = metadata_file(folder, split)
        layouts = tuple(read_layouts(metadata))
        table = ClassTable.hico() if classes == HICO else ClassTable.of(layouts)
        named = folder.name or str(folder.resolve().name)

        def picture(layout: Layout) -> Path | None:
            path = metadata.parent / layout.file_name
            return path if path.is_file() else None

    if not layouts:
        raise DataError(f"expected layouts in {folder}, got none")
    _check_words(layouts, table, folder)
    return LayoutData(named, split, layouts, table, picture, len(layouts))


def _check_words(layouts: Sequence[Layout], table: ClassTable, folder: Path) -> None:
    """Refuse interactions of no class: they would be left out in silence."""
    for layout in layouts:
        for one in layout.interactions:
            if one.action is not None and (one.action, one.object) not in table.numbers:
                raise DataError(
                    f"{folder}, {layout.file_name}: expected words of HICO-DET, got {one.action!r} "
                    f"{one.object!r}"
                )


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


def drawn_pictures(folder: Path) -> Callable[[Layout], Path | None]:
    """Where something else has drawn layouts: their names, with any ending of pictures.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder of pictures at {folder}, got none")

    def picture(layout: Layout) -> Path | None:
        path = folder / layout.file_name
        for ending in (path.suffix, *PICTURES):
            if (there := path.with_suffix(ending)).is_file():
                return there
        return None

    return picture
