"""HICO-DET: its classes, and its test annotations in the three JSON forms that projects share.

Chao et al., "Learning to Detect Human-Object Interactions", 2018. Boxes of all forms become xyxy shares of
the picture, half-open: a box of inclusive pixels 0..9 in 100 is 0.0 to 0.1.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from interactdiff.data.layouts import Layout
from interactdiff.errors import DataError, SceneError
from interactdiff.scene_checks import shown
from interactdiff.scene_items import Interaction

SUBJECT = "person"
NO_INTERACTION = "no_interaction"


# COCO's 80 classes by their numbers of 1 to 90; detectors that count from 0 to 79 keep the order.
@dataclass(frozen=True)
class HicoClasses:
    """The classes of HICO-DET, numbered from 0 in the order of its list.

    Attributes:
        objects: 80 names, alphabetically ("cell phone").
        verbs: 117 gerunds ("riding"); that of no interaction is "with".
        classes: 600 pairs of verb and object, as phrases.
        numbers: 600 pairs of the verb's and the object's number.
        rare: the 138 classes with fewer than 10 instances to train on.
    """

    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    classes: tuple[tuple[str, str], ...]
    numbers: tuple[tuple[int, int], ...]
    rare: tuple[int, ...]

    def caption(self, classes: Sequence[int]) -> str:
        """A clause for each triplet, joined by commas: "a person is riding a bicycle"."""
        clauses = []
        for number in classes:
            verb, name = self.classes[number]
            article = "an" if name[0] in "aeiou" else "a"
            is_ = "" if self.numbers[number][0] == self.verbs.index("with") else "is "
            clauses.append(f"a {SUBJECT} {is_}{verb} {article} {name}")
        return ", ".join(clauses)


@cache
def coco_objects() -> dict[int, str]:
    """COCO's 80 classes by their numbers of 1 to 90; detectors that count from 0 to 79 keep the order."""
    table = json.loads(files("interactdiff.data").joinpath("coco_objects.json").read_text("utf-8"))
    return {int(number): name for number, name in table.items()}


@cache
def hico_classes() -> HicoClasses:
    """The packaged table of classes."""
    table = json.loads(files("interactdiff.data").joinpath("hico_classes.json").read_text("utf-8"))
    objects = tuple(name.replace("_", " ") for name in table["objects"])
    verbs = tuple(table["gerunds"][name] for name in table["verbs"])
    rows = sorted(table["correspondence"])
    numbers = tuple((verb, thing) for _, thing, verb in rows)
    classes = tuple((verbs[verb], objects[thing]) for verb, thing in numbers)
    return HicoClasses(objects, verbs, classes, numbers, tuple(table["rare"]))


def annotation_file(folder: Path, split: str = "test") -> Path | None:
    """The annotations of a split in a folder or its `annotations`, in any form; None if there are none."""
    names = ("test_hico.json", "instances_test2015.json", "anno_list.json")
    if split == "train":
        names = ("trainval_hico.json", "instances_train2015.json")
    for place in (folder, folder / "annotations"):
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


