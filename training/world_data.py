"""Renders of stickworld, their captions and their latents for the recipes: made once and kept on disk."""

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator
from torch import Tensor

from interactdiff.files import write_aside
from interactdiff.stickworld.captions import Caption, Described, caption
from interactdiff.stickworld.layouts import MOST_THINGS, sample_scene
from interactdiff.stickworld.render import SIZE, render
from interactdiff.stickworld.world import WorldScene
from interactdiff.training.config import Count, Keys, OptionalCount, Share, refusal

_CHUNK = 500
_LENGTH_GROUPS = 4  # into which captions are sorted by length; a batch is one
CAPTIONS = 4  # wordings of each scene
DETAILED = 2  # more of them that name every attribute,
MASK_SIDE = 48  # pixels of silhouettes: a multiple of the grids of 64, 96 and 128 px, whose cells are 8 px
DESCRIBED = 4  # of scenes with at most so many persons and objects: nearly all fit the encoders' 77 tokens


class WordedCaption(NamedTuple):
    """A caption, and of each person and object the first and last + 1 character of its words.

    Those of a person go on to the verb of what it does.
    """

    text: str
    spans: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, caption: Caption) -> "WordedCaption":
        """Of a scene's caption."""
        spans = [thing.span for thing in caption.things]
        for n, action in enumerate(caption.actions):
            if action is not None:
                spans[2 * n] = (spans[2 * n][0], spans[2 * n + 1][0] - 1)
        return cls(caption.text, spans)


def _render_chunk(seeds: Sequence[int], size: int) -> np.ndarray:
    return np.stack([render(sample_scene(seed), size).image for seed in seeds])


def _caption_chunk(seeds: Sequence[int]) -> list[str]:
    return [json.dumps([WordedCaption.of(one) for one in _captions(seed)]) for seed in seeds]


def packed_masks(seeds: Sequence[int]) -> np.ndarray:
    """[N, MOST_THINGS, MASK_SIDE, MASK_SIDE / 8] uint8, the bits of each row of the scenes' silhouettes."""
    masks = np.zeros((len(seeds), MOST_THINGS, MASK_SIDE, MASK_SIDE), dtype=bool)
    for row, seed in zip(masks, seeds, strict=True):
        things = render(sample_scene(seed), MASK_SIDE).things
        row[: len(things)] = [thing.mask for thing in things]
    return np.packbits(masks, axis=-1)


def unpacked_masks(packed: np.ndarray) -> Tensor:
    """[N, MOST_THINGS, MASK_SIDE, MASK_SIDE] float32 of 0 and 1, from rows of `packed_masks`."""
    return torch.from_numpy(np.unpackbits(packed, axis=-1)).float()


def _captions(seed: int) -> list[Caption]:
    scene, rng = sample_scene(seed), random.Random(f"captions {seed}")
    varied = [varied_caption(scene, rng) for _ in range(CAPTIONS)]
    detailed = DETAILED if len(scene.things) <= DESCRIBED else 0
    return varied + [caption(scene, rng, likelihood=1.0) for _ in range(detailed)]


def varied_caption(scene: WorldScene, rng: random.Random) -> Caption:
    """A caption in random wording: at times without verbs, colours or the place, or keywords."""
    if rng.random() > 0.95:
        text, things = "", []
        for thing in scene.things:
            words = f"{thing.appearance.colour} {thing.name}"
            span = (len(text), len(text) + len(words))
            things.append(Described(thing.name, {"colour": thing.appearance.colour}, span))
            text += f"{words}, "
        return Caption(
            text + scene.background, tuple(things), (None,) * len(scene.triplets), scene.background
        )
    verbs, colours, place = rng.random() < 0.9, rng.random() < 0.92, rng.random() < 0.95
    return caption(scene, rng, verbs=verbs, colours=colours, place=place)


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
    return cached_pictures(folder, "renders", _render_chunk, scene_seeds(count, most), size)


