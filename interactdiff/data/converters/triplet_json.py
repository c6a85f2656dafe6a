"""SWIG-HOI and HOI-A: JSON lists of annotated boxes and of pairs of them, with names of classes elsewhere."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_items import Interaction

Names = Mapping[int, str]


def convert_swig(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert SWIG-HOI.

    Args:
        source: the folder of `swig_{train,dev,test}_1000.json`, or one such file.
        options: `images`, `split`, `skip_missing`, `names`: the published `swig_v1_categories.py`, which is
            read as data and not run, or JSON with the lists `objects` and `actions` of {id, name}.
        notes: counts what is left out.
    """
    split = options.split or "train"
    path = first_file(Path(source), f"swig_{split}_1000.json", f"swig_{split}.json")
    names = options.names or path.with_name("swig_v1_categories.py")
    objects, actions = _names(names, ("SWIG_CATEGORIES", "SWIG_ACTIONS"))
    keys = ("box_annotations", "hoi_annotations", "action_id")
    return _convert(path, Path(source), options, notes, keys, objects, actions, "SWIG-HOI", "person")


def convert_hoia(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert HOI-A.

    Args:
        source: the folder of `train_hoia.json` and `test_hoia.json`, or one such file.
        options: `images`, `split`, `skip_missing`, `names`: JSON with the lists `objects` (ids 1 to 11) and
            `actions` (ids 1 to 10) of {id, name}.
        notes: counts what is left out.
    """
    split = options.split or "train"
    path = first_file(Path(source), f"{split}_hoia.json", f"{split}_2019.json")
    if options.names is None:
        raise DataError("expected --names with the objects and actions of HOI-A, got none")
    objects, actions = _names(options.names, ("objects", "actions"))
    keys = ("annotations", "hoi_annotation", "category_id")
    return _convert(path, Path(source), options, notes, keys, objects, actions, "HOI-A", None)


def _convert(
    path: Path,
    source: Path,
    options: Options,
    notes: Counter[str],
    keys: tuple[str, str, str],
    objects: Names,
    actions: Names,
    origin: str,
    person: str | None,
) -> Iterator[Converted]:
    pictures = Pictures(
        source, options, notes, ("images_512", "images/train", "images/test", "train", "test")
    )
    boxes_key, pairs_key, action_key = keys
    for _, row in stream_json(path):
        things, pairs = row[boxes_key], row[pairs_key]
        ends = [index for pair in pairs for index in (pair["subject_id"], pair["object_id"])]
        if any(not 0 <= index < len(things) for index in ends):
            notes["pairs with an index out of range"] += 1
            pairs = [
                p for p in pairs if all(0 <= p[end] < len(things) for end in ("subject_id", "object_id"))
            ]
        if not pairs:
            notes["pictures without a pair"] += 1
            continue
        if (picture := pictures.find(row["file_name"])) is None:
            continue
        size = (row["width"], row["height"]) if {"width", "height"} <= row.keys() else None
        boxes, made = PixelBoxes(picture, size, "stored"), {}
        for pair in pairs:
            subject, thing = things[pair["subject_id"]], things[pair["object_id"]]
            shares = boxes.shares(*subject["bbox"]), boxes.shares(*thing["bbox"])
            if shares[0] is None or shares[1] is None:
                notes["pairs outside the picture"] += 1
                continue
            words = [person or _name(objects, subject["category_id"], path)]
            words += [_name(actions, pair[action_key], path), _name(objects, thing["category_id"], path)]
            made[Interaction(*words, *shares)] = None  # type: ignore[arg-type]
        if made:
            items = [interaction(o.subject, o.action, o.object, o.subject_box, o.object_box) for o in made]
            said = {"prompt": triplet_caption(list(made)), "interactions": items, "source": origin}
            yield Converted(Path(row["file_name"]).name, picture, said)


def _name(names: Names, number: Any, path: Path) -> str:
    try:
        return names[int(str(number).strip())]
    except (KeyError, ValueError):
        raise DataError(f"expected a class that has a name, got {number!r} in {path}") from None


def _names(path: Path, keys: tuple[str, str]) -> list[Names]:
    """Names of objects and of actions by their ids; a Python file is parsed and never run."""
    if path.suffix == ".py":
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id in keys
            }
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            raise DataError(
                f"expected names of classes in {path}, got {type(error).__name__}: {error}"
            ) from None
    else:
        found, keys = read_json(path), ("objects", "actions")
    try:
        return [{int(one["id"]): str(one["name"]).replace("_", " ") for one in found[key]} for key in keys]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"expected lists of id and name under {' and '.join(keys)} in {path}, got {error}"
        ) from None
