"""COCO instances: entities, with a caption of the pictures' own where there are some."""

from array import array
from collections import Counter
from collections.abc import Iterator
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
from interactdiff.errors import DataError
from interactdiff.scene_checks import Box


class Instances:
    """Boxes of a COCO file by picture, kept as numbers: 48 bytes a box.

    Args:
        path: `instances_*.json`.
        crowds: keep those too; their boxes are around all of a crowd.
    """

    def __init__(self, path: Path, crowds: bool = False):
        self.pictures: dict[int, tuple[str, int, int]] = {}
        self.names: dict[int, str] = {}
        self.crowds = 0
        columns = array("q"), array("q"), array("d")
        try:
            for key, row in stream_json(path, ("images", "categories", "annotations")):
                if key == "images":
                    self.pictures[row["id"]] = row["file_name"], row["width"], row["height"]
                elif key == "categories":
                    self.names[row["id"]] = row["name"]
                elif row.get("iscrowd") and not crowds:
                    self.crowds += 1
                else:
                    columns[0].extend((row["image_id"], row["id"]))
                    columns[1].append(row["category_id"])
                    columns[2].extend(row["bbox"])
        except (KeyError, TypeError) as error:
            raise DataError(f"expected COCO instances in {path}, got a row without {error}") from None
        pairs = np.frombuffer(columns[0], np.int64).reshape(-1, 2)
        order = np.argsort(pairs[:, 0], kind="stable")
        self.of, self.ids = pairs[order].T
        self.categories = np.frombuffer(columns[1], np.int64)[order]
        self.boxes = np.frombuffer(columns[2], np.float64).reshape(-1, 4)[order]

    def picture(self, number: int) -> tuple[str, int, int]:
        """Name, width and height of a picture.

        Raises:
            DataError: there is none of that number.
        """
        if number not in self.pictures:
            raise DataError(f"expected the picture {number} in COCO's instances, got none")
        return self.pictures[number]

    def of_picture(self, picture: int) -> range:
        """The numbers of a picture's boxes."""
        first, last = np.searchsorted(self.of, [picture, picture + 1])
        return range(int(first), int(last))

    def shares(self, number: int, boxes: PixelBoxes) -> Box | None:
        """A box as shares, from x, y, width and height in pixels."""
        x, y, width, height = self.boxes[number].tolist()
        return boxes.shares(x, y, x + width, y + height)


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Convert COCO instances; crowds are left out.

    Args:
        source: COCO's folder or one `instances_*.json`.
        options: `images`, `split` (such as "train2017"), `skip_missing`.
        notes: counts what is left out.
    """
    root = Path(source)
    path = first_file(root, f"instances_{options.split or 'train2017'}.json", "_annotations.coco.json")
    split = path.stem.removeprefix("instances_")
    instances = Instances(path)
    captions = captions_of(path)
    notes["crowds"] += instances.crowds
    pictures = Pictures(root, options, notes, (split, f"images/{split}", f"../{split}", f"../images/{split}"))
    for number, (name, width, height) in sorted(instances.pictures.items()):
        if (picture := pictures.find(name)) is None:
            continue
        boxes = PixelBoxes(picture, (width, height), "stored")
        entities = []
        for one in instances.of_picture(number):
            if (box := instances.shares(one, boxes)) is None:
                notes["boxes outside the picture"] += 1
            else:
                entities.append({"phrase": instances.names[int(instances.categories[one])], "box": box})
        yield Converted(
            Path(name).name, picture, {**captioned(captions.get(number), entities), "source": "COCO"}
        )


def captions_of(instances: Path) -> dict[int, list[str]]:
    """The captions of `captions_*.json` beside the instances, by picture; none if there is no such file."""
    captions: dict[int, list[str]] = {}
    path = instances.with_name(instances.name.replace("instances_", "captions_"))
    if path != instances and path.is_file():
        for _, row in stream_json(path, ("annotations",)):
            captions.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    return captions


def captioned(captions: list[str] | None, entities: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of entities: with all captions, or with one that lists the phrases."""
    if captions:
        said: dict[str, Any] = {"prompt": captions[0]} if len(captions) == 1 else {"prompts": captions}
    else:
        said = {"prompt": ", ".join(dict.fromkeys(entity["phrase"] for entity in entities))}
    return {**said, "entities": entities}
