"""Layouts: image folders read strictly, HICO-DET's three JSON forms, scenes of stickworld exported."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from interactdiff.data.hico import annotation_file, coco_objects, hico_classes, read_hico
from interactdiff.data.layouts import METADATA, Layout, metadata_file, read_layouts, write_layouts
from interactdiff.data.stickworld import export_scenes
from interactdiff.errors import DataError
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.layout_data import limited, open_data
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.scene import Entity, Interaction

RIDE = Interaction("person", "riding", "bike", (0.1, 0.1, 0.4, 0.8), (0.1, 0.5, 0.6, 0.9))
GOOD = {
    "file_name": "1.png",
    "prompt": "a ride",
    "interactions": [Layout("", "", (RIDE,)).to_row()["interactions"][0]],
}


def row(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(GOOD)), **changes}


def read(tmp_path: Path, *lines: str | dict[str, Any]) -> list[Layout]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / METADATA).write_text(text + "\n")
    return list(read_layouts(tmp_path / METADATA))


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    layouts = [
        Layout("a/1.png", "a ride", (RIDE,), (Entity("ball", (0, 0, 0.5, 0.5), 0.5),)),
        Layout("2.jpg", ""),
    ]
    write_layouts(tmp_path / METADATA, layouts)
    first = (tmp_path / METADATA).read_bytes()
    assert list(read_layouts(tmp_path / METADATA)) == layouts
    write_layouts(tmp_path / METADATA, layouts)
    assert (tmp_path / METADATA).read_bytes() == first
    assert b"strength" not in first.splitlines()[1]


def test_what_says_nothing_of_a_layout_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "2.txt").write_text("beside it\n")
    more = {key: None for key in ("weight", "license", "seed", "negative_prompt")}
    layouts = read(tmp_path, row(**more), "", {"file_name": "2.png"})
    assert layouts[0].interactions == (RIDE,)
    assert layouts[1] == Layout("2.png", "beside it")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[}", "line 2, column 2: expected JSON, got"),
        (
            '{"file_name": "2.png", "file_name": "3.png"}',
            "line 2: expected each key once, got 'file_name' twice",
        ),
        ("[]", r"line 2: expected an object, got \[\]"),
        (
            {"file_name": "2.png", "prompt": "", "interaction": []},
            r"line 2: expected the keys of a row, got 'interaction' \(did you mean 'interactions'\?\)",
        ),
        ({"prompt": ""}, "line 2: expected the key file_name, got only"),
        (row(file_name="../2.png"), "line 2, file_name: expected a name within the folder, got '../2.png'"),
        (row(file_name="/2.png"), "line 2, file_name: expected a name within the folder"),
        (row(file_name="2.gif"), "line 2, file_name: expected a picture"),
        (row(), "line 2, file_name: expected each picture once, got '1.png' of line 1 again"),
        ({"file_name": "2.png"}, "line 2, prompt: expected text, got None"),
        (row(file_name="2.png", interactions={}), r"line 2, interactions: expected a list, got \{\}"),
        (
            row(
                file_name="2.png", interactions=[{**GOOD["interactions"][0], "subject_box": [0.6, 0, 0.3, 1]}]
            ),
            "line 2, interaction 1, subject_box: expected x0 < x1, got x0 = 0.6 and x1 = 0.3",
        ),
        (
            row(file_name="2.png", entities=[{"phrase": "x"}]),
            "line 2, entity 1: expected the key box, got only",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"{METADATA}, ({message})"):
        read(tmp_path, row(), line)


def test_folders_without_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no such folder"):
        metadata_file(tmp_path / "no")
    with pytest.raises(DataError, match=f"got a folder without {METADATA}"):
        open_data(str(tmp_path))
    (tmp_path / METADATA).write_text("\n")
    with pytest.raises(DataError, match=r"expected layouts in .*, got none"):
        open_data(str(tmp_path))
    with pytest.raises(DataError, match="expected HICO-DET in the folder that"):
        open_data("hico")


# Four pictures of 200 x 100; boxes of inclusive pixels from 0, verbs and objects by name.
PAIRS = {
    "HICO_test2015_00000001.jpg": [("riding", "bicycle", (10, 20, 59, 79), (0, 40, 99, 99))],
    "HICO_test2015_00000002.jpg": [],
    "HICO_test2015_00000003.jpg": [
        ("with", "cell phone", (0, 0, 9, 9), (190, 90, 199, 99)),
        ("holding", "umbrella", (5, 5, 50, 95), (30, 0, 80, 40)),
    ],
    "HICO_test2015_00000004.jpg": [("hugging", "person", (1, 1, 98, 98), (100, 1, 198, 98))],
}


def numbers(verb: str, thing: str) -> tuple[int, int, int]:
    table = hico_classes()
    return table.classes.index((verb, thing)), table.objects.index(thing), table.verbs.index(verb)


def triplet_list() -> list[dict[str, Any]]:
    coco = {name: number for number, name in coco_objects().items()}
    rows = []
    for name, pairs in PAIRS.items():
        boxes = [
            {"bbox": list(box), "category_id": coco[kind]}
            for verb, thing, person, of in pairs
            for box, kind in ((person, "person"), (of, thing))
        ]
        if boxes:
            boxes[0]["category_id"] = f"{boxes[0]['category_id']}\n"
        hois = [
            {"subject_id": 2 * n, "object_id": 2 * n + 1, "category_id": numbers(verb, thing)[2] + 1}
            for n, (verb, thing, _, _) in enumerate(pairs)
        ]
        rows.append(
            {"file_name": name, "annotations": boxes, "hoi_annotation": hois, "width": 200, "height": 100}
        )
    return rows


def instances() -> dict[str, Any]:
    annotation = []
    for pairs in PAIRS.values():
        hoi, thing, verb = (
            zip(*(numbers(v, o) for v, o, _, _ in pairs), strict=True) if pairs else ((), (), ())
        )
        annotation.append(
            {
                "boxes_h": [[edge + 1 for edge in person] for _, _, person, _ in pairs],
                "boxes_o": [[edge + 1 for edge in of] for _, _, _, of in pairs],
                "hoi": hoi,
                "object": thing,
                "verb": verb,
            }
        )
    return {
        "filenames": list(PAIRS),
        "size": [[200, 100]] * 4,
        "empty": [1],
        "annotation": annotation,
        "correspondence": [],
    }


def hoi_lists() -> list[dict[str, Any]]:
    return [
        {
            "global_id": name.removesuffix(".jpg"),
            "image_size": [100, 200, 3],
            "hois": [
                {
                    "id": f"{numbers(verb, thing)[0] + 1:03}",
                    "human_bboxes": [person],
                    "object_bboxes": [of],
                    "connections": [[0, 0]],
                    "invis": 0,
                }
                for verb, thing, person, of in pairs
            ],
            "pos_hoi_ids": [f"{numbers(verb, thing)[0] + 1:03}" for verb, thing, _, _ in pairs],
        }
        for name, pairs in PAIRS.items()
    ] + [{"global_id": "HICO_train2015_00000001", "image_size": [1, 1, 3], "hois": []}]


FORMS = {
    "test_hico.json": triplet_list,
    "instances_test2015.json": instances,
    "anno_list.json": hoi_lists,
}


def test_three_forms_of_hico_give_the_same_layouts(tmp_path: Path) -> None:
    read_as = {}
    for name, make in FORMS.items():
        (tmp_path / name).write_text(json.dumps(make()))
        read_as[name] = read_hico(tmp_path / name)
    first = read_as["test_hico.json"]
    assert [one.file_name[-5] for one in first] == ["1", "3", "4"]
    assert first[0].interactions[0].subject_box == (0.05, 0.2, 0.3, 0.8)
    assert first[0].prompt == "a person is riding a bicycle"
    assert first[1].prompt == "a person with a cell phone, a person is holding an umbrella"
    assert first[0].size == (200, 100)
    assert all(layouts == first for layouts in read_as.values())
    assert annotation_file(tmp_path) == tmp_path / "test_hico.json"


def test_truth_is_in_inclusive_pixels_of_the_picture_that_is_scored(tmp_path: Path) -> None:
    (tmp_path / "test_hico.json").write_text(json.dumps(triplet_list()))
    data = open_data(str(tmp_path))
    assert (data.name, len(data.table.classes), len(data.table.rare or ())) == (
        "HICO-DET, test_hico.json",
        600,
        138,
    )
    own = data.table.truth(data.layouts[0], (200, 100))
    assert own.persons.tolist() == [pytest.approx([10, 20, 59, 79])]
    assert own.inclusive
    assert own.classes.tolist() == [numbers("riding", "bicycle")[0]]
    # as the paper's script scales: 59 * 512 / 200 = 151.04, 79 * 512 / 100 = 404.48
    floored = data.table.truth(data.layouts[0], (512, 512), floor=True)
    assert floored.persons.tolist() == [[25, 102, 151, 404]]
    known = data.table.known(data.layouts[0])
    assert {data.table.classes[n][1] for n in known.nonzero()[0]} == {"bicycle"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[0]["hoi_annotation"][0].update(category_id=1),
            "expected one of 600 classes, got adjusting",
        ),
        (
            lambda rows: rows[0]["annotations"][0].update(bbox=[300, 0, 310, 9]),
            "expected a box in a picture of 200 x",
        ),
        (lambda rows: rows[0]["annotations"][0].pop("bbox"), "got KeyError"),
        (lambda rows: rows[0].pop("width"), "expected its picture beside test_hico.json, which has no sizes"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, change: Any, message: str) -> None:
    rows = triplet_list()
    change(rows)
    (tmp_path / "test_hico.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        read_hico(tmp_path / "test_hico.json")


def test_pictures_are_found_where_the_archive_has_them_and_tell_sizes(tmp_path: Path) -> None:
    rows = triplet_list()
    for one in rows:
        del one["width"]
    rows[2]["hoi_annotation"][0]["object_id"] = 99  # such pictures are left out as a whole
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images/test2015").mkdir(parents=True)
    (tmp_path / "annotations/test_hico.json").write_text(json.dumps(rows))
    for name in PAIRS:
        Image.new("RGB", (200, 100)).save(tmp_path / "images/test2015" / name)
    data = open_data(str(tmp_path))
    assert [one.file_name[-5] for one in data.layouts] == ["1", "4"]
    assert data.picture(data.layouts[0]) == tmp_path / "images/test2015" / data.layouts[0].file_name


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    for text, message in (("[]", "of another form"), ("{", "expected JSON")):
        (tmp_path / "test_hico.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_hico(tmp_path / "test_hico.json")


def test_scenes_are_exported_with_what_they_show_and_the_same_bytes_again(tmp_path: Path) -> None:
    scenes = held_out_scenes(4, 0)
    layouts = export_scenes(tmp_path / "test", scenes, 48, colours=False)
    first = {path.name: path.read_bytes() for path in (tmp_path / "test").iterdir()}
    export_scenes(tmp_path / "test", scenes, 48, colours=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "test").iterdir()} == first
    data = open_data(str(tmp_path))
    assert list(data.layouts) == layouts
    assert [one.prompt for one in layouts] == [scene.caption for scene in scenes]
    assert {pair for pair in data.table.classes} == {(t.action, t.object) for s in scenes for t in s.triplets}
    assert Image.open(tmp_path / "test/000000.png").size == (48, 48)
    coloured = export_scenes(tmp_path / "colours", scenes, 48)
    assert [one.interactions for one in coloured] == [scene.interactions() for scene in scenes]
    with pytest.raises(DataError, match="expected words of HICO-DET, got"):
        open_data(str(tmp_path), classes="hico")


def test_a_limit_balances_classes_and_a_smaller_one_is_part_of_a_larger() -> None:
    often, seldom = (
        Interaction("person", verb, "bike", RIDE.subject_box, RIDE.object_box) for verb in ("a", "b")
    )
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
