"""Attention processors that attend within windows, one for each kind of attention module.

They follow diffusers' stock processors step by step, with `local_attention` where those attend to everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from interactdiff.checkpoint import AdapterError
from interactdiff.clear.attention import local_attention
from interactdiff.clear.pattern import ClearError, Pattern, proportional_scale

if TYPE_CHECKING:
    from interactdiff.clear.adapter import ClearAdapter
    from interactdiff.sites import AttentionSite


@dataclass
class Layout:
    """What a denoiser's call tells its processors; one for all sites.

    Attributes:
        grid: rows and columns of the denoiser's image tokens.
        text_length: text tokens of attention over both.
        backend: of `local_attention`.
        proportional: whether the softmax scale follows the number of keys.
    """

    grid: tuple[int, int] = (1, 1)
    text_length: int = 0
    backend: str = "auto"
    proportional: bool = False


class WindowProcessor:
    """What the processors share: the window, and whom `dispatch_attention_fn`'s settings are meant for.

    The settings of diffusers' `set_attention_backend` and of context parallelism go to the processor that
    this one stands in for, so that they hold whether or not it does. "native" and its kin leave the choice of
    backend to `local_attention`, "flex" is its flex; others attend to everything and are refused.

    Args:
        site: where it acts.
        adapter: the window, and the weights of pooling.
        layout: of the current call.
        original: the stock processor that it stands in for.
    """

    def __init__(
        self,
        site: AttentionSite | None = None,
        adapter: ClearAdapter | None = None,
        layout: Layout | None = None,
        original: Any = None,
    ):
        if site is None or adapter is None or layout is None:  # as diffusers makes processors anew
            raise AdapterError(
                "expected attention processors to be left alone while CLEAR is attached, got a call that "
                "makes them anew: detach it first, or load the IP-Adapter before it is attached"
            )
        self._site, self._layout, self._original = site, layout, original
        self._adapter = (adapter,)  # not as an attribute of a module's: it must not enter a state_dict

    def __getattr__(self, name: str) -> Any:
        if name in ("_attention_backend", "_parallel_config"):
            return getattr(self._original, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("_attention_backend", "_parallel_config"):
            setattr(self._original, name, value)
        else:
            super().__setattr__(name, value)

    def pattern(self, text_length: int) -> Pattern:
        """Who sees whom at this site in the current call."""
        grid = self._site.grid(*self._layout.grid)
        return self._adapter[0].config.pattern(grid, text_length, self._site.text != "last")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, text_length: int) -> Tensor:
        """Window attention of [B, heads, L, D] tensors, in the site's order of text and image."""
        layout, config = self._layout, self._adapter[0].config
        scale = None
        if layout.proportional:
            scale = proportional_scale(key.shape[2], query.shape[3], config.down_factor)
        return local_attention(
            query, key, value,
            grid=self._site.grid(*layout.grid),
            text_length=text_length,
            window=config.window,
            down_factor=config.down_factor,
            spatial_weight=self._adapter[0].spatial_weight(self._site.path),
            scale=scale,
            shape=config.shape,
            dilation=config.dilation,
            backend=self._backend(),
            text_first=self._site.text != "last",
        ).to(query.dtype)  # fmt: skip

    def _backend(self) -> str:
        """The backend of `local_attention` that goes with diffusers' settings."""
        if getattr(self, "_parallel_config", None) is not None:
            raise ClearError(
                "expected attention on one device, got context parallelism: a window needs its neighbours"
            )
        asked = getattr(self, "_attention_backend", None)
        if asked is None:
            asked, _ = _AttentionBackendRegistry.get_active_backend()
        name = AttentionBackendName(asked).value
        if name == "flex":
            return "flex"
        if not name.lstrip("_").startswith("native"):
            raise ClearError(f"expected the attention backend native or flex for windows, got {name}")
        return self._layout.backend

    def refuse_mask(self, attention_mask: object) -> None:
        """Raise `ClearError` if there is a mask: it would be of other keys than a window's."""
        if attention_mask is not None:
            raise ClearError("expected no attention mask beside a window, got one")


