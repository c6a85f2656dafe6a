"""Tar shards as webdataset reads them, with an index by which any example is read on its own."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from interactdiff.data.json_lines import parse_json
from interactdiff.data.pictures import SUFFIXES
from interactdiff.data.problems import Problem, Problems
from interactdiff.data.records import CONTROL, FileRange, ImageRecord, Stored, format_of
from interactdiff.data.rows import RowParser
from interactdiff.errors import DataError
from interactdiff.files import write_aside
from interactdiff.scene_checks import shown

INDEX = "index.json"
_FORMAT = 1
_COLUMNS = 4  # of an example: offset and size of its row, offset and size of its picture, in bytes
_WITH_CONTROL = 6  # where examples of a shard have control images: offset and size of its own, or zeros
_NUMBER_BITS = 32  # of a position, for the example's number in its shard
_BLOCK = 512  # of a tar
_NAME = re.compile(r"(.+)-(\d{6})\.tar")


class Shards:
    """A folder of shards `{split}-000000.tar` of `key.jpg` (or png, webp) and `key.json`, and `index.json`.

    A control image is one more member, `key.conditioning_image.png`.
    Shards without an index (written by others) are read once to make one. Positions are
    `shard << 32 | example`. In memory: 32 bytes an example.

    Args:
        folder: the folder.
        split: which shards; needed if there are several splits.
        form: of the boxes, see `boxes.FORMS`.

    Raises:
        DataError: a shard is missing, cut short, there twice, or not in the index; there is no such split.
    """

    def __init__(self, folder: Path, split: str | None = None, form: str = "shares"):
        self.folder, self.form = folder, form
        there = sorted(path.name for path in folder.glob("*.tar"))
        index = _read_index(folder) if (folder / INDEX).is_file() else None
        listed = there if index is None else sorted(index)
        self.split = chosen_split(split, sorted({_split_of(name) for name in listed}), folder)
        self.names = [name for name in listed if _split_of(name) == self.split]
        self.index = index
        self.name = str(folder)
        self.files = [] if index is None else [folder / INDEX]
        self.ignored: dict[str, int] = {}
        if index is None:
            self.examples = [_scanned(folder / name) for name in self.names]
        else:
            _check_shards(folder, index, there, self.split)
            self.examples = [_offsets(index[name], folder) for name in self.names]

    def scan(self, problems: Problems) -> Iterator[tuple[int, ImageRecord]]:
        """All records with their positions, streamed; mistakes go to `problems`."""
        for shard in range(len(self.names)):
            for number in range(len(self.examples[shard])):
                record = self._record(shard, number, problems)
                if record is not None:
                    yield shard << _NUMBER_BITS | number, record

    def stamped(self) -> Iterator[Path]:
        """The shards, where no index has their checksums."""
        if self.index is None:
            yield from (self.folder / name for name in self.names)

    def record(self, position: int, line: int) -> ImageRecord:
        """The record at a position that `scan` gave.

        Raises:
            DataError: the shard has changed since.
        """
        problems = Problems()
        record = self._record(position >> _NUMBER_BITS, position & (2**_NUMBER_BITS - 1), problems)
        problems.raise_if_any(self.name)
        assert record is not None
        return record

    def check_sums(self, problems: Problems) -> None:
        """Compare every shard with its checksum in the index."""
        for name in self.names if self.index is not None else ():
            if file_hash(self.folder / name) != self.index[name]["sha256"]:  # type: ignore[index]
                text = f"expected the contents that {INDEX} says, got others"
                problems.add(Problem("shard", str(self.folder / name), text))

    def _record(self, shard: int, number: int, problems: Problems) -> ImageRecord | None:
        path = self.folder / self.names[shard]
        start, size, *places = (int(value) for value in self.examples[shard][number])
        try:
            with path.open("rb") as file:
                file.seek(start - _BLOCK)
                head, data = file.read(_BLOCK), file.read(size)
            key = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").name.rsplit(".", 1)[0]
            if len(data) < size:
                raise DataError("expected a whole row, got a shard that ends early")
            values = parse_json(data)
        except (OSError, tarfile.TarError, DataError) as error:
            problems.add(Problem("json", str(path), str(error), number + 1))
            return None
        stored = FileRange(path, *places[:2])
        control = FileRange(path, *places[2:]) if any(places[2:]) else None
        parser = RowParser(str(path), problems, self.form)
        record = parser.parse(
            values,
            number + 1,
            lambda given: _named(given, path, key, stored),
            find_control=lambda given: _control(given, key, control),
        )
        for name, count in parser.ignored.items():
            self.ignored[name] = self.ignored.get(name, 0) + count
        return record


def write_shards(
    records: Iterable[ImageRecord], folder: Path, split: str, count: int = 1000, size: int = 10**9
) -> dict[str, Any]:
    """Write shards and their index; the same records give the same bytes.

    Args:
        records: what to write; only one is in memory at a time.
        folder: made if need be; shards of other splits in it stay.
        split: "train", "test" or another name.
        count: examples in a shard at most.
        size: bytes of a shard at most, but for one example.

    Returns:
        The index's entries: for each shard `count`, `bytes`, `sha256` and `examples`.

    Raises:
        DataError: the split's name is not usable, there are such shards already, or there is no record.
        OSError: the disk fills up.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise DataError(f"expected a split of letters, digits and _, got {shown(split)}")
    folder.mkdir(parents=True, exist_ok=True)
    index = _read_index(folder) if (folder / INDEX).is_file() else {}
    if taken := [*folder.glob(f"{split}-*.tar")]:
        raise DataError(f"expected no shards of {split} in {folder} yet, got {taken[0].name}")
    made: dict[str, dict[str, Any]] = {}
    try:
        _write_all(iter(records), folder, split, count, size, made)
        if not made:
            raise DataError(f"expected pictures to put into shards of {split}, got none")
        text = json.dumps({"format": _FORMAT, "shards": {**index, **made}}, separators=(",", ":")) + "\n"
        write_aside(folder / INDEX, lambda aside: aside.write_text(text, encoding="utf-8"))
    except BaseException:  # shards without an index would be in the way of the next try
        for name in made:
            (folder / name).unlink(missing_ok=True)
        raise
    return made


