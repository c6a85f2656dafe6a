"""The protocols by which mAP of human-object interactions is computed, as published evaluators have them.

They differ in how a box's area is counted, which truth a detection takes, where precision is read and what a
class without truth counts. None of that is in the papers; docs/evaluation.md has the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from interactdiff.errors import InteractdiffError

Overlap = Literal["inclusive", "inclusive, touching is 0", "inclusive, touching is 0, padded", "plain"]
Match = Literal["best", "first free", "best free"]
Empty = Literal["zero", "left out", "zero if undetected"]

LEAST_IOU = 0.5
PADDING = 1e-6  # added to the union by FGAHOI's evaluator
# numpy.arange(0, 1.1, 0.1): a recall of exactly 3/10, 3/5 (6/10) or 7/10 misses its point.
ARANGE = (0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6000000000000001, 0.7000000000000001, 0.8, 0.9, 1.0)
# MATLAB's 0:0.1:1 and torch.linspace in float64: only 3/10 misses its point.
LINSPACE = (0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class ScoreError(InteractdiffError):
    """A score that cannot be computed from what is given."""


@dataclass(frozen=True)
class Protocol:
    """How mAP is computed.

    Attributes:
        name: as the command line has it.
        source: whose evaluator it is.
        overlap: how intersection over union is counted. "inclusive" boxes end with their last pixel, so that
            each side is a pixel longer; "touching is 0": no overlap where the plain width or height of the
            intersection is 0 or less; "padded": `PADDING` is added to the union.
        strict: whether the smaller IoU of both boxes has to be above 0.5, or may be 0.5.
        match: which truth a detection takes: the best of all, wrong if that is taken already; the first that
            is free, in the truth's order; or the best that is free.
        points: recalls at which precision is read; "tenths" compares whole numbers of hits; None is the area
            below the curve.
        empty: the average precision of a class without truth: 0, left out of the mean, or left out unless
            nothing of it is detected either.
        most: detections of a picture that count, the surest; None is all.
        suppress: whether a pair is dropped that a surer one of its class overlaps, see `suppressed`.
    """

    name: str
    source: str
    overlap: Overlap
    strict: bool
    match: Match
    points: tuple[float, ...] | Literal["tenths"] | None
    empty: Empty
    most: int | None = None
    suppress: bool = False


PROTOCOLS = {
    one.name: one
    for one in (
        Protocol("exact", "ours, in whole numbers", "inclusive", False, "best", "tenths", "zero"),
        Protocol(
            "fgahoi",
            "FGAHOI, QAHOI, GGNet",
            "inclusive, touching is 0, padded",
            True,
            "first free",
            ARANGE,
            "zero if undetected",
            most=100,
            suppress=True,
        ),
        Protocol("pvic", "UPT, PViC", "plain", True, "best", LINSPACE, "zero"),
        Protocol(
            "qpic", "PPDM, QPIC", "inclusive, touching is 0", False, "best", ARANGE, "left out", most=100
        ),
        Protocol("official", "ho-rcnn (HICO-DET)", "inclusive", False, "best", LINSPACE, "zero"),
        Protocol("world", "ours, area below the curve", "plain", True, "best free", None, "left out"),
    )
}
DEFAULT_PROTOCOLS = ("exact", "fgahoi", "pvic", "qpic", "official")


def chosen_protocols(names: Sequence[str]) -> tuple[Protocol, ...]:
    """Protocols by their names, each once.

    Raises:
        ScoreError: there is none of a name.
    """
    for name in names:
        if name not in PROTOCOLS:
            raise ScoreError(f"--protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    return tuple(PROTOCOLS[name] for name in dict.fromkeys(names))
