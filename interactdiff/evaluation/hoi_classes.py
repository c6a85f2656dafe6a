"""The classes that interactions are scored by, and layouts and detections in their numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from interactdiff.data.classes import hico_classes
from interactdiff.evaluation.detection import PictureDetections
from interactdiff.evaluation.hoi_matching import Pairs
from interactdiff.evaluation.layout import Layout


@dataclass(frozen=True)
class ClassTable:
    """Pairs of a verb and an object.

    Attributes:
        name: what tables call it.
        classes: as phrases.
        rare: numbers of the rare classes, where it is known which are.
    """

    name: str
    classes: tuple[tuple[str, str], ...]
    rare: tuple[int, ...] | None = None

    @classmethod
    def hico(cls) -> "ClassTable":
        """HICO-DET's 600."""
        table = hico_classes()
        return cls("HICO-DET, 600 classes", table.classes, table.rare)

    @classmethod
    def of(cls, layouts: Iterable[Layout]) -> "ClassTable":
        """Those that occur in layouts, in their own words; boxes whose action is null are of none."""
        classes = sorted(
            {(one.action, one.object) for layout in layouts for one in layout.interactions if one.action}
        )
        return cls(f"{len(classes)} classes of the layouts", tuple(classes))

    @cached_property
    def numbers(self) -> dict[tuple[str, str], int]:
        """The number of each class."""
        return {pair: number for number, pair in enumerate(self.classes)}

    @cached_property
    def verbs_of(self) -> dict[str, tuple[str, ...]]:
        """What can be done to each object."""
        verbs: dict[str, list[str]] = {}
        for verb, thing in self.classes:
            verbs.setdefault(thing, []).append(verb)
        return {thing: tuple(of_it) for thing, of_it in verbs.items()}

    def truth(self, layout: Layout, size: tuple[int, int], floor: bool = False) -> Pairs:
        """The pairs that a picture of this layout should show, in its order.

        Args:
            layout: whose interactions; those of no class are left out.
            size: width and height of the picture in pixels.
            floor: scale the annotated picture's pixels and cut them to whole numbers, as the script of the
                paper does.

        Returns:
            Boxes that end with their last pixel.
        """
        known = [one for one in layout.interactions if (one.action, one.object) in self.numbers]
        classes = [self.numbers[one.action or "", one.object] for one in known]
        boxes = [
            _inclusive(np.array([getattr(one, role) for one in known]).reshape(-1, 4), size, layout, floor)
            for role in ("subject_box", "object_box")
        ]
        return Pairs.of(classes, *boxes, inclusive=True)

    def known(self, layout: Layout) -> np.ndarray:
        """[C] bool: the classes whose object the picture holds."""
        return np.array([thing in layout.known_objects for _, thing in self.classes], dtype=bool)

    def detected(self, found: PictureDetections, size: tuple[int, int]) -> Pairs:
        """The pairs that are found, in a picture of this size; those of no class or object are left out."""
        rows = [
            (number, found.persons[pair.person].box, thing.box, pair.score)
            for pair in found.pairs
            if (thing := found.object_of(pair)) is not None
            and (number := self.numbers.get((pair.verb, thing.name))) is not None
        ]
        classes, persons, objects, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
        pairs = Pairs.of(classes, persons, objects, scores, inclusive=found.inclusive)
        if found.size is None or found.size == size:
            return pairs
        return pairs.scaled(size[0] / found.size[0], size[1] / found.size[1])


def _inclusive(shares: np.ndarray, size: tuple[int, int], layout: Layout, floor: bool) -> np.ndarray:
    """Boxes that end with their last pixel, of [N, 4] shares."""
    last = np.array([0, 0, 1, 1])
    if not floor or layout.size is None:
        return shares * np.array([*size, *size]) - last
    annotated = np.array([*layout.size, *layout.size])
    pixels = np.rint(shares * annotated - last)
    return np.floor(pixels * np.array([*size, *size]) / annotated)
