"""CLEAR's local attention (arXiv 2412.16112): check, choose a backend, one call per backend."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from interactdiff.adapter import KeyBlock
from interactdiff.clear.flex import can_run_flex, flex_attention
from interactdiff.clear.pattern import Pattern, pool
from interactdiff.clear.reference import reference_attention
from interactdiff.clear.tiles import can_run_tiles, tiles_attention
from interactdiff.errors import ClearError
from interactdiff.merge import needs_gradients

BACKENDS = ("reference", "tiles", "flex")
DENSE_TOKENS = 224
"""Text and image tokens up to which a dense mask is faster than tiles; measured likewise."""

_RUN = {"reference": reference_attention, "tiles": tiles_attention, "flex": flex_attention}


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
    extra: Sequence[KeyBlock] = (),
) -> Tensor:
    """Joint attention in which image tokens see a window of the image and all of the text (CLEAR, section 3).

    `Pattern` says exactly which token attends to which. Every backend computes the same, to rounding.

    Args:
        q: queries [B, heads, L, D] after norm and rotary embedding, L = text_length + H * W, in raster order.
        k: keys, likewise.
        v: values [B, heads, L, D].
        grid: H and W of the image tokens, any from 1 up.
        text_length: text tokens, from 0 up.
        window: radius r, from 1 up: image tokens attend to those at a distance below r.
        down_factor: d above 1 lets image tokens also see all d x d means of image keys and values.
        spatial_weight: the means' weights [1, 1, 1, d, 1, d, 1], learned; default 1 / d^2 throughout.
        scale: of the scores; default 1 / sqrt(D). `proportional_scale` gives that of high resolution.
        shape: "circle", as published, or "square".
        dilation: image tokens per step of the window, from 1 up.
        backend: "reference", "tiles", "flex", or "auto": see `choose_backend`.
        text_first: text tokens come first (Flux), or the image's (SD3).
        extra: further keys that image tokens attend to, in the same softmax.

    Returns:
        [B, heads, L, D]

    Raises:
        ClearError: in one sentence, for shapes or values that do not fit, or a backend that cannot run.
    """
    size = cast(tuple[int, int], tuple(grid))  # of a list too
    pattern = Pattern(size, text_length, window, down_factor, shape, dilation, text_first)
    _check(q, k, v, pattern, spatial_weight)
    if torch.is_autocast_enabled(q.device.type):  # to the type that SDPA would take there
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    grad = needs_gradients(q, k, v, spatial_weight, extra)
    name = _backend(backend, pattern, q.device, q.dtype, grad)
    if grad and extra:
        name = "reference"  # merging has no gradients
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        pooled = None
        if pattern.pooled_length:
            of_image = (t[:, :, pattern.image] for t in (k, v))
            pooled_k, pooled_v = (pool(t, pattern, spatial_weight) for t in of_image)
            pooled = (pooled_k, pooled_v)
        return _RUN[name](q, k, v, pooled, pattern, scale, extra)


def least_tokens(window: int, device: torch.device | str = "cpu") -> int:
    """Image tokens from which a window is faster than full attention, with 512 text tokens.

    On a CPU 1000 + 9 r^2, fitted to what `interactdiff bench clear` prints in float32 on 2 cores: times were
    equal at 1024 tokens for a radius of 4, 1500 for 8, 3250 for 16 and 8900 for 32. On CUDA, where it has not
    been measured, 128^2: CLEAR's author finds no gain at 1024 px and some from 2048 px on.

    Args:
        window: radius r.
        device: where.
    """
    return 128**2 if torch.device(device).type == "cuda" else 1000 + 9 * window**2


def choose_backend(
    pattern: Pattern, device: torch.device | str, dtype: torch.dtype, grad: bool = False
) -> tuple[str, str]:
    """The backend that `local_attention` takes by itself, and why.

    Args:
        pattern: which token attends to which.
        device: of q, k and v.
        dtype: of q, k and v.
        grad: whether gradients will be needed.

    Returns:
        Its name, and the reason in words.

    Raises:
        ClearError: if none can run.
    """
    device = torch.device(device)
    if pattern.length <= DENSE_TOKENS:
        return "reference", f"{pattern.length} tokens are few enough for a dense mask, up to {DENSE_TOKENS}"
    if device.type == "cuda":
        why_not = can_run_flex(device, dtype, grad)
        if why_not is None:
            return "flex", "FlexAttention in tile order is made for CUDA"
        return "tiles", why_not
    if why_not := can_run_tiles(device, dtype):
        return "reference", why_not
    return "tiles", f"on {device.type} tiles are faster than FlexAttention, and have gradients"


def _backend(name: str, pattern: Pattern, device: torch.device, dtype: torch.dtype, grad: bool) -> str:
    if name == "auto":
        return choose_backend(pattern, device, dtype, grad)[0]
    if name not in BACKENDS:
        raise ClearError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    why_not = {
        "reference": None,
        "tiles": can_run_tiles(device, dtype),
        "flex": can_run_flex(device, dtype, grad),
    }
    if why := why_not[name]:
        raise ClearError(f"backend: expected one that can run here, got {name!r}: {why}")
    return name


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, spatial_weight: Tensor | None) -> None:
    shapes = [tuple(t.shape) for t in (q, k, v)]
    if q.ndim != 4 or len(set(shapes)) > 1:
        raise ClearError(f"q, k, v: expected one shape [B, heads, L, D], got {', '.join(map(str, shapes))}")
    kinds = [f"{t.dtype} on {t.device}" for t in (q, k, v)]
    if len(set(kinds)) > 1:
        raise ClearError(f"q, k, v: expected one dtype and device, got {', '.join(kinds)}")
    if q.shape[2] != pattern.length:
        height, width = pattern.grid
        raise ClearError(
            f"grid: expected {height} x {width} image and {pattern.text_length} text tokens, "
            f"{pattern.length} in all, got {q.shape[2]}"
        )
    if spatial_weight is None:
        return
    d = pattern.down_factor
    if d == 1:
        raise ClearError(
            "spatial_weight: expected None with down_factor 1, which pools nothing, got a tensor"
        )
    if (got := tuple(spatial_weight.shape)) != (1, 1, 1, d, 1, d, 1):
        raise ClearError(f"spatial_weight: expected shape {(1, 1, 1, d, 1, d, 1)}, got {got}")
