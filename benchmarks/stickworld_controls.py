"""What controls and savings are worth, measured on held-out scenes of stickworld with the same noise.

    python benchmarks/stickworld_controls.py refresh     # fast control: when to compute anew
    python benchmarks/stickworld_controls.py windows     # windowed attention in the fusers, not kept
    python benchmarks/stickworld_controls.py skip        # leaving fusers out that add least, not kept
    python benchmarks/stickworld_controls.py strength    # of one interaction, the others at 1
    python benchmarks/stickworld_controls.py region      # action region between or union
    python benchmarks/stickworld_controls.py entities    # which token roles an entity takes

docs/performance.md and docs/interaction.md have the tables.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.bench.interaction import BASES, operations
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.bootstrap import with_interval
from interactdiff.evaluation.hoi import at_box, iou, picture_scores
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.evaluation.world import packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.interaction import active_scene
from interactdiff.interaction.fuser import GatedSelfAttention, KeysValues
from interactdiff.scene import Box, Entity
from interactdiff.schedule import refreshes
from interactdiff.stickworld.detector import Detections
from interactdiff.stickworld.world import HELD_OUT, WorldScene

BATCH = 20


class World:
    """The packaged model and detector, and some scenes.

    Args:
        scenes: how many.
        seed: which ones, and their noise.
        steps: denoising steps.
    """

    def __init__(self, scenes: int, seed: int, steps: int):
        self.scene_pipeline = ScenePipeline.from_pretrained("stickworld", device="cpu")
        self.detector = packaged_detector()
        self.scene_pipeline.pipeline.set_progress_bar_config(disable=True)
        self.scenes, self.seed, self.steps = held_out_scenes(scenes, seed), seed, steps

    def detect(self, items: list[list[Any]], fast: bool = False) -> list[Detections]:
        """Generate the scenes with these items, one list for each, and detect what is in the pictures."""
        assert self.scene_pipeline.handle is not None
        detections: list[Detections] = []
        for first in tqdm(range(0, len(items), BATCH), unit="batch", leave=False):
            numbers = range(first, min(first + BATCH, len(items)))
            self.scene_pipeline.handle.set_scene([items[n] for n in numbers], fast=fast)
            noise = [HELD_OUT + self.seed * 1_000_000 + n for n in numbers]
            pictures = self.scene_pipeline.pipeline(
                prompt=[self.scenes[n].caption for n in numbers],
                generator=[torch.Generator().manual_seed(s) for s in noise],
                num_inference_steps=self.steps,
                guidance_scale=4.0,
                output_type="pt",
            ).images
            detections += self.detector.detect(pictures.float().clamp(0, 1))
        return detections

    def show(self, title: str, detections: list[Detections]) -> None:
        """Print the scores of a row."""
        scores = picture_scores(detections, self.scenes)
        cells = []
        for name, score in scores.items():
            value, (low, high) = with_interval(score, len(self.scenes))
            cells.append(f"{name} {100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]")
        print(f"{title:28}" + "  ".join(cells), flush=True)

    @property
    def items(self) -> list[list[Any]]:
        """What the scenes ask for."""
        return [list(scene.interactions()) for scene in self.scenes]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another function in a place for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def refresh(world: World) -> None:
    """Fast control with several plans of when to compute anew."""
    world.show("exact", world.detect(world.items))
    plans: dict[str, Callable[[int], bool]] = {
        "squares (kept)": refreshes,
        "gaps grow by one": lambda step: math.isqrt(8 * step + 1) ** 2 == 8 * step + 1,
        "every 2nd": lambda step: step % 2 == 0,
        "every 3rd": lambda step: step % 3 == 0,
        "every 4th": lambda step: step % 4 == 0,
        "every 6th": lambda step: step % 6 == 0,
    }
    for title, plan in plans.items():
        computed = sum(map(plan, range(world.steps)))
        with replaced(active_scene, "refreshes", plan):
            world.show(f"{title}, {computed} of {world.steps}", world.detect(world.items, fast=True))


def windows(world: World) -> None:
    """Visual tokens attend in windows of half the grid's side, and to all interaction tokens."""
    world.show("exact", world.detect(world.items))
    with replaced(GatedSelfAttention, "_attend", attend_in_windows(8)):
        world.show("windows of 8 at 16x16", world.detect(world.items))
    for name, base in BASES.items():
        full = operations(base)["exact_over_plain"]
        with replaced(GatedSelfAttention, "_attend", attend_in_windows(16)):
            windowed = operations(base)["exact_over_plain"]
        print(f"{name}: operations over plain {full:.2f}, with windows of 16 {windowed:.2f}")


