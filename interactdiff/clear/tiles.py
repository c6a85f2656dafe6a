"""Windows by halo tiles (blocked local attention, HaloNet, arXiv 2103.12731) in plain PyTorch, on every device.

A tile of queries sees one rectangle of keys, its own place and a halo around it, and the exact window is a bias
inside the rectangle, the same for every tile away from the edges. Keys are laid out once as overlapping strips of
columns; within a strip the rectangles of successive tiles are overlapping views, so that no halo is copied. What
every image token sees (text and pooled keys) is a part of its own, merged by log-sum-exp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor

from interactdiff.clear.partial import attend, attend_backward, merge_
from interactdiff.clear.pattern import Pattern

STRIP_BYTES = 256e6  # of key and value strips at a time; fewer heads at a time where they would be larger
GRADIENT_BYTES = 256e6  # of the tiles' own key and value gradients at a time, before they are added up


@dataclass(frozen=True)
class Run:
    """Tiles side by side along an axis that see the same part of their neighbourhood.

    Attributes:
        first: number of the first tile.
        count: how many.
        start: the first tile's first query; the next tile's is `size` further.
        size: queries of a tile.
        key_start: the first tile's first key.
        keys: keys of a tile.
        again: queries of a tile that the tile before has already.
    """

    first: int
    count: int
    start: int
    size: int
    key_start: int
    keys: int
    again: int = 0


def tile_shape(window: int) -> tuple[int, int]:
    """Rows and columns of a tile: few keys beyond the window, few copies of strips, enough queries for a kernel."""
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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    text, image = pattern.text, pattern.image
    if pattern.text_length:
        out[:, :, text], lse[:, :, text] = attend(q[:, :, text], k, v, None, scale)
    shared_k, shared_v = torch.cat((k[:, :, text], pooled_k), 2), torch.cat((v[:, :, text], pooled_v), 2)
    for batch, heads in _heads(k, pattern):
        of = (slice(batch, batch + 1), heads)
        if shared_k.shape[2]:
            part = attend(q[of][:, :, image], shared_k[of], shared_v[of], None, scale)
            out[of][:, :, image], lse[of][:, :, image] = part
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
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad, q, k, v, pooled_k, pooled_v, out, lse, grid, flags, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, pooled_k, pooled_v))


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


def _row_runs(height: int, size: int, reach: int) -> list[Run]:
    """Tiles from the top down; those at an edge see fewer rows of keys, the last may have fewer of queries."""
    tiles = []
    for start in range(0, height, size):
        end = min(start + size, height)
        low, high = max(start - reach, 0), min(end + reach, height)
        tiles.append(Run(start // size, 1, start, end - start, low, high - low))
    return _joined(tiles)


def _column_runs(width: int, size: int, reach: int) -> list[Run]:
    """Strips from left to right, all of one width; at an edge they move inwards."""
    size = min(size, width)
    keys = min(size + 2 * reach, width)
    tiles = []
    for first in range(0, width, size):
        start = min(first, width - size)
        low = min(max(start - reach, 0), width - keys)
        tiles.append(Run(first // size, 1, start, size, low, keys, first - start))
    return _joined(tiles)


def _joined(tiles: list[Run]) -> list[Run]:
    alike = (list(run) for _, run in groupby(tiles, lambda t: (t.size, t.key_start - t.start, t.keys, t.again)))
    return [
        Run(t.first, len(run), t.start, t.size, t.key_start, t.keys, t.again) for run in alike for t in run[:1]
    ]


def _bias(rows: Run, columns: Run, pattern: Pattern, like: Tensor) -> Tensor:
    """0 where a tile's query [Q] sees a key [K] of its rectangle, -inf elsewhere."""
    dy, dx = (
        run.key_start - run.start + torch.arange(run.keys) - torch.arange(run.size)[:, None]
        for run in (rows, columns)
    )
    near = pattern.within(dy.float()[:, None, :, None], dx.float()[None, :, None, :])
    bias = torch.zeros(near.shape).masked_fill_(~near, -torch.inf)
    return bias.flatten(2).flatten(0, 1).to(like)


def _strips(sheet: Tensor, runs: list[Run], queries: bool) -> Tensor:
    """Columns of [N, H, W, ...] as overlapping strips [S, N, H, columns, ...], contiguous."""
    starts, size = _starts(runs, queries)
    strips = sheet.new_empty((len(starts), *sheet.shape[:2], size, *sheet.shape[3:]))
    for strip, start in zip(strips, starts, strict=True):
        strip.copy_(sheet[:, :, start : start + size])
    return strips


