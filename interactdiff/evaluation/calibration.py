"""How a verb scorer does at the true boxes of real pictures, and the scale that makes it a probability."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from interactdiff.errors import ModelError
from interactdiff.evaluation.detection import Picture, in_pixels
from interactdiff.evaluation.hoi import iou
from interactdiff.evaluation.hoi_protocols import LEAST_IOU
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_data import LayoutData
from interactdiff.evaluation.two_stage import Candidate, VerbScorer
from interactdiff.scene_items import Interaction

PAIRS = 200  # that are looked at
_RIDGE, _STEPS = 1e-3, 30


def calibrate(
    scorer: VerbScorer, data: LayoutData, size: int | None = None, pairs: int = PAIRS
) -> dict[str, Any]:
    """Score verbs at true boxes: those that are true, and the other verbs of the same object.

    Args:
        scorer: of verbs.
        data: whose real pictures are looked at; layouts are chosen as `layout_data.limited` does.
        size: that pictures are squeezed to; None is their own.
        pairs: how many pairs at most.

    Returns:
        pairs: how many; accuracy: how often the likeliest verb is true; auc: how often a true verb is
        likelier than another of the same pair; scale: a and b of sigmoid(a logit(p) + b), by logistic
        regression.

    Raises:
        ModelError: there are no pictures, or no object has more than one verb.
    """
    verbs_of = {thing: verbs for thing, verbs in data.table.verbs_of.items() if len(verbs) > 1}
    right: list[bool] = []
    above: list[float] = []
    scored: list[tuple[float, bool]] = []
    for layout in data.limited(min(pairs, len(data.layouts))).layouts:
        chosen = [one for one in layout.interactions if one.action and one.object in verbs_of]
        if not chosen or layout.picture is None or len(right) >= pairs:
            continue
        image = Picture(layout.file_name, layout.picture, None if size is None else (size, size)).open()
        candidates = [_candidate(one, image.size) for one in chosen]
        for one, verbs in zip(chosen, scorer.verbs(image, candidates, verbs_of), strict=True):
            true = _true_verbs(one, layout)
            right.append(max(verbs, key=lambda verb: verbs[verb]) in true)
            wrong = [score for verb, score in verbs.items() if verb not in true]
            for verb in true & set(verbs):
                above += [(verbs[verb] > score) + 0.5 * (verbs[verb] == score) for score in wrong]
            scored += [(score, verb in true) for verb, score in verbs.items()]
    if not right or not above:
        raise ModelError(
            f"expected real pictures in {data.name} of objects to which more than one thing is done, got none"
        )
    return {
        "pairs": len(right),
        "accuracy": float(np.mean(right)),
        "auc": float(np.mean(above)),
        "scale": [round(one, 4) for one in fitted_scale(scored)],  # the same on every process
    }


def _candidate(one: Interaction, size: tuple[int, int]) -> Candidate:
    return Candidate(in_pixels(one.subject_box, size), in_pixels(one.object_box, size), one.object)


def _true_verbs(one: Interaction, layout: Layout) -> set[str]:
    """Verbs of the same person and object: data sets may draw their boxes once for each verb."""
    return {
        other.action
        for other in layout.interactions
        if other.action
        and other.object == one.object
        and iou(other.subject_box, one.subject_box) > LEAST_IOU
        and iou(other.object_box, one.object_box) > LEAST_IOU
    }


def fitted_scale(scored: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    """a and b for which sigmoid(a logit(p) + b) is likeliest (Platt, 1999), by Newton's method.

    Args:
        scored: probabilities, and whether each came true.
    """
    probabilities = np.clip([one for one, _ in scored], 1e-6, 1 - 1e-6)
    inputs = np.stack([np.log(probabilities / (1 - probabilities)), np.ones(len(scored))], 1)
    targets = np.array([true for _, true in scored], dtype=float)
    weights = np.array([1.0, 0.0])
    for _ in range(_STEPS):
        expected = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (expected - targets) + _RIDGE * (weights - [1.0, 0.0])
        curvature = (inputs * (expected * (1 - expected))[:, None]).T @ inputs + _RIDGE * np.eye(2)
        weights = weights - np.clip(np.linalg.solve(curvature, gradient), -2, 2)
    return float(weights[0]), float(weights[1])
