"""What a caption says that is found anywhere in a picture: detections made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from interactdiff.evaluation.hoi import text_scores
from interactdiff.evaluation.world import held_out_scenes
from interactdiff.scene import Box
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.world import Triplet, WorldScene

HERE: Box = (0.1, 0.1, 0.4, 0.6)
THERE: Box = (0.5, 0.1, 0.8, 0.6)
KICKING_BALL = Triplet("kicking", "ball", "red", "blue", HERE, HERE, "right")
RIDING_BALL = replace(KICKING_BALL, action="riding")
KICKING_BIKE = replace(KICKING_BALL, object="bike")
RIDING_BIKE = replace(KICKING_BIKE, action="riding")
KICKER = Found("person", THERE, "red", 0.6, "kicking")
RIDER = replace(KICKER, action="riding")
BALL = Found("ball", THERE, "blue", 0.6)
BIKE = replace(BALL, name="bike")
BOX = replace(BALL, name="box")


def blue(person: Found) -> Found:
    return replace(person, colour="blue")


def red(thing: Found) -> Found:
    return replace(thing, colour="red")


# persons, objects, what was said, how many objects, actions, colours are right
PICTURES = {
    "elsewhere": ([KICKER], [BALL], [KICKING_BALL], (1, 1, 2)),
    "nothing": ([], [], [KICKING_BALL], (0, 0, 0)),
    "wrong in every respect": ([blue(RIDER)], [BOX], [KICKING_BALL], (0, 0, 0)),
    "more than was said": ([KICKER, KICKER], [BALL, BALL], [KICKING_BALL], (1, 1, 2)),
    "one thing for two": ([KICKER], [BALL], [KICKING_BALL, KICKING_BALL], (1, 1, 2)),
    "another kind has the colour": ([KICKER], [red(BALL), BOX], [KICKING_BALL], (1, 1, 1)),
    "person and object have changed colours": ([blue(KICKER)], [red(BALL)], [KICKING_BALL], (1, 1, 0)),
    "one action, two colours": ([blue(KICKER), RIDER], [BALL], [KICKING_BALL], (1, 1, 2)),
    "another order": ([RIDER, KICKER], [BIKE, BALL], [KICKING_BALL, RIDING_BIKE], (2, 2, 4)),
    "the first of a kind has another colour": ([KICKER], [red(BALL), BALL], [KICKING_BALL], (1, 1, 2)),
    "who does it to what": ([KICKER, RIDER], [BALL, BIKE], [RIDING_BALL, KICKING_BIKE], (2, 2, 4)),
}


@pytest.mark.parametrize(("persons", "objects", "said", "right"), PICTURES.values(), ids=PICTURES.keys())
def test_each_thing_found_stands_for_one_that_was_said(
    persons: list[Found], objects: list[Found], said: list[Triplet], right: tuple[int, int, int]
) -> None:
    for order in (1, -1):
        seen = Detections(tuple(persons[::order]), tuple(objects[::order]), ())
        scores = text_scores([seen], [said])
        assert list(scores) == ["object_acc", "action_acc", "colour_acc"]
        got = [float(score.value(np.ones((1, 1)))[0]) for score in scores.values()]
        assert got == [right[0] / len(said), right[1] / len(said), right[2] / (2 * len(said))]


def perfect(world: WorldScene) -> Detections:
    persons = (Found("person", THERE, t.subject_colour, 1.0, t.action) for t in world.triplets)
    objects = (Found(t.object, THERE, t.object_colour, 1.0) for t in world.triplets)
    return Detections(tuple(persons), tuple(objects), ())


def test_what_is_said_is_looked_for_in_its_own_picture() -> None:
    worlds = held_out_scenes(20, seed=3)
    said, seen = [w.triplets for w in worlds], [perfect(w) for w in worlds]
    once = np.ones((1, len(worlds)))
    assert all(score.value(once) == 1 for score in text_scores(seen, said).values())
    others = text_scores([*seen[1:], seen[0]], said)
    assert all(score.value(once) < 0.5 for score in others.values())
