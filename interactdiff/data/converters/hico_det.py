"""HICO-DET: `anno_bbox.mat`, or one of the three JSON forms that detectors were published with.

Boxes of the mat file are 1-based inclusive pixels in the order x1, x2, y1, y2; those of the first two JSON
forms are the same numbers in the order x1, y1, x2, y2; the third has 1 subtracted from all.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from interactdiff.data.boxes import area
from interactdiff.data.converters.base import (
    Converted,
    Options,
    Pictures,
    PixelBoxes,
    first_file,
    interaction,
    read_json,
    stream_json,
)
from interactdiff.data.converters.coco import COCO_NAMES
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_items import Interaction

Pair = tuple[int, int, tuple[float, float, float, float], tuple[float, float, float, float]]
"""Verb and object (zero-based), the person's and the object's box: 1-based inclusive x1, y1, x2, y2."""
_FIXED = {
    "controling": "controlling",
    "spining": "spinning",
    "stiring": "stirring",
    "siping": "sipping",
    "tieing": "tying",
}
_FORMS = {
    "train": ("anno_bbox.mat", "trainval_hico.json", "instances_train2015.json", "anno_list.json"),
    "test": ("anno_bbox.mat", "test_hico.json", "instances_test2015.json", "anno_list.json"),
}


@cache
def classes() -> dict[str, Any]:
    """HICO-DET's 80 objects, 117 verbs, gerunds, and 600 classes as [class, object, verb], all zero-based."""
    return json.loads((files("interactdiff.data") / "hico_classes.json").read_text(encoding="utf-8"))


def gerund(verb: int, spelling: str = "source") -> str:
    """The phrase of a verb; `no_interaction` is "with"."""
    words = classes()["gerunds"][classes()["verbs"][verb]]
    return _FIXED[words] if spelling == "fixed" and words in _FIXED else words


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert HICO-DET.

    Args:
        source: the folder of the archive (`hico_20160224_det`) or an annotation file.
        options: `images`, `split` ("train" or "test"), `skip_missing`, `spelling`, `merge_iou`.
        notes: counts what is left out.

    Raises:
        DataError: there are no annotations, or they are not what they should be.
    """
    root = Path(source)
    found = 0
    for split in ("train", "test"):
        if options.split not in (None, split):
            continue
        try:
            path = first_file(root, *_FORMS[split])
        except DataError:
            continue
        if root.is_file() and path.suffix == ".json" and not _of_split(path, split):
            continue
        found += 1
        pictures = Pictures(root, options, notes, (f"images/{split}2015", f"{split}2015", f"../{split}2015"))
        for name, size, pairs in _read(path, split, notes):
            if converted := _converted(name, size, pairs, split, pictures, options, notes):
                yield converted
    if not found:
        raise DataError(
            f"expected {' or '.join(_FORMS[options.split or 'train'])} in {source}, got none of them"
        )


def _of_split(path: Path, split: str) -> bool:
    """Whether an annotation file that was named by itself has a split."""
    other = "test" if split == "train" else "train"
    return path.name == "anno_list.json" or other not in path.name


def _read(
    path: Path, split: str, notes: Counter[str]
) -> Iterator[tuple[str, tuple[int, int] | None, list[Pair]]]:
    if path.suffix == ".mat":
        return _read_mat(path, split, notes)
    if path.name == "anno_list.json":
        return _read_anno_list(path, split)
    return _read_instances(path) if path.name.startswith("instances") else _read_triplets(path, notes)


def _converted(
    name: str,
    size: tuple[int, int] | None,
    pairs: Sequence[Pair],
    split: str,
    pictures: Pictures,
    options: Options,
    notes: Counter[str],
) -> Converted | None:
    if not pairs:
        notes["pictures without a visible pair"] += 1
        return None
    if (picture := pictures.find(name)) is None:
        return None
    boxes = PixelBoxes(picture, size, "stored")
    made: list[Interaction] = []
    for verb, thing, person_box, thing_box in pairs:
        person, other = (boxes.shares(b[0] - 1, b[1] - 1, b[2], b[3]) for b in (person_box, thing_box))
        if person is None or other is None:
            notes["pairs outside the picture"] += 1
            continue
        object_ = classes()["objects"][thing].replace("_", " ")
        one = Interaction("person", gerund(verb, options.spelling), object_, person, other)  # type: ignore[arg-type]
        made.append(one)
    if options.merge_iou is not None:
        made = merged(made, options.merge_iou)
    elif len(kept := list(dict.fromkeys(made))) < len(made):
        notes["pairs that stand twice"] += len(made) - len(kept)
        made = kept
    if not made:
        notes["pictures without a visible pair"] += 1
        return None
    rows = [interaction(o.subject, o.action, o.object, o.subject_box, o.object_box) for o in made]
    row = {"prompt": triplet_caption(made), "interactions": rows, "source": "HICO-DET"}
    return Converted(Path(name).name, picture, row, split)


def merged(interactions: Sequence[Interaction], iou: float) -> list[Interaction]:
    """Give the actions of one person on one thing the same boxes: the first ones; each action stays once.

    Args:
        interactions: of one picture.
        iou: overlap of both boxes from which two pairs are one.
    """
    pairs: list[Interaction] = []
    made: dict[Interaction, None] = {}
    for one in interactions:
        same = [p for p in pairs if p.object == one.object and p.subject == one.subject]
        same = [p for p in same if overlap(p.subject_box, one.subject_box) >= iou]
        same = [p for p in same if overlap(p.object_box, one.object_box) >= iou]
        first = same[0] if same else one
        if not same:
            pairs.append(one)
        made[Interaction(one.subject, one.action, one.object, first.subject_box, first.object_box)] = None
    return list(made)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, xyxy."""
    both = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return both / (area((a[0], a[1], a[2], a[3])) + area((b[0], b[1], b[2], b[3])) - both)


