"""Visual Genome: relationships whose predicate is an action; where things are and parts are left out."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interactdiff.data.converters.base import (
    Converted,
    Options,
    Pictures,
    PixelBoxes,
    first_file,
    interaction,
    stream_json,
)
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_items import Interaction

# What is said of actions without their gerund, and the gerund.
_GERUNDS = {
    "wears": "wearing",
    "holds": "holding",
    "rides": "riding",
    "carries": "carrying",
    "eats": "eating",
    "uses": "using",
    "watches": "watching",
    "pulls": "pulling",
    "plays": "playing",
    "hits": "hitting",
    "throws": "throwing",
    "swings": "swinging",
    "catches": "catching",
    "kicks": "kicking",
    "pushes": "pushing",
    "drives": "driving",
    "reads": "reading",
    "feeds": "feeding",
}
_NO_ACTIONS = ("belonging", "containing", "including", "surrounding", "covering", "being", "during")


def action_of(predicate: str) -> str | None:
    """The action that a predicate says, as a gerund; None for "on", "has", "of", "near" and the like."""
    words = [word for word in predicate.lower().split() if word not in ("is", "are", "a", "an", "the")]
    if not words:
        return None
    words[0] = _GERUNDS.get(words[0], words[0])
    if len(words[0]) < 5 or not words[0].endswith("ing") or words[0] in _NO_ACTIONS:
        return None
    return " ".join(words)


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert Visual Genome, streamed.

    Args:
        source: the folder of `relationships.json`, `image_data.json` and pictures (`VG_100K`, `VG_100K_2`).
        options: `images`, `skip_missing`, `predicates`.
        notes: counts what is left out.
    """
    root = Path(source)
    relations = first_file(root, "relationships.json", "relationships_v1_2.json")
    sizes: dict[int, tuple[int, int]] = {}
    for _, row in stream_json(relations.with_name("image_data.json")):
        sizes[row.get("image_id", row.get("id"))] = row["width"], row["height"]
    kept = None if options.predicates is None else _lines(options.predicates)
    pictures = Pictures(root, options, notes, ("VG_100K", "VG_100K_2"))
    for _, row in stream_json(relations):
        number = row.get("image_id", row.get("id"))
        if not (found := _relations(row, kept, notes)):
            notes["pictures without an action"] += 1
            continue
        if (picture := pictures.find(f"{number}.jpg")) is None:
            continue
        boxes, made = PixelBoxes(picture, sizes.get(number), "stored"), {}
        for subject, action, thing in found:
            ends = [
                boxes.shares(end["x"], end["y"], end["x"] + end["w"], end["y"] + end["h"])
                for end in (subject, thing)
            ]
            if ends[0] is None or ends[1] is None:
                notes["pairs outside the picture"] += 1
                continue
            names = _name(subject), _name(thing)
            if not all(names):
                notes["pairs without a name"] += 1
                continue
            made[Interaction(names[0], action, names[1], ends[0], ends[1])] = None  # type: ignore[arg-type]
        if made:
            items = [interaction(o.subject, o.action, o.object, o.subject_box, o.object_box) for o in made]
            said = {"prompt": triplet_caption(list(made)), "interactions": items, "source": "Visual Genome"}
            yield Converted(f"{number}.jpg", picture, said)


def _relations(
    row: dict[str, Any], kept: set[str] | None, notes: Counter[str]
) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    found = []
    for one in row.get("relationships", ()):
        predicate = " ".join(one["predicate"].lower().split())
        action = action_of(predicate) if kept is None else predicate if predicate in kept else None
        if action is None:
            notes["relations that are no actions"] += 1
        else:
            found.append((one["subject"], action, one["object"]))
    return found


def _name(thing: dict[str, Any]) -> str:
    """The name, which some versions have in a list."""
    name = thing.get("name") or next(iter(thing.get("names") or ()), "")
    return " ".join(name.lower().split())


def _lines(path: Path) -> set[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a list of predicates at {path}, got {type(error).__name__}") from None
    return {" ".join(line.lower().split()) for line in text.splitlines()} - {""}
