"""Scenes for persons and objects whose looks are known, and whether pictures show them.

What stickworld's subjects and concepts are scored by. The prompts name no attribute of what is known.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from interactdiff.evaluation.bootstrap import Share, with_interval
from interactdiff.evaluation.sampling import Sampling
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import EvaluationOptions
from interactdiff.models import MODEL, model_info
from interactdiff.stickworld.appearance import (
    Appearance,
    PersonAppearance,
    sample_object_appearance,
    sample_person_appearance,
)
from interactdiff.stickworld.captions import PLACES, describe_object, describe_person
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import BACKGROUNDS, HELD_OUT, OBJECTS, WorldEntity, WorldScene, wording

PERSON = "person"
_TRIES = 20_000  # scenes among which one is looked for
_STRIP = 0.08  # of the height, at the top and at the bottom: backgrounds differ there


@dataclass(frozen=True)
class Known:
    """A person or an object whose looks are known."""

    name: str
    appearance: Appearance

    @property
    def attributes(self) -> dict[str, str]:
        """Every attribute that can be seen, the colour first."""
        return self.appearance.attributes()


def sample_known(name: str | None, rng: random.Random) -> Known:
    """Draw one, of a kind or of any kind of object."""
    name = name or rng.choice(tuple(OBJECTS))
    return Known(name, (sample_person_appearance if name == PERSON else sample_object_appearance)(rng))


@dataclass(frozen=True)
class KnownScene:
    """A scene with persons and objects whose looks are known.

    Attributes:
        scene: with their appearances.
        numbers: of each that is known, which of the scene's things it is.
    """

    scene: WorldScene
    numbers: tuple[int, ...]


def lone_scene(known: Sequence[Known], seed: int) -> KnownScene:
    """A held-out scene of nothing but these, each by itself.

    Args:
        known: who and what is in it.
        seed: which scene, from 0 up.
    """
    for scene_seed in _scene_seeds(seed):
        scene = sample_scene(scene_seed, 0, len(known))
        if (numbers := _places(known, scene.things)) is not None:
            return _with_looks(scene, known, numbers)
    raise AssertionError(f"no scene of {[one.name for one in known]}")


def acting_scene(known: Sequence[Known], seed: int, other_than: str | None = None) -> KnownScene:
    """A held-out scene in which a person acts on an object, with these in it.

    The first person of those known acts, on the first object of those known; the others stand by.

    Args:
        known: who and what is in it.
        seed: which scene, from 0 up.
        other_than: a background that it does not have.
    """
    actor = next((one for one in known if one.name == PERSON), None)
    target = next((one for one in known if one.name != PERSON), None)
    others = [one for one in known if one is not actor and one is not target]
    for scene_seed in _scene_seeds(seed):
        scene = sample_scene(scene_seed, 1, len(others))
        fits = target is None or scene.triplets[0].object == target.name
        places = _places(others, scene.entities)
        if fits and places is not None and scene.background != other_than:
            standing = iter(places)
            numbers = [0 if one is actor else 1 if one is target else 2 + next(standing) for one in known]
            return _with_looks(scene, known, numbers)
    raise AssertionError(f"no scene of {[one.name for one in known]}")


def _scene_seeds(seed: int) -> range:
    """The seeds of the scenes among which one is looked for; training has none of them."""
    if seed < 0:
        raise ValueError(f"expected a number from 0 up, got {seed}: scenes below it are not held out")
    first = HELD_OUT + seed * _TRIES
    return range(first, first + _TRIES)


def _places(known: Sequence[Known], things: Sequence[WorldEntity]) -> list[int] | None:
    """Which of some things each of those known can be, one to one; None if kinds or numbers differ."""
    left = list(range(len(things)))
    places = []
    for one in known:
        place = next((n for n in left if things[n].name == one.name), None)
        if place is None:
            return None
        left.remove(place)
        places.append(place)
    return None if left else places


def _with_looks(scene: WorldScene, known: Sequence[Known], numbers: Sequence[int]) -> KnownScene:
    looks: list[Appearance | None] = [None] * len(scene.things)
    for one, number in zip(known, numbers, strict=True):
        looks[number] = one.appearance
    return KnownScene(scene.with_appearances(tuple(looks)), tuple(numbers))


def prompt_of(scene: WorldScene, words: Mapping[int, str]) -> str:
    """A scene in words.

    Args:
        scene: one interaction and any entities, or entities alone.
        words: of some of its things, by their numbers; the others are described by kind and colour.
    """
    rng = wording(scene.seed)

    def described(number: int, thing: WorldEntity) -> str:
        if number in words:
            return words[number]
        colour = {"colour": thing.appearance.colour}
        is_person = isinstance(thing.appearance, PersonAppearance)
        return describe_person(colour, rng) if is_person else describe_object(thing.name, colour, rng)

    texts = [described(number, thing) for number, thing in enumerate(scene.things)]
    if scene.triplets:
        texts[:2] = [f"{texts[0]} {scene.triplets[0].action} {texts[1]}"]
    return f"{' and '.join(texts)} {PLACES[scene.background][0]}"


def surest(found: Detections, name: str) -> Found | None:
    """The surest that is found of a kind."""
    of_kind = [one for one in (*found.persons, *found.objects) if one.name == name]
    return max(of_kind, key=lambda one: one.score, default=None)


@cache
def _strips() -> Tensor:
    """[backgrounds, 6]: colours at the top and at the bottom of renders without persons and objects."""
    empty = [render(WorldScene(name, (), 0)).image for name in BACKGROUNDS]
    return torch.stack([_strip(torch.from_numpy(image.copy()).permute(2, 0, 1) / 255) for image in empty])


def _strip(image: Tensor) -> Tensor:
    height = max(1, round(_STRIP * image.shape[1]))
    return torch.cat([part.flatten(1).median(1).values for part in (image[:, :height], image[:, -height:])])


def background_of(image: Tensor) -> str:
    """Which background a picture [3, H, W] in [0, 1] has: the one nearest in colour at top and bottom."""
    distances = (_strips() - _strip(image.float().cpu())).norm(dim=1)
    return BACKGROUNDS[int(distances.argmin())]


class Counts:
    """Hits and totals of scores by group, such as a subject, whose pictures belong together.

    Args:
        groups: how many.
    """

    def __init__(self, groups: int):
        self.groups = groups
        self._hits: dict[str, np.ndarray] = {}
        self._total: dict[str, np.ndarray] = {}

    def add(self, name: str, group: int, hits: float, total: float = 1) -> None:
        """Count for a score: `hits` of `total`."""
        for counts, value in ((self._hits, hits), (self._total, total)):
            counts.setdefault(name, np.zeros(self.groups))[group] += value

    def scores(self, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Shares by the names of scores, and both ends of their 95 % intervals over groups."""
        values = {
            name: with_interval(Share(hits, self._total[name]), self.groups, seed)
            for name, hits in self._hits.items()
        }
        return (
            {name: value for name, (value, _) in values.items()},
            {name: list(interval) for name, (_, interval) in values.items()},
        )


def sampling(pipeline: ScenePipeline, options: EvaluationOptions) -> Sampling:
    """How pictures are drawn: with the guidance that suits the model, unless another is given."""
    guidance = options.guidance_scale
    if guidance is None:
        guidance = model_info(pipeline.model).guidance_scale or model_info(MODEL).guidance_scale
    return Sampling(options.steps, guidance, options.size)


def noise(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each picture's noise, by the seed of its scene."""
    return [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
