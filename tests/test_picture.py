"""Pictures: the record inside them, writing them, and what is drawn over them."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from interactdiff.files import why_unwritable, write_aside
from interactdiff.picture import (
    PictureError,
    Record,
    enlarged,
    overlay,
    read_record,
    save_picture,
    side_by_side,
)
from interactdiff.scene import Interaction, Scene

RIDING = Interaction("person", "riding", "bike", (0.25, 0.125, 0.625, 0.75), (0.25, 0.5, 0.75, 1.0))
GREY = (128, 128, 128)


@pytest.fixture
def record() -> Record:
    """Of a scene whose words need more than ASCII."""
    return Record(Scene("café ☕", (RIDING,), seed=2**40), "stickworld", {}, "cpu", "float32")


def test_the_record_is_read_back(record: Record, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), GREY)
    save_picture(image, tmp_path / "out.png", record)
    assert read_record(tmp_path / "out.png") == record
    assert Image.open(tmp_path / "out.png").tobytes() == image.tobytes()
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_record_from_before_there_were_methods_is_read(record: Record, tmp_path: Path) -> None:
    values = json.loads(replace(record, methods={"magic": {"power": 2}}).to_json())
    assert values.pop("methods") == {"magic": {"power": 2}}
    assert read_record(with_text(tmp_path / "old.png", json.dumps(values))) == record
    for methods in ([], {"magic": 2}):
        with pytest.raises(PictureError, match="expected settings by the name of their method, got"):
            Record.from_json(json.dumps(values | {"methods": methods}))


def with_text(path: Path, text: str | None) -> Path:
    """A PNG with this text as its record."""
    info = PngInfo()
    if text is not None:
        info.add_text("interactdiff", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "drawn by interactdiff at .* without its record"),
        ("{", "expected JSON with scene, model"),
        ("[]", "expected JSON with scene, model"),
        ('{"scene": {"prompt": 1}}', "scene: prompt: expected text, got 1"),
        ('{"scene": {"prompt": "a"}}', "got KeyError: 'model'"),
        (
            '{"scene": {"prompt": ""}, "model": 1, "adapter": "", "device": "", "dtype": "", "versions": {}}',
            "as text, got",
        ),
    ],
)
def test_pictures_without_a_good_record(text: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=message):
        read_record(with_text(tmp_path / "a.png", text))


def test_files_that_are_no_pictures(record: Record, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"expected a PNG at .*none\.png, got No such file"):
        read_record(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(PictureError, match=r"expected a PNG at .*text\.png, got something else"):
        read_record(tmp_path / "text.png")
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "cut.png", record)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(PictureError, match=r"expected a .*PNG"):
        read_record(tmp_path / "cut.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_written_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_aside(tmp_path / "ours", lambda aside: aside.write_text("x"))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")}
    assert len(modes) == 1


def test_why_unwritable(tmp_path: Path) -> None:
    assert why_unwritable(tmp_path / "new.png") is None
    assert why_unwritable(tmp_path) == "a folder"
    assert "No such file or directory" in (why_unwritable(tmp_path / "none" / "a.png") or "")
    (tmp_path / "file").touch()
    assert "Not a directory" in (why_unwritable(tmp_path / "file" / "a.png") or "")
    assert "File name too long" in (why_unwritable(tmp_path / ("a" * 300 + ".png")) or "")
    assert os.listdir(tmp_path) == ["file"]


def test_long_names_that_the_folder_takes_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    assert why_unwritable(path) is None
    write_aside(path, lambda aside: aside.write_text("x"))
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("size", "expected"), [((96, 96), 480), ((64, 32), 512), ((480, 10), 480), ((900, 600), 900)]
)
def test_small_pictures_are_enlarged_by_whole_pixels(size: tuple[int, int], expected: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    large = enlarged(Image.fromarray(noise))
    assert large.width == expected
    times = expected // size[0]
    np.testing.assert_array_equal(np.asarray(large)[times // 2 :: times, times // 2 :: times], noise)


def test_the_overlay_outlines_the_asked_boxes() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (96, 96), GREY), (RIDING,)))
    for box, colour in ((RIDING.subject_box, (214, 0, 108)), (RIDING.object_box, (0, 87, 217))):
        x0, y0, x1, y1 = (round(edge * 480) for edge in box)
        # Where no label lies: the right edge below its middle, and half of the bottom edge.
        assert (drawn[(y0 + 3 * y1) // 4, x1 - 1] == colour).all()
        assert (drawn[y1 - 1, (x0 + 3 * x1) // 4] == colour).all()
        assert (drawn[y1 - 12, x1 - 12] == GREY).all()


@pytest.mark.parametrize("action", ["riding", None])
def test_each_phrase_has_a_legible_label(action: str | None) -> None:
    one = Interaction("person", action, "bike", RIDING.subject_box, RIDING.object_box)
    bare = np.asarray(overlay(Image.new("RGB", (96, 96), GREY), (one,))).reshape(-1, 3)
    dark = (bare == (34, 34, 34)).all(axis=1).sum()
    assert (dark > 300) == (action is not None)  # the action's label, and only then
    labels = [(bare == colour).all(axis=1).sum() for colour in ((214, 0, 108), (0, 87, 217))]
    assert min(labels) > 2000  # more than an outline of 2 px


def test_labels_stay_inside_and_do_not_cover_each_other() -> None:
    whole = (0.0, 0.0, 1.0, 1.0)
    many = tuple(Interaction("person " * 20, "riding", f"bike {n}", whole, whole) for n in range(3))
    apart = overlay(Image.new("RGB", (480, 480), GREY), many)
    assert apart.size == (480, 480)
    pixels = np.asarray(apart).reshape(-1, 3)
    # Three action labels of some 80 x 20 px each: were two of them on one place, a third would be missing.
    one = np.asarray(overlay(Image.new("RGB", (480, 480), GREY), many[:1])).reshape(-1, 3)
    dark, dark_of_one = ((p == (34, 34, 34)).all(axis=1).sum() for p in (pixels, one))
    assert dark > 2.5 * dark_of_one


def test_side_by_side() -> None:
    row = side_by_side(Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 10), "blue"))
    assert row.size == (10 + 16 + 30, 20)
    assert [row.getpixel(at) for at in ((0, 19), (15, 0), (26, 9), (26, 10))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]
