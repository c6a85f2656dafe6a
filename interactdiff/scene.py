"""What a user asks for: who does what to what, and where.

Everything that comes from a user becomes an `Interaction`, an `Entity` or a `Scene` here and is checked as it
is made, so that nothing unchecked reaches a tensor. No torch in this module: it is quick to import.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from interactdiff.scene_checks import (
    Box,
    SceneError,
    Schedule,
    checked_box,
    checked_flag,
    checked_number,
    checked_phrase,
    checked_schedule,
    checked_side,
    checked_text,
    checked_whole,
    json_object,
    malformed,
    parse_box,
    shown,
    unique_keys,
)

ActionRegion = Literal["between", "union"]

NULL_ACTION = "-"  # how the command line says "boxes only"; an empty phrase is an error, not a wish
ACTION_REGIONS = ("between", "union")
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_STRENGTH = 2.0


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

    @classmethod
    def parse(cls, text: str) -> "Interaction":
        """Read the command line's form, `subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1`.

        The first box is the subject's. An action of `-` means boxes only. `|strength=0.5` and
        `|action_region=union` may follow.

        Raises:
            SceneError: if there are not five parts, or a part is not what it should be.
        """
        parts, options = _parts_and_options(text, ("strength", "action_region"))
        if len(parts) != 5:
            raise SceneError(
                f"expected five parts, subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1, "
                f"got {len(parts)} in {shown(text)}"
            )
        subject, action, thing, subject_box, object_box = parts
        return cls(
            subject,
            None if action == NULL_ACTION else action,
            thing,
            parse_box("subject_box", subject_box),
            parse_box("object_box", object_box),
            **options,
        )

    @classmethod
    def from_dict(cls, values: Any) -> "Interaction":
        """Make one from a JSON object; `action` may be null, `strength` and `action_region` may be left out.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        return cls(**json_object(values, *_keys(cls)))