def _read_mat(
    path: Path, split: str, notes: Counter[str]
) -> Iterator[tuple[str, tuple[int, int] | None, list[Pair]]]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise DataError("expected the packages of interactdiff[data] for a .mat file, got no scipy") from None
    try:
        variable = f"bbox_{split}"
        loaded = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=[variable])
        pictures = _listed(loaded[variable])
    except (OSError, ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise DataError(f"expected bbox_{split} in {path}, got {type(error).__name__}: {error}") from None
    for picture in pictures:
        pairs: list[Pair] = []
        for hoi in _listed(picture.hoi):
            if int(hoi.invis):
                notes["classes marked invisible"] += 1
                continue
            _, thing, verb = classes()["correspondence"][int(hoi.id) - 1]
            people, things = _listed(hoi.bboxhuman), _listed(hoi.bboxobject)
            connections = hoi.connection.reshape(-1, 2).tolist()
            for person, other in connections:
                ends = (people[int(person) - 1], things[int(other) - 1])
                a, b = ((float(e.x1), float(e.y1), float(e.x2), float(e.y2)) for e in ends)
                pairs.append((verb, thing, a, b))
        yield picture.filename, (int(picture.size.width), int(picture.size.height)), pairs


def _listed(value: Any) -> list[Any]:
    """What scipy's squeezing left of a list of structs: the list, or its only element, or nothing."""
    if hasattr(value, "_fieldnames"):
        return [value]
    return list(value.reshape(-1)) if hasattr(value, "reshape") else list(value)


def _read_triplets(
    path: Path, notes: Counter[str]
) -> Iterator[tuple[str, tuple[int, int] | None, list[Pair]]]:
    """The form of PPDM, QPIC and FGAHOI: verbs from 1, objects by COCO's ids."""
    objects = classes()["objects"]
    for _, row in stream_json(path):
        size = (row["width"], row["height"]) if {"width", "height"} <= row.keys() else None
        people, pairs = row["annotations"], []
        if any(max(hoi["subject_id"], hoi["object_id"]) >= len(people) for hoi in row["hoi_annotation"]):
            notes["pictures with an index out of range"] += 1
            continue
        for hoi in row["hoi_annotation"]:
            person, other = people[hoi["subject_id"]], people[hoi["object_id"]]
            name = COCO_NAMES[int(str(other["category_id"]).strip())].replace(" ", "_")
            verb = int(hoi["category_id"]) - 1
            pairs.append((verb, objects.index(name), tuple(person["bbox"]), tuple(other["bbox"])))
        yield row["file_name"], size, pairs


def _read_instances(path: Path) -> Iterator[tuple[str, tuple[int, int] | None, list[Pair]]]:
    """The form of UPT and PViC: all ids from 0, objects in the order of the alphabet."""
    values = read_json(path)
    rows = zip(values["filenames"], values["size"], values["annotation"], strict=True)
    for name, size, row in rows:
        columns = zip(row["verb"], row["object"], row["boxes_h"], row["boxes_o"], strict=True)
        pairs: list[Pair] = [
            (verb, thing, tuple(person), tuple(other)) for verb, thing, person, other in columns
        ]
        yield name, (size[0], size[1]), pairs


def _read_anno_list(path: Path, split: str) -> Iterator[tuple[str, tuple[int, int] | None, list[Pair]]]:
    """The form of no-frills: classes "001" to "600", boxes from 0."""
    for _, row in stream_json(path):
        if f"_{split}2015_" not in row["global_id"]:
            continue
        height, width = row["image_size"][:2]
        pairs: list[Pair] = []
        for hoi in row["hois"]:
            _, thing, verb = classes()["correspondence"][int(hoi["id"]) - 1]
            for person, other in hoi["connections"]:
                ends = hoi["human_bboxes"][person], hoi["object_bboxes"][other]
                a, b = ((x0 + 1, y0 + 1, x1 + 1, y1 + 1) for x0, y0, x1, y1 in ends)
                pairs.append((verb, thing, a, b))
        yield f"{row['global_id']}.jpg", (width, height), pairs
