"""Attention maps of chosen layers, of queries and keys that a denoiser computes anyway (spec of the maps:
AttenCraft, arXiv 2405.17965, section 3.2), in memory that grows with the number of tokens and not its square.

A column of a softmax over keys is what attention gathers of a value that is 1 at that key and 0 at all
others; a matrix of attention times a map is what it gathers of the map. So both are calls of scaled dot
product attention with narrow values.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from interactdiff.adapter import SiteInputs
from interactdiff.calls import Call
from interactdiff.errors import AdapterError
from interactdiff.families import Grid
from interactdiff.sites import Denoiser, Site, find_sites

MOST_LAYERS = 6  # of a transformer: each keeps its queries' gradients until they are needed
CROSS_LEVEL, SELF_LEVEL = 2, 1  # how often a U-Net has halved its latents' grid, as published: 1/4 and 1/2


def observed_sites(sites: Iterable[Site]) -> list[Site]:
    """Where attention can be captured: of a U-Net to text and of the image, of a transformer over both."""
    return [site for site in sites if site.role != "block"]


@dataclass(frozen=True)
class Layers:
    """Which attentions are captured.

    Attributes:
        cross: of image tokens to the text, by path.
        own: of image tokens to each other, by path. In a transformer they are the same ones.
    """

    cross: tuple[str, ...]
    own: tuple[str, ...]

    @classmethod
    def of(cls, denoiser: Denoiser, blocks: Sequence[int] | None = None) -> "Layers":
        """As published: of a U-Net those at a quarter and at half of the latents' side, or the nearest.

        Of transformer blocks in a row it takes the middle one.

        Args:
            denoiser: a U-Net or a transformer.
            blocks: of a transformer, which of its attentions over text and image, from 0; None for all, or
                for evenly spaced ones where there are more than `MOST_LAYERS`.

        Raises:
            AdapterError: there is no such block, or no attention of these kinds.
        """
        sites = find_sites(denoiser)
        joint = [site.path for site in sites if site.role in ("joint", "single")]
        if joint:
            if blocks is not None and not all(0 <= block < len(joint) for block in blocks):
                raise AdapterError(f"expected blocks of 0 to {len(joint) - 1}, got {list(blocks)}")
            if blocks is None:
                count = min(len(joint), MOST_LAYERS)
                blocks = [(2 * n + 1) * len(joint) // (2 * count) for n in range(count)]
            chosen = tuple(joint[block] for block in blocks)
            return cls(chosen, chosen)
        cross = _at_level([site for site in sites if site.role == "cross"], CROSS_LEVEL)
        own = _at_level([site for site in sites if site.role == "self"], SELF_LEVEL)
        if not cross or not own:
            raise AdapterError("expected a denoiser with attention to text and of the image, got one without")
        return cls(cross, own)


def _at_level(sites: Sequence[Site], level: int) -> tuple[str, ...]:
    levels = {site.level for site in sites}
    nearest = min(levels, key=lambda one: (abs(one - level), -one), default=level)
    stacks: dict[str, list[str]] = {}
    for site in sites:
        if site.level == nearest:
            stacks.setdefault(site.path.partition(".transformer_blocks.")[0], []).append(site.path)
    return tuple(paths[len(paths) // 2] for paths in stacks.values())  # SDXL has ten blocks in a row


class AttentionCapture:
    """Keeps queries and keys of one denoiser call, and makes maps of them.

    Args:
        denoiser: the U-Net or transformer.
        layers: which attentions; None for `Layers.of(denoiser)`.
        own: whether attention of the image to itself is kept too, which only masks need.
    """

    def __init__(self, denoiser: Denoiser, layers: Layers | None = None, own: bool = True):
        layers = Layers.of(denoiser) if layers is None else layers
        sites = {site.path: site for site in find_sites(denoiser)}
        self._cross = [sites[path] for path in layers.cross]
        self._own = [sites[path] for path in layers.own] if own else []
        self._wanted = {site.path for site in (*self._cross, *self._own)}
        self._taken: dict[str, SiteInputs] = {}
        self._grid: Grid = (1, 1)
        self._text_length = 0

    def begin(self, call: Call) -> None:
        """Forget the last call; the next one has its grid and text."""
        self.begin_grid(call.grid, call.text_length)

    def begin_grid(self, grid: Grid, text_length: int) -> None:
        """As `begin`, of a call with this grid and so many text tokens."""
        self._taken.clear()
        self._grid, self._text_length = grid, text_length

    def take(self, site: Site, inputs: SiteInputs) -> None:
        """Keep what a site's `Observer` sees. What a recomputation for gradients brings again is left."""
        if site.path in self._wanted and site.path not in self._taken:
            self._taken[site.path] = inputs

    @property
    def text_length(self) -> int:
        """Rows of the text in the last call."""
        return self._text_length

    @property
    def has_own(self) -> bool:
        """Whether there are layers of the image's attention to itself."""
        return bool(self._own)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the finest maps."""
        sites = self._own or self._cross
        return sites[0].grid(*self._grid)

    def columns(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """How much the image attends to some rows of the text, means over heads and layers.

        Args:
            rows: for each map the rows of the text whose columns are averaged.

        Returns:
            [B, len(rows), h, w] float32, on the grid of the layers of attention to text; with gradients.
        """
        total: Any = 0
        for site in self._cross:
            queries, keys, text = self._queries_and_keys(site)
            values = queries.new_zeros(keys.shape[2], len(rows), dtype=torch.float32)
            for number, own in enumerate(rows):
                values[[text + row for row in own], number] = 1 / len(own)
            values = values.expand(len(queries), -1, -1)
            total = total + checkpoint(
                gathered, queries, keys, values, use_reentrant=False
            )  # keeps no output
        height, width = self._cross[0].grid(*self._grid)
        return (total / len(self._cross)).transpose(1, 2).unflatten(2, (height, width))

    @torch.no_grad()
    def spread(self, maps: Tensor, renormalised: bool = True) -> Tensor:
        """The attention of the image to itself, times maps: S x, S the mean over heads and layers.

        Args:
            maps: [B, K, h, w] float32 on `grid`, or [1, K, h, w] for all rows.
            renormalised: in a transformer, whether the rows of S have sum 1 over the image's keys, of each
                head and layer; else what goes to the text is missing from them.
        """
        own, total = maps.flatten(2).transpose(1, 2), torch.zeros(())
        for site in self._own:
            queries, keys, text = self._queries_and_keys(site)
            values = own.expand(len(queries), -1, -1)
            if site.role in ("joint", "single"):
                first = self._text_length if text == 0 else 0
                after = keys.shape[2] - first - queries.shape[2]
                if renormalised:
                    keys = keys[:, :, first : first + queries.shape[2]]
                else:
                    values = F.pad(values, (0, 0, first, after))
            total = total + gathered(queries, keys, values)
        return (total / len(self._own)).transpose(1, 2).unflatten(2, maps.shape[2:])

    def probabilities(self, path: str) -> Tensor:
        """[B, heads, queries, keys] of a layer, all at once: the slow oracle, for tests and small grids."""
        site = next(site for site in (*self._cross, *self._own) if site.path == path)
        queries, keys, _ = self._queries_and_keys(site)
        scores = queries.float() @ keys.float().mT * queries.shape[-1] ** -0.5
        return scores.softmax(-1)

    def _queries_and_keys(self, site: Site) -> tuple[Tensor, Tensor, int]:
        """[B, heads, L, D] of the image and [B, heads, M, D] of all keys; and where the text begins."""
        if site.path not in self._taken:
            raise AdapterError(
                f"expected {site.path} to show its queries and keys, got none from "
                f"{type(site.module.processor).__name__}"
            )
        seen = self._taken[site.path]
        queries, keys = seen.queries, seen.keys
        assert queries is not None
        assert keys is not None
        if seen.text_keys is not None:
            parts = [seen.text_keys, keys] if site.text == "first" else [keys, seen.text_keys]
            keys = torch.cat(parts, 2)
        text = keys.shape[2] - self._text_length if site.text == "last" else 0
        if seen.rotary is not None:
            tables = seen.rotary
            first = self._text_length if site.text == "first" else 0
            own = tuple(table[first : first + queries.shape[2]] for table in tables)
            queries, keys = _rotated(queries, own), _rotated(keys, tables)
        return queries, keys, text


def gathered(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The mean over heads of what attention gathers of a few values.

    Args:
        queries: [B, heads, L, D].
        keys: [B, heads, M, D].
        values: [B, M, K], the same for all heads.

    Returns:
        [B, L, K] float32. Values are padded to the width of a head, since fast kernels want that.
    """
    heads, width = queries.shape[1], queries.shape[3]
    parts = []
    for some in values.float().split(width, 2):
        padded = F.pad(some, (0, width - some.shape[2]))[:, None].expand(-1, heads, -1, -1)
        with torch.autocast(queries.device.type, enabled=False):
            out = F.scaled_dot_product_attention(queries.float(), keys.float(), padded)
        parts.append(out.mean(1)[..., : some.shape[2]])
    return torch.cat(parts, 2)


def _rotated(states: Tensor, tables: Any) -> Tensor:
    """Flux's rotary positions of [B, heads, L, D]."""
    return apply_rotary_emb(states, tables, sequence_dim=2)  # type: ignore[return-value]
