"""What detectors of interactions find in pictures: one form for all of them, and its JSON lines."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from interactdiff.data.pictures import open_picture, picture_info
from interactdiff.data.records import Stored
from interactdiff.errors import DataError, SceneError
from interactdiff.scene_checks import as_float, json_object, malformed, shown, unique_keys

PixelBox = tuple[float, float, float, float]


def in_pixels(box: Sequence[float], size: tuple[int, int]) -> PixelBox:
    """A box of shares in pixels of a picture of this width and height, with exclusive end coordinates."""
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]


@dataclass(frozen=True)
class Instance:
    """A person or an object: `box` xyxy in pixels, `score` in 0..1."""

    name: str
    box: PixelBox
    score: float


@dataclass(frozen=True)
class DetectedPair:
    """Who does what to what: numbers of a person and an object of the same picture; `score` ranks pairs.

    `object` is None where a person does something without one, which V-COCO's role AP scores.
    """

    person: int
    object: int | None
    verb: str
    score: float


@dataclass(frozen=True)
class PictureDetections:
    """What is found in one picture.

    Attributes:
        size: width and height in pixels of the picture that the boxes are of; None where a file does not say.
        persons: who.
        objects: what; persons to whom something is done are here too.
        pairs: who does what to what.
        inclusive: whether end coordinates are the last pixel's, rather than exclusive.
    """

    size: tuple[int, int] | None
    persons: tuple[Instance, ...] = ()
    objects: tuple[Instance, ...] = ()
    pairs: tuple[DetectedPair, ...] = ()
    inclusive: bool = False

    def object_of(self, pair: DetectedPair) -> Instance | None:
        """To what a pair's person does something."""
        return None if pair.object is None else self.objects[pair.object]


@dataclass(frozen=True)
class Picture:
    """A picture to look at.

    Attributes:
        file_name: its layout's.
        source: the file, or where else its bytes are; None where only detections are at hand.
        size: width and height that it is squeezed to; None is its own size.
    """

    file_name: str
    source: Path | Stored | None
    size: tuple[int, int] | None = None

    @property
    def there(self) -> bool:
        """Whether there is a picture."""
        return self.source.is_file() if isinstance(self.source, Path) else self.source is not None

    @property
    def shown_size(self) -> tuple[int, int] | None:
        """Width and height of what `open` gives, of the file's header alone; None without a file."""
        if self.size is not None or not self.there:
            return self.size
        with self._named_in_errors():
            info = picture_info(self.source if isinstance(self.source, Path) else self.read())
        return info.width, info.height

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            DataError: there is none.
        """
        if not self.there or self.source is None:
            raise DataError(f"expected a picture at {self._place}, got no such file")
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source.read()

    def open(self) -> Image.Image:
        """In RGB, as shown, see `interactdiff.data.pictures.open_picture`; of the size wanted.

        Decoded again with every call, so that many pictures take no more memory than one.

        Raises:
            DataError: there is no such picture, or it is not whole.
        """
        data = self.read()
        with self._named_in_errors():
            image = open_picture(data)
        if self.size is not None and image.size != self.size:
            image = image.resize(self.size, Image.Resampling.BICUBIC)
        return image

    @property
    def _place(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else self.file_name

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self._place}: {error}") from None


class HoiDetector(Protocol):
    """Finds persons, objects and who does what to what."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def digest(self) -> str:
        """Of its weights: what it finds is kept for these alone. Empty where there are none."""
        ...

    def detect(self, pictures: Sequence[Picture]) -> list[PictureDetections]:
        """What is in each picture."""
        ...


def to_row(file_name: str, found: PictureDetections, **more: Any) -> str:
    """A JSON line of what is found in a picture; `from_row` reads it back, exactly."""
    row: dict[str, Any] = {"file_name": file_name, **more}
    if found.size is not None:
        row["size"] = list(found.size)
    row["persons"] = [{"box": list(one.box), "score": one.score} for one in found.persons]
    row["objects"] = [{"name": one.name, "box": list(one.box), "score": one.score} for one in found.objects]
    row["pairs"] = [vars(one) for one in found.pairs]
    if found.inclusive:
        row["inclusive"] = True
    return json.dumps(row)