def _write_all(
    source: Iterator[ImageRecord],
    folder: Path,
    split: str,
    count: int,
    size: int,
    made: dict[str, dict[str, Any]],
) -> None:
    """Write shard after shard, and their entries of the index into `made`."""
    pending: list[ImageRecord] = []
    number = 0
    while batch := _next_shard(source, pending, count, size):
        path = folder / f"{split}-{len(made):06d}.tar"
        examples: list[list[int]] = []
        write_aside(path, lambda aside, b=batch, e=examples, n=number: _write_shard(aside, b, e, n))
        number += len(batch)
        made[path.name] = {
            "count": len(batch),
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
            "examples": examples,
        }


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    made_of = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            made_of.update(block)
    return made_of.hexdigest()


def chosen_split(split: str | None, there: list[str], folder: Path) -> str:
    """The split that is meant.

    Raises:
        DataError: it is none of those that are there, or there are several and none is named.
    """
    if split in there:
        return str(split)
    if split is None and len(there) == 1:
        return there[0]
    got = "none named" if split is None else shown(split)
    raise DataError(f"expected a split of {', '.join(there)} in {folder}, got {got}")


def _next_shard(
    source: Iterator[ImageRecord], pending: list[ImageRecord], count: int, size: int
) -> list[ImageRecord]:
    """The records of the next shard; what no longer fits stays in `pending`."""
    batch, total = [], 0
    while len(batch) < count:
        record = pending.pop() if pending else next(source, None)
        if record is None:
            break
        total += _size(record.stored) + _size(record.control)
        if batch and total > size:
            pending.append(record)
            break
        batch.append(record)
    return batch


def _size(stored: Stored | None) -> int:
    return (stored.size or stored.path.stat().st_size) if isinstance(stored, FileRange) else 0