class FluxWindowProcessor(WindowProcessor):
    """For Flux: joint blocks, where text comes apart, and single blocks, where it is before the image."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; [B, L, C] states, of the image in joint blocks and of both in single ones.

        Raises:
            ClearError: there is a mask, no rotary table, or a number of tokens that is not the grid's.
        """
        self.refuse_mask(attention_mask)
        if image_rotary_emb is None:
            raise ClearError("expected image_rotary_emb, the tables of rotary positions, got none")
        text_length = self._layout.text_length
        query, key, value = self._projected(attn, hidden_states, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
            names = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
            text = self._projected(attn, encoder_hidden_states, *names)
            query, key, value = (torch.cat(both, 1) for both in zip(text, (query, key, value), strict=True))
        query = cast(Tensor, apply_rotary_emb(query, cast(Any, image_rotary_emb), sequence_dim=1))
        key = cast(Tensor, apply_rotary_emb(key, cast(Any, image_rotary_emb), sequence_dim=1))
        out = self.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), text_length)
        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text_out, out = out[:, :text_length], out[:, text_length:]
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(text_out)

    @staticmethod
    def _projected(
        attn: FluxAttention, states: Tensor, q: str, k: str, v: str, norm_q: str, norm_k: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            getattr(attn, name)(states).unflatten(2, (-1, attn.head_dim)) for name in (q, k, v)
        )
        return getattr(attn, norm_q)(query), getattr(attn, norm_k)(key), value


class JointWindowProcessor(WindowProcessor):
    """For SD3: text after the image; and SD3.5's second attention, of the image alone."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: object,
        **__: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; [B, H * W, C] states of the image and [B, T, C] of the text.

        Raises:
            ClearError: there is a mask, or a number of tokens that is not the grid's.
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
        out = out.transpose(1, 2).flatten(2)
        out, text_out = out[:, :length], out[:, length:]
        out = _out(attn, out)
        if encoder_hidden_states is None:
            return out
        return out, text_out if attn.context_pre_only else cast(Any, attn.to_add_out)(text_out)


class SelfWindowProcessor(WindowProcessor):
    """For the self-attention of a U-Net's blocks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: object,
        **__: object,
    ) -> Tensor:
        """Attend; [B, H * W, C] states.

        Raises:
            ClearError: there is a mask, or a number of tokens that is not the grid's.
        """
        self.refuse_mask(attention_mask)
        query, key, value = _projected(
            attn, hidden_states, ("to_q", "to_k", "to_v"), attn.norm_q, attn.norm_k
        )
        out = self.attend(query, key, value, 0)
        return _out(attn, out.transpose(1, 2).flatten(2)) / attn.rescale_output_factor


STAND_INS: dict[type, Callable[..., WindowProcessor]] = {
    FluxAttnProcessor: FluxWindowProcessor,
    JointAttnProcessor2_0: JointWindowProcessor,
    AttnProcessor2_0: SelfWindowProcessor,
    AttnProcessor: SelfWindowProcessor,
}


def window_processor(site: AttentionSite, adapter: ClearAdapter, layout: Layout) -> WindowProcessor:
    """The processor that stands in for a site's stock one.

    Raises:
        AdapterError: the site has another processor than a stock one, or fused projections.
    """
    original = site.attention.processor
    if type(original) not in STAND_INS:
        known = ", ".join(kind.__name__ for kind in STAND_INS)
        raise AdapterError(
            f"expected a stock attention processor ({known}) at {site.path}, got {type(original).__name__}"
        )
    if getattr(site.attention, "fused_projections", False):
        raise AdapterError(f"expected separate projections at {site.path}, got fused ones: unfuse them first")
    return STAND_INS[type(original)](site, adapter, layout, original)


def _projected(
    attn: Attention,
    states: Tensor,
    names: tuple[str, str, str],
    norm_q: nn.Module | None,
    norm_k: nn.Module | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, L, D] of [B, L, C] states."""
    query, key, value = (
        getattr(attn, name)(states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in names
    )
    return norm_q(query) if norm_q else query, norm_k(key) if norm_k else key, value


def _out(attn: Attention, states: Tensor) -> Tensor:
    linear, dropout = cast(Any, attn.to_out)
    return dropout(linear(states))
