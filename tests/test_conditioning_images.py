"""Control images of rows: read in every form, kept by what writes rows, framed as their pictures, checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import make_folder, noise, write_rows
from PIL import Image, ImageOps

from interactdiff.data import Records, read_folder
from interactdiff.data.checking import CheckOptions, check
from interactdiff.data.contact_sheet import contact_sheet
from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run as convert
from interactdiff.data.examples import Examples, make_order
from interactdiff.data.framing import Framing
from interactdiff.data.order import Draw
from interactdiff.data.records import CONTROL
from interactdiff.data.shards import write_shards
from interactdiff.errors import DataError
from interactdiff.training.control import ControlImages

SMALL = Framing(resolution=64, multiple=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures. Control images: of the first the picture itself; of the second one half as large."""
    rows = make_folder(tmp_path / "rows", 3, ((100, 64), (97, 64), (64, 96)))
    (tmp_path / "rows/depth").mkdir()
    noise(100, 64, seed=0).save(tmp_path / "rows/depth/0.png")
    noise(49, 32, seed=7).save(tmp_path / "rows/depth/1.png")
    for number in range(2):
        rows[number][CONTROL] = f"depth/{number}.png"
    write_rows(tmp_path / "rows", rows)
    return tmp_path / "rows"


def controls(path: Path) -> list[bytes | None]:
    return [one.control and one.control.read() for one in read_folder(path)]


def test_what_writes_rows_keeps_them(folder: Path, tmp_path: Path) -> None:
    given = [(folder / f"depth/{number}.png").read_bytes() for number in range(2)]
    assert controls(folder) == [*given, None]
    write_shards(read_folder(folder), tmp_path / "shards", "train")
    convert("scenes", str(tmp_path / "shards"), tmp_path / "back", Options())
    convert("scenes", str(folder), tmp_path / "linked", Options())
    assert controls(tmp_path / "shards") == controls(tmp_path / "linked") == [*given, None]
    assert controls(tmp_path / "back" / "train") == [*given, None]
    assert (tmp_path / "linked" / f"{CONTROL}s" / "0000.png.png").is_symlink()
    (tmp_path / "shards/index.json").unlink()  # as shards of others come
    assert controls(tmp_path / "shards") == [*given, None]
    assert Records.open(folder).controls.tolist() == [1, 1, 0]


def test_tables_have_a_column_of_them(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": one.stored.read()}, CONTROL: one.control and {"bytes": one.control.read()}}
        for one in read_folder(folder)
    ]
    table = datasets.Dataset.from_list([row | {"prompt": "a"} for row in rows])
    table.to_parquet(tmp_path / "rows.parquet")
    assert controls(tmp_path / "rows.parquet") == controls(folder)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_they_are_framed_as_their_pictures(folder: Path, flip: float) -> None:
    records = Records.open(folder)
    order: Any = make_order(records, SMALL, 1, seed=0)
    examples = Examples(records, SMALL, order, flip, further=ControlImages(None, drop=0.0))
    same, half, none = (examples[Draw(number, 0, number, 0)] for number in range(3))
    assert np.array_equal(same["control"], same["pixels"])
    assert [one["controlled"].item() for one in (same, half, none)] == [1, 1, 0]
    assert none["control"].shape == none["pixels"].shape
    placement = SMALL.place(97, 64, records[1].items)
    assert placement.window[2] - placement.window[0] < 97, "something is cut off"
    image = noise(49, 32, seed=7)
    box = tuple(edge * by for edge, by in zip(placement.window, (49 / 97, 0.5) * 2, strict=True))
    height, width = placement.size
    naive = image.resize((width, height), Image.Resampling.BICUBIC, box=box)  # type: ignore[arg-type]
    naive = ImageOps.mirror(naive) if flip else naive
    assert np.allclose((half["control"].permute(1, 2, 0) + 1) * 127.5, np.asarray(naive), atol=1e-4)
    dropped = Examples(records, SMALL, order, flip, further=ControlImages(None, drop=1.0))
    assert dropped[Draw(0, 0, 0, 0)]["controlled"] == 0


def test_they_are_checked_and_shown(folder: Path) -> None:
    report = check(str(folder), options=CheckOptions(framing=SMALL))
    assert not report.errors
    assert report.counts["control images"] == 2
    assert "without a row" not in report.warnings.counts
    shown = contact_sheet(Records.open(folder), SMALL)
    path = folder / "depth/1.png"
    path.write_bytes(path.read_bytes()[:-300])
    assert "0001.png (line 2): conditioning_image: expected a whole picture" in str(
        check(str(folder), options=CheckOptions(framing=SMALL)).errors.first[0]
    )
    noise(49, 32, seed=8).save(path)
    assert contact_sheet(Records.open(folder), SMALL).tobytes() != shown.tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("depth/2.png", "line 1, conditioning_image: expected a picture in FOLDER/, got 'depth/2.png'"),
        ("../a.png", "line 1, conditioning_image: expected a path inside FOLDER/, got '../a.png'"),
        ("/etc/passwd", "line 1, conditioning_image: expected a path inside FOLDER/, got '/etc/passwd'"),
        (3, "line 1, conditioning_image: expected the name of a picture in FOLDER/, got 3"),
        (
            "depth/1.png",
            "0000.png (line 1): conditioning_image: expected sides in the picture's ratio, 64 : 64, got 49 x",
        ),
    ],
)
def test_bad_ones_are_one_sentence(folder: Path, given: Any, message: str) -> None:
    noise(64, 64).save(folder / "0000.png")
    write_rows(folder, [{"file_name": "0000.png", "prompt": "", CONTROL: given}])
    message = message.replace("FOLDER", str(folder))
    for read in (lambda: Records.open(folder), lambda: check(str(folder)).errors.raise_if_any("")):
        with pytest.raises(DataError) as refused:
            read()
        assert message in str(refused.value)


def test_forms_without_a_place_for_them_say_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    noise(64, 64).save(tmp_path / "loose/a.png")
    (tmp_path / "loose/a.json").write_text(json.dumps({"prompt": "", CONTROL: "b.png"}))
    with pytest.raises(DataError, match=r"expected no control image of a scene file, .* got 'b.png'"):
        list(read_folder(tmp_path / "loose"))
