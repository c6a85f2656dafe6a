"""What one picture should show, and where: what is drawn from and scored by."""

from dataclasses import dataclass, field
from pathlib import Path

from interactdiff.data.pictures import SUFFIXES
from interactdiff.data.records import Stored
from interactdiff.scene_checks import Box
from interactdiff.scene_items import Entity, Interaction


@dataclass(frozen=True)
class Layout:
    """What one picture shows, and where.

    Attributes:
        file_name: of the picture: its path in the folder of data, its key in a shard, its row in a table.
        prompt: caption of the whole picture.
        interactions: who does what to what, boxes xyxy as shares of the picture as shown.
        entities: what else is where.
        size: width and height of the picture as shown in pixels, where it or its annotations say.
        objects: names of the objects that the picture is labelled with as a whole; None is those that the
            interactions name.
        picture: the data's own picture; None if it is not there.
    """

    file_name: str
    prompt: str
    interactions: tuple[Interaction, ...] = ()
    entities: tuple[Entity, ...] = ()
    size: tuple[int, int] | None = None
    objects: frozenset[str] | None = field(default=None, compare=False)
    picture: Path | Stored | None = field(default=None, compare=False)

    @property
    def known_objects(self) -> frozenset[str]:
        """The objects that the picture holds, for the Known Object setting."""
        if self.objects is not None:
            return self.objects
        return frozenset(one.object for one in self.interactions)

    @property
    def named_boxes(self) -> list[tuple[str, Box]]:
        """The phrases of all persons and objects with their boxes, those of interactions first."""
        pairs = ((one.subject, one.subject_box, one.object, one.object_box) for one in self.interactions)
        ends = [end for person, a, thing, b in pairs for end in ((person, a), (thing, b))]
        return ends + [(one.phrase, one.box) for one in self.entities]

    @property
    def stem(self) -> str:
        """The file name without the ending of a picture; other endings stay (of keys in shards)."""
        ending = next((one for one in SUFFIXES if self.file_name.lower().endswith(one)), "")
        return self.file_name[: len(self.file_name) - len(ending)]