def attend_in_windows(window: int) -> Callable[..., Tensor]:
    """The fuser's attention in windows of this side, on square grids that windows divide."""

    def attend(
        fuser: GatedSelfAttention,
        x: Tensor,
        objects: KeysValues,
        positions: Tensor | float,
        attn_mask: Tensor | None,
    ) -> Tensor:
        visual = fuser.norm1(x) + positions
        side = round(x.shape[1] ** 0.5)
        count = max(1, side // window)

        def split(t: Tensor) -> Tensor:
            return (
                t.unflatten(1, (count, side // count, count, side // count))
                .transpose(2, 3)
                .flatten(3, 4)
                .flatten(0, 2)
            )

        def repeat(t: Tensor) -> Tensor:
            return t.repeat_interleave(count * count, 0)

        attn = fuser.attn
        q, k, v = (split(project(visual)) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn_mask is not None:
            attn_mask = F.pad(split(attn_mask), (q.shape[1], 0))[:, None].to(q.dtype)
        keys, values = torch.cat([k, repeat(objects.keys)], 1), torch.cat([v, repeat(objects.values)], 1)
        read = attn(q, keys, values, attn_mask)
        blocks = read.unflatten(0, (-1, count, count)).unflatten(3, (side // count, side // count))
        return blocks.transpose(2, 3).flatten(1, 4)

    return attend


def skip(world: World) -> None:
    """Leave out the fusers that add least to their tokens, by the mean of |added| / |x| over a batch."""
    handle = world.scene_pipeline.handle
    assert handle is not None
    shares: dict[str, list[float]] = {}
    update = GatedSelfAttention.update
    paths = {id(fuser): path for path, fuser in handle["interaction"].adapter.fusers.items()}

    def measured(fuser: GatedSelfAttention, x: Tensor, attended: Tensor, *rest: Any) -> Tensor:
        updated = update(fuser, x, attended, *rest)
        share = (updated - attended).norm() / (x + attended).norm()
        shares.setdefault(paths[id(fuser)], []).append(share.item())
        return updated

    with replaced(GatedSelfAttention, "update", measured):
        world.show("exact", world.detect(world.items))
    order = sorted(shares, key=lambda path: float(np.mean(shares[path])))
    for path in order:
        print(f"  {path}: adds {np.mean(shares[path]):.3f} of its tokens")
    for count in (1, 2, 3):
        left_out = {id(handle["interaction"].adapter.fusers[path]) for path in order[:count]}

        def without(
            fuser: GatedSelfAttention, x: Tensor, attended: Tensor, *rest: Any, out: set[int] = left_out
        ) -> Tensor:
            return attended if id(fuser) in out else update(fuser, x, attended, *rest)

        with replaced(GatedSelfAttention, "update", without):
            world.show(f"without the {count} least", world.detect(world.items))


def strength(world: World) -> None:
    """The first interaction of scenes with two, at several strengths; the second stays at 1."""
    world.scenes = [scene for scene in world.scenes if len(scene.triplets) == 2]
    print(f"{len(world.scenes)} scenes with two interactions; found: both its boxes and its action")
    for value in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        items = [[replace(a, strength=value), b] for a, b in world.items]
        detections = world.detect(items)
        found = [
            np.mean([_drawn(s, scene, which) for s, scene in zip(detections, world.scenes, strict=True)])
            for which in (0, 1)
        ]
        first, second = (f"{100 * share:.0f}%" for share in found)
        print(f"strength {value:4.2f}: the first is found in {first}, the second in {second}", flush=True)


def _drawn(detections: Detections, scene: WorldScene, which: int) -> bool:
    triplet = scene.triplets[which]
    person = at_box(detections.persons, "person", triplet.subject_box)
    thing = at_box(detections.objects, triplet.object, triplet.object_box)
    return person is not None and thing is not None and person.action == triplet.action


def region(world: World) -> None:
    """Where the action's token is seen, or says it is: between the boxes, or within the box around both."""
    for name in ("between", "union"):
        items = [[replace(i, action_region=name) for i in scene] for scene in world.items]
        world.show(name, world.detect(items))


def entities(world: World) -> None:
    """A lone coloured ball beside one interaction, its tokens in several roles."""
    chance = random.Random(world.seed)
    balls: list[tuple[str, Box]] = []
    scenes = []
    for scene in world.scenes:
        if len(scene.triplets) == 1 and (box := _free_box(scene, chance)) is not None:
            balls.append((chance.choice(["red", "blue", "green", "yellow"]), box))
            scenes.append(scene)
    world.scenes = scenes
    print(f"{len(scenes)} scenes with one interaction and room for a ball")
    world.show("without a ball", world.detect(world.items))
    position_net = type(world.scene_pipeline.handle["interaction"].adapter.position_net)  # type: ignore[union-attr]
    forward = position_net.forward
    for title, without in (("subject", 2), ("object", 0), ("subject and object (kept)", None)):

        def in_role(net: Any, drop: int | None = without, **scene: Tensor) -> Tensor:
            made, empty = (
                forward(net, **scene),
                forward(net, **scene | {"masks": torch.zeros_like(scene["masks"])}),
            )
            alone = (scene["subject_boxes"] == scene["object_boxes"]).all(-1) & (scene["masks"] > 0)
            dropped = torch.zeros(3, dtype=torch.bool)
            if drop is not None:
                dropped[drop] = True
            null = (dropped[None, :, None] & alone[:, None]).flatten(1)
            return torch.where(null[..., None], empty, made)

        with replaced(position_net, "forward", in_role):
            items = [[*i, Entity(f"{c} ball", b)] for i, (c, b) in zip(world.items, balls, strict=True)]
            detections = world.detect(items)
        found = [at_box(s.objects, "ball", box) for s, (_, box) in zip(detections, balls, strict=True)]
        there = np.mean([f is not None for f in found])
        right = np.mean([f is not None and f.colour == c for f, (c, _) in zip(found, balls, strict=True)])
        print(f"as {title}: a ball in {100 * there:.0f}%, of the right colour in {100 * right:.0f}%")
        world.show("", detections)


def _free_box(scene: WorldScene, chance: random.Random) -> Box | None:
    taken = (scene.triplets[0].subject_box, scene.triplets[0].object_box)
    for _ in range(200):
        side = chance.uniform(0.2, 0.3)
        x, y = chance.uniform(0, 1 - side), chance.uniform(0.35, 0.98 - side)
        box = (x, y, x + side, y + side)
        if all(iou(box, other) == 0 for other in taken):
            return box
    return None


def main() -> None:
    """Run one of them."""
    ways = (refresh, windows, skip, strength, region, entities)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[way.__name__ for way in ways])
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    quiet_libraries()
    with torch.no_grad():
        {way.__name__: way for way in ways}[args.what](World(args.scenes, args.seed, args.steps))


if __name__ == "__main__":
    main()
