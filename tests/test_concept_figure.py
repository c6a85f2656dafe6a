"""The figure of docs/concept.md: `benchmarks/concept.py`."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BENCH = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/concept.py"))


def test_masks_and_boxes_are_of_what_is_in_the_render() -> None:
    image, concepts, scene, masks = BENCH["rendered"](3, 64)
    assert image.size == (64, 64)
    assert {one.token: one.word for one in concepts} == {"<hero>": "person", "<blob>": "ball"}
    for concept, entity in zip(concepts, scene.entities, strict=True):
        rows, columns = (axis.nonzero().flatten() for axis in (masks[concept.token].any(n) for n in (1, 0)))
        found = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
        assert entity.phrase == concept.word
        assert torch.allclose(found, torch.tensor(entity.box), atol=0.06)


def test_the_figure_has_the_masks_above_the_pictures(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("interactdiff.concept.learner.SAMPLE_STEPS", 1)
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "figures" / "concept.png"
    flags = ["--steps", "1", "--size", "32", "--given-masks", "--device", "cpu", "--set", "prefix="]
    BENCH["main"](["--model", str(tmp_path / "model"), *flags, "--out", str(out)])
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    empty = (pixels == 255).all((1, 2))
    assert sheet.width > 4 * 192
    assert not empty[0]
    assert not empty[192 + 22 + BENCH["GAP"]]
    assert empty[192 + 22 : 192 + 22 + BENCH["GAP"]].all()