@dataclass(frozen=True)
class Entity:
    """A thing in its box that does nothing to anything (GLIGEN's grounded entity).

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

    @classmethod
    def parse(cls, text: str) -> "Entity":
        """Read the command line's form, `phrase|x0,y0,x1,y1`; `|strength=0.5` may follow.

        Raises:
            SceneError: if there are not two parts, or a part is not what it should be.
        """
        parts, options = _parts_and_options(text, ("strength",))
        if len(parts) != 2:
            raise SceneError(f"expected two parts, phrase|x0,y0,x1,y1, got {len(parts)} in {shown(text)}")
        return cls(parts[0], parse_box("box", parts[1]), **options)

    @classmethod
    def from_dict(cls, values: Any) -> "Entity":
        """Make one from a JSON object; `strength` may be left out.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        return cls(**json_object(values, *_keys(cls)))


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture, apart from the models.

    Attributes:
        prompt: caption of the whole picture; may be empty.
        interactions: who does what to what, and where; may be empty.
        entities: what else is where; may be empty.
        negative_prompt: what the guidance steers away from.
        seed: of the starting noise, 0 to 2**63 - 1.
        steps: denoising steps, 1 to 1000.
        guidance_scale: classifier-free guidance, 0 to 100; up to 1 is off; None for the model's own.
        strength: how strongly interactions and entities act, 0 (not at all) to 2.
        schedule: the share of the steps, from the first, during which they act, 0 to 1; or the shares
            [on, linear decay, off], which add up to 1.
        fast: whether the adapter saves time at a small cost in control.
        width: pixels, a multiple of 8 up to 4096, or None for the model's own size.
        height: likewise.

    Raises:
        SceneError: on construction, if a value has the wrong type or is out of range.
    """

    prompt: str
    interactions: tuple[Interaction, ...] = ()
    entities: tuple[Entity, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 30
    guidance_scale: float | None = None
    strength: float = 1.0
    schedule: Schedule = 1.0
    fast: bool = False
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        shares = checked_schedule(self.schedule)
        checked = {
            "prompt": checked_text("prompt", self.prompt),
            "interactions": _all_of(Interaction, "interactions", self.interactions),
            "entities": _all_of(Entity, "entities", self.entities),
            "negative_prompt": checked_text("negative_prompt", self.negative_prompt),
            "seed": checked_whole("seed", self.seed, 0, MAX_SEED),
            "steps": checked_whole("steps", self.steps, 1, MAX_STEPS),
            "guidance_scale": None
            if self.guidance_scale is None
            else checked_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE),
            "strength": checked_number("strength", self.strength, 0.0, MAX_STRENGTH),
            "schedule": shares if shares[1] else shares[0],
            "fast": checked_flag("fast", self.fast),
            "width": checked_side("width", self.width),
            "height": checked_side("height", self.height),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def items(self) -> tuple[Interaction | Entity, ...]:
        """Everything that is asked for somewhere: interactions, then entities."""
        return (*self.interactions, *self.entities)

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain JSON values; `Scene.from_dict` reads it back to an equal scene."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists

    def to_json(self) -> str:
        """The scene as indented JSON text; `Scene.from_json` reads it back to an equal scene."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> "Scene":
        """Make a scene from a JSON object: `prompt` is required, every other field has its default.

        A `$schema` key, which editors use, is allowed and ignored.

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        required, optional = _keys(cls)
        given = json_object(values, required, (*optional, "$schema"))
        given.pop("$schema", None)
        for name, kind in (("interactions", Interaction), ("entities", Entity)):
            listed = given.get(name, [])
            if not isinstance(listed, list):
                raise SceneError(f"{name}: expected a list, got {shown(listed)}")
            given[name] = tuple(
                numbered(kind, number, lambda one=one, kind=kind: kind.from_dict(one))
                for number, one in enumerate(listed, start=1)
            )
        return cls(**given)

    @classmethod
    def from_json(cls, text: str, source: str = "scene") -> "Scene":
        """Read JSON text; see docs/scene.md for the schema.

        Args:
            text: the JSON text.
            source: what errors call it, such as a file's name.

        Raises:
            SceneError: if the text is no JSON (with line and column) or no scene.
        """
        try:
            return cls.from_dict(json.loads(text, object_pairs_hook=unique_keys))
        except json.JSONDecodeError as error:
            raise SceneError(
                f"{source}, line {error.lineno}, column {error.colno}: expected JSON, got {malformed(error)}"
            ) from None
        except SceneError as error:
            raise SceneError(f"{source}: {error}") from None
        except (RecursionError, ValueError):  # absurd nesting, or an integer of thousands of digits
            raise SceneError(
                f"{source}: expected a scene, got JSON nested too deep or digits too many"
            ) from None

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Scene":
        """Read a scene from a JSON file in UTF-8.

        Raises:
            SceneError: if the file cannot be read, is no JSON (with line and column) or holds no scene.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SceneError(f"expected a scene file, got {shown(str(path))}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise SceneError(
                f"{path}: expected JSON text in UTF-8, got other bytes at byte {error.start}"
            ) from None
        return cls.from_json(text, source=str(path))


def numbered(kind: type, number: int, make: Callable[[], Any]) -> Any:
    """Make an interaction or entity whose errors say which one it is, counted from 1."""
    try:
        return make()
    except SceneError as error:
        raise SceneError(f"{kind.__name__.lower()} {number}: {error}") from None


def _keys(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that its JSON object must have, and those that it may."""
    required = tuple(field.name for field in fields(kind) if field.default is MISSING)
    return required, tuple(field.name for field in fields(kind) if field.name not in required)


def _parts_and_options(text: str, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `|name=value` off the end of the command line's form."""
    parts, options = [part.strip() for part in text.split("|")], {}
    while parts and (split := parts[-1].split("=", 1))[0].strip() in names and len(split) == 2:
        name, value = split[0].strip(), split[1].strip()
        try:
            options[name] = float(value) if name == "strength" else value
        except ValueError:
            raise SceneError(f"{name}: expected a number, got {shown(value)}") from None
        parts.pop()
    return parts, options


def _all_of(kind: type, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"{name}: expected a list of {kind.__name__}, got {shown(value)}")
    for one in value:
        if not isinstance(one, kind):
            raise SceneError(f"{name}: expected a list of {kind.__name__}, got {shown(one)} in it")
    return tuple(value)
