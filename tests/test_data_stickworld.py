"""The embedded world as a data set: renders, their interactions, and references of their subjects."""

from pathlib import Path

import numpy as np
import pytest

from interactdiff.data import read_folder
from interactdiff.data.checking import check
from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run
from interactdiff.errors import DataError
from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.subject.foreground import foreground
from interactdiff.subject.items import Subject


def test_stickworld_renders_are_exported(tmp_path: Path) -> None:
    run("stickworld", "5:8", tmp_path / "out", Options(size=64))
    records = list(read_folder(tmp_path / "out"))
    assert [one.name for one in records] == [f"{seed:010d}.png" for seed in (5, 6, 7)]
    for seed, record in zip((5, 6, 7), records, strict=True):
        scene = sample_scene(seed)
        assert record.prompt == scene.caption
        assert record.items == (*scene.interactions(), *scene.lone_entities())
        assert np.array_equal(np.asarray(record.open()), render(scene, 64).image)
    run("stickworld", "5:6", tmp_path / "plain", Options(size=64, colours=False))
    (record,) = read_folder(tmp_path / "plain")
    scene = sample_scene(5)
    assert record.items == (*scene.interactions(colours=False), *scene.lone_entities(colours=False))
    run("stickworld", "5:8", tmp_path / "again", Options(size=64))
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(DataError, match=r"expected seeds FIRST:LAST such as 0:1000, got '8:5'"):
        run("stickworld", "8:5", tmp_path / "none", Options())


def test_stickworld_subjects_come_with_a_picture_from_another_scene(tmp_path: Path) -> None:
    run("stickworld", "5:9", tmp_path / "out", Options(size=64, subjects=2))
    report = check(str(tmp_path / "out"))
    assert not report.errors
    assert "without a row" not in report.warnings.counts
    for seed, record in zip(range(5, 9), read_folder(tmp_path / "out"), strict=True):
        scene = sample_scene(seed)
        subjects = [one for one in record.items if isinstance(one, Subject)]
        assert len(subjects) == min(2, len(scene.things))
        assert np.array_equal(np.asarray(record.open()), render(scene, 64).image)
        for one in subjects:
            (thing,) = [thing for thing in scene.things if thing.box == one.box]
            assert one.phrase == thing.name
            found = foreground(one)
            assert found.how == "its alpha channel"
            seen = np.asarray(found.image)[np.asarray(found.mask) > 128].astype(int)
            colour = np.array(COLOURS[thing.appearance.colour])
            assert (abs(seen - colour).max(1) < 20).mean() > 0.05, "it has the colour of the thing"
    run("stickworld", "5:9", tmp_path / "again", Options(size=64, subjects=2))
    for path in (tmp_path / "out/references").iterdir():
        assert (tmp_path / "again/references" / path.name).read_bytes() == path.read_bytes()
    run("stickworld", "5:9", tmp_path / "all", Options(size=64, subjects=8))
    for record in read_folder(tmp_path / "all"):
        assert not any(colour in record.prompt for colour in COLOURS), "what is shown is not said"
