"""V-COCO's role AP: cases known by hand, random ones against a slow way, and from annotations to a table."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import noise

from interactdiff.cli import main
from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run
from interactdiff.errors import DataError
from interactdiff.evaluation.detection import DetectedPair, Instance, PictureDetections, to_row
from interactdiff.evaluation.hoi_precision import average_precisions
from interactdiff.evaluation.vcoco import (
    SCENARIOS,
    DetectedRole,
    Role,
    RoleEvaluator,
    RolePerson,
    RolePrecisions,
    RoleTruth,
)

HERE, THERE, FAR = (0.0, 0.0, 40.0, 80.0), (30.0, 30.0, 90.0, 90.0), (200.0, 0.0, 240.0, 80.0)
HIT, CUT = ("hit", "instr"), ("cut", "obj")


def person(role: Any = HIT, thing: Any = THERE, box: Any = HERE, does: bool = True) -> RolePerson:
    return RolePerson(box, {role[0]: does}, {role: thing})


def detected(score: float, thing: Any = THERE, box: Any = HERE, role: Any = HIT) -> DetectedRole:
    return DetectedRole(role, box, thing, score)


def evaluator_of(
    truth: list[list[RolePerson]], found: list[list[DetectedRole]], roles: list[Role]
) -> RoleEvaluator:
    evaluator = RoleEvaluator(roles)
    for persons, detections in zip(truth, found, strict=True):
        evaluator.add(persons, detections)
    return evaluator


def value(truth: list[list[RolePerson]], found: list[list[DetectedRole]], scenario: int = 1) -> float:
    outcomes = evaluator_of(truth, found, [HIT]).outcomes()
    return float(average_precisions(outcomes, SCENARIOS[scenario], np.ones((1, len(truth))))[0, 0])


@pytest.mark.parametrize("scenario", [1, 2])
def test_a_perfect_detector_scores_one_and_a_wrong_one_nothing(scenario: int) -> None:
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
    outcomes = evaluator_of([[person()]], [[detected(0.9)]], [HIT, CUT]).outcomes()
    once = np.ones((1, 1))
    assert RolePrecisions((outcomes,)).values(once)["vcoco.scenario_1"] == [1]
    none = RoleEvaluator([HIT]).outcomes()
    assert RolePrecisions((none,)).values(np.ones((1, 0)))["vcoco.scenario_2"] == [0]


def slow(truth: list[list[RolePerson]], found: list[list[DetectedRole]], scenario: int) -> float:
    """The definition, one detection at a time."""

    def overlap(a: Any, b: Any) -> float:
        sides = [min(a[n + 2], b[n + 2]) - max(a[n], b[n]) + 1 for n in (0, 1)]
        shared = sides[0] * sides[1] if min(sides) > 0 else 0
        areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
        return shared / (sum(areas) - shared)

    positives = sum(one.actions.get("hit", False) for persons in truth for one in persons)
    order = sorted(
        ((picture, one) for picture, ones in enumerate(found) for one in ones),
        key=lambda pair: -pair[1].score,
    )
    taken, hits, precision = set(), [], []
    for picture, one in order:
        overlaps = [overlap(other.box, one.person) for other in truth[picture]]
        best = overlaps.index(max(overlaps)) if overlaps else None
        owner = None if best is None else truth[picture][best]
        if owner is not None and not owner.actions:
            continue
        thing = None if owner is None else owner.roles.get(HIT)
        if thing is None:
            matches = scenario == 2 or one.object is None
        else:
            matches = one.object is not None and overlap(thing, one.object) >= 0.5
        does = owner is not None and owner.actions.get("hit", False) and max(overlaps) >= 0.5
        hits.append(does and matches and (picture, best) not in taken)
        if hits[-1]:
            taken.add((picture, best))
        precision.append(sum(hits) / len(hits))
    if not positives:
        return math.nan
    return sum(max(precision[n:]) for n, hit in enumerate(hits) if hit) / positives


def test_random_pictures_score_as_the_definition_says() -> None:
    rng = np.random.default_rng(0)

    def box() -> Any:
        x, y = rng.integers(0, 12, 2)
        return (float(x), float(y), float(x + rng.choice([9, 19])), float(y + rng.choice([9, 14])))

    seen = set()
    for _ in range(60):
        truth, found = [], []
        for _ in range(3):
            persons = [
                RolePerson(
                    box(), {"hit": bool(rng.random() < 0.7)}, {HIT: box() if rng.random() < 0.7 else None}
                )
                if rng.random() < 0.8
                else RolePerson(box())
                for _ in range(rng.integers(0, 4))
            ]
            near = [(one.box, one.roles.get(HIT) or box()) for one in persons] or [(box(), box())]
            ones = []
            for _ in range(rng.integers(0, 6)):
                who, what = near[rng.integers(len(near))]
                thing = (what, box(), None)[rng.integers(3)]
                ones.append(
                    DetectedRole(
                        HIT, who if rng.random() < 0.7 else box(), thing, rng.choice([0.2, 0.5, 0.9])
                    )
                )
            truth.append(persons)
            found.append(ones)
        for scenario in SCENARIOS:
            got = value(truth, found, scenario)
            assert got == pytest.approx(slow(truth, found, scenario), nan_ok=True)
            seen.add(round(got, 3))
    assert len(seen) > 20


def annotations(folder: Path) -> None:
    """Two pictures of V-COCO: one cuts a cake with a knife, one has a person without labels."""
    folder.mkdir()
    boxes = {
        11: (0, 0, 41, 81),
        12: (50, 0, 41, 81),
        21: (30, 30, 61, 61),
        22: (1, 2, 3, 3),
        13: (5, 5, 30, 50),
    }
    instances = {
        "images": [
            {"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "width": 128, "height": 96} for n in (7, 8)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cake"}, {"id": 3, "name": "knife"}],
        "annotations": [
            {
                "id": number,
                "image_id": 8 if number in (12, 13) else 7,
                "category_id": {21: 3, 22: 2}.get(number, 1),
                "bbox": box,
                "iscrowd": int(number == 13),
            }
            for number, box in boxes.items()
        ],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    cut = {
        "action_name": "cut",
        "role_name": ["agent", "instr", "obj"],
        "image_id": [7, 8],
        "ann_id": [11, 12],
    }
    point = {"action_name": "point", "role_name": ["agent", "instr"], "image_id": [8], "ann_id": [12]}
    ride = {"action_name": "ride", "role_name": ["agent", "instr"], "image_id": [8], "ann_id": [12]}
    said = [
        {**cut, "label": [1, 0], "role_object_id": [11, 12, 21, 0, 22, 0]},  # agents, knives, cakes
        {**point, "label": [1], "role_object_id": [12, 0]},
        {**ride, "label": [1], "role_object_id": [12, 0]},
    ]
    (folder / "vcoco_test.json").write_text(json.dumps(said))
    (folder / "val2014").mkdir()
    for one in instances["images"]:
        noise(128, 96).save(folder / "val2014" / str(one["file_name"]))


def test_annotations_become_persons_and_a_table_has_role_ap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    annotations(tmp_path / "vcoco")
    truth = RoleTruth.read(Path("vcoco"), "test")
    assert truth.roles == (("cut", "instr"), ("cut", "obj"), ("ride", "instr"))  # without point
    run("vcoco", "vcoco", Path("data"), Options())
    names = [f"COCO_val2014_{n:012}.jpg" for n in (7, 8)]

    def found(thing: int | None) -> None:
        knife, cake = Instance("knife", (30, 30, 90, 90), 1.0), Instance("cake", (1, 2, 3, 4), 1.0)
        pairs = DetectedPair(0, 0, "cutting with", 0.9), DetectedPair(0, 1, "cutting", 0.8)
        cuts = PictureDetections((128, 96), (Instance("person", (0, 0, 40, 80), 1.0),), (knife, cake), pairs)
        person = Instance("person", (50, 0, 90, 80), 1.0), Instance("person", (5, 5, 34, 54), 1.0)
        riding = DetectedPair(0, thing, "riding", 0.7), DetectedPair(1, 0, "riding", 0.9)
        rides = PictureDetections((128, 96), person, (knife,), riding)
        rows = [to_row(name, one) for name, one in zip(names, (cuts, rides), strict=True)]
        Path("found.jsonl").write_text("\n".join(rows) + "\n")

    command = ["evaluate", "--data", "data", "--detector", "file:found.jsonl", "--protocol", "exact"]
    command += ["--vcoco", "vcoco", "--json"]
    found(None)
    assert main([*command, "a.json"]) == 0
    assert "| role AP, % | V-COCO, scenario 1 | V-COCO, scenario 2 |" in capsys.readouterr().out
    row = json.loads(Path("a.json").read_text())["rows"]["detections"]
    assert (row["vcoco.scenario_1"], row["vcoco.scenario_2"]) == (1, 1)
    found(0)  # an object where the truth has none; the surest rider is a crowd, which counts neither way
    assert main([*command, "b.json"]) == 0
    row = json.loads(Path("b.json").read_text())["rows"]["detections"]
    assert (row["vcoco.scenario_1"], row["vcoco.scenario_2"]) == (pytest.approx(2 / 3), 1)
    capsys.readouterr()
    assert main(["evaluate", "--compare", "a.json", "b.json"]) == 0
    assert "| detections | V-COCO, scenario 1 | -33.33 [" in capsys.readouterr().out


def test_annotations_that_do_not_fit_are_named(tmp_path: Path) -> None:
    annotations(tmp_path / "vcoco")
    file = tmp_path / "vcoco/vcoco_test.json"
    said = json.loads(file.read_text())
    for change, message in (
        ({"role_object_id": [11, 12, 21, 0, 22]}, "cut: expected 6 of role_object_id, got 5"),
        ({"role_object_id": [11, 12, 99, 0, 22, 0]}, "cut: expected an annotation of COCO, got id 99"),
        ({"ann_id": [21, 12]}, "cut: expected a person, got id 21"),
        ({"image_id": [9, 8]}, "expected the picture 9 in COCO's instances, got none"),
    ):
        file.write_text(json.dumps([{**said[0], **change}]))
        with pytest.raises(DataError, match=message):
            RoleTruth.read(tmp_path / "vcoco", "test")
    with pytest.raises(DataError, match=r"expected vcoco_val\.json in"):
        RoleTruth.read(tmp_path / "vcoco", "val")
