"""Whether what is drawn follows the boxes: a detector looks at validation scenes while a run goes on.

The loss does not show when control arrives: it may come all at once, with no change in the curve.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from PIL import Image

from interactdiff.data.records import Inline
from interactdiff.evaluation.box_scores import LEAST_SCORE, box_ious, wanted_boxes
from interactdiff.evaluation.detection import Instance, Picture, PixelBox
from interactdiff.evaluation.hoi import iou
from interactdiff.evaluation.hoi_protocols import LEAST_IOU
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.model_loading import load_box_detector, load_verb_scorer
from interactdiff.evaluation.two_stage import BoxDetector, Candidate, VerbScorer
from interactdiff.evaluation.world import packaged_detector
from interactdiff.evaluation.world_detector import StickworldDetector
from interactdiff.scene import Box, Entity, Interaction
from interactdiff.stickworld.world import OBJECTS

Item = Interaction | Entity
STICKWORLD = "stickworld"
T = TypeVar("T")


@dataclass
class Counts:
    """What pictures show of what was asked for.

    Attributes:
        boxes: asked for.
        found: of them, with an IoU above 0.5.
        overlap: sum of their IoUs; 0 where nothing is found.
        actions: asked for, where the detector knows any.
        right: of them.
    """

    boxes: int = 0
    found: int = 0
    overlap: float = 0.0
    actions: int = 0
    right: int = 0

    def shares(self, ending: str = "") -> dict[str, float]:
        """As the log has them."""
        made: dict[str, float] = {}
        if self.boxes:
            made |= {"control/found": self.found / self.boxes, "control/iou": self.overlap / self.boxes}
        if self.actions:
            made["control/actions"] = self.right / self.actions
        return {name + ending: value for name, value in made.items()}

    def add_boxes(self, items: Sequence[Item], found: Sequence[Instance], size: tuple[int, int]) -> None:
        """Count the boxes of a picture's items, each with at most one instance of its name."""
        layout = Layout("", "", _of(items, Interaction), _of(items, Entity))
        overlaps = box_ious(wanted_boxes(layout, size), found)
        self.boxes += len(overlaps)
        self.overlap += sum(overlaps)
        self.found += sum(value > LEAST_IOU for value in overlaps)


def _of(items: Sequence[Item], kind: type[T]) -> tuple[T, ...]:
    return tuple(one for one in items if isinstance(one, kind))


def _pixels(box: Box, size: tuple[int, int]) -> PixelBox:
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]


class Probe(Protocol):
    """Looks at pictures."""

    def look(self, picture: Image.Image, items: Sequence[Item], counts: Counts) -> None:
        """Add what a picture shows of its items."""
        ...


@dataclass
class WorldProbe:
    """By the detector of the embedded world, which knows kinds alone: "ball" of "red ball"."""

    detector: StickworldDetector

    def look(self, picture: Image.Image, items: Sequence[Item], counts: Counts) -> None:
        """See `Probe`."""
        file, size = io.BytesIO(), picture.size
        picture.save(file, format="PNG")
        seen = self.detector.detect([Picture("", Inline(file.getvalue()))])[0]
        items = [_in_kinds(item) for item in items]
        counts.add_boxes(items, [*seen.persons, *seen.objects], size)
        for item in _of(items, Interaction):
            if item.action is None:
                continue
            counts.actions += 1
            counts.right += any(
                pair.verb == item.action
                and pair.object is not None
                and seen.objects[pair.object].name == item.object
                and iou(seen.persons[pair.person].box, _pixels(item.subject_box, size)) > LEAST_IOU
                and iou(seen.objects[pair.object].box, _pixels(item.object_box, size)) > LEAST_IOU
                for pair in seen.pairs
            )


def _in_kinds(item: Item) -> Item:
    if isinstance(item, Entity):
        return replace(item, phrase=_kind(item.phrase))
    return replace(item, subject=_kind(item.subject), object=_kind(item.object))


def _kind(phrase: str) -> str:
    """The kind that a phrase of the embedded world names, or the phrase."""
    known = ("person", *OBJECTS)
    named = [kind for kind in known if re.search(rf"\b{re.escape(kind)}\b", phrase)]
    return max(named, key=len, default=phrase)


@dataclass
class BoxProbe:
    """By a detector of boxes of transformers; and a scorer of verbs, which chooses among the scenes' actions.

    Attributes:
        boxes: the detector.
        verbs: the scorer, or None.
        actions: of which one is chosen.
    """

    boxes: BoxDetector
    verbs: VerbScorer | None = None
    actions: Sequence[str] = field(default_factory=tuple)

    def look(self, picture: Image.Image, items: Sequence[Item], counts: Counts) -> None:
        """See `Probe`."""
        size = picture.size
        names = [name for item in items for name in _phrases(item)]
        found = self.boxes.boxes([picture], tuple(dict.fromkeys(names)))[0] if names else []
        counts.add_boxes(items, found, size)
        asked = [item for item in _of(items, Interaction) if item.action is not None]
        if self.verbs is None:
            return
        counts.actions += len(asked)
        for item in asked:
            person, thing = (
                _best(found, name, _pixels(box, size))
                for name, box in ((item.subject, item.subject_box), (item.object, item.object_box))
            )
            if person is None or thing is None:
                continue
            candidate = Candidate(person.box, thing.box, item.object)
            verbs = self.verbs.verbs(picture, [candidate], {item.object: self.actions})[0]
            counts.right += max(verbs, key=lambda verb: verbs[verb]) == item.action


def _phrases(item: Item) -> tuple[str, ...]:
    return (item.phrase,) if isinstance(item, Entity) else (item.subject, item.object)


def _best(found: Sequence[Instance], name: str, box: PixelBox) -> Instance | None:
    """The instance of a name that lies best in a box, if one does."""
    there = [one for one in found if one.name == name and one.score >= LEAST_SCORE]
    best = max(there, key=lambda one: iou(one.box, box), default=None)
    return best if best is not None and iou(best.box, box) > LEAST_IOU else None


def load_probe(name: str, actions: Sequence[str], device: torch.device) -> Probe:
    """A probe by its name.

    Args:
        name: "stickworld"; a folder or Hub id of a detector of boxes; or that and a scorer of verbs,
            "BOXES,VERBS".
        actions: those of the scenes.
        device: where it looks.

    Raises:
        ModelError: a model cannot be loaded.
    """
    if name == STICKWORLD:
        return WorldProbe(StickworldDetector(packaged_detector().to(device)))
    boxes, _, verbs = name.partition(",")
    scorer = load_verb_scorer(verbs.strip(), device) if verbs else None
    return BoxProbe(load_box_detector(boxes.strip(), device), scorer, tuple(dict.fromkeys(actions)))


def verdict(scores: dict[str, float]) -> str:
    """A sentence on the last probe."""
    found, without = scores["control/found"], scores.get("control/found_without", 0.0)
    said = f"boxes are followed in {found:.0%} ({without:.0%} without the adapter)"
    return said if found >= 0.5 and found > without else f"{said}: not converged"
