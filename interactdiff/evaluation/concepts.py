"""Scores concepts on stickworld: two or three things of one photo, learned, then drawn in other scenes."""

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.concept import Concept, ConceptAdapter, LearnOptions, NotFoundError, learn
from interactdiff.evaluation.attributes import right_attributes
from interactdiff.evaluation.likeness import (
    PERSON,
    Counts,
    Known,
    KnownScene,
    acting_scene,
    background_of,
    lone_scene,
    noise,
    prompt_of,
    sample_known,
    sampling,
    surest,
)
from interactdiff.evaluation.sampling import draw_batch, reduced, render_scenes
from interactdiff.evaluation.table import chosen_rows
from interactdiff.evaluation.words import mask_iou
from interactdiff.evaluation.world import packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.handle import attach
from interactdiff.method_specs import EvaluationOptions
from interactdiff.stickworld.detector import Detections, Detector
from interactdiff.stickworld.render import Rendering, render
from interactdiff.stickworld.world import OBJECTS

ROWS = ("real", "untrained", "custom_diffusion", "no_attention_loss", "ours", "given_masks")
SHARED = (
    "steps",
    "batch_size",
    "learning_rate",
    "token_learning_rate",
    "weight_decay",
    "max_timestep",
    "mixed_precision",
    "prefix",
    "size",
    "seed",
    "vectors",
)
"""Options that the row custom_diffusion takes over from those of ours."""
SCENES_EACH = 4
"""New scenes in which each concept is drawn alone, and in which all are drawn together."""


@dataclass(frozen=True)
class _Photo:
    """A photo, what is in it, and the scenes in which that is wanted.

    Attributes:
        known: what the things of the photo look like.
        drawn: the photo, with a mask of each.
        numbers: of each, which of `drawn.things` it is.
        background: of the photo.
        concepts: a token and a word for each.
        wanted: scenes, each with the numbers of the concepts that are in it.
    """

    known: tuple[Known, ...]
    drawn: Rendering
    numbers: tuple[int, ...]
    background: str
    concepts: tuple[Concept, ...]
    wanted: tuple[tuple[tuple[int, ...], KnownScene], ...]

    @property
    def masks(self) -> dict[str, Tensor]:
        """[S, S] where each concept is, by its token."""
        pairs = zip(self.concepts, self.numbers, strict=True)
        return {c.token: torch.from_numpy(self.drawn.things[n].mask.copy()).float() for c, n in pairs}


def evaluate_concepts(
    pipeline: ScenePipeline, options: EvaluationOptions, learning: LearnOptions | None = None
) -> dict[str, Any]:
    """Learn the persons and objects of photos, draw them in new scenes, and let the detector look.

    Rows: real renders of what is wanted; untrained tokens; custom_diffusion, without masks, on all words;
    no_attention_loss; ours; given_masks, the renderer's. A photo in which a concept is not found counts with
    untrained tokens; "not_found" has the share of such photos by row.

    Columns: mask_iou, of the masks that are used at the end with the renderer's; identity, the share of a
    concept's attributes that are right; leakage, of what can come over from the photo, the share that does:
    its background into a scene with another one, and attributes of one concept onto another that has others;
    text_acc, whether the action is done and the background is the one wanted; seconds, of learning a photo.

    Args:
        pipeline: whose base concepts are learned on.
        options: `scenes` is the number of photos; `changes` are options of `LearnOptions`, over `learning`.
        learning: how concepts are learned; None for the defaults.

    Returns:
        {"rows": {row: {column: value}}, "intervals": likewise, both ends, "not_found": {row: share},
        "photos"}.

    Raises:
        ConceptError: a change is no option, or out of range.
        SceneError: there is no such row.
    """
    detector = (options.detector or packaged_detector()).to(pipeline.denoiser.device)
    rows = chosen_rows(ROWS, options.rows)
    size = options.size or pipeline.size
    photos = [_photo(n, options.seed, size) for n in range(options.scenes)]
    table: dict[str, Any] = {"rows": {}, "intervals": {}}
    changes = {"prefix": "a ", **LearnOptions.parsed(options.changes, ("seed",), ("sample_every",))}
    learning = replace(learning or LearnOptions(), size=size, seed=options.seed, **changes)
    missed: dict[str, float] = {}
    bar = tqdm(total=len(rows) * len(photos), unit="photo")
    for row in rows:
        counts, seconds = Counts(len(photos)), []
        for n, photo in enumerate(photos):
            adapter = None
            if row != "real":
                start = time.perf_counter()
                adapter, found = _learned(row, pipeline.pipeline, photo, learning)
                seconds.append(time.perf_counter() - start)
                if row in ("no_attention_loss", "ours"):
                    _count_masks(counts, n, photo, found or {})
                    missed[row] = missed.get(row, 0.0) + (found is None) / len(photos)
            _draw(counts, n, photo, adapter, pipeline, detector, options)
            bar.update()
        table["rows"][row], table["intervals"][row] = counts.scores(options.seed)
        if seconds and row != "untrained":
            table["rows"][row]["seconds"] = sum(seconds) / len(seconds)
    bar.close()
    return {**table, **({"not_found": missed} if missed else {}), "photos": options.scenes}


