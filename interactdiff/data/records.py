"""A picture and its annotations: what every reader of data gives."""

import io
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from interactdiff.data.pictures import PictureInfo, open_picture, picture_info
from interactdiff.data.words import speaks_of_lettering
from interactdiff.errors import DataError
from interactdiff.registry import item_specs
from interactdiff.scene import Scene
from interactdiff.scene_items import Entity, Interaction

CONTROL = "conditioning_image"
"""The key of a row's control image, as diffusers' ControlNet scripts and data sets of the Hub call it."""


class Stored(Protocol):
    """Where the bytes of a picture are."""

    def read(self) -> bytes:
        """All bytes of the encoded picture."""
        ...


@dataclass(frozen=True)
class FileRange:
    """A file, or a part of one (a member of a tar).

    Attributes:
        path: of the file.
        offset: of the first byte.
        size: in bytes; None: to the end.
    """

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; fewer than `size` where the file ends early."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Inline:
    """The bytes themselves (a cell of a parquet file)."""

    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class ImageRecord:
    """One picture of a data set.

    Attributes:
        name: the picture's path in its folder, or its key in a shard; unique in a split.
        stored: where its bytes are.
        prompts: captions, at least one; training draws one of them an epoch.
        items: interactions, entities and items of other methods, boxes as shares of the picture as shown,
            which is after its EXIF orientation.
        weight: how often it comes in an epoch, from 1.
        flip: whether the row allows it to be mirrored.
        id: of the data set that it is from.
        source: where it is from.
        license: its licence.
        line: of the file of rows, from 1; of a shard the number of the example.
        control: where the bytes of its control image are, such as its depth; None without one.
    """

    name: str
    stored: Stored
    prompts: tuple[str, ...]
    items: tuple[Any, ...] = ()
    weight: int = 1
    flip: bool = True
    id: str | None = None
    source: str | None = None
    license: str | None = None
    line: int = 0
    control: Stored | None = None

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.prompts[0]

    @property
    def path(self) -> Path | None:
        """The picture's own file; None if it is a part of another file."""
        return own_file(self.stored)

    @property
    def interactions(self) -> tuple[Interaction, ...]:
        """Who does what to what."""
        return tuple(item for item in self.items if isinstance(item, Interaction))

    @property
    def entities(self) -> tuple[Entity, ...]:
        """What else is where."""
        return tuple(item for item in self.items if isinstance(item, Entity))

    @property
    def may_flip(self) -> bool:
        """Whether training may mirror it: not if `flip` forbids it, or a caption speaks of lettering."""
        return self.flip and not any(map(speaks_of_lettering, self.prompts))

    def to_row(self) -> dict[str, Any]:
        """The record as a row of `metadata.jsonl`, without its pictures; what has its default is left out."""
        row: dict[str, Any] = (
            {"prompt": self.prompt} if len(self.prompts) == 1 else {"prompts": [*self.prompts]}
        )
        values = self.scene().to_dict()
        for key, spec in item_specs().items():
            defaults = {field.name: field.default for field in fields(spec.type)}
            if values.get(key):
                row[key] = [
                    {name: value for name, value in one.items() if value != defaults.get(name, MISSING)}
                    for one in values[key]
                ]
        own = {"id": self.id, "source": self.source, "license": self.license}
        row |= {key: value for key, value in own.items() if value is not None}
        row |= {} if self.weight == 1 else {"weight": self.weight}
        return row | ({} if self.flip else {"flip": False})

    def scene(self) -> Scene:
        """The record as a scene with the defaults of sampling."""
        extra = tuple(item for item in self.items if not isinstance(item, (Interaction, Entity)))
        return Scene(self.prompt, self.interactions, self.entities, extra_items=extra)

    @property
    def format(self) -> str:
        """What the picture's file name should end in."""
        return format_of(self.stored)

    def open(self) -> Image.Image:
        """Decode the picture: RGB, as shown, see `pictures.open_picture`.

        Raises:
            DataError: it is no whole picture.
        """
        return open_picture(self.stored.read())

    def info(self) -> PictureInfo:
        """Size and kind of the picture, from its header.

        Raises:
            DataError: it is no picture.
        """
        return picture_info(self.path or self.stored.read())

    def open_control(self) -> Image.Image:
        """Decode the control image, as `open` does the picture.

        Raises:
            DataError: there is none, or it is no whole picture.
        """
        if self.control is None:
            raise DataError(f"{CONTROL}: expected a control image, got none")
        try:
            return open_picture(self.control.read())
        except (DataError, OSError) as error:
            raise DataError(f"{CONTROL}: {error}") from None

    def check_control(self, info: PictureInfo) -> None:
        """Refuse a control image whose sides are not in the ratio of the picture's, up to rounding.

        Args:
            info: of the picture.

        Raises:
            DataError: it is another ratio, or no picture.
        """
        if self.control is None:
            return
        try:
            got = picture_info(own_file(self.control) or self.control.read())
        except (DataError, OSError) as error:
            raise DataError(f"{CONTROL}: {error}") from None
        rounding = max(info.width + info.height, got.width + got.height) / 2  # half a pixel a side
        if abs(got.width * info.height - got.height * info.width) > rounding:
            expected = f"sides in the picture's ratio, {info.width} : {info.height}"
            raise DataError(f"{CONTROL}: expected {expected}, got {got.width} x {got.height} pixels")


def own_file(stored: Stored) -> Path | None:
    """The file that a picture is; None if it is a part of another file."""
    return stored.path if isinstance(stored, FileRange) and not stored.size else None


def format_of(stored: Stored) -> str:
    """What the name of a picture's file should end in."""
    if (file := own_file(stored)) is not None and file.suffix:
        return file.suffix[1:].lower()
    with Image.open(io.BytesIO(stored.read())) as image:
        return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(str(image.format), str(image.format).lower())
