"""The items of a scene that interactions are made of: who does what to what, and where.

No torch in this module: it is quick to import.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

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

ActionRegion = Literal["between", "union"]

NULL_ACTION = "-"  # how the command line says "boxes only"; an empty phrase is an error, not a wish
ACTION_REGIONS = ("between", "union")
MAX_STRENGTH = 2.0
MIN_VISIBLE = 0.25  # of a box that is cut off by a crop


@dataclass(frozen=True)
class Interaction:
    """One triplet: a subject acts on an object, each inside its box.

    Attributes:
        subject: phrase for who acts ("person in blue").
        action: phrase for what is done ("riding"), or None for boxes only: the action's token is then null.
        object: phrase for what it is done to ("red bike").
        subject_box: where the subject is, xyxy in [0, 1] with x0 < x1 and y0 < y1.
        object_box: where the object is, likewise. Boxes are stored as tuples of four floats.
        strength: how strongly this one acts: 0 as if it were not there, 1 as trained, up to 2.
        action_region: where the action is: "between" the boxes as published, or their "union" (OneHOI);
            None is where the adapter was trained to look.

    Raises:
        SceneError: on construction, if a phrase is empty or no text, a box is no such box, the strength is
            out of range, or there is no such region.
    """

    subject: str
    action: str | None
    object: str
    subject_box: Box
    object_box: Box
    strength: float = 1.0
    action_region: ActionRegion | None = None

    def __post_init__(self) -> None:
        for name in ("subject", "object"):
            object.__setattr__(self, name, checked_phrase(name, getattr(self, name)))
        if self.action is not None:
            object.__setattr__(self, "action", checked_phrase("action", self.action))
        for name in ("subject_box", "object_box"):
            object.__setattr__(self, name, checked_box(name, getattr(self, name)))
        object.__setattr__(self, "strength", checked_number("strength", self.strength, 0.0, MAX_STRENGTH))
        if self.action_region not in (None, *ACTION_REGIONS):
            raise SceneError(f"action_region: expected between or union, got {shown(self.action_region)}")

    @property
    def between_box(self) -> Box:
        """Where the action is: the middle two of the boxes' four edges along each axis (xyxy in [0, 1]).

        The gap between disjoint boxes, the overlap of overlapping ones, the inner of nested ones; touching
        boxes give zero area. InteractDiffusion (arXiv 2312.05849), section 3.2.
        """
        s, o = self.subject_box, self.object_box
        _, x0, x1, _ = sorted((s[0], s[2], o[0], o[2]))
        _, y0, y1, _ = sorted((s[1], s[3], o[1], o[3]))
        return (x0, y0, x1, y1)

    @property
    def action_box(self) -> Box:
        """The action's region, xyxy in [0, 1], as published where the interaction does not say."""
        return self.action_box_in("between")

    def action_box_in(self, region: ActionRegion) -> Box:
        """The action's region, xyxy in [0, 1]: the between box, or the smallest box around both.

        Args:
            region: which it is, where the interaction itself does not say.
        """
        if (self.action_region or region) == "between":
            return self.between_box
        s, o = self.subject_box, self.object_box
        return (min(s[0], o[0]), min(s[1], o[1]), max(s[2], o[2]), max(s[3], o[3]))

    def cropped(self, crop: Box, min_visible: float = MIN_VISIBLE) -> "Interaction | Entity | None":
        """The interaction within a part of the picture that is drawn as a picture of its own.

        Args:
            crop: the part, xyxy in [0, 1] of the whole picture.
            min_visible: the share of a box's area that has to be within the crop, or the box is left out.

        Returns:
            An interaction with both boxes as shares of the crop, cut off at its edges; where only the subject
            or only the object is left, that as an `Entity`; None where neither is.

        Raises:
            SceneError: the crop is no box, or `min_visible` is not in [0, 1].
        """
        subject, object_ = (
            cropped_box(box, crop, min_visible) for box in (self.subject_box, self.object_box)
        )
        if subject is not None and object_ is not None:
            return replace(self, subject_box=subject, object_box=object_)
        if subject is not None:
            return Entity(self.subject, subject, self.strength)
        return None if object_ is None else Entity(self.object, object_, self.strength)

    @classmethod
    def parse(cls, text: str) -> "Interaction":
        """Read the command line's form, `subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1`.

        The first box is the subject's. An action of `-` means boxes only. `|strength=0.5` and
        `|action_region=union` may follow.

        Raises:
            SceneError: if there are not five parts, or a part is not what it should be.
        """
        parts, options = parts_and_options(text, ("strength", "action_region"))
        if len(parts) != 5:
            raise SceneError(
                f"expected five parts, subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1, "
                f"got {len(parts)} in {shown(text)}"
            )
        subject, action, object_, subject_box, object_box = parts
        return cls(
            subject,
            None if action == NULL_ACTION else action,
            object_,
            parse_box("subject_box", subject_box),
            parse_box("object_box", object_box),
            **options,
        )

    def to_text(self) -> str:
        """The command line's form; `parse` reads it back, unless a phrase has a bar or is only a dash.

        Raises:
            SceneError: a phrase has a bar, or the action is a dash.
        """
        if self.action == NULL_ACTION:
            raise SceneError(f"action: expected another phrase than {NULL_ACTION}, got it")
        boxes = (box_text(box) for box in (self.subject_box, self.object_box))
        return text_of_parts(
            self.subject,
            self.action or NULL_ACTION,
            self.object,
            *boxes,
            strength=self.strength if self.strength != 1 else None,
            action_region=self.action_region,
        )

    @classmethod
    def from_dict(cls, values: Any) -> "Interaction":
        """Make one from a JSON object; `action` may be null, `strength` and `action_region` may be left out.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        return cls(**json_object(values, *required_and_optional(cls)))


@dataclass(frozen=True)
class Entity:
    """An object in its box that takes part in no interaction (GLIGEN's grounded entity).

    Attributes:
        phrase: what it is ("red ball").
        box: where it is, xyxy in [0, 1] with x0 < x1 and y0 < y1.
        strength: how strongly it acts: 0 as if it were not there, 1 as trained, up to 2.

    Raises:
        SceneError: on construction, as for an `Interaction`.
    """

    phrase: str
    box: Box
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrase", checked_phrase("phrase", self.phrase))
        object.__setattr__(self, "box", checked_box("box", self.box))
        object.__setattr__(self, "strength", checked_number("strength", self.strength, 0.0, MAX_STRENGTH))

    def cropped(self, crop: Box, min_visible: float = MIN_VISIBLE) -> "Entity | None":
        """The entity within a part of the picture, as `Interaction.cropped`; None where it is left out."""
        box = cropped_box(self.box, crop, min_visible)
        return None if box is None else replace(self, box=box)

    @classmethod
    def parse(cls, text: str) -> "Entity":
        """Read the command line's form, `phrase|x0,y0,x1,y1`; `|strength=0.5` may follow.

        Raises:
            SceneError: if there are not two parts, or a part is not what it should be.
        """
        parts, options = parts_and_options(text, ("strength",))
        if len(parts) != 2:
            raise SceneError(f"expected two parts, phrase|x0,y0,x1,y1, got {len(parts)} in {shown(text)}")
        return cls(parts[0], parse_box("box", parts[1]), **options)

    def to_text(self) -> str:
        """The command line's form; `parse` reads it back.

        Raises:
            SceneError: the phrase has a bar.
        """
        strength = self.strength if self.strength != 1 else None
        return text_of_parts(self.phrase, box_text(self.box), strength=strength)

    @classmethod
    def from_dict(cls, values: Any) -> "Entity":
        """Make one from a JSON object; `strength` may be left out.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        return cls(**json_object(values, *required_and_optional(cls)))


def cropped_box(box: Box, crop: Box, min_visible: float = MIN_VISIBLE) -> Box | None:
    """A box as shares of a crop, cut off at its edges.

    Args:
        box: xyxy in [0, 1] of the whole picture.
        crop: likewise.
        min_visible: the share of the box's area that has to be within the crop, in [0, 1].

    Returns:
        xyxy in [0, 1] of the crop; None where less of the box is within it, or nothing.

    Raises:
        SceneError: the crop is no box, or `min_visible` is out of range.
    """
    x0, y0, x1, y1 = crop = checked_box("crop", crop)
    min_visible = checked_number("min_visible", min_visible, 0.0, 1.0)
    width, height = x1 - x0, y1 - y0
    left, top, right, bottom = (
        max(0.0, (box[0] - x0) / width),
        max(0.0, (box[1] - y0) / height),
        min(1.0, (box[2] - x0) / width),
        min(1.0, (box[3] - y0) / height),
    )
    if left >= right or top >= bottom:
        return None
    visible = (right - left) * (bottom - top) * width * height
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return None if visible < min_visible * whole * (1 - 1e-9) else (left, top, right, bottom)


def numbered(kind: type, number: int, make: Callable[[], Any]) -> Any:
    """Make an interaction or entity whose errors say which one it is, counted from 1."""
    try:
        return make()
    except SceneError as error:
        raise SceneError(f"{kind.__name__.lower()} {number}: {error}") from None


def required_and_optional(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that the JSON object of a dataclass must have, and those that it may."""
    required = tuple(field.name for field in fields(kind) if field.default is MISSING)
    return required, tuple(field.name for field in fields(kind) if field.name not in required)


def parts_and_options(text: str, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split the command line's form of an item.

    Args:
        text: parts with bars between them, then maybe `|name=value` for some of the names.
        names: of the options; `strength` is a number, any other one is text.

    Returns:
        The parts, and the options.

    Raises:
        SceneError: the strength is no number.
    """
    parts, options = [part.strip() for part in text.split("|")], {}
    while parts and (split := parts[-1].split("=", 1))[0].strip() in names and len(split) == 2:
        name, value = split[0].strip(), split[1].strip()
        try:
            options[name] = float(value) if name == "strength" else value
        except ValueError:
            raise SceneError(f"{name}: expected a number, got {shown(value)}") from None
        parts.pop()
    return parts, options


def text_of_parts(*parts: str, **options: object) -> str:
    """The command line's form of an item, which `parts_and_options` reads.

    Args:
        *parts: as text.
        **options: None is left out.

    Raises:
        SceneError: a part or an option has a bar in it.
    """
    for part in (*parts, *map(str, options.values())):
        if "|" in part:
            raise SceneError(f"expected a phrase without a bar, got {shown(part)}")
    given = (f"{name}={value}" for name, value in options.items() if value is not None)
    return "|".join([*parts, *given])


def box_text(box: Box) -> str:
    """A box in the command line's form, exactly."""
    return ",".join(map(repr, box))
