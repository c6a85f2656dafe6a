"""Windows by halo tiles (blocked local attention, HaloNet, arXiv 2103.12731) in plain PyTorch, on any device.

A tile of queries sees one rectangle of keys, its own place and a halo around it, and the exact window is a
bias inside the rectangle, the same for every tile away from the edges. Keys are laid out as overlapping
strips of columns; within a strip the rectangles of successive tiles are overlapping views. What every image
token sees (text and pooled keys) is a part of its own, merged by log-sum-exp.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product

import torch
from torch import Tensor

from interactdiff.clear.partial import attend, attend_backward, merge_
from interactdiff.clear.pattern import Pattern

STRIP_BYTES = 24e6  # of key and value strips at a time; fewer heads at a time where they would be larger
GRADIENT_BYTES = 256e6  # of the tiles' own key and value gradients at a time, before they are added up


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


def tiles_attention(
    q: Tensor, k: Tensor, v: Tensor, pooled: tuple[Tensor, Tensor] | None, pattern: Pattern, scale: float
) -> Tensor:
    """`local_attention` by tiles; time and memory grow with H * W.

    One opaque operator for torch.compile, which does not break the graph.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: who sees whom.
        scale: of the scores.
    """
    pooled_k, pooled_v = pooled or (k[:, :, :0], v[:, :, :0])
    p = pattern
    flags = [p.text_length, p.window, p.shape == "square", p.dilation, p.text_first]
    return _forward(q, k, v, pooled_k, pooled_v, [*p.grid], [int(flag) for flag in flags], scale)[0]


def can_run_tiles(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if tiles can run, or one sentence why not.

    Args:
        device: where; every device can.
        dtype: of q, k and v.
    """
    if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return None
    return f"tiles take float32, float64, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"


