"""Scores of detections that are known by hand."""

from dataclasses import replace

import numpy as np
import pytest
from world_truth import exact, perfect

from interactdiff.evaluation.attributes import head_accuracies, identity, right_attributes
from interactdiff.evaluation.bootstrap import Share, with_interval
from interactdiff.evaluation.hoi import (
    WORLD,
    at_box,
    found_at,
    hoi_map,
    iou,
    picture_scores,
)
from interactdiff.evaluation.hoi_precision import class_precision
from interactdiff.evaluation.sampling import (
    held_out_scenes,
)
from interactdiff.evaluation.table import format_scores
from interactdiff.scene import Box
from interactdiff.stickworld.appearance import Appearance, PersonAppearance
from interactdiff.stickworld.detector import Detections, Found, FoundTriplet
from interactdiff.stickworld.world import Triplet, WorldEntity, WorldScene

HERE: Box = (0.1, 0.1, 0.4, 0.6)
THERE: Box = (0.5, 0.1, 0.8, 0.6)


def triplet(
    action: str = "kicking", thing: str = "ball", person: Box = HERE, object_box: Box = THERE
) -> Triplet:
    return Triplet(action, thing, PersonAppearance("red"), Appearance("blue"), person, object_box, "right")


def found_triplet(
    action: str = "kicking",
    thing: str = "ball",
    person: Box = HERE,
    object_box: Box = THERE,
    score: float = 0.9,
) -> FoundTriplet:
    subject = Found("person", person, "red", score, action)
    return FoundTriplet(subject, action, Found(thing, object_box, "blue", score), score)


def value(found: list[list[FoundTriplet]], truth: list[list[Triplet]]) -> float:
    return float(hoi_map(found, truth).value(np.ones((1, len(truth))))[0])


def test_scores_of_a_method_are_lines_or_rows_of_the_same_table() -> None:
    assert format_scores({"inside": 0.5, "out": 0.25}) == "inside  0.500\nout     0.250"
    rows = {"real": {"identity": 0.75, "alike": 0.5}, "subject": {"identity": 0.5, "alike": 0.25}}
    lines = format_scores({"rows": rows, "intervals": {"subject": {"identity": [0.4, 0.6]}}}).splitlines()
    assert lines[0].split() == ["%", "identity", "alike"]
    assert lines[1].split() == ["real", "renders", "75.0", "50.0"]
    assert lines[2].split() == ["subject", "50.0", "[", "40,", "60]", "25.0"]


