"""Scores beside mAP, as measures of a row of pictures: what `layout_run` adds to its table."""

from collections.abc import Callable, Collection, Sequence
from functools import cache

import numpy as np

from interactdiff.evaluation.bootstrap import Share
from interactdiff.evaluation.box_scores import Answer, ap50, mean_iou, relation_score
from interactdiff.evaluation.detection import Picture
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_data import LayoutData
from interactdiff.evaluation.layout_detection import PictureSet
from interactdiff.evaluation.layout_run import Measure
from interactdiff.evaluation.quality import (
    FeatureExtractor,
    check_alike,
    check_count,
    clip_scores,
    features_of,
    fid,
    kid,
)
from interactdiff.evaluation.report import CEILING, RowScores
from interactdiff.evaluation.two_stage import BoxDetector
from interactdiff.evaluation.verb_scorers import ContrastiveVerbs

KID_SHOWN = 1000  # papers print KID times this


def _pictures(layouts: Sequence[Layout], pictures: PictureSet) -> list[Picture]:
    return [pictures.picture(layout) for layout in layouts]


def _over_seeds(
    score: Callable[[list[Picture], Sequence[Layout]], dict[str, Share]],
    layouts: Sequence[Layout],
    sets: Sequence[PictureSet],
) -> RowScores:
    """Counts of all seeds together."""
    found = [score(_pictures(layouts, one), layouts) for one in sets]
    return RowScores(
        (),
        {
            name: Share(
                np.sum([one[name].hits for one in found], 0), np.sum([one[name].total for one in found], 0)
            )
            for name in found[0]
        },
    )


def clip(model: ContrastiveVerbs) -> Measure:
    """CLIP score, whole and local."""
    return lambda layouts, sets: _over_seeds(
        lambda pictures, of: clip_scores(model, pictures, of), layouts, sets
    )


def relations(answer: Answer) -> Measure:
    """OverLayBench's SR_R."""
    return lambda layouts, sets: _over_seeds(
        lambda pictures, of: {"relations": relation_score(answer, pictures, of)}, layouts, sets
    )


def boxes(wanted: Collection[str], detector: BoxDetector) -> Measure:
    """Mean IoU ("miou") and COCO's AP50 ("ap50"), the mean over seeds."""

    def measure(layouts: Sequence[Layout], sets: Sequence[PictureSet]) -> RowScores:
        scores = RowScores(())
        if "miou" in wanted:
            scores = _over_seeds(lambda pictures, of: mean_iou(detector, pictures, of), layouts, sets)
        if "ap50" in wanted:
            values = [ap50(detector, _pictures(layouts, one), layouts) for one in sets]
            scores.plain["ap50"] = 100 * float(np.mean(values))
        return scores

    return measure


def distances(
    wanted: Collection[str], data: LayoutData, size: int | None, extract: FeatureExtractor
) -> Measure:
    """FID ("fid") and KID ("kid") to the real pictures of the same layouts, the mean over seeds.

    Raises:
        DataError: the real pictures are too few for KID, are not there, or differ in size or format.
    """
    squeezed = None if size is None else (size, size)
    real = [Picture(layout.file_name, layout.picture, squeezed) for layout in data.layouts]
    if "kid" in wanted:
        check_count(len(real))
    check_alike(real, real)

    @cache
    def features_of_real() -> np.ndarray:
        return features_of(real, extract)

    def measure(layouts: Sequence[Layout], sets: Sequence[PictureSet]) -> RowScores:
        scores = RowScores(())
        if sets[0].row == CEILING:
            return scores
        found: dict[str, list[float]] = {name: [] for name in wanted}
        for one in sets:
            pictures = _pictures(layouts, one)
            check_alike(pictures, real)
            features = features_of(pictures, extract)
            if "fid" in wanted:
                found["fid"].append(fid(features, features_of_real()))
            if "kid" in wanted:
                found["kid"].append(KID_SHOWN * kid(features, features_of_real()))
        scores.plain |= {name: float(np.mean(values)) for name, values in found.items()}
        return scores

    return measure
