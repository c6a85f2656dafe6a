"""Shards: written and read back, damage named, webdataset's own reader, foreign shards."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_files import make_folder, write_rows

from interactdiff.data import Records, read_folder
from interactdiff.data.checking import CheckOptions, check
from interactdiff.data.framing import Framing
from interactdiff.data.reading import splits
from interactdiff.data.shards import Shards, write_shards
from interactdiff.errors import DataError


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Ten pictures in shards of four."""
    make_folder(tmp_path / "rows")
    write_shards(read_folder(tmp_path / "rows"), tmp_path / "shards", "train", count=4)
    return tmp_path / "shards"


def test_shards_hold_what_the_folder_holds(packed: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in packed.iterdir()) == [
        "index.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]
    there, here = list(read_folder(tmp_path / "rows")), list(read_folder(packed))
    for one, other in zip(there, here, strict=True):
        assert other.to_row() == {**one.to_row(), "id": one.name}
        assert other.stored.read() == one.stored.read()
    records = Records.open(packed)
    assert records[6] == here[6]
    assert records.shards.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    write_shards(read_folder(tmp_path / "rows"), tmp_path / "again", "train", count=4)
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_subjects_go_with_their_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path / "rows", 2)
    dog = {"phrase": "dog", "image": "0001.png"}
    write_rows(tmp_path / "rows", [{"file_name": "0000.png", "prompt": "a dog", "subjects": [dog]}])
    write_shards(read_folder(tmp_path / "rows"), tmp_path / "shards", "train")
    ((there,), (here,)) = read_folder(tmp_path / "rows"), read_folder(tmp_path / "shards")
    assert len(here.items) == 1
    assert here.items == there.items


def test_webdataset_reads_them(packed: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    stream = webdataset.WebDataset([str(p) for p in sorted(packed.glob("*.tar"))], shardshuffle=False)
    found = list(stream)
    records = list(read_folder(tmp_path / "rows"))
    assert [json.loads(one["json"])["id"] for one in found] == [one.name for one in records]
    assert [one["png"] for one in found] == [one.stored.read() for one in records]


def test_a_size_limit_and_a_second_split(packed: Path, tmp_path: Path) -> None:
    size = (tmp_path / "rows" / "0000.png").stat().st_size
    made = write_shards(read_folder(tmp_path / "rows"), packed, "test", size=2 * size + 10)
    assert len(made) > 4
    with pytest.raises(DataError, match=r"expected a split of test, train in .*, got none named"):
        list(read_folder(packed))
    assert len(list(read_folder(packed, "train"))) == len(list(read_folder(packed, "test"))) == 10
    with pytest.raises(DataError, match=r"expected no shards of test in .* yet"):
        write_shards(read_folder(tmp_path / "rows"), packed, "test")


def test_nothing_is_left_where_a_row_is_wrong(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "rows")
    write_rows(tmp_path / "rows", [*rows, {"file_name": "none.png", "prompt": ""}])
    with pytest.raises(DataError, match="line 11, file_name: expected a picture in"):
        write_shards(read_folder(tmp_path / "rows"), tmp_path / "shards", "train", count=4)
    assert not list((tmp_path / "shards").iterdir())
    write_rows(tmp_path / "rows", rows)
    assert len(write_shards(read_folder(tmp_path / "rows"), tmp_path / "shards", "train", count=4)) == 3


def test_damage_is_named(packed: Path) -> None:
    second = packed / "train-000001.tar"
    data = second.read_bytes()
    second.write_bytes(data[:-700])
    with pytest.raises(DataError, match=r"expected .*train-000001.tar to have [\d,]+ bytes, got"):
        Shards(packed)
    second.unlink()
    with pytest.raises(DataError, match=r"expected the shard train-000001.tar of index.json in .*, got no"):
        Shards(packed)
    second.write_bytes(data)
    (packed / "train-000007.tar").write_bytes(data)
    with pytest.raises(
        DataError, match=r"expected only the shards of index.json in .*, got train-000007.tar"
    ):
        Shards(packed)
    (packed / "train-000007.tar").unlink()
    index = json.loads((packed / "index.json").read_text())
    index["shards"]["train-000002.tar"] = index["shards"]["train-000001.tar"]
    (packed / "train-000002.tar").write_bytes(data)
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"got train-000002.tar with the contents of train-000001.tar"):
        Shards(packed)
    (packed / "index.json").write_text("{}")
    with pytest.raises(DataError, match="expected an index of shards in"):
        Shards(packed)


def test_changed_contents_are_found_by_check(packed: Path) -> None:
    path = packed / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) - 20] ^= 1
    path.write_bytes(bytes(data))
    report = check(str(packed), options=CheckOptions(framing=Framing(64, 32)))
    assert [str(one) for one in report.errors.first] == [
        f"{path}: expected the contents that index.json says, got others"
    ]


def test_shards_of_others_are_read_without_an_index(tmp_path: Path) -> None:
    make_folder(tmp_path / "rows", 3)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, record in enumerate(read_folder(tmp_path / "rows")):
            parts = {"png": record.stored.read(), "json": json.dumps(record.to_row()).encode()}
            for end, data in parts.items():
                member = tarfile.TarInfo(f"./x/{number:03d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "rows").rename(tmp_path.parent / f"{tmp_path.name}-rows")
    found = list(read_folder(tmp_path))
    assert [one.name for one in found] == ["a.tar/./x/000", "a.tar/./x/001", "a.tar/./x/002"]
    assert [one.open().size for one in found] == [(64, 64), (96, 64), (64, 96)]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("alone.png"))
    with pytest.raises(DataError, match=r"expected a row and a picture of each key in .*b\.tar, got one"):
        list(read_folder(tmp_path))


