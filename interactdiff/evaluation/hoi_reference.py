"""The slow oracle of `hoi_matching` and `hoi_precision`: one pair of boxes at a time, as protocols say it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from interactdiff.evaluation.hoi_protocols import LEAST_IOU, PADDING, Protocol

PixelBox = Sequence[float]


@dataclass(frozen=True)
class OnePair:
    """A person and an object, detected or true, in the picture of that number."""

    picture: int
    cls: int
    person: PixelBox
    object: PixelBox
    score: float = 1.0


def overlap(a: PixelBox, b: PixelBox, protocol: Protocol) -> float:
    """Intersection over union of two boxes as a protocol counts it."""
    one = 0 if protocol.overlap == "plain" else 1
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if "touching is 0" in protocol.overlap and (width <= 0 or height <= 0):
        return 0.0
    if width + one <= 0 or height + one <= 0:
        return 0.0
    shared = (width + one) * (height + one)
    union = sum((box[2] - box[0] + one) * (box[3] - box[1] + one) for box in (a, b)) - shared
    union += PADDING if "padded" in protocol.overlap else 0
    return shared / union if union > 0 else 0.0


def true_positives(truth: Sequence[OnePair], found: Sequence[OnePair], protocol: Protocol) -> list[bool]:
    """Which detections of one class are right: truth and detections of all pictures, the surest first."""
    taken = [False] * len(truth)
    right = []
    for one in found:
        overlaps = [
            min(overlap(one.person, t.person, protocol), overlap(one.object, t.object, protocol))
            if t.picture == one.picture
            else -1.0
            for t in truth
        ]
        good = [o > LEAST_IOU if protocol.strict else o >= LEAST_IOU for o in overlaps]
        choice = None
        if protocol.match == "first free":
            choice = next((n for n, is_good in enumerate(good) if is_good and not taken[n]), None)
        else:
            open_to = [n for n in range(len(truth)) if protocol.match == "best" or not taken[n]]
            best = max(open_to, key=lambda n: overlaps[n], default=None)
            if best is not None and good[best] and not taken[best]:
                choice = best
        right.append(choice is not None)
        if choice is not None:
            taken[choice] = True
    return right


def precision(right: Sequence[bool], positives: int, protocol: Protocol) -> float:
    """Average precision of one class, of detections the surest first."""
    hits = list(accumulate(map(int, right)))
    precisions = [hit / (n + 1) for n, hit in enumerate(hits)]
    if protocol.points is None:
        return sum(max(precisions[n:]) for n, one in enumerate(right) if one) / positives
    if protocol.points == "tenths":
        reached = [[hit * 10 >= k * positives for hit in hits] for k in range(11)]
    else:
        reached = [[hit / positives >= point for hit in hits] for point in protocol.points]
    best = [max((p for p, on in zip(precisions, row, strict=True) if on), default=0.0) for row in reached]
    return sum(best) / len(best)


def reference_average_precisions(
    truth: Sequence[OnePair],
    found: Sequence[OnePair],
    classes: int,
    protocol: Protocol,
    known: Mapping[int, Collection[int]] | None = None,
) -> list[float]:
    """Average precision of every class; NaN where it is left out of the mean.

    Args:
        truth: in the order of the annotations.
        found: picture by picture, in the list's order.
        classes: how many.
        protocol: by which; its `most` and `suppress` are not applied.
        known: for each class the pictures that it is scored in; None is all.
    """
    values = []
    for cls in range(classes):
        wanted = [t for t in truth if t.cls == cls and (known is None or t.picture in known[cls])]
        ours = [f for f in found if f.cls == cls and (known is None or f.picture in known[cls])]
        ours.sort(key=lambda f: (-f.score, f.picture))  # stable: then the list's order
        if wanted:
            values.append(precision(true_positives(wanted, ours, protocol), len(wanted), protocol))
        elif protocol.empty == "zero" or (protocol.empty == "zero if undetected" and not ours):
            values.append(0.0)
        else:
            values.append(math.nan)
    return values


def reference_suppressed(pairs: Sequence[OnePair], above: float, protocol: Protocol) -> list[bool]:
    """Which pairs of one picture and class a surer one stands for, with a protocol's overlap."""
    dropped = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda n: -pairs[n].score)
    for place, n in enumerate(order):
        if dropped[n]:
            continue
        for other in order[place + 1 :]:
            a, b = pairs[n], pairs[other]
            product = overlap(a.person, b.person, protocol) * overlap(a.object, b.object, protocol)
            if a.cls == b.cls and product > above:
                dropped[other] = True
    return dropped
