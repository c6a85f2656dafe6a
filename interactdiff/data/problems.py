"""Mistakes in data: each says where it is, what was expected and what came; all are collected."""

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from interactdiff.errors import DataError

SHOWN = 20  # mistakes that are kept and shown; the others are counted


@dataclass(frozen=True)
class Problem:
    """One mistake, or one warning.

    Attributes:
        kind: a short name that stays the same from version to version, such as "box".
        file: the file that it is in.
        text: "expected ..., got ...", or the sentence of a warning.
        line: of the file, from 1; None where it has no lines. For a picture: the line of its row.
        item: such as "interaction 2".
        field: the key that is wrong.
        column: of the line, from 1.
        of_picture: whether `file` is a picture and not a file of rows.
    """

    kind: str
    file: str
    text: str
    line: int | None = None
    item: str | None = None
    field: str | None = None
    column: int | None = None
    of_picture: bool = False

    def __str__(self) -> str:
        if self.of_picture:
            return f"{self.file}{'' if self.line is None else f' (line {self.line})'}: {self.text}"
        places = [self.file]
        places += [f"line {self.line}"] if self.line is not None else []
        places += [f"column {self.column}"] if self.column is not None else []
        places += [part for part in (self.item, self.field) if part is not None]
        return f"{', '.join(places)}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the text's two halves apart where it has them."""
        values: dict[str, Any] = {"kind": self.kind, "file": self.file, "line": self.line}
        values |= {"column": self.column, "item": self.item, "field": self.field}
        expected, comma, got = self.text.removeprefix("expected ").partition(", got ")
        if comma:
            return values | {"expected": expected, "got": got, "message": str(self)}
        return values | {"message": str(self)}


class Problems:
    """Counts mistakes, and keeps the first of them.

    Args:
        of_kind: how many of one kind are kept.
    """

    def __init__(self, of_kind: int = SHOWN) -> None:
        self.of_kind = of_kind
        self.first: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, problem: Problem) -> None:
        """Take one more."""
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= self.of_kind and (self.of_kind < SHOWN or len(self.first) < SHOWN):
            self.first.append(problem)

    def lines(self) -> list[str]:
        """The first ones, each on a line, and how many more there are."""
        rest = len(self) - len(self.first)
        return [str(one) for one in self.first] + ([f"... and {rest} more"] if rest else [])

    def raise_if_any(self, name: str) -> None:
        """Raise an error that says the first and how many there are.

        Args:
            name: of the data, as users gave it.

        Raises:
            DataError: there is a mistake; its attribute `problems` has the first `SHOWN`.
        """
        if not self:
            return
        more = f" (and {len(self) - 1} more; interactdiff data check {name})" if len(self) > 1 else ""
        raise DataError(f"{self.first[0]}{more}", self.first)


def nearest(name: Any, known: list[str]) -> str:
    """ " (did you mean 'x'?)" where a known name is much like this one, else nothing."""
    found = get_close_matches(name, known, n=1) if isinstance(name, str) and len(name) <= 200 else []
    return f" (did you mean {found[0]!r}?)" if found else ""
