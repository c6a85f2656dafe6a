"""Pictures as they are shown: EXIF orientation applied, white behind transparency, eight bits of RGB."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from interactdiff.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not those that call other programs
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
_HIGH = ("I", "I;16", "I;16B", "I;16L", "I;16N")


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
        with _opened(picture) as file, Image.open(file, formats=_FORMATS) as image:
            orientation = _orientation(image, file)
            width, height = image.size
            if orientation >= 5:
                width, height = height, width
            return PictureInfo(width, height, orientation, _notes(image))
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise _unreadable(error) from None


def open_picture(picture: Path | bytes) -> Image.Image:
    """Decode a picture: RGB, as shown, the first frame, white behind transparency.

    Raises:
        DataError: it is no whole picture.
    """
    try:
        with _opened(picture) as file, Image.open(file, formats=_FORMATS) as image:
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # as above
        raise _unreadable(error) from None


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
        "16-bit": image.mode in _HIGH,
        "CMYK": image.mode == "CMYK",
        "alpha": image.has_transparency_data,
        "animated": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
    }
    return tuple(name for name, there in notes.items() if there)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _HIGH:  # Pillow's own conversion clips at 255
        eight = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if image.mode == "F":
        raise DataError("expected a picture of 8 or 16 bits, got one of floating-point numbers")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _unreadable(error: Exception) -> DataError:
    words = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        got = f"a file that is none of {', '.join(_FORMATS)}"
    elif isinstance(error, Image.DecompressionBombError):
        got = f"one of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    elif "truncated" in words or "end of" in words or isinstance(error, EOFError):
        got = "a file that ends early"
    else:
        got = f"a damaged file ({words[:80] or type(error).__name__})"
    return DataError(f"expected a whole picture, got {got}")
