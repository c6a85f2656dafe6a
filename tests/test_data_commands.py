"""interactdiff data on the command line: what it prints, its exit codes, and what it writes."""

import json
from pathlib import Path

import pytest
from data_files import make_folder, write_rows
from PIL import Image

from interactdiff.cli import main
from interactdiff.data import Records
from interactdiff.data.contact_sheet import CELL, contact_sheet
from interactdiff.data.framing import Framing
from interactdiff.data.statistics import statistics

SMALL = ["--resolution", "64", "--multiple", "32"]


def test_check_says_what_is_there_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_folder(tmp_path)
    assert main(["data", "check", str(tmp_path), *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{tmp_path}: 10 pictures, 10 interactions, 5 entities, 4 distinct phrases\nerrors: 0\n"
    )
    assert main(["data", "check", str(tmp_path), *SMALL, "--strict"]) == 0
    rows[3]["prompt"] = "someone"
    write_rows(tmp_path, rows)
    assert main(["data", "check", str(tmp_path), *SMALL]) == 0
    assert main(["data", "check", str(tmp_path), *SMALL, "--strict"]) == 2
    assert "expected data without errors and warnings in" in capsys.readouterr().err
    rows[4]["interactions"][0]["subject_box"] = [0, 0, 0, 1]
    write_rows(tmp_path, rows)
    assert main(["data", "check", str(tmp_path), *SMALL, "--json"]) == 2
    captured = capsys.readouterr()
    (error,) = json.loads(captured.out)["errors"]["first"]
    assert error == {
        "kind": "box",
        "file": f"{tmp_path}/metadata.jsonl",
        "line": 5,
        "column": None,
        "item": "interaction 1",
        "field": "subject_box",
        "expected": "x0 < x1",
        "got": "x0 = 0.0 and x1 = 0.0",
        "message": f"{tmp_path}/metadata.jsonl, line 5, interaction 1, subject_box: "
        "expected x0 < x1, got x0 = 0.0 and x1 = 0.0",
    }
    assert captured.err == f"interactdiff: expected data without errors in {tmp_path}, got 1\n"


def test_quick_reads_headers_only(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "0003.png"
    path.write_bytes(path.read_bytes()[:-500])
    assert main(["data", "check", str(tmp_path), *SMALL, "--quick"]) == 0
    assert main(["data", "check", str(tmp_path), *SMALL]) == 2


def test_nothing_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "show", "stats"):
        assert main(["data", command, str(tmp_path / "none")]) == 2
        assert "expected a folder of pictures, shards or parquet files, got" in capsys.readouterr().err
        assert main(["data", command, str(tmp_path)]) == 2
        assert "expected metadata.jsonl, pictures, shards or parquet files in" in capsys.readouterr().err
    assert main(["data", "stats", str(tmp_path), "--column", "prompt"]) == 2
    assert capsys.readouterr().err == "interactdiff: --column: expected key=column, got 'prompt'\n"
    assert main(["data", "convert", "stickworld", "0:1", str(tmp_path / "a"), "--merge-iou", "2"]) == 2
    assert not list(tmp_path.iterdir())


def test_show_draws_boxes_where_training_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "rows")
    out = tmp_path / "sheet.png"
    assert main(["data", "show", str(tmp_path / "rows"), *SMALL, "--count", "6", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as sheet:
        assert sheet.width > 4 * CELL
        assert sheet.height > 2 * CELL
    records = Records.open(tmp_path / "rows")
    framing = Framing(64, 32)
    plain = contact_sheet(records, framing, 1, seed=1)
    mirrored = contact_sheet(records, framing, 1, seed=1, flipped=True)
    assert plain.size == mirrored.size
    assert plain.tobytes() != mirrored.tobytes()
    (tmp_path / "rows" / "0000.png").write_bytes(b"broken")
    assert contact_sheet(records, framing, 10).size == contact_sheet(records, framing, 10, seed=2).size


def test_stats_count_what_cropping_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_folder(tmp_path)
    for one in rows:
        one["entities"] = [{"phrase": "edge", "box": [0.0, 0.0, 0.1, 1.0]}]
    write_rows(tmp_path, rows)
    numbers = statistics(Records.open(tmp_path), Framing(64, 32))
    assert numbers["items"] == {"interaction": 10, "entity": 10}
    assert numbers["per_picture"] == {"2": 10}
    assert numbers["lost"]["square"] == 5  # 96 x 64 and 128 x 64: their left edge is cut off
    assert numbers["lost"]["buckets"] < 5
    assert sum(numbers["buckets"].values()) == 10
    assert numbers["phrases"]["subject"] == {"distinct": 1, "most_frequent": {"person": 10}}
    assert main(["data", "stats", str(tmp_path), *SMALL]) == 0
    assert "items left out by cropping" in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers


def test_from_the_world_to_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, shards = str(tmp_path / "world"), str(tmp_path / "shards")
    assert main(["data", "convert", "stickworld", "0:5", folder, "--size", "64"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: 5 pictures, ")
    assert main(["data", "shard", folder, shards, "--pictures", "2"]) == 0
    assert f"{shards}: train, 5 pictures in 3 shards" in capsys.readouterr().out
    assert main(["data", "check", shards, "--resolution", "64"]) == 0
    assert [one.items for one in Records.open(shards)] == [one.items for one in Records.open(folder)]
    assert main(["data", "shard", folder, shards]) == 2
    assert "expected no shards of train in" in capsys.readouterr().err
    assert main(["data", "convert", "scenes", shards, str(tmp_path / "back")]) == 0
    back = Records.open(tmp_path / "back" / "train")
    assert [one.items for one in back] == [one.items for one in Records.open(folder)]
    assert main(["data", "convert", "coco", folder, str(tmp_path / "none")]) == 2
    assert "expected instances_train2017.json or _annotations.coco.json in" in capsys.readouterr().err
