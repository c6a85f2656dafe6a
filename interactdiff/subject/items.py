"""What users say: a subject by its picture. No torch in this module: it is quick to import."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interactdiff.errors import SceneError
from interactdiff.scene_checks import (
    Box,
    checked_box,
    checked_number,
    checked_phrase,
    json_object,
    parse_box,
    shown,
)
from interactdiff.scene_items import (
    MAX_STRENGTH,
    MIN_VISIBLE,
    Interaction,
    box_text,
    cropped_box,
    parts_and_options,
    required_and_optional,
    text_of_parts,
)
from interactdiff.scene_pictures import MAX_PICTURE_SIDE, Picture

MAX_SUBJECTS = 8
"""References of one picture; several of one phrase are references of one subject."""
LEAST_MASK = 128
"""A mask without a pixel as light as this, of 255, is empty."""


@dataclass(frozen=True)
class Subject:
    """A person or an object that a picture shows, to be drawn as it looks there.

    Attributes:
        phrase: what the prompt calls it ("person").
        image: its picture: a file's path, a PIL image, a tensor [3 or 4, H, W] in [0, 1], or a data URI; kept
            as a `Picture` of up to 1024 pixels a side.
        mask: which pixels of it are the subject, light on dark, of the picture's size; None lets the alpha
            channel, a near-white background or a segmentation model say so.
        box: where it shall be, xyxy in [0, 1]; None is the box of an interaction's subject or object of the
            same phrase, or anywhere.
        reference_prompt: what the picture shows, in words; None is the phrase.
        strength: 0 as if it were not there, 1, up to 2: multiplies what its reference's keys weigh and what
            the encoder adds.

    Raises:
        SceneError: on construction: a phrase is empty, a picture cannot be read or is too large, a mask is
            empty or of another size, a box is no box, or the strength is out of range.
    """

    phrase: str
    image: Any
    mask: Any = None
    box: Box | None = None
    reference_prompt: str | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        image, mask = Picture.of("image", self.image), self.mask
        if mask is not None:
            mask = Picture.of("mask", mask, mask=True)
            if mask.size != image.size:
                sizes = [" x ".join(map(str, one.size)) for one in (image, mask)]
                raise SceneError(
                    f"mask: expected {sizes[0]} pixels, as its picture has once both are reduced to "
                    f"{MAX_PICTURE_SIDE} a side at most, got {sizes[1]}"
                )
            if max(mask.data) < LEAST_MASK:
                raise SceneError("mask: expected light pixels where the subject is, got an empty mask")
        checked = {
            "phrase": checked_phrase("phrase", self.phrase),
            "image": image,
            "mask": mask,
            "box": None if self.box is None else checked_box("box", self.box),
            "strength": checked_number("strength", self.strength, 0.0, MAX_STRENGTH),
        }
        if self.reference_prompt is not None:
            checked["reference_prompt"] = checked_phrase("reference_prompt", self.reference_prompt)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def placed(self, items: Iterable[Any]) -> Subject:
        """The subject with a box: its own, else the first of interactions with its phrase, if any.

        Args:
            items: of its scene.
        """
        boxes = boxes_of(self, items)
        return replace(self, box=boxes[0]) if boxes else self

    def cropped(self, crop: Box, min_visible: float = MIN_VISIBLE) -> Subject | None:
        """The subject within a part of the picture, as `Interaction.cropped`; None where it is left out.

        One without a box stays as it is.
        """
        if self.box is None:
            return self
        box = cropped_box(self.box, crop, min_visible)
        return None if box is None else replace(self, box=box)

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read the command line's form, `phrase|picture`.

        `|box=x0,y0,x1,y1`, `|mask=file`, `|reference_prompt=text` and `|strength=0.5` may follow. Files are
        opened only within `picture_files`.

        Raises:
            SceneError: if there are not two parts, or a part is not what it should be.
        """
        parts, options = parts_and_options(text, ("box", "mask", "reference_prompt", "strength"))
        if len(parts) != 2:
            raise SceneError(f"expected two parts, phrase|picture, got {len(parts)} in {shown(text)}")
        if "box" in options:
            options["box"] = parse_box("box", options["box"])
        return cls._named(parts[0], parts[1], options)

    def to_text(self) -> str:
        """The command line's form; `parse` reads it back. Pictures that came from no file are data URIs.

        Raises:
            SceneError: a phrase or a file's name has a bar.
        """
        image, mask = (one and (one.path or one.to_text()) for one in (self.image, self.mask))
        return text_of_parts(
            self.phrase,
            image,
            box=None if self.box is None else box_text(self.box),
            mask=mask,
            reference_prompt=self.reference_prompt,
            strength=self.strength if self.strength != 1 else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As a scene file and a record have it, with the pictures inside."""
        mask = None if self.mask is None else self.mask.to_text()
        box = None if self.box is None else list(self.box)
        values = {"phrase": self.phrase, "image": self.image.to_text(), "mask": mask, "box": box}
        return values | {"reference_prompt": self.reference_prompt, "strength": self.strength}

    @classmethod
    def from_dict(cls, values: Any) -> Subject:
        """Make one from a JSON object, whose pictures are data URIs; within `picture_files` also files.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        given = json_object(values, *required_and_optional(cls))
        return cls._named(given.pop("phrase"), given.pop("image"), given)

    @classmethod
    def _named(cls, phrase: Any, image: Any, options: dict[str, Any]) -> Subject:
        if options.get("mask") is not None:
            options["mask"] = Picture.named("mask", options["mask"], mask=True)
        return cls(phrase, Picture.named("image", image), **options)


def boxes_of(subject: Subject, items: Iterable[Any]) -> tuple[Box, ...]:
    """A subject's own box; else those of interactions' subjects and objects that have its phrase."""
    if subject.box is not None:
        return (subject.box,)
    found: list[Box] = []
    for item in items:
        if isinstance(item, Interaction):
            ends = ((item.subject, item.subject_box), (item.object, item.object_box))
            found += [box for phrase, box in ends if phrase.lower() == subject.phrase.lower()]
    return tuple(dict.fromkeys(found))


def warn_unnamed(items: Sequence[Sequence[Subject]], prompt: str | Sequence[str] | None) -> None:
    """Say which subjects a prompt does not name, which it is to draw.

    Raises:
        SceneError: there are lists of subjects for another number of prompts.
    """
    if prompt is None:
        return
    prompts = [prompt] * len(items) if isinstance(prompt, str) else list(prompt)
    if len(items) not in (1, len(prompts)):
        raise SceneError(
            f"expected subjects for each of {len(prompts)} prompts, got {len(items)} lists of them"
        )
    for n, text in enumerate(prompts):
        for subject in items[n] if len(items) > 1 else items[0]:
            words = r"\s+".join(map(re.escape, subject.phrase.split()))
            if not re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE):
                warnings.warn(
                    f"subject {shown(subject.phrase)}: expected its phrase in the prompt, got {shown(text)}: "
                    "name it there, in the same words, to have it drawn",
                    stacklevel=4,
                )
