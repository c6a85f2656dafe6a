"""Matches detected pairs with the truth of a picture, under several protocols at once.

One picture at a time, so that memory does not grow with pictures; what is kept of each detection is its
class, its score and a bit for each protocol. `hoi_reference` is the slow oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from interactdiff.evaluation.hoi_protocols import LEAST_IOU, PADDING, Overlap, Protocol, ScoreError

SUPPRESSED_ABOVE = 0.5  # product of both IoUs


@dataclass(frozen=True)
class Pairs:
    """Pairs of a person and an object in one picture.

    Attributes:
        classes: [N] int, numbers of the class (verb, object).
        persons: [N, 4] xyxy in pixels.
        objects: [N, 4] xyxy in pixels.
        scores: [N] in any range; of the truth all are 1.
        inclusive: whether boxes end with their last pixel: a protocol of plain areas then adds a pixel to
            their far edges, as PViC's data set does.
    """

    classes: np.ndarray
    persons: np.ndarray
    objects: np.ndarray
    scores: np.ndarray
    inclusive: bool = False

    @classmethod
    def of(
        cls,
        classes: Sequence[int] | np.ndarray,
        persons: Sequence[Sequence[float]] | np.ndarray,
        objects: Sequence[Sequence[float]] | np.ndarray,
        scores: Sequence[float] | np.ndarray | None = None,
        inclusive: bool = False,
    ) -> "Pairs":
        """Make pairs of plain lists.

        Raises:
            ScoreError: there are not as many of each, or a number is not finite.
        """
        pairs = cls(
            np.asarray(classes, dtype=np.int64).reshape(-1),
            np.asarray(persons, dtype=np.float64).reshape(-1, 4),
            np.asarray(objects, dtype=np.float64).reshape(-1, 4),
            np.ones(len(classes)) if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1),
            inclusive,
        )
        sizes = {len(pairs.classes), len(pairs.persons), len(pairs.objects), len(pairs.scores)}
        if len(sizes) > 1:
            raise ScoreError(f"expected as many classes, persons, objects and scores, got {sorted(sizes)}")
        if not all(np.isfinite(one).all() for one in (pairs.persons, pairs.objects, pairs.scores)):
            raise ScoreError("expected finite boxes and scores, got some that are not")
        return pairs

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, which: np.ndarray) -> "Pairs":
        """Some of them, by number or by a mask."""
        return replace(
            self,
            classes=self.classes[which],
            persons=self.persons[which],
            objects=self.objects[which],
            scores=self.scores[which],
        )

    def scaled(self, across: float, down: float) -> "Pairs":
        """The same pairs in a picture of another size."""
        factors = np.array([across, down, across, down])
        return replace(self, persons=self.persons * factors, objects=self.objects * factors)


def iou(a: np.ndarray, b: np.ndarray, overlap: Overlap, pixels: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Intersection over union of boxes as a protocol counts it.

    Args:
        a: [..., 4] xyxy.
        b: [..., 4] xyxy, broadcast against `a`.
        overlap: see `Protocol`.
        pixels: added to the far edges of `a` and of `b` where areas are plain.
    """
    far_a, far_b = a[..., 2:], b[..., 2:]
    if overlap == "plain":
        far_a, far_b = far_a + pixels[0], far_b + pixels[1]
    more = 0.0 if overlap == "plain" else 1.0
    sides = np.minimum(far_a, far_b) - np.maximum(a[..., :2], b[..., :2])
    shared = np.maximum(sides + more, 0).prod(-1)
    union = (far_a - a[..., :2] + more).prod(-1) + (far_b - b[..., :2] + more).prod(-1) - shared
    if overlap.endswith("padded"):
        union = union + PADDING
    if "touching is 0" in overlap:
        shared = np.where((sides <= 0).any(-1), 0.0, shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def suppressed(pairs: Pairs) -> np.ndarray:
    """Which pairs a surer one of the same class stands for: [N] bool.

    From the surest on, a pair that is kept drops those whose IoU of persons times IoU of objects with it is
    above `SUPPRESSED_ABOVE` (FGAHOI's pair-wise suppression; inclusive areas).
    """
    order = np.argsort(-pairs.scores, kind="stable")
    ours = pairs.take(order)
    product = np.ones((len(ours), len(ours)))
    for boxes in (ours.persons, ours.objects):
        product *= iou(boxes[:, None], boxes[None], "inclusive")
    drops = np.triu((product > SUPPRESSED_ABOVE) & (ours.classes[:, None] == ours.classes[None]), 1)
    kept = np.ones(len(ours), dtype=bool)
    for number in np.flatnonzero(drops.any(1)):
        if kept[number]:
            kept &= ~drops[number]
    dropped = np.zeros(len(ours), dtype=bool)
    dropped[order] = ~kept
    return dropped


def counted(detections: Pairs, protocol: Protocol) -> np.ndarray:
    """Which detections of a picture a protocol counts: [N] bool, see `Protocol.most` and `.suppress`."""
    counts = np.ones(len(detections), dtype=bool)
    if protocol.most is not None and len(detections) > protocol.most:
        counts[np.argsort(-detections.scores, kind="stable")[protocol.most :]] = False
    if protocol.suppress and len(detections) > 1:
        among = np.flatnonzero(counts)
        counts[among[suppressed(detections.take(among))]] = False
    return counts


class Matcher:
    """Candidates for a match in one picture: a detection and a truth of one class."""

    def __init__(self, truth: Pairs, detections: Pairs):
        self.count = len(detections)
        self.rank = np.empty(self.count, dtype=np.int64)
        self.rank[np.argsort(-detections.scores, kind="stable")] = np.arange(self.count)
        found, wanted = np.nonzero(detections.classes[:, None] == truth.classes[None])
        self.found, self.wanted = found, wanted
        self._boxes = [
            (getattr(detections, role)[found], getattr(truth, role)[wanted])
            for role in ("persons", "objects")
        ]
        self._pixels = (int(detections.inclusive), int(truth.inclusive))
        self._quality: dict[Overlap, np.ndarray] = {}

    def quality(self, overlap: Overlap) -> np.ndarray:
        """The smaller IoU of both boxes, by candidate."""
        if overlap not in self._quality:
            persons, objects = (iou(a, b, overlap, self._pixels) for a, b in self._boxes)
            self._quality[overlap] = np.minimum(persons, objects)
        return self._quality[overlap]

    def correct(self, protocol: Protocol, counts: np.ndarray) -> np.ndarray:
        """Which detections are true positives: [N] bool.

        Args:
            protocol: by which.
            counts: [N] bool, see `counted`; the others match nothing.
        """
        correct = np.zeros(self.count, dtype=bool)
        if not len(self.found):
            return correct
        quality = self.quality(protocol.overlap)
        good = quality > LEAST_IOU if protocol.strict else quality >= LEAST_IOU
        good &= counts[self.found]
        if not good.any():
            return correct
        if protocol.match == "first free":
            order = np.lexsort((self.wanted, self.rank[self.found]))
        else:
            order = np.lexsort((self.wanted, -quality, self.rank[self.found]))
        order = order[good[order]]
        # The best of a detection's candidates is good if any of them is, so the others need no look.
        taken: set[int] = set()
        done: set[int] = set()
        for found, wanted in zip(self.found[order].tolist(), self.wanted[order].tolist(), strict=True):
            if found in done:
                continue
            if wanted not in taken:
                taken.add(wanted)
                correct[found] = True
                done.add(found)
            elif protocol.match == "best":
                done.add(found)
        return correct


@dataclass(frozen=True)
class Outcomes:
    """What became of all detections of all pictures.

    Attributes:
        protocols: whose bits `correct` and `counted` hold, the first one the lowest.
        pictures: S, how many.
        classes: C, how many.
        picture: [D] number of the picture of each detection, rising.
        cls: [D] its class.
        score: [D].
        correct: [D] a bit for each protocol: it is a true positive.
        counted: [D] a bit for each protocol: it counts at all.
        known: [D] whether its picture holds the class's object.
        truth_picture: [T] number of the picture of each truth.
        truth_cls: [T] its class.
        truth_known: [T] as `known`.
    """

    protocols: tuple[str, ...]
    pictures: int
    classes: int
    picture: np.ndarray
    cls: np.ndarray
    score: np.ndarray
    correct: np.ndarray
    counted: np.ndarray
    known: np.ndarray
    truth_picture: np.ndarray
    truth_cls: np.ndarray
    truth_known: np.ndarray

    ARRAYS: ClassVar[dict[str, type]] = {
        "picture": np.int32,
        "cls": np.int32,
        "score": np.float64,
        "correct": np.uint8,
        "counted": np.uint8,
        "known": np.bool_,
        "truth_picture": np.int32,
        "truth_cls": np.int32,
        "truth_known": np.bool_,
    }

    def hits(self, protocol: str) -> np.ndarray:
        """[S]: how many true positives each picture has."""
        bit = 1 << self.protocols.index(protocol)
        return np.bincount(self.picture[(self.correct & bit) > 0], minlength=self.pictures)

    @property
    def wanted(self) -> np.ndarray:
        """[S]: how many truths each picture has."""
        return np.bincount(self.truth_picture, minlength=self.pictures)


class HoiEvaluator:
    """Takes pictures one by one, and holds what became of their detections.

    Args:
        protocols: by which to match.
        classes: C, how many there are.
        prepare: whether a protocol's `most` and `suppress` apply; its matching and precision always do.
    """

    def __init__(self, protocols: Sequence[Protocol], classes: int, prepare: bool = True):
        self.protocols, self.classes, self.prepare = tuple(protocols), classes, prepare
        self.pictures = 0
        self._parts = {name: [np.zeros(0, dtype)] for name, dtype in Outcomes.ARRAYS.items()}

    def add(self, truth: Pairs, detections: Pairs, known: np.ndarray | None = None) -> None:
        """Match one more picture.

        Args:
            truth: in the order of the annotations, which some protocols match by.
            detections: in any order; of equal scores the first counts as the surer.
            known: [C] bool, the classes whose object the picture holds; None is those with a truth in it.

        Raises:
            ScoreError: a class is out of range.
        """
        for pairs in (truth, detections):
            if len(pairs) and not (pairs.classes.min() >= 0 and pairs.classes.max() < self.classes):
                raise ScoreError(f"expected classes from 0 to {self.classes - 1}, got others")
        if known is None:
            known = np.zeros(self.classes, dtype=bool)
            known[truth.classes] = True
        matcher = Matcher(truth, detections)
        correct = np.zeros(len(detections), dtype=np.uint8)
        counts = np.zeros(len(detections), dtype=np.uint8)
        for bit, protocol in enumerate(self.protocols):
            keeps = counted(detections, protocol) if self.prepare else np.ones(len(detections), dtype=bool)
            counts |= keeps.astype(np.uint8) << bit
            correct |= matcher.correct(protocol, keeps).astype(np.uint8) << bit
        made = {
            "picture": np.full(len(detections), self.pictures),
            "cls": detections.classes,
            "score": detections.scores,
            "correct": correct,
            "counted": counts,
            "known": known[detections.classes],
            "truth_picture": np.full(len(truth), self.pictures),
            "truth_cls": truth.classes,
            "truth_known": known[truth.classes],
        }
        for name, dtype in Outcomes.ARRAYS.items():
            self._parts[name].append(made[name].astype(dtype))
        self.pictures += 1

    def outcomes(self) -> Outcomes:
        """What became of all detections so far."""
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        names = tuple(protocol.name for protocol in self.protocols)
        return Outcomes(names, self.pictures, self.classes, **arrays)
