"""How well pictures show the interactions of a scene, after HICO-DET (Chao et al., 2018).

Every score is kept as counts by scene, so that one resampling of scenes gives the intervals of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from interactdiff.scene import Box
from interactdiff.stickworld.detector import Detections, Found, FoundTriplet
from interactdiff.stickworld.world import Triplet, WorldEntity, WorldScene

LEAST_IOU = 0.5  # a box is right above this


class Score(Protocol):
    """A score over scenes, of which any scene may count several times or not at all."""

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R] values for [R, S] counts of how often each scene is taken."""
        ...


@dataclass(frozen=True)
class Share:
    """Hits out of a total; both [S], by scene."""

    hits: np.ndarray
    total: np.ndarray

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the share of hits; 0 where the total is 0."""
        return (counts @ self.hits) / np.maximum(counts @ self.total, 1)


@dataclass(frozen=True)
class Matched:
    """The detections of one class in all pictures, surest first.

    Attributes:
        correct: [D] bool, whether it matches a triplet of the ground truth.
        scene: [D] the scene of each detection.
        positives: [S] how many triplets of this class each scene has.
    """

    correct: np.ndarray
    scene: np.ndarray
    positives: np.ndarray


@dataclass(frozen=True)
class HoiMap:
    """Mean average precision over the classes (action, object) of the ground truth."""

    classes: dict[tuple[str, str], Matched]

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the mean over the classes that occur in the scenes taken; 0 where none does."""
        precisions = np.zeros((len(self.classes), len(counts)))
        occurs = np.zeros_like(precisions, dtype=bool)
        for row, matched in enumerate(self.classes.values()):
            positives = counts @ matched.positives
            precisions[row] = average_precision(matched.correct, counts[:, matched.scene], positives)
            occurs[row] = positives > 0
        return (precisions * occurs).sum(0) / np.maximum(occurs.sum(0), 1)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def average_precision(correct: np.ndarray, weights: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the curve of precision over recall, made monotone, as Pascal VOC has it since 2010.

    Args:
        correct: [D] bool by detection, surest first.
        weights: [R, D] how often each detection counts.
        positives: [R] how many there are to be found.

    Returns:
        [R] in 0..1; 0 where there is nothing to be found.
    """
    if not len(correct):
        return np.zeros(len(weights))
    hits = np.cumsum(weights * correct, 1)
    precision = hits / np.maximum(np.cumsum(weights, 1), 1e-9)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    gained = np.diff(hits, axis=1, prepend=0.0)
    return (gained * envelope).sum(1) / np.maximum(positives, 1)


def hoi_map(found: Sequence[Sequence[FoundTriplet]], truth: Sequence[Sequence[Triplet]]) -> HoiMap:
    """Match detections with the ground truth, class by class.

    A detection is correct if both its boxes overlap those of a triplet of its class in its picture, one that
    no surer detection has taken, with an IoU above 0.5.

    Args:
        found: by picture.
        truth: by picture.
    """
    classes = {}
    for name in sorted({(t.action, t.object) for triplets in truth for t in triplets}):
        wanted = [[t for t in triplets if (t.action, t.object) == name] for triplets in truth]
        sure = sorted(
            (-t.score, scene, order, t)
            for scene, triplets in enumerate(found)
            for order, t in enumerate(triplets)
            if (t.action, t.object.name) == name
        )
        left = [list(triplets) for triplets in wanted]
        correct = []
        for _, scene, _, triplet in sure:
            best = max(left[scene], key=lambda t: _overlap(triplet, t), default=None)
            correct.append(False)
            if best is not None and _overlap(triplet, best) > LEAST_IOU:
                correct[-1] = True
                left[scene].remove(best)
        classes[name] = Matched(
            np.array(correct, dtype=bool),
            np.array([scene for _, scene, _, _ in sure], dtype=int),
            np.array([len(triplets) for triplets in wanted]),
        )
    return HoiMap(classes)


def _overlap(found: FoundTriplet, truth: Triplet) -> float:
    return min(iou(found.person.box, truth.subject_box), iou(found.object.box, truth.object_box))


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


def with_interval(
    score: Score, scenes: int, seed: int = 0, resamples: int = 1000
) -> tuple[float, tuple[float, float]]:
    """A score and its 95% interval, by bootstrap: scenes are drawn again with replacement.

    Args:
        score: what to value.
        scenes: S, how many scenes it is over.
        seed: of the resampling.
        resamples: how often.

    Returns:
        The value over all scenes, and the 2.5% and 97.5% quantiles over the resamplings.
    """
    counts = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), resamples)
    low, high = np.quantile(score.value(counts), (0.025, 0.975))
    return float(score.value(np.ones((1, scenes)))[0]), (float(low), float(high))
