"""Puts CLEAR into a denoiser and takes it out again."""

import warnings
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from interactdiff.checkpoint import AdapterError
from interactdiff.clear.adapter import ClearAdapter, site_layers
from interactdiff.clear.attention import least_tokens
from interactdiff.clear.processors import Layout, window_processor
from interactdiff.compiled import forget_compiled
from interactdiff.sites import AttentionSite, Denoiser, TokenGrid, attention_sites, denoiser_of


class ClearHandle:
    """Attached windows: each call of the denoiser goes by them where its grid is large enough.

    While they act, the denoiser's modules hold the adapter's processors and projections in the place of its
    own; where a call's grid is too small, and once detached, it holds its own, object for object. Made by
    `attach` or `linearize`; a context manager.

    Attributes:
        adapter: the attached adapter.
        denoiser: the U-Net or transformer that it acts in.
    """

    def __init__(self, denoiser: Denoiser, adapter: ClearAdapter, given: object = None):
        self.denoiser, self.adapter = denoiser, adapter
        self._given = given
        self._layout, self._ntk_factor = Layout(), 1.0
        self._min_tokens: int | None = None
        self._grid = TokenGrid()
        self._told = False
        self._swaps = [_Swap(site, adapter, self._layout) for site in attention_sites(denoiser)]
        self._theta = getattr(getattr(denoiser, "pos_embed", None), "theta", None)
        self._hooks = [denoiser.register_forward_pre_hook(self._before, with_kwargs=True)]
        forget_compiled(denoiser, given)

    def configure(
        self,
        *,
        backend: str | None = None,
        min_tokens: int | None = None,
        proportional: bool | None = None,
        ntk_factor: float | None = None,
    ) -> None:
        """Change how the windows act from the next call on; what is None stays.

        Args:
            backend: of `local_attention`; "auto" at first.
            min_tokens: image tokens below which an attention stays as it is in the base; at first
                `least_tokens`, as many as the window needs to be faster. 0: windows always act.
            proportional: whether the softmax scale grows with the number of keys, as for pictures larger than
                the base was trained on; off at first.
            ntk_factor: of the base of Flux's rotary positions, likewise; 1 at first, published is 10.

        Raises:
            AdapterError: a value is out of range, there are no rotary positions, or the handle is detached.
        """
        if not self._hooks:
            raise AdapterError("expected an attached adapter, got a handle that is detached")
        if min_tokens is not None and min_tokens < 0:
            raise AdapterError(f"expected min_tokens of 0 or more, got {min_tokens}")
        if ntk_factor is not None and not 1 <= ntk_factor < float("inf"):
            raise AdapterError(f"expected ntk_factor of 1 or more, got {ntk_factor}")
        if ntk_factor not in (None, 1) and self._theta is None:
            kind = type(self.denoiser).__name__
            raise AdapterError(f"expected ntk_factor 1, got {ntk_factor}: {kind} has no rotary positions")
        self._layout.backend = self._layout.backend if backend is None else backend
        self._min_tokens = self._min_tokens if min_tokens is None else min_tokens
        self._layout.proportional = self._layout.proportional if proportional is None else proportional
        self._ntk_factor = self._ntk_factor if ntk_factor is None else ntk_factor

    @property
    def active(self) -> bool:
        """Whether windows acted anywhere in the last call."""
        return any(swap.on for swap in self._swaps)

    def detach(self) -> None:
        """Give the denoiser its own processors and weights back. Doing it twice is the same as once."""
        if self._hooks:
            self._act(set())
            forget_compiled(self.denoiser, self._given)
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "ClearHandle":
        """The handle itself; leaving the block detaches."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Detach."""
        self.detach()

    @cast(Any, torch.compiler.disable)
    def _before(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        self._layout.grid = rows, columns = self._grid(self.denoiser, call)
        if (text := call.get("encoder_hidden_states")) is not None:
            self._layout.text_length = text.shape[1]
        counts = {}
        for swap in self._swaps:
            height, width = swap.site.grid(rows, columns)
            counts[swap] = height * width
        least = self._min_tokens
        if least is None:
            least = least_tokens(self.adapter.config.window, self.denoiser.device)
        large = {swap for swap, count in counts.items() if count >= least}
        for swap in large:
            swap.check(self._layout)
        if not large and not self._told:
            self._told = True
            warnings.warn(
                f"CLEAR is off at {rows} x {columns} tokens: below {least} full attention is "
                "faster; min_tokens=0 keeps it on",
                stacklevel=2,
            )
        self._act(large)

    def _act(self, where: "set[_Swap]") -> None:
        for swap in self._swaps:
            swap.turn(swap in where)
        if self._theta is not None:
            factor = self._ntk_factor if where else 1.0
            cast(Any, self.denoiser.pos_embed).theta = self._theta * factor if factor != 1 else self._theta


class _Swap:
    """One site: its own processor and projections, and what takes their place."""

    def __init__(self, site: AttentionSite, adapter: ClearAdapter, layout: Layout):
        self.site, self.on = site, False
        self._own = site.attention.processor
        self._processor = window_processor(site, adapter, layout)
        mine = adapter.of_site(site.path)
        self._projections = [
            (layer, leaf, own, mine[f"{name}.{leaf}"])
            for name, layer in site_layers(site)
            for leaf, own in layer.named_parameters(recurse=False)
            if f"{name}.{leaf}" in mine
        ]
        self._adapter = adapter

    def check(self, layout: Layout) -> None:
        """Raise `ClearError` if the window cannot act on this call's grid; nothing has run then."""
        self._processor.pattern(layout.text_length)

    def turn(self, on: bool) -> None:
        if on == self.on:
            return
        self.on = on
        cast(Any, self.site.attention).processor = self._processor if on else self._own
        for layer, leaf, own, mine in self._projections:
            new, old = (mine, own) if on else (own, mine)
            if new.device != old.device or (new.dtype != old.dtype and not self._adapter.training):
                new.data = new.data.to(old)  # the base has been moved meanwhile
            setattr(layer, leaf, new)


def attach_clear(given: object, adapter: ClearAdapter) -> ClearHandle:
    """What `attach` does with a `ClearAdapter`.

    Raises:
        AdapterError: there is no denoiser that is known, the layers are not its own, it has windows already,
            or its processors are not stock ones; nothing has been touched then.
    """
    denoiser = denoiser_of(given)
    if attached_clear(denoiser) is not None:
        raise AdapterError(
            "expected a denoiser without CLEAR attached, got one that has it: detach that first"
        )
    adapter.check(denoiser)
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise AdapterError("expected weights in memory, got some on meta: attach before sequential offload")
    dtype = None if adapter.training else denoiser.dtype
    adapter.to(denoiser.device, dtype)
    return ClearHandle(denoiser, adapter, given)


def attached_clear(denoiser: nn.Module) -> ClearHandle | None:
    """The handle of the windows that are attached to a denoiser, if there is one."""
    owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ClearHandle)), None)
