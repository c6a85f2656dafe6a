"""How much of what a caption says is found anywhere in a picture."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import permutations

import numpy as np

from interactdiff.evaluation.attributes import right_attributes
from interactdiff.evaluation.bootstrap import Score, Share
from interactdiff.stickworld.captions import Described
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.world import WorldScene


def text_scores(found: Sequence[Detections], scenes: Sequence[WorldScene]) -> dict[str, Score]:
    """Score pictures by what the scenes' own captions say, wherever that is found.

    A caption says of no place, so boxes do not count here. Each thing that is found stands for at most one
    of the caption, paired so that as many as possible are right. Who does it to what does not count: a person
    who rides a dog counts for riding a bike.

    Args:
        found: by picture.
        scenes: that the pictures should show.

    Returns:
        object_acc: share of the objects of which one of that kind is found; action_acc: share of the triplets
        of which a person doing that is found; colour_acc: share of persons and objects of which a person, or
        an object of that kind, is found in that colour; appearance_acc: of the other attributes that captions
        name, the share that is right of the thing paired with theirs, see `pairs`. It is left out where
        captions name none.
    """
    hits = {name: np.zeros(len(scenes)) for name in ("object_acc", "action_acc", "colour_acc")}
    named, named_hits = np.zeros(len(scenes)), np.zeros(len(scenes))
    for n, (picture, scene) in enumerate(zip(found, scenes, strict=True)):
        things = (*picture.persons, *picture.objects)
        objects = [thing.name for thing in scene.things if thing.name != "person"]
        colours = [(thing.name, thing.appearance.colour) for thing in scene.things]
        actions = [triplet.action for triplet in scene.triplets]
        hits["object_acc"][n] = _shared(objects, [thing.name for thing in picture.objects])
        hits["action_acc"][n] = _shared(actions, [person.action for person in picture.persons])
        hits["colour_acc"][n] = _shared(colours, [(thing.name, thing.colour) for thing in things])
        described = scene.described.things
        for thing, match in zip(described, pairs(described, things), strict=True):
            others = {name: value for name, value in thing.attributes.items() if name != "colour"}
            named[n] += len(others)
            named_hits[n] += right_attributes(match, others)
    totals = {
        "object_acc": [sum(thing.name != "person" for thing in scene.things) for scene in scenes],
        "action_acc": [len(scene.triplets) for scene in scenes],
        "colour_acc": [len(scene.things) for scene in scenes],
    }
    scores: dict[str, Score] = {name: Share(h, np.array(totals[name])) for name, h in hits.items()}
    if named.any():
        scores["appearance_acc"] = Share(named_hits, named)
    return scores


def pairs(described: Sequence[Described], found: Sequence[Found]) -> list[Found | None]:
    """Pair what a caption describes with what is found of the same kind, one to one.

    Of all ways the one in which most of the colours are right, of those the one in which most of the other
    attributes are, and of those the one with the surest detections. None is what is left without a partner.
    """
    partners: list[Found | None] = [None] * len(described)
    for kind in {thing.name for thing in described}:
        numbers = [n for n, thing in enumerate(described) if thing.name == kind]
        of_kind = sorted((thing for thing in found if thing.name == kind), key=lambda thing: -thing.score)
        candidates: list[Found | None] = [*of_kind]
        candidates += [None] * max(0, len(numbers) - len(candidates))

        def value(chosen: tuple[Found | None, ...], numbers: list[int] = numbers) -> tuple[float, ...]:
            things = [described[n].attributes for n in numbers]
            both = list(zip(chosen, things, strict=True))
            colours = sum(f is not None and f.colour == thing.get("colour") for f, thing in both)
            right = sum(right_attributes(f, thing) for f, thing in both)
            return colours, right, sum(f.score for f in chosen if f is not None)

        best = max(permutations(candidates, len(numbers)), key=value)
        for n, match in zip(numbers, best, strict=True):
            partners[n] = match
    return partners


def _shared(wanted: Sequence[Hashable], found: Sequence[Hashable]) -> int:
    """How many of those wanted can be paired with an equal one that is found, one to one."""
    return (Counter(wanted) & Counter(found)).total()
