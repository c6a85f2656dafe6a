"""Attention processors that attend to other keys than stock ones do, one for each kind of stock processor.

They follow diffusers' own step by step, and differ where those attend to everything. The controller puts one
in the place of the stock processor while a call runs in which keys are chosen (`OwnKeys`) or added
(`ExtraKeys`).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from interactdiff.adapter import KeyBlock
from interactdiff.errors import AdapterError
from interactdiff.merge import merged_attention
from interactdiff.sites import Site

OwnKeysFn = Callable[[Tensor, Tensor, Tensor, int, Sequence[KeyBlock]], Tensor]
ExtraKeysFn = Callable[[], Sequence[KeyBlock]]
RecordFn = Callable[[Tensor, Tensor], None]
QKV = tuple[Tensor, Tensor, Tensor]


class KeysProcessor:
    """What the processors share.

    Attributes:
        own: attends to keys of its own choice, see `OwnKeys`; None for all keys.
        extra: each gives further keys, see `ExtraKeys`.
        records: each is given the image's own keys and values, likewise.
        text_length: text tokens of the call under way.
        image_length: image tokens of the call under way.

    Args:
        site: where it acts.
        original: the stock processor that it stands in for.
    """

    def __init__(self, site: Site, original: Any):
        self.site, self.original = site, original
        self.own: OwnKeysFn | None = None
        self.extra: tuple[ExtraKeysFn, ...] = ()
        self.records: tuple[RecordFn, ...] = ()
        self.text_length = self.image_length = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, text_length: int) -> Tensor:
        """What is gathered, [B, L, heads * D], of [B, heads, L, D] in the site's order of text and image."""
        if self.records:
            image = self._image(text_length, key.shape[2])
            for record in self.records:
                record(key[:, :, image], value[:, :, image])
        extra = [block for blocks in self.extra for block in blocks()]
        if self.own is not None:
            out = self.own(query, key, value, text_length, extra)
        else:
            out = self._plain(query, key, value, text_length, extra)
        return out.to(query.dtype).transpose(1, 2).flatten(2)

    def refuse_mask(self, attention_mask: object) -> None:
        """Raise `AdapterError` if there is a mask: it would be of other keys than those that are used."""
        if attention_mask is not None:
            raise AdapterError(
                f"expected no attention mask beside windows or further keys at {self.site.path}, got one"
            )

    def _image(self, text_length: int, length: int) -> slice:
        """Which of a number of tokens are the image's."""
        first = text_length if self.site.text == "first" else 0
        return slice(first, first + length - text_length)

    def _plain(
        self, query: Tensor, key: Tensor, value: Tensor, text_length: int, extra: Sequence[KeyBlock]
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5
        if not extra:
            return F.scaled_dot_product_attention(query, key, value)
        if not text_length:
            return merged_attention(query, key, value, extra, scale)
        first = self.site.text == "first"
        parts = list(query.split([text_length, query.shape[2] - text_length][:: 1 if first else -1], 2))
        text, image = (0, 1) if first else (1, 0)
        parts[text] = F.scaled_dot_product_attention(parts[text], key, value)
        parts[image] = merged_attention(parts[image], key, value, extra, scale)
        return torch.cat(parts, 2)


class FluxKeysProcessor(KeysProcessor):
    """For Flux and Chroma: joint blocks, where text comes apart, and single ones, where it comes first."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; [B, L, C] states, of the image in joint blocks and of both in single ones.

        Raises:
            AdapterError: there is a mask, or no rotary table.
        """
        self.refuse_mask(attention_mask)
        if image_rotary_emb is None:
            raise AdapterError("expected image_rotary_emb, the tables of rotary positions, got none")
        text_length = self.text_length
        query, key, value = _streams(attn, hidden_states, encoder_hidden_states)
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
        query, key = (_rotated(t, image_rotary_emb) for t in (query, key))
        out = self.attend(*_heads_first(query, key, value), text_length)
        if encoder_hidden_states is None:
            return out
        text_out, out = out[:, :text_length], out[:, text_length:]
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(text_out)


class Flux2SingleKeysProcessor(KeysProcessor):
    """For Flux2's single blocks, where one projection makes queries, keys, values and the MLP's input."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend; [B, L, C] states of text and image.

        Raises:
            AdapterError: there is a mask.
        """
        self.refuse_mask(attention_mask)
        assert image_rotary_emb is not None
        qkv, mlp = attn.to_qkv_mlp_proj(hidden_states).split(
            [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], -1
        )
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv.chunk(3, -1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (_rotated(t, image_rotary_emb) for t in (query, key))
        out = self.attend(*_heads_first(query, key, value), self.text_length)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], -1))


