"""Rows of data: every mistake is named with its place, and nothing else is ever raised."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from data_files import make_folder, make_links, noise, row, write_rows
from PIL import Image

from interactdiff.data import folder as folder_module
from interactdiff.data import read_folder
from interactdiff.data.checking import CheckOptions, check
from interactdiff.data.framing import Framing
from interactdiff.data.json_lines import json_lines
from interactdiff.data.problems import Problems
from interactdiff.data.reading import MetadataFolder, Records
from interactdiff.errors import DataError

BAD = 500  # line from 1
SMALL = Framing(resolution=64, multiple=32)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of 1,000 pictures; the rows that are right."""
    folder = tmp_path_factory.mktemp("data") / "people"
    return folder, make_links(folder, 1000)


def changed(**values: Any) -> dict[str, Any]:
    """The row at `BAD` with other values; None takes the key away."""
    made = copy.deepcopy(row(BAD - 1, f"{BAD - 1:07d}.jpg"))
    for key, value in values.items():
        if key in ("subject_box", "object_box", "subject", "action", "object"):
            made["interactions"][0][key] = value
        elif key == "box":
            made["entities"][0]["box"] = value
        elif value is None:
            del made[key]
        else:
            made[key] = value
    return made


LINES: dict[str, tuple[Any, str]] = {
    "no json": ('{"file_name": }', ", column 15: expected JSON, got '}' (Expecting value)"),
    "a line that breaks off": ('{"a": 1', ", column 8: expected JSON, got the end of the line"),
    "NaN": ('{"file_name": NaN}', ": expected JSON, got NaN"),
    "no object": ("[1, 2]", ": expected an object with file_name, got [1, 2]"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', ": expected each key once, got 'prompt' twice"),
    "an unknown key": (
        changed(interaction=[]),
        ": expected the keys of a row, got 'interaction' (did you mean 'interactions'?)",
    ),
    "a key of other tools": (
        changed(caption="a"),
        ": expected the keys of a row, got 'caption' (did you mean 'prompt'?)",
    ),
    "no file_name": (
        changed(file_name=None),
        ", file_name: expected the name of a picture in FOLDER/, got None",
    ),
    "an absolute path": (
        changed(file_name="/a.jpg"),
        ", file_name: expected a path inside FOLDER/, got '/a.jpg'",
    ),
    "a path of Windows": (changed(file_name="C:\\a.jpg"), "a path inside FOLDER/, got 'C:\\\\a.jpg'"),
    "a path out of it": (changed(file_name="a/../../b.jpg"), "a path inside FOLDER/, got 'a/../../b.jpg'"),
    "no such picture": (
        changed(file_name="img/0000007.jpg"),
        ", file_name: expected a picture in FOLDER/, got 'img/0000007.jpg' (did you mean '0000007.jpg'?)",
    ),
    "no caption": (changed(prompt=None), ": expected a prompt, or a .txt file with it beside the picture"),
    "an empty phrase": (changed(subject=" "), ", interaction 1, subject: expected a phrase, got ' '"),
    "a mistyped key of an item": (
        changed(entities=[{"phrase": "ball", "bix": [0, 0, 1, 1]}]),
        ", entity 1: expected the keys phrase, box, strength, got 'bix' (did you mean 'box'?)",
    ),
    "items that are no list": (changed(interactions={}), ", interactions: expected a list, got {}"),
    "an item without a key": (
        changed(entities=[{"phrase": "ball"}]),
        ", entity 1: expected the key box, got only",
    ),
    "edges the wrong way round": (
        changed(subject_box=[0.62, 0.1, 0.3, 0.5]),
        ", interaction 1, subject_box: expected x0 < x1, got x0 = 0.62 and x1 = 0.3",
    ),
    "five numbers": (
        changed(subject_box=[0, 0, 1, 1, 1]),
        "expected four numbers x0, y0, x1, y1, got [0, 0, 1, 1, 1]",
    ),
    "no numbers": (
        changed(object_box=["a", 0, 1, 1]),
        "object_box: expected x0 to be a number in [0, 1], got 'a'",
    ),
    "pixels": (
        changed(subject_box=[1, 2, 12.0, 15]),
        "subject_box: expected shares from 0 to 1, got 15 of a picture 16 x 16: are these pixels? (--boxes",
    ),
    "x, y, width, height": (
        changed(subject_box=[0.6, 0.5, 0.3, 0.2]),
        "got x0 = 0.6 and x1 = 0.3: are these x, y, width, height? (--boxes shares-xywh)",
    ),
    "a weight": (changed(weight=0), ", weight: expected a whole number from 1 to 1000, got 0"),
    "a flip": (changed(flip="no"), ", flip: expected true or false, got 'no'"),
}


@pytest.mark.parametrize("kind", LINES)
def test_one_bad_line_in_a_thousand_is_named(thousand: Any, kind: str) -> None:
    folder, rows = thousand
    bad, expected = LINES[kind]
    write_rows(folder, [*rows[: BAD - 1], bad, *rows[BAD:]])
    seen = []
    with pytest.raises(DataError) as raised:
        seen += list(read_folder(folder))
    (problem,) = raised.value.problems
    message = str(problem)
    assert message.startswith(f"{folder}/metadata.jsonl, line {BAD}")
    assert expected.replace("FOLDER", str(folder)) in message
    assert str(raised.value) == message


def test_percent_is_recognised_by_the_size_of_the_picture(tmp_path: Path) -> None:
    noise(640, 480).save(tmp_path / "a.jpg")
    one = {"file_name": "a.jpg", "prompt": "", "entities": [{"phrase": "ball", "box": [10, 20, 60.5, 90]}]}
    write_rows(tmp_path, [one])
    with pytest.raises(
        DataError, match=r"got 90 of a picture 640 x 480: are these percent\? \(--boxes percent\)"
    ):
        list(read_folder(tmp_path))
    (record,) = read_folder(tmp_path, form="percent")
    assert record.entities[0].box == (0.1, 0.2, 0.605, 0.9)
    one["entities"][0]["box"] = [412.0, 100, 80, 200]  # type: ignore[index]
    write_rows(tmp_path, [one])
    with pytest.raises(
        DataError, match=r"got 412.0 .*are these x, y, width, height in pixels\? \(--boxes pixels-xywh\)"
    ):
        list(read_folder(tmp_path))
    (record,) = read_folder(tmp_path, form="pixels-xywh")
    assert record.entities[0].box == (412 / 640, 100 / 480, 492 / 640, 300 / 480)


def test_all_mistakes_of_a_file_are_collected(tmp_path: Path) -> None:
    rows = make_folder(tmp_path, 40)
    for number in range(30):
        rows[number]["interactions"][0] |= {
            "subject": "",
            "subject_box": [0, 0, 2, 1],
            "object_box": [1, 0, 0, 1],
        }
    write_rows(tmp_path, rows)
    report = check(str(tmp_path), options=CheckOptions(framing=SMALL))
    assert len(report.errors) == 90
    lines = report.errors.lines()
    assert len(lines) == 21
    assert lines[-1] == "... and 70 more"
    fields = [(one.line, one.item, one.field) for one in report.errors.first[:4]]
    assert fields == [
        (1, "interaction 1", "subject"),
        (1, "interaction 1", "subject_box"),
        (1, "interaction 1", "object_box"),
        (2, "interaction 1", "subject"),
    ]
    with pytest.raises(DataError, match=r"\(and 89 more; interactdiff data check"):
        list(read_folder(tmp_path))


def test_missing_pictures_are_looked_for_in_one_list_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints stand where they are shown: many wrong rows take no longer than their reading."""
    rows = make_folder(tmp_path, 3)
    names = ["images/0001.png", "0002.JPG", "000x.png", *(f"none-{n}.png" for n in range(60))]
    write_rows(tmp_path, [{**rows[0], "file_name": name} for name in names])
    listed: list[Path] = []
    compared: list[str] = []
    own_names, own_nearest = folder_module.picture_names, folder_module.nearest
    monkeypatch.setattr(folder_module, "picture_names", lambda f: (listed.append(f), own_names(f))[1])
    monkeypatch.setattr(folder_module, "nearest", lambda n, k: (compared.append(n), own_nearest(n, k))[1])
    problems = Problems()
    assert list(MetadataFolder(tmp_path).scan(problems)) == []
    assert len(problems) == 63
    hints = [str(one).partition(" (did you mean ")[2] for one in problems.first]
    assert hints[:4] == ["'0001.png'?)", "'0002.png'?)", "'0002.png'?)", ""]
    assert len(listed) == 1
    assert compared == names[2:20]


def test_a_picture_twice_in_a_split_and_in_both_splits(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "train", 5)
    write_rows(tmp_path / "train", [*rows, rows[1]])
    make_folder(tmp_path / "test", 3)  # the same pixels as the first three
    report = check(str(tmp_path), options=CheckOptions(framing=SMALL))
    found = [str(one) for one in report.errors.first]
    where = f"{tmp_path}/train/metadata.jsonl, line 6, file_name"
    assert f"{where}: expected each picture once, got '0001.png' as in line 2" in found
    where = f"{tmp_path}/train/metadata.jsonl, line 1, file_name"
    expected = f"{where}: expected splits without a common picture, got '0000.png' as in test, line 1"
    assert expected in found
    assert report.errors.counts == {"repeated": 1, "split": 3}
    with pytest.raises(DataError, match="expected each picture once"):
        Records.open(tmp_path, "train")
    with pytest.raises(DataError, match="expected a split of test, train in"):
        Records.open(tmp_path)


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    rows = make_folder(tmp_path, 4)
    whole = (tmp_path / "0001.png").read_bytes()
    (tmp_path / "0001.png").write_bytes(whole[:-200])
    (tmp_path / "0002.png").write_bytes(b"<html>not found</html>")
    write_rows(tmp_path, rows)
    report = check(str(tmp_path), options=CheckOptions(framing=SMALL))
    assert [str(one) for one in report.errors.first] == [
        f"{tmp_path}/0001.png (line 2): expected a whole picture, got a file that ends early",
        f"{tmp_path}/0002.png (line 3): expected a whole picture, got a file that is none of "
        "JPEG, PNG, WEBP, BMP, GIF, TIFF",
    ]


def test_tokens_are_counted_where_there_is_a_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    rows = make_folder(tmp_path, 2)
    rows[0]["interactions"][0]["object"] = "b" * 30  # a token a letter
    rows[1]["interactions"][0]["object"] = "b " * 76
    write_rows(tmp_path, rows)
    report = check(str(tmp_path), options=CheckOptions(framing=SMALL))
    assert [one.line for one in report.errors.first] == [2]
    options = CheckOptions(framing=SMALL, tokens=lambda p: len(tokenizer(p).input_ids), max_tokens=24)
    report = check(str(tmp_path), options=options)
    assert "object: expected a phrase of at most 24 tokens, got 32" in str(report.errors.first[0])


def exif(image: Image.Image, orientation: int) -> Image.Exif:
    made = image.getexif()
    made[0x0112] = orientation
    return made


def test_every_warning(tmp_path: Path) -> None:
    """One row for each kind; `--strict` is the command's."""
    rows: list[dict[str, Any]] = []

    def add(name: str, **changes: Any) -> None:
        rows.append({**row(0, name), "prompt": "a person riding a bike", **changes})

    fine = [{"phrase": "ball", "box": [0.1, 0.1, 0.9, 0.9]}]
    for number, size in enumerate([(128, 128), (75, 128), (400, 128)]):
        noise(*size, seed=number).save(tmp_path / f"{number}.jpg")
        add(f"{number}.jpg")
    for number in range(3, 7):
        noise(128, 128, seed=number).save(tmp_path / f"{number}.jpg")
    add(
        "3.jpg",
        entities=[{"phrase": "ball", "box": [0.1, 0.1, 0.12, 0.12]}, {"phrase": "b", "box": [0, 0, 1, 0.02]}],
    )
    add("4.jpg", entities=fine * 31)
    add("5.jpg", prompt="someone on something")
    add("6.jpg", prompt="a person riding a bike to the left", entities=[{**fine[0], "phrase": "Ball"}])
    image = noise(128, 128, seed=7)
    image.save(tmp_path / "7.jpg", exif=exif(image, 6))
    image.convert("CMYK").save(tmp_path / "8.jpg")
    image.convert("RGBA").save(tmp_path / "9.png")
    image.save(tmp_path / "10.gif", save_all=True, append_images=[noise(128, 128, seed=8)])
    Image.new("I;16", (128, 128), 40000).save(tmp_path / "11.png")
    for name in ("7.jpg", "8.jpg", "9.png", "10.gif", "11.png"):
        add(name)
    noise(64, 64, seed=9).save(tmp_path / "12.png")  # no row
    write_rows(tmp_path, rows)
    framing = Framing(resolution=128, multiple=32)
    report = check(str(tmp_path), options=CheckOptions(framing=framing))
    assert not report.errors
    assert report.warnings.counts == {
        "small picture": 1,
        "long picture": 1,
        "small box": 2,
        "slots": 1,
        "caption": 2,
        "case": 1,
        "side": 1,
        "orientation": 1,
        "CMYK": 1,
        "alpha": 1,
        "animated": 1,
        "16-bit": 1,
        "without a row": 1,
    }
    assert "side" not in check(str(tmp_path), options=CheckOptions(flip=False)).warnings.counts


def test_ten_thousand_fuzzed_lines_raise_nothing_of_their_own(tmp_path: Path) -> None:
    make_folder(tmp_path, 4)
    rng = random.Random(0)
    good = [json.dumps(row(n, f"{n % 4:04d}.png")).encode() for n in range(8)]
    values = [
        b"null",
        b"1e999",
        b"-1",
        b"[]",
        b"{}",
        b'""',
        b'"\\ud800"',
        b"1" * 5000,
        b"[" * 3000,
        b'"\x00"',
    ]
    lines = []
    for _ in range(10_000):
        line = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 4)):
            at, kind = rng.randrange(len(line)), rng.randrange(4)
            if kind == 0:
                line[at] = rng.randrange(256)
            elif kind == 1:
                del line[at : at + rng.randrange(1, 20)]
            elif kind == 2:
                line[at:at] = rng.choice(values)
            else:  # in place of a value
                end = line.find(b",", at)
                line[line.find(b":", at) + 1 : end if end > 0 else None] = rng.choice(values)
            line = line or bytearray(b" ")
        lines.append(bytes(line).replace(b"\n", b" "))
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    problems, records = Problems(), 0
    for _, record in MetadataFolder(tmp_path).scan(problems):
        record.scene()
        records += 1
    assert records > 100
    assert len(problems) > 5000
    assert all(": expected " in str(problem) for problem in problems.first)


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    with path.open("wb") as file:
        file.write(b'{"file_name": "')
        for _ in range(40):
            file.write(b"a" * 2**20)
        file.write(b'"}\n{"file_name": "b"}\n')
    problems = Problems()
    found = list(json_lines(path, "x", problems))
    assert [line for line, _, _ in found] == [2]
    with path.open("rb") as file:
        file.seek(found[0][1])
        assert file.read() == b'{"file_name": "b"}\n'
    assert str(problems.first[0]) == "x, line 1: expected a line under 16,777,216 bytes, got more"
