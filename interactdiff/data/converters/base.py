"""What converters share: options, pictures, and pixel boxes that become shares of the picture as shown."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from interactdiff.data.boxes import area, clamped
from interactdiff.data.json_lines import parse_json
from interactdiff.data.pictures import PictureInfo, picture_info
from interactdiff.data.rows import check_relative
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box, shown

_READ = 2**20  # characters of a streamed file


@dataclass(frozen=True)
class Options:
    """Of all converters; each reads those that concern it.

    Attributes:
        images: the folder of pictures, where it is not in its usual place.
        split: only this one.
        skip_missing: leave out rows whose picture is not there, in place of an error.
        spelling: of HICO-DET's gerunds: "source", which published weights know, or "fixed".
        merge_iou: overlap from which boxes of one person and one thing with several actions become one; None
            keeps every action's own.
        names: a file with the names of classes.
        predicates: a file with the predicates of Visual Genome that are kept, one a line.
        form: of the boxes in scene files, see `boxes.FORMS`.
        size: of stickworld's renders, in pixels.
        colours: whether phrases of stickworld name colours ("red bike"); without them a phrase is the name of
            a kind, as its detector says it.
        subjects: how many persons and objects of a render of stickworld, at most, have a reference picture;
            the caption names no attribute of theirs.
    """

    images: Path | None = None
    split: str | None = None
    skip_missing: bool = False
    spelling: Literal["source", "fixed"] = "source"
    merge_iou: float | None = None
    names: Path | None = None
    predicates: Path | None = None
    form: str = "shares"
    size: int = 128
    colours: bool = True
    subjects: int = 0


@dataclass(frozen=True)
class Converted:
    """One picture and its row.

    Attributes:
        name: its path in the new folder.
        picture: its file, or its bytes.
        row: of `metadata.jsonl`, without `file_name`.
        split: the subfolder, or None.
        references: further pictures that the row names, files or bytes, by their paths in the new folder.
    """

    name: str
    picture: Path | bytes
    row: dict[str, Any]
    split: str | None = None
    references: Mapping[str, Path | bytes] = field(default_factory=dict)


class Pictures:
    """Finds pictures by the names that annotations have for them.

    Args:
        source: the folder, or annotation file, that users gave.
        options: `images` comes first, and `skip_missing` counts.
        notes: counts what is missing.
        usual: folders below the source where pictures are.
    """

    def __init__(self, source: Path, options: Options, notes: Counter[str], usual: Sequence[str] = ()):
        base = source if source.is_dir() else source.parent
        roots = [options.images] if options.images else [base / one for one in (*usual, "images", "")]
        self.roots, self.skip, self.notes = (
            [one for one in roots if one.is_dir()],
            options.skip_missing,
            notes,
        )
        if not self.roots:
            raise DataError(f"expected a folder of pictures, got none at {options.images or base}")

    def find(self, name: str) -> Path | None:
        """The picture of a name; None if it is missing and that is allowed.

        Raises:
            DataError: it is missing, or the name leads out of the folder.
        """
        check_relative(name, self.roots[0])
        for root in self.roots:
            for below in (name, name.rpartition("/")[2]):
                if below and (path := root / below).is_file():
                    return path
        if not self.skip:
            where = " or ".join(map(str, self.roots))
            raise DataError(
                f"expected the picture {shown(name)} in {where}, got no such file (--skip-missing)"
            )
        self.notes["pictures missing"] += 1
        return None


class PixelBoxes:
    """Boxes in pixels of one picture, as shares of the picture as shown.

    Annotations were drawn on the stored or on the shown orientation; the picture's size says which. Where
    both have the same size, `drawn_on` decides.

    Args:
        picture: the file or its bytes; None if it is not there, and is taken to be stored as it is shown.
        size: width and height that the annotations name; None if they do not.
        drawn_on: "stored" for data sets that were annotated without regard to EXIF, "shown" for tools of
            today.

    Raises:
        DataError: the picture cannot be read, or has another size; there is neither a picture nor a size.
    """

    def __init__(
        self, picture: Path | bytes | None, size: tuple[int, int] | None, drawn_on: Literal["stored", "shown"]
    ):
        if picture is None and size is None:
            raise DataError("expected its picture, or annotations that name its size, got neither")
        info = picture_info(picture) if picture is not None else PictureInfo(*size)  # type: ignore[misc]
        stored, as_shown = info.stored_size, (info.width, info.height)
        fits = [name for name, one in (("stored", stored), ("shown", as_shown)) if size in (None, one)]
        if not fits:
            which = picture if isinstance(picture, Path) else "a picture of the rows"
            raise DataError(
                f"expected {which} to have the size of its annotation, {size[0]} x {size[1]}, "  # type: ignore[index]
                f"got {info.width} x {info.height}"
            )
        self.info: PictureInfo = info
        self.turned = (drawn_on if len(fits) == 2 else fits[0]) == "stored"
        self.size = stored if self.turned else as_shown

    def shares(self, x0: float, y0: float, x1: float, y1: float) -> Box | None:
        """A box from pixel edges (the right and lower edge not included); None if nothing of it is inside."""
        width, height = self.size
        box = clamped((x0 / width, y0 / height, x1 / width, y1 / height))
        if area(box) <= 0:
            return None
        return _turned(box, self.info.orientation) if self.turned else box


def interaction(
    subject: str, action: str | None, object_: str, subject_box: Sequence[float], object_box: Sequence[float]
) -> dict[str, Any]:
    """A row's interaction."""
    return {
        "subject": subject,
        "action": action,
        "object": object_,
        "subject_box": list(subject_box),
        "object_box": list(object_box),
    }