def _starts(runs: list[Run], queries: bool) -> tuple[list[int], int]:
    starts = [(run.start if queries else run.key_start) + i * run.size for run in runs for i in range(run.count)]
    return starts, runs[0].size if queries else runs[0].keys


def _queries(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles of query strips [S * N, tiles, Q, ...]; a view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    own = own[:, rows.start : rows.start + rows.count * rows.size]
    return own.unflatten(1, (rows.count, rows.size)).flatten(2, 3)


def _keys(strips: Tensor, rows: Run, columns: Run) -> Tensor:
    """Rectangles of key strips [S * N, tiles, K, D]; an overlapping view."""
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    own = own[:, rows.key_start : rows.key_start + rows.keys + (rows.count - 1) * rows.size]
    return own.unfold(1, rows.keys, rows.size).permute(0, 1, 4, 2, 3).flatten(2, 3)


def _place(sheet: Tensor, rows: Run, columns: Run) -> Tensor:
    """Where tiles belong in [N, H, W, ...]: [S, N, tiles, rows, new columns, ...]; a view."""
    start = columns.start + columns.again
    end = columns.start + columns.count * columns.size
    own = sheet[:, rows.start : rows.start + rows.count * rows.size, start:end]
    own = own.unflatten(2, (columns.count, -1)).unflatten(1, (rows.count, rows.size))
    return own.movedim(3, 0)


def _placed(tiles: Tensor, rows: Run, columns: Run) -> Tensor:
    """Tiles [S * N, tiles, Q, ...] in the shape of `_place`; a view."""
    tiles = tiles.unflatten(2, (rows.size, columns.size)).unflatten(0, (columns.count, -1))
    return tiles[:, :, :, :, columns.again :]


def _window(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern: Pattern, scale: float) -> None:
    """Merge the windows [N, H, W, D] into out and lse."""
    row_runs, column_runs = _runs(q, pattern)
    queries = _strips(q, column_runs, True)
    keys, values = (_strips(t, column_runs, False) for t in (k, v))
    for rows, columns in product(row_runs, column_runs):
        of = (rows, columns)
        bias = _bias(*of, pattern, q)
        part, part_lse = attend(_queries(queries, *of), _keys(keys, *of), _keys(values, *of), bias, scale)
        merge_(_place(out, *of), _place(lse, *of), _placed(part, *of), _placed(part_lse, *of))


def _runs(q: Tensor, pattern: Pattern) -> tuple[list[Run], list[Run]]:
    height, width = tile_shape(pattern.window)
    return _row_runs(q.shape[1], height, pattern.reach), _column_runs(q.shape[2], width, pattern.reach)


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
    row_runs, column_runs = _runs(q, pattern)
    above, queries, merged, merged_lse = (_strips(t, column_runs, True) for t in (grad, q, out, lse))
    keys, values = (_strips(t, column_runs, False) for t in (k, v))
    to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
    if again := column_runs[-1].again:
        above[-1, :, :, :again] = 0  # those queries are the strip's before it
    for rows, whole in product(row_runs, column_runs):
        bias = _bias(rows, whole, pattern, q)
        for columns in _split(whole, rows, keys):
            of = (rows, columns)
            at = [_queries(t, *of) for t in (merged, merged_lse)]
            seen = (_keys(keys, *of), _keys(values, *of))
            parts = attend_backward(
                _queries(above, *of).contiguous(), _queries(queries, *of), *seen, bias, scale, *at
            )
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
        start, key_start = columns.start + i * columns.size, columns.key_start + i * columns.size
        count = min(step, columns.count - i)
        yield Run(columns.first + i, count, start, columns.size, key_start, columns.keys, columns.again)


def _add_rectangles(strips: Tensor, parts: Tensor, rows: Run, columns: Run) -> None:
    """Add gradients of rectangles [S * N, tiles, K, D], which overlap, to their strips.

    The same `rows.size` rows of every tile's rectangle do not overlap: they are added at once.
    """
    own = strips[columns.first : columns.first + columns.count].flatten(0, 1)
    parts = parts.unflatten(2, (rows.keys, columns.keys))
    for row in range(0, rows.keys, rows.size):
        size = min(rows.size, rows.keys - row)
        start = rows.key_start + row
        target = own[:, start : start + size + (rows.count - 1) * rows.size].unfold(1, size, rows.size)
        target.permute(0, 1, 4, 2, 3).add_(parts[:, :, row : row + size])
