"""Renders of stickworld for the recipes, made once and mapped from disk."""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interactdiff.stickworld.render import SIZE, render
from interactdiff.stickworld.layouts import sample_scene

_CHUNK = 500


def _render_chunk(first: int, last: int, size: int) -> np.ndarray:
    return np.stack([render(sample_scene(seed), size).image for seed in range(first, last)])


def cached_renders(folder: Path, count: int, size: int = SIZE) -> np.ndarray:
    """Renders of scenes 0 to `count` - 1, kept in `folder`; drawn anew when the world looks different.

    Args:
        folder: where the cache is kept.
        count: how many scenes.
        size: S, height and width in pixels.

    Returns:
        [count, S, S, 3] uint8, mapped read-only from disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    look = hashlib.sha256(_render_chunk(0, min(count, 32), size).tobytes()).hexdigest()[:12]
    path = folder / f"renders-{count}-{size}-{look}.npy"
    if not path.exists():
        aside = path.with_suffix(".aside")
        store = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        firsts = range(0, count, _CHUNK)
        lasts = [min(first + _CHUNK, count) for first in firsts]
        if len(lasts) == 1:
            store[:] = _render_chunk(0, count, size)
        else:
            # Fresh processes: a fork of one that runs torch's threads may hang.
            with ProcessPoolExecutor(min(os.cpu_count() or 1, len(lasts)), get_context("spawn")) as pool:
                chunks = pool.map(_render_chunk, firsts, lasts, [size] * len(lasts))
                for first, last, chunk in zip(firsts, lasts, chunks, strict=True):
                    store[first:last] = chunk
        store.flush()
        aside.rename(path)
    return np.load(path, mmap_mode="r")


def as_images(pixels: np.ndarray) -> Tensor:
    """[B, S, S, 3] uint8 to [B, 3, S, S] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Image.Image:
    """[B, 3, S, S] in [-1, 1] to one picture."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)]
    return Image.fromarray(np.concatenate(rows, 0))
