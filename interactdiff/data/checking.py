"""`interactdiff data check`: everything that would stop training, and what would make it worse."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from interactdiff.data.boxes import area, box_fields
from interactdiff.data.folder import MetadataFolder, picture_names
from interactdiff.data.framing import Framing, phrases_of_item
from interactdiff.data.pictures import PictureInfo, open_picture, picture_info
from interactdiff.data.problems import Problem, Problems
from interactdiff.data.reading import Names, Source, add_repeated, open_source, splits
from interactdiff.data.records import ImageRecord, own_file
from interactdiff.data.rows import PICTURES
from interactdiff.data.shards import Shards
from interactdiff.data.words import names_side
from interactdiff.errors import DataError, SceneError
from interactdiff.scene_checks import shown
from interactdiff.subject.foreground import foreground
from interactdiff.subject.items import Subject

MAX_TOKENS = 77  # of CLIP, two of which it adds
LATENT = 8  # pixels a side of a latent cell
_SMALL = 0.75  # of the training size
_WIDE = 2.5  # aspect
_WARNINGS_SHOWN = 3  # of each kind
_MAX_PHRASES = 100_000  # distinct ones that are compared


@dataclass(frozen=True)
class CheckOptions:
    """How data is checked.

    Attributes:
        form: of the boxes, see `boxes.FORMS`.
        columns: of parquet, see `tables.Table`.
        framing: the sizes of training.
        slots: items that an adapter takes of one picture.
        flip: whether training mirrors pictures.
        decode: whether pictures are decoded; else only their headers are read.
        tokens: of a phrase, its number of tokens; None counts words, of which each is at least one token.
        max_tokens: that the text encoder takes, those that it adds included.
    """

    form: str = "shares"
    columns: Mapping[str, str] | None = None
    framing: Framing = field(default_factory=Framing)
    slots: int = 30
    flip: bool = True
    decode: bool = True
    tokens: Callable[[str], int] | None = None
    max_tokens: int = MAX_TOKENS


@dataclass
class Report:
    """What a check found.

    Attributes:
        name: of the data.
        errors: what stops training.
        warnings: what may make it worse.
        counts: of pictures and of items by their names.
        phrases: distinct ones.
        ignored: keys of scene files, and in how many rows they stand.
    """

    name: str
    errors: Problems = field(default_factory=Problems)
    warnings: Problems = field(default_factory=lambda: Problems(_WARNINGS_SHOWN))
    counts: Counter[str] = field(default_factory=Counter)
    phrases: int = 0
    ignored: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = {}
        for name, problems in (("errors", self.errors), ("warnings", self.warnings)):
            first = [one.to_dict() for one in problems.first]
            found[name] = {"count": len(problems), "kinds": dict(problems.counts), "first": first}
        return {"data": self.name, "counts": dict(self.counts), "phrases": self.phrases, **found} | {
            "ignored_keys": dict(self.ignored)
        }

    def lines(self) -> list[str]:
        """For people: a summary, then errors, then warnings by kind."""
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items()) or "nothing"
        made = [f"{self.name}: {counts}, {self.phrases:,} distinct phrases"]
        if self.ignored:
            keys = ", ".join(self.ignored)
            made.append(f"not used in training: {keys}")
        made.append(f"errors: {len(self.errors):,}")
        made += [f"  {line}" for line in self.errors.lines()]
        made.append(f"warnings: {len(self.warnings):,}")
        for kind, count in self.warnings.counts.items():
            made.append(f"  {kind} ({count:,})")
            made += [f"    {one}" for one in self.warnings.first if one.kind == kind]
            if count > _WARNINGS_SHOWN:
                made.append(f"    ... and {count - _WARNINGS_SHOWN:,} more")
        return made


def check(path: str, split: str | None = None, options: CheckOptions | None = None) -> Report:
    """Check data: all splits, or one.

    Memory is constant but for 24 bytes a picture.

    Args:
        path: see `reading.open_source`.
        split: only this one.
        options: how; the defaults are those of training.

    Raises:
        DataError: there is nothing that can be read.
    """
    options = options or CheckOptions()
    report = Report(path)
    contents: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    names = splits(path) if split is None else [split]
    for name in names:
        try:
            source = open_source(path, name, options.form, options.columns)
        except DataError as error:
            if len(names) == 1:
                raise
            report.errors.add(Problem("source", path, str(error)))
            continue
        checker = _SplitChecker(source, options, report)
        checker.run()
        for other, (hashes, lines) in contents.items():
            _common(checker, other, hashes, lines, report)
        contents[name or ""] = np.frombuffer(checker.contents, np.uint64), np.array(checker.names.lines)
        report.ignored.update(source.ignored)
    return report


class _SplitChecker:
    """Goes through one split."""

    def __init__(self, source: Source, options: CheckOptions, report: Report):
        self.source, self.options, self.report = source, options, report
        self.names, self.positions, self.contents = Names(), array("Q"), array("Q")
        self.named = array("Q")  # hashes of the files that rows name beside their pictures
        self.spellings: dict[str, str] = {}

    def run(self) -> None:
        for position, record in self.source.scan(self.report.errors):
            self.names.add(record.name, record.line)
            self.positions.append(position)
            self.contents.append(0)
            self.report.counts["pictures"] += 1
            self._picture(record)
            self._items(record)
            if record.control is not None:
                self._names(own_file(record.control))
        add_repeated(self.source, self.positions, self.names, self.report.errors)
        self.report.phrases += len(self.spellings)
        if isinstance(self.source, Shards) and self.options.decode:
            self.source.check_sums(self.report.errors)
        if isinstance(self.source, MetadataFolder):
            self._without_row(self.source.folder)

    def _warn(
        self, kind: str, record: ImageRecord, text: str, item: str | None = None, field: str | None = None
    ):
        self.report.warnings.add(Problem(kind, self.source.name, text, record.line, item, field))

    def _picture(self, record: ImageRecord) -> None:
        try:
            if self.options.decode:
                data = record.stored.read()
                info = picture_info(data)
                open_picture(data)
                self.contents[-1] = int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
            else:
                info = record.info()
            record.check_control(info)
            if record.control is not None:
                self.report.counts["control images"] += 1
                if self.options.decode:
                    record.open_control()
            if self.options.decode:
                for item in record.items:
                    if isinstance(item, Subject):
                        foreground(item)
        except (DataError, SceneError, OSError) as error:
            file = str(record.path or record.name)
            self.report.errors.add(Problem("picture", file, str(error), record.line, of_picture=True))
            return
        for note in info.notes:
            self._warn(note, record, f"{shown(record.name)} is converted when it is read: {note}")
        if info.orientation != 1:
            turned = f"EXIF orientation {info.orientation}"
            text = f"{shown(record.name)} is shown turned ({turned}), and so are its boxes"
            self._warn("orientation", record, text)
        shorter, longer = sorted((info.width, info.height))
        if shorter < _SMALL * self.options.framing.resolution:
            size = self.options.framing.resolution
            self._warn(
                "small picture", record, f"{info.width} x {info.height} pixels for a training size of {size}"
            )
        if longer > _WIDE * shorter:
            self._warn("long picture", record, f"{info.width} x {info.height} pixels: much is cut off")
        self._boxes(record, info)

    def _boxes(self, record: ImageRecord, info: PictureInfo) -> None:
        framing = self.options.framing
        placement = framing.place(info.width, info.height, record.items)
        height, width = placement.size
        for item, name in _numbered(record):
            for field_name in box_fields(type(item)):
                if (box := getattr(item, field_name)) is None:
                    continue
                x0, y0, x1, y1 = placement.box(box)
                pixels = (x1 - x0) * width, (y1 - y0) * height
                if area(box) < framing.min_box:
                    text = f"{area(box):.2%} of the picture, training leaves it out"
                    self._warn("small box", record, text, name, field_name)
                elif min(pixels) < 2 * LATENT:
                    text = f"{pixels[0]:.1f} x {pixels[1]:.1f} pixels in training, under 2 latents a side"
                    self._warn("small box", record, text, name, field_name)

    def _items(self, record: ImageRecord) -> None:
        options, counts = self.options, self.report.counts
        if len(record.items) > options.slots:
            text = f"{len(record.items)} items for {options.slots} slots, the largest are kept"
            self._warn("slots", record, text)
        for item, name in _numbered(record):
            kind = name.rpartition(" ")[0]
            plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
            counts[plural] += 1
            for field_name, phrase in phrases_of_item(item):
                self._phrase(record, name, field_name, phrase)
            for one in PICTURES:
                self._names(getattr(getattr(item, one, None), "path", None))
        said = " ".join(record.prompts).lower()
        for number, one in enumerate(record.interactions, start=1):
            for role in ("subject", "object"):
                if said and not _is_named(getattr(one, role), said):
                    text = f"{shown(getattr(one, role))} is not in the caption"
                    self._warn("caption", record, text, f"interaction {number}", role)
        if options.flip and record.may_flip:
            phrases = [phrase for item in record.items for _, phrase in phrases_of_item(item)]
            if any(map(names_side, (*record.prompts, *phrases))):
                self._warn("side", record, "left or right in a text: swapped where the picture is mirrored")

    def _names(self, path: str | Path | None) -> None:
        """Take a file that a row names beside its picture."""
        if path is not None and isinstance(self.source, MetadataFolder):
            self.named.append(Names.hash(Path(os.path.relpath(path, self.source.folder)).as_posix()))

    def _phrase(self, record: ImageRecord, item: str, field_name: str, phrase: str) -> None:
        options = self.options
        tokens = options.tokens(phrase) if options.tokens else len(phrase.split()) + 2
        if tokens > options.max_tokens:
            text = (
                f"expected a phrase of at most {options.max_tokens} tokens, got {tokens} in {shown(phrase)}"
            )
            problem = Problem("tokens", self.source.name, text, record.line, item, field_name)
            self.report.errors.add(problem)
        folded = phrase.casefold()
        if folded in self.spellings or len(self.spellings) < _MAX_PHRASES:
            first = self.spellings.setdefault(folded, phrase)
            if first != phrase:
                self._warn(
                    "case",
                    record,
                    f"{shown(phrase)} and {shown(first)} differ in case only",
                    item,
                    field_name,
                )

    def _without_row(self, folder: Path) -> None:
        there = sum(1 for _ in picture_names(folder))
        hashes = {*self.names.hashes, *self.named}
        if there > len(hashes):
            for name in picture_names(folder):
                if Names.hash(name) not in hashes:
                    text = f"{shown(name)} has no row, training does not see it"
                    self.report.warnings.add(Problem("without a row", self.source.name, text))


def _numbered(record: ImageRecord) -> Iterator[tuple[Any, str]]:
    """Items with their names in messages, "interaction 2"."""
    numbers: Counter[str] = Counter()
    for item in record.items:
        kind = type(item).__name__.lower()
        numbers[kind] += 1
        yield item, f"{kind} {numbers[kind]}"


def _is_named(phrase: str, said: str) -> bool:
    """Whether a caption has a phrase, or the noun that it is about ("person" of "person in blue")."""
    head = re.split(r"\b(?:in|with|of|on|at|from)\b", phrase.lower())[0].split()
    return phrase.lower() in said or bool(head and head[-1] in said)


def _common(
    checker: _SplitChecker, other: str, hashes: np.ndarray, lines: np.ndarray, report: Report
) -> None:
    """Report the pictures of a split that are in another one too, by their contents."""
    own = np.frombuffer(checker.contents, np.uint64)
    _, here, there = np.intersect1d(own, hashes, return_indices=True)
    for first, second in zip(here.tolist(), there.tolist(), strict=True):
        if own[first]:
            line = checker.names.lines[first]
            name = checker.source.record(checker.positions[first], line).name
            where = f"{other}, line {lines[second]}"
            text = f"expected splits without a common picture, got {shown(name)} as in {where}"
            report.errors.add(Problem("split", checker.source.name, text, line, field="file_name"))