def test_iou_of_boxes_known_by_hand() -> None:
    assert iou(HERE, HERE) == pytest.approx(1)
    assert iou(HERE, THERE) == 0
    assert iou((0, 0, 0.4, 0.4), (0.2, 0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize(
    ("right", "positives", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([1, 0], 1, 1.0),  # a wrong one after everything is found costs nothing
        ([0, 1], 1, 1 / 2),
        ([1, 0, 1], 2, (1 + 2 / 3) / 2),
        ([0, 1, 1], 2, 2 / 3),  # the envelope lifts 1/2 to 2/3
        ([1], 4, 1 / 4),
        ([], 3, 0.0),
    ],
)
def test_average_precision_by_hand(right: list[int], positives: int, expected: float) -> None:
    correct = np.array(right, dtype=bool)
    got = class_precision(correct, np.ones((1, len(right))), np.array([positives]), WORLD)
    assert got == pytest.approx([expected])


def slow_average_precision(right: list[bool], times: list[int], positives: int) -> float:
    """The definition: for each right one, the best precision at its recall or beyond."""
    precisions = []
    for last in range(1, len(right) + 1):
        hits = sum(n for hit, n in zip(right[:last], times[:last], strict=True) if hit)
        precisions.append(hits / max(sum(times[:last]), 1))
    gains = [n * max(precisions[k:]) for k, (hit, n) in enumerate(zip(right, times, strict=True)) if hit]
    return sum(gains) / positives


def test_average_precision_equals_the_slow_one_for_scenes_taken_any_number_of_times() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        right, times = rng.random(12) < 0.5, rng.integers(0, 3, 12)
        positives = int((times * right).sum()) + int(rng.integers(1, 4))
        got = class_precision(right, times[None].astype(float), np.array([positives]), WORLD)
        assert got == pytest.approx([slow_average_precision(right.tolist(), times.tolist(), positives)])


def test_map_of_perfect_detections_is_one_and_of_swapped_boxes_zero() -> None:
    scenes = held_out_scenes(20, seed=3)
    found, wanted = [list(perfect(s).triplets) for s in scenes], [list(s.triplets) for s in scenes]
    assert value(found, wanted) == pytest.approx(1)
    assert value([[found_triplet(person=THERE, object_box=HERE)]], [[triplet()]]) == 0


def test_map_counts_a_triplet_once() -> None:
    twice = [[found_triplet(score=0.9), found_triplet(score=0.8)]]
    assert value(twice, [[triplet()]]) == 1
    assert value(twice, [[triplet(), triplet(person=THERE, object_box=HERE)]]) == pytest.approx(1 / 2)


def test_map_looks_in_the_right_picture_and_at_both_boxes_and_the_class() -> None:
    assert value([[], [found_triplet()]], [[triplet()], []]) == 0
    assert value([[found_triplet(object_box=HERE)]], [[triplet()]]) == 0
    assert value([[found_triplet(action="pushing")]], [[triplet()]]) == 0
    assert value([[found_triplet(thing="box")]], [[triplet()]]) == 0
    # IoU of exactly one half is not above it
    assert (
        value([[found_triplet(person=(0.0, 0.0, 1.0, 0.5))]], [[triplet(person=(0.0, 0.0, 1.0, 1.0))]]) == 0
    )


def test_map_is_the_mean_over_classes_and_ranks_over_pictures() -> None:
    wanted = [[triplet()], [triplet()], [triplet("riding", "bike")]]
    found = [[found_triplet(score=0.5)], [found_triplet(person=THERE, score=0.9)], []]
    assert value(found, wanted) == pytest.approx(((1 / 2) / 2 + 0) / 2)
    found = [[found_triplet(score=0.9)], [found_triplet(person=THERE, score=0.5)], []]
    assert value(found, wanted) == pytest.approx((1 / 2 + 0) / 2)


def test_shares_of_boxes_actions_and_colours() -> None:
    person, ball = Found("person", HERE, "green", 0.9, "kicking"), Found("ball", THERE, "blue", 0.9)
    far = triplet("riding", "bike", (0.0, 0.7, 0.1, 0.9), (0.2, 0.7, 0.3, 0.9))
    scene = WorldScene("park", (triplet(), far), 0)
    scores = picture_scores([Detections((person,), (ball,), ())], [scene])
    once = np.ones((1, 1))
    assert scores["box_acc"].value(once) == pytest.approx([2 / 4])
    assert scores["action_acc"].value(once) == pytest.approx([1 / 2])
    assert scores["colour_acc"].value(once) == pytest.approx([1 / 4])
    assert scores["hoi_map"].value(once) == pytest.approx([0])


def test_the_best_overlapping_thing_of_the_kind_is_at_a_box() -> None:
    near = Found("ball", (0.5, 0.1, 0.8, 0.5), "red", 0.99)
    exact, other = Found("ball", THERE, "blue", 0.2), Found("box", THERE, "red", 1.0)
    assert at_box([near, exact, other], "ball", THERE) is exact
    assert at_box([near, exact, other], "dog", THERE) is None
    assert at_box([near, exact, other], "ball", HERE) is None


def test_interval_holds_the_value_and_narrows_with_scenes() -> None:
    def width(scenes: int) -> float:
        hits = np.arange(scenes) % 4 != 0
        got, (low, high) = with_interval(Share(hits.astype(float), np.ones(scenes)), scenes)
        assert got == pytest.approx(0.75)
        assert low < got < high
        # the binomial's own, 2 * 1.96 standard errors
        assert high - low == pytest.approx(3.92 * (0.75 * 0.25 / scenes) ** 0.5, rel=0.15)
        return high - low

    assert width(400) < width(40)
    assert with_interval(Share(np.ones(5), np.ones(5)), 5) == (1.0, (1.0, 1.0))


def test_bootstrap_of_map_equals_scoring_the_scenes_again() -> None:
    wanted = [[triplet()], [triplet()], [triplet("riding", "bike")]]
    found = [
        [found_triplet(score=0.9)],
        [found_triplet(person=THERE, score=0.8)],
        [found_triplet("riding", "bike", score=0.7)],
    ]
    score = hoi_map(found, wanted)
    for taken in ([0, 1], [2], [0, 1, 2], [1, 2]):
        counts = np.isin(np.arange(3), taken).astype(float)[None]
        again = value([found[i] for i in taken], [wanted[i] for i in taken])
        assert score.value(counts) == pytest.approx([again])


def test_lone_entities_count_by_their_boxes_and_colours() -> None:
    lone = (
        WorldEntity("person", PersonAppearance("green"), HERE, "left"),
        WorldEntity("dog", Appearance("red"), THERE, "left"),
    )
    scene = WorldScene("park", (), 0, lone)
    person, dog = Found("person", HERE, "green", 0.9), Found("dog", THERE, "blue", 0.9)
    scores = picture_scores([Detections((person,), (dog,), ())], [scene])
    got = {name: float(score.value(np.ones((1, 1)))[0]) for name, score in scores.items()}
    assert got == {"hoi_map": 0, "box_acc": 1, "action_acc": 0, "colour_acc": 1 / 2}


def test_identity_is_the_share_of_attributes_that_are_right_at_the_boxes() -> None:
    look = PersonAppearance("red", "dots", "white", "curly", "grey", "none", None, "brown", "tan")
    lone = (
        WorldEntity("person", look, HERE, "left"),
        WorldEntity("dog", Appearance("red", "plain"), THERE, "left"),
    )
    scene = WorldScene("park", (), 0, lone)
    person = replace(exact(lone[0]), colour="blue")
    person.attributes.pop("hair")
    assert right_attributes(person, look.attributes()) == 6  # of 8: two are wrong
    assert right_attributes(None, look.attributes()) == 0
    once = np.ones((1, 1))
    both = Detections((person,), (exact(lone[1]),), ())
    assert identity([both], [scene]).value(once) == pytest.approx([8 / 10])
    missing = Detections((replace(person, box=THERE),), (), ())
    assert identity([missing], [scene]).value(once) == 0
    assert found_at(both, lone[1]) == exact(lone[1])


def test_accuracies_of_heads_are_over_those_that_have_the_attribute() -> None:
    scenes = held_out_scenes(40, seed=3)
    assert set(head_accuracies([perfect(scene) for scene in scenes], scenes).values()) == {1.0}
    plain = Appearance("red", "plain")
    dotted = Appearance("red", "dots", "white")
    lone = (WorldEntity("dog", plain, HERE, "left"), WorldEntity("dog", dotted, THERE, "left"))
    dogs = tuple(replace(exact(one), attributes={"pattern": "dots", "second_colour": "blue"}) for one in lone)
    person = WorldEntity("person", PersonAppearance("red"), (0.0, 0.6, 0.3, 1.0), "left")
    idle = replace(exact(person), action="kicking")
    got = head_accuracies([Detections((idle,), dogs, ())], [WorldScene("park", (), 0, (*lone, person))])
    assert got == {
        "action": 0, "object": 1, "object.colour": 1, "object.pattern": 1 / 2, "object.second_colour": 0,
        "person": 1, **{f"person.{name}": 1 for name in person.appearance.attributes()},
    }  # fmt: skip
