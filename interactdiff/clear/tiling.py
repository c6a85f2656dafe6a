"""Tiles of queries, the rectangles of keys that they see, and how both lie in memory.

Keys are laid out as overlapping strips of columns; within a strip the rectangles of successive tiles are
overlapping views, so that nothing is copied for each tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from interactdiff.clear.pattern import Pattern

EDGE_TILES = 4  # rows of tiles at an edge in one run: fewer see less in vain, more make fewer calls


@dataclass(frozen=True)
class Run:
    """Tiles side by side along an axis that are computed in one go.

    Attributes:
        first: number of the first tile.
        count: how many.
        start: the first tile's first query; the next tile's is `size` further.
        size: queries of a tile.
        key_start: the first tile's first key.
        keys: keys of a tile.
        step: how much further the next tile's keys begin: `size`, or 0 at an edge, where all see the same.
        again: queries of a tile that the tile before has already.
    """

    first: int
    count: int
    start: int
    size: int
    key_start: int
    keys: int
    step: int
    again: int

    def offsets(self) -> Tensor:
        """From queries to keys [tiles, size, keys]; one tile stands for all whose keys move with them."""
        tiles = self.count if self.step == 0 else 1
        queries = self.start + self.size * torch.arange(tiles)[:, None] + torch.arange(self.size)
        return self.key_start + torch.arange(self.keys) - queries[:, :, None]


def tile_shape(window: int) -> tuple[int, int]:
    """Rows and columns of a tile: few keys beyond the window, few copies in strips, enough queries."""
    return (4, 8) if window <= 8 else (2, 16)


class Tiling:
    """How sheets of tokens [N, H, W, ...] of one size are tiled, with what is of use to one after the other.

    Args:
        height: H.
        width: W.
        pattern: whose windows.
        like: a tensor whose dtype and device biases have.
    """

    def __init__(self, height: int, width: int, pattern: Pattern, like: Tensor):
        rows, columns = tile_shape(pattern.window)
        self.rows = _row_runs(height, min(rows, height), pattern.reach)
        self.columns = _column_runs(width, min(columns, width), pattern.reach)
        self.pattern, self.like = pattern, like
        self._biases: dict[tuple[Run, int], Tensor] = {}
        self._memory: dict[tuple[str, torch.Size], Tensor] = {}

    def groups(self, strip: float, limit: float) -> Iterator[list[Run]]:
        """All columns in groups, numbered within each, whose strips of so many bytes fit `limit` together."""
        most = max(int(limit // strip), 1)
        group: list[Run] = []
        for run in (part for whole in self.columns for part in split(whole, most)):
            held = sum(other.count for other in group)
            if held + run.count > most:
                yield group
                group, held = [], 0
            group.append(replace(run, first=held))
        yield group

    def bias(self, rows: Run, columns: Run) -> Tensor:
        """0 where a tile's query attends to a key of its rectangle, -inf elsewhere: [1, tiles or 1, Q, K]."""
        kind = (rows, columns.key_start - columns.start)
        if kind not in self._biases:
            dy, dx = rows.offsets().float(), columns.offsets().float()[0]
            near = self.pattern.within(dy[:, :, None, :, None], dx[:, None, :])
            bias = torch.zeros(near.shape).masked_fill_(~near, -torch.inf).flatten(3).flatten(1, 2)[None]
            self._biases[kind] = bias.to(self.like)
        return self._biases[kind]

    def query_strips(self, name: str, sheet: Tensor, group: list[Run]) -> Tensor:
        """Columns of a sheet by tiles: [S, N, H, columns, ...]."""
        return self._strips(name, sheet, [run.start for run in group], group, group[0].size)

    def key_strips(self, name: str, sheet: Tensor, group: list[Run]) -> Tensor:
        """Columns of a sheet by what tiles see, overlapping: [S, N, H, columns, ...]."""
        return self._strips(name, sheet, [run.key_start for run in group], group, group[0].keys)

    def _strips(self, name: str, sheet: Tensor, firsts: list[int], group: list[Run], size: int) -> Tensor:
        """A copy, where one of that name and shape was: fresh memory costs as much time as the copy."""
        starts = _starts(firsts, group)
        shape = torch.Size((len(starts), *sheet.shape[:2], size, *sheet.shape[3:]))
        if (name, shape) not in self._memory:
            self._memory[name, shape] = sheet.new_empty(shape)
        strips = self._memory[name, shape]
        for strip, start in zip(strips, starts, strict=True):
            strip.copy_(sheet[:, :, start : start + size])
        return strips


def _starts(firsts: list[int], group: list[Run]) -> list[int]:
    return [first + i * run.size for run, first in zip(group, firsts, strict=True) for i in range(run.count)]


