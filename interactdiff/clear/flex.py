"""Windows by FlexAttention over tokens in tile order, so that few of its blocks touch a window.

FlexAttention skips blocks of 128 x 128 token pairs. In raster order 128 tokens are a part of an image row, and a
window crosses a block for each of its rows; in tile order they are a tile of 16 x 8 tokens, and it crosses few.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.clear.pattern import Pattern

BLOCK = 128  # tokens; FlexAttention's own default
TILE = (16, 8)  # rows and columns of image tokens in a block
LAYOUTS = 8  # kept: sizes, windows and devices in use at a time
KERNELS = 32  # kept
FAR = 1e7  # rows


class Layout(NamedTuple):
    """A pattern's tokens in blocks.

    Attributes:
        keys: for each place the token that stands there, int64 [K]; padding repeats token 0.
        queries: how many of the places are queries, a multiple of BLOCK; pooled keys come after them.
        places: for each token its place, int64 [L].
        block_mask: a BlockMask.
    """

    keys: Tensor
    queries: int
    places: Tensor
    block_mask: Any


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, pooled: tuple[Tensor, Tensor] | None, pattern: Pattern, scale: float
) -> Tensor:
    """`local_attention` by a kernel that torch.compile makes at the first use; time and memory grow with H * W.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: who sees whom.
        scale: of the scores.
    """
    layout = layout_of(pattern, q.device)
    if pooled is not None:
        k, v = torch.cat((k, pooled[0]), 2), torch.cat((v, pooled[1]), 2)
    of_queries = layout.keys[: layout.queries]
    arranged = (q.index_select(2, of_queries), k.index_select(2, layout.keys), v.index_select(2, layout.keys))
    kernel = _compiled(q.shape, len(layout.keys), q.dtype, q.device, scale, torch.is_grad_enabled())
    return kernel(*arranged, block_mask=layout.block_mask, scale=scale).index_select(2, layout.places)


@lru_cache(maxsize=KERNELS)
def _compiled(*_: object) -> Callable[..., Tensor]:
    """FlexAttention for tensors of one kind, compiled when it is first called."""
    flex = _flex().flex_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return flex(q, k, v, **options)

    # torch counts compilations by code object, and after 8 of them silently takes all pairs of tokens instead
    attention.__code__ = attention.__code__.replace(co_name=attention.__name__)
    return torch.compile(attention, dynamic=False)  # with dynamic sizes its C++ does not compile in torch 2.13


def can_run_flex(device: torch.device, dtype: torch.dtype, grad: bool = False) -> str | None:
    """None if FlexAttention can run, or one sentence why not.

    Args:
        device: where.
        dtype: of q, k and v.
        grad: whether gradients will be asked for.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return None


def _flex() -> Any:
    return importlib.import_module("torch.nn.attention.flex_attention")


