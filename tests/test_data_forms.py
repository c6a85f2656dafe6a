"""The forms that rows of data come in, and that they survive the way there and back."""

from pathlib import Path
from typing import Any

import pytest
from data_files import make_folder, noise, write_rows

from interactdiff import Scene
from interactdiff.data import read_folder
from interactdiff.data.checking import check
from interactdiff.errors import DataError
from interactdiff.picture import Record, save_picture
from interactdiff.scene_items import Entity, Interaction


def test_rows_scene_files_captions_and_pngs_of_the_studio(tmp_path: Path) -> None:
    ride = Interaction("person", "riding", "bike", (0.1, 0.1, 0.5, 0.9), (0.2, 0.5, 0.6, 1.0))
    scene = Scene("a person riding a bike", (ride,), (Entity("ball", (0, 0, 0.2, 0.2)),), seed=3, steps=7)
    noise(64, 64).save(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(scene.to_json())
    noise(64, 64, 1).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text(" a caption\n")
    save_picture(noise(64, 64, 2), tmp_path / "c.png", Record(scene, "stickworld", {}, "cpu", "float32"))
    records = list(read_folder(tmp_path))
    assert [one.name for one in records] == ["a.jpg", "b.jpg", "c.png"]
    assert records[0].items == records[2].items == scene.items
    assert records[1].prompt == "a caption"
    assert records[0].scene() == Scene(scene.prompt, scene.interactions, scene.entities)
    assert check(str(tmp_path)).ignored["steps"] == 2
    noise(64, 64, 3).save(tmp_path / "d.png")
    with pytest.raises(DataError, match=r"d\.png, line 1: expected a prompt"):
        list(read_folder(tmp_path))


def test_captions_beside_pictures_and_several_of_them(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    rows = [{"file_name": "0000.png"}, {"file_name": "0001.png", "prompts": ["a", "b"]}]
    write_rows(tmp_path, rows)
    (tmp_path / "0000.txt").write_text("beside", encoding="utf-8-sig")
    assert [one.prompts for one in read_folder(tmp_path)] == [("beside",), ("a", "b")]
    (tmp_path / "0000.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"0000\.txt, got other bytes"):
        list(read_folder(tmp_path))


def test_a_second_metadata_file_is_refused(tmp_path: Path) -> None:
    """`datasets` would silently lose its columns."""
    make_folder(tmp_path)
    make_folder(tmp_path / "more")
    with pytest.raises(
        DataError, match=r"expected one metadata.jsonl in .*, got more/metadata.jsonl as well"
    ):
        list(read_folder(tmp_path))


def test_a_row_survives_the_way_there_and_back(tmp_path: Path) -> None:
    rows = make_folder(tmp_path)
    rows[3] |= {"weight": 3, "flip": False, "id": "x", "license": "CC0"}
    rows[4]["interactions"][0] |= {"strength": 0.5, "action_region": "union"}
    write_rows(tmp_path, rows)
    for record, given in zip(read_folder(tmp_path), rows, strict=True):
        assert {"file_name": record.name, **record.to_row()} == given


def test_items_of_other_methods_are_read(tmp_path: Path, badge: Any) -> None:
    make_folder(tmp_path, 1)
    badges = [{"label": "new", "box": [0.1, 0.1, 0.3, 0.2]}, {"label": "", "box": [0.1, 0.1, 0.3, 0.2]}]
    write_rows(tmp_path, [{"file_name": "0000.png", "prompt": "", "badges": badges[:1]}])
    (record,) = read_folder(tmp_path)
    assert record.items == (badge("new", (0.1, 0.1, 0.3, 0.2)),)
    assert record.to_row()["badges"] == [{"label": "new", "box": [0.1, 0.1, 0.3, 0.2]}]
    write_rows(tmp_path, [{"file_name": "0000.png", "prompt": "", "badges": badges}])
    with pytest.raises(DataError, match="line 1, badge 2, label: expected a phrase"):
        list(read_folder(tmp_path))