def first_file(source: Path, *names: str) -> Path:
    """The first of some files in a folder or in its usual subfolders; a file that was named is itself.

    Raises:
        DataError: none is there.
    """
    if source.is_file():
        return source
    for below in ("", "annotations", "hico_20160224_det", "annotation"):
        for name in names:
            if (path := source / below / name).is_file():
                return path
    raise DataError(f"expected {' or '.join(names)} in {source}, got no such file")


def read_json(path: Path) -> Any:
    """A JSON file as a whole.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise DataError(f"expected a file of annotations at {path}, got {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def stream_json(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str | None, Any]]:
    """The elements of a JSON list, or of the lists of a JSON object, one at a time.

    Args:
        path: the file; only one element of it is in memory.
        keys: of the object, in whichever order they stand; all others are passed over.

    Yields:
        The key (None for a list) and an element, or the value of a key that is no list.

    Raises:
        DataError: it is no such file.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Stream(file).run(keys)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"expected JSON in {path}, got {type(error).__name__}: {error}") from None


class _Stream:
    def __init__(self, file: Any):
        self.file, self.text, self.place, self.ended = file, "", 0, False
        self.decoder = json.JSONDecoder()

    def run(self, keys: Sequence[str]) -> Iterator[tuple[str | None, Any]]:
        start = self._next()
        if start == "[":
            for value in self._elements():
                yield None, value
        elif start == "{":
            while (char := self._next()) != "}":
                if char == ",":
                    continue
                self.place -= 1
                key = self._value()
                if self._next() != ":":
                    raise ValueError("a key without a value")
                if self._peek() == "[":
                    self._next()
                    for value in self._elements():
                        if key in keys:
                            yield key, value
                else:
                    value = self._value()
                    if key in keys:
                        yield key, value
        else:
            raise ValueError(f"neither a list nor an object but {start!r}")

    def _elements(self) -> Iterator[Any]:
        while (char := self._next()) != "]":
            if char != ",":
                self.place -= 1
                yield self._value()

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if end < len(self.text) or self.ended:
                    self.place = end
                    return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
            self._more()

    def _peek(self) -> str:
        char = self._next()
        self.place -= 1
        return char

    def _next(self) -> str:
        while True:
            while self.place < len(self.text):
                char = self.text[self.place]
                self.place += 1
                if not char.isspace():
                    return char
            if self.ended:
                raise ValueError("a file that ends early")
            self._more()

    def _more(self) -> None:
        read = self.file.read(max(_READ, len(self.text) - self.place))
        self.ended = not read
        self.text, self.place = self.text[self.place :] + read, 0


def _turned(box: Box, orientation: int) -> Box:
    """A box of the stored picture in the picture as EXIF's orientation shows it."""
    x0, y0, x1, y1 = box
    if orientation >= 5:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    return (x0, y0, x1, y1)
