"""Data opened: which form a path has, rows streamed from it, and rows by their number."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from interactdiff.data.boxes import FORMS
from interactdiff.data.cache_files import write_cache
from interactdiff.data.folder import METADATA, LooseFolder, MetadataFolder, picture_names
from interactdiff.data.pictures import PictureInfo
from interactdiff.data.problems import Problem, Problems
from interactdiff.data.records import ImageRecord
from interactdiff.data.rows import is_file
from interactdiff.data.shards import INDEX, Shards, chosen_split, file_hash
from interactdiff.data.tables import Table, parquet_files
from interactdiff.errors import DataError
from interactdiff.scene_checks import shown

_INDEX_FORMAT = b"2"


class Source(Protocol):
    """A reader of one form of data.

    Attributes:
        name: what messages call it.
        files: those whose contents are the rows.
        ignored: keys of scene files, and in how many rows they stand.
    """

    name: str
    files: list[Path]
    ignored: dict[str, int]

    def scan(self, problems: Problems) -> Iterator[tuple[int, ImageRecord]]:
        """All records with their positions, streamed; mistakes go to `problems`."""
        ...

    def stamped(self) -> Iterable[Path]:
        """Files of which size and time say whether they changed; some may not be there."""
        ...

    def record(self, position: int, line: int) -> ImageRecord:
        """The record at a position that `scan` gave."""
        ...


def splits(path: str | PathLike[str]) -> list[str | None]:
    """The splits of data: subfolders with rows, names of shards or of parquet files; [None] without any."""
    folder = Path(path)
    if folder.suffix == ".parquet" and folder.exists():
        return [*parquet_files(folder)]
    if not folder.is_dir() or (folder / METADATA).is_file():
        return [None]
    below = sorted(one.name for one in folder.iterdir() if (one / METADATA).is_file())
    tars = sorted({name.name.rpartition("-")[0] for name in folder.glob("*-*.tar")})
    return [*(tars or below or parquet_files(folder))] or [None]


def open_source(
    path: str | PathLike[str],
    split: str | None = None,
    form: str = "shares",
    columns: Mapping[str, str] | None = None,
    need_pictures: bool = True,
) -> Source:
    """The reader for what is at a path.

    Args:
        path: a folder with `metadata.jsonl`, with one such folder for each split, of pictures with scene
            files or captions, of shards, or of parquet files; a parquet file; or a Hub id like owner/name.
        split: which split; needed if there are several.
        form: of the boxes, see `boxes.FORMS`.
        columns: of parquet, see `tables.Table`.
        need_pictures: whether a row of `metadata.jsonl` whose picture is not there is a mistake.

    Raises:
        DataError: there is nothing of the kind.
    """
    if form not in FORMS:
        raise DataError(f"expected boxes in {', '.join(FORMS)}, got {shown(form)}")
    folder = Path(path)
    is_parquet, exists = folder.suffix == ".parquet", folder.exists()
    is_hub_id = not is_parquet and str(path).count("/") == 1 and str(path)[0] not in "./~"
    if (is_parquet and exists) or (is_hub_id and not exists):
        return Table(str(path), split, columns, form)
    if not folder.is_dir():
        got = "a file" if exists else f"no such {'file' if is_parquet else 'folder'}"
        raise DataError(f"expected a folder of pictures, shards or parquet files, got {str(folder)!r}: {got}")
    if (folder / METADATA).is_file():
        others = [one for one in folder.rglob(METADATA) if one.parent != folder]
        if others:
            raise DataError(
                f"expected one {METADATA} in {folder}, got {others[0].relative_to(folder)} as well"
            )
        return MetadataFolder(folder, form, need_pictures)
    if (folder / INDEX).is_file() or any(folder.glob("*.tar")):
        return Shards(folder, split, form)
    below = sorted(one.name for one in folder.iterdir() if (one / METADATA).is_file())
    if below:
        return MetadataFolder(folder / chosen_split(split, below, folder), form, need_pictures)
    if any(folder.rglob("*.parquet")):
        return Table(str(folder), split, columns, form)
    if next(picture_names(folder), None) is None:
        raise DataError(
            f"expected {METADATA}, pictures, shards or parquet files in {folder}, got none of them"
        )
    return LooseFolder(folder, form)


def read_folder(
    path: str | PathLike[str],
    split: str | None = None,
    form: str = "shares",
    columns: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord]:
    """Stream the records of a data set, in its order and in constant memory.

    Pictures are looked for but not opened; `ImageRecord.open` does that. After the first mistake no further
    record comes; the rest is still read, so that the error has all of them.

    Args:
        path: see `open_source`.
        split: likewise.
        form: likewise.
        columns: likewise.

    Raises:
        DataError: there is nothing of the kind, or a row has a mistake.
    """
    source, problems = open_source(path, split, form, columns), Problems()
    for _, record in source.scan(problems):
        if not problems:
            yield record
    problems.raise_if_any(source.name)


class Names:
    """Finds names that come twice, with 12 bytes of memory a name."""

    def __init__(self) -> None:
        self.hashes, self.lines = array("Q"), array("I")

    @staticmethod
    def hash(name: str) -> int:
        """64 bits of a name."""
        return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big")

    def add(self, name: str, line: int) -> None:
        """Take the name of a line."""
        self.hashes.append(self.hash(name))
        self.lines.append(line)

    def repeated(self) -> list[tuple[int, int]]:
        """Places (in the order of `add`) of a name that was there before, and of where it was first."""
        hashes = np.frombuffer(self.hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        pairs = []
        for place in same:
            first = place
            while first and hashes[order[first - 1]] == hashes[order[place]]:
                first -= 1
            pairs.append((int(order[place]), int(order[first])))
        return sorted(pairs)


class Records(Sequence[ImageRecord]):
    """The records of a data set by their number: rows are read again as they are needed.

    In memory: 23 bytes a record.

    Attributes:
        source: the reader.
        positions: [N] uint64, where each record is.
        lines: [N] uint32.
        widths: [N] uint32, of the picture as shown, in pixels; 0 where it is not there.
        heights: [N] uint32.
        weights: [N] uint16, how often it comes in an epoch.
        controls: [N] uint8, 1 where it has a control image.
        digest: changes with the rows.
        files_digest: changes also with captions beside pictures, and with size or time of a picture's file.
    """

    FIELDS = ("positions", "lines", "widths", "heights", "weights", "controls")

    def __init__(self, source: Source, digests: tuple[str, str], columns: dict[str, np.ndarray]):
        self.source, (self.digest, self.files_digest) = source, digests
        self.positions, self.lines, self.widths, self.heights, self.weights, self.controls = (
            columns[n] for n in self.FIELDS
        )

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        split: str | None = None,
        form: str = "shares",
        columns: Mapping[str, str] | None = None,
        cache: str | PathLike[str] | None = None,
        need_pictures: bool = True,
    ) -> "Records":
        """Check all rows and the headers of all pictures, and note where they are.

        Args:
            path: see `open_source`.
            split: likewise.
            form: likewise.
            columns: likewise.
            cache: a folder that keeps what is found, so that the same rows open at once the next time; made
                if need be.
            need_pictures: likewise; without, only what is there is checked.

        Raises:
            DataError: a row has a mistake, a header cannot be read, there is no row, or `cache` cannot be
                written to.
        """
        source = open_source(path, split, form, columns, need_pictures)
        digests = _digests(source, form)
        kept = None if cache is None else Path(cache) / f"records-{digests[1][:16]}.npz"
        if kept is not None and (found := _load(kept)) is not None:
            return cls(source, digests, found)
        found = _scanned(source, need_pictures)
        if kept is not None:
            arrays: dict[str, Any] = {**found}
            write_cache(kept, lambda aside: np.savez(aside, **arrays))
        return cls(source, digests, found)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, number: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, number: slice) -> list[ImageRecord]: ...

    def __getitem__(self, number: int | slice) -> ImageRecord | list[ImageRecord]:
        """The record of a number from 0; a slice gives a list."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self.source.record(int(self.positions[number]), int(self.lines[number]))

    @property
    def shards(self) -> np.ndarray:
        """[N] uint32: the shard that each record is in; zeros where there are no shards."""
        return (self.positions >> 32).astype(np.uint32) if isinstance(self.source, Shards) else self.lines * 0


