"""Image folders: pictures with a `metadata.jsonl`, with a scene file each, or with captions beside them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interactdiff.data.json_lines import json_lines, parse_json, read_line
from interactdiff.data.pictures import SUFFIXES
from interactdiff.data.problems import SHOWN, Problem, Problems, nearest
from interactdiff.data.records import CONTROL, FileRange, ImageRecord
from interactdiff.data.rows import RowParser, check_relative, is_file
from interactdiff.errors import DataError
from interactdiff.picture import NoRecordError, PictureError, read_record
from interactdiff.scene_checks import shown

METADATA = "metadata.jsonl"
_COMPARED = 2000  # names that a mistyped one is compared with, of larger folders none


class MetadataFolder:
    """A folder of pictures with a `metadata.jsonl`, one row a picture (what `datasets` calls imagefolder).

    Positions are offsets in bytes of the rows.

    Args:
        folder: the folder.
        form: of the boxes, see `boxes.FORMS`.
        need_pictures: whether a row whose picture is not there is a mistake.
    """

    def __init__(self, folder: Path, form: str = "shares", need_pictures: bool = True):
        self.folder, self.form, self.need_pictures = folder, form, need_pictures
        self.name = str(folder / METADATA)
        self.files = [folder / METADATA]
        self.ignored: dict[str, int] = {}

    def scan(self, problems: Problems) -> Iterator[tuple[int, ImageRecord]]:
        """All records with their positions, streamed; mistakes go to `problems`."""
        parser = RowParser(self.name, problems, self.form, self.folder)
        self.ignored = parser.ignored
        hints = _Hints(self.folder)
        for line, offset, values in json_lines(self.folder / METADATA, self.name, problems):
            record = parser.parse(
                values,
                line,
                lambda name: self._find(name, hints),
                self._sidecar,
                lambda name: self._find_control(name, hints),
            )
            if record is not None:
                yield offset, record

    def stamped(self) -> Iterator[Path]:
        """The pictures and control images that rows name, and the caption files of rows without a caption."""
        for _, _, values in json_lines(self.folder / METADATA, self.name, Problems()):
            try:
                check_relative(name := values["file_name"], self.folder)
                yield self.folder / name
                if "prompt" not in values and not values.get("prompts"):
                    yield (self.folder / name).with_suffix(".txt")
                if (control := values.get(CONTROL)) is not None:
                    check_relative(control, self.folder)
                    yield self.folder / control
            except (DataError, TypeError, KeyError, ValueError):  # a mistake, which `scan` reports
                continue

    def record(self, position: int, line: int) -> ImageRecord:
        """The record at a position that `scan` gave.

        Raises:
            DataError: the file has changed since.
        """
        problems = Problems()
        with (self.folder / METADATA).open("rb") as file:
            file.seek(position)
            values = read_line(file)
        record = RowParser(self.name, problems, self.form, self.folder).parse(
            values, line, self._find, self._sidecar, self._find_control
        )
        problems.raise_if_any(str(self.folder))
        assert record is not None
        return record

    def _find(self, name: Any, hints: "_Hints | None" = None) -> tuple[str, FileRange]:
        check_relative(name, self.folder)
        path = self.folder / name
        if not is_file(path) and (self.need_pictures or not name.lower().endswith(SUFFIXES)):
            hint = "" if hints is None else hints.of(name)
            raise DataError(f"expected a picture in {self.folder}/, got {shown(name)}{hint}")
        return name, FileRange(path)

    def _find_control(self, name: Any, hints: "_Hints | None" = None) -> FileRange | None:
        return None if name is None else self._find(name, hints)[1]

    def _sidecar(self, name: str) -> str | None:
        return caption_beside(self.folder / name)


class _Hints:
    """Which pictures of a folder names that are not there may stand for.

    The folder is listed once, for the first of them. As many hints are given as mistakes are shown.
    """

    def __init__(self, folder: Path):
        self.folder, self.given = folder, 0
        self.names: list[str] = []
        self.known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """ " (did you mean 'x'?)", or nothing."""
        if self.given == SHOWN:
            return ""
        if not self.given:
            self.names = [*picture_names(self.folder)]
            for one in self.names:
                for key in (Path(one).name, Path(one).stem.casefold()):
                    self.known.setdefault(key, one)
        self.given += 1
        wanted = Path(name)
        found = self.known.get(wanted.name) or self.known.get(wanted.stem.casefold())
        if found is not None:
            return f" (did you mean {found!r}?)"
        return nearest(name, self.names) if len(self.names) <= _COMPARED else ""


class LooseFolder:
    """A folder of pictures, each with a scene file `x.json`, a caption `x.txt` or a PNG's record.

    Positions are places in the list of names, in order.

    Args:
        folder: the folder.
        form: of the boxes in scene files, see `boxes.FORMS`.
    """

    def __init__(self, folder: Path, form: str = "shares"):
        self.folder, self.form = folder, form
        self.name = str(folder)
        self.names = sorted(picture_names(folder))
        self.files: list[Path] = []
        self.ignored: dict[str, int] = {}

    def scan(self, problems: Problems) -> Iterator[tuple[int, ImageRecord]]:
        """All records with their positions, streamed; mistakes go to `problems`."""
        for position in range(len(self.names)):
            record = self._record(position, problems)
            if record is not None:
                yield position, record

    def stamped(self) -> Iterator[Path]:
        """The pictures, of which PNGs may hold their rows, their scene files and their caption files."""
        for name in self.names:
            path = self.folder / name
            yield from (path, path.with_suffix(".json"), path.with_suffix(".txt"))

    def record(self, position: int, line: int) -> ImageRecord:
        """The record at a position that `scan` gave.

        Raises:
            DataError: a file has changed since.
        """
        problems = Problems()
        record = self._record(position, problems)
        problems.raise_if_any(str(self.folder))
        assert record is not None
        return record

    def _record(self, position: int, problems: Problems) -> ImageRecord | None:
        name = self.names[position]
        path = self.folder / name
        file, values = str(path), {}
        try:
            if is_file(scene := path.with_suffix(".json")):
                file, values = str(scene), parse_json(scene.read_bytes().removeprefix(b"\xef\xbb\xbf"))
            elif path.suffix.lower() == ".png":
                values = read_record(path).scene.to_dict()
        except NoRecordError:
            pass
        except OSError as error:
            problems.add(Problem("json", file, f"expected a scene file, got {error.strerror}"))
            return None
        except (DataError, PictureError) as error:
            problems.add(Problem("json", file, str(error)))
            return None
        parser = RowParser(file, problems, self.form, self.folder)
        stored = FileRange(path)
        record = parser.parse(values, 1, lambda _: (name, stored), lambda _: caption_beside(path))
        for key, count in parser.ignored.items():
            self.ignored[key] = self.ignored.get(key, 0) + count
        return record


def caption_beside(path: Path) -> str | None:
    """What a picture's caption file `x.txt` says, without the white space around it; None if there is none.

    Raises:
        DataError: it is no text in UTF-8.
    """
    beside = path.with_suffix(".txt")
    if not is_file(beside):
        return None
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"expected a caption in UTF-8 in {beside}, got other bytes") from None


def picture_names(folder: Path) -> Iterator[str]:
    """The pictures in a folder and below it, as paths from the folder with forward slashes."""
    for here, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(here) / name).relative_to(folder).as_posix()
