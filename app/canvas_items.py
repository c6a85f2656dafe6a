"""What a canvas is made of: boxes, links between them, and the rows of its table."""

from dataclasses import dataclass

from interactdiff.scene import ACTION_REGIONS, MAX_STRENGTH, ActionRegion
from interactdiff.scene_checks import Box, SceneError, checked_box, checked_number, checked_text, shown


@dataclass(frozen=True)
class CanvasBox:
    """A box and its phrase; an empty one is still to be typed."""

    id: str
    phrase: str
    box: Box
    strength: float = 1.0

    def __post_init__(self) -> None:
        checked_text("phrase", self.phrase)
        object.__setattr__(self, "box", checked_box("box", self.box))
        checked_number("strength", self.strength, 0.0, MAX_STRENGTH)


@dataclass(frozen=True)
class CanvasLink:
    """An interaction between the boxes of two ids; an empty action leaves it open."""

    id: str
    subject: str
    object: str
    action: str = ""
    strength: float = 1.0
    region: ActionRegion | None = None

    def __post_init__(self) -> None:
        checked_text("action", self.action)
        checked_number("strength", self.strength, 0.0, MAX_STRENGTH)
        if self.region not in (None, *ACTION_REGIONS):
            raise SceneError(f"region: expected between or union, got {shown(self.region)}")


@dataclass(frozen=True)
class CanvasRow:
    """An interaction, or a box without one (then there is no object), which may be incomplete."""

    subject: str
    subject_box: Box
    action: str = ""
    object: str | None = None
    object_box: Box | None = None
    strength: float = 1.0
    region: ActionRegion | None = None

    @property
    def words(self) -> tuple[str, str, str | None]:
        return self.subject, self.action, self.object
