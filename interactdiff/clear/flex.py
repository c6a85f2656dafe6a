"""Windows by FlexAttention over tokens in tile order, so that few of its blocks touch a window.

FlexAttention skips blocks of token pairs. In raster order a block's tokens are a part of an image row, and a
window crosses a block for each of its rows; in tile order they are a tile, and it crosses few.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.adapter import KeyBlock
from interactdiff.clear.pattern import Pattern
from interactdiff.merge import NO_KEY, for_queries

TILE = {"cpu": (4, 8), "cuda": (16, 8)}
"""Rows and columns of image tokens in a block: small blocks fit a window best, CUDA's kernel wants 128."""
LAYOUTS = 8  # kept: sizes, windows and devices in use at a time
KERNELS = 32  # kept
FAR = 1e7  # rows, from what is in the image to what is not


class Layout(NamedTuple):
    """A pattern's tokens in blocks.

    Attributes:
        keys: for each place the token that stands there, int64 [K]; padding repeats token 0.
        queries: how many of the places are queries, whole blocks; pooled keys come after them.
        places: for each token its place, int64 [L].
        block_mask: a BlockMask.
    """

    keys: Tensor
    queries: int
    places: Tensor
    block_mask: Any


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: tuple[Tensor, Tensor] | None,
    pattern: Pattern,
    scale: float,
    extra: Sequence[KeyBlock] = (),
) -> Tensor:
    """`local_attention` by a kernel that torch.compile makes at the first use; time and memory grow as H * W.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: which token attends to which.
        scale: of the scores.
        extra: further keys of the image's tokens. They come after the pooled ones and into the same softmax,
            since on a CPU the kernel returns no log-sum-exps to merge by.
    """
    blocks = [for_queries(block, q) for block in extra]
    layout = layout_of(pattern, q.device, sum(keys.shape[2] for keys, *_ in blocks))
    k, v = (
        torch.cat([own, *([] if pooled is None else [pooled[n]]), *(block[n] for block in blocks)], 2)
        for n, own in enumerate((k, v))
    )
    options = {"score_mod": _weighted(layout, k, blocks, pattern)} if blocks else {}
    of_queries = layout.keys[: layout.queries]
    arranged = (q.index_select(2, of_queries), k.index_select(2, layout.keys), v.index_select(2, layout.keys))
    kernel = _kept(q.shape, len(layout.keys), q.dtype, q.device, scale, torch.is_grad_enabled(), len(blocks))
    out = kernel(*arranged, block_mask=layout.block_mask, scale=scale, **options)
    return out.index_select(2, layout.places)


