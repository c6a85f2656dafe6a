"""Layouts in an image folder: `metadata.jsonl`, one row a picture, in a scene's own words.

Read strictly: a row that says something else than a layout is an error that names the file and the line.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from interactdiff.errors import DataError, SceneError
from interactdiff.files import write_aside
from interactdiff.scene import Scene
from interactdiff.scene_checks import checked_text, malformed, shown, unique_keys
from interactdiff.scene_items import Entity, Interaction, required_and_optional

METADATA = "metadata.jsonl"
REQUIRED = ("file_name", "prompt")
OPTIONAL = ("interactions", "entities")
ABOUT = ("prompts", "weight", "source", "license", "id", "flip")  # of training; says nothing of a layout
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Layout:
    """What one picture shows, and where.

    Attributes:
        file_name: of the picture, from its folder on, with forward slashes.
        prompt: caption of the whole picture.
        interactions: who does what to what, boxes xyxy as shares of the picture.
        entities: what else is where.
        size: width and height of the picture in pixels, where the annotations say.
        objects: names of the objects that the picture is labelled with as a whole; None is those that the
            interactions name.
    """

    file_name: str
    prompt: str
    interactions: tuple[Interaction, ...] = ()
    entities: tuple[Entity, ...] = ()
    size: tuple[int, int] | None = None
    objects: frozenset[str] | None = field(default=None, compare=False)

    @property
    def known_objects(self) -> frozenset[str]:
        """The objects that the picture holds, for the Known Object setting."""
        if self.objects is not None:
            return self.objects
        return frozenset(one.object for one in self.interactions)

    def to_row(self) -> dict[str, Any]:
        """The row of `metadata.jsonl`; what is as by default is left out."""
        row: dict[str, Any] = {"file_name": self.file_name, "prompt": self.prompt}
        for name in OPTIONAL:
            if items := getattr(self, name):
                row[name] = [_without_defaults(item) for item in items]
        return json.loads(json.dumps(row))


def _without_defaults(item: Any) -> dict[str, Any]:
    _, optional = required_and_optional(type(item))
    default = {name: type(item).__dataclass_fields__[name].default for name in optional}
    return {name: value for name, value in asdict(item).items() if default.get(name, ...) != value}


def metadata_file(folder: Path, split: str | None = None) -> Path:
    """The metadata of a folder, or of one of its splits where it has a folder for it.

    Raises:
        DataError: there is none.
    """
    places = [folder / METADATA] if split is None else [folder / split / METADATA, folder / METADATA]
    for place in places:
        if place.is_file():
            return place
    kind = "no such folder" if not folder.is_dir() else f"a folder without {METADATA}"
    raise DataError(f"expected layouts in {folder}, got {kind}")


def read_layouts(file: Path) -> Iterator[Layout]:
    """Read the rows of a `metadata.jsonl`, one after the other; empty lines are skipped.

    Raises:
        DataError: a row is not what it should be; the message names the file, the line and the item.
    """
    seen: dict[str, int] = {}
    try:
        opened = file.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"expected layouts at {file}, got {error.strerror}") from None
    with opened as lines:
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline()
            except UnicodeDecodeError as error:
                raise DataError(f"{file}, line {number}: expected UTF-8, got {error.reason}") from None
            if not line:
                return
            if not line.strip():
                continue
            layout = parse_row(line, f"{file}, line {number}", file.parent)
            if layout.file_name in seen:
                raise DataError(
                    f"{file}, line {number}, file_name: expected each picture once, got "
                    f"{layout.file_name!r} of line {seen[layout.file_name]} again"
                )
            seen[layout.file_name] = number
            yield layout


def parse_row(line: str, where: str, folder: Path) -> Layout:
    """Read one row.

    Args:
        line: JSON text.
        where: what errors call it.
        folder: that the picture is in, for a caption beside it.

    Raises:
        DataError: it is no such row.
    """
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: expected JSON, got {malformed(error)}") from None
    except SceneError as error:
        raise DataError(f"{where}: {error}") from None
    except (RecursionError, ValueError):
        raise DataError(f"{where}: expected a row, got JSON nested too deep or digits too many") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {shown(row)}")
    _check_keys(row, where)
    name = _checked_name(row["file_name"], where)
    try:
        prompt = checked_text("prompt", row["prompt"] if "prompt" in row else _sidecar(folder / name))
    except SceneError as error:
        raise DataError(f"{where}, {error}") from None
    interactions, entities = (
        tuple(_items(row.get(key, []), key, kind, where))
        for key, kind in (("interactions", Interaction), ("entities", Entity))
    )
    return Layout(name, prompt, interactions, entities)


def _check_keys(row: dict[str, Any], where: str) -> None:
    own = (*REQUIRED, *OPTIONAL, *ABOUT)
    _, of_scenes = required_and_optional(Scene)
    for key in row:
        if key not in own and key not in of_scenes:
            near = difflib.get_close_matches(key, own, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"{where}: expected the keys of a row, got {shown(key)}{hint}")
    if "file_name" not in row:
        raise DataError(f"{where}: expected the key file_name, got only {shown(list(row))}")


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}, file_name: expected the name of a picture, got {shown(name)}")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[a-zA-Z]:", name):
        raise DataError(f"{where}, file_name: expected a name within the folder, got {shown(name)}")
    if path.suffix.lower() not in PICTURES:
        kinds = ", ".join(PICTURES)
        raise DataError(f"{where}, file_name: expected a picture ({kinds}), got {shown(name)}")
    return str(path)


def _sidecar(picture: Path) -> Any:
    """The caption beside a picture, or None, which is refused as no text."""
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _items(listed: Any, key: str, kind: Any, where: str) -> Iterator[Any]:
    if not isinstance(listed, list):
        raise DataError(f"{where}, {key}: expected a list, got {shown(listed)}")
    for number, values in enumerate(listed, start=1):
        try:
            yield kind.from_dict(values)
        except SceneError as error:
            field_first = re.match(r"[a-z_0-9]+: ", str(error))
            between = ", " if field_first else ": "
            raise DataError(f"{where}, {kind.__name__.lower()} {number}{between}{error}") from None


def write_layouts(file: Path, layouts: Iterable[Layout]) -> None:
    """Write a `metadata.jsonl`, aside first and then renamed; the same layouts give the same bytes.

    Raises:
        OSError: it cannot be written.
    """

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="\n") as opened:
            for layout in layouts:
                opened.write(json.dumps(layout.to_row(), ensure_ascii=False) + "\n")

    write_aside(file, write)