def add_key_strips(sheet: Tensor, strips: Tensor, group: list[Run]) -> None:
    """Add strips to the sheet [N, H, W, D] where they overlap in it."""
    for strip, start in zip(strips, _starts([run.key_start for run in group], group), strict=True):
        sheet[:, :, start : start + strip.shape[2]] += strip


def queries(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles of query strips [S * N, tiles, Q, ...]; a view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    own = own[:, rows.start : rows.start + rows.count * rows.size]
    return own.unflatten(1, (rows.count, rows.size)).flatten(2, 3)


def rectangles(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Rectangles of key strips [S * N, tiles, K, D]; an overlapping view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    if rows.step == 0:
        own = own[:, rows.key_start : rows.key_start + rows.keys].flatten(1, 2)
        return own[:, None].expand(-1, rows.count, -1, -1)
    own = own[:, rows.key_start : rows.key_start + rows.keys + (rows.count - 1) * rows.step]
    return own.unfold(1, rows.keys, rows.step).permute(0, 1, 4, 2, 3).flatten(2, 3)


def place(sheet: Tensor, rows: Run, columns: Run) -> Tensor:
    """Where tiles belong in [N, H, W, ...]: [S, N, tiles, new rows, new columns, ...]; a view."""
    start = columns.start + columns.again
    end = columns.start + columns.count * columns.size
    own = sheet[:, rows.start + rows.again : rows.start + rows.count * rows.size, start:end]
    own = own.unflatten(2, (columns.count, -1)).unflatten(1, (rows.count, -1))
    return own.movedim(3, 0)


def placed(tiles: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles [S * N, tiles, Q, ...] in the shape of `place`; a view."""
    tiles = tiles.unflatten(2, (rows.size, columns.size)).unflatten(0, (columns.count, -1))
    return tiles[:, :, :, rows.again :, columns.again :]


def split(columns: Run, most: int) -> Iterator[Run]:
    """A run in runs of at most so many strips."""
    for i in range(0, columns.count, most):
        yield replace(
            columns,
            first=columns.first + i,
            count=min(most, columns.count - i),
            start=columns.start + i * columns.size,
            key_start=columns.key_start + i * columns.step,
        )


def add_rectangles(strips: Tensor, parts: Tensor, rows: Run, columns: Run) -> None:
    """Add gradients of rectangles [S * N, tiles, K, D], which overlap, to their strips.

    The same `rows.step` rows of every tile's rectangle do not overlap: they are added at once.
    """
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    parts = parts.unflatten(2, (rows.keys, columns.keys))
    if rows.step == 0:
        own[:, rows.key_start : rows.key_start + rows.keys] += parts.sum(1, dtype=own.dtype)
        return
    for row in range(0, rows.keys, rows.size):
        size = min(rows.size, rows.keys - row)
        start = rows.key_start + row
        target = own[:, start : start + size + (rows.count - 1) * rows.size].unfold(1, size, rows.size)
        target.permute(0, 1, 4, 2, 3).add_(parts[:, :, row : row + size])


def _row_runs(height: int, size: int, reach: int) -> list[Run]:
    """Tiles from the top down, alike in one run; some at an edge in one, with what any of them attends to.

    The last moves inwards to end with the grid, over queries of the one before.

    Args:
        height: of the grid.
        size: of a tile, at most `height`.
        reach: of the window.
    """
    starts = [min(first, height - size) for first in range(0, height, size)]
    again = len(starts) * size - height

    def kind(number: int) -> tuple[int, int]:
        inside = reach <= starts[number] <= height - size - reach
        return again if number == len(starts) - 1 else 0, -1 if inside else number // EDGE_TILES

    runs = []
    for (repeated, edge), numbers in groupby(range(len(starts)), kind):
        first, *others = numbers
        count, start, step = 1 + len(others), starts[first], size if edge < 0 else 0
        low, high = max(start - reach, 0), min(start + size + reach, height)
        if step == 0:
            high = min(starts[first + count - 1] + size + reach, height)
        runs.append(Run(first, count, start, size, low, high - low, step, repeated))
    return runs


def _column_runs(width: int, size: int, reach: int) -> list[Run]:
    """Tiles from left to right, those inside in one run; at an edge keys move inwards: all have as many.

    Args:
        width: of the grid.
        size: of a tile, at most `width`.
        reach: of the window.
    """
    keys = min(size + 2 * reach, width)
    inside, edges = [], []
    for number, first in enumerate(range(0, width, size)):
        start = min(first, width - size)
        low = min(max(start - reach, 0), width - keys)
        tile = Run(number, 1, start, size, low, keys, 0, first - start)
        alone = tile.again or low != start - reach or low + keys != start + size + reach
        (edges if alone else inside).append(tile)
    joined = [replace(inside[0], count=len(inside), step=size)] if inside else []
    return sorted([*edges, *joined], key=lambda run: run.first)
