"""How well pictures show the interactions of a scene, after HICO-DET (Chao et al., 2018).

Every score is kept as counts by scene, so that one resampling of scenes gives the intervals of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interactdiff.evaluation.bootstrap import Score, Share
from interactdiff.evaluation.hoi_matching import HoiEvaluator, Outcomes, Pairs
from interactdiff.evaluation.hoi_precision import average_precisions, mean_of_classes
from interactdiff.evaluation.hoi_protocols import LEAST_IOU, PROTOCOLS
from interactdiff.scene import Box
from interactdiff.stickworld.detector import Detections, Found, FoundTriplet
from interactdiff.stickworld.world import Triplet, WorldEntity, WorldScene

WORLD = PROTOCOLS["world"]


@dataclass(frozen=True)
class HoiMap:
    """Mean average precision over the classes (action, object) of the truth, by the protocol `world`."""

    outcomes: Outcomes

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the mean over the classes that occur in the scenes taken; 0 where none does."""
        return mean_of_classes(average_precisions(self.outcomes, WORLD, counts))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def hoi_map(found: Sequence[Sequence[FoundTriplet]], truth: Sequence[Sequence[Triplet]]) -> HoiMap:
    """Match detections with the ground truth, class by class.

    A detection is correct if both its boxes overlap those of a triplet of its class in its picture, one that
    no surer detection has taken, with an IoU above 0.5.

    Args:
        found: by picture.
        truth: by picture.
    """
    names = sorted({(t.action, t.object) for triplets in truth for t in triplets})
    numbers = {name: number for number, name in enumerate(names)}
    evaluator = HoiEvaluator((WORLD,), len(names))
    for wanted, detected in zip(truth, found, strict=True):
        ours = [t for t in detected if (t.action, t.object.name) in numbers]
        evaluator.add(
            Pairs.of(
                [numbers[t.action, t.object] for t in wanted],
                [t.subject_box for t in wanted],
                [t.object_box for t in wanted],
            ),
            Pairs.of(
                [numbers[t.action, t.object.name] for t in ours],
                [t.person.box for t in ours],
                [t.object.box for t in ours],
                [t.score for t in ours],
            ),
        )
    return HoiMap(evaluator.outcomes())


def at_box(things: Sequence[Found], name: str, box: Box) -> Found | None:
    """The thing of that name that overlaps a box best, if its IoU is above 0.5."""
    best = max((t for t in things if t.name == name), key=lambda t: iou(t.box, box), default=None)
    return best if best is not None and iou(best.box, box) > LEAST_IOU else None


def found_at(found: Detections, thing: WorldEntity) -> Found | None:
    """What is found of a thing's kind at its box, see `at_box`."""
    return at_box(found.persons if thing.name == "person" else found.objects, thing.name, thing.box)


def picture_scores(found: Sequence[Detections], scenes: Sequence[WorldScene]) -> dict[str, Score]:
    """Score pictures by their scenes; what is not found at its box is wrong in every respect.

    Args:
        found: by picture.
        scenes: that the pictures should show.

    Returns:
        hoi_map; box_acc and colour_acc, shares of persons and objects, lone ones included; action_acc, share
        of triplets.
    """
    hits = {name: np.zeros(len(scenes)) for name in ("box_acc", "action_acc", "colour_acc")}
    for n, (picture, scene) in enumerate(zip(found, scenes, strict=True)):
        at_boxes = [found_at(picture, thing) for thing in scene.things]
        hits["box_acc"][n] = sum(one is not None for one in at_boxes)
        hits["colour_acc"][n] = sum(
            one is not None and one.colour == thing.appearance.colour
            for one, thing in zip(at_boxes, scene.things, strict=True)
        )
        hits["action_acc"][n] = sum(
            person is not None and person.action == triplet.action
            for person, triplet in zip(at_boxes[::2], scene.triplets, strict=False)
        )
    triplets = np.array([len(scene.triplets) for scene in scenes])
    things = np.array([len(scene.things) for scene in scenes])
    shares = {name: Share(h, triplets if name == "action_acc" else things) for name, h in hits.items()}
    mean_precision = hoi_map([one.triplets for one in found], [scene.triplets for scene in scenes])
    return {"hoi_map": mean_precision, **shares}
