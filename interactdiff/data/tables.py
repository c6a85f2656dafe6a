"""Parquet files and data sets on the Hugging Face Hub, read through `datasets` with a map of columns."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interactdiff.data.problems import Problems
from interactdiff.data.records import CONTROL, ImageRecord, Inline
from interactdiff.data.rows import OWN_KEYS, RowParser
from interactdiff.data.shards import chosen_split
from interactdiff.errors import DataError
from interactdiff.registry import item_specs
from interactdiff.scene_checks import shown

IMAGE = "image"
# As the Hub names files: SPLIT-00000-of-00001.parquet, or one file a split. Other names say nothing of it.
_SPLIT = re.compile(r"(?:(.+)-\d+-of-\d+|(train|training|val|valid|validation|dev|test|testing|eval))$")


def parquet_files(path: Path) -> dict[str | None, list[Path]]:
    """Parquet files by the split that their names or their folder say.

    Args:
        path: a file, or a folder with some in it or below.

    Returns:
        Files in order by split; all under None where any of them says none.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    found: dict[str | None, list[Path]] = {}
    for file in files:
        named = _SPLIT.match(file.stem)
        below = file.parent.relative_to(path).parts if path.is_dir() else ()
        split = (named[1] or named[2]) if named else next(reversed(below), None)
        found.setdefault(split, []).append(file)
    return {None: files} if None in found else found


class Table:
    """Rows of parquet files, or of a data set on the Hub; positions are numbers of rows.

    Args:
        path: a parquet file, a folder with some, or a Hub id like owner/name.
        split: which split, see `parquet_files`; needed if there are several; of a Hub data set "train" if it
            is not given.
        columns: which column a key of a row is in, such as {"prompt": "caption"}; "image" is the picture's.
            Keys that are not named are in the column of their own name, if there is one.
        form: of the boxes, see `boxes.FORMS`.

    Raises:
        DataError: `datasets` is not installed, it cannot read the files, there is no such split, or no column
            of pictures.
    """

    def __init__(
        self, path: str, split: str | None, columns: Mapping[str, str] | None = None, form: str = "shares"
    ):
        is_local = Path(path).exists()
        try:
            datasets = library()
        except DataError as error:
            if is_local:
                raise
            raise DataError(
                f"expected a folder at {path}, got none; for data sets of the Hub: {error}"
            ) from None
        self.name, self.form = path, form
        self.files: list[Path] = []
        self.tables: list[Path] = []
        self.ignored: dict[str, int] = {}
        if is_local:
            there = parquet_files(Path(path))
            named = sorted(one for one in there if one is not None)
            if split is not None and not named:
                raise DataError(
                    f"expected a split in the names of files in {path} for {shown(split)}, got none"
                )
            self.tables = there[chosen_split(split, named, Path(path)) if named else None]
        try:
            if self.tables:
                rows = datasets.load_dataset(
                    "parquet", data_files=[str(f) for f in self.tables], split="train"
                )
            else:
                rows = datasets.load_dataset(path, split=split or "train")
        except Exception as error:  # `datasets` raises errors of many libraries
            words = " ".join(str(error).split())[:200]
            got = f"{type(error).__name__}: {words}"
            if is_local:
                raise DataError(f"expected a table of pictures at {path}, got {got}") from None
            expected = f"a folder or a data set of the Hub at {path}"
            raise DataError(f"expected {expected}, got no such folder, and from the Hub {got}") from None
        known = (IMAGE, *OWN_KEYS[1:], *item_specs())
        for key, column in (columns or {}).items():
            if key not in known or column not in rows.column_names:
                expected = f"a column of {', '.join(rows.column_names)} for a key of {', '.join(known)}"
                raise DataError(f"expected {expected}, got {key}={column}")
        self.columns = {key: key for key in known if key in rows.column_names} | dict(columns or {})
        if IMAGE not in self.columns:
            raise DataError(f"expected a column of pictures in {path}, got {', '.join(rows.column_names)}")
        rows = rows.select_columns(sorted(set(self.columns.values())))
        for key in (IMAGE, CONTROL):
            if key in self.columns:
                rows = rows.cast_column(self.columns[key], datasets.Image(decode=False))
        self.rows = rows
        self.fingerprint = rows._fingerprint

    def scan(self, problems: Problems) -> Iterator[tuple[int, ImageRecord]]:
        """All records with their positions, streamed; mistakes go to `problems`."""
        for number, values in enumerate(self.rows):
            record = self._record(number, values, problems)
            if record is not None:
                yield number, record

    def stamped(self) -> list[Path]:
        """The parquet files; of a data set on the Hub none."""
        return self.tables

    def record(self, position: int, line: int) -> ImageRecord:
        """The record at a position that `scan` gave."""
        problems = Problems()
        record = self._record(position, self.rows[position], problems)
        problems.raise_if_any(self.name)
        assert record is not None
        return record

    def _record(self, number: int, values: Mapping[str, Any], problems: Problems) -> ImageRecord | None:
        image = values[self.columns[IMAGE]] or {}
        row = {key: values[column] for key, column in self.columns.items() if key != IMAGE}
        row = {key: value for key, value in row.items() if value is not None}
        for key in set(row) & set(item_specs()):
            if isinstance(row[key], list):  # a column has all keys in every row: those without a value go
                row[key] = [_without_nulls(one) for one in row[key]]

        return RowParser(self.name, problems, self.form).parse(
            row,
            number + 1,
            lambda _: (f"{number:09d}", _inline(image)),
            find_control=lambda cell: None if cell is None else _inline(cell),
        )


def _inline(cell: Mapping[str, Any]) -> Inline:
    """The picture in a cell of a column of pictures."""
    data = cell.get("bytes")
    if data is None and cell.get("path") and Path(cell["path"]).is_file():
        data = Path(cell["path"]).read_bytes()
    if data is None:
        raise DataError(f"expected the bytes of a picture, got {sorted(cell)} without them")
    return Inline(data)


def features() -> Any:
    """The `datasets.Features` of a row, to be handed to `load_dataset("imagefolder", features=...)`.

    Left to itself `datasets` guesses types from the first rows: null where actions are null, whole numbers
    where boxes are, and an error where a later row has what they lack.

    Raises:
        DataError: `datasets` is not installed.
    """
    datasets = library()
    text, box = datasets.Value("string"), datasets.List(datasets.Value("float64"), length=4)
    number = datasets.Value("float64")
    interaction = {"subject": text, "action": text, "object": text, "subject_box": box, "object_box": box}
    common = {"strength": number}
    return datasets.Features(
        {
            IMAGE: datasets.Image(),
            "prompt": text,
            "prompts": datasets.List(text),
            "interactions": datasets.List({**interaction, **common, "action_region": text}),
            "entities": datasets.List({"phrase": text, "box": box, **common}),
            "weight": datasets.Value("int64"),
            "flip": datasets.Value("bool"),
            **{key: text for key in (CONTROL, "id", "source", "license")},
        }
    )


def _without_nulls(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: value for key, value in item.items() if value is not None or key == "action"}


def library() -> Any:
    """The `datasets` package.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError(
            f"expected the packages of interactdiff[data] for parquet, got no {error.name}"
        ) from None
    return datasets
