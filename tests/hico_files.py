"""HICO-DET's four forms of the same four pictures, made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from data_files import noise

from interactdiff.data.classes import hico_classes

SIZES = {1: (640, 480), 2: (500, 400), 3: (300, 200), 4: (200, 300)}
# Picture: class (from 0), person, object, as 1-based inclusive x1, y1, x2, y2. Several actions of one pair; a
# pair that stands twice; a class of several persons.
RIDE, HOLD, NOTHING = 18, 11, 23  # of a bicycle
LABEL = 4  # of an airplane: marked invisible, so pictures are labelled with it as a whole
PAIRS: dict[int, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {
    1: [
        (HOLD, (1, 1, 320, 480), (101, 201, 640, 480)),
        (RIDE, (3, 1, 322, 480), (101, 203, 640, 480)),
        (RIDE, (3, 1, 322, 480), (101, 203, 640, 480)),
    ],
    2: [
        (NOTHING, (11, 21, 110, 220), (111, 21, 210, 220)),
        (NOTHING, (211, 21, 310, 220), (111, 21, 210, 220)),
    ],
    3: [(RIDE, (1, 1, 300, 200), (51, 51, 250, 150))],
    4: [],
}


def name_of(number: int, split: str = "test") -> str:
    return f"HICO_{split}2015_{number:08d}.jpg"


def hico_pictures(root: Path) -> None:
    folder = root / "images" / "test2015"
    folder.mkdir(parents=True)
    for number, size in SIZES.items():
        noise(*size, seed=number).save(folder / name_of(number))


def write_mat(root: Path) -> None:
    from scipy.io import savemat

    def boxes(listed: list[tuple[int, ...]]) -> np.ndarray:
        made = np.zeros((1, len(listed)), [(edge, object) for edge in ("x1", "x2", "y1", "y2")])
        for n, (x1, y1, x2, y2) in enumerate(listed):
            made[0, n] = (x1, x2, y1, y2)
        return made

    pictures = np.zeros((1, 4), [(key, object) for key in ("filename", "size", "hoi")])
    fields = [(key, object) for key in ("id", "bboxhuman", "bboxobject", "connection", "invis")]
    for n, number in enumerate(SIZES):
        pairs = PAIRS[number]
        kinds = list(dict.fromkeys(pair[0] for pair in pairs))
        hoi = np.zeros((1, len(kinds) + 1), fields)
        for k, kind in enumerate(kinds):
            people = [person for other, person, _ in pairs if other == kind]
            things = list(dict.fromkeys(thing for other, _, thing in pairs if other == kind))
            of_thing = [things.index(thing) + 1 for other, _, thing in pairs if other == kind]
            connection = np.array([[p + 1, t] for p, t in enumerate(of_thing)])
            hoi[0, k] = (kind + 1, boxes(people), boxes(things), connection, 0)
        empty = np.zeros((0, 0))
        hoi[0, len(kinds)] = (5, empty, empty, empty, 1)  # marked invisible
        width, height = SIZES[number]
        size = np.zeros((1, 1), [(key, object) for key in ("width", "height", "depth")])
        size[0, 0] = (width, height, 3)
        pictures[0, n] = (name_of(number), size, hoi)
    savemat(root / "anno_bbox.mat", {"bbox_test": pictures})


def write_triplets(root: Path) -> None:
    """PPDM: verbs from 1, COCO's ids as text, boxes from 0, one of them leaves the picture; no sizes."""
    rows = []
    for number in SIZES:
        things, pairs = [], []
        for kind, person, thing in PAIRS[number]:
            pairs.append(
                {
                    "subject_id": len(things),
                    "object_id": len(things) + 1,
                    "category_id": hico_classes().numbers[kind][0] + 1,
                }
            )
            wide = [*thing[:2], thing[2] + 9 * (thing[2] == 640), thing[3]]
            boxes = ([edge - 1 for edge in box] for box in (person, wide))
            things += [{"bbox": next(boxes), "category_id": 1}, {"bbox": next(boxes), "category_id": "2\n"}]
        rows.append({"file_name": name_of(number), "annotations": things, "hoi_annotation": pairs})
    bad = [{"subject_id": 0, "object_id": 7, "category_id": 1}]
    rows.append({"file_name": "lost.jpg", "annotations": [], "hoi_annotation": bad})
    (root / "test_hico.json").write_text(json.dumps(rows))


def write_instances(root: Path) -> None:
    """UPT, PViC: all from 0, objects by the alphabet."""
    rows = []
    for number in SIZES:
        of = PAIRS[number]
        rows.append(
            {
                "verb": [hico_classes().numbers[kind][0] for kind, _, _ in of],
                "object": [hico_classes().numbers[kind][1] for kind, _, _ in of],
                "hoi": [kind for kind, _, _ in of],
                "boxes_h": [list(map(float, person)) for _, person, _ in of],
                "boxes_o": [list(map(float, thing)) for _, _, thing in of],
            }
        )
    values = {"filenames": [name_of(n) for n in SIZES], "size": [list(s) for s in SIZES.values()]}
    (root / "instances_test2015.json").write_text(json.dumps({**values, "annotation": rows, "empty": [3]}))


def write_anno_list(root: Path) -> None:
    """no-frills: classes as text from 1, boxes from 0, labels of pictures as a whole."""
    rows: list[dict[str, Any]] = []
    for number, (width, height) in SIZES.items():
        hois = []
        for kind in dict.fromkeys(pair[0] for pair in PAIRS[number]):
            of = [(person, thing) for other, person, thing in PAIRS[number] if other == kind]
            hois.append(
                {
                    "id": f"{kind + 1:03d}",
                    "human_bboxes": [[edge - 1 for edge in person] for person, _ in of],
                    "object_bboxes": [[edge - 1 for edge in thing] for _, thing in of],
                    "connections": [[n, n] for n in range(len(of))],
                    "invis": 0,
                }
            )
        name = name_of(number).removesuffix(".jpg")
        hois.append({"id": "005", "human_bboxes": [], "object_bboxes": [], "connections": [], "invis": 1})
        labels = [f"{kind + 1:03d}" for kind in {LABEL, *(pair[0] for pair in PAIRS[number])}]
        row = {"global_id": name, "image_size": [height, width, 3], "hois": hois, "pos_hoi_ids": labels}
        rows.append(row)
    rows.append({"global_id": name_of(1, "train").removesuffix(".jpg"), "image_size": [1, 1, 3], "hois": []})
    (root / "anno_list.json").write_text(json.dumps(rows))


FORMS = {
    "mat": write_mat,
    "triplets": write_triplets,
    "instances": write_instances,
    "anno_list": write_anno_list,
}
