"""The short way: windows for a denoiser in one call."""

import os

from interactdiff.clear.adapter import ClearAdapter, ClearConfig
from interactdiff.handle import Handle, attach


def linearize(
    pipeline_or_denoiser: object,
    window: int = 16,
    down_factor: int = 1,
    weights: str | os.PathLike[str] | ClearAdapter | None = None,
    *,
    backend: str = "auto",
    min_tokens: int | None = None,
    proportional: bool = False,
    ntk_factor: float = 1.0,
) -> Handle:
    """Attach windows (CLEAR, arXiv 2412.16112) in one call: image tokens attend within them.

    The grid is taken from each call, so one pipeline may draw pictures of many sizes and shapes.

    Args:
        pipeline_or_denoiser: a pipeline, or a Flux or SD3 transformer or U-Net.
        window: radius r in tokens, from 1 up.
        down_factor: every token attends to keys and values pooled d x d too; 1: there are none.
        weights: layers trained for this window and factor: a published file, a folder or a repository on the
            Hub; None attends within windows with the base's own layers.
        backend: of `local_attention`.
        min_tokens: as in `ClearBinding.configure`; None is as many as windows need to be faster.
        proportional: as in `ClearBinding.configure`.
        ntk_factor: as in `ClearBinding.configure`.

    Raises:
        ClearError: window or down_factor is out of range.
        AdapterError: as `attach` and `ClearAdapter.from_pretrained` raise it.
    """
    if weights is None:
        adapter = ClearAdapter(ClearConfig(window, down_factor)).eval()
    elif isinstance(weights, ClearAdapter):
        adapter = weights
    else:
        adapter = ClearAdapter.from_pretrained(weights, window=window, down_factor=down_factor)
    handle = attach(pipeline_or_denoiser, adapter)
    try:
        handle["clear"].configure(
            backend=backend, min_tokens=min_tokens, proportional=proportional, ntk_factor=ntk_factor
        )
    except Exception:
        handle.detach()
        raise
    return handle