class JointKeysProcessor(KeysProcessor):
    """For SD3: text after the image; and SD3.5's second attention, of the image alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: object,
        **__: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; [B, H * W, C] states of the image and [B, T, C] of the text.

        Raises:
            AdapterError: there is a mask.
        """
        self.refuse_mask(attention_mask)
        length = hidden_states.shape[1]
        parts = [_projected(attn, hidden_states, ("to_q", "to_k", "to_v"), attn.norm_q, attn.norm_k)]
        text_length = 0
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            parts.append(_projected(attn, encoder_hidden_states, names, attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(both, 2) for both in zip(*parts, strict=True))
        out = self.attend(query, key, value, text_length)
        out, text_out = out[:, :length], out[:, length:]
        out = attn.to_out[1](attn.to_out[0](out))
        if encoder_hidden_states is None:
            return out
        return out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


class QwenKeysProcessor(KeysProcessor):
    """For Qwen-Image: text before the image, rotary positions of complex numbers, one table for each."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; [B, L, C] states of the image and of the text.

        Raises:
            AdapterError: there is a mask.
        """
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        self.refuse_mask(attention_mask)
        self.refuse_mask(encoder_hidden_states_mask)
        assert encoder_hidden_states is not None
        assert image_rotary_emb is not None
        length = encoder_hidden_states.shape[1]
        query, key, value = _streams(attn, hidden_states, encoder_hidden_states)
        table = torch.cat([image_rotary_emb[1], image_rotary_emb[0]])
        query, key = (cast(Tensor, apply_rotary_emb_qwen(t, table, use_real=False)) for t in (query, key))
        out = self.attend(*_heads_first(query, key, value), length)
        text_out, out = out[:, :length], out[:, length:]
        for layer in attn.to_out:
            out = layer(out)
        return out, attn.to_add_out(text_out)


class ZImageKeysProcessor(KeysProcessor):
    """For Z-Image: the image's tokens first, then what pads them and the text's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Attend; [B, L, C] states of all tokens.

        Raises:
            AdapterError: there is a mask, as for prompts of different lengths.
        """
        self.refuse_mask(attention_mask)
        query, key, value = (
            getattr(attn, name)(hidden_states).unflatten(-1, (attn.heads, -1))
            for name in ("to_q", "to_k", "to_v")
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if freqs_cis is not None:
            query, key = (_rotated_complex(t, freqs_cis) for t in (query, key))
        out = self.attend(*_heads_first(query, key, value), query.shape[1] - self.image_length)
        for layer in attn.to_out:
            out = layer(out)
        return out


class SelfKeysProcessor(KeysProcessor):
    """For the self-attention of a U-Net's blocks; in slices of heads, where the stock processor has them."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: object,
        **__: object,
    ) -> Tensor:
        """Attend; [B, H * W, C] states.

        Raises:
            AdapterError: there is a mask.
        """
        self.refuse_mask(attention_mask)
        query, key, value = _projected(
            attn, hidden_states, ("to_q", "to_k", "to_v"), attn.norm_q, attn.norm_k
        )
        out = attn.to_out[1](attn.to_out[0](self.attend(query, key, value, 0)))
        return out / attn.rescale_output_factor

    def _plain(
        self, query: Tensor, key: Tensor, value: Tensor, text_length: int, extra: Sequence[KeyBlock]
    ) -> Tensor:
        size = getattr(self.original, "slice_size", None) or query.shape[1]
        sliced = []
        for first in range(0, query.shape[1], size):
            heads = slice(first, first + size)
            blocks = [b._replace(keys=b.keys[:, heads], values=b.values[:, heads]) for b in extra]
            sliced.append(super()._plain(query[:, heads], key[:, heads], value[:, heads], 0, blocks))
        return torch.cat(sliced, 1)


STAND_INS: dict[str, type[KeysProcessor]] = {
    "FluxAttnProcessor": FluxKeysProcessor,
    "Flux2AttnProcessor": FluxKeysProcessor,
    "Flux2ParallelSelfAttnProcessor": Flux2SingleKeysProcessor,
    "JointAttnProcessor2_0": JointKeysProcessor,
    "QwenDoubleStreamAttnProcessor2_0": QwenKeysProcessor,
    "ZSingleStreamAttnProcessor": ZImageKeysProcessor,
    "AttnProcessor2_0": SelfKeysProcessor,
    "AttnProcessor": SelfKeysProcessor,
    "SlicedAttnProcessor": SelfKeysProcessor,
}


def keys_processor(site: Site) -> KeysProcessor:
    """The processor that can stand in for a site's.

    Raises:
        AdapterError: the site has another processor than a stock one, or fused projections.
    """
    original = site.module.processor
    stand_in = STAND_INS.get(type(original).__name__)
    if stand_in is None:
        known = ", ".join(STAND_INS)
        raise AdapterError(
            f"expected a stock attention processor ({known}) at {site.path}, got {type(original).__name__}"
        )
    if getattr(site.module, "fused_projections", False):
        raise AdapterError(f"expected separate projections at {site.path}, got fused ones: unfuse them first")
    return stand_in(site, original)


def _heads_first(*tensors: Tensor) -> QKV:
    query, key, value = (t.transpose(1, 2) for t in tensors)
    return query, key, value


def _streams(attn: Any, image: Tensor, text: Tensor | None) -> QKV:
    """Queries, keys and values [B, L, heads, D], the text's before the image's."""
    names = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
    query, key, value = _normalised(attn, image, *names)
    if text is None:
        return query, key, value
    names = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
    both = zip(_normalised(attn, text, *names), (query, key, value), strict=True)
    query, key, value = (torch.cat(parts, 1) for parts in both)
    return query, key, value


def _normalised(attn: Any, states: Tensor, q: str, k: str, v: str, norm_q: str, norm_k: str) -> QKV:
    query, key, value = (getattr(attn, name)(states).unflatten(2, (attn.heads, -1)) for name in (q, k, v))
    return getattr(attn, norm_q)(query), getattr(attn, norm_k)(key), value


def _projected(
    attn: Any, states: Tensor, names: tuple[str, str, str], norm_q: nn.Module | None, norm_k: nn.Module | None
) -> QKV:
    """Queries, keys and values [B, heads, L, D] of [B, L, C] states."""
    query, key, value = (
        getattr(attn, name)(states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in names
    )
    return norm_q(query) if norm_q else query, norm_k(key) if norm_k else key, value


def _rotated(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Flux's rotary positions, [B, L, heads, D] by cosines and sines [L, D]."""
    return cast(Tensor, apply_rotary_emb(states, cast(Any, tables), sequence_dim=1))


def _rotated_complex(states: Tensor, table: Tensor) -> Tensor:
    """Z-Image's rotary positions, [B, L, heads, D] by a complex table [B, L, D / 2]."""
    with torch.autocast(states.device.type, enabled=False):
        pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table.unsqueeze(2)).flatten(3).type_as(states)
