"""What the bases are trained on: renders, silhouettes, captions and latents, and how batches are drawn."""

import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from recipes import VAE, short

from interactdiff.errors import RecipeError
from interactdiff.stickworld.layouts import MOST_THINGS, sample_scene
from interactdiff.stickworld.render import render
from interactdiff.training.base import BaseConfig
from interactdiff.training.config import checked
from interactdiff.training.world_data import (
    CAPTIONS,
    DESCRIBED,
    DETAILED,
    MASK_SIDE,
    CaptionedLatents,
    SizeConfig,
    as_images,
    cached_captions,
    cached_masks,
    cached_renders,
    scene_seeds,
)


@pytest.fixture
def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderTiny(**VAE).eval()


def test_renders_are_the_scenes_in_order(tmp_path: Path) -> None:
    renders = cached_renders(tmp_path, 3)
    assert renders.shape == (3, 128, 128, 3)
    for seed in range(3):
        assert np.array_equal(renders[seed], render(sample_scene(seed)).image)


def test_masks_are_the_silhouettes(tmp_path: Path) -> None:
    masks = np.unpackbits(cached_masks(tmp_path, 5, 3), axis=-1)
    assert masks.shape == (5, MOST_THINGS, MASK_SIDE, MASK_SIDE)
    fitting = (seed for seed in range(100) if len(sample_scene(seed).things) <= 3)
    for row, seed in zip(masks, fitting, strict=False):
        things = render(sample_scene(seed), MASK_SIDE).things
        assert all(np.array_equal(one, thing.mask) for one, thing in zip(row, things, strict=False))
        assert not row[len(things) :].any()


def test_captions_are_those_of_the_renders_and_kept(tmp_path: Path) -> None:
    captions = cached_captions(tmp_path, 12)
    counts = [len(sample_scene(seed).things) for seed in range(12)]
    assert min(counts) <= DESCRIBED < max(counts)
    assert [len(one) for one in captions] == [CAPTIONS + DETAILED * (count <= DESCRIBED) for count in counts]
    for seed, one in enumerate(captions):
        names = [thing.name for thing in sample_scene(seed).things]
        said = [
            value for thing in sample_scene(seed).things for value in thing.appearance.attributes().values()
        ]
        words = {"stripes": "strip", "dots": "dot", "checks": "check", "plain": "", "none": ""}
        assert all(words.get(value, value) in text for text, _ in one[CAPTIONS:] for value in said)
        for text, spans in one:
            own = [text[first:last] for first, last in spans]
            assert all(name in words or "someone" in words for name, words in zip(names, own, strict=True))
    (made,) = tmp_path.glob("captions-*")
    before = made.stat().st_mtime_ns
    assert cached_captions(tmp_path, 12) == captions
    assert made.stat().st_mtime_ns == before


def test_sizes_come_as_often_as_their_shares(tmp_path: Path, vae: Any) -> None:
    sizes = {
        64: {"renders": 4, "batch_size": 3, "share": 0.75, "most": 1},
        128: {"renders": 2, "batch_size": 1, "share": 0.25},
    }
    data = CaptionedLatents(tmp_path, vae, {size: SizeConfig(**one) for size, one in sizes.items()})
    seeds = scene_seeds(4, 1)
    assert [len(sample_scene(seed).things) for seed in seeds] == [1] * 4
    assert [seed for seed in range(seeds[-1] + 1) if len(sample_scene(seed).things) == 1] == seeds
    for row, seed in enumerate(seeds):
        name = sample_scene(seed).things[0].name
        assert all(name in text or "someone" in text for text, _ in data.captions[64][row])
        pixels = as_images(render(sample_scene(seed), 64).image[None])
        assert torch.allclose(data.latents[64][row].float(), vae.encode(pixels).latents[0], atol=1e-2)
    rng = random.Random(0)
    shapes = Counter(tuple(data.batch(rng, 0.5).latents.shape) for _ in range(200))
    assert shapes.keys() == {(3, 4, 8, 8), (1, 4, 16, 16)}
    assert 0.6 < shapes[3, 4, 8, 8] / 200 < 0.9
    with pytest.raises(RecipeError, match=r"sizes: expected shares of the sizes that add up to 1, got 0\.75"):
        checked(BaseConfig, short(tmp_path, "stickworld_base", sizes={64: sizes[64]}))


def test_captions_of_a_batch_are_of_similar_length(tmp_path: Path, vae: Any) -> None:
    data = CaptionedLatents(tmp_path, vae, {64: SizeConfig(renders=12, batch_size=6, share=1.0)}, masks=True)
    masks = torch.from_numpy(np.unpackbits(cached_masks(tmp_path, 12), axis=-1)).float()
    rng = random.Random(0)
    drawn = [data.batch(rng, 0.0) for _ in range(40)]
    for batch in drawn:  # each with its own picture and silhouettes
        assert batch.masks is not None
        for one, worded, shown in zip(batch.latents, batch.captions, batch.masks, strict=True):
            row = next(n for n, known in enumerate(data.captions[64]) if worded in known)
            assert torch.equal(one, data.latents[64][row].float())
            assert torch.equal(shown, masks[row])
    everything = [len(text) for batch in drawn for text in batch.texts]
    spread = sum(statistics.pstdev(map(len, batch.texts)) for batch in drawn) / len(drawn)
    assert spread < 0.5 * statistics.pstdev(everything)
