"""Puts a trained Flux transformer onto another autoencoder and other text encoders.

Only what reads and writes their states is replaced: latents are rotated (orthogonal Procrustes, Schönemann
1966, which leaves the noise as it is), and states of the text mapped by least squares. All blocks are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from interactdiff.errors import RecipeError
from interactdiff.training.dit_text import TextParts
from interactdiff.training.world_data import as_images

_CHUNK = 50
_RIDGE = 1e-3  # of the least squares, as a share of a state's mean variance


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """The R with orthonormal rows (or columns) by which R x is nearest to y.

    Args:
        old: y, [N, P], with a mean of 0.
        new: x, [N, Q], with a mean of 0.

    Returns:
        [P, Q].
    """
    left, _, right = torch.linalg.svd(old.double().T @ new.double(), full_matrices=False)
    return (left @ right).float()


def affine(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The W and b by which W x + b is nearest to y, by ridge regression.

    Args:
        old: y, [N, P].
        new: x, [N, Q].

    Returns:
        [P, Q] and [P].
    """
    x, y = (new - new.mean(0)).double(), (old - old.mean(0)).double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y).T.float()
    return weight, old.mean(0) - weight @ new.mean(0)


@torch.no_grad()
def tokens_of(vae: Any, pictures: np.ndarray) -> Tensor:
    """[N, 4C] latents of a Flux transformer's tokens, of [B, S, S, 3] uint8 pictures."""
    parts = []
    for first in range(0, len(pictures), _CHUNK):
        latents = vae.encode(as_images(pictures[first : first + _CHUNK]).to(vae.device)).latents
        parts.append(FluxPipeline._pack_latents(latents, *latents.shape).flatten(0, 1).float().cpu())
    return torch.cat(parts)


def states_of_words(text: TextParts, captions: Sequence[str]) -> tuple[list[dict[int, Tensor]], Tensor]:
    """T5's state of each word by the character at which it ends, for each caption, and [B, P] pooled states.

    Words that the tokenizer does not know are left out.
    """
    unknown = text.tokenizer_2.unk_token_id
    words, pooled = [], []
    for first in range(0, len(captions), _CHUNK):
        some = list(captions[first : first + _CHUNK])
        states, whole = text.states(*text.tokens(some))
        pooled.append(whole.float().cpu())
        read = text.tokenizer_2(some, return_offsets_mapping=True)
        for n, ids in enumerate(read["input_ids"]):
            ends = ((at, end) for at, (start, end) in enumerate(read["offset_mapping"][n]) if end > start)
            known = {end: at for at, end in ends if at < states.shape[1] and ids[at] != unknown}
            words.append({end: states[n, at].float().cpu() for end, at in known.items()})
    return words, torch.cat(pooled)


def transferred(
    folder: str | Path, vae: Any, text: TextParts, pictures: np.ndarray, captions: Sequence[str]
) -> FluxTransformer2DModel:
    """A Flux pipeline's transformer for another autoencoder and other text encoders.

    Args:
        folder: a `FluxPipeline` with an `AutoencoderTiny`.
        vae: the new autoencoder, with the old one's factor.
        text: the new text encoders.
        pictures: [B, S, S, 3] uint8, encoded by both autoencoders.
        captions: encoded by both pairs of text encoders.

    Raises:
        RecipeError: the autoencoders have different factors, or no word of the captions is known to both.
    """
    make: Any = FluxTransformer2DModel
    source = make.from_pretrained(folder, subfolder="transformer").float()
    old_text = TextParts(folder, torch.device("cpu"))
    load: Any = AutoencoderTiny.from_pretrained(folder, subfolder="vae")
    ours, theirs = tokens_of(vae, pictures), tokens_of(load.float().eval(), pictures)
    if len(ours) != len(theirs):
        raise RecipeError(
            "transfer_from: expected an autoencoder of the same factor, "
            f"got one of {len(theirs)} tokens for {len(ours)}"
        )
    rotate = rotation(theirs - theirs.mean(0), ours - ours.mean(0))
    (new_words, new_pooled), (old_words, old_pooled) = (
        states_of_words(parts, captions) for parts in (text, old_text)
    )
    pairs = [
        (old[end], new[end])
        for old, new in zip(old_words, new_words, strict=True)
        for end in old.keys() & new.keys()
    ]
    if not pairs:
        raise RecipeError("transfer_from: expected text encoders that know some words of ours, got none")
    read, read_bias = affine(*(torch.stack(states) for states in zip(*pairs, strict=True)))
    pool, pool_bias = affine(old_pooled, new_pooled)

    sizes = {"in_channels": ours.shape[1], "joint_attention_dim": read.shape[1]}
    config = dict(source.config) | sizes | {"pooled_projection_dim": pool.shape[1], "out_channels": None}
    target: Any = FluxTransformer2DModel.from_config(config)
    state = source.state_dict()
    pooled_layer = "time_text_embed.text_embedder.linear_1"
    for name, weight, bias in (("context_embedder", read, read_bias), (pooled_layer, pool, pool_bias)):
        state[f"{name}.bias"] = state[f"{name}.bias"] + state[f"{name}.weight"] @ bias
        state[f"{name}.weight"] = state[f"{name}.weight"] @ weight
    state["x_embedder.weight"] = state["x_embedder.weight"] @ rotate
    state["proj_out.weight"], state["proj_out.bias"] = (
        rotate.T @ state[f"proj_out.{part}"] for part in ("weight", "bias")
    )
    target.load_state_dict(state)
    return target
