"""Which pixels of a picture are the subject: by a mask, the alpha channel, a white background, a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from interactdiff.errors import AdapterError, SceneError
from interactdiff.picture_reading import as_rgb
from interactdiff.scene_checks import shown
from interactdiff.subject.items import LEAST_MASK, Subject

WHITE = 240
"""Least value of each channel, of 255, of a near-white pixel."""
WHITE_BORDER = 0.6
"""Share of the border's pixels that have to be near white for the background to be taken as white."""
MARGIN = 0.05
"""Around a subject in a close-up, as a share of its longer side."""
WHOLE = "nothing: the whole picture"
SHADE = (104, 106, 122)
"""RGB of what is not the subject in a preview: dark enough on white, light enough on black."""
BACKGROUND_LABELS = ("background", "wall", "sky", "floor", "ground", "other")


class Foreground(NamedTuple):
    """Where a subject is in its picture.

    Attributes:
        image: the picture in RGB, white where the subject is not.
        mask: 0 to 255, of the same size.
        how: what said so, in words.
    """

    image: Image.Image
    mask: Image.Image
    how: str

    def seen(self, close_up: bool) -> Image.Image:
        """The picture that an image tower takes: the subject on white.

        Args:
            close_up: whether the subject fills the picture but for a small margin, however small it is;
                else it is where and as large as in its picture.
        """
        box = Image.fromarray(np.asarray(self.mask) >= LEAST_MASK).getbbox()
        if not close_up or box in (None, (0, 0, *self.mask.size)):
            return self.image
        left, top, right, bottom = box
        margin = max(1, round(MARGIN * max(right - left, bottom - top)))
        canvas = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), "white")
        canvas.paste(self.image, (margin - left, margin - top))
        return canvas


def foreground(subject: Subject, segmenter: Any = None) -> Foreground:
    """Find the subject: the first of its mask, its alpha channel, a near-white background, the segmenter.

    Where none of them says anything it is the whole picture.

    Args:
        subject: with its picture.
        segmenter: as `load_segmenter` returns it.

    Raises:
        SceneError: nothing is left of the subject.
    """
    picture: Image.Image = subject.image.image
    mask, how = _mask(subject, picture, segmenter)
    if np.asarray(mask).max() < LEAST_MASK:
        raise SceneError(
            f"subject {shown(subject.phrase)}: expected pixels of it in its picture, got none by {how}"
        )
    white = Image.new("RGB", picture.size, "white")
    return Foreground(Image.composite(as_rgb(picture), white, mask), mask, how)


def whole(subject: Subject) -> Foreground:
    """A subject's whole picture as its foreground, background and all; transparent pixels are white."""
    flat = as_rgb(subject.image.image)
    return Foreground(flat, Image.new("L", flat.size, 255), WHOLE)


def _mask(subject: Subject, picture: Image.Image, segmenter: Any) -> tuple[Image.Image, str]:
    if subject.mask is not None:
        return subject.mask.image, "its mask"
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        if np.asarray(alpha).min() < LEAST_MASK:
            return alpha, "its alpha channel"
        picture = picture.convert("RGB")
    background = white_background(np.asarray(picture))
    if background is not None:
        return Image.fromarray(np.where(background, 0, 255).astype(np.uint8)), "its white background"
    if segmenter is not None:
        return segmented(segmenter, picture, subject.phrase), "the segmentation model"
    return Image.new("L", picture.size, 255), WHOLE


def preview(subject: Subject, segmenter: Any = None) -> tuple[Image.Image, str]:
    """The subject's picture with all else shaded, and one sentence about how it was found.

    Args:
        subject: with its picture.
        segmenter: as `load_segmenter` returns it.

    Raises:
        SceneError: nothing is left of the subject.
    """
    found = foreground(subject, segmenter)
    shade = Image.blend(found.image, Image.new("RGB", found.image.size, SHADE), 0.75)
    shown = Image.composite(found.image, shade, found.mask)
    if found.how == WHOLE:
        return shown, "The whole picture is taken: no mask, transparency or white background says otherwise."
    share = float((np.asarray(found.mask) >= LEAST_MASK).mean())
    return shown, f"{100 * share:.0f} % of the picture is taken, by {found.how}."


def white_background(pixels: np.ndarray) -> np.ndarray | None:
    """[H, W] bool: near-white pixels that are joined to the border; None if the border is not near white.

    White parts of the subject that do not touch the background stay the subject's.

    Args:
        pixels: uint8 [H, W, 3].
    """
    white: np.ndarray = np.asarray((pixels >= WHITE).all(-1))
    border = np.zeros_like(white)
    border[[0, -1]] = border[:, [0, -1]] = True
    if white[border].mean() < WHITE_BORDER:
        return None
    reached, before = white & border, -1
    while (count := int(reached.sum())) != before:
        before = count
        reached = _spread(_spread(reached, white).T, white.T).T
    return reached


def _spread(reached: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Along rows: every run of white pixels of which one is reached."""
    runs = np.cumsum(~white, 1) + np.arange(len(white))[:, None] * (white.shape[1] + 1)
    hit = np.zeros(runs.max() + 1, bool)
    hit[runs[reached]] = True
    return white & hit[runs]


def load_segmenter(path_or_id: str) -> Any:
    """Load a model of transformers for image segmentation, from safetensors and without code of its own.

    Raises:
        AdapterError: there is none.
    """
    from transformers import pipeline

    try:
        return pipeline("image-segmentation", model=path_or_id, model_kwargs={"use_safetensors": True})
    except Exception as error:  # whatever a loader raises
        raise AdapterError(
            f"expected an image-segmentation model of transformers at {path_or_id}, got "
            f"{type(error).__name__}: {str(error)[:120]}"
        ) from None


def segmented(segmenter: Any, picture: Image.Image, phrase: str) -> Image.Image:
    """The mask of the segments whose label is in the phrase; else of the largest that is no background."""
    segments: list[Mapping[str, Any]] = list(segmenter(picture))
    words = " ".join(phrase.lower().split())
    named = [one for one in segments if f" {str(one['label']).lower()} " in f" {words} "]
    if not named:
        others = [one for one in segments if str(one["label"]).lower() not in BACKGROUND_LABELS]
        named = sorted(others, key=lambda one: np.asarray(one["mask"]).sum())[-1:]
    mask = np.zeros((picture.height, picture.width), np.uint8)
    for one in named:
        segment = np.asarray(one["mask"].convert("L").resize(picture.size))
        mask[segment >= LEAST_MASK] = 255
    return Image.fromarray(mask)
