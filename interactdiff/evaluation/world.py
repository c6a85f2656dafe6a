"""Scores a model and its adapter on held-out scenes of stickworld."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.checkpoint import AdapterError
from interactdiff.clear import ClearAdapter, linearize
from interactdiff.evaluation.hoi import Score, Share, at_box, picture_scores, text_scores, with_interval
from interactdiff.generation import ScenePipeline
from interactdiff.models import MODEL, ModelError, default_adapter, model_info
from interactdiff.pipeline_calls import call_arguments
from interactdiff.scene import Interaction, SceneError
from interactdiff.scene_checks import checked_side
from interactdiff.stickworld import model_path
from interactdiff.stickworld.detector import SIZE, Detections, Detector
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import GROUPS, HELD_OUT, WorldScene, sample_scene

ROWS = {
    "real": "real renders",
    "base": "base, text only",
    "boxes_only": "adapter, boxes only",
    "adapter": "adapter",
    "adapter_fast": "adapter, fast",
    "adapter_clear": "adapter+clear",
}
SCORES = {"hoi_map": "HOI mAP", "box_acc": "boxes", "action_acc": "actions", "colour_acc": "colours"}
TEXT_ROWS = ("real", "base")  # also scored by what is found anywhere: text alone says of no place
TEXT_SCORES = {"object_acc": "objects", "action_acc": "actions", "colour_acc": "colours"}


@dataclass(frozen=True)
class Order:
    """A picture to be drawn: of which scene, whose noise it takes, what is asked, and in which way.

    `interactions` empty is the base alone.
    """

    scene: int
    prompt: str
    interactions: tuple[Interaction, ...] = ()
    way: Literal["exact", "fast", "clear"] = "exact"


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        steps: denoising steps.
        guidance_scale: or None for the pipeline's own.
        size: height and width in pixels, or None for the model's own.
    """

    steps: int
    guidance_scale: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class Swap:
    """Pictures of one scene that differ in the action of one triplet only.

    Attributes:
        scene: its number.
        chosen: number of that triplet.
        actions: the group's actions, which share their boxes.
        pictures: one for each action.
        without: the same with the action left null.
    """

    scene: int
    chosen: int
    actions: tuple[str, ...]
    pictures: tuple[Order, ...]
    without: Order


def held_out_scenes(count: int, seed: int) -> list[WorldScene]:
    """Scenes that no training recipe draws; other seeds give other ones."""
    return [sample_scene(HELD_OUT + seed * 1_000_000 + i) for i in range(count)]


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
    drawer: ScenePipeline | None = None,
    detector: Detector | None = None,
    clear: ClearAdapter | None = None,
) -> dict[str, Any]:
    """Draw held-out scenes and let the detector say what is in them.

    real: renders of the scenes, the ceiling. base: the full caption, verbs included, and no adapter.
    boxes_only: the caption without verbs, every box and phrase, and the actions left null; with the verbs,
    the caption would tell the action. adapter: the full caption and everything. adapter_fast, if asked for:
    the same with fast control. adapter_clear, where there are layers for it: the same with attention within
    CLEAR's windows. Without an adapter there are the first two.
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
        guidance_scale: of every row; None is what suits a packaged model, and 2 for any other.
        size: pixels at which pictures are drawn, a multiple of 8; None is the model's own.
        fast: whether there is a row for fast control.
        drawer: a loaded model, with an adapter or without, in place of loading `model` and `adapter`.
        detector: in place of the packaged one.
        clear: layers for the row of windows, in place of those that a packaged model has, if any.

    Returns:
        {"rows": {row: {score: share}}, "text": the same for other scores, "action_swap": {...} or None
        without an adapter, "intervals": these three with the ends of 95% intervals, "scenes", "seed",
        "steps", "guidance_scale", "size", "model", "adapter"}.

    Raises:
        SceneError: the seed or the size is out of range.
        ModelError: a model is missing or damaged.
        AdapterError: the adapter is missing, damaged, or made for another base, or fast control has none.
    """
    if not 0 <= seed < 2**32:
        raise SceneError(f"expected a seed in [0, 2**32), got {seed}")
    checked_side("size", size)
    detector = detector if detector is not None else packaged_detector()
    drawer = drawer if drawer is not None else ScenePipeline.from_pretrained(model, adapter, device)
    drawer.check_side("size", size)
    if fast and drawer.handle is None:
        raise AdapterError(f"expected an adapter for the row of fast control, got none for {drawer.model}")
    if guidance_scale is None:
        guidance_scale = model_info(drawer.model).guidance_scale or model_info(MODEL).guidance_scale
    how = Drawing(steps, guidance_scale, size or drawer.size)
    detector = detector.to(drawer.denoiser.device)
    worlds = held_out_scenes(scenes, seed)
    layers = default_adapter(drawer.model, "clear")
    if clear is None and drawer.handle is not None and layers is not None:
        clear = ClearAdapter.from_pretrained(model_path(layers))
    if clear is not None:
        drawer.check_side("size", size, clear)
    orders = row_orders(worlds, drawer.handle is not None, fast, clear is not None)
    swaps = [swap(i, world, seed) for i, world in enumerate(worlds)] if drawer.handle is not None else []
    wanted = [order for row in orders.values() for order in row]
    wanted += [order for s in swaps for order in (*s.pictures, s.without)]
    seen = look_at(wanted, drawer, detector, seed, how, batch_size, progress, clear)

    asked = [world.triplets for world in worlds]
    found = {"real": look_at_renders(worlds, detector, batch_size)}
    found |= {row: [seen[order] for order in ordered] for row, ordered in orders.items()}
    scores: dict[str, dict[str, dict[str, Score]]] = {
        "rows": {row: picture_scores(found[row], asked) for row in ROWS if row in found},
        "text": {row: text_scores(found[row], asked) for row in TEXT_ROWS},
    }
    table: dict[str, Any] = {
        "rows": {},
        "text": {},
        "action_swap": None,
        "intervals": {"rows": {}, "text": {}},
    }
    table["intervals"]["action_swap"] = None
    for kind, rows in scores.items():
        for row, row_scores in rows.items():
            _enter(table[kind], table["intervals"][kind], row, row_scores, scenes, seed)
    if swaps:
        followed = swap_scores(swaps, worlds, seen)
        _enter(table, table["intervals"], "action_swap", followed, scenes, seed)
    return {
        **table,
        "scenes": scenes,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "size": how.size,
        "model": drawer.model,
        "adapter": drawer.adapter,
    }


