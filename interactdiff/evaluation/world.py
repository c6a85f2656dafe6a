"""Scores a model and its adapter on held-out scenes of stickworld."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interactdiff.clear import ClearAdapter
from interactdiff.errors import AdapterError
from interactdiff.evaluation.attributes import identity
from interactdiff.evaluation.bootstrap import Score, Share, with_interval
from interactdiff.evaluation.captions import text_scores
from interactdiff.evaluation.hoi import at_box, picture_scores
from interactdiff.evaluation.sampling import (
    ActionSwap,
    PictureRequest,
    Sampling,
    action_swap,
    detect_pictures,
    detect_renders,
    held_out_scenes,
    row_requests,
)
from interactdiff.evaluation.table import ROWS
from interactdiff.evaluation.words import word_iou as measured_word_iou
from interactdiff.generation import ScenePipeline
from interactdiff.models import MODEL, ModelError, default_adapter, model_info
from interactdiff.scene import SceneError
from interactdiff.scene_checks import checked_side
from interactdiff.stickworld import model_path
from interactdiff.stickworld.detector import Detections, Detector
from interactdiff.stickworld.layouts import MOST_INTERACTIONS
from interactdiff.stickworld.world import WorldScene

TEXT_ROWS = ("real", "base")  # also scored by what is found anywhere: text alone says of no place
IDENTITY_ROWS = ("real", "adapter")  # also scored by what persons and objects look like


def evaluate_world(
    model: str,
    adapter: str | None,
    scenes: int,
    seed: int,
    steps: int,
    batch_size: int,
    device: str,
    progress: bool = True,
    *,
    guidance_scale: float | None = None,
    size: int | None = None,
    fast: bool = False,
    n_interactions: int | None = None,
    word_iou: int = 0,
    scene_pipeline: ScenePipeline | None = None,
    detector: Detector | None = None,
    clear: ClearAdapter | None = None,
) -> dict[str, Any]:
    """Draw held-out scenes and let the detector say what is in them.

    real: renders of the scenes, the ceiling. base: the full caption, verbs included, and no adapter.
    boxes_only: the caption without verbs, every box and phrase, and the actions left null; with the verbs,
    the caption would tell the action. adapter: the full caption and everything. adapter_fast, if wanted:
    the same with fast control. adapter_clear, where there are layers for it: the same with attention within
    CLEAR's windows. Without an adapter there are the first two. Entities that do nothing are controlled, and
    scored by their boxes and colours, like the persons and objects of interactions.
    text: of the first two, what is found anywhere in the picture, see `text_scores`.
    action swap: the caption without verbs, the same boxes and noise, and one triplet's action set to each of
    its group in turn; the share of pictures in which the person at that box does it. boxes_only is the
    same with that action left null, compared with each action in turn; chance is what guessing would give.

    Args:
        model: packaged name, folder or Hub id.
        adapter: likewise; None takes the packaged adapter of a packaged model, and none with any other.
        scenes: how many.
        seed: which ones, and their noise; in [0, 2**32).
        steps: denoising steps.
        batch_size: pictures at a time; does not change which noise a scene gets.
        device: a torch device or "auto".
        progress: show a progress bar.
        guidance_scale: of every row; None is what suits a packaged model, and 4 for any other.
        size: pixels at which pictures are drawn, a multiple of 8; None is the model's own.
        fast: whether there is a row for fast control.
        n_interactions: in every scene, 0 to 3; None is as scenes have them.
        word_iou: number of renders on which `words.word_iou` is measured; 0 leaves it out.
        scene_pipeline: a loaded model, with an adapter or without, in place of loading `model` and `adapter`.
        detector: in place of the packaged one.
        clear: layers for the row of windows, in place of those that a packaged model has, if any.

    Returns:
        {"rows": {row: {score: share}}, "text": the same for other scores, "action_swap": {...} or None
        without an adapter, "word_iou": {"objects": IoU, "persons": IoU} or None, "intervals": the first three
        with the ends of 95% intervals, "scenes", "seed", "steps", "guidance_scale", "size", "model",
        "adapter"}.

    Raises:
        SceneError: the seed, the size or the number of interactions is out of range.
        ModelError: a model is missing or damaged.
        AdapterError: the adapter is missing, damaged, or made for another base, or fast control has none.
    """
    if not 0 <= seed < 2**32:
        raise SceneError(f"expected a seed in [0, 2**32), got {seed}")
    checked_side("size", size)
    scene_pipeline = (
        scene_pipeline
        if scene_pipeline is not None
        else ScenePipeline.from_pretrained(model, adapter, device)
    )
    scene_pipeline.check_side("size", size)
    if fast and scene_pipeline.handle is None:
        raise AdapterError(
            f"expected an adapter for the row of fast control, got none for {scene_pipeline.model}"
        )
    info = model_info(scene_pipeline.model)
    detector = (detector or packaged_detector()).to(scene_pipeline.denoiser.device)
    if n_interactions is not None and not 0 <= n_interactions <= MOST_INTERACTIONS:
        raise SceneError(f"expected 0 to {MOST_INTERACTIONS} interactions a scene, got {n_interactions}")
    if guidance_scale is None:
        guidance_scale = info.guidance_scale or model_info(MODEL).guidance_scale
    how = Sampling(steps, guidance_scale, size or scene_pipeline.size)
    world = held_out_scenes(scenes, seed, n_interactions)
    layers = default_adapter(scene_pipeline.model, "clear")
    if clear is None and scene_pipeline.handle is not None and layers is not None:
        clear = ClearAdapter.from_pretrained(model_path(layers))
    if clear is not None:
        scene_pipeline.check_side("size", size, clear)
    requests = row_requests(world, scene_pipeline.handle is not None, fast, clear is not None)
    swaps = []
    if scene_pipeline.handle is not None:
        swaps = [action_swap(n, scene, seed) for n, scene in enumerate(world) if scene.triplets]
    wanted = [request for row in requests.values() for request in row]
    wanted += [request for swap in swaps for request in (*swap.pictures, swap.without)]
    drawn = detect_pictures(wanted, scene_pipeline, detector, seed, how, batch_size, progress, clear)

    found = {"real": detect_renders(world, detector, batch_size)}
    found |= {row: [drawn[request] for request in of_row] for row, of_row in requests.items()}
    table = _table(found, world, seed)
    if scene_pipeline.handle is not None:
        followed = swap_scores(swaps, world, drawn)
        _enter(table, table["intervals"], "action_swap", followed, scenes, seed)
    table["word_iou"] = None
    if word_iou:
        if scene_pipeline.handle is not None:
            scene_pipeline.handle.clear()
        shown = held_out_scenes(word_iou, seed, n_interactions)
        table["word_iou"] = measured_word_iou(
            scene_pipeline.pipeline, shown, how.size or scene_pipeline.size, seed
        )
    return {
        **table,
        "scenes": scenes,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "size": how.size,
        "model": scene_pipeline.model,
        "adapter": scene_pipeline.adapter,
    }


def _table(found: dict[str, list[Detections]], scenes: Sequence[WorldScene], seed: int) -> dict[str, Any]:
    """Everything but the action swap."""
    rows = {row: picture_scores(found[row], scenes) for row in ROWS if row in found}
    for row in IDENTITY_ROWS:
        if row in rows:
            rows[row]["identity"] = identity(found[row], scenes)
    scores = {"rows": rows, "text": {row: text_scores(found[row], scenes) for row in TEXT_ROWS}}
    table: dict[str, Any] = {"rows": {}, "text": {}, "action_swap": None}
    table["intervals"] = {"rows": {}, "text": {}, "action_swap": None}
    for kind, of_rows in scores.items():
        for row, of_row in of_rows.items():
            _enter(table[kind], table["intervals"][kind], row, of_row, len(scenes), seed)
    return table


def _enter(values: dict, intervals: dict, row: str, scores: dict[str, Score], scenes: int, seed: int) -> None:
    entries = {name: with_interval(score, scenes, seed) for name, score in scores.items()}
    values[row] = {name: value for name, (value, _) in entries.items()}
    intervals[row] = {name: list(interval) for name, (_, interval) in entries.items()}


def packaged_detector() -> Detector:
    """The detector that ships with the package.

    Raises:
        ModelError: the install is incomplete.
    """
    return load_detector(model_path("detector"), "packaged detector")


def load_detector(folder: Path, kind: str = "detector") -> Detector:
    """A detector from its folder.

    Raises:
        ModelError: it is missing, damaged, or of another world; the message calls it `kind`.
    """
    try:
        return Detector.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"expected the {kind} in {folder}, got {reason}") from error


def swap_scores(
    swaps: Sequence[ActionSwap], scenes: Sequence[WorldScene], found: dict[PictureRequest, Detections]
) -> dict[str, Score]:
    """How often the detected action is the one set: with it set, with it null, and by chance."""
    total, follows, stays, chance = (np.zeros(len(scenes)) for _ in range(4))
    for swap in swaps:
        box = scenes[swap.scene].triplets[swap.triplet].subject_box

        def action_in(request: PictureRequest, box: tuple[float, float, float, float] = box) -> str | None:
            person = at_box(found[request].persons, "person", box)
            return None if person is None else person.action

        pictures = zip(swap.pictures, swap.actions, strict=True)
        follows[swap.scene] = sum(action_in(request) == action for request, action in pictures)
        stays[swap.scene] = action_in(swap.without) in swap.actions  # it equals one of them at most
        total[swap.scene], chance[swap.scene] = len(swap.actions), 1
    return {
        "adapter": Share(follows, total),
        "boxes_only": Share(stays, total),
        "chance": Share(chance, total),
    }
