"""Converters: small sources made by hand, and rows that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import make_folder, noise
from hico_files import FORMS, hico_pictures, name_of, write_instances
from PIL import Image

from interactdiff.data import read_folder
from interactdiff.data.classes import coco_objects, fixed_spelling, hico_classes
from interactdiff.data.converters import CONVERTERS
from interactdiff.data.converters.base import Options, PixelBoxes, stream_json
from interactdiff.data.converters.hico_det import merged
from interactdiff.data.converters.run import run
from interactdiff.errors import DataError
from interactdiff.scene_items import Entity, Interaction


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_hico_det_give_the_same_rows(form: str, tmp_path: Path) -> None:
    if form == "mat":
        pytest.importorskip("scipy")
    hico_pictures(tmp_path / "hico")
    FORMS[form](tmp_path / "hico")
    run("hico-det", str(tmp_path / "hico"), tmp_path / "out", Options(split="test"))
    records = list(read_folder(tmp_path / "out"))
    assert [one.name for one in records] == [name_of(n) for n in (1, 2, 3)]
    first, second, third = records
    bike = (100 / 640, 200 / 480, 1.0, 1.0), (100 / 640, 202 / 480, 1.0, 1.0)
    assert first.items == (
        Interaction("person", "holding", "bicycle", (0.0, 0.0, 0.5, 1.0), bike[0]),
        Interaction("person", "riding", "bicycle", (2 / 640, 0.0, 322 / 640, 1.0), bike[1]),
    )
    assert first.prompt == "a person is holding a bicycle, a person is riding a bicycle"
    assert [one.action for one in second.interactions] == ["with", "with"]
    assert second.prompt == "a person with a bicycle, a person with a bicycle"  # a clause for each
    assert third.interactions[0].subject_box == (0.0, 0.0, 1.0, 1.0)
    text = (tmp_path / "out" / "test" / "metadata.jsonl").read_bytes()
    run("hico-det", str(tmp_path / "hico"), tmp_path / "again", Options(split="test"))
    assert (tmp_path / "again" / "test" / "metadata.jsonl").read_bytes() == text
    link = tmp_path / "out" / "test" / name_of(1)
    assert link.is_symlink()
    run("hico-det", str(tmp_path / "hico"), tmp_path / "copied", Options(split="test"), copy=True)
    copy = tmp_path / "copied" / "test" / name_of(1)
    assert not copy.is_symlink()
    assert copy.read_bytes() == link.read_bytes()


def test_actions_of_one_pair_share_its_boxes_where_wanted(tmp_path: Path) -> None:
    hico_pictures(tmp_path / "hico")
    write_instances(tmp_path / "hico")
    run("hico-det", str(tmp_path / "hico"), tmp_path / "out", Options(split="test", merge_iou=0.7))
    first = next(read_folder(tmp_path / "out"))
    assert len(first.interactions) == 2
    assert len({(one.subject_box, one.object_box) for one in first.interactions}) == 1
    apart = [Interaction("a", "b", "c", (0, 0, 0.5, 1), (x, 0, x + 0.3, 1)) for x in (0.0, 0.5)]
    assert merged(apart, 0.7) == apart


def test_the_words_of_hico_det_and_coco() -> None:
    table = hico_classes()
    assert (len(table.objects), len(table.verbs), len(table.classes), len(table.rare)) == (80, 117, 600, 138)
    assert {"with", "controling", "spining", "stiring", "siping", "tieing", "brushing with"} <= set(
        table.verbs
    )
    fixed = {fixed_spelling(verb) for verb in table.verbs}
    assert fixed - set(table.verbs) == {"controlling", "spinning", "stirring", "sipping", "tying"}
    assert table.classes[18] == ("riding", "bicycle")
    assert [table.of_numbers[pair] for pair in table.numbers] == list(range(600))
    assert sorted(coco_objects().values()) == list(table.objects)
    assert (coco_objects()[1], coco_objects()[90], 12 in coco_objects()) == ("person", "toothbrush", False)


def test_boxes_follow_the_orientation_that_they_were_drawn_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    stored = noise(40, 20)
    exif = stored.getexif()
    exif[0x0112] = 6
    stored.save(path, exif=exif)
    top_left = PixelBoxes(path, (40, 20), "shown").shares(0, 0, 20, 10)  # the stored size: drawn on that
    assert top_left == (0.5, 0.0, 1.0, 0.5)  # the left of the stored is the top of the shown picture
    assert PixelBoxes(path, (20, 40), "stored").shares(0, 0, 10, 20) == (0.0, 0.0, 0.5, 0.5)
    assert PixelBoxes(None, (20, 40), "stored").shares(0, 0, 10, 20) == (0.0, 0.0, 0.5, 0.5)
    with pytest.raises(DataError, match="expected its picture, or annotations that name its size"):
        PixelBoxes(None, None, "stored")
    with pytest.raises(DataError, match="to have the size of its annotation, 30 x 30, got 20 x 40"):
        PixelBoxes(path, (30, 30), "stored")


def coco_folder(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for number in (1, 2):
        noise(100, 50, seed=number).save(root / "train2017" / f"{number:012d}.jpg")
    pictures = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 100, "height": 50} for n in (2, 1)]
    rows = [
        {"id": 10, "image_id": 1, "category_id": 1, "bbox": [10, 5, 50.0, 40], "area": 1, "iscrowd": 0},
        {"id": 11, "image_id": 2, "category_id": 2, "bbox": [0, 0, 120, 50], "area": 1, "iscrowd": 0},
        {"id": 12, "image_id": 1, "category_id": 2, "bbox": [50, 25, 50, 25], "area": 1, "iscrowd": 0},
        {"id": 13, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9], "area": 1, "iscrowd": 1},
    ]
    kinds = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    values = {"info": {"a": [1]}, "annotations": rows, "images": pictures, "categories": kinds}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(values, indent=1))
    said = [{"image_id": 1, "caption": "A person  rides. "}, {"image_id": 1, "caption": "Someone."}]
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps({"annotations": said}))


def test_coco(tmp_path: Path) -> None:
    coco_folder(tmp_path / "coco")
    notes = run("coco", str(tmp_path / "coco"), tmp_path / "out", Options())
    first, second = read_folder(tmp_path / "out")
    assert first.prompts == ("A person rides.", "Someone.")
    assert first.items == (
        Entity("person", (0.1, 0.1, 0.6, 0.9)),
        Entity("bicycle", (0.5, 0.5, 1.0, 1.0)),
    )
    assert (second.prompt, second.items) == ("bicycle", (Entity("bicycle", (0.0, 0.0, 1.0, 1.0)),))
    assert notes["crowds"] == 1


def test_vcoco(tmp_path: Path) -> None:
    coco_folder(tmp_path / "coco")
    root = tmp_path / "coco"
    source = (root / "annotations" / "instances_train2017.json").read_text()
    (root / "annotations" / "instances_train2014.json").write_text(source)
    (root / "train2017").rename(root / "train2014")
    ride = {"action_name": "ride", "role_name": ["agent", "obj"], "image_id": [1, 2], "ann_id": [10, 11]}
    cut = {"action_name": "cut", "role_name": ["agent", "obj", "instr"], "image_id": [1], "ann_id": [10]}
    smile = {"action_name": "smile", "role_name": ["agent"], "image_id": [1], "ann_id": [10]}
    said = [
        {**ride, "label": [1, 0], "role_object_id": [10, 11, 12, 0]},  # agents, then objects
        {**cut, "label": [1], "role_object_id": [10, 0, 12]},
        {**smile, "label": [1], "role_object_id": [10]},
    ]
    (root / "vcoco_train.json").write_text(json.dumps(said))
    run("vcoco", str(root), tmp_path / "out", Options())
    first, second = read_folder(tmp_path / "out")
    boxes = (0.1, 0.1, 0.6, 0.9), (0.5, 0.5, 1.0, 1.0)
    assert first.items == (
        Interaction("person", "riding", "bicycle", *boxes),
        Interaction("person", "cutting with", "bicycle", *boxes),
    )
    said = "a person is riding a bicycle, a person is cutting with a bicycle, a person is smiling"
    assert first.prompt == said
    assert second.items == ()


def test_visual_genome(tmp_path: Path) -> None:
    root = tmp_path / "vg"
    (root / "VG_100K").mkdir(parents=True)
    noise(100, 50).save(root / "VG_100K" / "7.jpg")
    man, dog = {"x": 10, "y": 5, "w": 50, "h": 40}, {"x": 60, "y": 25, "w": 60, "h": 25}

    def related(predicate: str) -> dict[str, Any]:
        return {
            "predicate": predicate,
            "subject": {**man, "name": "man"},
            "object": {**dog, "names": ["Dog"]},
        }

    rows = [related(p) for p in ("ON", "is Walking ", "walking", "holds", "wing of", "with")]
    (root / "image_data.json").write_text(json.dumps([{"image_id": 7, "width": 100, "height": 50}]))
    listed = [{"image_id": 8, "relationships": [related("on")]}, {"image_id": 7, "relationships": rows}]
    (root / "relationships.json").write_text(json.dumps(listed))
    run("vg", str(root), tmp_path / "out", Options())
    (record,) = read_folder(tmp_path / "out")
    boxes = (0.1, 0.1, 0.6, 0.9), (0.6, 0.5, 1.0, 1.0)
    actions = [Interaction("man", action, "dog", *boxes) for action in ("walking", "holding")]
    assert record.items == tuple(actions)
    (tmp_path / "kept.txt").write_text("ON\n")
    run("vg", str(root), tmp_path / "kept", Options(predicates=tmp_path / "kept.txt", skip_missing=True))
    (record,) = read_folder(tmp_path / "kept")
    assert record.items == (Interaction("man", "on", "dog", *boxes),)
    with pytest.raises(DataError, match=r"expected the picture '8.jpg' in .*VG_100K.*\(--skip-missing\)"):
        run("vg", str(root), tmp_path / "strict", Options(predicates=tmp_path / "kept.txt"))
    assert not (tmp_path / "strict").exists()
    assert not list(tmp_path.glob(".aside*"))


def test_swig_and_hoia_take_names_from_a_file_that_is_not_run(tmp_path: Path) -> None:
    root = tmp_path / "swig"
    (root / "images_512").mkdir(parents=True)
    noise(100, 50).save(root / "images_512" / "a.jpg")
    boxes = [{"bbox": [10, 5, 60, 45], "category_id": 0}, {"bbox": [60, 25, 100, 50], "category_id": 3}]
    pairs = [
        {"subject_id": 0, "object_id": 1, "action_id": 2},
        {"subject_id": 0, "object_id": 9, "action_id": 2},
    ]
    row = {"file_name": "a.jpg", "img_id": 1, "width": 100, "height": 50}
    (root / "swig_train_1000.json").write_text(
        json.dumps([{**row, "box_annotations": boxes, "hoi_annotations": pairs}])
    )
    names = (
        "SWIG_CATEGORIES = [{'id': 3, 'name': 'ice_cream'}]\nSWIG_ACTIONS = [{'id': 2, 'name': 'licking'}]\n"
    )
    hostile = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (root / "swig_v1_categories.py").write_text(hostile + names)
    expected = Interaction("person", "licking", "ice cream", (0.1, 0.1, 0.6, 0.9), (0.6, 0.5, 1.0, 1.0))
    run("swig", str(root), tmp_path / "out", Options())
    (record,) = read_folder(tmp_path / "out")
    assert record.items == (expected,)
    assert not (tmp_path / "ran").exists()
    for box in boxes:
        box["category_id"] += 1
    pairs = [{"subject_id": 0, "object_id": 1, "category_id": 1}]
    (root / "train_hoia.json").write_text(
        json.dumps([{"file_name": "a.jpg", "annotations": boxes, "hoi_annotation": pairs}])
    )
    said = {"objects": [{"id": 1, "name": "person"}, {"id": 4, "name": "ice cream"}]}
    (root / "names.json").write_text(json.dumps({**said, "actions": [{"id": 1, "name": "licking"}]}))
    options = Options(names=root / "names.json", images=root / "images_512")
    run("hoia", str(root), tmp_path / "hoia", options)
    (record,) = read_folder(tmp_path / "hoia")
    assert record.items == (expected,)
    with pytest.raises(DataError, match="expected --names with the objects and actions of HOI-A"):
        run("hoia", str(root), tmp_path / "none", Options())


def test_layoutsam_and_eligen(tmp_path: Path) -> None:
    noise(100, 50).save(tmp_path / "a.jpg")
    row = {"file_name": "a.jpg", "width": 100, "height": 50, "global_caption": "a scene"}
    row |= {"bbox_list": "[[10, 5, 60, 45], [200, 0, 300, 9]]", "region_captions": "['a red ball', 'lost']"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run("layoutsam", str(tmp_path / "rows.jsonl"), tmp_path / "sam", Options())
    (record,) = read_folder(tmp_path / "sam")
    assert (record.prompt, record.items) == ("a scene", (Entity("a red ball", (0.1, 0.1, 0.6, 0.9)),))
    row["bbox_list"] = "__import__('os').system('true')"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="expected a list in bbox_list, got"):
        run("layoutsam", str(tmp_path / "rows.jsonl"), tmp_path / "bad", Options())
    mask = np.zeros((50, 100), np.uint8)
    mask[5:45, 10:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask * 0).save(tmp_path / "none.png")
    row = {"image": "a.jpg", "prompt": "a scene", "eligen_entity_prompts": ["a red ball", "x"]}
    rows = [{**row, "eligen_entity_masks": ["mask.png", "none.png"]}]
    (tmp_path / "metadata_eligen.json").write_text(json.dumps(rows))
    notes = run("eligen", str(tmp_path), tmp_path / "eligen", Options())
    (other,) = read_folder(tmp_path / "eligen")
    assert other.items == record.items
    assert notes["empty masks"] == 1


def test_boxes_follow_the_orientation_of_pictures_in_files_and_in_parquet(tmp_path: Path) -> None:
    """A picture that is stored lying and shown upright, with boxes of what is stored."""
    datasets = pytest.importorskip("datasets")
    picture = noise(100, 50)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    row = {"file_name": "a.jpg", "width": 100, "height": 50, "global_caption": "a scene"}
    row |= {"bbox_list": "[[10, 5, 60, 45]]", "region_captions": "['a red ball']"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    stored = {"bytes": (tmp_path / "a.jpg").read_bytes(), "path": "a.jpg"}
    datasets.Dataset.from_list([row | {"image": stored}]).to_parquet(tmp_path / "rows.parquet")
    for form in ("jsonl", "parquet"):
        run("layoutsam", str(tmp_path / f"rows.{form}"), tmp_path / form, Options())
        (record,) = read_folder(tmp_path / form)
        assert record.entities[0].box == pytest.approx((0.1, 0.1, 0.9, 0.6))
    rows = [row | {"image": stored, "width": 99}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="expected a picture of the rows to have the size of its annotation"):
        run("layoutsam", str(tmp_path / "other.parquet"), tmp_path / "other", Options())


def test_label_studio_and_cvat(tmp_path: Path) -> None:
    noise(100, 50).save(tmp_path / "a.jpg")

    def region(key: str, label: str, x: float, y: float, width: float, height: float) -> dict[str, Any]:
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
        return {
            "id": key,
            "type": "rectanglelabels",
            "original_width": 100,
            "original_height": 50,
            "value": value,
        }

    results = [
        region("p", "person", 10, 10, 50, 80),
        region("b", "bike", 60, 50, 40, 50),
        region("c", "cat", 0, 0, 9, 9),
    ]
    relations = [
        {"type": "relation", "from_id": "p", "to_id": "b", "direction": "right", "labels": ["riding"]},
        {"type": "relation", "from_id": "p", "to_id": "b", "direction": "left"},
    ]
    tasks = [
        {"data": {"image": "/data/upload/3/a.jpg"}, "annotations": [{"result": results + relations}]},
        {"data": {"image": "/data/upload/3/b.jpg"}, "annotations": []},
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    notes = run("labelstudio", str(tmp_path / "export.json"), tmp_path / "ls", Options())
    (record,) = read_folder(tmp_path / "ls")
    person, bike = (0.1, 0.1, 0.6, 0.9), (0.6, 0.5, 1.0, 1.0)
    assert record.interactions == (
        Interaction("person", "riding", "bike", person, bike),
        Interaction("bike", None, "person", bike, person),
    )
    assert record.entities == (Entity("cat", (0.0, 0.0, 0.09, 0.09)),)
    assert record.prompt == "a person is riding a bike, a bike with a person, cat"
    assert notes["tasks without an annotation"] == 1
    xml = (
        '<annotations><image id="0" name="a.jpg" width="100" height="50">'
        '<box label="bike" xtl="60" ytl="25" xbr="100" ybr="50"/>'
        '<box label="cat" xtl="0" ytl="0" xbr="9" ybr="9" rotation="30"/></image></annotations>'
    )
    (tmp_path / "annotations.xml").write_text(xml)
    notes = run("cvat", str(tmp_path), tmp_path / "cvat", Options())
    (record,) = read_folder(tmp_path / "cvat")
    assert (record.prompt, record.items) == ("bike", (Entity("bike", bike),))
    assert notes["turned boxes"] == 1
    (tmp_path / "annotations.xml").write_text(xml[:-30])
    with pytest.raises(DataError, match="expected CVAT's XML in"):
        run("cvat", str(tmp_path), tmp_path / "broken", Options())


def test_scenes_and_other_boxes(tmp_path: Path) -> None:
    noise(100, 50).save(tmp_path / "a.png")
    scene = {"prompt": "a ball", "entities": [{"phrase": "ball", "box": [10, 5, 50, 40]}]}
    (tmp_path / "a.json").write_text(json.dumps(scene))
    run("scenes", str(tmp_path), tmp_path.parent / "scenes-out", Options(form="pixels-xywh"))
    (record,) = read_folder(tmp_path.parent / "scenes-out")
    assert (record.prompt, record.items) == ("a ball", (Entity("ball", (0.1, 0.1, 0.6, 0.9)),))


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", 1)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(DataError, match="expected a folder that is not there yet or empty"):
        run("stickworld", "0:1", tmp_path / "out", Options())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    with pytest.raises(DataError, match="expected one of hico-det, vcoco"):
        run("voc", "x", tmp_path / "new", Options())
    for name in CONVERTERS:
        if name != "stickworld":
            (tmp_path / name).mkdir()
            with pytest.raises(DataError):
                run(name, str(tmp_path / name), tmp_path / "new", Options())
    assert not (tmp_path / "new").exists()


def test_annotations_of_another_form_are_one_sentence(tmp_path: Path) -> None:
    make_folder(tmp_path / "rows", 1)
    for kind, name, message in (
        ("hico-det", "test_hico.json", r"of HICO-DET \(.*\), got .*test_hico.json of another form"),
        ("vg", "relationships.json", "of vg in .*, got others"),
        ("hoia", "train_hoia.json", "of hoia in .*, got others"),
    ):
        (tmp_path / "rows" / "image_data.json").write_text('[{"image_id": 1, "width": 1, "height": 1}]')
        (tmp_path / "rows" / "names.json").write_text('{"objects": [], "actions": []}')
        (tmp_path / "rows" / name).write_text('[{"image_id": 1, "relationships": [{}], "a": 2}]')
        with pytest.raises(DataError, match=f"expected annotations {message}"):
            run(
                kind,
                str(tmp_path / "rows"),
                tmp_path / "out",
                Options(names=tmp_path / "rows" / "names.json"),
            )
    row = {"image": "../rows/0000.png", "prompt": "", "eligen_entity_prompts": [], "eligen_entity_masks": []}
    (tmp_path / "rows" / "metadata_eligen.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="expected a path inside"):
        run("eligen", str(tmp_path / "rows"), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_json_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interactdiff.data.converters import base

    monkeypatch.setattr(base, "_READ", 7)  # every element lies across a border
    values = {
        "skip": [[1, {"a": "]"}], 2],
        "b": {"c": [1]},
        "rows": [{"x": n, "s": 'ä"]}'} for n in range(50)],
    }
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(stream_json(path, ("rows", "b"))) == [
            ("b", {"c": [1]}),
            *(("rows", row) for row in values["rows"]),
        ]
        path.write_text(json.dumps(list(range(1000)), indent=indent))
        assert [value for _, value in stream_json(path)] == list(range(1000))
    for broken in ("[1, 2", '{"rows": [1, ', "7", '{"rows" 1}', "[1 2x]"):
        path.write_text(broken)
        with pytest.raises(DataError, match="expected JSON in"):
            list(stream_json(path, ("rows",)))