@lru_cache(maxsize=LAYOUTS)
def layout_of(pattern: Pattern, device: torch.device) -> Layout:
    """The layout of a pattern, kept for the next call."""
    text = torch.arange(pattern.length)[pattern.text]
    sheet = torch.arange(pattern.length)[pattern.image].view(pattern.grid)
    step = pattern.dilation
    parts, rows, columns, of_class = [_padded(text)], [], [], []
    for number, (a, b) in enumerate(product(range(min(step, sheet.shape[0])), range(min(step, sheet.shape[1])))):
        tokens, top, left = _tiled(sheet[a::step, b::step])
        parts.append(tokens.flatten())
        rows.append(top)
        columns.append(left)
        of_class.append(torch.full_like(top, number))
    pooled = torch.arange(pattern.length, pattern.length + pattern.pooled_length)
    tokens = torch.cat([*parts, _padded(pooled)])
    queries = len(tokens) - len(_padded(pooled))
    places = torch.empty(pattern.length + pattern.pooled_length, dtype=torch.int64)
    places[tokens[tokens >= 0]] = torch.arange(len(tokens))[tokens >= 0]
    blocks = _Blocks(len(parts[0]) // BLOCK, torch.cat(rows), torch.cat(columns), torch.cat(of_class))
    mask = _block_mask(pattern, tokens, queries, blocks, device)
    return Layout(tokens.clamp(min=0).to(device), queries, places[: pattern.length].to(device), mask)


class _Blocks(NamedTuple):
    """The first blocks are of text; of each image block the first row and column, and its residue class."""

    text: int
    rows: Tensor
    columns: Tensor
    of_class: Tensor


def _padded(tokens: Tensor) -> Tensor:
    return F.pad(tokens, (0, -len(tokens) % BLOCK), value=-1)


def _tiled(sheet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by tiles [tiles, BLOCK], -1 where there is none, and each tile's first row and column."""
    height, width = TILE
    full = F.pad(sheet, (0, -sheet.shape[1] % width, 0, -sheet.shape[0] % height), value=-1)
    tiles = full.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
    top, left = torch.meshgrid(
        torch.arange(0, full.shape[0], height), torch.arange(0, full.shape[1], width), indexing="ij"
    )
    return tiles.reshape(-1, BLOCK), top.flatten(), left.flatten()


def _block_mask(pattern: Pattern, tokens: Tensor, queries: int, blocks: _Blocks, device: torch.device) -> Any:
    """Which blocks are seen in part and in full, from the tiles' distances: no pair of tokens is looked at."""
    near, whole = _tile_pairs(pattern, blocks)
    text, image, everything = blocks.text, slice(blocks.text, queries // BLOCK), len(tokens) // BLOCK
    seen = torch.zeros(queries // BLOCK, everything, dtype=torch.bool)
    seen[:text, : queries // BLOCK] = True
    seen[image, :text] = True
    seen[image, queries // BLOCK :] = True
    full = seen.clone()
    seen[image, image], full[image, image] = near, whole
    full &= (tokens.view(-1, BLOCK) >= 0).all(1)
    partial = seen & ~full
    kinds = [t.to(device) for m in (partial, full) for t in _listed(m)]
    return _flex().BlockMask.from_kv_blocks(
        *kinds,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_mod(pattern, tokens, queries, blocks, device),
        seq_lengths=(queries, len(tokens)),
    )


def _tile_pairs(pattern: Pattern, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Pairs of tiles of which some, and of which all tokens see each other."""
    apart = [(t[:, None] - t).abs() for t in (blocks.rows, blocks.columns)]
    least = [(gap - size + 1).clamp(min=0) for gap, size in zip(apart, TILE, strict=True)]
    most = [gap + size - 1 for gap, size in zip(apart, TILE, strict=True)]
    alike = blocks.of_class[:, None] == blocks.of_class
    return pattern.within(*least) & alike, pattern.within(*most) & alike


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has [1, 1, Q], and which, those first [1, 1, Q, K]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()


def _mask_mod(
    pattern: Pattern, tokens: Tensor, queries: int, blocks: _Blocks, device: torch.device
) -> Callable[..., Tensor]:
    """Which pairs of places are seen."""
    first, inside = blocks.text * BLOCK, torch.arange(BLOCK)
    apart = pattern.grid[0] + TILE[0] + pattern.window  # rows from one residue class to the next
    row, column = torch.full((len(tokens),), -FAR), torch.zeros(len(tokens))
    row[first:queries] = ((blocks.rows + apart * blocks.of_class)[:, None] + inside // TILE[1]).flatten().float()
    column[first:queries] = (blocks.columns[:, None] + inside % TILE[1]).flatten().float()
    row[queries:] = FAR
    place = torch.arange(len(tokens))
    shared = ((place < first) | (place >= queries)).to(device)
    real, row, column = (tokens >= 0).to(device), row.to(device), column.to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = pattern.within(row[query] - row[key], column[query] - column[key])
        anywhere = torch.where(shared[query], key < queries, shared[key])
        return real[key] & (near | anywhere)

    return seen
