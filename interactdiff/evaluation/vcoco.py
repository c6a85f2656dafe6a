"""V-COCO's role AP, scenarios 1 and 2 (Gupta and Malik, "Visual Semantic Role Labeling", 2015)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from interactdiff.data.classes import SUBJECT
from interactdiff.data.converters.base import PixelBoxes
from interactdiff.data.converters.coco import Instances
from interactdiff.data.converters.vcoco import annotation_files, role_phrase, said_of_persons
from interactdiff.errors import DataError
from interactdiff.evaluation.detection import PictureDetections, PixelBox, in_pixels
from interactdiff.evaluation.hoi_matching import Outcomes, iou
from interactdiff.evaluation.hoi_precision import average_precisions, mean_of_classes
from interactdiff.evaluation.hoi_protocols import LEAST_IOU, Protocol
from interactdiff.evaluation.layout import Layout

Role = tuple[str, str]  # an action and a role of it, such as ("cut", "instr")
LEFT_OUT: tuple[Role, ...] = (("point", "instr"),)  # of the 25 roles; papers average the other 24
SCENARIOS = {
    number: Protocol(f"scenario_{number}", "V-COCO", "inclusive", False, "best", None, "left out")
    for number in (1, 2)
}


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


class RoleEvaluator:
    """Takes pictures one by one, and holds what became of their detections.

    A detection belongs to the person whose box overlaps its own most. It is right if that person does the
    action, both boxes overlap with an IoU of 0.5 or more, and no surer one was right for that person. Where
    the truth has no object, scenario 1 wants none detected, and scenario 2 takes any.

    Args:
        roles: that are scored.
    """

    def __init__(self, roles: Sequence[Role]):
        self.roles = tuple(roles)
        self.pictures = 0
        self._found: list[tuple[int, int, float, int]] = []  # picture, role, score, right by bit of scenario
        self._truth: list[tuple[int, int]] = []  # picture, role

    def add(self, persons: Sequence[RolePerson], found: Iterable[DetectedRole]) -> None:
        """Match one more picture: its persons and its detections in any order."""
        by_role: dict[Role, list[DetectedRole]] = {role: [] for role in self.roles}
        for one in sorted(found, key=lambda one: -one.score):
            if one.role in by_role:
                by_role[one.role].append(one)
        boxes = np.array([person.box for person in persons], dtype=float).reshape(-1, 4)
        for number, (role, detections) in enumerate(by_role.items()):
            done = [person.actions.get(role[0], False) for person in persons]
            self._truth += [(self.pictures, number)] * sum(done)
            covered: list[set[int]] = [set() for _ in SCENARIOS]
            for one in detections:
                overlaps = iou(boxes, np.array(one.person, dtype=float), "inclusive")
                best = int(overlaps.argmax()) if len(persons) else None
                if best is not None and not persons[best].actions:
                    continue
                right = 0
                for bit, scenario in enumerate(SCENARIOS):
                    if (
                        best is not None
                        and done[best]
                        and overlaps[best] >= LEAST_IOU
                        and best not in covered[bit]
                        and _role_is_right(persons[best].roles.get(role), one.object, scenario)
                    ):
                        covered[bit].add(best)
                        right |= 1 << bit
                self._found.append((self.pictures, number, one.score, right))
        self.pictures += 1

    def outcomes(self) -> Outcomes:
        """What became of all detections so far: a class for each role, a protocol for each scenario."""
        found = np.array(self._found, dtype=float).reshape(-1, 4).T
        truth = np.array(self._truth, dtype=int).reshape(-1, 2).T
        made = {
            "picture": found[0],
            "cls": found[1],
            "score": found[2],
            "correct": found[3],
            "counted": np.full(len(self._found), (1 << len(SCENARIOS)) - 1),
            "known": np.ones(len(self._found)),
            "truth_picture": truth[0],
            "truth_cls": truth[1],
            "truth_known": np.ones(len(self._truth)),
        }
        names = tuple(protocol.name for protocol in SCENARIOS.values())
        arrays = {name: made[name].astype(dtype) for name, dtype in Outcomes.ARRAYS.items()}
        return Outcomes(names, self.pictures, len(self.roles), **arrays)


def _role_is_right(wanted: PixelBox | None, got: PixelBox | None, scenario: int) -> bool:
    if wanted is None:
        return scenario == 2 or got is None
    return got is not None and _overlap(wanted, got) >= LEAST_IOU


def _overlap(a: PixelBox, b: PixelBox) -> float:
    return float(iou(np.array(a, dtype=float), np.array(b, dtype=float), "inclusive"))


@dataclass(frozen=True)
class RolePrecisions:
    """Role AP of both scenarios: the mean over roles of the area below the curve of all points.

    Roles whose action nobody does are left out.

    Attributes:
        outcomes: one for each seed, of the same pictures.
    """

    outcomes: tuple[Outcomes, ...]

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[R] values for [R, S] counts of how often each picture is taken: the mean over seeds."""
        return {name: by_seed.mean(0) for name, by_seed in self.by_seed(counts).items()}

    def by_seed(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[seeds, R] values of each seed, named vcoco.scenario_1 and vcoco.scenario_2."""
        return {
            f"vcoco.{scenario.name}": np.stack(
                [mean_of_classes(average_precisions(one, scenario, counts)) for one in self.outcomes]
            )
            for scenario in SCENARIOS.values()
        }


@dataclass(frozen=True)
class RoleTruth:
    """The persons of V-COCO's pictures.

    Attributes:
        roles: that are scored.
        persons: by the picture's name without its ending; boxes as shares of the picture.
    """

    roles: tuple[Role, ...]
    persons: Mapping[str, tuple[RolePerson, ...]]

    @classmethod
    def read(cls, folder: Path, split: str) -> "RoleTruth":
        """Read `vcoco_SPLIT.json` and COCO's instances; crowds and persons who are not labelled are kept.

        Raises:
            DataError: they are not there or damaged, or a person or object is in none of the instances.
        """
        said_file, instances_file = annotation_files(folder, split)
        instances, said = Instances(instances_file, crowds=True), said_of_persons(said_file)
        roles: dict[Role, None] = {}
        persons = {}
        for picture, rows in said.items():
            name, width, height = instances.picture(picture)
            of_picture = _persons(rows, instances, picture, PixelBoxes(None, (width, height), "stored"))
            persons[Path(name).stem] = tuple(of_picture)
            roles |= dict.fromkeys((one.action, role) for one in rows for role in one.roles)
        scored = tuple(role for role in roles if role not in LEFT_OUT)
        return cls(scored, persons)

    def check(self, layouts: Iterable[Layout]) -> None:
        """Refuse layouts of other pictures.

        Raises:
            DataError: one is not of V-COCO.
        """
        for layout in layouts:
            if _key(layout) not in self.persons:
                raise DataError(f"expected pictures of V-COCO's split, got {layout.file_name}")

    def of(self, layout: Layout, size: tuple[int, int]) -> list[RolePerson]:
        """The persons of a layout's picture, in pixels of a picture of this size."""

        def pixels(box: PixelBox) -> PixelBox:
            x0, y0, x1, y1 = in_pixels(box, size)
            return x0, y0, x1 - 1, y1 - 1

        return [
            RolePerson(
                pixels(one.box),
                one.actions,
                {role: None if box is None else pixels(box) for role, box in one.roles.items()},
            )
            for one in self.persons[_key(layout)]
        ]

    def detected(self, found: PictureDetections) -> list[DetectedRole]:
        """Pairs as roles, by their verbs in the words of `data convert vcoco`; those of other words go."""
        roles = {role_phrase(*role): role for role in self.roles}
        return [
            DetectedRole(roles[pair.verb], found.persons[pair.person].box, thing and thing.box, pair.score)
            for pair in found.pairs
            if pair.verb in roles
            for thing in (found.object_of(pair),)
        ]


def _key(layout: Layout) -> str:
    return layout.stem.rpartition("/")[2]


def _persons(rows: Sequence, instances: Instances, picture: int, pixels: PixelBoxes) -> list[RolePerson]:
    boxes: dict[int, PixelBox] = {}
    people = []
    for number in instances.of_picture(picture):
        if (box := instances.shares(number, pixels)) is not None:
            boxes[int(instances.ids[number])] = box
            if instances.names[int(instances.categories[number])] == SUBJECT:
                people.append(int(instances.ids[number]))
    actions: dict[int, dict[str, bool]] = {one: {} for one in people}
    roles: dict[int, dict[Role, PixelBox | None]] = {one: {} for one in people}
    for one in rows:
        missing = [number for number in (one.person, *one.roles.values()) if number and number not in boxes]
        if missing or one.person not in actions:
            what = (
                f"an annotation of COCO, got id {missing[0]}" if missing else f"a person, got id {one.person}"
            )
            raise DataError(f"picture {picture} of V-COCO, {one.action}: expected {what}")
        actions[one.person][one.action] = one.done
        if one.done:
            roles[one.person] |= {
                (one.action, role): boxes[number] if number else None for role, number in one.roles.items()
            }
    return [RolePerson(boxes[one], actions[one], roles[one]) for one in people]
