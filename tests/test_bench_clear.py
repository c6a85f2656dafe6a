"""The benchmark of CLEAR's windows, at tiny sizes and on the command line."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import interactdiff.bench.clear as bench
from interactdiff.bench.clear import ClearBench, ClearShapes, bench_clear, raster_mask
from interactdiff.clear import Pattern
from interactdiff.cli import main

CPU = torch.device("cpu")
TINY = ClearShapes(heads=2, dim=8, dtype=torch.float32, device=CPU)


def test_the_published_mask_is_the_pattern():
    pattern = Pattern((6, 9), 5, 3)
    mask = create_mask(raster_mask(pattern), 1, 1, pattern.length, pattern.length, CPU)[0, 0]
    assert torch.equal(mask, pattern.mask())


def test_ours_and_the_published_mask_give_the_same(monkeypatch):
    """Like is compared with like; full attention, which has no window, differs."""
    timed = ClearBench(8, 5, TINY)
    run, mask_seconds, compile_seconds = timed.published(3)
    with torch.no_grad():
        ours = timed.ours("tiles", 3)
        assert (run() - ours).abs().max() < 1e-5
        assert (timed.full() - ours).abs().max() > 0.01
        assert (timed.full() - timed.ours("tiles", 12)).abs().max() < 1e-5
    assert mask_seconds > 0
    assert compile_seconds > 0


def test_rows_of_one_grid_and_text():
    backends = ("full", "tiles")
    rows = list(bench_clear([8], [2, 3], [5], TINY, 3, backends, progress=False))
    assert [(row["backend"], row["window"]) for row in rows] == [("full", None), ("tiles", 2), ("tiles", 3)]
    full, tiles, _ = rows
    assert (full["pairs"], full["times_full"], full["times_limit"]) == (69**2, 1, 1)
    assert tiles["pairs"] == Pattern((8, 8), 5, 2).pairs()
    for row in rows:
        assert len(row["rounds"]) == 3
        assert sorted(row["rounds"])[1] == row["seconds"] > 0
        assert row["times_limit"] == pytest.approx(69**2 / row["pairs"] / row["times_full"])
        assert row["peak_mb"] > 69 * 2 * 8 * 4 / 1e6  # its result


def test_what_is_too_slow_is_timed_once_and_what_is_too_large_left_out(monkeypatch):
    monkeypatch.setattr(bench, "SLOW", 0)
    monkeypatch.setattr(bench, "MASK_BYTES", 2 * 69**2 - 1)
    full, published = bench_clear([8], [2], [5], TINY, 3, ("full", "published_flex"), progress=False)
    assert len(full["rounds"]) == 1
    assert "seconds" not in published
    assert published["skipped"].startswith("its mask is made from every pair of tokens")


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "rows.json"
    sizes = ["--grids", "6", "--windows", "2", "--text", "3", "--heads", "1", "--dim", "16"]
    assert main(["bench", "clear", *sizes, "--rounds", "2", "--device", "cpu", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert (written["heads"], written["dim"], written["rounds"], written["device"]) == (1, 16, 2, "cpu")
    ways = ["full", "published_flex", "tiles", "flex"]
    assert [(row["grid"], row["backend"]) for row in written["rows"]] == [(6, way) for way in ways]
    for row in written["rows"]:
        assert {"grid", "window", "text", "dtype", "backend", "seconds", "peak_mb"} <= row.keys()
        assert ("mask_seconds" in row) == (row["backend"] == "published_flex")
    shown = capsys.readouterr().out
    assert "6 x 6 image and 3 text tokens, 1 heads x 16, float32, cpu, medians of 2 rounds" in shown
    assert all(f"\n{way} " in shown for way in ways)


def test_bad_sizes_are_refused(capsys):
    assert main(["bench", "clear", "--grids", "8,x"]) == 2
    assert "--grids: expected a whole number, got 'x'" in capsys.readouterr().err
