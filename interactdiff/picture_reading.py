"""Picture files as they are shown: whole, EXIF orientation applied, of few formats, none of them too large.

Whoever reads a picture puts `UnreadablePicture` into a sentence of its own. No torch.
"""

from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

from interactdiff.errors import InteractdiffError

FORMATS = ("PNG", "JPEG", "WEBP")
ALL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not those that call other programs
MAX_PIXELS = 40_000_000
HIGH = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of 16 bits


class UnreadablePicture(InteractdiffError):
    """A file that is no picture as it is expected.

    Attributes:
        expected: as messages say it, such as "a whole PNG, JPEG, WEBP".
        got: likewise, such as "a file that ends early".
    """

    def __init__(self, expected: str, got: str):
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got = expected, got


def read_picture(
    file: str | Path | IO[bytes], formats: tuple[str, ...] = FORMATS, most_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """Decode a picture, its first frame, in the mode that it has, as it is shown.

    Args:
        file: its path, or what is open.
        formats: that are taken, by Pillow's names.
        most_pixels: refused before the picture is decoded; None for Pillow's own limit.

    Raises:
        UnreadablePicture: there is none, or it is damaged, too large, or of another format.
    """
    try:
        with Image.open(file, formats=formats) as image:
            pixels = image.width * image.height
            if most_pixels is not None and pixels > most_pixels:
                raise UnreadablePicture(f"at most {most_pixels} pixels", f"{image.width} x {image.height}")
            if not pixels:
                raise UnreadablePicture("a picture", "one without pixels")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnreadablePicture:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise unreadable(error, formats) from None


def unreadable(error: Exception, formats: tuple[str, ...]) -> UnreadablePicture:
    """What an error of Pillow's, or of the system's, says of a file."""
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        is_missing = isinstance(error, FileNotFoundError)
        return UnreadablePicture("a picture", "no file" if is_missing else error.strerror or words)
    if isinstance(error, Image.UnidentifiedImageError):
        got = f"a file that is none of {', '.join(formats)}"
    elif isinstance(error, Image.DecompressionBombError):
        got = f"one of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    elif "truncated" in words or "end of" in words or isinstance(error, EOFError):
        got = "a file that ends early"
    else:
        got = f"a damaged file ({words[:80] or type(error).__name__})"
    return UnreadablePicture(f"a whole {', '.join(formats)}", got)


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits in 8; others as they are. Pillow's own conversion clips at 255."""
    if image.mode not in HIGH:
        return image
    import numpy as np

    return Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))


def as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of RGB, white behind transparency.

    Raises:
        UnreadablePicture: it is of floating-point numbers, which have no range.
    """
    if image.mode == "F":
        raise UnreadablePicture("a picture of 8 or 16 bits", "one of floating-point numbers")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return eight_bits(image).convert("RGB")


def as_mask(image: Image.Image) -> Image.Image:
    """Eight bits of grey, black behind transparency: what is light and can be seen is masked."""
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        black.alpha_composite(image.convert("RGBA"))
        return black.convert("L")
    return eight_bits(image).convert("L")
