"""Torch hooks at the sites: they hand what a module was given and what it puts out to the edits that act.

    block        before: keep its input     its self-attention, after: residuals
    attention    its queries, after: keep   its output projection, before: residuals
                 its queries and keys, after: keep   itself, after: observers
    projection   after: residuals

Processors are left alone, so whichever is there goes on working: diffusers' own, CLEAR's, one of an
IP-Adapter. What the hooks read is laid out before a denoiser call, where torch.compile does not look; within
compiled code all residuals of a place are one opaque operator, so that no scene, schedule or mode of control
is a graph of its own.
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.adapter import SiteInputs
from interactdiff.errors import AdapterError
from interactdiff.sites import Site

ResidualFn = Callable[[SiteInputs, Tensor], Tensor | None]
ObserverFn = Callable[[SiteInputs], None]


_numbers = itertools.count()
_BY_NUMBER: "weakref.WeakValueDictionary[int, SiteHooks]" = weakref.WeakValueDictionary()


class SiteHooks(ABC):
    """The hooks at one place.

    Attributes:
        residuals: those that act in the denoiser call under way, in order.
        observers: likewise.
        batch: rows of the batch of that call.
        image: which of a single stream's tokens are the image's, or of an image's tokens those of the picture
            that is denoised; None for all.
        tokens: how many tokens the site attends with in that call; None where that is not known.
        autocast: what that call computes products of matrices in, if not in their own dtype.
        caches: names of diffusers' hooks that keep results from call to call at the site or its denoiser.
    """

    def __init__(self, site: Site):
        self.site = site
        self.residuals: tuple[ResidualFn, ...] = ()
        self.observers: tuple[ObserverFn, ...] = ()
        self.batch = 0
        self.image: slice | None = None
        self.tokens: int | None = None
        self.autocast: torch.dtype | None = None
        self.caches: tuple[str, ...] = ()
        self._hooked: tuple[nn.Module | None, ...] = ()
        self._hooks: list[RemovableHandle] = []
        number = next(_numbers)
        _BY_NUMBER[number] = self
        self._number = torch.tensor(number)  # a tensor: a number would be a constant of compiled code

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

    def edit(self, read: Tensor, output: Tensor) -> Tensor | None:
        """The output after all residuals; None if none of them changed it.

        Args:
            read: what the site's edits read: [B, L, C] inputs or queries as `Site.query` puts them out.
            output: [B, L, C], what the site puts out.
        """
        return self._edited(SiteInputs(read), output)

    def _apply(self, read: Tensor, output: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return _edit_in_compiled_code(output, read, self._number)
        return self.edit(read, output) if self.residuals else None

    def _edited(self, inputs: SiteInputs, output: Tensor) -> Tensor | None:
        edited = None
        for residual in self.residuals:
            changed = residual(inputs, output if edited is None else edited)
            edited = edited if changed is None else changed
        return edited

    def _cause(self) -> str:
        """What may have changed a batch or its tokens within the denoiser, in words."""
        processor = type(getattr(self.site.module, "processor", None)).__name__
        if self.caches:
            return f"adapters cannot act beside {' and '.join(self.caches)}"
        if self.site.kind is not None and processor != self.site.kind.processor:
            return f"adapters that read them cannot act beside {processor}"
        return "a tool within the denoiser changes them, beside which adapters cannot act"


class BlockHooks(SiteHooks):
    """At a U-Net's block, whose own x + (a + r) is then what a residual adds to its self-attention's a."""

    _hidden_states: Tensor | None = None

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return self.site.module, self.site.module.attn1

    def _register(self) -> list[RemovableHandle]:
        block = self.site.module
        return [
            _same_key(block.register_forward_pre_hook(self._keep_input, with_kwargs=True), 0),
            _same_key(block.attn1.register_forward_hook(self._after_attention), 0),
        ]

    def _keep_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden_states = args[0] if args else kwargs["hidden_states"]

    def _after_attention(self, _: nn.Module, __: tuple[Any, ...], attended: Tensor) -> Tensor | None:
        hidden_states, self._hidden_states = self._hidden_states, None
        return None if hidden_states is None else self._apply(hidden_states, attended)

    def edit(self, read: Tensor, output: Tensor) -> Tensor | None:
        """`SiteHooks.edit`.

        Raises:
            AdapterError: the block's self-attention sees other rows or tokens than the block.
        """
        if self.residuals and read.shape[:2] != output.shape[:2]:
            (batch, length), got = read.shape[:2], output.shape
            raise AdapterError(
                f"expected the self-attention of {self.site.path} to attend with its block's {length} tokens "
                f"of {batch} batch rows, got {got[1]} of {got[0]}: {self._cause()}"
            )
        return self._edited(SiteInputs(read), output)


class ProjectionHooks(SiteHooks):
    """At one of an attention's projections of keys or values."""

    def __init__(self, site: Site, projection: str):
        super().__init__(site)
        self._projection = projection

    def _modules(self) -> tuple[nn.Module | None, ...]:
        if self.site.fused:
            raise AdapterError(
                f"expected separate projections at {self.site.path}, got fused ones: unfuse them first"
            )
        return (getattr(self.site.module, self._projection),)

    def _register(self) -> list[RemovableHandle]:
        return [_same_key(self._modules()[0].register_forward_hook(self._after), 1)]  # type: ignore[union-attr]

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._apply(args[0], output)


