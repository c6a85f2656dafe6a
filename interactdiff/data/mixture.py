"""Several data sets as one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from interactdiff.data.examples import Latents
from interactdiff.data.reading import Records
from interactdiff.data.records import ImageRecord


class Mixture(Sequence[ImageRecord]):
    """The records of several data sets, one after the other.

    Args:
        parts: the data sets.
        repeats: how often each one's pictures come in an epoch, times the weights of its rows.

    Attributes:
        parts: the data sets.
        widths: [N], heights: [N], weights: [N], controls: [N], shards: [N], as those of `Records`.
    """

    def __init__(self, parts: Sequence[Records], repeats: Sequence[int]):
        self.parts = list(parts)
        self.starts = [0, *accumulate(map(len, parts))]
        self.widths = np.concatenate([part.widths for part in parts])
        self.heights = np.concatenate([part.heights for part in parts])
        self.controls = np.concatenate([part.controls for part in parts])
        weights = [part.weights.astype(np.int64) * by for part, by in zip(parts, repeats, strict=True)]
        self.weights = np.concatenate(weights)
        shards, first = [], 0
        for part in parts:
            of = part.shards.astype(np.int64) + first
            shards.append(of)
            first = int(of.max()) + 1
        self.shards = np.concatenate(shards)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> ImageRecord:  # type: ignore[override]
        """The record of a number from 0."""
        part, within = self.place(number)
        return self.parts[part][within]

    def place(self, number: int) -> tuple[int, int]:
        """Which data set a record is in, and its number there.

        Raises:
            IndexError: there is no such record.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = bisect_right(self.starts, number) - 1
        return part, number - self.starts[part]


class MixedLatents:
    """The latents of a `Mixture`, from a cache for each of its parts."""

    def __init__(self, mixture: Mixture, caches: Sequence[Latents]):
        self.mixture, self.caches = mixture, caches

    def get(self, index: int, flipped: bool) -> Tensor:
        """The latents [C, h, w] of a record.

        Raises:
            DataError: there are none, since the picture could not be read.
        """
        part, within = self.mixture.place(index)
        return self.caches[part].get(within, flipped)