def _weighted(
    layout: Layout, k: Tensor, blocks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], pattern: Pattern
) -> Any:
    """Adds to each score what its key's block weighs, by key and by query."""
    rows, count = len(k), sum(keys.shape[2] for keys, *_ in blocks)
    weights = [weight[:, 0, 0].expand(rows, keys.shape[2]) for keys, _, weight, _ in blocks]
    bias = torch.cat([weights[0].new_zeros(rows, k.shape[2] - count), *weights], 1).clamp(min=NO_KEY)
    bias = bias.index_select(1, layout.keys).contiguous()
    if all(of_query.shape[2] == 1 and not of_query.any() for *_, of_query in blocks):

        def by_key(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + bias[row, key]

        return by_key
    own = torch.zeros(k.shape[2] - count, dtype=torch.long, device=k.device)
    number = [torch.full_like(own[:1], n + 1).expand(keys.shape[2]) for n, (keys, *_) in enumerate(blocks)]
    block_of = torch.cat([own, *number]).index_select(0, layout.keys).contiguous()
    of_queries = bias.new_zeros(rows, len(blocks) + 1, pattern.length)
    for n, (*_, of_query) in enumerate(blocks, start=1):
        of_queries[:, n, pattern.image] = of_query[:, 0, :, 0].clamp(min=NO_KEY)
    of_queries = of_queries.index_select(2, layout.keys[: layout.queries]).contiguous()

    def by_key_and_query(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[row, key] + of_queries[row, block_of[key], query]

    return by_key_and_query


def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention for tensors of one kind, compiled when it is first called."""
    flex = _flex().flex_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return flex(q, k, v, **options)

    # torch counts compilations by code object, and after 8 of them silently takes all pairs of tokens instead
    attention.__code__ = attention.__code__.replace(co_name=attention.__name__)
    return torch.compile(
        attention, dynamic=False
    )  # with dynamic sizes its C++ does not compile in torch 2.13


@lru_cache(maxsize=KERNELS)
def _kept(*_: object) -> Callable[..., Tensor]:
    return compiled_flex()


def can_run_flex(device: torch.device, dtype: torch.dtype, grad: bool = False) -> str | None:
    """None if FlexAttention can run, or one sentence why not.

    Args:
        device: where.
        dtype: of q, k and v.
        grad: whether gradients will be needed.
    """
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no FlexAttention"
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention runs on cpu or cuda, got {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return (
            None
            if importlib.util.find_spec("triton")
            else "FlexAttention on cuda needs triton, and none was found"
        )
    if grad:
        return "FlexAttention has no gradients on cpu"
    if not torch.cpu._is_avx2_supported():
        return "FlexAttention on cpu needs AVX2, which this one lacks"
    compiler = os.environ.get("CXX", "g++")
    if not (shutil.which(compiler) or shutil.which("clang++")):
        return f"FlexAttention needs a C++ compiler, and none was found ({compiler})"
    return None


def _flex() -> Any:
    return importlib.import_module("torch.nn.attention.flex_attention")


@lru_cache(maxsize=LAYOUTS)
def layout_of(pattern: Pattern, device: torch.device, extra: int = 0) -> Layout:
    """The layout of a pattern with a number of further keys, kept for the next call."""
    text = torch.arange(pattern.length)[pattern.text]
    sheet = torch.arange(pattern.length)[pattern.image].view(pattern.grid)
    step = pattern.dilation
    tile = TILE[device.type]
    size = tile[0] * tile[1]
    parts, rows, columns, of_class = [_padded(text, size)], [], [], []
    residues = product(*(range(min(step, side)) for side in pattern.grid))
    for number, (row, column) in enumerate(residues):
        tokens, top, left = _tiled(sheet[row::step, column::step], tile)
        parts.append(tokens.flatten())
        rows.append(top)
        columns.append(left)
        of_class.append(torch.full_like(top, number))
    shared = pattern.pooled_length + extra
    pooled = torch.arange(pattern.length, pattern.length + shared)
    queries = sum(len(part) for part in parts)
    tokens = torch.cat([*parts, _padded(pooled, size)])
    places = torch.empty(pattern.length + shared, dtype=torch.int64)
    places[tokens[tokens >= 0]] = torch.arange(len(tokens))[tokens >= 0]
    blocks = _Blocks(tile, len(parts[0]) // size, torch.cat(rows), torch.cat(columns), torch.cat(of_class))
    mask = _block_mask(pattern, tokens, queries, blocks, device)
    return Layout(tokens.clamp(min=0).to(device), queries, places[: pattern.length].to(device), mask)


class _Blocks(NamedTuple):
    """How many blocks of text come first; of each image block its first row and column, and residue class."""

    tile: tuple[int, int]
    text: int
    rows: Tensor
    columns: Tensor
    of_class: Tensor

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.tile[0] * self.tile[1]


def _padded(tokens: Tensor, size: int) -> Tensor:
    return F.pad(tokens, (0, -len(tokens) % size), value=-1)


def _tiled(sheet: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by tiles [tiles, size], -1 where there is none, and each tile's first row and column."""
    height, width = tile
    full = F.pad(sheet, (0, -sheet.shape[1] % width, 0, -sheet.shape[0] % height), value=-1)
    tiles = full.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
    top, left = torch.meshgrid(
        torch.arange(0, full.shape[0], height), torch.arange(0, full.shape[1], width), indexing="ij"
    )
    return tiles.reshape(-1, height * width), top.flatten(), left.flatten()


def _block_mask(pattern: Pattern, tokens: Tensor, queries: int, blocks: _Blocks, device: torch.device) -> Any:
    """Which blocks are attended to in part and in full, by the distances of tiles alone."""
    near, whole = _tile_pairs(pattern, blocks)
    text, image, size = blocks.text, slice(blocks.text, queries // blocks.size), blocks.size
    attended = torch.zeros(queries // size, len(tokens) // size, dtype=torch.bool)
    attended[:text, : queries // size] = True
    attended[image, :text] = True
    attended[image, queries // size :] = True
    full = attended.clone()
    attended[image, image], full[image, image] = near, whole
    full &= (tokens.view(-1, size) >= 0).all(1)
    partial = attended & ~full
    kinds = [t.to(device) for m in (partial, full) for t in _listed(m)]
    return _flex().BlockMask.from_kv_blocks(
        *kinds,
        BLOCK_SIZE=(size, size),
        mask_mod=_mask_mod(pattern, tokens, queries, blocks, device),
        seq_lengths=(queries, len(tokens)),
    )


def _tile_pairs(pattern: Pattern, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Pairs of tiles of which some, and of which all tokens attend to each other."""
    apart = [(t[:, None] - t).abs() for t in (blocks.rows, blocks.columns)]
    least = [(gap - size + 1).clamp(min=0) for gap, size in zip(apart, blocks.tile, strict=True)]
    most = [gap + size - 1 for gap, size in zip(apart, blocks.tile, strict=True)]
    alike = blocks.of_class[:, None] == blocks.of_class
    return pattern.within(*least) & alike, pattern.within(*most) & alike


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has [1, 1, Q], and which, those first [1, 1, Q, K]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()


def _mask_mod(
    pattern: Pattern, tokens: Tensor, queries: int, blocks: _Blocks, device: torch.device
) -> Callable[..., Tensor]:
    """Which pairs of places attend to each other."""
    first, inside = blocks.text * blocks.size, torch.arange(blocks.size)
    apart = pattern.grid[0] + blocks.tile[0] + pattern.window  # rows from one residue class to the next
    row, column = torch.full((len(tokens),), -FAR), torch.zeros(len(tokens))
    tops = blocks.rows + apart * blocks.of_class
    row[first:queries] = (tops[:, None] + inside // blocks.tile[1]).flatten().float()
    column[first:queries] = (blocks.columns[:, None] + inside % blocks.tile[1]).flatten().float()
    row[queries:] = FAR
    place = torch.arange(len(tokens))
    shared = ((place < first) | (place >= queries)).to(device)
    real, row, column = (tokens >= 0).to(device), row.to(device), column.to(device)

    def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = pattern.within(row[query] - row[key], column[query] - column[key])
        anywhere = torch.where(shared[query], key < queries, shared[key])
        return real[key] & (near | anywhere)

    return attended
