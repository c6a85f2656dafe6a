"""Pictures of masks over their photo."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from interactdiff.concept.masks import ConceptMasks
from interactdiff.concept.words import ConceptError
from interactdiff.picture_reading import ALL_FORMATS, UnreadablePicture, as_mask, as_rgb, read_picture

COLOURS = ((214, 0, 108), (0, 87, 217), (0, 116, 58), (138, 75, 0), (98, 0, 168), (0, 122, 128))
GAP, LEAST_SIDE, LABEL = 8, 192, 22  # pixels


def masks_picture(photo: Image.Image, masks: ConceptMasks) -> Image.Image:
    """The photo, and beside it each concept in its mask, with its name and its share of the picture."""
    shown = _legible(photo.convert("RGB"))
    width, height = shown.size
    panels = [(shown, "photo")]
    pixels = np.asarray(shown, dtype=np.float32)
    for number, name in enumerate(masks.names):
        inside = _enlarged(masks.masks[number], (height, width))[..., None]
        colour = np.asarray(COLOURS[number % len(COLOURS)], dtype=np.float32)
        outside = 0.25 * pixels + 0.75 * 245
        within = 0.75 * pixels + 0.25 * colour
        drawn = Image.fromarray(np.where(inside, within, outside).round().astype(np.uint8))
        panels.append((drawn, f"{name} {100 * masks.areas[name]:.0f} %"))
    return side_by_side(panels)


def side_by_side(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in a row, each with a line of words under it; small ones are enlarged, so that words fit."""
    font = ImageFont.load_default(14)
    panels = [(_legible(picture), words) for picture, words in panels]
    widths = [max(picture.width, ceil(font.getlength(words)) + 4) for picture, words in panels]
    height = max(picture.height for picture, _ in panels)
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(panels) - 1), height + LABEL), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for (picture, words), width in zip(panels, widths, strict=True):
        sheet.paste(picture, (left, 0))
        draw.text((left + 2, height + 3), words, fill="black", font=font)
        left += width + GAP
    return sheet


def read_photo(path: str) -> Image.Image:
    """A photo in RGB, as it is shown.

    Raises:
        ConceptError: there is none, or it is damaged.
    """
    return _read(path, "photo", as_rgb)


def as_shown(photo: Image.Image) -> Image.Image:
    """A photo in RGB, as it is shown: its orientation applied, white behind transparency.

    Raises:
        ConceptError: it is of floating-point numbers.
    """
    try:
        return as_rgb(ImageOps.exif_transpose(photo))
    except UnreadablePicture as error:
        raise ConceptError(f"photo: {error}") from None


def read_masks(paths: Mapping[str, str], photo: Image.Image) -> dict[str, torch.Tensor]:
    """Masks [h, w] float32 in [0, 1] of pictures that are white where a concept is.

    Args:
        paths: of the pictures, by the names of the concepts.
        photo: that they are of.

    Raises:
        ConceptError: there is no such picture, it is damaged, or its aspect is not the photo's.
    """
    masks = {}
    for name, path in paths.items():
        mask = _read(path, "mask", as_mask)
        if abs(mask.width * photo.height - mask.height * photo.width) > max(photo.size):  # half a pixel or so
            raise ConceptError(
                f"expected a mask of the photo's {photo.width} x {photo.height} pixels, or of its aspect, at "
                f"{path}, got {mask.width} x {mask.height}"
            )
        masks[name] = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)
    return masks


def _read(path: str, what: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        return convert(read_picture(path, ALL_FORMATS))
    except UnreadablePicture as error:
        raise ConceptError(f"{what} {path}: {error}") from None


def _legible(picture: Image.Image) -> Image.Image:
    scale = max(1, -(-LEAST_SIDE // min(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _enlarged(mask: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(mask.float()[None, None], size, mode="nearest")[0, 0].numpy() > 0.5
