"""The classes of COCO and of HICO-DET.

Chao et al., "Learning to Detect Human-Object Interactions", 2018.
"""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

SUBJECT = "person"
_FIXED = {
    "controling": "controlling",
    "spining": "spinning",
    "stiring": "stirring",
    "siping": "sipping",
    "tieing": "tying",
}


@dataclass(frozen=True)
class HicoClasses:
    """The classes of HICO-DET, numbered from 0 in the order of its list.

    Attributes:
        objects: 80 names, alphabetically ("cell phone").
        verbs: 117 gerunds ("riding") in the data set's spelling; that of no interaction is "with".
        classes: 600 pairs of verb and object, as phrases.
        numbers: 600 pairs of the verb's and the object's number.
        rare: the 138 classes with fewer than 10 instances to train on.
    """

    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    classes: tuple[tuple[str, str], ...]
    numbers: tuple[tuple[int, int], ...]
    rare: tuple[int, ...]

    @cached_property
    def of_numbers(self) -> dict[tuple[int, int], int]:
        """The number of the class of a verb's and an object's number."""
        return {pair: number for number, pair in enumerate(self.numbers)}


@cache
def hico_classes() -> HicoClasses:
    """The packaged table of HICO-DET's classes."""
    table = _table("hico_classes.json")
    objects = tuple(name.replace("_", " ") for name in table["objects"])
    verbs = tuple(table["gerunds"][name] for name in table["verbs"])
    rows = sorted(table["correspondence"])
    numbers = tuple((verb, thing) for _, thing, verb in rows)
    classes = tuple((verbs[verb], objects[thing]) for verb, thing in numbers)
    return HicoClasses(objects, verbs, classes, numbers, tuple(table["rare"]))


@cache
def coco_objects() -> dict[int, str]:
    """COCO's 80 classes by their ids of 1 to 90; detectors that count from 0 to 79 keep the order."""
    return {int(number): name for number, name in _table("coco_objects.json").items()}


def fixed_spelling(gerund: str) -> str:
    """A gerund of HICO-DET as dictionaries spell it ("controling" is "controlling")."""
    return _FIXED.get(gerund, gerund)


def _table(name: str) -> dict[str, Any]:
    return json.loads(files("interactdiff.data").joinpath(name).read_text(encoding="utf-8"))
