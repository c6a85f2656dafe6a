"""What a user asks for: who does what to what, and where.

Everything that comes from a user becomes an `Interaction` or a `Scene` here and is checked as it is made, so
that nothing unchecked reaches a tensor. No torch in this module: it is quick to import.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

Box = tuple[float, float, float, float]
"""xyxy in [0, 1]: left, top, right, bottom, as shares of the picture's width and height."""

NULL_ACTION = "-"  # how the command line says "boxes only"; an empty phrase is an error, not a wish
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_STRENGTH = 2.0
MAX_SIDE = 4096  # pixels
SIDE_MULTIPLE = 8  # pixels per latent of the usual VAEs
_EDGES = ("x0", "y0", "x1", "y1")


class SceneError(ValueError):
    """A scene that cannot be drawn; the message is one sentence with what was expected and what came."""


@dataclass(frozen=True)
class Interaction:
    """One triplet: a subject acts on an object, each inside its box.

    Attributes:
        subject: phrase for who acts ("person in blue").
        action: phrase for what is done ("riding"), or None for boxes only: the action's token is then null.
        object: phrase for what it is done to ("red bike").
        subject_box: where the subject is, xyxy in [0, 1] with x0 < x1 and y0 < y1.
        object_box: where the object is, likewise. Boxes are stored as tuples of four floats.

    Raises:
        SceneError: on construction, if a phrase is empty or no text, or if a box is no such box.
    """

    subject: str
    action: str | None
    object: str
    subject_box: Box
    object_box: Box

    def __post_init__(self) -> None:
        for name in ("subject", "object"):
            object.__setattr__(self, name, _phrase(name, getattr(self, name)))
        if self.action is not None:
            object.__setattr__(self, "action", _phrase("action", self.action))
        for name in ("subject_box", "object_box"):
            object.__setattr__(self, name, _box(name, getattr(self, name)))

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

    @classmethod
    def parse(cls, text: str) -> "Interaction":
        """Read the command line's form, `subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1`.

        The first box is the subject's. An action of `-` means boxes only.

        Raises:
            SceneError: if there are not five parts, or a part is not what it should be.
        """
        parts = [part.strip() for part in text.split("|")]
        if len(parts) != 5:
            raise SceneError(
                f"expected five parts, subject|action|object|x0,y0,x1,y1|x0,y0,x1,y1, "
                f"got {len(parts)} in {_shown(text)}"
            )
        subject, action, thing, subject_box, object_box = parts
        return cls(
            subject=subject,
            action=None if action == NULL_ACTION else action,
            object=thing,
            subject_box=_parse_box("subject_box", subject_box),
            object_box=_parse_box("object_box", object_box),
        )

    @classmethod
    def from_dict(cls, values: Any) -> "Interaction":
        """Make one from a JSON object with exactly the five fields (`action` may be null).

        Raises:
            SceneError: if it is no object, a key is missing or unknown, or a value is not what it should be.
        """
        names = tuple(field.name for field in fields(cls))
        return cls(**_object(values, required=names, optional=()))


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture, apart from the models.

    Attributes:
        prompt: caption of the whole picture; may be empty.
        interactions: who does what to what, and where; may be empty.
        negative_prompt: what the guidance steers away from.
        seed: of the starting noise, 0 to 2**63 - 1.
        steps: denoising steps, 1 to 1000.
        guidance_scale: classifier-free guidance, 0 to 100; up to 1 is off; None for the model's own.
        strength: how strongly the interactions act, 0 (not at all) to 2.
        schedule: the share of the steps, from the first, during which they act, 0 to 1.
        width: pixels, a multiple of 8 up to 4096, or None for the model's own size.
        height: likewise.

    Raises:
        SceneError: on construction, if a value has the wrong type or is out of range.
    """

    prompt: str
    interactions: tuple[Interaction, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 30
    guidance_scale: float | None = None
    strength: float = 1.0
    schedule: float = 1.0
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "prompt": _text("prompt", self.prompt),
            "interactions": _interactions(self.interactions),
            "negative_prompt": _text("negative_prompt", self.negative_prompt),
            "seed": _whole("seed", self.seed, 0, MAX_SEED),
            "steps": _whole("steps", self.steps, 1, MAX_STEPS),
            "guidance_scale": None
            if self.guidance_scale is None
            else _number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE),
            "strength": _number("strength", self.strength, 0.0, MAX_STRENGTH),
            "schedule": _number("schedule", self.schedule, 0.0, 1.0),
            "width": _side("width", self.width),
            "height": _side("height", self.height),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain JSON values; `Scene.from_dict` reads it back to an equal scene."""
        values = asdict(self)
        values["interactions"] = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in one.items()}
            for one in values["interactions"]
        ]
        return values

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
        names = tuple(field.name for field in fields(cls))
        given = _object(values, required=("prompt",), optional=(*names, "$schema"))
        given.pop("$schema", None)
        listed = given.get("interactions", [])
        if not isinstance(listed, list):
            raise SceneError(f"interactions: expected a list, got {_shown(listed)}")
        made = tuple(
            _numbered(number, lambda one=one: Interaction.from_dict(one))
            for number, one in enumerate(listed, start=1)
        )
        return cls(**{**given, "interactions": made})

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
            return cls.from_dict(json.loads(text, object_pairs_hook=_unique_keys))
        except json.JSONDecodeError as error:
            raise SceneError(
                f"{source}, line {error.lineno}, column {error.colno}: expected JSON, got {_malformed(error)}"
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
            raise SceneError(f"expected a scene file, got {_shown(str(path))}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise SceneError(
                f"{path}: expected JSON text in UTF-8, got other bytes at byte {error.start}"
            ) from None
        return cls.from_json(text, source=str(path))


def interactions_from_lists(
    subject_phrases: Sequence[str],
    action_phrases: Sequence[str | None],
    object_phrases: Sequence[str],
    subject_boxes: Sequence[Sequence[float]],
    object_boxes: Sequence[Sequence[float]],
) -> tuple[Interaction, ...]:
    """Make interactions from five parallel lists, the form in which earlier ports of the method take them.

    Raises:
        SceneError: if the lists differ in length, or an entry is not what it should be.
    """
    lists = {
        "subject_phrases": subject_phrases,
        "action_phrases": action_phrases,
        "object_phrases": object_phrases,
        "subject_boxes": subject_boxes,
        "object_boxes": object_boxes,
    }
    for name, value in lists.items():
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise SceneError(f"{name}: expected a list, got {_shown(value)}")
    if len({len(value) for value in lists.values()}) > 1:
        lengths = ", ".join(f"{len(value)} {name}" for name, value in lists.items())
        raise SceneError(f"expected lists of equal length, got {lengths}")
    rows = zip(*lists.values(), strict=True)
    return tuple(_numbered(n, lambda row=row: Interaction(*row)) for n, row in enumerate(rows, start=1))


def _numbered(number: int, make: Callable[[], Interaction]) -> Interaction:
    """Make an interaction whose errors say which one it is, counted from 1."""
    try:
        return make()
    except SceneError as error:
        raise SceneError(f"interaction {number}: {error}") from None


def _shown(value: Any) -> str:
    """A value as a message shows it: on one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _malformed(error: json.JSONDecodeError) -> str:
    """What stands where JSON breaks off, and the parser's reason for stopping there."""
    rest = error.doc[error.pos : error.pos + 12].split("\n")[0]
    return f"{_shown(rest) if rest else 'the end of the line'} ({error.msg})"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that has a key twice, of which json would silently keep the last."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise SceneError(f"expected each key once, got {_shown(key)} twice")
        values[key] = value
    return values


def _object(values: Any, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise SceneError(f"expected an object with {', '.join(required)}, got {_shown(values)}")
    known = list(dict.fromkeys((*required, *optional)))
    for key in values:
        if key not in known:
            raise SceneError(f"expected only the keys {', '.join(known)}, got {_shown(key)}")
    for key in required:
        if key not in values:
            raise SceneError(f"expected the key {key}, got only {_shown(list(values))}")
    return dict(values)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SceneError(f"{name}: expected text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SceneError(f"{name}: expected text that UTF-8 can hold, got {_shown(value)}") from None
    return value


def _phrase(name: str, value: Any) -> str:
    phrase = " ".join(_text(name, value).split())
    if not phrase:
        raise SceneError(f"{name}: expected a phrase, got {_shown(value)}")
    return phrase


def _float(value: Any) -> float | None:
    """The value as a float, or None if it is no number (bool is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = _float(value)
    if number is None or not low <= number <= high:
        raise SceneError(f"{name}: expected a number from {low:g} to {high:g}, got {_shown(value)}")
    return number


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise SceneError(f"{name}: expected a whole number from {low} to {high}, got {_shown(value)}")
    return int(value)


def _side(name: str, value: Any) -> int | None:
    if value is None:
        return None
    side = _whole(name, value, SIDE_MULTIPLE, MAX_SIDE)
    if side % SIDE_MULTIPLE:
        raise SceneError(f"{name}: expected a multiple of {SIDE_MULTIPLE} pixels, got {side}")
    return side


def _box(name: str, value: Any) -> Box:
    """Check a box; lists, tuples and (through `tolist`) arrays and tensors are taken."""
    edges = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(edges, (list, tuple)) or len(edges) != 4:
        raise SceneError(f"{name}: expected four numbers x0, y0, x1, y1, got {_shown(value)}")
    numbers: list[float] = []
    for edge, given in zip(_EDGES, edges, strict=True):
        number = _float(given)
        if number is None or not 0.0 <= number <= 1.0:
            raise SceneError(
                f"{name}: expected {edge} to be a number in [0, 1], got {_shown(given)} in {_shown(edges)}"
            )
        numbers.append(number)
    x0, y0, x1, y1 = numbers
    for low, high, start, end in (("x0", "x1", x0, x1), ("y0", "y1", y0, y1)):
        if not start < end:
            raise SceneError(f"{name}: expected {low} < {high}, got {low} = {start} and {high} = {end}")
    return (x0, y0, x1, y1)


def _parse_box(name: str, text: str) -> Box:
    parts = text.split(",")
    if len(parts) != 4:
        raise SceneError(f"{name}: expected four numbers x0,y0,x1,y1, got {len(parts)} in {_shown(text)}")
    try:
        x0, y0, x1, y1 = (float(part) for part in parts)
    except ValueError:
        raise SceneError(f"{name}: expected four numbers x0,y0,x1,y1, got {_shown(text)}") from None
    return (x0, y0, x1, y1)


def _interactions(value: Any) -> tuple[Interaction, ...]:
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"interactions: expected a list of Interaction, got {_shown(value)}")
    for one in value:
        if not isinstance(one, Interaction):
            raise SceneError(f"interactions: expected a list of Interaction, got {_shown(one)} in it")
    return tuple(value)