def _write_shard(path: Path, records: list[ImageRecord], examples: list[list[int]], first: int) -> None:
    columns = _WITH_CONTROL if any(record.control is not None for record in records) else _COLUMNS
    with path.open("wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, record in enumerate(records, start=first):
            row = record.to_row()
            row.setdefault("id", record.name)
            members = {
                "json": json.dumps(row, ensure_ascii=False).encode(),
                record.format: record.stored.read(),
            }
            if record.control is not None:
                members[f"{CONTROL}.{format_of(record.control)}"] = record.control.read()
            places = []
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(data)
                places += [tar.offset + _BLOCK, len(data)]
                tar.addfile(member, io.BytesIO(data))
            examples.append(places + [0] * (columns - len(places)))


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shards = values["shards"]
        if values["format"] != _FORMAT or not all(
            {"count", "bytes", "sha256"} <= set(shards[n]) for n in shards
        ):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"expected an index of shards in {path}, got {type(error).__name__}: {error}"
        ) from None
    return shards


def _offsets(entry: dict[str, Any], folder: Path) -> np.ndarray:
    """[N, 4 or 6] int64 of a shard's examples."""
    try:
        columns = _WITH_CONTROL if _WITH_CONTROL in map(len, entry["examples"]) else _COLUMNS
        examples = np.array(entry["examples"], np.int64).reshape(-1, columns)
        inside = (examples >= 0).all() and (examples[:, 0] >= _BLOCK).all()
        inside = inside and (examples[:, 2::2] + examples[:, 3::2] <= entry["bytes"]).all()
        if len(examples) != entry["count"] or not inside:
            raise ValueError("offsets that do not fit its shards")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(f"expected an index of shards in {folder / INDEX}, got {error}") from None
    return examples


def _check_shards(folder: Path, index: dict[str, dict[str, Any]], there: list[str], split: str) -> None:
    """Refuse shards that are not those of the index, without reading them."""
    for name in there:
        if name not in index:
            raise DataError(f"expected only the shards of {INDEX} in {folder}, got {name} as well")
    sums: dict[str, str] = {}
    for name, entry in index.items():
        if _split_of(name) != split:
            continue
        if name not in there:
            raise DataError(f"expected the shard {name} of {INDEX} in {folder}, got no such file")
        if (size := (folder / name).stat().st_size) != entry["bytes"]:
            raise DataError(f"expected {folder / name} to have {entry['bytes']:,} bytes, got {size:,}")
        if entry["sha256"] in sums:
            raise DataError(
                f"expected each shard once, got {name} with the contents of {sums[entry['sha256']]}"
            )
        sums[entry["sha256"]] = name


def _scanned(path: Path) -> np.ndarray:
    """[N, 4 or 6] int64 of the examples in a shard without an index."""
    rows: dict[str, tuple[int, int]] = {}
    pictures: dict[str, tuple[int, int]] = {}
    controls: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                if member.isfile() and kind == "json":
                    rows[key] = member.offset_data, member.size
                elif member.isfile() and f".{kind.lower()}" in SUFFIXES:
                    found = controls if key.endswith(f".{CONTROL}") else pictures
                    found[key.removesuffix(f".{CONTROL}")] = member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"expected a whole tar at {path}, got {error}") from None
    if alone := sorted(set(rows) ^ set(pictures) | set(controls) - set(rows)):
        raise DataError(
            f"expected a row and a picture of each key in {path}, got one of them of {alone[0]!r}"
        )
    places = [(*rows[key], *pictures[key], *controls.get(key, (0, 0))) for key in rows]
    return np.array(places, np.int64).reshape(-1, _WITH_CONTROL)[:, : None if controls else _COLUMNS]


def _split_of(name: str) -> str:
    matched = _NAME.fullmatch(name)
    return matched[1] if matched else "train"


def _named(given: Any, path: Path, key: str, stored: FileRange) -> tuple[str, FileRange]:
    if given is not None:
        raise DataError(
            f"expected no file_name in a shard, where the key names the picture, got {shown(given)}"
        )
    return f"{path.name}/{key}", stored


def _control(given: Any, key: str, control: FileRange | None) -> FileRange | None:
    if given is not None:
        raise DataError(f"expected the control image as the member {key}.{CONTROL}.png, got {shown(given)}")
    return control
