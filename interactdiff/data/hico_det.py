"""HICO-DET's annotations: `anno_bbox.mat`, or one of the three JSON forms that detectors were published with.

All of them hold the same boxes of inclusive pixels. `anno_bbox.mat` (in the order x1, x2, y1, y2) and
`instances_*2015.json` count pixels from 1; `trainval_hico.json`, `test_hico.json` and `anno_list.json` count
from 0. The person of the first training picture is 208, 33, 427, 300 by the former, 207, 32, 426, 299 by the
latter.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interactdiff.data.classes import coco_objects, hico_classes
from interactdiff.data.converters.base import first_file, read_json, stream_json
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box, shown

MAT = "anno_bbox.mat"
JSON_FORMS = {
    "train": ("trainval_hico.json", "instances_train2015.json", "anno_list.json"),
    "test": ("test_hico.json", "instances_test2015.json", "anno_list.json"),
}


@dataclass(frozen=True)
class AnnotatedPair:
    """A person and an object.

    Attributes:
        number: of the class, from 0.
        person: x0, y0, x1, y1 in pixels from 0, the right and lower edge not included.
        object: likewise.
    """

    number: int
    person: Box
    object: Box


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and its pairs.

    Attributes:
        file_name: without a folder.
        size: width and height in pixels, where the annotations say.
        pairs: in the file's order; none where every class is marked invisible.
        labels: numbers of the classes that the picture as a whole is labelled with; None where the form has
            no such labels.
    """

    file_name: str
    size: tuple[int, int] | None
    pairs: tuple[AnnotatedPair, ...]
    labels: tuple[int, ...] | None = None


def find_annotations(source: Path, split: str, prefer: Iterable[str] = (MAT,)) -> Path | None:
    """The annotations of a split, in any form.

    Args:
        source: a folder, or the file itself.
        split: "train" or "test".
        prefer: file names to look for before all others.

    Returns:
        The file; None if there is none.
    """
    if split not in JSON_FORMS:
        return None
    try:
        return first_file(source, *prefer, *JSON_FORMS[split], MAT)
    except DataError:
        return None


def picture_folders(split: str) -> tuple[str, ...]:
    """Where the archive has the pictures of a split, from the folder of annotations or the one above it."""
    below = (f"images/{split}2015", f"{split}2015")
    return (*below, *(f"../{one}" for one in below), f"hico_20160224_det/{below[0]}", "../images", "..")


def read_annotations(file: Path, split: str, notes: Counter[str]) -> Iterator[AnnotatedPicture]:
    """Read annotations of any form, recognised by the contents of the file.

    Args:
        file: `.mat` or `.json`; `trainval_hico.json`, `test_hico.json` and `anno_list.json` are streamed.
        split: "train" or "test", of files that have both.
        notes: counts what is left out.

    Raises:
        DataError: it is none of them, or is damaged.
    """
    form, pictures = _opened(file, split)
    for number, picture in enumerate(pictures, start=1):
        try:
            if (read := form(picture, split, notes)) is not None:
                yield read
        except DataError as error:
            raise DataError(f"{file}, picture {number}: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{file}, picture {number}: expected annotations of HICO-DET, got others ({got})"
            ) from None


def _opened(file: Path, split: str) -> tuple[Any, Iterable[Any]]:
    """What reads a picture of the file's form, and the pictures."""
    if file.suffix == ".mat":
        return _from_mat, _mat_pictures(file, split)
    with file.open("rb") as opened:
        start = opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"{":
        content = read_json(file)
        if isinstance(content, dict) and {"filenames", "size", "annotation"} <= content.keys():
            columns = content["filenames"], content["size"], content["annotation"]
            lists = [one for one in columns if isinstance(one, list)]
            if len(lists) < len(columns) or len(set(map(len, lists))) > 1:
                raise DataError(f"{file}: expected as many filenames as sizes and annotations, got others")
            return _from_instances, zip(*columns, strict=True)
    elif isinstance(first := next((row for _, row in stream_json(file)), None), dict):
        for key, form in (("hoi_annotation", _from_triplets), ("global_id", _from_hoi_lists)):
            if key in first:
                return form, (row for _, row in stream_json(file))
    names = ", ".join((MAT, *JSON_FORMS[split]))
    raise DataError(f"expected annotations of HICO-DET ({names}), got {file} of another form")


def _inclusive(box: Iterable[Any], first: int) -> Box:
    """A box of inclusive pixels, of which the first has this number, as edges from 0."""
    x0, y0, x1, y1 = (float(edge) - first for edge in box)
    return x0, y0, x1 + 1, y1 + 1


def _class(verb: Any, thing: int) -> int:
    table, verb = hico_classes(), int(verb)
    if (number := table.of_numbers.get((verb, thing))) is None:
        name = table.verbs[verb] if 0 <= verb < len(table.verbs) else f"verb {verb}"
        raise DataError(f"expected one of 600 classes, got {name} {table.objects[thing]}")
    return number