def _photo(number: int, seed: int, size: int) -> _Photo:
    rng = random.Random(f"photo {seed} {number}")
    names = [PERSON, *rng.sample(sorted(OBJECTS), 1 + number % 2)]
    known = tuple(sample_known(name, rng) for name in names)
    first = (seed * 100_000 + number) * 100
    shown = lone_scene(known, first)
    concepts = tuple(Concept(f"<{n}{name}>", name) for n, name in enumerate(names))
    sets = [*((k,) for k in range(len(known))), tuple(range(len(known)))]
    wanted = []
    for chosen in sets:
        for _ in range(SCENES_EACH):
            first += 1
            scene = acting_scene([known[k] for k in chosen], first, shown.scene.background)
            wanted.append((chosen, scene))
    drawn = render(shown.scene, size)
    return _Photo(known, drawn, shown.numbers, shown.scene.background, concepts, tuple(wanted))


def _learned(
    row: str, pipeline: Any, photo: _Photo, learning: LearnOptions
) -> tuple[ConceptAdapter, dict[str, Tensor] | None]:
    """The adapter of a row, and the masks that it ended with; None where a concept is not found."""
    concepts = [replace(concept, vectors=learning.vectors) for concept in photo.concepts]
    untrained = ConceptAdapter.for_pipeline(pipeline, concepts).eval()
    if row == "untrained":
        return untrained, {}
    shared = {name: getattr(learning, name) for name in SHARED}
    options = {
        "custom_diffusion": LearnOptions.custom_diffusion(**shared),
        "no_attention_loss": replace(learning, attention_loss="none"),
    }.get(row, learning)
    masks = photo.masks if row == "given_masks" else None
    image = Image.fromarray(photo.drawn.image)
    try:
        adapter = learn(pipeline, image, concepts, options=options, masks=masks)
    except NotFoundError:
        return untrained, None
    found = adapter.masks
    if found is None:
        return adapter, {}
    return adapter, {c.token: found[n].float() for n, c in enumerate(photo.concepts)}


def _count_masks(counts: Counts, group: int, photo: _Photo, found: dict[str, Tensor]) -> None:
    for token, truth in photo.masks.items():
        overlap = 0.0
        if token in found:
            shape = (1, 1, *found[token].shape)
            enlarged = torch.nn.functional.interpolate(found[token].view(shape), truth.shape)[0, 0]
            overlap = mask_iou(enlarged.numpy() > 0.5, truth.numpy() > 0.5)
        counts.add("mask_iou", group, overlap)


def _draw(
    counts: Counts,
    group: int,
    photo: _Photo,
    adapter: ConceptAdapter | None,
    pipeline: ScenePipeline,
    detector: Detector,
    options: EvaluationOptions,
) -> None:
    """Draw what is wanted of a photo with an adapter, or render it, and count what is right."""
    with nullcontext() if adapter is None else attach(pipeline.pipeline, adapter):
        for first in range(0, len(photo.wanted), options.batch_size):
            batch = photo.wanted[first : first + options.batch_size]
            scenes = [one.scene for _, one in batch]
            if adapter is None:
                images = render_scenes(scenes, detector.size)
            else:
                images = draw_batch(
                    pipeline,
                    [prompt_of(one.scene, _words(photo, chosen, one)) for chosen, one in batch],
                    [()] * len(batch),
                    sampling(pipeline, options),
                    generator=noise([scene.seed for scene in scenes]),
                )
            found = detector.detect(reduced(images, detector.size))
            for (chosen, one), image, detections in zip(batch, images, found, strict=True):
                _count(counts, group, photo, chosen, one, image, detections)


def _words(photo: _Photo, chosen: Sequence[int], wanted: KnownScene) -> dict[int, str]:
    tokens = [photo.concepts[k].token for k in chosen]
    return {n: f"a {token}" for n, token in zip(wanted.numbers, tokens, strict=True)}


def _count(
    counts: Counts,
    group: int,
    photo: _Photo,
    chosen: Sequence[int],
    wanted: KnownScene,
    image: Tensor,
    found: Detections,
) -> None:
    background = background_of(image)
    (triplet,), actor = wanted.scene.triplets, surest(found, PERSON)
    counts.add("text_acc", group, actor is not None and actor.action == triplet.action)
    counts.add("text_acc", group, background == wanted.scene.background)
    counts.add("leakage", group, background == photo.background)
    for k in chosen:
        own = photo.known[k].attributes
        match = surest(found, photo.known[k].name)
        counts.add("identity", group, right_attributes(match, own), len(own))
    own_place = dict(zip(chosen, wanted.numbers, strict=True))
    for n, thing in enumerate(wanted.scene.things):
        match, mine = surest(found, thing.name), thing.appearance.attributes()
        for k, other in enumerate(photo.known):
            theirs = {name: value for name, value in other.attributes.items() if name in mine}
            foreign = {name: value for name, value in theirs.items() if mine[name] != value}
            if match is not None and foreign and own_place.get(k) != n:
                counts.add("leakage", group, right_attributes(match, foreign), len(foreign))
