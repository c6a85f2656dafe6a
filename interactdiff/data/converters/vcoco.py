"""V-COCO: pairs of its action roles as interactions; actions without an object go into the caption."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interactdiff.data.converters.base import (
    Converted,
    Options,
    Pictures,
    PixelBoxes,
    first_file,
    interaction,
    read_json,
)
from interactdiff.data.converters.coco import Instances
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box
from interactdiff.scene_items import Interaction

SPLITS = ("train", "val", "test")
# Of each action: its gerund, and the words of its roles where they differ from it.
_WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "hold": ("holding", {}),
    "stand": ("standing", {}),
    "sit": ("sitting", {"instr": "sitting on"}),
    "ride": ("riding", {}),
    "walk": ("walking", {}),
    "look": ("looking", {"obj": "looking at"}),
    "hit": ("hitting", {"instr": "hitting with"}),
    "eat": ("eating", {"instr": "eating with"}),
    "jump": ("jumping", {"instr": "jumping with"}),
    "lay": ("lying", {"instr": "lying on"}),
    "talk_on_phone": ("talking on the phone", {"instr": "talking on"}),
    "carry": ("carrying", {}),
    "throw": ("throwing", {}),
    "catch": ("catching", {}),
    "cut": ("cutting", {"instr": "cutting with"}),
    "run": ("running", {}),
    "work_on_computer": ("working on a computer", {"instr": "working on"}),
    "ski": ("skiing", {"instr": "skiing on"}),
    "surf": ("surfing", {"instr": "surfing on"}),
    "skateboard": ("skateboarding", {"instr": "skateboarding on"}),
    "smile": ("smiling", {}),
    "drink": ("drinking", {"instr": "drinking with"}),
    "kick": ("kicking", {}),
    "point": ("pointing", {"instr": "pointing at"}),
    "read": ("reading", {}),
    "snowboard": ("snowboarding", {"instr": "snowboarding on"}),
}


class Said(NamedTuple):
    """What is said of one person: whether an action is done, and annotation ids of its roles (0: nothing)."""

    action: str
    person: int
    done: bool
    roles: dict[str, int]


def role_phrase(action: str, role: str) -> str:
    """What a person does in the words of interactions, such as "cutting with" for cut's "instr"."""
    gerund, words = _WORDS[action]
    return words.get(role, gerund)


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert V-COCO.

    Args:
        source: the folder with `vcoco_{split}.json` and COCO's `instances_{train,val}2014.json` (or V-COCO's
            `instances_vcoco_all_2014.json`), in it or in `annotations`.
        options: `images`, `split` ("train", "val" or "test"; all that are there if not given),
            `skip_missing`.
        notes: counts what is left out.
    """
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"expected the folder of V-COCO, got {source}")
    found = [s for s in SPLITS if options.split in (None, s) and _there(root, f"vcoco_{s}.json")]
    if not found:
        raise DataError(f"expected vcoco_train.json, vcoco_val.json or vcoco_test.json in {source}, got none")
    usual = ("train2014", "val2014", "images/train2014", "images/val2014", "coco/images/train2014")
    pictures = Pictures(root, options, notes, (*usual, "coco/images/val2014"))
    for split in found:
        said_file, instances_file = annotation_files(root, split)
        instances, said = Instances(instances_file), said_of_persons(said_file)
        for number in sorted(said):
            if converted := _converted(number, said[number], instances, split, pictures, notes):
                yield converted


def _there(root: Path, name: str) -> bool:
    return any((root / below / name).is_file() for below in ("", "annotations"))


def annotation_files(root: Path, split: str) -> tuple[Path, Path]:
    """`vcoco_{split}.json` and COCO's instances of the same pictures.

    Raises:
        DataError: one is not there.
    """
    together = "instances_vcoco_all_2014.json"
    own = "instances_val2014.json" if split == "test" else "instances_train2014.json"
    return first_file(root, f"vcoco_{split}.json"), first_file(
        root, together if _there(root, together) else own
    )


def said_of_persons(path: Path) -> dict[int, list[Said]]:
    """What `vcoco_{split}.json` says, by picture.

    Raises:
        DataError: it is damaged.
    """
    said: dict[int, list[Said]] = {}
    for action in read_json(path):
        name, roles = action["action_name"], action["role_name"]
        if name not in _WORDS:
            raise DataError(f"expected an action of V-COCO in {path}, got {name!r}")
        count, got = len(action["image_id"]), len(action["role_object_id"])
        if got != count * len(roles):
            raise DataError(f"{path}, {name}: expected {count * len(roles)} of role_object_id, got {got}")
        ids = np.array(action["role_object_id"], np.int64).reshape(len(roles), -1).T  # stored role by role
        rows = zip(action["image_id"], action["ann_id"], action["label"], ids.tolist(), strict=True)
        for picture, person, label, of_roles in rows:
            played = dict(zip(roles[1:], of_roles[1:], strict=True))
            said.setdefault(picture, []).append(Said(name, person, bool(label), played))
    return said


def _converted(
    number: int,
    said: list[Said],
    instances: Instances,
    split: str,
    pictures: Pictures,
    notes: Counter[str],
) -> Converted | None:
    name, width, height = instances.picture(number)
    if (picture := pictures.find(name)) is None:
        return None
    boxes = PixelBoxes(picture, (width, height), "stored")
    things: dict[int, tuple[str, Box | None]] = {}
    for one in instances.of_picture(number):
        phrase = instances.names[int(instances.categories[one])]
        things[int(instances.ids[one])] = phrase, instances.shares(one, boxes)
    made: dict[Interaction, None] = {}
    alone: dict[str, None] = {}
    for action, person, _, roles in (one for one in said if one.done):
        there = {role: thing for role, thing in roles.items() if thing}
        if not there:
            alone[f"a person is {_WORDS[action][0]}"] = None
        for role, thing in there.items():
            ends = things.get(person), things.get(thing)
            if ends[0] is None or ends[1] is None or ends[0][1] is None or ends[1][1] is None:
                notes["pairs without boxes"] += 1
                continue
            box, other = ends[0][1], ends[1][1]
            made[Interaction("person", role_phrase(action, role), ends[1][0], box, other)] = None  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    for o in made:
        rows.append(interaction(o.subject, o.action, o.object, o.subject_box, o.object_box))
    prompt = ", ".join(filter(None, [triplet_caption(list(made)), *alone]))
    return Converted(
        Path(name).name, picture, {"prompt": prompt, "interactions": rows, "source": "V-COCO"}, split
    )
