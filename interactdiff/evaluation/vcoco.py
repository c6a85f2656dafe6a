"""V-COCO's role AP, scenarios 1 and 2 (Gupta and Malik, "Visual Semantic Role Labeling", 2015)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from interactdiff.errors import DataError
from interactdiff.evaluation.detection import PixelBox
from interactdiff.evaluation.hoi_matching import iou
from interactdiff.evaluation.hoi_protocols import LEAST_IOU

Scenario = Literal[1, 2]
Role = tuple[str, str]  # an action and a role of it, such as ("cut", "instr")
LEFT_OUT: tuple[Role, ...] = (("point", "instr"),)  # of the 25 roles; papers average the other 24


@dataclass(frozen=True)
class RolePerson:
    """A person of the truth.

    Attributes:
        box: xyxy in pixels, of inclusive ends.
        actions: whether each action is done; a person without any entry is not labelled, and what is detected
            there counts neither way.
        roles: the object's box of each role; None or no entry where there is none.
    """

    box: PixelBox
    actions: Mapping[str, bool] = field(default_factory=dict)
    roles: Mapping[Role, PixelBox | None] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectedRole:
    """A person who is detected to do something with an object; `object` None is without one."""

    role: Role
    person: PixelBox
    object: PixelBox | None
    score: float


def role_precisions(
    truth: Sequence[Sequence[RolePerson]],
    found: Sequence[Sequence[DetectedRole]],
    roles: Sequence[Role],
    scenario: Scenario,
) -> dict[Role, float]:
    """Average precision of each role, the area below the curve of all points.

    A detection belongs to the person whose box overlaps its own most. It is right if that person does the
    action, both boxes overlap with an IoU of 0.5 or more, and no surer one was right for that person. Where
    the truth has no object, scenario 1 wants none detected, and scenario 2 takes any.

    Args:
        truth: persons by picture.
        found: by picture, in any order.
        roles: that are scored.
        scenario: 1 or 2.

    Returns:
        NaN for a role whose action nobody does.
    """
    return {role: _role_precision(truth, found, role, scenario) for role in roles}


def _role_precision(
    truth: Sequence[Sequence[RolePerson]],
    found: Sequence[Sequence[DetectedRole]],
    role: Role,
    scenario: Scenario,
) -> float:
    scores: list[float] = []
    right: list[bool] = []
    positives = sum(person.actions.get(role[0], False) for persons in truth for person in persons)
    for persons, detections in zip(truth, found, strict=True):
        covered: set[int] = set()
        for one in sorted((d for d in detections if d.role == role), key=lambda d: -d.score):
            if not persons:
                scores.append(one.score)
                right.append(False)
                continue
            overlaps = [_overlap(person.box, one.person) for person in persons]
            best = int(np.argmax(overlaps))
            if not persons[best].actions:
                continue
            hit = (
                persons[best].actions.get(role[0], False)
                and overlaps[best] >= LEAST_IOU
                and _role_is_right(persons[best].roles.get(role), one.object, scenario)
                and best not in covered
            )
            if hit:
                covered.add(best)
            scores.append(one.score)
            right.append(hit)
    if not positives:
        return float("nan")
    order = np.argsort(-np.array(scores), kind="stable") if scores else np.zeros(0, dtype=int)
    hits = np.cumsum(np.array(right, dtype=float)[order])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0.0) * envelope).sum() / positives)


def _role_is_right(wanted: PixelBox | None, got: PixelBox | None, scenario: Scenario) -> bool:
    if wanted is None:
        return scenario == 2 or got is None
    return got is not None and _overlap(wanted, got) >= LEAST_IOU


def _overlap(a: PixelBox, b: PixelBox) -> float:
    return float(iou(np.array(a, dtype=float), np.array(b, dtype=float), "inclusive"))


def mean_role_precision(precisions: Mapping[Role, float], left_out: Sequence[Role] = LEFT_OUT) -> float:
    """The mean over roles, but for those that are left out and those that nobody plays."""
    values = [one for role, one in precisions.items() if role not in left_out and not np.isnan(one)]
    return float(np.mean(values)) if values else 0.0


def vcoco_truth(
    actions: Sequence[Mapping[str, Any]], boxes: Mapping[int, PixelBox]
) -> tuple[dict[int, list[RolePerson]], list[Role]]:
    """The persons of `vcoco_SPLIT.json`.

    Args:
        actions: its content: for each action its name, roles, and flat lists over persons.
        boxes: xyxy of COCO's annotations, by their ids.

    Returns:
        Persons by the picture's id, and the roles beside that of the agent.

    Raises:
        DataError: a list is of another length, or an id is unknown.
    """
    persons: dict[tuple[int, int], tuple[dict[str, bool], dict[Role, PixelBox | None]]] = {}
    roles: list[Role] = []
    for action in actions:
        name, names = action["action_name"], list(action["role_name"])
        count = len(action["image_id"])
        if len(action["role_object_id"]) != count * len(names):
            got = len(action["role_object_id"])
            raise DataError(f"{name}: expected {count * len(names)} of role_object_id, got {got}")
        objects = np.array(action["role_object_id"]).reshape(len(names), count)  # role by role
        roles += [(name, role) for role in names if role != "agent"]
        for place, (image, person, label) in enumerate(
            zip(action["image_id"], action["ann_id"], action["label"], strict=True)
        ):
            done, played = persons.setdefault((int(image), int(person)), ({}, {}))
            done[name] = bool(label)
            for number, role in enumerate(names):
                if role != "agent":
                    played[name, role] = _box_of(boxes, int(objects[number, place]))
    found: dict[int, list[RolePerson]] = {}
    for (image, person), (done, played) in persons.items():
        box = _box_of(boxes, person)
        if box is None:
            raise DataError(f"picture {image}: expected an annotation of a person, got id {person}")
        found.setdefault(image, []).append(RolePerson(box, done, played))
    return found, roles


def _box_of(boxes: Mapping[int, PixelBox], number: int) -> PixelBox | None:
    """The box of an annotation; 0 is no object."""
    if number == 0:
        return None
    if number not in boxes:
        raise DataError(f"expected an annotation of COCO, got id {number}")
    return boxes[number]
