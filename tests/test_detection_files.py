"""Detections from files: ours, FGAHOI's and PViC's; damaged ones are named, pickles never run."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from interactdiff.data.classes import coco_objects, hico_classes
from interactdiff.errors import DataError
from interactdiff.evaluation.detection import (
    DetectedPair,
    Instance,
    Picture,
    PictureDetections,
    from_row,
    to_row,
)
from interactdiff.evaluation.detection_files import load_detections
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.hoi_matching import HoiEvaluator
from interactdiff.evaluation.hoi_precision import average_precisions
from interactdiff.evaluation.hoi_protocols import PROTOCOLS

NAME = "HICO_test2015_00000003.jpg"
FOUND = PictureDetections(
    (200, 100),
    (Instance("person", (0.1, 0, 9, 9), 0.9),),
    (Instance("umbrella", (30, 0, 80, 1 / 3), 0.8), Instance("cell phone", (1, 2, 3, 4), 0.1)),
    (DetectedPair(0, 1, "with", 0.05), DetectedPair(0, 0, "holding", 1e-7)),
)


def test_rows_of_ours_are_read_back_exactly(tmp_path: Path) -> None:
    for found in (FOUND, PictureDetections(None, inclusive=True)):
        assert from_row(to_row("a.png", found, crc32=7), "here") == ("a.png", found, {"crc32": 7})
    file = tmp_path / "found.jsonl"
    file.write_text(to_row("é.png", PictureDetections((1, 1))) + "\n\n" + to_row(NAME, FOUND) + "\n")
    detector = load_detections(file)
    assert detector.name == "file:found.jsonl"
    other = Picture("other.png", None, (64, 64))
    assert detector.detect([Picture(NAME, None), other]) == [FOUND, PictureDetections((64, 64))]


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(to_row(NAME, FOUND)), **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[}", "line 2, column 2: expected JSON"),
        ("{}", "line 2: expected the key file_name"),
        (changed(persons={}), "line 2: persons: expected a list"),
        (
            changed(objects=[{"name": "x", "box": [1, 2, 3], "score": 1}]),
            "line 2: object 1: box: expected four numbers",
        ),
        (
            changed(persons=[{"box": [1, 2, 3, 4], "score": True}]),
            "line 2: person 1: score: expected a number",
        ),
        (
            changed(persons=[{"box": [1, 2, 3, float("nan")], "score": 1}]),
            "line 2: person 1: box: expected four",
        ),
        (
            changed(pairs=[{"person": 1, "object": 0, "verb": "x", "score": 1}]),
            "pair 1: person: expected a number below 1, got 1",
        ),
        (changed(pairs=[{"person": 0, "object": 0, "verb": 1, "score": 1}]), "pair 1: verb: expected text"),
        (changed(size=[0, 1]), "line 2: size: expected width and height"),
        (changed(extra=1), "line 2: expected only the keys"),
        (to_row("a.png", FOUND), "line 2: expected each picture once, got 'a.png' of line 1 again"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "found.jsonl"
    file.write_text(f"{to_row('a.png', FOUND)}\n{line}\n")
    with pytest.raises(DataError, match=f"found.jsonl, .*{message}"):
        load_detections(file)


def predictions() -> dict[str, Any]:
    names, verbs = list(coco_objects().values()), hico_classes().verbs
    return {
        "filename": NAME,
        "predictions": [
            {"bbox": [5, 5, 50, 95], "category_id": 0},
            {"bbox": [30, 0, 80, 40], "category_id": names.index("umbrella")},
        ],
        "hoi_prediction": [
            {"subject_id": 0, "object_id": 1, "category_id": verbs.index("holding"), "score": 0.5}
        ],
    }


def test_fgahois_predictions(tmp_path: Path) -> None:
    file = tmp_path / "preds.json"
    for content in ([predictions()], {"preds": [predictions()], "gts": []}):
        file.write_text(json.dumps(content))
        (found,) = load_detections(file, (512, 512)).detect([Picture(NAME, None)])
        assert found.size == (512, 512)
        (pair,) = found.pairs
        assert (pair.verb, found.objects[pair.object].name, pair.score) == ("holding", "umbrella", 0.5)
        assert found.persons[pair.person].box == (5, 5, 50, 95)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (own,) = load_detections(file).detect([Picture(NAME, tmp_path / "a.png")])
    assert own.size == (20, 10)
    broken = predictions()
    broken["hoi_prediction"][0]["category_id"] = 117  # PPDM counts from 1
    for content, message in (
        (broken, "picture 1: expected filename, .* got ValueError: 117 of 117"),
        ({}, "got KeyError"),
    ):
        file.write_text(json.dumps([content]))
        with pytest.raises(DataError, match=message):
            load_detections(file)
    file.write_text("7")
    with pytest.raises(DataError, match=r"expected a list of predictions in .*, got 7"):
        load_detections(file)


def write_mats(folder: Path, rows: dict[tuple[str, str], list[list[float]]], columns: int = 3) -> None:
    """As PViC writes them: the third picture has all of the detections."""
    table = hico_classes()
    folder.mkdir()
    for number in range(80):
        of_object = [hoi for hoi, (_, thing) in enumerate(table.numbers) if thing == number]
        cells = np.empty((len(of_object), columns), dtype=object)
        for row, hoi in enumerate(of_object):
            for column in range(columns):
                cells[row, column] = np.zeros((0, 0))
            if table.classes[hoi] in rows:
                cells[row, 2] = np.array(rows[table.classes[hoi]])
        scipy.io.savemat(folder / f"detections_{number + 1:02}.mat", {"all_boxes": cells})


def test_pvics_cache(tmp_path: Path) -> None:
    truth = [[5.0, 5, 49, 94, 30, 0, 79, 39, 0.7], [0.0, 0, 1, 1, 2, 2, 3, 3, 0.2]]
    write_mats(tmp_path / "matlab", {("holding", "umbrella"): truth, ("with", "cell phone"): [truth[1]]})
    detector = load_detections(tmp_path / "matlab", (200, 100))
    (found, none) = detector.detect([Picture(NAME, None), Picture("HICO_test2015_00000001.jpg", None)])
    assert none.pairs == ()
    assert found.inclusive
    said = {(pair.verb, found.objects[pair.object].name, pair.score) for pair in found.pairs}
    assert said == {("holding", "umbrella", 0.7), ("holding", "umbrella", 0.2), ("with", "cell phone", 0.2)}
    # PViC's areas are plain, of boxes that end behind their last pixel
    table = ClassTable.hico()
    pairs = table.detected(found, (200, 100))
    evaluator = HoiEvaluator([PROTOCOLS["pvic"]], 600)
    evaluator.add(pairs.take(pairs.scores > 0.5), pairs)
    number = table.numbers["holding", "umbrella"]
    assert average_precisions(evaluator.outcomes(), PROTOCOLS["pvic"], np.ones((1, 1)))[
        0, number
    ] == pytest.approx(1)
    with pytest.raises(DataError, match=r"expected names as HICO_test2015_00000001.jpg"):
        detector.detect([Picture("a.png", None)])


def test_a_cache_that_is_not_whole_is_named(tmp_path: Path) -> None:
    write_mats(tmp_path / "matlab", {})
    (tmp_path / "matlab/detections_80.mat").unlink()
    with pytest.raises(
        DataError, match=r"expected detections_01.mat to detections_80.mat in .*, got none of"
    ):
        load_detections(tmp_path / "matlab")
    scipy.io.savemat(tmp_path / "matlab/detections_80.mat", {"all_boxes": np.zeros((1, 3))})
    with pytest.raises(DataError, match=r"expected \d+ rows of zebra in .*, got an array of \[1, 3\]"):
        load_detections(tmp_path / "matlab")
    (tmp_path / "matlab/detections_80.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match="expected all_boxes in"):
        load_detections(tmp_path / "matlab")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".pth", ".npy"])
def test_pickles_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"preds{ending}").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="pickles are not executed, so write its content as JSON"):
        load_detections(tmp_path / f"preds{ending}")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(DataError, match="got no such file"):
        load_detections(tmp_path / "none.jsonl")


def test_a_picture_is_shown_upright_and_squeezed(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = Picture("turned.jpg", tmp_path / "turned.jpg")
    assert turned.shown_size == turned.open().size == (20, 40)
    assert Picture("turned.jpg", tmp_path / "turned.jpg", (8, 8)).open().size == (8, 8)
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    for name, message in (
        ("half.png", "half.png: expected a whole picture, got"),
        ("none.png", "expected a picture at .*none.png, got no such file"),
    ):
        with pytest.raises(DataError, match=message):
            Picture(name, tmp_path / name).open()
    with pytest.raises(DataError, match=r"expected a picture at a\.png, got no such file"):
        Picture("a.png", None).open()
