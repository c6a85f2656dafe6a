"""V-COCO: pairs of its action roles as interactions; actions without an object go into the caption."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        together = _there(root, "instances_vcoco_all_2014.json")
        own = "instances_val2014.json" if split == "test" else "instances_train2014.json"
        instances = Instances(first_file(root, "instances_vcoco_all_2014.json" if together else own))
        said = _roles(first_file(root, f"vcoco_{split}.json"))
        for number in sorted(said):
            if number not in instances.pictures:
                raise DataError(
                    f"expected the picture {number} of vcoco_{split}.json in the instances, got none"
                )
            if converted := _converted(number, said[number], instances, split, pictures, notes):
                yield converted


def _there(root: Path, name: str) -> bool:
    return any((root / below / name).is_file() for below in ("", "annotations"))


def _roles(path: Path) -> dict[int, list[tuple[str, int, dict[str, int]]]]:
    """By picture: action, the person's annotation id, and those of its roles (0: nothing there)."""
    said: dict[int, list[tuple[str, int, dict[str, int]]]] = {}
    for action in read_json(path):
        name, roles = action["action_name"], action["role_name"]
        if name not in _WORDS:
            raise DataError(f"expected an action of V-COCO in {path}, got {name!r}")
        ids = np.array(action["role_object_id"], np.int64).reshape(len(roles), -1).T  # stored role by role
        rows = zip(action["image_id"], action["ann_id"], action["label"], ids.tolist(), strict=True)
        for picture, person, label, of_roles in rows:
            here = said.setdefault(picture, [])
            if label:
                here.append((name, person, dict(zip(roles[1:], of_roles[1:], strict=True))))
    return said


def _converted(
    number: int,
    said: list[tuple[str, int, dict[str, int]]],
    instances: Instances,
    split: str,
    pictures: Pictures,
    notes: Counter[str],
) -> Converted | None:
    name, width, height = instances.pictures[number]
    if (picture := pictures.find(name)) is None:
        return None
    boxes = PixelBoxes(picture, (width, height), "stored")
    things: dict[int, tuple[str, Box | None]] = {}
    for one in instances.of_picture(number):
        phrase = instances.names[int(instances.categories[one])]
        things[int(instances.ids[one])] = phrase, instances.shares(one, boxes)
    made: dict[Interaction, None] = {}
    alone: dict[str, None] = {}
    for action, person, roles in said:
        gerund, words = _WORDS[action]
        there = {role: thing for role, thing in roles.items() if thing}
        if not there:
            alone[f"a person is {gerund}"] = None
        for role, thing in there.items():
            ends = things.get(person), things.get(thing)
            if ends[0] is None or ends[1] is None or ends[0][1] is None or ends[1][1] is None:
                notes["pairs without boxes"] += 1
                continue
            box, other = ends[0][1], ends[1][1]
            made[Interaction("person", words.get(role, gerund), ends[1][0], box, other)] = None  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    for o in made:
        rows.append(interaction(o.subject, o.action, o.object, o.subject_box, o.object_box))
    prompt = ", ".join(filter(None, [triplet_caption(list(made)), *alone]))
    return Converted(
        Path(name).name, picture, {"prompt": prompt, "interactions": rows, "source": "V-COCO"}, split
    )
