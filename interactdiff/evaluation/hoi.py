"""How well pictures show the interactions that were asked for, after HICO-DET (Chao et al., 2018).

Every score is kept as counts by scene, so that one resampling of scenes gives the intervals of all of them.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from interactdiff.scene import Box
from interactdiff.stickworld.detector import Detections, Found, FoundTriplet
from interactdiff.stickworld.world import Triplet

LEAST_IOU = 0.5  # a box is right above this


class Score(Protocol):
    """A score over scenes, of which any scene may count several times or not at all."""

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R] values for [R, S] counts of how often each scene is taken."""
        ...


@dataclass(frozen=True)
class Share:
    """Hits out of what was asked; both [S], by scene."""

    hits: np.ndarray
    asked: np.ndarray

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the share of hits; 0 where nothing was asked."""
        return (counts @ self.hits) / np.maximum(counts @ self.asked, 1)


@dataclass(frozen=True)
class Matched:
    """The detections of one class in all pictures, surest first.

    Attributes:
        right: [D] bool, whether it found a triplet that was asked for.
        scene: [D] the scene of each detection.
        asked: [S] how many triplets of this class each scene has.
    """

    right: np.ndarray
    scene: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class HoiMap:
    """Mean average precision over the classes (action, object) that were asked for."""

    classes: dict[tuple[str, str], Matched]

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the mean over the classes that occur in the scenes taken; 0 where none does."""
        precisions = np.zeros((len(self.classes), len(counts)))
        occurs = np.zeros_like(precisions, dtype=bool)
        for row, matched in enumerate(self.classes.values()):
            positives = counts @ matched.asked
            precisions[row] = average_precision(matched.right, counts[:, matched.scene], positives)
            occurs[row] = positives > 0
        return (precisions * occurs).sum(0) / np.maximum(occurs.sum(0), 1)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def average_precision(right: np.ndarray, weights: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the curve of precision over recall, made monotone, as Pascal VOC has it since 2010.

    Args:
        right: [D] bool by detection, surest first.
        weights: [R, D] how often each detection counts.
        positives: [R] how many there are to be found.

    Returns:
        [R] in 0..1; 0 where there is nothing to be found.
    """
    if not len(right):
        return np.zeros(len(weights))
    hits = np.cumsum(weights * right, 1)
    precision = hits / np.maximum(np.cumsum(weights, 1), 1e-9)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    gained = np.diff(hits, axis=1, prepend=0.0)
    return (gained * envelope).sum(1) / np.maximum(positives, 1)


def hoi_map(found: Sequence[Sequence[FoundTriplet]], asked: Sequence[Sequence[Triplet]]) -> HoiMap:
    """Match detections with what was asked, class by class.

    A detection is right if both its boxes overlap those of a triplet of its class in its picture, one that
    no surer detection has taken, with an IoU above 0.5.

    Args:
        found: by picture.
        asked: by picture.
    """
    classes = {}
    for name in sorted({(t.action, t.object) for triplets in asked for t in triplets}):
        wanted = [[t for t in triplets if (t.action, t.object) == name] for triplets in asked]
        sure = sorted(
            (-t.score, scene, order, t)
            for scene, triplets in enumerate(found)
            for order, t in enumerate(triplets)
            if (t.action, t.object.name) == name
        )
        left = [list(triplets) for triplets in wanted]
        right = []
        for _, scene, _, triplet in sure:
            best = max(left[scene], key=lambda t: _overlap(triplet, t), default=None)
            right.append(False)
            if best is not None and _overlap(triplet, best) > LEAST_IOU:
                right[-1] = True
                left[scene].remove(best)
        classes[name] = Matched(
            np.array(right, dtype=bool),
            np.array([scene for _, scene, _, _ in sure], dtype=int),
            np.array([len(triplets) for triplets in wanted]),
        )
    return HoiMap(classes)


def _overlap(found: FoundTriplet, asked: Triplet) -> float:
    return min(iou(found.person.box, asked.subject_box), iou(found.object.box, asked.object_box))


def at_box(things: Sequence[Found], name: str, box: Box) -> Found | None:
    """The thing of that name that overlaps a box best, if its IoU is above 0.5."""
    best = max((t for t in things if t.name == name), key=lambda t: iou(t.box, box), default=None)
    return best if best is not None and iou(best.box, box) > LEAST_IOU else None


def picture_scores(found: Sequence[Detections], asked: Sequence[Sequence[Triplet]]) -> dict[str, Score]:
    """Score pictures by what was asked of them; what is not found at its box is wrong in every respect.

    Args:
        found: by picture.
        asked: by picture.

    Returns:
        hoi_map; box_acc and colour_acc, shares of persons and objects; action_acc, share of triplets.
    """
    hits = {name: np.zeros(len(asked)) for name in ("box_acc", "action_acc", "colour_acc")}
    for scene, (seen, triplets) in enumerate(zip(found, asked, strict=True)):
        for t in triplets:
            person = at_box(seen.persons, "person", t.subject_box)
            thing = at_box(seen.objects, t.object, t.object_box)
            hits["box_acc"][scene] += (person is not None) + (thing is not None)
            hits["action_acc"][scene] += person is not None and person.action == t.action
            hits["colour_acc"][scene] += person is not None and person.colour == t.subject_colour
            hits["colour_acc"][scene] += thing is not None and thing.colour == t.object_colour
    triplets = np.array([len(scene) for scene in asked])
    shares = {n: Share(h, triplets if n == "action_acc" else 2 * triplets) for n, h in hits.items()}
    return {"hoi_map": hoi_map([seen.triplets for seen in found], asked), **shares}


def text_scores(found: Sequence[Detections], asked: Sequence[Sequence[Triplet]]) -> dict[str, Score]:
    """Score pictures by what a caption says of them, wherever that is found.

    A caption says of no place, so boxes do not count here. Each thing that is found stands for at most one
    that was said, paired so that as many as possible are right. Who does it to what is not asked: a person
    who rides a dog counts for riding a bike.

    Args:
        found: by picture.
        asked: by picture.

    Returns:
        object_acc: share of the objects of which one of that kind is found; action_acc: share of the triplets
        of which a person doing that is found; colour_acc: share of persons and objects of which a person, or
        an object of that kind, is found in that colour.
    """
    hits = {name: np.zeros(len(asked)) for name in ("object_acc", "action_acc", "colour_acc")}
    for scene, (seen, triplets) in enumerate(zip(found, asked, strict=True)):
        things = (*seen.persons, *seen.objects)
        persons = [("person", t.subject_colour) for t in triplets]
        objects = [(t.object, t.object_colour) for t in triplets]
        hits["object_acc"][scene] = _shared([t.object for t in triplets], [o.name for o in seen.objects])
        hits["action_acc"][scene] = _shared([t.action for t in triplets], [p.action for p in seen.persons])
        hits["colour_acc"][scene] = _shared([*persons, *objects], [(t.name, t.colour) for t in things])
    triplets = np.array([len(scene) for scene in asked])
    return {n: Share(h, 2 * triplets if n == "colour_acc" else triplets) for n, h in hits.items()}


def _shared(asked: Sequence[Hashable], found: Sequence[Hashable]) -> int:
    """How many of those asked for can be paired with an equal one that is found, one to one."""
    return (Counter(asked) & Counter(found)).total()


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
