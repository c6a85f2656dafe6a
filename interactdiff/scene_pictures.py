"""Pictures that items of a scene hold: read, limited, compared, written into JSON. No torch.

A picture is read when its item is made, and kept as a method sees it, so that a record holds the same pixels.
Files that text names (scene files, the command line's forms) are opened only within `picture_files`: a scene
that comes from elsewhere, as through the studio's API, must not open the server's files.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from interactdiff.errors import SceneError
from interactdiff.picture_reading import MAX_PIXELS, UnreadablePicture, as_mask, eight_bits, read_picture
from interactdiff.scene_checks import shown

MAX_PICTURE_SIDE = 1024
"""Pixels of the longer side of what a method sees, and a record holds; larger pictures are made smaller."""
DATA = "data:image/png;base64,"
Mode = Literal["RGB", "RGBA", "L"]


@dataclass(frozen=True)
class _Files:
    """Where files may be opened: anywhere if there are no folders; relative names are relative to `base`."""

    base: Path
    folders: tuple[Path, ...] | None


_FILES: ContextVar[_Files | None] = ContextVar("picture files", default=None)


@contextmanager
def picture_files(*folders: str | os.PathLike[str], base: str | os.PathLike[str] = ".") -> Iterator[None]:
    """Let text within the block name picture files.

    Args:
        *folders: the only ones whose files may be opened; any file where there are none.
        base: what relative names are relative to.
    """
    allowed = tuple(Path(folder).resolve() for folder in folders) or None
    token = _FILES.set(_Files(Path(base), allowed))
    try:
        yield
    finally:
        _FILES.reset(token)


@dataclass(frozen=True)
class Picture:
    """A picture's pixels, which do not change; two with the same pixels are equal.

    Attributes:
        mode: "RGB", "RGBA" or, of a mask, "L".
        size: width and height in pixels, up to `MAX_PICTURE_SIDE`.
        data: the pixels, row by row.
        path: the file that it was read from; None if it came in another way.
    """

    mode: Mode
    size: tuple[int, int]
    data: bytes = field(repr=False)
    path: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """As Python code that stands for it: the file's name, or the pixels as text."""
        return repr(self.path or self.to_text())

    @property
    def image(self) -> Image.Image:
        """As Pillow has it."""
        return Image.frombytes(self.mode, self.size, self.data)

    def to_text(self) -> str:
        """A data URI of a PNG; `Picture.of` reads it back, bit for bit."""
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return DATA + base64.b64encode(file.getvalue()).decode()

    @classmethod
    def of(cls, name: str, value: Any, mask: bool = False) -> Picture:
        """Read a picture.

        Args:
            name: what messages call it.
            value: a file's path, a data URI, a PIL image, a tensor [3 or 4, H, W] or an array [H, W, 3 or 4];
                of a mask [H, W]. Numbers in [0, 1], or 0 to 255 of uint8.
            mask: whether it is one: only how light it is counts.

        Raises:
            SceneError: it cannot be read, or is too large.
        """
        if isinstance(value, Picture):
            return value
        path = None
        if isinstance(value, str) and value.startswith("data:"):
            image = _opened(name, _data(name, value), "its data")
        elif isinstance(value, str | os.PathLike):
            path = os.fspath(value)
            image = _opened(name, path, shown(path))
        elif isinstance(value, Image.Image):
            _check_size(name, value)
            image = ImageOps.exif_transpose(value)
        else:
            image = _of_numbers(name, value)
        image = _converted(image, mask)
        if (longer := max(image.size)) > MAX_PICTURE_SIDE:
            size = [max(1, round(side * MAX_PICTURE_SIDE / longer)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        mode: Any = image.mode
        return cls(mode, image.size, image.tobytes(), path)

    @classmethod
    def named(cls, name: str, text: Any, mask: bool = False) -> Picture:
        """Read a picture that text of a scene names: a data URI; within `picture_files` also a file.

        Raises:
            SceneError: it is neither, or cannot be read.
        """
        if not isinstance(text, str):
            raise SceneError(f"{name}: expected a picture as text, got {shown(text)}")
        if text.startswith("data:"):
            return cls.of(name, text, mask)
        files = _FILES.get()
        if files is None:
            raise SceneError(f"{name}: expected {DATA}... where no files are opened, got {shown(text)}")
        path = files.base / text
        if files.folders is not None and not _within(path, files.folders):
            raise SceneError(f"{name}: expected an uploaded picture, got {shown(text)}")
        return cls.of(name, path, mask)


def _within(path: Path, folders: tuple[Path, ...]) -> bool:
    try:
        whole = path.resolve()
    except (OSError, ValueError):
        return False
    return any(whole.is_relative_to(folder) for folder in folders)


def _data(name: str, text: str) -> io.BytesIO:
    head, comma, rest = text.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return io.BytesIO(base64.b64decode(rest, validate=True))
    except (ValueError, binascii.Error):
        raise SceneError(f"{name}: expected {DATA}..., got {shown(text)}") from None


def _opened(name: str, file: Any, words: str) -> Image.Image:
    try:
        return eight_bits(read_picture(file))
    except UnreadablePicture as error:
        raise SceneError(f"{name}: expected {error.expected} at {words}, got {error.got}") from None


def _check_size(name: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        raise SceneError(f"{name}: expected at most {MAX_PIXELS} pixels, got {size}")
    if 0 in image.size:
        raise SceneError(f"{name}: expected a picture, got one without pixels")


def _of_numbers(name: str, value: Any) -> Image.Image:
    """Of a tensor or an array."""
    import numpy as np

    channels_first, array = hasattr(value, "detach"), value
    if channels_first:
        array = value.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if not isinstance(array, np.ndarray) or array.dtype == object:
        raise SceneError(f"{name}: expected a path, a PIL image or a tensor, got {shown(value)}")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if channels_first and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise SceneError(f"{name}: expected 1, 3 or 4 channels of rows and columns, got {list(value.shape)}")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise SceneError(f"{name}: expected numbers in [0, 1], got {array.min():g} to {array.max():g}")
        array = array * 255
    pixels = array.round().astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)
    _check_size(name, image)
    return image


def _converted(image: Image.Image, mask: bool) -> Image.Image:
    if mask:
        return as_mask(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
