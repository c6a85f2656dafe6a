"""Torch hooks at the sites: they hand what a module was given and what it puts out to the edits that act.

    block        before: keep its input     its self-attention, after: residuals
    attention    its queries, after: keep   its output projection, before: residuals
                 its queries and keys, after: keep   itself, after: observers
    projection   after: residuals

Processors are left alone, so whichever is there goes on working: diffusers' own, CLEAR's, one of an
IP-Adapter. What the hooks read is laid out before a denoiser call, where torch.compile does not look.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.adapter import SiteInputs
from interactdiff.errors import AdapterError
from interactdiff.sites import Site

ResidualFn = Callable[[SiteInputs, Tensor], Tensor | None]
ObserverFn = Callable[[SiteInputs], None]


class SiteHooks(ABC):
    """The hooks at one place.

    Attributes:
        residuals: those that act in the denoiser call under way, in order.
        observers: likewise.
        batch: rows of the batch of that call.
        image: which of a single stream's tokens are the image's, or of an image's tokens those of the picture
            that is denoised; None for all.
    """

    def __init__(self, site: Site):
        self.site = site
        self.residuals: tuple[ResidualFn, ...] = ()
        self.observers: tuple[ObserverFn, ...] = ()
        self.batch = 0
        self.image: slice | None = None
        self._hooked: tuple[nn.Module | None, ...] = ()
        self._hooks: list[RemovableHandle] = []

    def hook(self) -> None:
        """Hook in, or anew where a LoRA has taken the place of what was hooked."""
        modules = self._modules()
        if self._hooked != modules:
            self.unhook()
            self._hooked, self._hooks = modules, self._register()

    def unhook(self) -> None:
        """Take the hooks out."""
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked = ()

    @abstractmethod
    def _modules(self) -> tuple[nn.Module | None, ...]:
        """What is hooked."""

    @abstractmethod
    def _register(self) -> list[RemovableHandle]:
        """Hook in."""

    def _edited(self, inputs: SiteInputs, output: Tensor) -> Tensor | None:
        """The output after all residuals; None if none of them changed it."""
        edited = None
        for residual in self.residuals:
            changed = residual(inputs, output if edited is None else edited)
            edited = edited if changed is None else changed
        return edited


class BlockHooks(SiteHooks):
    """At a U-Net's block, whose own x + (a + r) is then what a residual adds to its self-attention's a."""

    _hidden_states: Tensor | None = None

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return self.site.module, self.site.module.attn1

    def _register(self) -> list[RemovableHandle]:
        block = self.site.module
        return [
            block.register_forward_pre_hook(self._keep_input, with_kwargs=True),
            block.attn1.register_forward_hook(self._after_attention),
        ]

    def _keep_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.residuals:
            self._hidden_states = args[0] if args else kwargs["hidden_states"]

    def _after_attention(self, _: nn.Module, __: tuple[Any, ...], attended: Tensor) -> Tensor | None:
        hidden_states, self._hidden_states = self._hidden_states, None
        if not self.residuals or hidden_states is None:
            return None
        return self._edited(SiteInputs(hidden_states), attended)


class ProjectionHooks(SiteHooks):
    """At one of an attention's projections of keys or values."""

    def __init__(self, site: Site, projection: str):
        super().__init__(site)
        self._projection = projection

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return (getattr(self.site.module, self._projection),)

    def _register(self) -> list[RemovableHandle]:
        return [self._modules()[0].register_forward_hook(self._after)]  # type: ignore[union-attr]

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._edited(SiteInputs(args[0]), output) if self.residuals else None


class AttentionHooks(SiteHooks):
    """At an attention, of which residuals change what it gathers for the image's tokens."""

    _queries: Tensor | None = None

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return self.site.query, self.site.out

    def _register(self) -> list[RemovableHandle]:
        if self.site.out is None:
            gathered = self.site.module.register_forward_hook(self._after_attention)
        else:
            gathered = self.site.out.register_forward_pre_hook(self._before_out)
        return [self.site.query.register_forward_hook(self._keep_queries), gathered]

    def _keep_queries(self, _: nn.Module, __: tuple[Any, ...], queries: Tensor) -> None:
        if self.residuals:
            self._queries = queries

    def _before_out(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edited = self._edited_gathered(args[0])
        return None if edited is None else (edited, *args[1:])

    def _after_attention(self, _: nn.Module, __: tuple[Any, ...], gathered: Tensor) -> Tensor | None:
        return self._edited_gathered(gathered)

    def _edited_gathered(self, gathered: Tensor) -> Tensor | None:
        queries, self._queries = self._queries, None
        if not self.residuals:
            return None
        if queries is None or len(queries) != self.batch:
            kind = type(self.site.module.processor).__name__
            got = "none of them" if queries is None else f"{len(queries)} at a time"
            raise AdapterError(
                f"expected {self.site.path} to make queries for {self.batch} batch rows, got {got}: "
                f"adapters that read them cannot act beside {kind}"
            )
        rows, width = self.image or slice(None), self.site.dim
        part = gathered[:, rows] if gathered.shape[2] == width else gathered[:, rows, :width]
        edited = self._edited(SiteInputs(None, self._of_image(queries)), part)
        if edited is None or part is gathered:
            return edited
        if edited.shape == gathered.shape:
            return edited
        if gathered.shape[2] > width:  # the block's MLP goes through the same projection
            edited = torch.cat([edited, gathered[:, rows, width:]], 2)
        if self.image is None:
            return edited
        return torch.cat([gathered[:, : rows.start], edited, gathered[:, rows.stop :]], 1)

    def _of_image(self, queries: Tensor) -> Tensor:
        return of_image(self.site, queries, self.image)


class ObserverHooks(SiteHooks):
    """At an attention, of which observers see queries and keys, once it is done."""

    def __init__(self, site: Site):
        super().__init__(site)
        self._seen: dict[str, Any] = {}

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return self.site.query, self.site.key, self.site.text_key

    def _register(self) -> list[RemovableHandle]:
        attention = self.site.module
        hooks = [
            attention.register_forward_pre_hook(self._keep_rotary, with_kwargs=True),
            self.site.query.register_forward_hook(partial(self._keep, "queries")),
            self.site.key.register_forward_hook(partial(self._keep, "keys")),
            attention.register_forward_hook(self._observe),
        ]
        if self.site.text_key is not None:
            hooks.append(self.site.text_key.register_forward_hook(partial(self._keep, "text_keys")))
        return hooks

    def _keep_rotary(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observers:
            self._seen = {"rotary": kwargs.get("image_rotary_emb")}

    def _keep(self, name: str, _: nn.Module, __: tuple[Any, ...], states: Tensor) -> None:
        if self.observers:
            self._seen[name] = states

    def _observe(self, *_: object) -> None:
        seen, self._seen = self._seen, {}
        if not self.observers or "queries" not in seen or "keys" not in seen:
            return
        site, text_keys = self.site, seen.get("text_keys")
        inputs = SiteInputs(
            None,
            of_image(site, seen["queries"], self.image),
            site.by_head(seen["keys"]),
            None if text_keys is None else site.by_head(text_keys),
            seen.get("rotary"),
        )
        for observer in self.observers:
            observer(inputs)


def of_image(site: Site, queries: Tensor, image: slice | None) -> Tensor:
    """[B, heads, L, D] of the image's tokens, of what `Site.query` puts out."""
    queries = site.by_head(queries)
    return queries if image is None else queries[:, :, image]
