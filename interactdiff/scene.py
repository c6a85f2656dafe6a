"""What a picture is to show: a prompt, items with their places, and how it is sampled.

Everything that comes from a user becomes an item (`interactdiff.scene_items`, or another method's) or a
`Scene` and is checked as it is made, so that nothing unchecked reaches a tensor. No torch in this module: it
is quick to import.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from interactdiff.scene_checks import (
    Box,
    SceneError,
    Schedule,
    checked_flag,
    checked_number,
    checked_schedule,
    checked_side,
    checked_text,
    checked_whole,
    json_object,
    malformed,
    shown,
    unique_keys,
)
from interactdiff.scene_items import (
    ACTION_REGIONS,
    MAX_STRENGTH,
    MIN_VISIBLE,
    NULL_ACTION,
    ActionRegion,
    Entity,
    Interaction,
    numbered,
    required_and_optional,
)

__all__ = [
    "ACTION_REGIONS",
    "MAX_STRENGTH",
    "NULL_ACTION",
    "ActionRegion",
    "Box",
    "Entity",
    "Interaction",
    "Scene",
    "SceneError",
    "numbered",
]

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
# The one field that is no key of a scene file, where its items stand under the keys of their methods.
EXTRA_ITEMS = "extra_items"
CONTROLS = "controls"  # settings, which have flags of their own


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture, apart from the models.

    Attributes:
        prompt: caption of the whole picture; may be empty.
        interactions: who does what to what, and where; may be empty.
        entities: what else is where; may be empty.
        negative_prompt: what guidance steers away from.
        seed: of the starting noise, 0 to 2**63 - 1.
        steps: denoising steps, 1 to 1000.
        guidance_scale: classifier-free guidance, 0 to 100; up to 1 is off; None for the model's own.
        strength: how strongly interactions and entities act, 0 (not at all) to 2.
        schedule: the share of the steps, from the first, during which they act, 0 to 1; or the shares
            [on, linear decay, off], which add up to 1.
        fast: whether the adapter saves time at a small cost in control.
        width: pixels, a multiple of 8 up to 4096, or None for the model's own size.
        height: likewise.
        extra_items: items of other methods (`interactdiff.method_specs.ItemSpec`); in a scene file they stand
            under the keys of their methods.
        controls: settings of methods and of a sampler, by their names, such as
            `{"subject": {"guidance": 2.0}}`; None is {}. Which there are, `interactdiff.registry` checks.

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
    extra_items: tuple[Any, ...] = ()
    controls: Mapping[str, Mapping[str, float]] | None = field(default=None, hash=False)

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
            "extra_items": _checked_extra_items(self.extra_items),
            "controls": _checked_controls(self.controls),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def items(self) -> tuple[Any, ...]:
        """All items: interactions, then entities, then those of other methods."""
        return (*self.interactions, *self.entities, *self.extra_items)

    def cropped(self, crop: Box, min_visible: float = MIN_VISIBLE) -> "Scene":
        """The scene of a part of the picture that is drawn as a picture of its own: a tile, a masked area.

        Boxes become shares of the crop. An interaction of which only the subject or the object is left
        becomes an entity; what is outside is left out. A subject whose place an interaction's box is has that
        box as its own from then on. Width and height stay what they are.

        Args:
            crop: the part, xyxy in [0, 1] of the whole picture.
            min_visible: the share of a box's area that has to be within the crop, or the box is left out.

        Raises:
            SceneError: the crop is no box, `min_visible` is not in [0, 1], or items of another method cannot
                be cropped.
        """
        for item in self.extra_items:
            if not hasattr(item, "cropped"):
                raise SceneError(f"expected items that can be cropped, got {type(item).__name__}")
        items = [item.placed(self.items) if hasattr(item, "placed") else item for item in self.items]
        left = [item.cropped(crop, min_visible) for item in items]
        return replace(
            self,
            interactions=tuple(one for one in left if isinstance(one, Interaction)),
            entities=tuple(one for one in left if isinstance(one, Entity)),
            extra_items=tuple(one for one in left if not isinstance(one, Interaction | Entity | None)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain JSON values; `Scene.from_dict` reads it back to an equal scene."""
        values = asdict(self)
        del values[EXTRA_ITEMS]
        if not self.controls:
            del values["controls"]
        for item in self.extra_items:
            from interactdiff.registry import method_of

            to_dict = getattr(item, "to_dict", None)
            values.setdefault(method_of(type(item))[1].key, []).append(to_dict() if to_dict else asdict(item))
        return json.loads(json.dumps(values))  # tuples become lists

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
        from interactdiff.registry import item_specs

        required, optional = required_and_optional(cls)
        own = [name for name in optional if name != EXTRA_ITEMS]
        specs = item_specs()
        given = json_object(values, required, (*own, *specs, "$schema"))
        given.pop("$schema", None)
        extra: list[Any] = []
        for key, spec in specs.items():
            listed = given.pop(key, [])
            if not isinstance(listed, list):
                raise SceneError(f"{key}: expected a list, got {shown(listed)}")
            if spec.most is not None and len(listed) > spec.most:
                raise SceneError(f"{key}: expected at most {spec.most}, got {len(listed)}")
            items = [
                numbered(spec.type, number, lambda one=one, spec=spec: spec.type.from_dict(one))
                for number, one in enumerate(listed, start=1)
            ]
            if key in own:
                given[key] = tuple(items)
            else:
                extra += items
        return cls(**given, extra_items=tuple(extra))

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
        """Read a scene from a JSON file in UTF-8; it may name pictures relative to its folder.

        Raises:
            SceneError: if the file cannot be read, is no JSON (with line and column) or holds no scene.
        """
        from interactdiff.scene_pictures import picture_files

        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SceneError(f"expected a scene file, got {shown(str(path))}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise SceneError(
                f"{path}: expected JSON text in UTF-8, got other bytes at byte {error.start}"
            ) from None
        with picture_files(base=Path(path).parent):
            return cls.from_json(text, source=str(path))


def _all_of(kind: type, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"{name}: expected a list of {kind.__name__}, got {shown(value)}")
    for one in value:
        if not isinstance(one, kind):
            raise SceneError(f"{name}: expected a list of {kind.__name__}, got {shown(one)} in it")
    return tuple(value)


def _checked_extra_items(value: Any) -> tuple[Any, ...]:
    """Items that are neither of the two kinds that have fields of their own."""
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"extra_items: expected a list of items, got {shown(value)}")
    for one in value:
        own = isinstance(one, (Interaction, Entity))
        if own or isinstance(one, type) or not is_dataclass(one):
            where = "interactions= or entities=" if own else "items of a method"
            raise SceneError(f"extra_items: expected {where}, got {shown(one)}")
    return tuple(value)


def _checked_controls(value: Any) -> dict[str, dict[str, float]] | None:
    """Numbers by the names of settings, by the names of methods."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(one, Mapping) for one in value.values()):
        raise SceneError(f"controls: expected settings by the names of methods, got {shown(value)}")
    checked: dict[str, dict[str, float]] = {}
    for method, settings in value.items():
        for name, number in settings.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise SceneError(f"controls: expected a number as {method}'s {name}, got {shown(number)}")
        checked[method] = dict(settings)
    return checked or None