@torch.library.custom_op("interactdiff::clear_tiles", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    grid: list[int],
    flags: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    pattern = _pattern(grid, flags)
    out, lse = torch.empty_like(q), _no_keys(q)
    text, image = pattern.text, pattern.image
    if pattern.text_length:
        out[:, :, text], lse[:, :, text] = attend(q[:, :, text], k, v, None, scale)
    shared_k, shared_v = torch.cat((k[:, :, text], pooled_k), 2), torch.cat((v[:, :, text], pooled_v), 2)
    for batch, heads in _heads(k, pattern):
        of = (slice(batch, batch + 1), heads)
        if shared_k.shape[2]:
            part = attend(q[of][:, :, image], shared_k[of], shared_v[of], None, scale)
            out[of][:, :, image], lse[of][:, :, image] = part
        else:
            out[of][:, :, image] = 0
        sheets = [t[batch, heads, image].unflatten(1, pattern.grid) for t in (q, k, v, out, lse)]
        for own in _residues(pattern):
            _window(*(t[own] for t in sheets), pattern, scale)
    return out, lse


@torch.library.custom_op("interactdiff::clear_tiles_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    flags: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pattern = _pattern(grid, flags)
    text, image, length = pattern.text, pattern.image, pattern.text_length
    to_q, to_k, to_v = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    shared_k, shared_v = torch.cat((k[:, :, text], pooled_k), 2), torch.cat((v[:, :, text], pooled_v), 2)
    to_shared_k, to_shared_v = torch.zeros_like(shared_k), torch.zeros_like(shared_v)
    if length:
        at = [t[:, :, text] for t in (out, lse)]
        above = grad[:, :, text].contiguous()
        to_q[:, :, text], to_k[:], to_v[:] = attend_backward(above, q[:, :, text], k, v, None, scale, *at)
    for batch, heads in _heads(k, pattern):
        of = (slice(batch, batch + 1), heads)
        if shared_k.shape[2]:
            above, queries, *at = (t[of][:, :, image] for t in (grad, q, out, lse))
            shared = shared_k[of], shared_v[of]
            parts = attend_backward(above.contiguous(), queries, *shared, None, scale, *at)
            to_q[of][:, :, image], to_shared_k[of], to_shared_v[of] = parts
        tensors = (grad, q, k, v, out, lse, to_q, to_k, to_v)
        sheets = [t[batch, heads, image].unflatten(1, pattern.grid) for t in tensors]
        for own in _residues(pattern):
            _window_backward(*(t[own] for t in sheets), pattern, scale)
    to_k[:, :, text] += to_shared_k[:, :, :length]
    to_v[:, :, text] += to_shared_v[:, :, :length]
    return to_q, to_k, to_v, to_shared_k[:, :, length:].clone(), to_shared_v[:, :, length:].clone()


@_forward.register_fake
def _(q, k, v, pooled_k, pooled_v, grid, flags, scale):
    return torch.empty_like(q), _no_keys(q)


@_backward.register_fake
def _(grad, q, k, v, pooled_k, pooled_v, out, lse, grid, flags, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, pooled_k, pooled_v))


def _no_keys(q: Tensor) -> Tensor:
    """The log-sum-exp [B, heads, L] of no scores."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def _keep(ctx, inputs, output):
    *tensors, ctx.grid, ctx.flags, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    return *_backward(grad, *ctx.saved_tensors, ctx.grid, ctx.flags, ctx.scale), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _pattern(grid: list[int], flags: list[int]) -> Pattern:
    height, width = grid
    text_length, window, square, dilation, text_first = flags
    shape = "square" if square else "circle"
    return Pattern(
        (height, width), text_length, window, shape=shape, dilation=dilation, text_first=bool(text_first)
    )


def _heads(k: Tensor, pattern: Pattern) -> Iterator[tuple[int, slice]]:
    """Batch items, and ranges of heads whose strips fit `STRIP_BYTES`."""
    copies = 1 + 2 * pattern.reach / tile_shape(pattern.window)[1]
    of_head = 2 * copies * pattern.image_length * k.shape[3] * k.element_size()
    step = max(int(STRIP_BYTES // of_head), 1)
    for batch, head in product(range(k.shape[0]), range(0, k.shape[1], step)):
        yield batch, slice(head, head + step)


def _residues(pattern: Pattern) -> Iterator[tuple[slice, slice, slice]]:
    """The tokens that see each other under dilation: each such grid has windows without dilation."""
    step = pattern.dilation
    for row, column in product(range(min(step, pattern.grid[0])), range(min(step, pattern.grid[1]))):
        yield slice(None), slice(row, None, step), slice(column, None, step)


def _runs(length: int, size: int, reach: int, join_edges: bool) -> list[Run]:
    """Tiles of one size along an axis.

    The last moves inwards to end with the axis, over queries of the one before. At an edge the keys do not
    move on with the tiles.

    Args:
        length: of the axis.
        size: queries of a tile, at most `length`.
        reach: of the window.
        join_edges: tiles at an edge make one run, instead of one each.
    """
    keys = min(size + 2 * reach, length)
    tiles = []
    for first in range(0, length, size):
        start = min(first, length - size)
        tiles.append((start, min(max(start - reach, 0), length - keys), first - start))

    def kind(number: int) -> tuple[int, int, int]:
        start, key_start, again = tiles[number]
        inside = key_start == start - reach and key_start + keys == start + size + reach
        return again, -1 if inside else key_start, 0 if inside or join_edges else number

    runs = []
    for (again, edge, _), numbers in groupby(range(len(tiles)), kind):
        first, *others = numbers
        step = size if edge < 0 else 0
        runs.append(Run(first, 1 + len(others), tiles[first][0], size, tiles[first][1], keys, step, again))
    return runs


def _axes(q: Tensor, pattern: Pattern) -> tuple[list[Run], list[Run]]:
    """Rows and columns of [N, H, W, D]."""
    (height, width), (rows, columns) = q.shape[1:3], tile_shape(pattern.window)
    return (
        _runs(height, min(rows, height), pattern.reach, True),
        _runs(width, min(columns, width), pattern.reach, False),
    )


def _bias(rows: Run, columns: Run, pattern: Pattern, like: Tensor) -> Tensor:
    """0 where a tile's query sees a key of its rectangle, -inf elsewhere: [1, tiles or 1, Q, K]."""
    dy, dx = rows.offsets().float(), columns.offsets().float()[0]
    near = pattern.within(dy[:, :, None, :, None], dx[:, None, :])
    return torch.zeros(near.shape).masked_fill_(~near, -torch.inf).flatten(3).flatten(1, 2)[None].to(like)


def _strips(sheet: Tensor, runs: list[Run], queries: bool) -> Tensor:
    """Columns of [N, H, W, ...] as overlapping strips [S, N, H, columns, ...], contiguous."""
    starts, size = _starts(runs, queries)
    strips = sheet.new_empty((len(starts), *sheet.shape[:2], size, *sheet.shape[3:]))
    for strip, start in zip(strips, starts, strict=True):
        strip.copy_(sheet[:, :, start : start + size])
    return strips


def _starts(runs: list[Run], queries: bool) -> tuple[list[int], int]:
    starts = [
        (run.start if queries else run.key_start) + i * run.size for run in runs for i in range(run.count)
    ]
    return starts, runs[0].size if queries else runs[0].keys


def _queries(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles of query strips [S * N, tiles, Q, ...]; a view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    own = own[:, rows.start : rows.start + rows.count * rows.size]
    return own.unflatten(1, (rows.count, rows.size)).flatten(2, 3)


def _keys(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Rectangles of key strips [S * N, tiles, K, D]; an overlapping view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    if rows.step == 0:
        own = own[:, rows.key_start : rows.key_start + rows.keys].flatten(1, 2)
        return own[:, None].expand(-1, rows.count, -1, -1)
    own = own[:, rows.key_start : rows.key_start + rows.keys + (rows.count - 1) * rows.step]
    return own.unfold(1, rows.keys, rows.step).permute(0, 1, 4, 2, 3).flatten(2, 3)


def _place(sheet: Tensor, rows: Run, columns: Run) -> Tensor:
    """Where tiles belong in [N, H, W, ...]: [S, N, tiles, new rows, new columns, ...]; a view."""
    start = columns.start + columns.again
    end = columns.start + columns.count * columns.size
    own = sheet[:, rows.start + rows.again : rows.start + rows.count * rows.size, start:end]
    own = own.unflatten(2, (columns.count, -1)).unflatten(1, (rows.count, -1))
    return own.movedim(3, 0)


def _placed(tiles: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles [S * N, tiles, Q, ...] in the shape of `_place`; a view."""
    tiles = tiles.unflatten(2, (rows.size, columns.size)).unflatten(0, (columns.count, -1))
    return tiles[:, :, :, rows.again :, columns.again :]


def _window(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern: Pattern, scale: float
) -> None:
    """Merge the windows [N, H, W, D] into out and lse."""
    row_runs, column_runs = _axes(q, pattern)
    queries = _strips(q, column_runs, True)
    keys, values = (_strips(t, column_runs, False) for t in (k, v))
    for rows, columns in product(row_runs, column_runs):
        of = (rows, columns)
        bias = _bias(*of, pattern, q)
        part, part_lse = attend(_queries(queries, *of), _keys(keys, *of), _keys(values, *of), bias, scale)
        merge_(_place(out, *of), _place(lse, *of), _placed(part, *of), _placed(part_lse, *of))


def _window_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    to_v: Tensor,
    pattern: Pattern,
    scale: float,
) -> None:
    """Add the windows' gradients to to_q, to_k and to_v, all [N, H, W, ...]."""
    row_runs, column_runs = _axes(q, pattern)
    above, queries, merged, merged_lse = (_strips(t, column_runs, True) for t in (grad, q, out, lse))
    keys, values = (_strips(t, column_runs, False) for t in (k, v))
    exact = torch.promote_types(q.dtype, torch.float32)  # of sums of many tiles
    to_keys, to_values = (torch.zeros(keys.shape, dtype=exact, device=q.device) for _ in range(2))
    above[-1, :, :, : column_runs[-1].again] = 0  # queries that the strip before it has already
    for rows, whole in product(row_runs, column_runs):
        bias = _bias(rows, whole, pattern, q)
        for columns in _split(whole, rows, keys):
            of = (rows, columns)
            of_tiles, *at = (_queries(t, *of) for t in (above, merged, merged_lse))
            of_tiles = of_tiles.clone()
            of_tiles[:, :, : rows.again * columns.size] = 0
            seen = (_keys(keys, *of), _keys(values, *of))
            parts = attend_backward(of_tiles, _queries(queries, *of), *seen, bias, scale, *at)
            _place(to_q, *of).add_(_placed(parts[0], *of))
            _add_rectangles(to_keys, parts[1], *of)
            _add_rectangles(to_values, parts[2], *of)
    starts, size = _starts(column_runs, False)
    for total, strips in ((to_k, to_keys), (to_v, to_values)):
        for start, strip in zip(starts, strips, strict=True):
            total[:, :, start : start + size] += strip


def _split(columns: Run, rows: Run, keys: Tensor) -> Iterator[Run]:
    """Runs of fewer strips, whose tiles' gradients fit `GRADIENT_BYTES`."""
    _, heads, _, width, depth = keys.shape
    of_strip = 2 * heads * rows.count * rows.keys * width * depth * keys.element_size()
    step = max(int(GRADIENT_BYTES // of_strip), 1)
    for i in range(0, columns.count, step):
        yield replace(
            columns,
            first=columns.first + i,
            count=min(step, columns.count - i),
            start=columns.start + i * columns.size,
            key_start=columns.key_start + i * columns.step,
        )


def _add_rectangles(strips: Tensor, parts: Tensor, rows: Run, columns: Run) -> None:
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
