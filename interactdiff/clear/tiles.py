"""Windows by halo tiles (blocked local attention, HaloNet, arXiv 2103.12731) in plain PyTorch, on any device.

A tile of queries attends to one rectangle of keys, its own place and a halo around it, and the exact window
is a bias inside the rectangle, the same for every tile away from the edges. What every image token attends to
(text and pooled keys) is a part of its own, merged by log-sum-exp.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from interactdiff.adapter import KeyBlock
from interactdiff.clear.pattern import Pattern
from interactdiff.clear.tiling import (
    Tiling,
    add_key_strips,
    add_rectangles,
    place,
    placed,
    queries,
    rectangles,
    split,
    tile_shape,
)
from interactdiff.merge import attend, attend_backward, merge_extra, merge_into

STRIP_BYTES = 16e6  # of key and value strips at a time; beyond, fewer heads, then fewer columns
GRADIENT_BYTES = 256e6  # of the tiles' own key and value gradients at a time, before they are added up


def tiles_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: tuple[Tensor, Tensor] | None,
    pattern: Pattern,
    scale: float,
    extra: Sequence[KeyBlock] = (),
) -> Tensor:
    """`local_attention` by tiles; time and memory grow with H * W.

    One opaque operator for torch.compile, which does not break the graph.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: which token attends to which.
        scale: of the scores.
        extra: further keys of the image's tokens.
    """
    pooled_k, pooled_v = pooled or (k[:, :, :0], v[:, :, :0])
    p = pattern
    flags = [p.text_length, p.window, p.shape == "square", p.dilation, p.text_first]
    out, lse = _forward(q, k, v, pooled_k, pooled_v, [*p.grid], [int(flag) for flag in flags], scale)
    if not extra:
        return out
    parts = [
        out[:, :, p.text],
        merge_extra(out[:, :, p.image], lse[:, :, p.image], q[:, :, p.image], extra, scale),
    ]
    return torch.cat(parts[:: 1 if p.text_first else -1], 2)


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
    tiling_of = _tilings(pattern, q)
    for batch, heads in _heads(k, pattern):
        sheets = [t[batch, heads, image].unflatten(1, pattern.grid) for t in (q, k, v, out, lse)]
        if shared_k.shape[2]:
            of = (slice(batch, batch + 1), heads)
            part = attend(q[of][:, :, image], shared_k[of], shared_v[of], None, scale)
            sheets += [t[0].unflatten(1, pattern.grid) for t in part]
        for own in _residues(pattern):
            tensors = [t[own] for t in sheets]
            _window(tensors, tiling_of(tensors[0]), scale)
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
    tiling_of = _tilings(pattern, q)
    for batch, heads in _heads(k, pattern):
        of = (slice(batch, batch + 1), heads)
        if shared_k.shape[2]:
            above, asking, *at = (t[of][:, :, image] for t in (grad, q, out, lse))
            shared = shared_k[of], shared_v[of]
            parts = attend_backward(above.contiguous(), asking, *shared, None, scale, *at)
            to_q[of][:, :, image], to_shared_k[of], to_shared_v[of] = parts
        tensors = (grad, q, k, v, out, lse, to_q, to_k, to_v)
        sheets = [t[batch, heads, image].unflatten(1, pattern.grid) for t in tensors]
        for own in _residues(pattern):
            parts = [t[own] for t in sheets]
            _window_backward(parts, tiling_of(parts[0]), scale)
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
    """The tokens that attend to each other under dilation: each such grid has windows without dilation."""
    step = pattern.dilation
    for row, column in product(range(min(step, pattern.grid[0])), range(min(step, pattern.grid[1]))):
        yield slice(None), slice(row, None, step), slice(column, None, step)


def _tilings(pattern: Pattern, like: Tensor) -> Callable[[Tensor], Tiling]:
    """A function that gives the tiling of a sheet, one for all sheets of a size."""

    @cache
    def of_size(height: int, width: int) -> Tiling:
        return Tiling(height, width, pattern, like)

    return lambda sheet: of_size(*sheet.shape[1:3])


def _window(sheets: list[Tensor], tiling: Tiling, scale: float) -> None:
    """Write the windows to out and lse, merged with what shared keys gave, if any.

    Args:
        sheets: q, k, v, out and lse [N, H, W, ...], and the result and log-sum-exp of shared keys, or not.
        tiling: of all of them.
        scale: of the scores.
    """
    q, k, v, out, lse, *shared = sheets
    for group in tiling.groups(_strip_bytes(k, tiling), STRIP_BYTES):
        of_q = tiling.query_strips("q", q, group)
        of_k, of_v = tiling.key_strips("k", k, group), tiling.key_strips("v", v, group)
        for at in product(tiling.rows, group):
            keys_values = rectangles(of_k, *at), rectangles(of_v, *at)
            part, part_lse = attend(queries(of_q, *at), *keys_values, tiling.bias(*at), scale)
            parts = [(placed(part, *at), placed(part_lse, *at))]
            if shared:
                parts.insert(0, (place(shared[0], *at), place(shared[1], *at)))
            merge_into(parts, place(out, *at), place(lse, *at))


def _window_backward(sheets: list[Tensor], tiling: Tiling, scale: float) -> None:
    """Add the windows' gradients to those of q, k and v.

    Args:
        sheets: the gradient of out; q, k, v; out and lse; the gradients of q, k, v; all [N, H, W, ...].
        tiling: of all of them.
        scale: of the scores.
    """
    grad, q, k, v, out, lse, to_q, to_k, to_v = sheets
    exact = torch.promote_types(q.dtype, torch.float32)  # of sums over many tiles
    for group in tiling.groups(_strip_bytes(k, tiling), STRIP_BYTES):
        named = {"grad": grad, "q": q, "out": out, "lse": lse}
        above, of_q, *merged = (tiling.query_strips(name, sheet, group) for name, sheet in named.items())
        of_k, of_v = tiling.key_strips("k", k, group), tiling.key_strips("v", v, group)
        to_keys, to_values = (torch.zeros(of_k.shape, dtype=exact, device=q.device) for _ in range(2))
        above[-1, :, :, : group[-1].again] = 0  # queries that the strip before it has already
        for rows, whole in product(tiling.rows, group):
            of_strip = _strip_bytes(k, tiling) * rows.count * rows.keys / q.shape[1]
            for columns in split(whole, max(int(GRADIENT_BYTES // of_strip), 1)):
                at = rows, columns
                of_tiles = queries(above, *at).clone()
                of_tiles[:, :, : rows.again * columns.size] = 0
                keys_values = rectangles(of_k, *at), rectangles(of_v, *at)
                bias, results = tiling.bias(rows, whole), (queries(t, *at) for t in merged)
                parts = attend_backward(of_tiles, queries(of_q, *at), *keys_values, bias, scale, *results)
                place(to_q, *at).add_(placed(parts[0], *at))
                add_rectangles(to_keys, parts[1], *at)
                add_rectangles(to_values, parts[2], *at)
        add_key_strips(to_k, to_keys, group)
        add_key_strips(to_v, to_values, group)


def _strip_bytes(k: Tensor, tiling: Tiling) -> int:
    """Of a strip of keys [N, H, W, D] and one of values."""
    return 2 * k[:, :, :1].numel() * tiling.columns[0].keys * k.element_size()
