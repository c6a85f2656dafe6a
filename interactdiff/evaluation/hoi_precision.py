"""Average precision by class and its means, from what `hoi_matching` found, for resampled pictures too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interactdiff.evaluation.hoi_matching import Outcomes
from interactdiff.evaluation.hoi_protocols import PROTOCOLS, Protocol

TENTHS = 10
SETTINGS = ("default", "known_object")


def average_precisions(
    outcomes: Outcomes, protocol: Protocol, counts: np.ndarray, known_object: bool = False
) -> np.ndarray:
    """Average precision of each class.

    What a protocol says of a class without truth is of the whole data set. A class that has truth, but none
    in the pictures that are taken, is left out: it would tell of the resampling and not of the detections.

    Args:
        outcomes: of all pictures.
        protocol: one of those that they were matched by.
        counts: [R, S] how often each picture is taken; ones for the score itself.
        known_object: whether a class is scored in the pictures alone that hold its object.

    Returns:
        [R, C] in 0..1; NaN where a class is left out of the mean.
    """
    bit = 1 << outcomes.protocols.index(protocol.name)
    counts = np.asarray(counts, dtype=np.float64)
    keep = (outcomes.counted & bit) > 0
    truth = np.ones(len(outcomes.truth_cls), dtype=bool)
    if known_object:
        keep &= outcomes.known
        truth = outcomes.truth_known
    picture, cls, score = outcomes.picture[keep], outcomes.cls[keep], outcomes.score[keep]
    correct = (outcomes.correct[keep] & bit) > 0
    order = np.lexsort((-score, cls))  # stable: of equal scores the earlier picture, then the list's order
    picture, correct = picture[order], correct[order]
    edges = np.searchsorted(cls[order], np.arange(outcomes.classes + 1))
    truth_order = np.argsort(outcomes.truth_cls[truth], kind="stable")
    truth_picture = outcomes.truth_picture[truth][truth_order]
    truth_edges = np.searchsorted(outcomes.truth_cls[truth][truth_order], np.arange(outcomes.classes + 1))
    precisions = np.zeros((len(counts), outcomes.classes))
    for number in range(outcomes.classes):
        found = slice(edges[number], edges[number + 1])
        wanted = counts[:, truth_picture[truth_edges[number] : truth_edges[number + 1]]].sum(1)
        if correct[found].any():
            weights = counts[:, picture[found]]
            precisions[:, number] = class_precision(correct[found], weights, wanted, protocol)
        if truth_edges[number] < truth_edges[number + 1]:
            precisions[wanted == 0, number] = np.nan
        elif protocol.empty == "left out" or (
            protocol.empty == "zero if undetected" and edges[number] < edges[number + 1]
        ):
            precisions[:, number] = np.nan
    return precisions


def class_precision(
    correct: np.ndarray, weights: np.ndarray, wanted: np.ndarray, protocol: Protocol
) -> np.ndarray:
    """Average precision of one class.

    Args:
        correct: [D] bool by detection, surest first.
        weights: [R, D] how often each detection counts.
        wanted: [R] how many there are to be found.
        protocol: of which `points` counts.

    Returns:
        [R] in 0..1; 0 where there is nothing to be found.
    """
    hits = np.cumsum(weights * correct, 1)
    precision = hits / np.maximum(np.cumsum(weights, 1), 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    if protocol.points is None:
        gained = np.diff(hits, axis=1, prepend=0.0)
        return (gained * envelope).sum(1) / np.maximum(wanted, 1)
    # Recall rises along the list, so the best precision from a recall on is the envelope where it is reached.
    envelope = np.concatenate([envelope, np.zeros((len(envelope), 1))], 1)
    totals = np.zeros(len(weights))
    for row, positives in enumerate(wanted):
        if positives == 0:
            continue
        if protocol.points == "tenths":
            reached = np.searchsorted(hits[row] * TENTHS, np.arange(TENTHS + 1) * positives)
        else:
            reached = np.searchsorted(hits[row] / positives, protocol.points)
        totals[row] = envelope[row, reached].sum() / len(reached)
    return totals


def mean_of_classes(precisions: np.ndarray, which: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """The plain mean over classes that are not left out: [R] of [R, C]; 0 where all are."""
    chosen = precisions if which is None else precisions[:, np.asarray(which, dtype=np.int64)]
    there = ~np.isnan(chosen)
    return np.where(there, chosen, 0).sum(1) / np.maximum(there.sum(1), 1)


def class_subsets(classes: int, rare: Sequence[int] | None) -> Mapping[str, tuple[int, ...] | None]:
    """Full, and where it is known which classes are rare, those and the others."""
    if rare is None:
        return {"full": None}
    others = set(range(classes)) - set(rare)
    return {"full": None, "rare": tuple(sorted(rare)), "non_rare": tuple(sorted(others))}


@dataclass(frozen=True)
class HoiPrecisions:
    """mAP by several protocols, Default and Known Object, over all, the rare and the other classes.

    Attributes:
        outcomes: one for each seed, of the same pictures.
        protocols: names of those that are wanted, which the outcomes have.
        rare: numbers of the rare classes; None where it is not known which are.
    """

    outcomes: tuple[Outcomes, ...]
    protocols: tuple[str, ...]
    rare: tuple[int, ...] | None = None

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[R] values for [R, S] counts of how often each picture is taken: the mean over seeds.

        Named PROTOCOL.default.full, PROTOCOL.known_object.rare and so on.
        """
        return {name: by_seed.mean(0) for name, by_seed in self.by_seed(counts).items()}

    def by_seed(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[seeds, R] values of each seed."""
        subsets = class_subsets(self.outcomes[0].classes, self.rare)
        values = {}
        for name in self.protocols:
            for setting in SETTINGS:
                known = setting == "known_object"
                precisions = [average_precisions(o, PROTOCOLS[name], counts, known) for o in self.outcomes]
                for subset, which in subsets.items():
                    means = [mean_of_classes(one, which) for one in precisions]
                    values[f"{name}.{setting}.{subset}"] = np.stack(means)
        return values
