"""A loss by which the image attends, where a person or an object is, to the words that describe it.

After TokenCompose (arXiv 2312.03626, section 3), whose losses are of single nouns in a U-Net. Denoising alone
teaches a small model slowly which words are of whom. The renderer knows the silhouettes, and captions know
where the words of each person and object are; the denoiser sees neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from interactdiff.stickworld.layouts import MOST_THINGS
from interactdiff.token_offsets import with_offsets
from interactdiff.training.world_data import CaptionedBatch, WordedCaption


@dataclass(frozen=True)
class WordRegions:
    """Which tokens say what each person or object of a picture is, and where in the picture it is.

    Attributes:
        tokens: [B, K, T] bool; none where a caption leaves a thing out, or it is cut off.
        masks: [B, K, S, S] in [0, 1], silhouettes; things may cover one another.
    """

    tokens: Tensor
    masks: Tensor

    @classmethod
    def of(
        cls, batch: CaptionedBatch, tokenizer: PreTrainedTokenizerBase, length: int, device: torch.device
    ) -> "WordRegions":
        """Of a batch with masks; its captions are cut to `length` tokens."""
        assert batch.masks is not None
        tokens = word_tokens(tokenizer, batch.captions, length)
        return cls(tokens.to(device), batch.masks.to(device))


def word_tokens(tokenizer: PreTrainedTokenizerBase, captions: Sequence[WordedCaption], length: int) -> Tensor:
    """[B, MOST_THINGS, `length`] bool: the tokens of the words of each person and object."""
    texts, pad = [one.text for one in captions], {"padding": "max_length", "truncation": True}
    encoded = with_offsets(tokenizer)(texts, **pad, max_length=length, return_offsets_mapping=True)
    spans = [[*one.spans, *[(0, 0)] * (MOST_THINGS - len(one.spans))] for one in captions]
    first, last = torch.tensor(spans)[:, :, None].unbind(-1)  # [B, K, 1] each
    start, end = torch.tensor(encoded["offset_mapping"])[:, None].unbind(
        -1
    )  # [B, 1, T]; special tokens are empty
    return (start < end) & (start < last) & (end > first)


class WordAttention:
    """Keeps the image's queries and the text's keys of every attention over both, while a model is trained.

    Args:
        denoiser: a `UNet2DConditionModel` or a `FluxTransformer2DModel`.
    """

    def __init__(self, denoiser: nn.Module):
        self._queries: list[Tensor] = []  # [B, L, heads, D] each
        self._keys: list[Tensor] = []
        self._rotary: tuple[Tensor, ...] = ()
        if isinstance(denoiser, UNet2DConditionModel):
            for name, attention in denoiser.named_modules():
                if name.endswith("attn2"):
                    split = nn.Unflatten(-1, (cast(Any, attention).heads, -1))
                    self._keep(attention.to_q, self._queries, split)
                    self._keep(attention.to_k, self._keys, split)
        else:
            assert isinstance(denoiser, FluxTransformer2DModel)
            denoiser.pos_embed.register_forward_hook(self._keep_rotary)
            double: Any = denoiser.transformer_blocks
            single: Any = denoiser.single_transformer_blocks
            for block in double:
                self._keep(block.attn.norm_q, self._queries)
                self._keep(block.attn.norm_added_k, self._keys)
            for block in single:  # of the text and the image in a row
                self._keep(block.attn.norm_q, self._queries)
                self._keep(block.attn.norm_k, self._keys)

    def _keep(self, module: Any, kept: list[Tensor], split: nn.Module | None = None) -> None:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if module.training and torch.is_grad_enabled():
                kept.append(output if split is None else split(output))

        module.register_forward_hook(hook)

    def _keep_rotary(self, _: nn.Module, __: Any, tables: tuple[Tensor, ...]) -> None:
        self._rotary = tables

    def maps(self, length: int) -> list[Tensor]:
        """Of each layer in the order of the last forward pass `image_attention`; the pass is forgotten.

        Args:
            length: tokens T of the text.
        """
        maps = []
        for queries, keys in zip(self._queries, self._keys, strict=True):
            if self._rotary:
                tables: Any = tuple(table[length:] for table in self._rotary)
                rotated: Any = apply_rotary_emb(queries[:, -len(tables[0]) :], tables, sequence_dim=1)
                queries = rotated
            maps.append(image_attention(queries, keys[:, :length]))
        self._queries.clear()
        self._keys.clear()
        return maps

    def loss(self, regions: WordRegions, weights: Tensor) -> Tensor:
        """The mean over layers of `word_attention_loss` of the last forward pass.

        Args:
            regions: of the batch.
            weights: [B] of its examples.
        """
        with torch.autocast(weights.device.type, enabled=False):  # logarithms of small shares
            maps = self.maps(regions.tokens.shape[2])
            return torch.stack([word_attention_loss(one, regions, weights) for one in maps]).mean()


def image_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, N, T]: how the attention of image tokens to the text spreads over its tokens; the heads' mean.

    Args:
        queries: of the image, [B, N, heads, D].
        keys: of the text, [B, T, heads, D].
    """
    scores = torch.einsum("bnhd,bthd->bhnt", queries.float(), keys.float()) * queries.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)


def word_attention_loss(attention: Tensor, regions: WordRegions, weights: Tensor) -> Tensor:
    """How little the image's cells attend to the words of what is there: cross-entropy in nats.

    A cell's own share of the silhouettes says whose words it should attend to; what no silhouette covers
    should attend to the other tokens.

    Args:
        attention: [B, N, T], rows of sum 1, N the cells of a square grid.
        regions: of the batch; things without words ask for nothing where they are.
        weights: [B] of the examples.
    """
    side = isqrt(attention.shape[1])
    shares = F.adaptive_avg_pool2d(regions.masks, side).flatten(2).mT  # [B, N, K]
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
    said = regions.tokens.any(-1)  # [B, K]
    attended = attention @ regions.tokens.to(attention).mT  # [B, N, K]
    rest = attention @ (~regions.tokens.any(1)).to(attention)[:, :, None]  # [B, N, 1]
    nats = -(shares * said[:, None] * attended.clamp(min=1e-6).log()).sum(-1)
    nats = nats - (1 - shares.sum(-1)) * rest.squeeze(-1).clamp(min=1e-6).log()
    return (nats.mean(1) * weights * said.any(-1)).mean()