def from_row(line: str, where: str) -> tuple[str, PictureDetections, dict[str, Any]]:
    """Read a JSON line of detections.

    Args:
        line: JSON with `file_name`, `persons` (box, score), `objects` (name, box, score) and `pairs` (person,
            object, verb, score), where `object` may be null; `size` and `inclusive` may be left out.
        where: what errors call it.

    Returns:
        The picture's file name, what is found, and further keys of cached rows.

    Raises:
        DataError: it is no such line.
    """
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
        row = json_object(row, ("file_name", "persons", "objects", "pairs"), ("size", "inclusive", "crc32"))
        persons = _all(row["persons"], "person", _person)
        objects = _all(row["objects"], "object", _object)

        def pair(values: Any) -> DetectedPair:
            given = json_object(values, ("person", "object", "verb", "score"), ())
            for key, listed in (("person", persons), ("object", objects)):
                number = given[key]
                if number is None and key == "object":
                    continue
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(listed):
                    raise SceneError(f"{key}: expected a number below {len(listed)}, got {shown(number)}")
            if not isinstance(given["verb"], str):
                raise SceneError(f"verb: expected text, got {shown(given['verb'])}")
            return DetectedPair(given["person"], given["object"], given["verb"], _score(given["score"]))

        found = PictureDetections(
            _size(row.get("size")),
            persons,
            objects,
            _all(row["pairs"], "pair", pair),
            bool(row.get("inclusive")),
        )
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: expected JSON, got {malformed(error)}") from None
    except SceneError as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(row["file_name"], str):
        raise DataError(f"{where}, file_name: expected text, got {shown(row['file_name'])}")
    return row["file_name"], found, {key: row[key] for key in ("crc32",) if key in row}


def _all(listed: Any, name: str, make: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(listed, list):
        raise SceneError(f"{name}s: expected a list, got {shown(listed)}")
    made = []
    for number, values in enumerate(listed, start=1):
        try:
            made.append(make(values))
        except SceneError as error:
            raise SceneError(f"{name} {number}: {error}") from None
    return tuple(made)


def _person(values: Any) -> Instance:
    given = json_object(values, ("box", "score"), ("name",))
    return Instance("person", _box(given["box"]), _score(given["score"]))


def _object(values: Any) -> Instance:
    given = json_object(values, ("name", "box", "score"), ())
    if not isinstance(given["name"], str):
        raise SceneError(f"name: expected text, got {shown(given['name'])}")
    return Instance(given["name"], _box(given["box"]), _score(given["score"]))


def _finite(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and abs(number) < float("inf") else None  # NaN compares false


def _box(value: Any) -> PixelBox:
    edges = [_finite(edge) for edge in value] if isinstance(value, list) else []
    x0, y0, x1, y1 = edges if len(edges) == 4 else (None,) * 4
    if x0 is None or y0 is None or x1 is None or y1 is None:
        raise SceneError(f"box: expected four numbers x0, y0, x1, y1 in pixels, got {shown(value)}")
    return x0, y0, x1, y1


def _score(value: Any) -> float:
    if (number := _finite(value)) is None:
        raise SceneError(f"score: expected a number, got {shown(value)}")
    return number


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise SceneError(f"size: expected width and height in pixels, got {shown(value)}")
    return sides[0], sides[1]


def read_rows(file: Path) -> Iterator[tuple[str, PictureDetections, dict[str, Any]]]:
    """Read a file of JSON lines, one picture after the other.

    Raises:
        DataError: as `from_row`, with the file and the line.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield from_row(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected detections at {file}, got {error}") from None


def by_name(rows: Mapping[str, PictureDetections], pictures: Sequence[Picture]) -> list[PictureDetections]:
    """What a file says of pictures; nothing is found in those that it does not name."""
    return [rows.get(picture.file_name, PictureDetections(picture.size)) for picture in pictures]