def row_orders(
    worlds: Sequence[WorldScene], controlled: bool, fast: bool, clear: bool
) -> dict[str, list[Order]]:
    """The pictures of each row that is drawn: the base's alone, or those of its adapter too."""
    orders = {"base": [Order(i, world.caption) for i, world in enumerate(worlds)]}
    if controlled:
        orders["boxes_only"] = [
            Order(i, w.caption_without_verb, w.interactions(action=False)) for i, w in enumerate(worlds)
        ]
        orders["adapter"] = [Order(i, w.caption, w.interactions()) for i, w in enumerate(worlds)]
    if fast:
        orders["adapter_fast"] = [replace(order, way="fast") for order in orders["adapter"]]
    if controlled and clear:
        orders["adapter_clear"] = [replace(order, way="clear") for order in orders["adapter"]]
    return orders


def _enter(values: dict, intervals: dict, row: str, scores: dict[str, Score], scenes: int, seed: int) -> None:
    entries = {name: with_interval(score, scenes, seed) for name, score in scores.items()}
    values[row] = {name: value for name, (value, _) in entries.items()}
    intervals[row] = {name: list(interval) for name, (_, interval) in entries.items()}


def packaged_detector() -> Detector:
    """The detector that ships with the package.

    Raises:
        ModelError: the install is incomplete.
    """
    folder = model_path("detector")
    try:
        return Detector.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"expected the packaged detector in {folder}, got {reason}") from error


def swap(number: int, world: WorldScene, seed: int) -> Swap:
    """Choose one of a scene's triplets, and order its pictures."""
    chosen = int(np.random.default_rng((seed, number)).integers(len(world.triplets)))
    actions = GROUPS[world.triplets[chosen].group]

    def order(action: str | None) -> Order:
        interactions = list(world.interactions())
        interactions[chosen] = replace(interactions[chosen], action=action)
        return Order(number, world.caption_without_verb, tuple(interactions))

    return Swap(number, chosen, actions, tuple(order(action) for action in actions), order(None))


def swap_scores(
    swaps: Sequence[Swap], worlds: Sequence[WorldScene], seen: dict[Order, Detections]
) -> dict[str, Score]:
    """How often the detected action is the asked one: with it asked, with it null, and by chance."""
    asked = np.array([len(s.actions) for s in swaps])
    follows, stays = np.zeros(len(swaps)), np.zeros(len(swaps))
    for n, s in enumerate(swaps):
        box = worlds[s.scene].triplets[s.chosen].subject_box

        def action_in(order: Order, box: tuple[float, float, float, float] = box) -> str | None:
            person = at_box(seen[order].persons, "person", box)
            return None if person is None else person.action

        follows[n] = sum(action_in(o) == action for o, action in zip(s.pictures, s.actions, strict=True))
        stays[n] = action_in(s.without) in s.actions  # it equals one of them at most
    scores = {"adapter": Share(follows, asked), "boxes_only": Share(stays, asked)}
    return {**scores, "chance": Share(np.ones(len(swaps)), asked)}


