"""Intervals of scores: one resampling of pictures gives those of all, and of differences between two runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LEVEL = (0.025, 0.975)  # of intervals


class Score(Protocol):
    """A score over pictures, of which any may count several times or not at all."""

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R] values for [R, S] counts of how often each picture is taken."""
        ...


@dataclass(frozen=True)
class Share:
    """Hits out of a total; both [S], by picture."""

    hits: np.ndarray
    total: np.ndarray

    def value(self, counts: np.ndarray) -> np.ndarray:
        """[R]: the share of hits; 0 where the total is 0."""
        return (counts @ self.hits) / np.maximum(counts @ self.total, 1)


class Scores(Protocol):
    """Named scores over pictures, of which any may count several times or not at all."""

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[R] values of each for [R, S] counts of how often each picture is taken."""
        ...


@dataclass(frozen=True)
class NamedScores:
    """Single scores as `Scores`."""

    scores: Mapping[str, Score]

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[R] values of each for [R, S] counts."""
        return {name: score.value(counts) for name, score in self.scores.items()}


def all_values(groups: Sequence[Scores], counts: np.ndarray) -> dict[str, np.ndarray]:
    """[R] values of the scores of several groups."""
    return {name: value for group in groups for name, value in group.values(counts).items()}


def resampled(pictures: int, resamples: int, seed: int = 0) -> np.ndarray:
    """[R, S]: how often each of S pictures is drawn, S times with replacement; R times."""
    if not pictures:
        return np.zeros((resamples, 0))
    shares = np.full(pictures, 1 / pictures)
    return np.random.default_rng(seed).multinomial(pictures, shares, resamples)


def intervals(groups: Sequence[Scores], counts: np.ndarray) -> dict[str, list[float]]:
    """95% intervals of scores: quantiles over the resamplings."""
    return {
        name: [float(end) for end in np.quantile(value, LEVEL)]
        for name, value in all_values(groups, counts).items()
    }


def with_interval(
    score: Score, pictures: int, seed: int = 0, resamples: int = 1000
) -> tuple[float, tuple[float, float]]:
    """A score and its 95% interval.

    Args:
        score: what to value.
        pictures: S, how many it is over.
        seed: of the resampling.
        resamples: how often.
    """
    groups = [NamedScores({"": score})]
    low, high = intervals(groups, resampled(pictures, resamples, seed))[""]
    return once(groups, pictures)[""], (low, high)


def once(groups: Sequence[Scores], pictures: int) -> dict[str, float]:
    """The scores themselves: each picture counts once."""
    return {name: float(value[0]) for name, value in all_values(groups, np.ones((1, pictures))).items()}


@dataclass(frozen=True)
class Difference:
    """How far a score of one run is from that of another.

    Attributes:
        value: the second's minus the first's.
        interval: its 95% interval, over pictures that are drawn again for both alike.
    """

    value: float
    interval: tuple[float, float]

    @property
    def larger_than_chance(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


def differences(
    first: Sequence[Scores], second: Sequence[Scores], pictures: int, counts: np.ndarray
) -> dict[str, Difference]:
    """Differences of the scores that both have, over the same pictures in one order: a paired bootstrap."""
    before, after = once(first, pictures), once(second, pictures)
    spread = all_values(first, counts), all_values(second, counts)
    found = {}
    for name in before:
        if name in after:
            low, high = np.quantile(spread[1][name] - spread[0][name], LEVEL)
            found[name] = Difference(after[name] - before[name], (float(low), float(high)))
    return found
