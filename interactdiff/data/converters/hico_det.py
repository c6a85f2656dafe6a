"""HICO-DET, from any of its forms: see `interactdiff.data.hico_det`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from interactdiff.data.boxes import area
from interactdiff.data.classes import SUBJECT, fixed_spelling, hico_classes
from interactdiff.data.converters.base import Converted, Options, Pictures, PixelBoxes, interaction
from interactdiff.data.hico_det import (
    JSON_FORMS,
    MAT,
    AnnotatedPicture,
    find_annotations,
    picture_folders,
    read_annotations,
)
from interactdiff.data.words import triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_items import Interaction


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
        if options.split not in (None, split) or (file := find_annotations(root, split)) is None:
            continue
        if root.is_file() and file.suffix == ".json" and not _of_split(file, split):
            continue
        found += 1
        pictures = Pictures(root, options, notes, picture_folders(split))
        for annotated in read_annotations(file, split, notes):
            if converted := _converted(annotated, split, pictures, options, notes):
                yield converted
    if not found:
        names = " or ".join((MAT, *JSON_FORMS["test" if options.split == "test" else "train"]))
        raise DataError(f"expected {names} in {source}, got none of them")


def _of_split(path: Path, split: str) -> bool:
    """Whether an annotation file that was named by itself has a split."""
    other = "test" if split == "train" else "train"
    return path.name == "anno_list.json" or other not in path.name


def _converted(
    annotated: AnnotatedPicture, split: str, pictures: Pictures, options: Options, notes: Counter[str]
) -> Converted | None:
    if not annotated.pairs:
        notes["pictures without a visible pair"] += 1
        return None
    if (picture := pictures.find(annotated.file_name)) is None:
        return None
    made = _interactions(annotated, PixelBoxes(picture, annotated.size, "stored"), options, notes)
    if not made:
        notes["pictures without a visible pair"] += 1
        return None
    rows = [interaction(o.subject, o.action, o.object, o.subject_box, o.object_box) for o in made]
    row = {"prompt": triplet_caption(made), "interactions": rows, "source": "HICO-DET"}
    return Converted(Path(annotated.file_name).name, picture, row, split)


def _interactions(
    annotated: AnnotatedPicture, boxes: PixelBoxes, options: Options, notes: Counter[str]
) -> list[Interaction]:
    made: list[Interaction] = []
    for pair in annotated.pairs:
        person, thing = boxes.shares(*pair.person), boxes.shares(*pair.object)
        if person is None or thing is None:
            notes["pairs outside the picture"] += 1
            continue
        action, name = hico_classes().classes[pair.number]
        action = fixed_spelling(action) if options.spelling == "fixed" else action
        made.append(Interaction(SUBJECT, action, name, person, thing))
    if options.merge_iou is not None:
        return merged(made, options.merge_iou)
    kept = list(dict.fromkeys(made))
    notes["pairs that stand twice"] += len(made) - len(kept)
    return kept


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
