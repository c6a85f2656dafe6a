"""Small folders of pictures with rows; shared by the tests of data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from interactdiff.data.converters.base import Options
from interactdiff.data.converters.stickworld import rendered
from interactdiff.stickworld.world import WorldScene

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64))  # widths and heights


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that no two seeds share."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def row(number: int, name: str) -> dict[str, Any]:
    """A row with one interaction and, for every second picture, an entity."""
    ride = {
        "subject": "person",
        "action": "riding" if number % 3 else None,
        "object": "bike",
        "subject_box": [0.2, 0.1, 0.6, 0.8],
        "object_box": [0.1, 0.5, 0.7, 0.9],
    }
    made: dict[str, Any] = {"file_name": name, "prompt": f"a person riding a bike, number {number}"}
    made["interactions"] = [ride]
    if number % 2:
        made["entities"] = [{"phrase": "ball", "box": [0.7, 0.1, 0.95, 0.4]}]
    return made


def write_rows(folder: Path, rows: list[Any]) -> None:
    """Write `metadata.jsonl`; text stands as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_folder(folder: Path, count: int = 10, sizes: Any = SIZES) -> list[dict[str, Any]]:
    """A folder of pictures of several aspects with `metadata.jsonl`; its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"{number:04d}.png"
        noise(*sizes[number % len(sizes)], seed=number).save(folder / name)
        rows.append(row(number, name))
    write_rows(folder, rows)
    return rows


def export_scenes(folder: Path, scenes: Iterable[WorldScene], size: int, colours: bool = False) -> None:
    """Renders of these scenes of stickworld and their rows, as `data convert stickworld` makes them."""
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(scenes):
        made = rendered(scene, f"{number:06}.png", Options(size=size, colours=colours))
        assert isinstance(made.picture, bytes)
        (folder / made.name).write_bytes(made.picture)
        rows.append({"file_name": made.name, **made.row})
    write_rows(folder, rows)


def make_links(folder: Path, count: int, size: tuple[int, int] = (16, 16)) -> list[dict[str, Any]]:
    """Many rows whose pictures are links to one file, and no `metadata.jsonl` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    noise(*size).save(folder / "0000000.jpg")
    rows = []
    for number in range(count):
        name = f"{number:07d}.jpg"
        if number:
            (folder / name).hardlink_to(folder / "0000000.jpg")
        rows.append(row(number, name))
    return rows
