"""Renders of stickworld, their captions and their latents for the recipes: made once and kept on disk."""

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator
from torch import Tensor

from interactdiff.files import write_aside
from interactdiff.stickworld.captions import caption
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import SIZE, render
from interactdiff.stickworld.world import WorldScene
from interactdiff.training.config import Count, Keys, OptionalCount, Share, refusal

_CHUNK = 500
_LENGTH_GROUPS = 4  # into which captions are sorted by length; a batch is one
CAPTIONS = 4  # wordings of each scene
DETAILED = 2  # more of them that name every attribute,
DESCRIBED = 4  # of scenes with at most so many persons and objects: nearly all fit the encoders' 77 tokens


def _render_chunk(seeds: Sequence[int], size: int) -> np.ndarray:
    return np.stack([render(sample_scene(seed), size).image for seed in seeds])


def _caption_chunk(seeds: Sequence[int]) -> list[str]:
    return ["\t".join(_captions(seed)) for seed in seeds]


def _captions(seed: int) -> list[str]:
    scene, rng = sample_scene(seed), random.Random(f"captions {seed}")
    varied = [varied_caption(scene, rng) for _ in range(CAPTIONS)]
    detailed = DETAILED if len(scene.things) <= DESCRIBED else 0
    return varied + [caption(scene, rng, likelihood=1.0).text for _ in range(detailed)]


def varied_caption(scene: WorldScene, rng: random.Random) -> str:
    """A caption in random wording: at times without verbs, colours or the place, or keywords."""
    if rng.random() > 0.95:
        words = [f"{thing.appearance.colour} {thing.name}" for thing in scene.things]
        return ", ".join([*words, scene.background])
    verbs, colours, place = rng.random() < 0.9, rng.random() < 0.92, rng.random() < 0.95
    return caption(scene, rng, verbs=verbs, colours=colours, place=place).text


