"""Whether the words of a thing look where the thing is: cross-attention on renders, against their masks.

A render is encoded and made a little noisy, and the denoiser is called with the scene's caption. The map of a
thing is the attention of the image's tokens to the tokens of its words (for an object its noun and the
adjectives before it, for a person the whole description), averaged over words, heads, layers and noise
levels; of a U-Net the layers of the finest grid count, of a Flux transformer all of them. It is squared, of
a transformer refined twice by the image's attention to itself over the same layers (as DiffSegmenter does,
Wang et al., 2023), normalised to 0..1, enlarged to the render's size, and cut at `THRESHOLD`. Its IoU with
the thing's mask is averaged over things. In a U-Net self-attention is a layer of its own and may look
anywhere: maps that are refined by it are worse (docs/stickworld.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.binding import ConceptBinding
from interactdiff.concept.capture import AttentionCapture, Layers
from interactdiff.concept.denoising import Denoising
from interactdiff.concept.masks import from_zero_to_one
from interactdiff.handle import attach
from interactdiff.models import ModelError
from interactdiff.sites import Denoiser, denoiser_of, find_sites, known_family
from interactdiff.stickworld.captions import Described
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import WorldScene
from interactdiff.token_offsets import with_offsets

NOISE_LEVELS = (100, 200, 300)  # of 1000 timesteps; of a flow, thousandths of noise
REFINEMENTS = 2
THRESHOLD = 0.45  # of a normalised map; Otsu's for each map is no better


def word_iou(pipeline: Any, scenes: Sequence[WorldScene], size: int, seed: int) -> dict[str, float]:
    """Mean IoU of the maps of things' words with their masks, on renders of scenes.

    Args:
        pipeline: with a U-Net or a Flux transformer, and no adapter that acts.
        scenes: whose renders and own captions are looked at.
        size: height and width of the renders in pixels.
        seed: of the noise.

    Returns:
        {"objects": IoU, "persons": IoU} in 0..1; a kind that does not occur has 0. A thing whose words the
        text encoder cuts off counts 0.

    Raises:
        ModelError: the denoiser is neither a U-Net nor a Flux transformer.
    """
    denoiser = denoiser_of(pipeline)
    if known_family(denoiser).name not in ("U-Net", "Flux"):
        raise ModelError(f"expected a U-Net or a Flux transformer, got a {type(denoiser).__name__}")
    values: dict[str, list[float]] = {"objects": [], "persons": []}
    adapter = ConceptAdapter.for_pipeline(pipeline).named("words")  # has no words of its own: it observes
    with attach(pipeline, adapter) as handle:
        for scene in scenes:
            drawn = render(scene, size)
            capture = captured(pipeline, handle[adapter.name], scene.caption, drawn.image, seed)
            for described, thing in zip(scene.described.things, drawn.things, strict=True):
                span = word_span(scene.caption, described)
                tokens = word_tokens(pipeline, scene.caption, span, capture.text_length)
                overlap = 0.0
                if tokens:
                    overlap = mask_iou(word_mask(word_map(capture, tokens), size), thing.mask)
                values["persons" if described.name == "person" else "objects"].append(overlap)
    return {kind: float(np.mean(ious)) if ious else 0.0 for kind, ious in values.items()}


def word_layers(denoiser: Denoiser) -> Layers:
    """Of a U-Net the finest grid's attentions to words, of a transformer all, which refine maps too."""
    sites = find_sites(denoiser)
    if joint := tuple(site.path for site in sites if site.role in ("joint", "single")):
        return Layers(joint, joint)
    cross = [site for site in sites if site.role == "cross"]
    finest = min(site.level for site in cross)
    return Layers(tuple(site.path for site in cross if site.level == finest), ())


@torch.no_grad()
def captured(
    pipeline: Any, binding: ConceptBinding, caption: str, image: np.ndarray, seed: int
) -> AttentionCapture:
    """Call the denoiser on a picture with its caption, at low noise, and keep its queries and keys.

    Args:
        pipeline: with a U-Net or a Flux transformer.
        binding: of a concept adapter that is attached to it; observes.
        caption: what the picture shows.
        image: [S, S, 3] uint8.
        seed: of the noise, the same at every level.

    Returns:
        A row for each of `NOISE_LEVELS`.
    """
    denoising, rows = Denoising.of(pipeline), len(NOISE_LEVELS)
    latents = denoising.latents(Image.fromarray(image))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    latents, noise = (one.expand(rows, -1, -1, -1) for one in (latents, noise))
    times = torch.tensor(NOISE_LEVELS, device=denoising.device)
    prompt = denoising.encode([caption], (image.shape[0], image.shape[1])).repeated(rows)
    capture = AttentionCapture(denoising.denoiser, word_layers(denoising.denoiser))
    with binding.capturing(capture):
        denoising.predict(denoising.noisy(latents, noise, times), times, prompt)
    return capture


def word_span(caption: str, thing: Described) -> tuple[int, int]:
    """First and last + 1 character of a thing's own words: of an object its noun and what precedes that."""
    first, last = thing.span
    if thing.name == "person":
        return first, last
    words = caption[first:last].partition(" with ")[0]
    article = len(words.partition(" ")[0]) + 1
    return first + article, first + len(words)


def word_tokens(pipeline: Any, caption: str, span: tuple[int, int], limit: int) -> list[int]:
    """Which tokens of a caption, of the first `limit`, overlap a span of its characters."""
    last = "tokenizer_2" if hasattr(pipeline, "transformer") else "tokenizer"
    tokenizer = with_offsets(getattr(pipeline, last))
    offsets = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
    return [n for n, (a, b) in enumerate(offsets[:limit]) if a < b and a < span[1] and b > span[0]]


@torch.no_grad()
def word_map(capture: AttentionCapture, tokens: Sequence[int]) -> Tensor:
    """[h, w] in 0..1: where the image looks at some of the text's tokens, squared and refined.

    Rows of the image's attention to itself, summed over layers and noise levels, are normalised to sum 1.
    Where there are no layers that look at the image itself, maps are not refined.

    Args:
        capture: with a row for each noise level.
        tokens: of the words.
    """
    looked = from_zero_to_one(capture.columns([list(tokens)]).mean(0, keepdim=True).square())
    for _ in range(REFINEMENTS if capture.has_own else 0):
        both = torch.cat([looked, torch.ones_like(looked)], 1)
        gathered, reached = capture.spread(both, renormalised=False).mean(0, keepdim=True).split(1, 1)
        looked = gathered / reached
    return from_zero_to_one(looked)[0, 0].cpu()


def word_mask(looked: Tensor, size: int) -> np.ndarray:
    """[S, S] bool: a map [h, w], enlarged to `size` pixels a side, above `THRESHOLD`."""
    enlarged = F.interpolate(looked[None, None], (size, size), mode="bilinear")[0, 0]
    return enlarged.numpy() > THRESHOLD


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    return float((one & other).sum() / max((one | other).sum(), 1))