class AttentionHooks(SiteHooks):
    """At an attention, of which residuals change what it gathers for the image's tokens.

    Where a cache gives what the attention gathered in an earlier call, its queries are that call's too.
    """

    _queries: Tensor | None = None
    _last: Tensor | None = None

    def _modules(self) -> tuple[nn.Module | None, ...]:
        return self.site.query, self.site.out

    def _register(self) -> list[RemovableHandle]:
        if self.site.out is None:
            gathered = self.site.module.register_forward_hook(self._after_attention)
        else:
            gathered = self.site.out.register_forward_pre_hook(self._before_out)
        queries = self.site.query.register_forward_hook(self._keep_queries)
        return [_same_key(queries, 2), _same_key(gathered, 3)]

    def _keep_queries(self, _: nn.Module, __: tuple[Any, ...], queries: Tensor) -> None:
        self._queries = queries

    def _before_out(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edited = self._edited_gathered(args[0])
        return None if edited is None else (edited, *args[1:])

    def _after_attention(self, _: nn.Module, __: tuple[Any, ...], gathered: Tensor) -> Tensor | None:
        return self._edited_gathered(gathered)

    def _edited_gathered(self, gathered: Tensor) -> Tensor | None:
        queries, self._queries = self._queries, None
        if self.caches:
            queries = self._last = self._last if queries is None else queries
        if queries is not None:
            return self._apply(queries, gathered)
        if self.residuals:
            self._refuse("none of them")
        return None

    def edit(self, read: Tensor, output: Tensor) -> Tensor | None:
        """`SiteHooks.edit` of the image's tokens alone.

        Raises:
            AdapterError: the attention sees other rows or tokens than the call.
        """
        if not self.residuals:
            return None
        if len(read) != self.batch or len(output) != self.batch:
            self._refuse(f"{len(read)} at a time")
        rows, width = self.image or slice(None), self.site.dim
        part = output[:, rows] if output.shape[2] == width else output[:, rows, :width]
        edited = self._edited(SiteInputs(None, of_image(self, read)), part)
        if edited is None or part is output:
            return edited
        if edited.shape == output.shape:
            return edited
        if output.shape[2] > width:  # the block's MLP goes through the same projection
            edited = torch.cat([edited, output[:, rows, width:]], 2)
        if self.image is None:
            return edited
        return torch.cat([output[:, : rows.start], edited, output[:, rows.stop :]], 1)

    def _refuse(self, got: str) -> None:
        raise AdapterError(
            f"expected {self.site.path} to make queries for {self.batch} batch rows, got {got}: "
            f"{self._cause()}"
        )


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
        return [_same_key(hook, 4 + kind) for kind, hook in enumerate(hooks)]

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
            of_image(self, seen["queries"]),
            site.by_head(seen["keys"], "k"),
            None if text_keys is None else site.by_head(text_keys, "k"),
            seen.get("rotary"),
        )
        for observer in self.observers:
            observer(inputs)


def of_image(place: SiteHooks, queries: Tensor) -> Tensor:
    """[B, heads, L, D] of the image's tokens, of what `Site.query` puts out.

    Raises:
        AdapterError: the site attends with other tokens than the call has.
    """
    queries = place.site.by_head(queries, "q")
    if place.tokens not in (None, queries.shape[2]):
        raise AdapterError(
            f"expected {place.site.path} to attend with {place.tokens} tokens, got {queries.shape[2]}: "
            f"{place._cause()}"
        )
    return queries if place.image is None else queries[:, :, place.image]


def stateful_hooks(module: Any) -> list[str]:
    """The classes of diffusers' hooks on a module that keep results from call to call, as caches do."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks = registry.hooks.values() if isinstance(registry, HookRegistry) else ()
    return [type(hook).__name__ for hook in hooks if hook._is_stateful]


def _same_key(handle: RemovableHandle, kind: int) -> RemovableHandle:
    """Register a hook under a key of its kind, so that blocks that are compiled alike share their code."""
    key = -1 - kind
    for hooks in (handle.hooks_dict_ref(), *(ref() for ref in handle.extra_dict_ref)):
        if hooks is not None and handle.id in hooks:
            hooks[key] = hooks.pop(handle.id)
    handle.id = key
    return handle


# A recorded CUDA graph would do once more what was decided when it was recorded. Where torch lacks the tag,
# the operator's argument on the CPU keeps it out of one.
_OUT_OF_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("interactdiff::edit", mutates_args=(), **_OUT_OF_CUDA_GRAPHS)
def _edit_in_compiled_code(output: Tensor, read: Tensor, place: Tensor) -> Tensor:
    """`SiteHooks.edit` as one operator; a copy of the output where nothing acts."""
    hooks = _BY_NUMBER[int(place)]
    within = torch.autocast(output.device.type, hooks.autocast) if hooks.autocast else nullcontext()
    with within:  # compiled code has autocast's casts in its graph, and runs without it
        edited = hooks.edit(read, output) if hooks.residuals else None
    own = edited is None or any(
        edited.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in (output, read)
    )
    edited = output if edited is None else edited.to(output.dtype)
    return edited.clone(memory_format=torch.contiguous_format) if own else edited.contiguous()


@_edit_in_compiled_code.register_fake
def _(output: Tensor, read: Tensor, place: Tensor) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)