def _in_chunks(seeds: Sequence[int], make: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `make(seeds, ...)` returns for each chunk, by as many processes as there are cores."""
    chunks = [seeds[first : first + _CHUNK] for first in range(0, len(seeds), _CHUNK)]
    if len(chunks) == 1:
        return [make(seeds, *arguments)]
    # Fresh processes: a fork of one that runs torch's threads may hang.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(chunks)), get_context("spawn")) as pool:
        return list(pool.map(make, chunks, *([argument] * len(chunks) for argument in arguments)))


def _scene_chunk(seeds: Sequence[int]) -> list[WorldScene]:
    return [sample_scene(seed) for seed in seeds]


def scenes(count: int) -> list[WorldScene]:
    """Scenes 0 to `count` - 1."""
    return [scene for chunk in _in_chunks(range(count), _scene_chunk) for scene in chunk]


@cache
def scene_seeds(count: int, most: int | None = None) -> Sequence[int]:
    """The first seeds whose scenes have at most so many persons and objects; None: any."""
    if most is None:
        return range(count)
    fitting = (seed for seed in itertools.count() if len(sample_scene(seed).things) <= most)
    return list(itertools.islice(fitting, count))


def cached_renders(folder: Path, count: int, size: int = SIZE, most: int | None = None) -> np.ndarray:
    """Renders of the scenes of `scene_seeds`, kept in `folder`; drawn anew when the world looks different.

    Args:
        folder: where the cache is kept.
        count: how many scenes.
        size: S, height and width in pixels.
        most: persons and objects of a scene.

    Returns:
        [count, S, S, 3] uint8, mapped read-only from disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = scene_seeds(count, most)
    look = hashlib.sha256(_render_chunk(seeds[:32], size).tobytes()).hexdigest()[:12]
    path = folder / f"renders-{count}-{size}-{look}.npy"
    if not path.exists():

        def write(aside: Path) -> None:
            shape = (count, size, size, 3)
            store = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash in mapped memory
                with aside.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
            first = 0
            for chunk in _in_chunks(seeds, _render_chunk, size):
                store[first : first + len(chunk)] = chunk
                first += len(chunk)
            store.flush()

        write_aside(path, write)
    return np.load(path, mmap_mode="r")


def cached_captions(folder: Path, count: int, most: int | None = None) -> list[list[str]]:
    """Wordings of each of the scenes of `scene_seeds`, kept in `folder`: `CAPTIONS` and up to `DETAILED`."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = scene_seeds(count, most)
    wording = hashlib.sha256("\n".join(_caption_chunk(seeds[:64])).encode()).hexdigest()[:12]
    path = folder / f"captions-{count}-{wording}.txt"
    if not path.exists():
        lines = [line for chunk in _in_chunks(seeds, _caption_chunk) for line in chunk]
        write_aside(path, lambda aside: aside.write_text("\n".join(lines), encoding="utf-8"))
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]


@torch.no_grad()
def cached_latents(folder: Path, vae: Any, renders: np.ndarray) -> Tensor:
    """Latents of renders, computed once for each encoder and each look of the world.

    Returns:
        [N, C, H, W] float16 on the CPU.
    """
    made_of = hashlib.sha256(renders[:32].tobytes())
    for parameter in vae.encoder.parameters():
        made_of.update(parameter.detach().cpu().numpy().tobytes())
    path = folder / f"latents-{len(renders)}-{made_of.hexdigest()[:12]}.npy"
    if not path.exists():
        parts = []
        at_once = 10 if vae.device.type == "cpu" else 250  # a CPU is slower with more, a GPU waits with fewer
        for first in range(0, len(renders), at_once):
            images = as_images(renders[first : first + at_once]).to(vae.device)
            parts.append(vae.encode(images).latents.half().cpu().numpy())
        write_aside(path, lambda aside: np.save(aside, np.concatenate(parts)))
    return torch.from_numpy(np.load(path))


class SizeConfig(Keys):
    """How pictures of one size are trained on.

    Attributes:
        renders: how many there are.
        batch_size: of a step.
        share: of the steps.
        most: persons and objects of a scene; null: any number. Few are large, and learnt sooner.
    """

    renders: Count
    batch_size: Count
    share: Share
    most: OptionalCount = None


def _add_up(sizes: dict[int, SizeConfig]) -> dict[int, SizeConfig]:
    if abs((total := sum(one.share for one in sizes.values())) - 1) > 1e-6:
        raise refusal("shares of the sizes that add up to 1", total)
    return sizes


Sizes = Annotated[dict[Count, SizeConfig], AfterValidator(_add_up)]
"""By height and width in pixels."""


class CaptionedLatents:
    """Latents and captions of the first scenes of the world, at one or several sizes.

    Args:
        folder: where the caches are kept.
        vae: the autoencoder.
        sizes: in pixels.
    """

    def __init__(self, folder: Path, vae: Any, sizes: Mapping[int, SizeConfig]):
        self.sizes = sizes
        self.latents = {
            size: cached_latents(folder, vae, cached_renders(folder, one.renders, size, one.most))
            for size, one in sizes.items()
        }
        counts: dict[int | None, int] = {}
        for one in sizes.values():
            counts[one.most] = max(one.renders, counts.get(one.most, 0))
        made = {most: cached_captions(folder, count, most) for most, count in counts.items()}
        self.captions = {size: made[one.most] for size, one in sizes.items()}

    def batch(self, rng: random.Random, empty: float) -> tuple[Tensor, list[str]]:
        """[B, C, H, W] latents of one size, and their captions, each empty with probability `empty`.

        The captions are of similar length, so that little of a batch is padding.
        """
        (size,) = rng.choices(list(self.sizes), [one.share for one in self.sizes.values()])
        latents, captions, count = self.latents[size], self.captions[size], self.sizes[size].batch_size
        drawn = [rng.randrange(len(latents)) for _ in range(_LENGTH_GROUPS * count)]
        worded = sorted(((rng.choice(captions[n]), n) for n in drawn), key=lambda one: len(one[0]))
        first = rng.randrange(_LENGTH_GROUPS) * count
        texts, chosen = zip(*worded[first : first + count], strict=True)
        return latents[list(chosen)].float(), ["" if rng.random() < empty else text for text in texts]


def as_images(pixels: np.ndarray) -> Tensor:
    """[B, S, S, 3] uint8 to [B, 3, S, S] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Image.Image:
    """[B, 3, S, S] in [-1, 1] to one picture."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows: Sequence[np.ndarray] = [
        np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)
    ]
    return Image.fromarray(np.concatenate(rows, 0))