def _class_of_id(text: Any) -> int:
    """The number of a class from its id, "001" to "600"."""
    if not 1 <= int(text) <= len(hico_classes().classes):
        raise DataError(f"expected a class from 1 to 600, got {shown(text)}")
    return int(text) - 1


def _mat_pictures(file: Path, split: str) -> list[Any]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise DataError("expected the packages of interactdiff[data] for a .mat file, got no scipy") from None
    name = f"bbox_{split}"
    try:
        loaded = loadmat(file, squeeze_me=True, struct_as_record=False, variable_names=[name])
        return _listed(loaded[name])
    except (OSError, ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise DataError(f"expected {name} in {file}, got {type(error).__name__}: {error}") from None


def _from_mat(picture: Any, split: str, notes: Counter[str]) -> AnnotatedPicture:
    """The archive's own form: classes from 1, numbers of persons and objects from 1, pixels from 1."""
    pairs = []
    for hoi in _listed(picture.hoi):
        if int(hoi.invis):
            notes["classes marked invisible"] += 1
            continue
        number = _class_of_id(hoi.id)
        people, things = (
            [_inclusive((one.x1, one.y1, one.x2, one.y2), 1) for one in _listed(boxes)]
            for boxes in (hoi.bboxhuman, hoi.bboxobject)
        )
        for person, thing in hoi.connection.reshape(-1, 2).tolist():
            ends = _end(people, int(person) - 1), _end(things, int(thing) - 1)
            pairs.append(AnnotatedPair(number, *ends))
    size = int(picture.size.width), int(picture.size.height)
    return AnnotatedPicture(str(picture.filename), size, tuple(pairs))


def _listed(value: Any) -> list[Any]:
    """What scipy's squeezing left of a list of structs: the list, or its only element, or nothing."""
    if hasattr(value, "_fieldnames"):
        return [value]
    return list(value.reshape(-1)) if hasattr(value, "reshape") else list(value)


def _end(boxes: list[Box], number: int) -> Box:
    if not 0 <= number < len(boxes):
        raise DataError(f"expected the number of one of {len(boxes)} boxes, got {number}")
    return boxes[number]


def _from_triplets(row: Mapping[str, Any], split: str, notes: Counter[str]) -> AnnotatedPicture | None:
    """PPDM, QPIC, FGAHOI: verbs from 1, objects by COCO's ids (at times as text), pixels from 0."""
    objects = hico_classes().objects
    boxes, hois = row["annotations"], row["hoi_annotation"]
    if not all(0 <= hoi[end] < len(boxes) for hoi in hois for end in ("subject_id", "object_id")):
        notes["pictures with an index out of range"] += 1  # the projects leave these out too
        return None
    pairs = []
    for hoi in hois:
        person, thing = boxes[hoi["subject_id"]], boxes[hoi["object_id"]]
        name = coco_objects()[int(str(thing["category_id"]).strip())]
        number = _class(int(hoi["category_id"]) - 1, objects.index(name))
        pairs.append(AnnotatedPair(number, _inclusive(person["bbox"], 0), _inclusive(thing["bbox"], 0)))
    size = (int(row["width"]), int(row["height"])) if {"width", "height"} <= row.keys() else None
    return AnnotatedPicture(row["file_name"], size, tuple(pairs))


def _from_instances(columns: tuple[Any, Any, Any], split: str, notes: Counter[str]) -> AnnotatedPicture:
    """UPT, PViC: all ids from 0, objects in the order of the alphabet, pixels from 1."""
    name, (width, height), row = columns
    pairs = tuple(
        AnnotatedPair(_class(verb, thing), _inclusive(person, 1), _inclusive(other, 1))
        for verb, thing, person, other in zip(
            row["verb"], row["object"], row["boxes_h"], row["boxes_o"], strict=True
        )
    )
    return AnnotatedPicture(name, (int(width), int(height)), pairs)


def _from_hoi_lists(row: Mapping[str, Any], split: str, notes: Counter[str]) -> AnnotatedPicture | None:
    """No-frills, FGAHOI's evaluator: classes "001" to "600", both splits, pixels from 0."""
    if f"_{split}2015_" not in row["global_id"]:
        return None
    height, width = row["image_size"][:2]
    pairs = []
    for hoi in row["hois"]:
        if hoi.get("invis"):
            notes["classes marked invisible"] += 1
            continue
        number = _class_of_id(hoi["id"])
        people, things = (
            [_inclusive(box, 0) for box in hoi[key]] for key in ("human_bboxes", "object_bboxes")
        )
        for person, thing in hoi["connections"]:
            pairs.append(AnnotatedPair(number, _end(people, person), _end(things, thing)))
    labels = None
    if "pos_hoi_ids" in row:
        labels = tuple(_class_of_id(text) for text in row["pos_hoi_ids"])
    return AnnotatedPicture(f"{row['global_id']}.jpg", (int(width), int(height)), tuple(pairs), labels)
