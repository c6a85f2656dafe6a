"""Scores subjects on stickworld: one reference picture each, in other actions, places and backgrounds."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.concept.losses import structural_similarity
from interactdiff.errors import AdapterError
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
from interactdiff.evaluation.world import packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import EvaluationOptions
from interactdiff.registry import methods
from interactdiff.scene import Entity
from interactdiff.stickworld.captions import describe_object, describe_person
from interactdiff.stickworld.detector import Detections, Detector, Found
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import WorldScene
from interactdiff.subject.items import Subject
from interactdiff.subject.spec import MASKS, REFERENCE_WEIGHT

ROWS: dict[str, dict[str, float] | None] = {
    "real": None,
    "text": None,
    "text_full": None,
    "encoder": {"reference_weight": 0.0, "guidance": 0.0},
    "attention": {"encoder_weight": 0.0, "guidance": 0.0},
    "both": {"guidance": 0.0},
    "guided": {},
    "placed": {},
}
"""The rows of the table, and what those in which a subject acts fix of the method's settings."""
GUIDANCE = 2.0
"""Of the row guided, where no other is given."""
NEEDS_ENCODER = ("encoder", "both")
PAIRS = "pairs"
"""What `EvaluationOptions.rows` calls the scenes of two persons, which have a table of their own."""
PLACED = "placed"
"""The row with the scene's interaction beside the subject, whose place its box then is."""
SCENES_EACH = 2
"""Pictures of each subject in a row."""
PAIR_WORDS = ("person", "someone")
"""What a prompt calls the two persons of a pair."""
PAIR_SEEDS = 2**52
"""Scenes of pairs have seeds from here on; those of single subjects stay below it."""
_CROP = 64  # pixels a side, at which a picture's person is compared with the reference's


@dataclass(frozen=True)
class SubjectTask:
    """A subject, its reference, and the scenes in which it is wanted.

    Attributes:
        known: what it looks like.
        image: its reference picture.
        mask: which pixels of it are the subject.
        crop: [h, w] in 0..1, the subject in the reference, in grey.
        wanted: the scenes.
    """

    known: Known
    image: Image.Image
    mask: Image.Image
    crop: Tensor
    wanted: tuple[KnownScene, ...]


def evaluate_subjects(pipeline: ScenePipeline, options: EvaluationOptions) -> dict[str, Any]:
    """Draw persons and objects that are known by one reference picture, and let the detector look at them.

    Rows: real renders of what is wanted; text, whose prompt names no attribute of the subject; text_full,
    whose prompt names all; encoder; attention (self-subject attention); both; guided (both with reference
    guidance); placed, with the model's own settings and the scene's interaction in its boxes. Without an
    encoder's weights there are the rows without one, and guided and placed are without it too; without an
    adapter of interactions there is no row placed.

    `options.settings` are those of all rows but where a row fixes its own, of pairs too; with `masks` 0
    references come without their masks. What is not given is the model's own, but for the weight of
    self-subject attention in rows, which is then the method's.

    Columns: identity, the share of the subject's attributes that are right; action_acc and object_acc,
    whether the person does the action and the object is there; background_acc; copy, the structural
    similarity of the subject to that of the reference, at the same size, from 0 to 1: high is the reference's
    pose again.

    pairs: two persons with a reference and a place each. identity; scr, the subject collapse rate: the share
    of pictures in which not each of the two is more like its own reference than like the other's.

    Args:
        pipeline: with a subject adapter attached.
        options: `scenes` is the number of subjects and of pairs.

    Returns:
        {"rows": {row: {column: share}}, "intervals": likewise, both ends, "pairs": {"identity", "scr"},
        "subjects"}; of `options.rows`, if there are some, those and "pairs" alone.

    Raises:
        SceneError: there is no such row.
        AdapterError: a row needs an encoder, or an adapter of interactions, and there is none; or a setting
            does not suit the base.
    """
    detector = (options.detector or packaged_detector()).to(pipeline.denoiser.device)
    size = options.size or pipeline.size
    tasks = [subject_task(n, options.seed, size) for n in range(options.scenes)]
    assert pipeline.handle is not None
    has_encoder = pipeline.handle["subject"].adapter.config is not None
    rows = chosen_rows((*ROWS, PAIRS), options.rows)
    _configure(pipeline, options.settings)  # refused before anything is drawn
    if not has_encoder:
        if missing := [row for row in options.rows if row in NEEDS_ENCODER]:
            raise AdapterError(f"expected a subject encoder for the row {missing[0]}, got an adapter without")
        rows = [row for row in rows if row not in NEEDS_ENCODER]
    if pipeline.adapter is None:
        if PLACED in options.rows:
            raise AdapterError(f"expected an adapter of interactions for the row {PLACED}, got none")
        rows = [row for row in rows if row != PLACED]
    table: dict[str, Any] = {"rows": {}, "intervals": {}}
    for row in tqdm(rows, unit="row"):
        if row == PAIRS:
            table[PAIRS] = _pairs(pipeline, detector, options, size)
            continue
        counts = _row(row, tasks, pipeline, detector, options)
        table["rows"][row], table["intervals"][row] = counts.scores(options.seed)
    return {**table, "subjects": options.scenes}