def read_hico(file: Path, split: str = "test") -> list[Layout]:
    """The layouts of the pictures that have a visible pair, in the file's order.

    Args:
        file: `test_hico.json` (PPDM, QPIC, FGAHOI), `instances_test2015.json` (UPT, PViC) or `anno_list.json`
            (no-frills, FGAHOI's evaluator), which is told apart by what is in it.
        split: of `anno_list.json`, which has all.

    Raises:
        DataError: it is none of them, or is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected annotations of HICO-DET at {file}, got {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"expected JSON in {file}, got {error}") from None
    try:
        if isinstance(content, dict) and "correspondence" in content:
            return list(_from_instances(content))
        if isinstance(content, list) and content and "hoi_annotation" in content[0]:
            return list(_from_triplets(content, file))
        if isinstance(content, list) and content and "global_id" in content[0]:
            return list(_from_hoi_lists(content, split))
    except SceneError as error:
        raise DataError(f"{file}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise DataError(f"expected annotations of HICO-DET in {file}, got {kind}: {error}") from None
    raise DataError(
        f"expected test_hico.json, instances_test2015.json or anno_list.json of HICO-DET, got {file} of "
        f"another form"
    )


def _layout(
    name: str,
    size: tuple[int, int],
    triplets: list[tuple[int, Any, Any]],
    labelled: Sequence[int] | None = None,
) -> Layout:
    """A layout of classes with boxes of inclusive pixels from 0."""
    table = hico_classes()
    interactions = tuple(
        Interaction(
            SUBJECT,
            table.classes[number][0],
            table.classes[number][1],
            _shares(person, size, name),
            _shares(thing, size, name),
        )
        for number, person, thing in triplets
    )
    objects = None if labelled is None else frozenset(table.classes[number][1] for number in labelled)
    return Layout(name, table.caption([number for number, _, _ in triplets]), interactions, (), size, objects)


def _shares(pixels: Any, size: tuple[int, int], name: str) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(edge) for edge in pixels)
    width, height = size
    edges = (x0 / width, y0 / height, (x1 + 1) / width, (y1 + 1) / height)
    a, b, c, d = (min(max(edge, 0.0), 1.0) for edge in edges)
    if not (a < c and b < d):
        raise DataError(f"{name}: expected a box in a picture of {width} x {height}, got {shown(pixels)}")
    return a, b, c, d


def _from_triplets(rows: list[dict[str, Any]], file: Path) -> Iterator[Layout]:
    table = hico_classes()
    number_of = {pair: number for number, pair in enumerate(table.numbers)}
    for row in rows:
        boxes = row["annotations"]
        hois = row["hoi_annotation"]
        ends = [number for hoi in hois for number in (hoi["subject_id"], hoi["object_id"])]
        if not hois or not all(0 <= number < len(boxes) for number in ends):
            continue  # as the projects do: train pictures whose numbers are out of range are left out
        triplets = []
        for hoi in hois:
            thing = coco_objects()[int(str(boxes[hoi["object_id"]]["category_id"]).strip())]
            pair = int(hoi["category_id"]) - 1, table.objects.index(thing)
            if pair not in number_of:
                verb = table.verbs[pair[0]]
                raise DataError(f"{row['file_name']}: expected one of 600 classes, got {verb} {thing}")
            ends_of = (boxes[hoi[end]]["bbox"] for end in ("subject_id", "object_id"))
            triplets.append((number_of[pair], *ends_of))
        size = (row["width"], row["height"]) if "width" in row else _size(file, row["file_name"])
        yield _layout(row["file_name"], size, triplets)


def _size(file: Path, name: str) -> tuple[int, int]:
    from PIL import Image

    if (picture := picture_file(file.parent, name)) is None:
        raise DataError(f"{name}: expected its picture beside {file.name}, which has no sizes, got none")
    with Image.open(picture) as image:
        return image.size


def picture_file(folder: Path, name: str) -> Path | None:
    """A picture of a data set: in the folder itself, or where HICO-DET's archive has it; None if missing."""
    root = folder.parent if folder.name == "annotations" else folder
    for place in (
        root,
        root / "images",
        root / "images/test2015",
        root / "images/train2015",
        root / "test2015",
    ):
        if (place / name).is_file():
            return place / name
    return None


def _from_instances(content: Mapping[str, Any]) -> Iterator[Layout]:
    empty = set(content["empty"])
    rows = zip(content["filenames"], content["size"], content["annotation"], strict=True)
    for number, (name, size, row) in enumerate(rows):
        if number in empty or not row["hoi"]:
            continue
        # Pixels are counted from 1.
        people, things = ([[edge - 1 for edge in box] for box in row[key]] for key in ("boxes_h", "boxes_o"))
        yield _layout(name, (size[0], size[1]), list(zip(row["hoi"], people, things, strict=True)))


def _from_hoi_lists(rows: list[dict[str, Any]], split: str) -> Iterator[Layout]:
    for row in rows:
        if f"_{split}" not in row["global_id"]:
            continue
        height, width = row["image_size"][:2]
        triplets = [
            (int(hoi["id"]) - 1, hoi["human_bboxes"][person], hoi["object_bboxes"][thing])
            for hoi in row["hois"]
            for person, thing in hoi["connections"]
        ]
        if triplets:
            labelled = [int(number) - 1 for number in row["pos_hoi_ids"]] if "pos_hoi_ids" in row else None
            yield _layout(f"{row['global_id']}.jpg", (width, height), triplets, labelled)
