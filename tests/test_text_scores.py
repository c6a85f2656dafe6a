"""What a caption says that is found anywhere in a picture: detections made by hand."""

from dataclasses import replace

import numpy as np
import pytest
from world_truth import perfect

from interactdiff.evaluation.captions import pairs, text_scores
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.scene import Box
from interactdiff.stickworld.appearance import Appearance, PersonAppearance
from interactdiff.stickworld.captions import Described
from interactdiff.stickworld.detector import Detections, Found
from interactdiff.stickworld.world import Triplet, WorldEntity, WorldScene

HERE: Box = (0.1, 0.1, 0.4, 0.6)
THERE: Box = (0.5, 0.1, 0.8, 0.6)
KICKING_BALL = Triplet("kicking", "ball", PersonAppearance("red"), Appearance("blue"), HERE, HERE, "right")
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
        picture = Detections(tuple(persons[::order]), tuple(objects[::order]), ())
        scores = text_scores([picture], [WorldScene("park", tuple(said), 0)])
        assert list(scores) == ["object_acc", "action_acc", "colour_acc"]  # no other attribute is named
        got = [float(score.value(np.ones((1, 1)))[0]) for score in scores.values()]
        assert got == [right[0] / len(said), right[1] / len(said), right[2] / (2 * len(said))]


def test_lone_entities_count_as_things_that_are_said() -> None:
    lone = (
        WorldEntity("dog", Appearance("red"), HERE, "left"),
        WorldEntity("person", PersonAppearance("blue"), HERE, "left"),
    )
    scene = WorldScene("park", (KICKING_BALL,), 0, lone)
    picture = Detections((KICKER, blue(KICKER)), (BALL, blue(replace(BALL, name="dog"))), ())
    scores = text_scores([picture], [scene])
    got = {name: float(score.value(np.ones((1, 1)))[0]) for name, score in scores.items()}
    assert got == {"object_acc": 1, "action_acc": 1, "colour_acc": 3 / 4}


def test_what_is_said_is_looked_for_in_its_own_picture() -> None:
    scenes = held_out_scenes(30, seed=3)
    pictures = [moved(perfect(scene)) for scene in scenes]
    once = np.ones((1, len(scenes)))
    scores = text_scores(pictures, scenes)
    assert list(scores) == ["object_acc", "action_acc", "colour_acc", "appearance_acc"]
    assert all(score.value(once) == 1 for score in scores.values())
    others = text_scores([*pictures[1:], pictures[0]], scenes)
    assert all(score.value(once) < 0.5 for score in others.values())


def test_of_the_attributes_that_a_caption_names_those_found_on_its_thing_count() -> None:
    scenes = held_out_scenes(30, seed=3)
    named = [
        [(thing, name) for thing in scene.described.things for name in thing.attributes if name != "colour"]
        for scene in scenes
    ]
    total = sum(map(len, named))
    assert total > 30

    def without(attribute: str) -> float:
        pictures = []
        for scene in scenes:
            whole = perfect(scene)
            persons, objects = (
                tuple(
                    replace(one, attributes={n: v for n, v in one.attributes.items() if n != attribute})
                    for one in things
                )
                for things in (whole.persons, whole.objects)
            )
            pictures.append(Detections(persons, objects, ()))
        return float(text_scores(pictures, scenes)["appearance_acc"].value(np.ones((1, len(scenes))))[0])

    for attribute in ("hair", "pattern", "skin"):
        said = sum(name == attribute for scene in named for _, name in scene)
        assert without(attribute) == pytest.approx(1 - said / total)


def test_things_are_paired_by_colour_and_then_by_attributes() -> None:
    def person(colour: str, score: float = 0.5, **attributes: str) -> Found:
        return Found("person", HERE, colour, score, attributes=attributes)

    def said(colour: str, **attributes: str) -> Described:
        return Described("person", {"colour": colour, **attributes}, (0, 1))

    red, curly, spiky = person("red"), person("blue", hair="curly"), person("blue", hair="spiky")
    found = [spiky, red, curly, Found("dog", HERE, "red", 0.9)]
    assert pairs([said("blue", hair="curly"), said("red")], found) == [curly, red]
    assert pairs([said("red"), said("blue"), said("blue", hair="spiky")], found) == [red, curly, spiky]
    assert pairs([said("green", hair="spiky")], found) == [spiky]  # the colour is wrong of all
    assert pairs([said("red", hair="curly")], found) == [red]  # the colour comes first
    assert pairs([said("red")], [red, person("red", 0.9)]) == [person("red", 0.9)]
    assert pairs([said("red"), said("red")], [curly]) in ([curly, None], [None, curly])
    assert pairs([Described("dog", {"colour": "blue"}, (0, 1))], [red]) == [None]


def moved(whole: Detections) -> Detections:
    """The same things elsewhere, in another order."""
    persons, objects = (
        tuple(replace(one, box=THERE) for one in reversed(things))
        for things in (whole.persons, whole.objects)
    )
    return Detections(persons, objects, ())
