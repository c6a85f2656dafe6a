"""Layouts to evaluate: any form of data, HICO-DET's annotations, pictures that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import export_scenes, make_folder, write_rows
from hico_files import FORMS, PAIRS, RIDE, SIZES, hico_pictures, name_of, write_anno_list, write_instances
from PIL import Image

from interactdiff.data import read_folder
from interactdiff.data.classes import hico_classes
from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run
from interactdiff.data.shards import write_shards
from interactdiff.errors import DataError
from interactdiff.evaluation.detection import Picture
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_data import drawn_pictures, limited, open_data
from interactdiff.evaluation.report import layouts_digest
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.scene import Interaction

BOX = (0.1, 0.1, 0.4, 0.8)


def shown(layout: Layout) -> tuple[Any, ...]:
    return layout.prompt, layout.interactions, layout.entities, layout.size


def test_every_form_of_data_gives_the_same_layouts(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_folder(tmp_path / "rows/test", 5)
    write_shards(read_folder(tmp_path / "rows"), tmp_path / "shards", "test", count=2)
    (tmp_path / "loose").mkdir()
    for row in rows:
        name = row["file_name"]
        (tmp_path / "loose" / name).write_bytes((tmp_path / "rows/test" / name).read_bytes())
        scene = {key: value for key, value in row.items() if key != "file_name"}
        (tmp_path / "loose" / name).with_suffix(".json").write_text(json.dumps(scene))
    from interactdiff.data.tables import features

    table = [
        {
            **{key: row.get(key, []) for key in ("interactions", "entities")},
            "image": {"bytes": (tmp_path / "rows/test" / row["file_name"]).read_bytes(), "path": None},
            "caption": row["prompt"],
        }
        for row in rows
    ]
    known = {key: one for key, one in features().items() if key in ("interactions", "entities", "image")}
    made = datasets.Dataset.from_list(
        table, features=datasets.Features({**known, "caption": datasets.Value("string")})
    )
    made.to_parquet(str(tmp_path / "rows.parquet"))
    data = {
        form: open_data(str(tmp_path / form), columns={"prompt": "caption"} if "parquet" in form else None)
        for form in ("rows", "shards", "loose", "rows.parquet")
    }
    first = data["rows"]
    assert [one.file_name for one in first.layouts] == [row["file_name"] for row in rows]
    assert first.layouts[1].size == (96, 64)
    assert first.split == "test"
    for other in data.values():
        assert list(map(shown, other.layouts)) == list(map(shown, first.layouts))
        assert other.table.classes == first.table.classes == (("riding", "bike"),)
        for one, layout in zip(first.layouts, other.layouts, strict=True):
            picture = Picture(layout.file_name, layout.picture)
            assert picture.read() == Picture(one.file_name, one.picture).read()
            assert picture.shown_size == picture.open().size == layout.size
    assert data["shards"].layouts[3].file_name == data["shards"].layouts[3].stem
    assert layouts_digest(data["loose"].layouts) == layouts_digest(first.layouts)
    assert layouts_digest(data["shards"].layouts[:4]) != layouts_digest(first.layouts[:4])


def test_pictures_need_not_be_there(tmp_path: Path) -> None:
    rows = make_folder(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"{number:04d}.png").unlink()
    data = open_data(str(tmp_path))
    assert [(one.picture, one.size) for one in data.layouts] == [(None, None)] * 3
    rows[1]["file_name"] = "0001.txt"
    write_rows(tmp_path, rows)
    with pytest.raises(DataError, match=r"metadata.jsonl, line 2, file_name: expected a picture in"):
        open_data(str(tmp_path))
    rows[1]["file_name"] = "0000.jpg"
    write_rows(tmp_path, rows)
    with pytest.raises(DataError, match=r"in more than their ending, got 0000\.png and 0000\.jpg"):
        open_data(str(tmp_path))
    rows[1]["interactions"][0]["subject_box"] = [0.6, 0, 0.3, 1]
    write_rows(tmp_path, rows)
    with pytest.raises(
        DataError, match=r"line 2, interaction 1, subject_box: expected x0 < x1, got x0 = 0.6"
    ):
        open_data(str(tmp_path))


def test_data_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder of pictures.*: no such folder"):
        open_data(str(tmp_path / "no"))
    with pytest.raises(DataError, match=r"expected metadata.jsonl, pictures, .* got none of them"):
        open_data(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"expected at least one picture in .*, got none"):
        open_data(str(tmp_path))
    with pytest.raises(DataError, match="expected HICO-DET in the folder that"):
        open_data("hico")


def test_the_split_is_test_or_the_only_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", 2)
    assert (open_data(str(tmp_path)).split, open_data(str(tmp_path / "train")).split) == ("train", "test")
    make_folder(tmp_path / "val", 3)
    with pytest.raises(DataError, match="expected a split of train, val in"):
        open_data(str(tmp_path))
    assert len(open_data(str(tmp_path), "val").layouts) == 3
    make_folder(tmp_path / "test", 4)
    assert (len(open_data(str(tmp_path)).layouts), open_data(str(tmp_path)).split) == (4, "test")


@pytest.mark.parametrize("form", FORMS)
def test_annotations_of_hico_det_and_what_they_are_converted_to_are_one(form: str, tmp_path: Path) -> None:
    """Every form, with its pictures and, where it names sizes, without."""
    if form == "mat":
        pytest.importorskip("scipy")
    root = tmp_path / "hico"
    hico_pictures(root)
    (root / "annotations").mkdir()
    FORMS[form](root / "annotations")
    data = open_data(str(root))
    assert data.name.startswith("HICO-DET, ")
    assert (data.split, len(data.table.classes), len(data.table.rare or ())) == ("test", 600, 138)
    assert [one.file_name for one in data.layouts] == [name_of(number) for number in (1, 2, 3)]
    first = data.layouts[0]
    assert first.interactions[0].object_box == (100 / 640, 200 / 480, 1.0, 1.0)
    assert first.picture == root / "images/test2015" / name_of(1)
    twice = "a person is riding a bicycle"  # the data set has it twice, and so it is scored
    assert first.prompt == f"a person is holding a bicycle, {twice}, {twice}"
    run("hico-det", str(root), tmp_path / "out", Options(split="test"))
    converted = open_data(str(tmp_path / "out"), classes="hico")
    for one, other in zip(data.layouts, converted.layouts, strict=True):
        assert tuple(dict.fromkeys(one.interactions)) == other.interactions
        assert (one.file_name, one.size) == (other.file_name, other.size)
    assert [one.prompt for one in data.layouts[1:]] == [one.prompt for one in converted.layouts[1:]]
    assert first.known_objects == ({"bicycle", "airplane"} if form == "anno_list" else {"bicycle"})
    for number in SIZES:
        (root / "images/test2015" / name_of(number)).unlink()
    if form == "triplets":
        with pytest.raises(DataError, match=rf"test_hico.json, {name_of(1)}: expected its picture, or"):
            open_data(str(root))
    else:
        alone = open_data(str(root))
        assert alone.layouts == data.layouts
        assert alone.layouts[0].picture is None


def test_json_is_read_before_the_mat_file_and_anywhere(tmp_path: Path) -> None:
    (tmp_path / "anno_bbox.mat").write_bytes(b"")
    write_anno_list(tmp_path)
    assert open_data(str(tmp_path)).name == "HICO-DET, anno_list.json"
    write_instances(tmp_path)
    assert open_data(str(tmp_path)).name == "HICO-DET, instances_test2015.json"


def test_truth_is_in_inclusive_pixels_of_the_picture_that_is_scored(tmp_path: Path) -> None:
    write_instances(tmp_path)
    data = open_data(str(tmp_path))
    own = data.table.truth(data.layouts[2], SIZES[3])
    _, person, thing = PAIRS[3][0]
    assert own.persons.tolist() == [pytest.approx([edge - 1 for edge in person])]
    assert own.objects.tolist() == [pytest.approx([edge - 1 for edge in thing])]
    assert own.inclusive
    assert own.classes.tolist() == [RIDE]
    # as the paper's script scales: 50 * 512 / 300 = 85.3, 149 * 512 / 200 = 381.44
    floored = data.table.truth(data.layouts[2], (512, 512), floor=True)
    assert floored.objects.tolist() == [[85, 128, 424, 381]]
    known = data.table.known(data.layouts[2])
    assert {data.table.classes[n][1] for n in known.nonzero()[0]} == {"bicycle"}


def triplets(**changes: Any) -> list[dict[str, Any]]:
    boxes = [{"bbox": [10, 20, 59, 79], "category_id": 1}, {"bbox": [0, 40, 99, 99], "category_id": 2}]
    verb = hico_classes().numbers[RIDE][0] + 1
    hois = [{"subject_id": 0, "object_id": 1, "category_id": verb}]
    row = {"file_name": name_of(1), "annotations": boxes, "hoi_annotation": hois, "width": 200, "height": 100}
    return [{**row, **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "of another form"),
        ("{", "expected JSON"),
        ("{}", "of another form"),
        ([{"a": 1}], "of another form"),
        (
            triplets(hoi_annotation=[{"subject_id": 0, "object_id": 1, "category_id": 1}]),
            "picture 1: expected one of 600 classes, got adjusting bicycle",
        ),
        (
            triplets(annotations=2 * [{"bbox": [300, 0, 310, 9], "category_id": 2}]),
            r"00000001.jpg: expected a box in a picture of 200 x 100, got \[300.0, 0.0, 311.0, 10.0\]",
        ),
        (triplets(annotations=2 * [{"category_id": 2}]), "picture 1: .*got others \\(KeyError: 'bbox'\\)"),
        (triplets(annotations=2 * [{"bbox": [0, 0, 9, 9], "category_id": 12}]), "KeyError: 12"),
        ({"filenames": ["a"], "size": [], "annotation": []}, "as many filenames as sizes and annotations"),
        ({"filenames": 1, "size": 1, "annotation": 1}, "as many filenames as sizes and annotations"),
        (
            [{"global_id": "HICO_test2015_1", "image_size": [9, 9], "hois": [{"id": "601"}]}],
            "picture 1: expected a class from 1 to 600, got '601'",
        ),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "test_hico.json").write_text(text)
    with pytest.raises(DataError, match=rf"test_hico.json.*{message}|{message}.*test_hico.json"):
        open_data(str(tmp_path))


def test_a_picture_that_annotations_have_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_hico.json").write_text(json.dumps([*triplets(), *triplets()]))
    with pytest.raises(DataError, match=f"expected each picture once, got {name_of(1)} again"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("number", [-1, 2])
def test_pictures_with_an_index_out_of_range_are_left_out(tmp_path: Path, number: int) -> None:
    wrong = triplets(hoi_annotation=[{"subject_id": 0, "object_id": number, "category_id": 1}])
    (tmp_path / "test_hico.json").write_text(json.dumps([*wrong, *triplets(file_name=name_of(2))]))
    assert [one.file_name for one in open_data(str(tmp_path)).layouts] == [name_of(2)]


def test_scenes_of_stickworld_are_worded_as_their_detector_says_it(tmp_path: Path) -> None:
    scenes = held_out_scenes(4, 0)
    export_scenes(tmp_path / "test", scenes, 48)
    data = open_data(str(tmp_path))
    assert [one.prompt for one in data.layouts] == [scene.caption for scene in scenes]
    assert [one.interactions for one in data.layouts] == [s.interactions(colours=False) for s in scenes]
    assert [one.entities for one in data.layouts] == [s.lone_entities(colours=False) for s in scenes]
    assert set(data.table.classes) == {(t.action, t.object) for s in scenes for t in s.triplets}
    with pytest.raises(DataError, match=r"metadata.jsonl, line \d: expected words of HICO-DET, got"):
        open_data(str(tmp_path), classes="hico")


def test_drawn_pictures_are_found_by_name_with_any_ending(tmp_path: Path) -> None:
    find = drawn_pictures(tmp_path)
    for name in ("a.webp", "b.v2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert find(Layout("a.jpg", "")) == tmp_path / "a.webp"
    assert find(Layout("b.v2", "")) == tmp_path / "b.v2.png"
    assert not find(Layout("b.v1", "")).exists()


def test_a_limit_balances_classes_and_a_smaller_one_is_part_of_a_larger() -> None:
    often, seldom = (Interaction("person", verb, "bike", BOX, BOX) for verb in ("a", "b"))
    layouts = [Layout(f"{n}.png", "", (often,)) for n in range(50)] + [
        Layout(f"b{n}.png", "", (seldom,)) for n in range(4)
    ]
    six = limited(layouts, 6)
    assert [one.interactions[0].action for one in six].count("b") == 3
    assert {one.file_name for one in limited(layouts, 3)} < {one.file_name for one in six}
    assert six == limited(layouts, 6)
    assert limited(layouts, 100) == tuple(layouts)
    assert len(limited([*layouts, Layout("none.png", "")], 55)) == 55
    assert ClassTable.of(six).classes == (("a", "bike"), ("b", "bike"))