def look_at(
    orders: Sequence[Order],
    drawer: ScenePipeline,
    detector: Detector,
    seed: int,
    how: Drawing,
    batch_size: int,
    progress: bool,
    clear: ClearAdapter | None = None,
) -> dict[Order, Detections]:
    """Draw pictures, each once however often it is ordered, and detect what is in them."""
    seen: dict[Order, Detections] = {}
    groups: dict[tuple[bool, str], list[Order]] = {}
    for order in dict.fromkeys(orders):
        groups.setdefault((bool(order.interactions), order.way), []).append(order)
    bar = tqdm(total=sum(map(len, groups.values())), unit="picture", disable=not progress)
    drawer.pipeline.set_progress_bar_config(disable=True)
    for (_, way), group in groups.items():
        windows = way == "clear"
        with linearize(drawer.pipeline, weights=clear, min_tokens=0) if windows else nullcontext():
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                images = draw(batch, drawer, seed, how)
                seen |= zip(batch, detector.detect(shrunk(images)), strict=True)
                bar.update(len(batch))
    bar.close()
    return seen


def draw(orders: Sequence[Order], drawer: ScenePipeline, seed: int, how: Drawing) -> Tensor:
    """Draw a batch of pictures, each with its scene's own noise: [B, 3, H, W] in [0, 1].

    All of them are drawn in one way.
    """
    if drawer.handle is not None:
        drawer.handle.set_scene([order.interactions for order in orders], fast=orders[0].way == "fast")
    noise_seeds = [HELD_OUT + seed * 1_000_000 + order.scene for order in orders]
    prompts = [order.prompt for order in orders]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        drawn = drawer.pipeline(
            **call_arguments(drawer.pipeline, prompts, guidance_scale=how.guidance_scale),
            num_inference_steps=how.steps,
            width=how.size or drawer.size,
            height=how.size or drawer.size,
            generator=[torch.Generator("cpu").manual_seed(s) for s in noise_seeds],
            output_type="pt",
        )
    return drawn.images.float().clamp(0, 1)


def shrunk(images: Tensor) -> Tensor:
    """[B, 3, H, W] pictures, averaged down to the size that the detector looks at if they are larger."""
    return F.adaptive_avg_pool2d(images, SIZE) if min(images.shape[-2:]) > SIZE else images


def look_at_renders(worlds: Sequence[WorldScene], detector: Detector, batch_size: int) -> list[Detections]:
    """Detect what is in renders of the scenes: what the detector misses, no model can score."""
    found: list[Detections] = []
    for first in range(0, len(worlds), batch_size):
        pixels = np.stack([render(world).image for world in worlds[first : first + batch_size]])
        found += detector.detect(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    return found


def format_table(table: dict[str, Any]) -> str:
    """The scores as text: percent, with 95% intervals."""

    def cell(value: float, interval: Sequence[float]) -> str:
        return f"{100 * value:5.1f} [{100 * interval[0]:3.0f}, {100 * interval[1]:3.0f}]"

    def block(kind: str, titles: dict[str, str], corner: str = "%") -> list[str]:
        lines = [f"{corner:20}" + "".join(f"{title:>19}" for title in titles.values())]
        for row, values in table[kind].items():
            ends = table["intervals"][kind][row]
            lines.append(f"{ROWS[row]:20}" + "".join(f"{cell(values[s], ends[s]):>19}" for s in titles))
        return lines

    lines = [*block("rows", SCORES), "", *block("text", TEXT_SCORES, "found anywhere, %"), ""]
    ceiling = table["rows"]["real"]["hoi_map"]
    shares = [
        f"{ROWS[row]} {values['hoi_map'] / ceiling if ceiling else 0:.2f}"
        for row, values in table["rows"].items()
        if row != "real"
    ]
    lines.append("HOI mAP as a share of the ceiling: " + ", ".join(shares))
    swapped, ends = table["action_swap"], table["intervals"]["action_swap"]
    if swapped is not None:
        lines.append(
            f"action swap: adapter {cell(swapped['adapter'], ends['adapter'])}, boxes only "
            f"{cell(swapped['boxes_only'], ends['boxes_only'])}, chance {100 * swapped['chance']:.1f}"
        )
    lines.append(
        f"{table['scenes']} held-out scenes of {table['size']} px, seed {table['seed']}, "
        f"{table['steps']} steps, guidance {table['guidance_scale']:g}, 95% intervals"
    )
    return "\n".join(lines)
