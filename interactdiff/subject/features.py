"""What a reference's tokens are at each site and time: keys and values of its foreground, kept within limits.

They depend on the reference, its noise, the time, its prompt and the weights, and on nothing of the picture
that is drawn: all pictures of a batch, all seeds and prompts share them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.families import Grid
from interactdiff.scene_checks import Box
from interactdiff.subject.items import Subject
from interactdiff.subject.passes import Texts

LEAST_SHARE = 0.05
"""Least share of a token's area that the subject covers; the share is a factor of the token's weight."""
STRAY = 0.005
"""Share of a foreground's area that its extent leaves out on each side."""
Features = dict[str, tuple[Tensor, Tensor]]
"""By the path of a site, keys and values [1, heads, K, D] of the foreground's tokens."""


@dataclass(eq=False)
class Reference:
    """A picture of a subject, ready to be run through the denoiser.

    Attributes:
        subject: what it is of.
        latents: r, [1, C, h, w] in float32.
        noise: of each time that is not fresh, likewise.
        grid: rows and columns of the denoiser's tokens, or of a U-Net's latents.
        mask: m_r at the size of the picture, [1, 1, H, W] in [0, 1].
        text: the features of its prompt.
        how: what its foreground was found by, in words.
        tokens: SE(r), [1, M, width]; None without an encoder.
    """

    subject: Subject
    latents: Tensor
    noise: Tensor
    grid: Grid
    mask: Tensor
    text: Texts
    how: str
    tokens: Tensor | None = None
    _keys: dict[Grid, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def foreground(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """[K] which tokens of a grid are kept, and [K] the share of each that is the subject's."""
        if grid not in self._keys:
            shares = F.adaptive_avg_pool2d(self.mask, grid).flatten()
            kept = (shares > min(LEAST_SHARE, float(shares.max()) / 2)).nonzero()[:, 0]
            self._keys[grid] = kept, shares[kept]
        return self._keys[grid]

    @cached_property
    def extent(self) -> Box:
        """xyxy of the foreground in [0, 1], but for its outermost pixels, which may be stray ones."""
        ends = []
        for along in (0, 1):  # x, y
            share = self.mask[0, 0].sum(along).cumsum(0)
            share = share / share[-1]
            first, last = ((share > cut).nonzero()[0] for cut in (STRAY, 1 - STRAY))
            ends.append((float(first) / len(share), float(last + 1) / len(share)))
        (x0, x1), (y0, y1) = ends
        return x0, y0, x1, y1

    def same_text(self, text: Texts) -> bool:
        """Whether its prompt has these features."""
        return text.keys() == self.text.keys() and all(self.text[n].equal(t) for n, t in text.items())


class FeatureCache:
    """Features by what they depend on, within a limit of memory.

    Features of runs that the scene does not use are evicted, oldest first. Where that is not enough, further
    ones are not kept: they are computed when they are needed.

    Args:
        limit: bytes.
        device: where they are kept; None leaves them where the denoiser runs.
    """

    def __init__(self, limit: float, device: torch.device | None = None):
        self.limit, self.device = limit, device
        self.size = 0
        self._kept: OrderedDict[Hashable, dict[Hashable, Features]] = OrderedDict()
        self._used: set[Hashable] = set()

    def begin(self) -> None:
        """A run of the pipeline begins: what earlier ones used may be evicted."""
        self._used.clear()

    def get(self, run: Hashable, time: Hashable) -> Features | None:
        """Those of a run's time, if they are kept.

        Args:
            run: all that they depend on but the time.
            time: the timestep and the noise's.
        """
        self._used.add(run)
        times = self._kept.get(run)
        if times is None:
            return None
        self._kept.move_to_end(run)
        return times.get(time)

    def available_bytes(self, run: Hashable) -> float:
        """Bytes that there are for a run, beside the others that are used."""
        used = self._used | {run}
        return self.limit - sum(size_of(one) for each in used for one in self._kept.get(each, {}).values())

    def put(self, run: Hashable, time: Hashable, features: Features) -> None:
        """Keep features, within the limit."""
        size = size_of(features)
        if size > self.available_bytes(run) or time in self._kept.get(run, {}):
            return
        times = self._kept.setdefault(run, {})
        self._kept.move_to_end(run)
        while self.size + size > self.limit:
            unused = next(one for one in self._kept if one not in self._used and one != run)
            self.size -= sum(map(size_of, self._kept.pop(unused).values()))
        times[time] = moved(features, self.device)
        self.size += size

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._used.clear()
        self.size = 0


def moved(features: Features, device: torch.device | None) -> Features:
    """The same elsewhere; None is where they are."""
    if device is None:
        return features
    return {path: (k.to(device), v.to(device)) for path, (k, v) in features.items()}


def size_of(features: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """In bytes."""
    return sum(t.numel() * t.element_size() for both in features.values() for t in both)
