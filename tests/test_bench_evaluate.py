"""The benchmark of scoring: its figures, and that memory holds what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from interactdiff.bench.evaluate import made_up
from interactdiff.cli import main
from interactdiff.evaluation.hoi_matching import HoiEvaluator
from interactdiff.evaluation.hoi_protocols import PROTOCOLS

BYTES_OF_PAIR, BYTES_OF_TRUTH = 19, 9


def test_it_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["bench", "evaluate", "--pictures", "30", "--pairs", "20", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["protocols"] == ["exact", "fgahoi", "pvic", "qpic", "official"]
    assert (
        "30 pictures of 20 detected pairs, exact, fgahoi, pvic, qpic, official: " in capsys.readouterr().out
    )
    assert set(figures["cpu_seconds"]) == {"matching", "precision"}
    assert 0 < figures["values"]["pvic.default.full"] < 1
    assert main(["bench", "evaluate", "--protocol", "voc"]) == 2


def test_what_is_kept_of_a_picture_is_its_detections_classes_and_scores() -> None:
    evaluator = HoiEvaluator([PROTOCOLS["exact"]], 600)
    truths = 0
    for truth, found in made_up(25, 10, 600):
        evaluator.add(truth, found, np.ones(600, dtype=bool))
        truths += len(truth)
    outcomes = evaluator.outcomes()
    kept = sum(getattr(outcomes, name).nbytes for name in outcomes.ARRAYS)
    assert kept == 250 * BYTES_OF_PAIR + truths * BYTES_OF_TRUTH
