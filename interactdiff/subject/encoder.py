"""The subject encoder (DreamTuner, section 3.1): a picture's tokens, and what attends to them at each site.

The mapper is that of the published weights: the five layers of the image tower come one after the other as
tokens. The paper concatenates them along channels; its sizes are not given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

LAYERS = (-1, 4, 8, 12, 16)
"""Which hidden states of the image tower are read, in this order; -1 is the last, before its norm."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class KeysValues(NamedTuple):
    """Of subjects' tokens at one site, [S, heads, M, D] each: the same at every step of a run."""

    keys: Tensor
    values: Tensor


def image_tower(config: dict[str, Any]) -> CLIPVisionModel:
    """A CLIP image tower of transformers, which is frozen: no gradients, always in eval mode."""
    tower: Any = CLIPVisionModel(cast(Any, CLIPVisionConfig)(**config))
    return tower.requires_grad_(False).eval()


def squared(picture: Image.Image, side: int) -> Image.Image:
    """A picture, padded with white to a square and resized."""
    longer = max(picture.size)
    square = Image.new("RGB", (longer, longer), "white")
    square.paste(picture, ((longer - picture.width) // 2, (longer - picture.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def tower_pixels(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """[B, 3, side, side] that the tower takes: padded with white to a square, resized, in CLIP's units."""
    rows = []
    for picture in pictures:
        pixels = torch.frombuffer(bytearray(squared(picture, side).tobytes()), dtype=torch.uint8)
        rows.append(pixels.view(side, side, 3).permute(2, 0, 1).float() / 255)
    return in_clip_units(torch.stack(rows))


def in_clip_units(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] to what a CLIP image tower takes: each channel less its mean, in deviations."""
    mean, std = (pixels.new_tensor(one)[:, None, None] for one in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


class Mapper(nn.Module):
    """Tokens of the image tower's layers: LN(W ReLU(Y)), of Y_i = W_i LN(E_i) + b_i of each layer.

    Module names are the published ones.

    Args:
        width: of the tower.
        token_dim: of the tokens.
        layers: how many of the tower's layers are read.
    """

    def __init__(self, width: int, token_dim: int, layers: int = len(LAYERS)):
        super().__init__()
        self.layers = layers
        self.in_norm = nn.LayerNorm(width)
        for n in range(layers):
            self.add_module(f"w_{n}", nn.Linear(width, width))
        self.proj = nn.Linear(width, token_dim)
        self.out_norm = nn.LayerNorm(token_dim)

    def forward(self, states: Tensor) -> Tensor:
        """[B, layers * T, token_dim] of [B, layers, T, width] hidden states."""
        normed = self.in_norm(states)
        mapped = [getattr(self, f"w_{n}")(normed[:, n]) for n in range(self.layers)]
        return self.out_norm(self.proj(F.relu(torch.cat(mapped, 1))))


class SubjectAttention(nn.Module):
    """Subject-encoder attention: of a U-Net's block, or, on the base's own queries, of a transformer.

    Its output projection is zero at the start, so the base stays as it is. Names are the published ones.

    Args:
        dim: width of the site.
        token_dim: width of the tokens.
        heads: the site's own number.
        own_queries: whether it makes queries of the site's states; else the site's queries are given.
    """

    def __init__(self, dim: int, token_dim: int, heads: int, own_queries: bool = True):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False) if own_queries else None
        self.to_k = nn.Linear(token_dim, dim, bias=False)
        self.to_v = nn.Linear(token_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Of [S, M, token_dim] tokens."""
        return KeysValues(self._by_head(self.to_k(tokens)), self._by_head(self.to_v(tokens)))

    def forward(self, queries: Tensor, subjects: KeysValues) -> Tensor:
        """Attend.

        Args:
            queries: [R, L, dim] normalised states of a U-Net's block, or [R, heads, L, D].
            subjects: keys and values, a row for each of the queries' or one for all.

        Returns:
            [R, L, dim].
        """
        return self.to_out[0](self.attend(self.queries(queries), subjects))

    def queries(self, states: Tensor) -> Tensor:
        """[R, heads, L, D] queries of normalised states, or those that the site has."""
        return states if self.to_q is None else self._by_head(self.to_q(states))

    def attend(self, queries: Tensor, subjects: KeysValues) -> Tensor:
        """[R, L, dim], what queries [R, heads, L, D] gather, before the output projection."""
        keys, values = (one.expand(len(queries), -1, -1, -1) for one in subjects)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return attended.transpose(1, 2).flatten(2)

    def _by_head(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def subject_attention_oracle(
    attention: SubjectAttention, norm: nn.LayerNorm, h: Tensor, tokens: Tensor, weight: float
) -> Tensor:
    """h + beta SEA(LN h, SE(r)), Eq. 1, one head after the other: slow, for tests to compare with.

    Args:
        attention: the weights, with queries of its own.
        norm: LN.
        h: [L, dim], what the block has after its self-attention.
        tokens: [M, token_dim], SE(r).
        weight: beta.
    """
    assert attention.to_q is not None
    heads = []
    for part in torch.arange(h.shape[1]).chunk(attention.heads):
        q = norm(h) @ attention.to_q.weight[part].T
        k, v = (tokens @ layer.weight[part].T for layer in (attention.to_k, attention.to_v))
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    out = cast(nn.Linear, attention.to_out[0])
    return h + weight * (torch.cat(heads, -1) @ out.weight.T + out.bias)