def _scanned(source: Source, need_pictures: bool) -> dict[str, np.ndarray]:
    problems, names = Problems(), Names()
    columns = {name: array(code) for name, code in zip(Records.FIELDS, "QIIIHB", strict=True)}
    for position, record in source.scan(problems):
        try:
            missing = not need_pictures and record.path is not None and not is_file(record.path)
            info = PictureInfo(0, 0) if missing else record.info()
            if need_pictures:
                record.check_control(info)
        except DataError as error:
            where = Problem("picture", record.name, str(error), record.line, of_picture=True)
            problems.add(where)
            continue
        names.add(record.name, record.line)
        sides = info.width, info.height
        values = (position, record.line, *sides, record.weight, record.control is not None)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    add_repeated(source, columns["positions"], names, problems)
    problems.raise_if_any(source.name)
    if not columns["positions"]:
        raise DataError(f"expected at least one picture in {source.name}, got none")
    types = (np.uint64, np.uint32, np.uint32, np.uint32, np.uint16, np.uint8)
    return {n: np.frombuffer(column, t) for (n, column), t in zip(columns.items(), types, strict=True)}


def add_repeated(source: Source, positions: Sequence[int], names: Names, problems: Problems) -> None:
    """Report the pictures that come twice.

    Args:
        source: the reader.
        positions: of the records, in the order in which their names were taken.
        names: that were taken.
        problems: takes the mistakes.
    """
    for again, first in names.repeated():
        line = names.lines[again]
        name = source.record(positions[again], line).name
        text = f"expected each picture once, got {shown(name)} as in line {names.lines[first]}"
        problems.add(Problem("repeated", source.name, text, line, field="file_name"))


def _digests(source: Source, form: str) -> tuple[str, str]:
    """`digest` and `files_digest` of `Records`: one hash where rows are in no file of their own."""
    made_of = hashlib.sha256(_INDEX_FORMAT + form.encode())
    made_of.update(getattr(source, "fingerprint", source.name).encode())
    for file in source.files:
        made_of.update(f"{file.name} {file_hash(file)}".encode())
    rows = made_of.hexdigest()
    for file in source.stamped():
        try:
            stat = os.stat(file)
            said = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):  # not there, or no name of a file
            said = "missing"
        made_of.update(f"{file} {said}\n".encode(errors="replace"))
    files = made_of.hexdigest()
    return (rows if source.files else files), files


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """What an earlier scan found, or None if there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in Records.FIELDS}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # a damaged zip
        if type(error).__name__ == "BadZipFile":
            return None
        raise
