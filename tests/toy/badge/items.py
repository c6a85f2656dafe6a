"""What users say: a badge in its box."""

from dataclasses import dataclass
from typing import Any

from interactdiff.scene_checks import (
    Box,
    SceneError,
    checked_box,
    checked_number,
    checked_phrase,
    json_object,
    parse_box,
    shown,
)
from interactdiff.scene_items import box_text, parts_and_options, required_and_optional, text_of_parts


@dataclass(frozen=True)
class Badge:
    """A badge.

    Attributes:
        label: what it says.
        box: where it is, xyxy in [0, 1].
        strength: how strongly it acts, 0 to 2.
    """

    label: str
    box: Box
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", checked_phrase("label", self.label))
        object.__setattr__(self, "box", checked_box("box", self.box))
        object.__setattr__(self, "strength", checked_number("strength", self.strength, 0.0, 2.0))

    @classmethod
    def parse(cls, text: str) -> "Badge":
        """Read `label|x0,y0,x1,y1`."""
        parts, options = parts_and_options(text, ("strength",))
        if len(parts) != 2:
            raise SceneError(f"expected two parts, label|x0,y0,x1,y1, got {len(parts)} in {shown(text)}")
        return cls(parts[0], parse_box("box", parts[1]), **options)

    def to_text(self) -> str:
        """Write it."""
        return text_of_parts(self.label, box_text(self.box), strength=self.strength)

    @classmethod
    def from_dict(cls, values: Any) -> "Badge":
        """Read it from JSON."""
        return cls(**json_object(values, *required_and_optional(cls)))
