"""The benchmark of interactions and windows in a Flux-shaped transformer, at tiny sizes."""

import json
from pathlib import Path

import pytest

import interactdiff.bench.joint as bench
from interactdiff.bench.joint import JointBench, JointShapes, bench_joint
from interactdiff.cli import main

TINY = JointShapes(heads=1, blocks=(1, 1), text=5)
WAYS = ["plain", "interaction", "interaction_clear", "clear"]


def test_every_way_is_what_it_is_called() -> None:
    timed = JointBench(TINY, grid=6, window=2)
    drawn = timed.round(lambda step: step())
    assert list(drawn) == WAYS
    ways = list(drawn.values())
    apart = [(a - b).abs().max() > 1e-6 for n, a in enumerate(ways) for b in ways[:n]]
    assert all(apart)
    assert (timed.step() == drawn["plain"]).all()  # all was detached


def test_keys_and_values_of_a_run_are_not_timed() -> None:
    timed = JointBench(TINY, grid=6, window=2)
    calls: list[int] = []
    for reader in timed.adapter.cross_attentions.values():
        reader.to_k.register_forward_hook(lambda *_: calls.append(1))
    made: list[int] = []
    timed.round(lambda step: made.append(len(calls)) or step())
    assert made == [0, 2, 2, 2]
    assert len(calls) == 2


def test_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 1.1, 0.6, 0.5, 2.0, 2.4, 1.0, 1.0, 4.0, 4.2, 2.0, 2.4])
    monkeypatch.setattr(bench, "_seconds", lambda _: next(seconds))
    row = bench_joint(TINY, grid=6, window=2, rounds=3, progress=False)
    assert row["seconds"] == dict(zip(WAYS, [2.0, 2.4, 1.0, 1.0], strict=True))
    assert row["ratios"] == pytest.approx(dict(zip(WAYS, [1, 1.1, 0.5, 0.5], strict=True)))
    assert all(peak > 0 for peak in row["peak_mb"].values())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--grids",
        "4,6",
        "--window",
        "2",
        "--heads",
        "1",
        "--text",
        "5",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["bench", "joint", *flags, "--json", str(tmp_path / "x.json")]) == 0
    shown = capsys.readouterr().out
    assert (
        "6 x 6 image and 5 text tokens, 1 joint and 1 single blocks of 1 heads x 128, float32, cpu" in shown
    )
    assert "interactions and windows" in shown
    data = json.loads((tmp_path / "x.json").read_text())
    assert [row["grid"] for row in data["rows"]] == [4, 6]
    assert main(["bench", "joint", "--blocks", "1", *flags]) == 2
    assert "--blocks: expected two numbers, joint and single, got 1" in capsys.readouterr().err
