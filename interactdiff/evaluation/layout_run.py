"""Draws layouts, lets a detector look, and scores: the whole of `interactdiff evaluate --data`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interactdiff.data.records import Stored
from interactdiff.errors import DataError
from interactdiff.evaluation.detection import HoiDetector, Picture, PictureDetections
from interactdiff.evaluation.hoi_matching import HoiEvaluator, Outcomes
from interactdiff.evaluation.hoi_protocols import PROTOCOLS, Protocol, chosen_protocols
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_data import LayoutData
from interactdiff.evaluation.layout_detection import (
    Looking,
    PictureSet,
    detections_folder,
    found_in,
    look,
)
from interactdiff.evaluation.layout_drawing import (
    Drawing,
    Ranks,
    check_run,
    draw_layouts,
    most_items,
    weights_of,
)
from interactdiff.evaluation.report import CEILING, RowScores, build_report, layouts_digest
from interactdiff.evaluation.vcoco import RoleEvaluator, RoleTruth
from interactdiff.generation import ScenePipeline
from interactdiff.picture import installed_versions

DetectorOf = Callable[[str, int], HoiDetector | None]
"""The detector of a row and a seed; None where there are no detections of it."""
Measure = Callable[[Sequence[Layout], Sequence[PictureSet]], RowScores]
"""Further scores of a row, of the pictures of all seeds."""


@dataclass(frozen=True)
class LayoutRun:
    """What is evaluated, and how.

    Attributes:
        data: the layouts.
        detector: of each row and seed.
        detector_name: what tables call it.
        protocols: names.
        out: folder for pictures and detections.
        size: height and width in pixels, of real pictures too; None is what pictures have.
        seeds: of the noise.
        batch_size: pictures at a time.
        paper: as the paper's script does it, see `Drawing`.
        limit: the number of layouts that was requested; None is all.
        measures: of further scores.
        roles: V-COCO's persons, by which role AP is computed too.
        calibration: of the detector on real pictures.
        progress: show progress bars.
    """

    data: LayoutData
    detector: DetectorOf
    detector_name: str
    protocols: tuple[str, ...]
    out: Path
    size: int | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    batch_size: int = 16
    paper: bool = False
    limit: int | None = None
    measures: tuple[Measure, ...] = ()
    roles: RoleTruth | None = None
    calibration: Mapping[str, Any] | None = None
    progress: bool = False


@dataclass(frozen=True)
class Drawn:
    """A model whose pictures are evaluated.

    Attributes:
        pipeline: with its adapters.
        rows: which ways of drawing, of "base", "boxes_only", "adapter".
        drawing: how and where to.
    """

    pipeline: ScenePipeline
    rows: tuple[str, ...]
    drawing: Drawing


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        report: all scores, see `build_report`.
        rows: what they are made of.
        sets: the pictures of each row, by seed.
        looking: how those of a row and a seed were looked at.
    """

    report: dict[str, Any]
    rows: dict[str, RowScores]
    sets: dict[str, list[PictureSet]]
    looking: Callable[[PictureSet], Looking]


def evaluate_layouts(
    run: LayoutRun,
    ranks: Ranks,
    drawn: Drawn | None = None,
    folders: Mapping[str, Callable[[Layout], Path | None]] | None = None,
) -> Evaluation | None:
    """Draw what is missing, look at all pictures, and score.

    Args:
        run: what and how.
        ranks: this process among those that share the work.
        drawn: a model to draw with.
        folders: by row, where pictures are that something else drew.

    Returns:
        The scores, in the main process; None in the others.

    Raises:
        DataError: pictures or detections are missing or damaged, or were made otherwise.
    """
    layouts = run.data.layouts
    if drawn is not None:
        check_run(drawn.drawing.folder, _settings(run, drawn), ranks)
        for row in drawn.rows:
            for seed in run.seeds:
                draw_layouts(layouts, row, seed, drawn.pipeline, drawn.drawing, ranks, run.progress)
        ranks.wait()
    sets = {
        name: chosen
        for name, of_row in _picture_sets(run, drawn, folders or {}).items()
        if (chosen := [one for one in of_row if run.detector(one.row, one.seed) is not None])
    }
    if not sets:
        raise DataError(f"expected pictures or detections to score, got none by {run.detector_name}")

    def looking(pictures: PictureSet) -> Looking:
        detector = run.detector(pictures.row, pictures.seed)
        assert detector is not None
        folder = detections_folder(run.out, detector, run.data.table)
        return Looking(detector, folder, run.batch_size)

    for of_row in sets.values():
        for one in of_row:
            look(layouts, one, looking(one), ranks, run.progress)
    ranks.wait()
    if not ranks.main:
        return None
    matched_by = chosen_protocols(("exact", *run.protocols))
    rows = {}
    for name, of_row in sets.items():
        outcomes = tuple(_outcomes(run, one, looking(one), matched_by) for one in of_row)
        roles = tuple(_role_outcomes(run, run.roles, one, looking(one)) for one in of_row if run.roles)
        scores = RowScores(outcomes, roles=roles)
        for measure in run.measures:
            more = measure(layouts, of_row)
            scores.shares |= more.shares
            scores.plain |= more.plain
        rows[name] = scores
    about = _about(run, drawn, matched_by)
    about["detector_digest"] = looking(next(iter(sets.values()))[0]).detector.digest
    report = build_report(rows, run.protocols, run.data.table.rare, about)
    return Evaluation(report, rows, sets, looking)


