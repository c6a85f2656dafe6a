"""Pictures as they are shown: EXIF orientation applied, white behind transparency, eight bits of RGB."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from interactdiff.errors import DataError
from interactdiff.picture_reading import (
    ALL_FORMATS,
    HIGH,
    UnreadablePicture,
    as_rgb,
    read_picture,
    unreadable,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


@dataclass(frozen=True)
class PictureInfo:
    """What a picture's header says.

    Attributes:
        width: in pixels, as shown.
        height: likewise.
        orientation: of EXIF, 1 to 8.
        notes: of "16-bit", "CMYK", "alpha", "animated", what is converted when it is read.
    """

    width: int
    height: int
    orientation: int = 1
    notes: tuple[str, ...] = ()

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height as stored, before the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def picture_info(picture: Path | bytes) -> PictureInfo:
    """Read a picture's header; its pixels are not decoded.

    Raises:
        DataError: it is no picture, or one of a format that is not read.
    """
    try:
        with _opened(picture) as file, Image.open(file, formats=ALL_FORMATS) as image:
            orientation = _orientation(image, file)
            width, height = image.size
            if orientation >= 5:
                width, height = height, width
            return PictureInfo(width, height, orientation, _notes(image))
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise _refused(unreadable(error, ALL_FORMATS)) from None


def open_picture(picture: Path | bytes) -> Image.Image:
    """Decode a picture: RGB, as shown, the first frame, white behind transparency.

    Raises:
        DataError: it is no whole picture.
    """
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        return as_rgb(read_picture(file, ALL_FORMATS, most_pixels=None))
    except UnreadablePicture as error:
        raise _refused(error) from None


def _opened(picture: Path | bytes) -> BinaryIO:
    return io.BytesIO(picture) if isinstance(picture, bytes) else picture.open("rb")


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode all of it to look further
        exif = Image.Exif()
        exif.load(_png_exif(file))
    else:
        exif = image.getexif()
    value = exif.get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _png_exif(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG, which may stand after the pixels; empty if there is none."""
    place = file.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\x00\x00" + file.read(length)
            file.seek(length + 4, io.SEEK_CUR)
        return b""
    finally:
        file.seek(place)


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = {
        "16-bit": image.mode in HIGH,
        "CMYK": image.mode == "CMYK",
        "alpha": image.has_transparency_data,
        "animated": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
    }
    return tuple(name for name, there in notes.items() if there)


def _refused(error: UnreadablePicture) -> DataError:
    expected = "a whole picture" if error.expected.startswith("a whole ") else error.expected
    return DataError(f"expected {expected}, got {error.got}")
