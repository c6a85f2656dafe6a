"""Exports of annotation tools: Label Studio, which has relations, and CVAT."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from interactdiff.data.converters.base import (
    Converted,
    Options,
    Pictures,
    PixelBoxes,
    first_file,
    interaction,
    stream_json,
)
from interactdiff.data.folder import caption_beside
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box
from interactdiff.scene_items import Interaction

_CAPTIONS = ("prompt", "caption", "text")  # keys of a task's data, and attributes, that have one


def convert_labelstudio(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert Label Studio's JSON export: related boxes become interactions, others entities.

    A relation's label is the action; without one it is open. The caption is the task's `prompt`, `caption` or
    `text`, or a text area's, or a `.txt` beside the picture, or made of the interactions.

    Args:
        source: the exported `.json`, or a folder with it.
        options: `images`, `skip_missing`.
        notes: counts what is left out.
    """
    root = Path(source)
    path = root if root.is_file() else _only(root, "*.json")
    pictures = Pictures(root, options, notes)
    for _, task in stream_json(path):
        done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
        name = _task_picture(task, path)
        if not done:
            notes["tasks without an annotation"] += 1
            continue
        if (picture := pictures.find(name)) is None:
            continue
        row = _labelled(done[0]["result"], picture, task.get("data", {}), notes)
        yield Converted(Path(name).name, picture, row)


def convert_cvat(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert CVAT's XML ("CVAT for images"): boxes become entities.

    Args:
        source: `annotations.xml`, or a folder with it.
        options: `images`, `skip_missing`.
        notes: counts what is left out.
    """
    root = Path(source)
    path = first_file(root, "annotations.xml")
    pictures = Pictures(root, options, notes)
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "image":
                if converted := _cvat_picture(element, pictures, notes):
                    yield converted
                element.clear()
    except (ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"expected CVAT's XML in {path}, got {type(error).__name__}: {error}") from None


def _labelled(
    results: list[dict[str, Any]], picture: Path, data: dict[str, Any], notes: Counter[str]
) -> dict[str, Any]:
    regions: dict[str, tuple[str, Box]] = {}
    relations: list[tuple[str, str, list[str | None]]] = []
    caption = next((data[key] for key in _CAPTIONS if isinstance(data.get(key), str)), None)
    for one in results:
        kind, value = one.get("type"), one.get("value", {})
        if kind == "relation":
            start, end = one["from_id"], one["to_id"]
            if one.get("direction") == "left":
                start, end = end, start
            relations.append((start, end, one.get("labels") or [None]))
        elif kind == "textarea" and value.get("text"):
            text = value["text"]
            caption = caption or (text if isinstance(text, str) else " ".join(text))
        elif kind in ("rectanglelabels", "rectangle"):
            if value.get("rotation"):
                notes["turned boxes"] += 1
                continue
            size = one.get("original_width"), one.get("original_height")
            boxes = PixelBoxes(picture, size if all(size) else None, "shown")  # type: ignore[arg-type]
            x, y, width, height = (value[key] / 100 for key in ("x", "y", "width", "height"))
            across, down = boxes.size
            shares = boxes.shares(x * across, y * down, (x + width) * across, (y + height) * down)
            labels = value.get("rectanglelabels") or value.get("labels")
            if shares is None or not labels:
                notes["boxes outside the picture or without a label"] += 1
            else:
                regions[one["id"]] = labels[0], shares
    made, used = [], set()
    for start, end, labels in relations:
        if start not in regions or end not in regions:
            notes["relations without two boxes"] += 1
            continue
        used |= {start, end}
        (subject, subject_box), (thing, thing_box) = regions[start], regions[end]
        made += [interaction(subject, label, thing, subject_box, thing_box) for label in labels]
    entities = [{"phrase": label, "box": box} for key, (label, box) in regions.items() if key not in used]
    return _row(caption, picture, made, entities)


def _cvat_picture(element: ElementTree.Element, pictures: Pictures, notes: Counter[str]) -> Converted | None:
    name = element.attrib["name"]
    if (picture := pictures.find(name)) is None:
        return None
    boxes = PixelBoxes(picture, (int(element.attrib["width"]), int(element.attrib["height"])), "shown")
    entities = []
    for box in element.iter("box"):
        if float(box.attrib.get("rotation", 0)):
            notes["turned boxes"] += 1
            continue
        shares = boxes.shares(*(float(box.attrib[edge]) for edge in ("xtl", "ytl", "xbr", "ybr")))
        if shares is None:
            notes["boxes outside the picture"] += 1
        else:
            entities.append({"phrase": box.attrib["label"], "box": shares})
    caption = next((tag.text for tag in element.iter("attribute") if tag.get("name") in _CAPTIONS), None)
    return Converted(name, picture, _row(caption, picture, [], entities))


def _row(
    caption: str | None, picture: Path, made: list[dict[str, Any]], entities: list[dict[str, Any]]
) -> dict[str, Any]:
    """A row with the caption that is there, or one that is made of the items."""
    said = caption or caption_beside(picture)
    if said is None:
        clauses = [triplet_caption([Interaction(**one) for one in made])]
        said = ", ".join(dict.fromkeys(filter(None, [*clauses, *(one["phrase"] for one in entities)])))
    row: dict[str, Any] = {"prompt": said}
    return row | ({"interactions": made} if made else {}) | ({"entities": entities} if entities else {})


def _task_picture(task: dict[str, Any], path: Path) -> str:
    """The file of a task, without what uploading put in front of it (`/data/upload/1/`, `?d=`)."""
    for value in task.get("data", {}).values():
        if isinstance(value, str) and (parts := urlsplit(value)).path:
            name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
            if "." in name.rpartition("/")[2]:
                return name.lstrip("/").removeprefix("data/upload/")
    raise DataError(
        f"expected a picture in the data of every task in {path}, got {list(task.get('data', {}))}"
    )


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"expected one {pattern} in {folder}, got {len(found)}")
    return found[0]
