"""V-COCO's role AP: cases known by hand."""

import math
from typing import Any

import pytest

from interactdiff.errors import DataError
from interactdiff.evaluation.vcoco import (
    DetectedRole,
    RolePerson,
    mean_role_precision,
    role_precisions,
    vcoco_truth,
)

HERE, THERE, FAR = (0.0, 0.0, 40.0, 80.0), (30.0, 30.0, 90.0, 90.0), (200.0, 0.0, 240.0, 80.0)
HIT, CUT = ("hit", "instr"), ("cut", "obj")


def person(role: Any = HIT, thing: Any = THERE, box: Any = HERE, does: bool = True) -> RolePerson:
    return RolePerson(box, {role[0]: does}, {role: thing})


def detected(score: float, thing: Any = THERE, box: Any = HERE, role: Any = HIT) -> DetectedRole:
    return DetectedRole(role, box, thing, score)


def value(truth: list[list[RolePerson]], found: list[list[DetectedRole]], scenario: Any = 1) -> float:
    return role_precisions(truth, found, [HIT], scenario)[HIT]


@pytest.mark.parametrize("scenario", [1, 2])
def test_a_perfect_detector_scores_one_and_a_wrong_one_nothing(scenario: Any) -> None:
    truth = [[person(), person(box=FAR)], [person()]]
    found = [[detected(0.5), detected(0.9, box=FAR)], [detected(0.1)]]
    assert value(truth, found, scenario) == 1
    assert value(truth, [[], []], scenario) == 0
    assert value([[person()]], [[detected(0.9, role=CUT)]], scenario) == 0
    assert value([[person()]], [[detected(0.9, thing=FAR)]], scenario) == 0
    assert value([[person()]], [[detected(0.9, box=FAR)]], scenario) == 0
    assert value([[person(does=False)], [person()]], [[detected(0.9)], [detected(0.5)]], scenario) == 1 / 2


def test_scenarios_differ_where_the_truth_has_no_object() -> None:
    for thing, expected in ((None, {1: 1, 2: 1}), (THERE, {1: 0, 2: 1})):
        for scenario, want in expected.items():
            assert value([[person(thing=None)]], [[detected(0.9, thing=thing)]], scenario) == want
    # and where the detection has none, both want one
    assert [value([[person()]], [[detected(0.9, thing=None)]], scenario) for scenario in (1, 2)] == [0, 0]


def test_a_person_counts_once_and_the_area_is_of_all_points() -> None:
    assert value([[person()]], [[detected(0.9), detected(0.8)]]) == 1
    assert value(
        [[person()], [person()]], [[detected(0.9), detected(0.8)], [detected(0.7)]]
    ) == pytest.approx((1 + 2 / 3) / 2)


def test_persons_without_labels_count_neither_way_and_the_best_overlap_decides() -> None:
    unlabelled = RolePerson(HERE)
    assert value([[unlabelled], [person()]], [[detected(0.9)], [detected(0.5)]]) == 1
    nobody: list[RolePerson] = []
    assert value([nobody, [person()]], [[detected(0.9)], [detected(0.5)]]) == 1 / 2
    shifted = (4.0, 0.0, 44.0, 80.0)
    truth = [[person(box=shifted, does=False), person()]]
    assert value(truth, [[detected(0.9)]]) == 1
    assert value(truth, [[detected(0.9, box=shifted)]]) == 0


def test_an_action_that_nobody_does_is_left_out_of_the_mean() -> None:
    got = role_precisions([[person()]], [[detected(0.9)]], [HIT, CUT, ("point", "instr")], 1)
    assert math.isnan(got[CUT])
    assert mean_role_precision(got | {("point", "instr"): 0.0}) == 1
    assert mean_role_precision({CUT: float("nan")}) == 0


def test_flat_lists_are_read_role_by_role() -> None:
    boxes: dict[int, Any] = {11: HERE, 12: FAR, 21: THERE, 22: (1.0, 2.0, 3.0, 4.0)}
    cut = {
        "action_name": "cut",
        "role_name": ["agent", "instr", "obj"],
        "image_id": [7, 8],
        "ann_id": [11, 12],
        "label": [1, 0],
        "role_object_id": [11, 12, 21, 0, 22, 0],
    }
    walk = {
        "action_name": "walk",
        "role_name": ["agent"],
        "image_id": [7],
        "ann_id": [11],
        "label": [1],
        "role_object_id": [11],
    }
    persons, roles = vcoco_truth([cut, walk], boxes)
    assert roles == [("cut", "instr"), ("cut", "obj")]
    assert persons[7] == [
        RolePerson(HERE, {"cut": True, "walk": True}, {("cut", "instr"): THERE, ("cut", "obj"): boxes[22]})
    ]
    assert persons[8] == [RolePerson(FAR, {"cut": False}, {("cut", "instr"): None, ("cut", "obj"): None})]
    with pytest.raises(DataError, match="cut: expected 6 of role_object_id, got 5"):
        vcoco_truth([{**cut, "role_object_id": [11, 12, 21, 0, 22]}], boxes)
    with pytest.raises(DataError, match="expected an annotation of COCO, got id 22"):
        vcoco_truth([cut], {11: HERE, 12: FAR, 21: THERE})