def cached_pictures(
    folder: Path,
    kind: str,
    make: Callable[[Sequence[int], int], np.ndarray],
    seeds: Sequence[int],
    size: int,
    looked_at: int = 32,
) -> np.ndarray:
    """One picture for each seed, kept in `folder`; drawn anew when the first ones look different.

    Args:
        folder: where the cache is kept.
        kind: its file's name begins with it.
        make: draws [n, S, S, 3] uint8 of n seeds and S; of a module's top level, as workers import it.
        seeds: the first ones of a sequence that is always the same for this kind.
        size: S, height and width in pixels.
        looked_at: how many of the first ones are drawn to see whether they look different.

    Returns:
        [seeds, S, S, 3] uint8, mapped read-only from disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    look = hashlib.sha256(make(seeds[:looked_at], size).tobytes()).hexdigest()[:12]
    path, count = folder / f"{kind}-{len(seeds)}-{size}-{look}.npy", len(seeds)
    if not path.exists():

        def write(aside: Path) -> None:
            shape = (count, size, size, 3)
            store = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash in mapped memory
                with aside.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
            first = 0
            for chunk in _in_chunks(seeds, make, size):
                store[first : first + len(chunk)] = chunk
                first += len(chunk)
            store.flush()

        write_aside(path, write)
    return np.load(path, mmap_mode="r")


def cached_captions(folder: Path, count: int, most: int | None = None) -> list[list[WordedCaption]]:
    """Wordings of each of the scenes of `scene_seeds`, kept in `folder`: `CAPTIONS` and up to `DETAILED`."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = scene_seeds(count, most)
    wording = hashlib.sha256("\n".join(_caption_chunk(seeds[:64])).encode()).hexdigest()[:12]
    path = folder / f"captions-{count}-{wording}.jsonl"
    if not path.exists():
        lines = [line for chunk in _in_chunks(seeds, _caption_chunk) for line in chunk]
        write_aside(path, lambda aside: aside.write_text("\n".join(lines), encoding="utf-8"))
    lines = path.read_text(encoding="utf-8").split("\n")
    return [
        [WordedCaption(text, [(a, b) for a, b in spans]) for text, spans in json.loads(line)]
        for line in lines
    ]


def cached_masks(folder: Path, count: int, most: int | None = None) -> np.ndarray:
    """Silhouettes of the persons and objects of the scenes of `scene_seeds`, kept in `folder`.

    Returns:
        [count, MOST_THINGS, MASK_SIDE, MASK_SIDE / 8] uint8, see `packed_masks` and `WorldScene.things`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = scene_seeds(count, most)
    look = hashlib.sha256(packed_masks(seeds[:32]).tobytes()).hexdigest()[:12]
    path = folder / f"masks-{count}-{look}.npy"
    if not path.exists():
        masks = np.concatenate(_in_chunks(seeds, packed_masks))
        write_aside(path, lambda aside: np.save(aside, masks))
    return np.load(path)


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


@dataclass(frozen=True)
class CaptionedBatch:
    """Pictures of one size and their captions.

    Attributes:
        latents: [B, C, H, W].
        captions: one each; empty where it is left out.
        masks: [B, MOST_THINGS, MASK_SIDE, MASK_SIDE] silhouettes, where they are wanted.
    """

    latents: Tensor
    captions: list[WordedCaption]
    masks: Tensor | None = None

    @property
    def texts(self) -> list[str]:
        """The captions alone."""
        return [one.text for one in self.captions]


class CaptionedLatents:
    """Latents and captions of the first scenes of the world, at one or several sizes.

    Args:
        folder: where the caches are kept.
        vae: the autoencoder.
        sizes: in pixels.
        masks: whether batches have silhouettes.
    """

    def __init__(self, folder: Path, vae: Any, sizes: Mapping[int, SizeConfig], masks: bool = False):
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
        self.masks = {most: cached_masks(folder, count, most) for most, count in counts.items() if masks}

    def batch(self, rng: random.Random, empty: float) -> CaptionedBatch:
        """Latents of one size, and their captions, each empty with probability `empty`.

        The captions are of similar length, so that little of a batch is padding.
        """
        (size,) = rng.choices(list(self.sizes), [one.share for one in self.sizes.values()])
        latents, captions, config = self.latents[size], self.captions[size], self.sizes[size]
        count, most = config.batch_size, config.most
        drawn = [rng.randrange(len(latents)) for _ in range(_LENGTH_GROUPS * count)]
        worded = sorted(((rng.choice(captions[n]), n) for n in drawn), key=lambda one: len(one[0].text))
        first = rng.randrange(_LENGTH_GROUPS) * count
        wordings, chosen = zip(*worded[first : first + count], strict=True)
        masks = None
        if self.masks:
            masks = unpacked_masks(self.masks[most][list(chosen)])
        return CaptionedBatch(
            latents[list(chosen)].float(),
            [WordedCaption("") if rng.random() < empty else one for one in wordings],
            masks,
        )


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
