"""Whether the words of a thing look where the thing is: cross-attention on renders, against their masks.

A render is encoded and made a little noisy, and the denoiser is called with the scene's caption. The map of a
thing is the attention of the image's tokens to the tokens of its words (for an object its noun and the
adjectives before it, for a person the whole description), averaged over words, heads, layers and noise
levels; of a U-Net the layers of the finest grid count, of a Flux transformer all of them. It is squared,
refined twice by the image's attention to itself over the same layers (as DiffSegmenter does, Wang et al.,
2023), normalised to 0..1, enlarged to the render's size, and cut at `THRESHOLD`. Its IoU with the thing's
mask is averaged over things.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from interactdiff.models import ModelError
from interactdiff.pipeline_calls import call_arguments
from interactdiff.sites import denoiser_of
from interactdiff.stickworld.captions import Described
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import WorldScene

NOISE_LEVELS = (0.1, 0.2, 0.3)  # shares of the training steps; of a flow, the share of noise
REFINEMENTS = 2
THRESHOLD = 0.45  # of a normalised map; Otsu's for each map is no better


@dataclass
class WordAttention:
    """Attention of the image's N tokens, summed over layers and calls, by N.

    Attributes:
        to_words: [N, T] to the text's tokens.
        to_image: [N, N] to each other.
    """

    to_words: dict[int, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.zeros(())))
    to_image: dict[int, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.zeros(())))

    @property
    def finest(self) -> tuple[Tensor, Tensor]:
        """Both of the finest grid that attends to words, each row of the second with sum 1.

        Where nothing there attends to the image, every token attends to itself alone.
        """
        tokens = max(self.to_words)
        to_image = self.to_image.get(tokens, torch.eye(tokens))
        return self.to_words[tokens], F.normalize(to_image, p=1.0, dim=1)


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
    values: dict[str, list[float]] = {"objects": [], "persons": []}
    pipeline.set_progress_bar_config(disable=True)
    for scene in scenes:
        drawn = render(scene, size)
        to_words, to_image = attention(pipeline, scene.caption, drawn.image, seed).finest
        for described, thing in zip(scene.described.things, drawn.things, strict=True):
            tokens = word_tokens(
                pipeline, scene.caption, word_span(scene.caption, described), len(to_words[0])
            )
            overlap = 0.0
            if tokens:
                overlap = mask_iou(word_mask(word_map(to_words, to_image, tokens), size), thing.mask)
            values["persons" if described.name == "person" else "objects"].append(overlap)
    return {kind: float(np.mean(ious)) if ious else 0.0 for kind, ious in values.items()}


@torch.no_grad()
def attention(pipeline: Any, caption: str, image: np.ndarray, seed: int) -> WordAttention:
    """Call the denoiser on a picture with its caption, at low noise, and record its attention.

    Args:
        pipeline: with a U-Net or a Flux transformer.
        caption: what the picture shows.
        image: [S, S, 3] uint8.
        seed: of the noise.
    """
    denoiser = denoiser_of(pipeline)
    size = image.shape[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    encoded = pipeline.vae.encode(pixels.to(denoiser.device, pipeline.vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    config = pipeline.vae.config
    latents = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    arguments = conditioning(pipeline, caption, size)
    with recorded(denoiser) as weights:
        for level in NOISE_LEVELS:
            _denoise(pipeline, latents, noise, level, arguments)
    return weights


def conditioning(pipeline: Any, caption: str, size: int) -> dict[str, Any]:
    """What a pipeline calls its denoiser with for a caption, but for the latents and the time step."""
    kept: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.update(kwargs)

    hook = denoiser_of(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(
            **call_arguments(pipeline, caption, guidance_scale=1.0),
            num_inference_steps=1,
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    finally:
        hook.remove()
    return {name: value for name, value in kept.items() if name not in ("hidden_states", "timestep")}


def _denoise(pipeline: Any, latents: Tensor, noise: Tensor, level: float, arguments: dict[str, Any]) -> None:
    """Call the denoiser at a noise level: a share of a diffusion's steps, the share of noise of a flow."""
    steps = pipeline.scheduler.config.num_train_timesteps
    if hasattr(pipeline.scheduler, "alphas_cumprod"):
        kept = pipeline.scheduler.alphas_cumprod[int(level * steps)].to(latents)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    else:
        noisy = (1 - level) * latents + level * noise
    time = torch.full((1,), level, device=latents.device)
    if hasattr(pipeline, "unet"):
        pipeline.unet(noisy.to(pipeline.unet.dtype), (time * steps).long(), **arguments)
    else:
        packed = pipeline._pack_latents(noisy.to(pipeline.transformer.dtype), *noisy.shape)
        pipeline.transformer(hidden_states=packed, timestep=time.to(packed.dtype), **arguments)


