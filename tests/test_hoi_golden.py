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


def pairs_of(rows: list[dict[str, Any]], classes: list[str]) -> Pairs:
    return Pairs.of(
        [classes.index(row["cls"]) for row in rows],
        [row["human"] for row in rows],
        [row["object"] for row in rows],
        [row.get("score", 1.0) for row in rows],
    )


def fast(golden: dict[str, Any], name: str, known_object: bool) -> list[float]:
    classes = golden["classes"]
    evaluator = HoiEvaluator([PROTOCOLS[name]], len(classes), prepare=False)
    for image in golden["images"]:
        truth, found = (
            pairs_of([row for row in golden[kind] if row["image"] == image], classes)
            for kind in ("ground_truth", "detections")
        )
        known = golden.get("known_object_images") or {}
        holds = np.array([image in known.get(one, golden["images"]) for one in classes])
        evaluator.add(truth, found, holds)
    once = np.ones((1, evaluator.pictures))
    return average_precisions(evaluator.outcomes(), PROTOCOLS[name], once, known_object)[0].tolist()


def slow(golden: dict[str, Any], name: str, known_object: bool) -> list[float]:
    classes, order = golden["classes"], golden["images"]
    truth, found = (
        [
            OnePair(
                order.index(row["image"]),
                classes.index(row["cls"]),
                row["human"],
                row["object"],
                row.get("score", 1.0),
            )
            for row in golden[kind]
        ]
        for kind in ("ground_truth", "detections")
    )
    known = None
    if known_object:
        given = golden["known_object_images"]
        known = {n: [order.index(i) for i in given.get(c, order)] for n, c in enumerate(classes)}
    return reference_average_precisions(truth, found, len(classes), PROTOCOLS[name], known)


@pytest.mark.parametrize("way", [fast, slow], ids=["fast", "slow"])
@pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{file.stem}-{name}" for file, name in CASES])
def test_average_precisions_are_the_published_evaluators(file: Path, name: str, way: Any) -> None:
    golden = json.loads(file.read_text())
    expected = golden["expected"][name]
    for key, known_object in (("ap", False), ("known_object", True)):
        if key not in expected:
            continue
        got = dict(zip(golden["classes"], way(golden, name, known_object), strict=True))
        for cls, value in expected[key].items():
            if value is None:
                assert math.isnan(got[cls]), (key, cls)
            else:
                assert got[cls] == pytest.approx(value, abs=DIGITS), (key, cls)
    if "mean" in expected:
        mean = mean_of_classes(np.array([way(golden, name, False)]))[0]
        assert mean == pytest.approx(expected["mean"], abs=DIGITS)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_pairs_are_suppressed_as_fgahoi_does(file: Path) -> None:
    golden = json.loads(file.read_text()).get("pair_nms")
    if golden is None:
        pytest.skip("no pair suppression in this file")
    count = len(golden["scores"])
    dropped = suppressed(Pairs.of([0] * count, golden["subjects"], golden["objects"], golden["scores"]))
    assert np.flatnonzero(~dropped).tolist() == golden["kept"]
    products = np.ones(count)
    for boxes in (np.array(golden["subjects"], dtype=float), np.array(golden["objects"], dtype=float)):
        products *= iou(boxes[:1], boxes, "inclusive")
    for got, expected in zip(products, golden.get("product_with_first", []), strict=False):
        assert expected is None or got == pytest.approx(expected, abs=DIGITS)


def test_there_is_a_golden_file() -> None:
    assert (Path(__file__).parent / "golden/hoi_map.json").is_file()


def test_recalls_at_which_precision_is_read_are_the_libraries() -> None:
    import torch

    assert np.arange(0.0, 1.1, 0.1).tolist() == list(ARANGE)
    assert torch.linspace(0, 1, 11, dtype=torch.float64).tolist() == list(LINSPACE)
    missed = [k for k in range(11) if k / 10 < LINSPACE[k]]
    assert missed == [3]
    assert [k for k in range(11) if k / 10 < ARANGE[k]] == [3, 6, 7]