def subject_task(number: int, seed: int, size: int) -> SubjectTask:
    """A subject to be drawn, the same for the same number and seed: in turn a person and an object.

    Args:
        number: which.
        seed: of all.
        size: height and width of its reference in pixels.
    """
    rng = random.Random(f"subject {seed} {number}")
    known = sample_known(PERSON if number % 2 == 0 else None, rng)
    first = (seed * 100_000 + number) * (SCENES_EACH + 1)
    reference = lone_scene([known], first).scene
    image, mask, crop = _reference(reference, size)
    wanted = [acting_scene([known], first + 1 + n, reference.background) for n in range(SCENES_EACH)]
    return SubjectTask(known, image, mask, crop, tuple(wanted))


def _reference(scene: Any, size: int) -> tuple[Image.Image, Image.Image, Tensor]:
    drawn = render(scene, size)
    (thing,) = drawn.things
    pixels = torch.from_numpy(drawn.image.copy()).permute(2, 0, 1) / 255
    mask = Image.fromarray(thing.mask.astype(np.uint8) * 255)
    return Image.fromarray(drawn.image), mask, _crop(pixels, thing.box)


def _crop(image: Tensor, box: Sequence[float]) -> Tensor:
    """[_CROP, _CROP] in 0..1: a part of a picture [3, H, W], in grey."""
    height, width = image.shape[1:]
    x0, x1 = (min(max(round(x * width), 0), width - 1) for x in (box[0], box[2]))
    y0, y1 = (min(max(round(y * height), 0), height - 1) for y in (box[1], box[3]))
    part = image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean(0, keepdim=True)
    return F.interpolate(part[None].float().cpu(), (_CROP, _CROP), mode="bilinear", antialias=True)[0, 0]


def _full_words(known: Known, rng: random.Random) -> str:
    if known.name == PERSON:
        return describe_person(known.attributes, rng)
    return describe_object(known.name, known.attributes, rng)


def row_settings(row: str, given: Mapping[str, float]) -> dict[str, float]:
    """The settings of a row: those that are given but for those that it fixes; none where no subject acts.

    Where none is given, self-subject attention has the method's weight and acts without boxes, also of models
    that do without it, and reference guidance adds the row that pipelines of one row a call need. The row
    placed has the model's own.
    """
    fixed = ROWS[row]
    if fixed is None:
        return {}
    if row == PLACED:
        return dict(given)
    own = {"guidance": GUIDANCE, "reference_weight": REFERENCE_WEIGHT.default}
    return {**own, "attention_without_box": 1, "extra_row": 1, **given, **fixed}


def _row(
    row: str,
    tasks: Sequence[SubjectTask],
    pipeline: ScenePipeline,
    detector: Detector,
    options: EvaluationOptions,
) -> Counts:
    counts = Counts(len(tasks))
    jobs = [(n, one) for n, task in enumerate(tasks) for one in task.wanted]
    _configure(pipeline, row_settings(row, options.settings))
    for first in range(0, len(jobs), options.batch_size):
        batch = jobs[first : first + options.batch_size]
        if row == "real":
            images = render_scenes([one.scene for _, one in batch], detector.size)
        else:
            prompts, items = [], []
            for n, one in batch:
                known = tasks[n].known
                rng = random.Random(one.scene.seed)
                words = _full_words(known, rng) if row == "text_full" else f"a {known.name}"
                prompts.append(prompt_of(one.scene, {one.numbers[0]: words}))
                subject = Subject(known.name, tasks[n].image, _mask(tasks[n].mask, options))
                placed = one.scene.interactions(colours=False) if row == PLACED else ()
                items.append([] if ROWS[row] is None else [subject, *placed])
            images = _drawn(pipeline, prompts, items, [one.scene.seed for _, one in batch], options)
        for (n, one), image, found in zip(batch, images, _detected(images, detector), strict=True):
            _count(counts, n, tasks[n], one, image, found)
    return counts


def _count(
    counts: Counts, group: int, task: SubjectTask, wanted: KnownScene, image: Tensor, found: Detections
) -> None:
    known, (triplet,) = task.known, wanted.scene.triplets
    match, actor = surest(found, known.name), surest(found, PERSON)
    counts.add("identity", group, right_attributes(match, known.attributes), len(known.attributes))
    counts.add("action_acc", group, actor is not None and actor.action == triplet.action)
    counts.add("object_acc", group, surest(found, triplet.object) is not None)
    counts.add("background_acc", group, background_of(image) == wanted.scene.background)
    alike = 0.0 if match is None else float(structural_similarity(_crop(image, match.box), task.crop))
    counts.add("copy", group, max(alike, 0.0))


