"""Draws pictures of held-out scenes of stickworld, and lets the detector look at them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.clear import ClearAdapter, linearize
from interactdiff.generation import ScenePipeline
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.scene import Entity, Interaction
from interactdiff.stickworld.detector import Detections, Detector
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import GROUPS, HELD_OUT, WorldScene


@dataclass(frozen=True)
class PictureRequest:
    """A picture to draw: of which scene, whose noise it takes, with what content, and in which way.

    `items` empty is the base alone.
    """

    scene: int
    prompt: str
    items: tuple[Interaction | Entity, ...] = ()
    way: Literal["exact", "fast", "clear"] = "exact"


@dataclass(frozen=True)
class Sampling:
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
class ActionSwap:
    """Pictures of one scene that differ in the action of one triplet only.

    Attributes:
        scene: its number.
        triplet: number of that triplet.
        actions: the group's actions, which share their boxes.
        pictures: one for each action.
        without: the same with the action left null.
    """

    scene: int
    triplet: int
    actions: tuple[str, ...]
    pictures: tuple[PictureRequest, ...]
    without: PictureRequest


def held_out_scenes(count: int, seed: int, n_interactions: int | None = None) -> list[WorldScene]:
    """Scenes that no training recipe draws; other seeds give other ones.

    Args:
        count: how many.
        seed: which ones.
        n_interactions: in each scene; None leaves it to the scene's seed.
    """
    return [sample_scene(HELD_OUT + seed * 1_000_000 + i, n_interactions) for i in range(count)]


def row_requests(
    scenes: Sequence[WorldScene], controlled: bool, fast: bool, clear: bool
) -> dict[str, list[PictureRequest]]:
    """The pictures of each row of the table: the base's alone, or those of its adapter too."""
    requests = {"base": [PictureRequest(n, scene.caption) for n, scene in enumerate(scenes)]}
    if controlled:
        requests["boxes_only"] = [
            PictureRequest(
                n, scene.caption_without_verb, (*scene.interactions(action=False), *scene.lone_entities())
            )
            for n, scene in enumerate(scenes)
        ]
        requests["adapter"] = [
            PictureRequest(n, scene.caption, (*scene.interactions(), *scene.lone_entities()))
            for n, scene in enumerate(scenes)
        ]
    if fast:
        requests["adapter_fast"] = [replace(request, way="fast") for request in requests["adapter"]]
    if controlled and clear:
        requests["adapter_clear"] = [replace(request, way="clear") for request in requests["adapter"]]
    return requests


def action_swap(number: int, scene: WorldScene, seed: int) -> ActionSwap:
    """Choose one of a scene's triplets, and request its pictures; the scene has at least one."""
    chosen = int(np.random.default_rng((seed, number)).integers(len(scene.triplets)))
    actions = GROUPS[scene.triplets[chosen].group]

    def request(action: str | None) -> PictureRequest:
        interactions = list(scene.interactions())
        interactions[chosen] = replace(interactions[chosen], action=action)
        return PictureRequest(number, scene.caption_without_verb, (*interactions, *scene.lone_entities()))

    return ActionSwap(number, chosen, actions, tuple(request(action) for action in actions), request(None))


def detect_pictures(
    requests: Sequence[PictureRequest],
    scene_pipeline: ScenePipeline,
    detector: Detector,
    seed: int,
    how: Sampling,
    batch_size: int,
    progress: bool,
    clear: ClearAdapter | None = None,
) -> dict[PictureRequest, Detections]:
    """Draw pictures, each once however often it is requested, and detect what is in them."""
    found: dict[PictureRequest, Detections] = {}
    groups: dict[tuple[bool, str], list[PictureRequest]] = {}
    for request in dict.fromkeys(requests):
        groups.setdefault((bool(request.items), request.way), []).append(request)
    bar = tqdm(total=sum(map(len, groups.values())), unit="picture", disable=not progress)
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    for (_, way), group in groups.items():
        windows = way == "clear"
        with linearize(scene_pipeline.pipeline, weights=clear, min_tokens=0) if windows else nullcontext():
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                images = draw_pictures(batch, scene_pipeline, seed, how)
                found |= zip(batch, detector.detect(reduced(images, detector.size)), strict=True)
                bar.update(len(batch))
    bar.close()
    return found


def draw_pictures(
    requests: Sequence[PictureRequest], scene_pipeline: ScenePipeline, seed: int, how: Sampling
) -> Tensor:
    """Draw a batch of pictures, each with its scene's own noise: [B, 3, H, W] in [0, 1].

    All of them are drawn in one way.
    """
    noise_seeds = [HELD_OUT + seed * 1_000_000 + request.scene for request in requests]
    return draw_batch(
        scene_pipeline,
        [request.prompt for request in requests],
        [request.items for request in requests],
        how,
        fast=requests[0].way == "fast",
        generator=[torch.Generator("cpu").manual_seed(s) for s in noise_seeds],
    )


def draw_batch(
    scene_pipeline: ScenePipeline,
    prompts: Sequence[str],
    items: Sequence[Sequence[Interaction | Entity]],
    how: Sampling,
    *,
    fast: bool = False,
    negative_prompt: str | None = None,
    **noise: Any,
) -> Tensor:
    """Draw a batch of pictures: [B, 3, H, W] in [0, 1].

    Args:
        scene_pipeline: with adapters or without.
        prompts: B captions.
        items: of each picture.
        how: steps, guidance and size.
        fast: whether control is fast.
        negative_prompt: of all pictures.
        **noise: `generator`, one for each picture, or `latents`.
    """
    if scene_pipeline.handle is not None:
        # an option of interactions, which other adapters alone do not know
        scene_pipeline.handle.set_scene(items, **({"fast": True} if fast else {}))
    negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
    drawn = repeatable_call(
        scene_pipeline.pipeline,
        **call_arguments(scene_pipeline.pipeline, list(prompts), negative, how.guidance_scale),
        num_inference_steps=how.steps,
        width=how.size or scene_pipeline.size,
        height=how.size or scene_pipeline.size,
        output_type="pt",
        **noise,
    )
    return drawn.images.float().clamp(0, 1)


def reduced(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] pictures, averaged down to `size` pixels a side if they are larger."""
    return F.adaptive_avg_pool2d(images, size) if min(images.shape[-2:]) > size else images


def render_scenes(scenes: Sequence[WorldScene], size: int) -> Tensor:
    """Renders of scenes: [B, 3, S, S] in [0, 1], `size` pixels a side."""
    pixels = np.stack([render(scene, size).image for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def detect_renders(scenes: Sequence[WorldScene], detector: Detector, batch_size: int) -> list[Detections]:
    """Detect what is in renders of the scenes: what the detector misses, no model can score."""
    found: list[Detections] = []
    for first in range(0, len(scenes), batch_size):
        found += detector.detect(render_scenes(scenes[first : first + batch_size], detector.size))
    return found
