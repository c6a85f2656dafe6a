"""CLEAR's local attention (arXiv 2412.16112): check, choose a backend, one call."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from interactdiff.clear.pattern import ClearError, Pattern, pool
from interactdiff.clear.reference import reference_attention
from interactdiff.clear.tiles import tiles_attention


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    text_length: int,
    window: int,
    down_factor: int = 1,
    spatial_weight: Tensor | None = None,
    scale: float | None = None,
    shape: str = "circle",
    dilation: int = 1,
    backend: str = "auto",
    text_first: bool = True,
) -> Tensor:
    """Joint attention."""
    pattern = Pattern(tuple(grid), text_length, window, down_factor, shape, dilation, text_first)
    pooled = None
    if down_factor > 1:
        pooled = (pool(k[:, :, pattern.image], pattern, spatial_weight), pool(v[:, :, pattern.image], pattern, spatial_weight))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return {"reference": reference_attention, "tiles": tiles_attention, "auto": tiles_attention}[backend](q, k, v, pooled, pattern, scale)
MIN_TOKENS = 4096