def _pairs(
    pipeline: ScenePipeline, detector: Detector, options: EvaluationOptions, size: int
) -> dict[str, float]:
    counts = Counts(options.scenes)
    places = pipeline.adapter is not None
    _configure(pipeline, options.settings)
    pairs = [_pair(n, options.seed) for n in range(options.scenes)]
    for first in range(0, len(pairs), options.batch_size):
        batch = pairs[first : first + options.batch_size]
        prompts, items = [], []
        for pair in batch:
            one = pair.wanted
            boxes = [one.scene.things[n].box for n in one.numbers]
            words = dict(zip(one.numbers, ("a person", "someone"), strict=True))
            prompts.append(prompt_of(one.scene, words))
            of_scene: list[Any] = []
            for word, box, alone in zip(PAIR_WORDS, boxes, pair.references, strict=True):
                image, mask, _ = _reference(alone, size)
                of_scene.append(Subject(word, image, _mask(mask, options), box))
                if places:
                    of_scene.append(Entity(word, box))
            items.append(of_scene)
        seeds = [pair.wanted.scene.seed for pair in batch]
        images = _drawn(pipeline, prompts, items, seeds, options)
        seen = zip(batch, _detected(images, detector), strict=True)
        for number, (pair, found) in enumerate(seen, first):
            _count_pair(counts, number, pair.known, pair.wanted, found)
    return counts.scores(options.seed)[0]


@dataclass(frozen=True)
class _Pair:
    """Two persons, the scene in which they are wanted, and a scene of each alone."""

    known: tuple[Known, ...]
    wanted: KnownScene
    references: tuple[WorldScene, ...]


def _pair(number: int, seed: int) -> _Pair:
    rng = random.Random(f"pair {seed} {number}")
    known = tuple(sample_known(PERSON, rng) for _ in PAIR_WORDS)
    first = PAIR_SEEDS + (seed * 100_000 + number) * (1 + len(known))
    references = tuple(lone_scene([one], first + 1 + k).scene for k, one in enumerate(known))
    return _Pair(known, lone_scene(known, first), references)


def _count_pair(
    counts: Counts, group: int, known: Sequence[Known], wanted: KnownScene, found: Detections
) -> None:
    one, other = (one.attributes for one in known)
    places = [wanted.scene.things[n].box for n in wanted.numbers]
    at_one, at_other = nearest_two(found.persons, places)
    own = right_attributes(at_one, one), right_attributes(at_other, other)
    counts.add("identity", group, sum(own), len(one) + len(other))
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}

    def likeness(match: Found | None, attributes: dict[str, str]) -> int:
        return right_attributes(match, {k: v for k, v in attributes.items() if k in differ})

    apart = all(
        match is not None and likeness(match, mine) > likeness(match, theirs)
        for match, mine, theirs in ((at_one, one, other), (at_other, other, one))
    )
    counts.add("scr", group, not apart)


def nearest_two(
    persons: Sequence[Found], places: Sequence[Sequence[float]]
) -> tuple[Found | None, Found | None]:
    """Which of the two surest persons is at which of two places, by the distance of their middles."""

    def distance(person: Found, place: Sequence[float]) -> float:
        dx, dy = (sum(person.box[n::2]) - sum(place[n::2]) for n in (0, 1))
        return (dx * dx + dy * dy) ** 0.5 / 2

    two = sorted(persons, key=lambda person: -person.score)[:2]
    if len(two) < 2:
        pair: list[Found | None] = [None, None]
        if two:
            pair[int(distance(two[0], places[1]) < distance(two[0], places[0]))] = two[0]
        return pair[0], pair[1]
    straight = distance(two[0], places[0]) + distance(two[1], places[1])
    crossed = distance(two[1], places[0]) + distance(two[0], places[1])
    return (two[0], two[1]) if straight <= crossed else (two[1], two[0])


def _mask(mask: Image.Image, options: EvaluationOptions) -> Image.Image | None:
    return mask if options.settings.get(MASKS.name, MASKS.default) else None


def _configure(pipeline: ScenePipeline, settings: Mapping[str, float]) -> None:
    assert pipeline.handle is not None
    settings = {name: value for name, value in settings.items() if name != MASKS.name}
    pipeline.handle["subject"].configure(**methods()["subject"].checked(pipeline.model, settings))


def _drawn(
    pipeline: ScenePipeline,
    prompts: Sequence[str],
    items: Sequence[Sequence[Any]],
    seeds: Sequence[int],
    options: EvaluationOptions,
) -> Tensor:
    return draw_batch(pipeline, prompts, items, sampling(pipeline, options), generator=noise(seeds))


def _detected(images: Tensor, detector: Detector) -> list[Detections]:
    return detector.detect(reduced(images, detector.size))