@contextmanager
def recorded(denoiser: Any) -> Iterator[WordAttention]:
    """Record the attention of all calls of a denoiser within the block.

    Raises:
        ModelError: it is neither a U-Net nor a Flux transformer.
    """
    weights = WordAttention()
    modules = list(denoiser.modules())
    blocks = [module for module in modules if isinstance(module, BasicTransformerBlock)]
    sites: list[tuple[Any, Callable[..., None]]]
    if isinstance(denoiser, FluxTransformer2DModel):
        joint = cast(Any, [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks])
        sites = [(block.attn, _record_joint) for block in joint]
    elif blocks and "encoder_hid_dim" in denoiser.config:  # of a `UNet2DConditionModel`
        sites = [
            (block.attn1, _record_cross if block.only_cross_attention else _record_own) for block in blocks
        ]
        sites += [(block.attn2, _record_cross) for block in blocks if block.attn2 is not None]
    else:
        raise ModelError(f"expected a U-Net or a Flux transformer, got a {type(denoiser).__name__}")
    length = {"text": 0}

    def keep_length(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        length["text"] = kwargs["encoder_hidden_states"].shape[1]

    hooks = [denoiser.register_forward_pre_hook(keep_length, with_kwargs=True)]
    for attn, record in sites:
        hooks.append(attn.register_forward_pre_hook(partial(record, weights, length), with_kwargs=True))
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _heads(attn: Any, name: str, norm: str, states: Tensor) -> Tensor:
    """[1, N, W] states projected and normed: [1, N, H, D]."""
    projected = getattr(attn, name)(states).unflatten(-1, (attn.heads, -1))
    normed = getattr(attn, norm, None)
    return projected if normed is None else normed(projected)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """[N, M] attention of [1, N, H, D] queries to [1, M, H, D] keys, averaged over heads."""
    scores = torch.einsum("nhd,mhd->hnm", queries[0].float(), keys[0].float())
    return (scores * queries.shape[-1] ** -0.5).softmax(-1).mean(0).cpu()


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden, kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)


def _record_own(weights: WordAttention, length: dict[str, int], attn: Any, args: Any, kwargs: Any) -> None:
    hidden, _ = _states(args, kwargs)
    own = _weights(_heads(attn, "to_q", "norm_q", hidden), _heads(attn, "to_k", "norm_k", hidden))
    weights.to_image[hidden.shape[1]] = weights.to_image[hidden.shape[1]] + own


def _record_cross(weights: WordAttention, length: dict[str, int], attn: Any, args: Any, kwargs: Any) -> None:
    hidden, text = _states(args, kwargs)
    if text is None:
        return
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    cross = _weights(_heads(attn, "to_q", "norm_q", hidden), _heads(attn, "to_k", "norm_k", text))
    weights.to_words[hidden.shape[1]] = weights.to_words[hidden.shape[1]] + cross


def _record_joint(weights: WordAttention, length: dict[str, int], attn: Any, args: Any, kwargs: Any) -> None:
    """Of a double block, where the text has projections of its own, or a single one, where it comes first."""
    hidden, text = _states(args, kwargs)
    queries = _heads(attn, "to_q", "norm_q", hidden)
    keys = _heads(attn, "to_k", "norm_k", hidden)
    if text is not None:
        queries = torch.cat([_heads(attn, "add_q_proj", "norm_added_q", text), queries], 1)
        keys = torch.cat([_heads(attn, "add_k_proj", "norm_added_k", text), keys], 1)
    if (rotary := kwargs.get("image_rotary_emb")) is not None:
        queries, keys = (
            cast(Tensor, apply_rotary_emb(states, rotary, sequence_dim=1)) for states in (queries, keys)
        )
    words = length["text"]
    both = _weights(queries[:, words:], keys)
    tokens = len(both)
    weights.to_words[tokens] = weights.to_words[tokens] + both[:, :words]
    weights.to_image[tokens] = weights.to_image[tokens] + both[:, words:]


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
    offsets = getattr(pipeline, last)(caption, return_offsets_mapping=True)["offset_mapping"]
    return [n for n, (a, b) in enumerate(offsets[:limit]) if a < b and a < span[1] and b > span[0]]


def word_map(to_words: Tensor, to_image: Tensor, tokens: Sequence[int]) -> Tensor:
    """[N] in 0..1: where the image looks at some of the text's tokens, squared and refined.

    Args:
        to_words: [N, T] attention to the text.
        to_image: [N, N] attention to the image, rows with sum 1.
        tokens: of the words.
    """
    looked = to_words[:, list(tokens)].mean(1).square()
    for _ in range(REFINEMENTS):
        looked = to_image @ looked
    return (looked - looked.min()) / (looked.max() - looked.min()).clamp(min=1e-12)


def word_mask(looked: Tensor, size: int) -> np.ndarray:
    """[S, S] bool: a map over a square grid, enlarged to `size` pixels a side, above `THRESHOLD`."""
    side = round(len(looked) ** 0.5)
    enlarged = F.interpolate(looked.view(1, 1, side, side), (size, size), mode="bilinear")[0, 0]
    return enlarged.numpy() > THRESHOLD


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    return float((one & other).sum() / max((one | other).sum(), 1))
