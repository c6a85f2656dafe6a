"""Sets of regions with texts: LayoutSAM and EliGen. Entities only."""

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interactdiff.data.converters.base import (
    Converted,
    Options,
    Pictures,
    PixelBoxes,
    first_file,
    stream_json,
)
from interactdiff.data.json_lines import json_lines
from interactdiff.data.pictures import open_picture
from interactdiff.data.problems import Problems
from interactdiff.errors import DataError
from interactdiff.scene_checks import shown


def convert_layoutsam(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert LayoutSAM or LayoutSAM-Eval.

    Args:
        source: a file of its rows as JSON, JSON lines or parquet, or a folder with such files; pictures
            are in the rows (parquet) or in files.
        options: `images`, `skip_missing`.
        notes: counts what is left out.
    """
    root, pictures = Path(source), None
    for row in _rows(root):
        name = Path(str(row.get("file_name") or row.get("image"))).name
        picture: Path | bytes | None = None
        if isinstance(row.get("image"), Mapping):
            picture = row["image"].get("bytes")
        if picture is None:
            pictures = pictures or Pictures(root, options, notes)
            if (picture := pictures.find(name)) is None:
                continue
        listed = [_literal(row, key) for key in ("bbox_list", "region_captions")]
        if len(listed[0]) != len(listed[1]):
            raise DataError(
                f"expected as many boxes as captions for {name}, got {len(listed[0])} and {len(listed[1])}"
            )
        size = int(row["width"]), int(row["height"])
        boxes, entities = PixelBoxes(picture, size, "stored"), []
        for box, phrase in zip(*listed, strict=True):
            if (shares := boxes.shares(*map(float, box))) is None or not str(phrase).strip():
                notes["boxes outside the picture or without words"] += 1
            else:
                entities.append({"phrase": " ".join(str(phrase).split()), "box": shares})
        said = {"prompt": str(row["global_caption"]), "entities": entities, "source": "LayoutSAM"}
        yield Converted(name, picture, said)


def convert_eligen(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert EliGen's training set: each entity's box is that of its mask.

    Args:
        source: the folder of `metadata_eligen.json` (or `.jsonl`), or that file.
        options: `images`, `skip_missing`.
        notes: counts what is left out.
    """
    path = first_file(Path(source), "metadata_eligen.json", "metadata_eligen.jsonl", "metadata.json")
    pictures = Pictures(Path(source), options, notes)
    for row in _rows(path):
        if (picture := pictures.find(row["image"])) is None:
            continue
        texts, masks = row["eligen_entity_prompts"], row["eligen_entity_masks"]
        entities = []
        for text, mask in zip(texts, masks, strict=True):
            if (file := pictures.find(mask)) is None:
                continue
            if (box := mask_box(np.asarray(open_picture(file).convert("L")))) is None:
                notes["empty masks"] += 1
            else:
                entities.append({"phrase": text, "box": box})
        yield Converted(
            row["image"], picture, {"prompt": row["prompt"], "entities": entities, "source": "EliGen"}
        )


def mask_box(mask: np.ndarray) -> list[float] | None:
    """The smallest box around the pixels [H, W] that are at least half white, in shares; None without any."""
    columns, rows = np.flatnonzero((mask >= 128).any(0)), np.flatnonzero((mask >= 128).any(1))
    if not len(columns):
        return None
    height, width = mask.shape
    edges = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return [float(edge) for edge in edges]


def _literal(row: Mapping[str, Any], key: str) -> list[Any]:
    """A list that may be the text of a Python list, which is read and never run."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if not isinstance(value, list):
        raise DataError(f"expected a list in {key}, got {shown(row[key])}")
    return value


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_dir():
        found = sorted(one for end in ("*.parquet", "*.jsonl", "*.json") for one in path.rglob(end))
        if not found:
            raise DataError(f"expected rows as .parquet, .jsonl or .json in {path}, got none")
        files = [one for one in found if one.suffix == found[0].suffix]
    else:
        files = [path]
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix == ".jsonl":
            problems = Problems()
            for _, _, row in json_lines(file, str(file), problems):
                problems.raise_if_any(str(file))
                yield row
            problems.raise_if_any(str(file))
        else:
            for _, row in stream_json(file):
                yield row if isinstance(row, dict) else json.loads(row)


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    from interactdiff.data.tables import library

    datasets = library()
    rows = datasets.load_dataset("parquet", data_files=[str(file)], split="train")
    if isinstance(rows.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    yield from rows
