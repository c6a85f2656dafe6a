"""mAP by every protocol: what the published evaluators gave, for all hoi_map*.json in $GOLDEN_DIR."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interactdiff.evaluation.hoi_matching import HoiEvaluator, Pairs, iou, suppressed
from interactdiff.evaluation.hoi_precision import average_precisions, mean_of_classes
from interactdiff.evaluation.hoi_protocols import ARANGE, LINSPACE, PROTOCOLS
from interactdiff.evaluation.hoi_reference import OnePair, reference_average_precisions

FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
FILES = sorted(FOLDER.glob("hoi_map*.json"))
CASES = [(file, name) for file in FILES for name in json.loads(file.read_text())["expected"]]
DIGITS = 1e-6


def pictures_of(golden: dict[str, Any]) -> list[Any]:
    """All pictures in their order; those that only truth or detections name come last."""
    rows = (*golden.get("ground_truth", []), *golden.get("detections", []))
    return list(dict.fromkeys([*golden.get("images", []), *(row["image"] for row in rows)]))


def known_pictures(golden: dict[str, Any]) -> list[set[Any]]:
    """The pictures that hold each class's object: all, where the file does not say."""
    known = golden.get("known_object_images") or {}
    return [set(known.get(cls, pictures_of(golden))) for cls in golden["classes"]]


def fast(golden: dict[str, Any], name: str, known_object: bool) -> list[float]:
    numbers = {cls: number for number, cls in enumerate(golden["classes"])}
    rows: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for kind in ("ground_truth", "detections"):
        for row in golden.get(kind, []):
            rows.setdefault((kind, row["image"]), []).append(row)

    def pairs(kind: str, image: Any) -> Pairs:
        ones = rows.get((kind, image), [])
        return Pairs.of(
            [numbers[one["cls"]] for one in ones],
            [one["human"] for one in ones],
            [one["object"] for one in ones],
            [one.get("score", 1.0) for one in ones],
        )

    known = known_pictures(golden)
    evaluator = HoiEvaluator([PROTOCOLS[name]], len(numbers), prepare=False)
    for image in pictures_of(golden):
        holds = np.array([image in of_class for of_class in known], dtype=bool)
        evaluator.add(pairs("ground_truth", image), pairs("detections", image), holds)
    once = np.ones((1, evaluator.pictures))
    return average_precisions(evaluator.outcomes(), PROTOCOLS[name], once, known_object)[0].tolist()


def slow(golden: dict[str, Any], name: str, known_object: bool) -> list[float]:
    numbers = {cls: number for number, cls in enumerate(golden["classes"])}
    places = {image: place for place, image in enumerate(pictures_of(golden))}
    truth, found = (
        [
            OnePair(
                places[row["image"]], numbers[row["cls"]], row["human"], row["object"], row.get("score", 1.0)
            )
            for row in golden.get(kind, [])
        ]
        for kind in ("ground_truth", "detections")
    )
    known = None
    if known_object:
        known = {
            number: {places[image] for image in images if image in places}
            for number, images in enumerate(known_pictures(golden))
        }
    return reference_average_precisions(truth, found, len(numbers), PROTOCOLS[name], known)


def check_values(golden: dict[str, Any], name: str, way: Any) -> None:
    """Every value that the file has of a protocol, to 6 digits; null is a class that is left out."""
    expected = golden["expected"][name]
    for key, known_object in (("ap", False), ("known_object", True)):
        got = dict(zip(golden["classes"], way(golden, name, known_object), strict=True))
        want = {cls: math.nan if one is None else one for cls, one in expected.get(key, {}).items()}
        assert {cls: got[cls] for cls in want} == pytest.approx(want, rel=0, abs=DIGITS, nan_ok=True)
    if "mean" in expected:
        mean = mean_of_classes(np.array([way(golden, name, False)]))[0]
        assert mean == pytest.approx(expected["mean"] or 0, rel=0, abs=DIGITS)


@pytest.mark.parametrize("way", [fast, slow], ids=["fast", "slow"])
@pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{file.stem}-{name}" for file, name in CASES])
def test_average_precisions_are_the_published_evaluators(file: Path, name: str, way: Any) -> None:
    check_values(json.loads(file.read_text()), name, way)


@pytest.mark.parametrize("way", [fast, slow], ids=["fast", "slow"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_files_without_pictures_truth_or_detections_are_scored(name: str, way: Any) -> None:
    boxes = {"human": [0, 0, 9, 9], "object": [5, 5, 30, 30]}
    truth, found = {"image": "a", "cls": "ride", **boxes}, {"image": "a", "cls": "ride", **boxes, "score": 1}
    empty = PROTOCOLS[name].empty
    without = None if empty == "left out" else 0
    undetected = {"ride": without, "hold": without}
    detected = {"ride": 0 if empty == "zero" else None, "hold": without}
    for images, truths, founds, want in (
        ([], [], [], undetected),
        (["a", "b"], [], [], undetected),
        (["a"], [], [found], detected),
        (["a"], [truth], [], {"ride": 0, "hold": without}),
        (["a"], [truth], [found], {"ride": 1, "hold": without}),
        ([], [truth], [found], {"ride": 1, "hold": without}),  # a picture that the list of them lacks
    ):
        expected = {"ap": want, "known_object": want}
        golden = {"images": images, "classes": ["ride", "hold"], "expected": {name: expected}}
        check_values({**golden, "ground_truth": truths, "detections": founds}, name, way)
        nowhere = {"ride": [], "hold": []}  # no picture holds their objects: as if there were none
        expected = {"ap": want, "known_object": undetected}
        golden |= {"known_object_images": nowhere, "expected": {name: expected}}
        check_values({**golden, "ground_truth": truths, "detections": founds}, name, way)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_pairs_are_suppressed_as_fgahoi_does(file: Path) -> None:
    golden = json.loads(file.read_text()).get("pair_nms")
    if not golden or not golden["scores"]:
        pytest.skip("no pair suppression in this file")
    count = len(golden["scores"])
    dropped = suppressed(Pairs.of([0] * count, golden["subjects"], golden["objects"], golden["scores"]))
    assert np.flatnonzero(~dropped).tolist() == sorted(golden["kept"])
    products = np.ones(count)
    for boxes in (np.array(golden["subjects"], dtype=float), np.array(golden["objects"], dtype=float)):
        products *= iou(boxes[:1], boxes, "inclusive")
    for got, expected in zip(products, golden.get("product_with_first", []), strict=False):
        assert expected is None or got == pytest.approx(expected, rel=0, abs=DIGITS)


def test_there_is_a_golden_file() -> None:
    assert (Path(__file__).parent / "golden/hoi_map.json").is_file()
    assert FILES, f"no hoi_map*.json in {FOLDER}"


def test_recalls_at_which_precision_is_read_are_the_libraries() -> None:
    import torch

    assert np.arange(0.0, 1.1, 0.1).tolist() == list(ARANGE)
    assert torch.linspace(0, 1, 11, dtype=torch.float64).tolist() == list(LINSPACE)
    missed = [k for k in range(11) if k / 10 < LINSPACE[k]]
    assert missed == [3]
    assert [k for k in range(11) if k / 10 < ARANGE[k]] == [3, 6, 7]
