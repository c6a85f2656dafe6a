"""What is on the canvas, and the forms in which it can be written: a scene's items, lines of text, a table.

A canvas may hold what is not yet a scene: a box without a name, a link without an action. A box that takes
part in several interactions is one here and several equal boxes in a scene.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any, cast

from interactdiff.app.canvas_items import CanvasBox, CanvasLink, CanvasRow
from interactdiff.scene import (
    ACTION_REGIONS,
    MAX_STRENGTH,
    NULL_ACTION,
    Entity,
    Interaction,
    Scene,
    numbered,
)
from interactdiff.scene_checks import (
    Box,
    SceneError,
    checked_box,
    checked_number,
    checked_text,
    checked_whole,
    json_object,
    parse_box,
    shown,
)

COLUMNS = ("subject", "action", "object", "subject box", "object box", "strength", "region")
DETERMINERS = {
    "a",
    "an",
    "the",
    "some",
    "two",
    "three",
    "four",
    "five",
    "several",
    "many",
    "his",
    "her",
    "their",
}
MOST_BOXES = 200


@dataclass(frozen=True)
class Document:
    """The canvas.

    Attributes:
        boxes: of subjects, objects and entities.
        links: the interactions.
        aspect: width over height.
        picture: the address of what is under the boxes, or None.
        revision: counts changes, so that the page knows which of two canvases is later.
    """

    boxes: tuple[CanvasBox, ...] = ()
    links: tuple[CanvasLink, ...] = ()
    aspect: float = 1.0
    picture: str | None = None
    revision: int = 0
    _by_id: dict[str, CanvasBox] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_id.update({box.id: box for box in self.boxes})
        _check_count(len(self.boxes) + len(self.links))
        if len(self._by_id) < len(self.boxes):
            raise SceneError("expected boxes with ids of their own, got one twice")
        for link in self.links:
            if link.subject not in self._by_id or link.object not in self._by_id:
                raise SceneError(f"expected links between boxes, got {link.subject} and {link.object}")

    @classmethod
    def from_value(cls, value: Any) -> "Document":
        """Read what the canvas sends.

        Raises:
            SceneError: it is not that.
        """
        given = json_object(
            {} if value is None else value, (), ("boxes", "links", "aspect", "picture", "revision")
        )
        kinds: tuple[tuple[str, type, tuple[str, ...], tuple[str, ...]], ...] = (
            ("boxes", CanvasBox, ("id", "phrase", "box"), ("strength",)),
            ("links", CanvasLink, ("id", "subject", "object"), ("action", "strength", "region")),
        )
        for name, kind, required, optional in kinds:
            listed = given.get(name, [])
            if not isinstance(listed, list):
                raise SceneError(f"{name}: expected a list, got {shown(listed)}")
            given[name] = tuple(kind(**json_object(one, required, optional)) for one in listed)
        given["aspect"] = checked_number("aspect", given.get("aspect", 1.0), 0.01, 100)
        picture = given.get("picture")
        given["picture"] = None if picture is None else checked_text("picture", picture)
        given["revision"] = checked_whole("revision", given.get("revision", 0), 0, 2**53)
        return cls(**given)

    def to_value(self) -> dict[str, Any]:
        """What the canvas reads."""
        boxes, links = ([asdict(one) for one in some] for some in (self.boxes, self.links))
        rest = {name: getattr(self, name) for name in ("aspect", "picture", "revision")}
        return {"boxes": boxes, "links": links, **rest}

    def changed(self, **changes: Any) -> "Document":
        """The next revision, with these changes."""
        return replace(self, revision=self.revision + 1, **changes)

    def box_like(self, box: CanvasBox) -> CanvasBox | None:
        """The box of the same id; else the first of the same phrase, as after an edit of the table."""
        same = (one for one in self.boxes if one.phrase == box.phrase)
        return self._by_id.get(box.id) or next(same, None)

    @property
    def rows(self) -> tuple[CanvasRow, ...]:
        """Interactions, then the boxes that have none."""
        linked = {end for link in self.links for end in (link.subject, link.object)}
        rows = []
        for link in self.links:
            s, o = self._by_id[link.subject], self._by_id[link.object]
            rows.append(CanvasRow(s.phrase, s.box, link.action, o.phrase, o.box, link.strength, link.region))
        lone = (box for box in self.boxes if box.id not in linked)
        return (*rows, *(CanvasRow(one.phrase, one.box, strength=one.strength) for one in lone))

    def with_rows(self, rows: Sequence[CanvasRow]) -> "Document":
        """The same canvas with other rows; ids stay with boxes that stay.

        Raises:
            SceneError: there are too many.
        """
        _check_count(len(rows))
        old = {(box.phrase, box.box): box.id for box in reversed(self.boxes)}
        free = (name for n in count(1) if (name := f"t{n}") not in self._by_id)
        boxes: list[CanvasBox] = []
        ends: dict[tuple[str, Box], str] = {}  # a subject or object is one box, in however many interactions

        def add(phrase: str, box: Box, strength: float = 1.0) -> str:
            name = old.pop((phrase, box), None) or next(free)
            boxes.append(CanvasBox(name, phrase, box, strength))
            return name

        links = []
        for number, row in enumerate(rows, start=1):
            if row.object is None or row.object_box is None:
                add(row.subject, row.subject_box, row.strength)
                continue
            pair = (row.subject, row.subject_box), (row.object, row.object_box)
            for end in pair:
                if end not in ends:
                    ends[end] = add(*end)
            subject, object_ = (ends[end] for end in pair)
            links.append(CanvasLink(f"l{number}", subject, object_, row.action, row.strength, row.region))
        return self.changed(boxes=tuple(boxes), links=tuple(links))

    # --- a scene's items ---

    @property
    def items(self) -> tuple[tuple[Interaction, ...], tuple[Entity, ...]]:
        """What a scene is made of.

        Raises:
            SceneError: something has no name.
        """
        interactions, entities = [], []
        for number, row in enumerate(self.rows, start=1):
            if row.object is None or row.object_box is None:
                if not row.subject.strip():
                    raise SceneError("expected a name for every box, got one without: select it and type")
                entities.append(Entity(row.subject, row.subject_box, row.strength))
                continue
            for end in (row.subject, row.object):
                if not end.strip():
                    raise SceneError(f"interaction {number}: expected a name for both boxes, got one without")
            action = row.action.strip()
            ends = row.object, row.subject_box, row.object_box
            action = None if action in ("", NULL_ACTION) else action
            interactions.append(
                numbered(
                    Interaction,
                    number,
                    lambda row=row, action=action, ends=ends: Interaction(
                        row.subject, action, *ends, row.strength, row.region
                    ),
                )
            )
        return tuple(interactions), tuple(entities)

    def with_scene(self, scene: Scene) -> "Document":
        """The canvas of a scene."""
        rows = [
            CanvasRow(
                one.subject,
                one.subject_box,
                one.action or "",
                one.object,
                one.object_box,
                one.strength,
                one.action_region,
            )
            for one in scene.interactions
        ]
        return self.with_rows(
            [*rows, *(CanvasRow(one.phrase, one.box, strength=one.strength) for one in scene.entities)]
        )

    # --- text: person=riding=bike, a line each ---

    def to_text(self) -> str:
        """A line for each interaction, `subject=action=object`, and for each box without one its phrase."""
        lines = []
        for row in (row for row in self.rows if any(row.words)):
            words = (
                (row.subject,) if row.object is None else (row.subject, row.action or NULL_ACTION, row.object)
            )
            lines.append("=".join(words))
        return "\n".join(lines)

    def with_text(self, text: str) -> "Document":
        """The canvas of such lines: what stays, or is renamed, keeps its place; what is new is given one.

        Raises:
            SceneError: a line is neither of the two.
        """
        wanted: list[tuple[str, str, str | None]] = []
        for number, line in enumerate(filter(str.strip, text.replace(";", "\n").splitlines()), start=1):
            words = [part.strip() for part in line.split("=")]
            if len(words) not in (1, 3):
                raise SceneError(
                    f"line {number}: expected subject=action=object, or a phrase, got {shown(line)}"
                )
            action = "" if len(words) == 1 or words[1] == NULL_ACTION else words[1]
            wanted.append((words[0], action, words[2] if len(words) == 3 else None))
        _check_count(2 * len(wanted))
        left = [row for row in self.rows if any(row.words)]
        rows: list[CanvasRow | None] = [None] * len(wanted)
        for exact in (True, False):  # lines that stayed take their rows first
            if not exact:  # a box that has an action now was not renamed
                acting = {end for words in wanted if words[2] is not None for end in words}
                left = [row for row in left if row.object is not None or row.subject not in acting]
            for n, words in enumerate(wanted):
                fits = (row for row in left if (row.object is None) == (words[2] is None))
                row = next((row for row in fits if not exact or row.words == words), None)
                if rows[n] is None and row is not None:
                    left.remove(row)
                    rows[n] = replace(row, subject=words[0], action=words[1], object=words[2])
        places = {box.phrase: box.box for box in reversed(self.boxes)}
        for n, (subject, action, object_) in enumerate(wanted):
            if rows[n] is None:
                taken = [
                    box for row in rows if row is not None for box in (row.subject_box, row.object_box) if box
                ]
                first = places.get(subject) or _free_place(taken)
                second = None if object_ is None else places.get(object_) or _free_place([*taken, first])
                rows[n] = CanvasRow(subject, first, action, object_, second)
        unnamed = (row for row in self.rows if not any(row.words))  # has no line
        return self.with_rows([*cast(list[CanvasRow], rows), *unnamed])

    # --- a table ---

    def to_table(self) -> list[list[Any]]:
        """Rows of `COLUMNS`."""
        return [
            [
                row.subject,
                row.action,
                row.object or "",
                _as_text(row.subject_box),
                _as_text(row.object_box),
                row.strength,
                row.region or "",
            ]
            for row in self.rows
        ]

    def with_table(self, table: Sequence[Sequence[Any]]) -> "Document":
        """The canvas of such a table; empty rows are left out.

        Raises:
            SceneError: a cell is not what it should be; the message names row and column.
        """
        rows = []
        for number, cells in enumerate(table, start=1):
            if len(cells) != len(COLUMNS):
                raise SceneError(f"row {number}: expected {len(COLUMNS)} cells, got {len(cells)}")
            subject, action, object_, box, other, strength, region = (
                "" if c is None else str(c).strip() for c in cells
            )
            if not any((subject, action, object_, box, other)):
                continue
            try:
                if bool(object_) != bool(other):
                    raise SceneError("expected an object and its box, or neither, got one of them")
                if action and not object_:
                    raise SceneError(f"expected an object of {action}, got none")
                rows.append(
                    CanvasRow(
                        subject,
                        checked_box("subject box", parse_box("subject box", box)),
                        action,
                        object_ or None,
                        checked_box("object box", parse_box("object box", other)) if other else None,
                        checked_number("strength", _as_number(strength), 0.0, MAX_STRENGTH),
                        cast(Any, region or None),
                    )
                )
                if rows[-1].region not in (None, *ACTION_REGIONS):
                    raise SceneError(f"region: expected between, union or nothing, got {shown(region)}")
            except SceneError as error:
                raise SceneError(f"row {number}: {error}") from None
        return self.with_rows(rows)

    # --- words ---

    def prompt(self) -> str:
        """A caption that says what the canvas says; empty where nothing is named."""
        parts = []
        for row in self.rows:
            subject = _with_article(row.subject)
            if row.object is None or not row.object.strip():
                parts.append(subject)
            else:
                action = row.action.strip()
                joined = action if action not in ("", NULL_ACTION) else "and"
                parts.append(f"{subject} {joined} {_with_article(row.object)}")
        return " and ".join(part for part in parts if part)


def _check_count(boxes: int) -> None:
    if boxes > MOST_BOXES:
        raise SceneError(f"expected at most {MOST_BOXES} boxes and links, got {boxes}")


def _with_article(phrase: str) -> str:
    words = phrase.split()
    if not words or words[0].lower() in DETERMINERS or words[0][0].isdigit() or words[0][0].isupper():
        return " ".join(words)
    return f"{'an' if words[0][0].lower() in 'aeiou' else 'a'} {' '.join(words)}"


def _as_text(box: Box | None) -> str:
    return (
        ""
        if box is None
        else ", ".join(f"{edge:g}" if edge == float(f"{edge:g}") else repr(edge) for edge in box)
    )


def _as_number(text: str) -> Any:
    try:
        return float(text or 1)
    except ValueError:
        return text


def _free_place(taken: Sequence[Box]) -> Box:
    """A box that covers as little as may be of the others."""

    def covered(box: Box) -> float:
        wide = ((min(box[2], b[2]) - max(box[0], b[0]), min(box[3], b[3]) - max(box[1], b[1])) for b in taken)
        return sum(max(0.0, w) * max(0.0, h) for w, h in wide)

    places = [(x / 20, y / 20, (x + 6) / 20, (y + 8) / 20) for y in (6, 2, 10) for x in (2, 12, 7)]
    return min(places, key=covered)