def _settings(run: LayoutRun, drawn: Drawn) -> dict[str, Any]:
    """What decides the pictures of a folder."""
    how = drawn.drawing.how
    return {
        "layouts_digest": layouts_digest(run.data.layouts),
        "model": drawn.pipeline.model,
        "adapters": dict(drawn.pipeline.adapters),
        **{f"weights of {name}": digest for name, digest in weights_of(drawn.pipeline).items()},
        "steps": how.steps,
        "guidance_scale": how.guidance_scale,
        "size": how.size,
        "batch_size": drawn.drawing.batch_size,
        "paper": drawn.drawing.paper,
        "dtype": str(drawn.pipeline.denoiser.dtype).removeprefix("torch."),
    }


def _picture_sets(
    run: LayoutRun, drawn: Drawn | None, folders: Mapping[str, Callable[[Layout], Path | None]]
) -> dict[str, list[PictureSet]]:
    squeezed = None if run.size is None else (run.size, run.size)
    sets: dict[str, list[PictureSet]] = {}

    def of_source(where: Callable[[Layout], Path | Stored | None]) -> Callable[[Layout], Picture]:
        def picture(layout: Layout) -> Picture:
            return Picture(layout.file_name, where(layout), squeezed)

        return picture

    if run.data.layouts[0].picture is not None:
        sets[CEILING] = [PictureSet(CEILING, 0, of_source(lambda layout: layout.picture))]
    if drawn is not None:
        drawing = drawn.drawing
        for row in drawn.rows:
            sets[row] = [
                PictureSet(
                    row,
                    seed,
                    lambda layout, row=row, seed=seed: Picture(
                        layout.file_name, drawing.picture_path(row, seed, layout), squeezed
                    ),
                )
                for seed in run.seeds
            ]
    for name, where in folders.items():
        sets[name] = [PictureSet(name, 0, of_source(where))]
    return sets


def _outcomes(
    run: LayoutRun, pictures: PictureSet, looking: Looking, protocols: Sequence[Protocol]
) -> Outcomes:
    table = run.data.table
    evaluator = HoiEvaluator(protocols, len(table.classes))
    for layout, found in found_in(run.data.layouts, pictures, looking):
        size = scored_size(layout, found)
        evaluator.add(
            table.truth(layout, size, floor=run.paper and pictures.row != CEILING),
            table.detected(found, size),
            table.known(layout),
        )
    return evaluator.outcomes()


def _role_outcomes(run: LayoutRun, truth: RoleTruth, pictures: PictureSet, looking: Looking) -> Outcomes:
    evaluator = RoleEvaluator(truth.roles)
    for layout, found in found_in(run.data.layouts, pictures, looking):
        evaluator.add(truth.of(layout, scored_size(layout, found)), truth.detected(found))
    return evaluator.outcomes()


def scored_size(layout: Layout, found: PictureDetections) -> tuple[int, int]:
    """Width and height of the picture in whose pixels boxes are compared.

    Raises:
        DataError: neither the detections nor the annotations say.
    """
    size = found.size or layout.size
    if size is None:
        raise DataError(f"{layout.file_name}: expected detections that say their picture's size, or --size")
    return size


def _about(run: LayoutRun, drawn: Drawn | None, matched_by: Sequence[Protocol]) -> dict[str, Any]:
    layouts = run.data.layouts
    about: dict[str, Any] = {
        "data": run.data.name,
        "split": run.data.split,
        "pictures": len(layouts),
        "of": run.data.of,
        "limit": run.limit,
        "layouts_digest": layouts_digest(layouts),
        "classes": run.data.table.name,
        "class_count": len(run.data.table.classes),
        "rare": None if run.data.table.rare is None else list(run.data.table.rare),
        "roles": [] if run.roles is None else [" ".join(role) for role in run.roles.roles],
        "detector": run.detector_name,
        "calibration": run.calibration,
        "protocols": list(run.protocols),
        "evaluators": {name: PROTOCOLS[name].source for name in run.protocols},
        "matched_by": [one.name for one in matched_by],
        "seeds": list(run.seeds) if drawn is not None else [],
        "size": run.size,
        "paper": run.paper,
        "versions": installed_versions(),
    }
    if drawn is not None:
        how, most = drawn.drawing.how, most_items(drawn.pipeline, run.paper)
        items = [len(layout.interactions) + len(layout.entities) for layout in layouts]
        about |= {
            "model": drawn.pipeline.model,
            "adapters": dict(drawn.pipeline.adapters),
            "steps": how.steps,
            "guidance_scale": how.guidance_scale,
            "size": how.size or drawn.pipeline.size,
            "batch_size": drawn.drawing.batch_size,
            "dtype": str(drawn.pipeline.denoiser.dtype).removeprefix("torch."),
            "device": drawn.pipeline.denoiser.device.type,
            "items_left_out": sum(max(0, count - most) for count in items) if most else 0,
        }
    return about