def test_rows_are_found_again_at_once(packed: Path, tmp_path: Path) -> None:
    first = Records.open(packed, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    again = Records.open(packed, cache=tmp_path / "cache")
    assert kept.stat().st_mtime_ns == stamp
    assert [one.name for one in again] == [one.name for one in first]
    kept.write_bytes(b"damaged")
    assert len(Records.open(packed, cache=tmp_path / "cache")) == 10
    rows = make_folder(tmp_path / "rows2")
    Records.open(tmp_path / "rows2", cache=tmp_path / "cache")
    write_rows(tmp_path / "rows2", rows[:4])
    assert len(Records.open(tmp_path / "rows2", cache=tmp_path / "cache")) == 4


def without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "prompt"}


def test_parquet_is_read_with_a_map_of_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from interactdiff.data.tables import features

    given = make_folder(tmp_path / "rows")
    records = list(read_folder(tmp_path / "rows"))
    rows = [
        {
            "image": {"bytes": r.stored.read(), "path": None},
            "said": r.prompt,
            "more": 1,
            **without_prompt(r.to_row()),
        }
        for r in records
    ]
    kinds = {k: v for k, v in features().items() if k in ("image", "interactions", "entities")}
    kinds |= {"said": datasets.Value("string"), "more": datasets.Value("int64")}
    full = [{**dict.fromkeys(kinds), **one} for one in rows]
    for one in full:
        for key, names in (("interactions", ("strength", "action_region")), ("entities", ("strength",))):
            one[key] = [{**dict.fromkeys(names), **item} for item in one[key] or []]
    table = arrow.Table.from_pylist(full, schema=datasets.Features(kinds).arrow_schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    found = list(read_folder(tmp_path / "a.parquet", columns={"prompt": "said"}))
    assert [one.items for one in found] == [one.items for one in records]
    assert [one.open().size for one in found] == [one.open().size for one in records]
    assert found[3].prompt == given[3]["prompt"]
    with pytest.raises(DataError, match=r"expected a column of .*more.* for a key of .*, got prompt=caption"):
        list(read_folder(tmp_path / "a.parquet", columns={"prompt": "caption"}))
    with pytest.raises(DataError, match=r"expected a split in the names of files in .* for 'val', got none"):
        list(read_folder(tmp_path / "a.parquet", "val"))
    hub = tmp_path / "hub"
    hub.mkdir()
    for name, part in (("train", table.slice(0, 3)), ("test", table.slice(3))):
        parquet.write_table(part, hub / f"{name}-00000-of-00001.parquet")
    of_test = read_folder(hub, "test", columns={"prompt": "said"})
    assert [one.items for one in of_test] == [one.items for one in records[3:]]
    for split, got in ((None, "none named"), ("val", "'val'")):
        with pytest.raises(DataError, match=f"expected a split of test, train in .*, got {got}"):
            list(read_folder(hub, split))


def test_parquet_files_name_their_split_or_lie_in_its_folder(tmp_path: Path) -> None:
    def named(*names: str) -> list[str | None]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return splits(folder)

    assert named("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "eval.parquet") == [
        "eval",
        "train",
    ]
    assert named("train/0000.parquet", "validation/0000.parquet") == ["train", "validation"]
    assert named("my-split-00000-of-00001.parquet") == ["my-split"]
    assert named("part-0.parquet", "part-1.parquet", "test.parquet") == [None]
    assert splits(tmp_path / "0/eval.parquet") == ["eval"]


def test_imagefolder_reads_our_rows_with_our_features(tmp_path: Path) -> None:
    """What `datasets` makes of a folder whose first rows lack what later ones have."""
    datasets = pytest.importorskip("datasets")
    from interactdiff.data.tables import features

    make_folder(tmp_path)
    rows = [{"file_name": f"{n:04d}.png", "prompt": "", "interactions": []} for n in range(9)]
    ride = {
        "subject": "a",
        "action": None,
        "object": "b",
        "subject_box": [0, 0, 1, 1],
        "object_box": [0, 0, 1, 0.5],
    }
    rows.append({"file_name": "0009.png", "prompt": "", "interactions": [ride]})
    write_rows(tmp_path, rows)
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", features=features())
    assert table[9]["interactions"][0]["subject_box"] == [0.0, 0.0, 1.0, 1.0]
    assert table[9]["interactions"][0]["action"] is None
    assert table[0]["interactions"] == []


def test_parquet_without_datasets_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    needed = r"interactdiff\[data\] for parquet, got no datasets"
    with pytest.raises(DataError, match=f"^expected the packages of {needed}"):
        list(read_folder(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=f"expected a folder at data/peple, got none; for .* Hub: .*{needed}"):
        list(read_folder("data/peple"))


def test_a_mistyped_folder_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose name might be a Hub id."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "data/people", 1)
    expected = (
        r"a folder or a data set of the Hub at data/peple, got no such folder, and from the Hub \w+Error:"
    )
    with pytest.raises(DataError, match=f"^expected {expected}"):
        list(read_folder("data/peple"))
    for name, got in (("peple", "folder"), ("./data/peple", "folder"), ("data/people.parquet", "file")):
        with pytest.raises(DataError, match=f"parquet files, got '.*': no such {got}"):
            list(read_folder(name))
    assert len(list(read_folder("data/people"))) == 1
