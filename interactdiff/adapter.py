"""What every method implements: an `Adapter` with the weights, a `Binding` for each attachment, and edits.

An adapter knows nothing of hooks. Its binding declares *edits*: what it adds, replaces or observes at which
site of the denoiser. The controller (`interactdiff.controller`) performs the edits of all bindings together,
so that none of them has to know of another.

    edit        acts                                                how several combine at one place
    Residual    adds to what an attention or a projection puts out  chained by `Adapter.order`
    OwnKeys     chooses the keys that image tokens attend to        at most one
    ExtraKeys   gives attention further keys and values             merged by log-sum-exp
    Observer    looks at queries and keys                           any number
    Parameter   stands in for one of the denoiser's parameters      at most one
    Guidance    edits inputs and prediction of a denoiser call      at most one
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from interactdiff.errors import AdapterError
from interactdiff.exact_weights import ExactWeights
from interactdiff.registry import adapter_method
from interactdiff.sites import Denoiser, Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from interactdiff.calls import Call, CallReader, Rows

PhraseEncoder = Callable[[Sequence[str]], Mapping[str, Tensor]]


class Adapter(nn.Module, ABC):
    """A method's weights and configuration.

    Attributes:
        name: what `handle[name]` calls it: its folder's name, of its method; or of one instance of several,
            "concept:cat", see `named`.
        items: the classes of a scene's items that it takes; empty if it takes none.
        order: where its `Residual` edits come in the chain of all adapters', lowest first. A constant, so
            that the order of attaching changes no bit.
    """

    name: str
    items: ClassVar[tuple[type, ...]] = ()
    order: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self._exact = ExactWeights()

    @property
    def method(self) -> str:
        """The name of its method, which `config.json` has."""
        return adapter_method(self.name)

    def named(self, instance: str) -> Self:
        """Give it a name of its own, so that several adapters of one method can be attached at once.

        Args:
            instance: letters, digits, dots and dashes: "cat" makes `handle["concept:cat"]`.

        Returns:
            The adapter itself.

        Raises:
            AdapterError: it is no such name.
        """
        if not re.fullmatch(r"[\w.-]+", instance):
            raise AdapterError(f"expected a name of letters, digits, dots and dashes, got {instance!r}")
        self.name = f"{self.method}:{instance}"
        return self

    def cast(self, device: torch.device, dtype: torch.dtype, tensors: Iterable[Tensor] | None = None) -> None:
        """Move weights, all or some; unlike `to` alone, a cast to another dtype and back loses nothing.

        Weights of several dtypes, as a file may hold them, become those of the widest one first.
        """
        dtypes = {one.dtype for one in self.parameters()}
        if len(dtypes) > 1 and not self._exact.kept:
            self.to(reduce(torch.promote_types, dtypes))
        for tensor in [*self.parameters(), *self.buffers()] if tensors is None else tensors:
            self._exact.cast(tensor, device, dtype)
        if tensors is None:
            self.to(device, dtype)  # whatever else a part of it moves

    def restore(self) -> None:
        """Give every weight the dtype and the bits that it had before it was cast."""
        self._exact.restore()

    def exact_state(self) -> dict[str, Tensor]:
        """The `state_dict` with every weight as it was before it was cast: what is saved."""
        state = self.state_dict(keep_vars=True)
        return {name: self._exact.of(tensor).detach() for name, tensor in state.items()}

    @classmethod
    @abstractmethod
    def for_denoiser(cls, denoiser: Any, *args: Any, **options: Any) -> Self:
        """An untrained adapter for a denoiser."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str]) -> Self:
        """Load one from a file, a folder or a repository on the Hub, in eval mode.

        Raises:
            AdapterError: there is none, or it is damaged.
        """

    @abstractmethod
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder.

        Raises:
            OSError: the folder cannot be written.
        """

    @abstractmethod
    def check(self, denoiser: Denoiser) -> None:
        """Make sure that it can act in a denoiser.

        Raises:
            AdapterError: it cannot; the message names both.
        """

    @abstractmethod
    def bind(self, host: Host) -> Binding:
        """What one attachment of it needs. Touches neither the denoiser nor the adapter.

        Raises:
            AdapterError: the host lacks something that the adapter needs.
        """


@dataclass(frozen=True)
class Host:
    """Where an adapter is attached.

    Attributes:
        denoiser: the U-Net or transformer.
        sites: all of its sites, in the order of its modules.
        calls: reads the denoiser's calls. A pass of an adapter's own, as one over a reference picture, goes
            within `calls.passing("reference")`: no `Guidance` acts there, and of the other edits those that
            are meant for such rows.
        pipeline: the pipeline that was given to `attach`; None for a bare denoiser.
        phrase_encoder: makes features of phrases, in place of the pipeline's text encoders; None for those.
    """

    denoiser: Denoiser
    sites: tuple[Site, ...] = field(repr=False)
    calls: CallReader = field(repr=False)
    pipeline: Any = None
    phrase_encoder: PhraseEncoder | None = None

    def sites_of(self, *roles: str) -> list[Site]:
        """The sites of some roles, in the order of the modules."""
        return [site for site in self.sites if site.role in roles]


class Binding:
    """One attachment of an adapter: what belongs to a scene or a run, and no weights.

    Attributes:
        adapter: the adapter.
        host: where it is attached.
        edits: all that it may do, declared once; the controller reads them when it is attached.
        scene: what `encode` made of the scene; None where there is none.
    """

    edits: Sequence[Edit] = ()
    scene: Any = None

    def __init__(self, adapter: Adapter, host: Host):
        self.adapter, self.host = adapter, host

    def encode(self, items: Sequence[Sequence[Any]]) -> Any:
        """What a scene is to this adapter: features, tokens, keys, values. Once a scene; changes nothing.

        An adapter may take options by keyword, with defaults: `Handle.set_scene` gives `strength`,
        `schedule`, `all_items` (all adapters' items, a sequence for each prompt) and its further options to
        each that names them.

        Args:
            items: of the classes in `Adapter.items`, one sequence for each prompt or a single one for all.

        Returns:
            What `use` takes.

        Raises:
            SceneError: the items cannot be drawn.
        """
        return items

    def use(self, encoded: Any) -> None:
        """Act by a scene from the next call on, one that `encode` returned; None is no scene."""
        self.scene = encoded

    def prepare(self, call: Call) -> Collection[Edit]:
        """Before each denoiser call, outside compiled code: lay out what the edits read.

        Returns:
            Those of `edits` that act in this call, the same object where they are the same ones; none of the
            others costs anything.

        Raises:
            SceneError: scenes do not fit the call.
            AdapterError: the call lacks what an edit needs.
        """
        return () if self.scene is None else self.edits

    def clear(self) -> None:
        """Forget the scene: nothing is controlled until the next one."""
        self.scene = None

    def install(self) -> None:
        """Edit the pipeline beyond its denoiser, such as its tokenizers; once, when it is attached.

        Raises:
            AdapterError: the pipeline cannot be edited; nothing stays attached then.
        """

    def uninstall(self) -> None:
        """Undo what `install` did, object for object; also after an `install` that failed."""

    def follow(self, device: torch.device) -> None:
        """Move the adapter to where the denoiser runs; in eval mode, give it the denoiser's dtype too."""
        parameter = next(self.adapter.parameters(), None)
        if parameter is not None:
            dtype = parameter.dtype if self.adapter.training else self.host.denoiser.dtype
            if (parameter.device, parameter.dtype) != (device, dtype):
                self._move(device, dtype)
                self.to(device, dtype)

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.adapter.training:
            self.adapter.to(device)
        else:
            self.adapter.cast(device, dtype)

    def components(self) -> Mapping[str, Any]:
        """What of the pipeline the adapter reads when a scene is set, or when it is attached; by its names
        there, such as "text_encoder".
        """
        return {}

    def pass_key(self) -> Any:
        """What of its settings changes a pass over a reference, compared by equality; () if nothing."""
        return ()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what was made of a scene; the adapter itself has been moved."""

    def describe(self) -> str:
        """What the scene demands, in words; empty if there is none."""
        return ""


# --- edits ---


class SiteInputs(NamedTuple):
    """What an edit reads of a site in the call under way.

    Attributes:
        hidden_states: [B, L, C], what the site's block (role "block"), or the projection, was given.
        queries: [B, heads, L, D] of the image's tokens, normalised, not yet rotated.
        keys: likewise, of all tokens that the site projects with the image's; None but for an `Observer`.
        text_keys: [B, heads, T, D] of the text's own stream at a "joint" attention, likewise.
        rotary: tables of rotary positions, as a transformer's attention was given them; None if it has none.
    """

    hidden_states: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    rotary: Any = None


@dataclass(frozen=True, eq=False)
class Residual:
    """Adds to what a site puts out.

    Attributes:
        site: where. At a "block" the output is that of its self-attention, before the block adds it to its
            input; at any other attention what it gathers for the image's tokens, before its output
            projection.
        fn: of what the site was given, and its output so far, [B, L, C], the output from there on; or None,
            which leaves it.
        at: a projection of an attention: the output is then that projection's. "add_k_proj" and "add_v_proj"
            are those of the text's own stream at a "joint" attention.
    """

    site: Site
    fn: Callable[[SiteInputs, Tensor], Tensor | None]
    at: Literal["out", "to_k", "to_v", "add_k_proj", "add_v_proj"] = "out"


class KeyBlock(NamedTuple):
    """Further keys and values of an attention.

    Attributes:
        keys: [B or 1, heads, K, D], normalised and rotated as the attention's own.
        values: [B or 1, heads, K, D].
        log_weight: log w, added to the scores: each key counts w times. [B or 1, 1, 1, K or 1] or a number;
            -inf where a row of the batch does not see a key.
        query_weight: the same by query: [B or 1, 1, Q or 1, 1] of the image's tokens, added to the scores of
            a query with all of these keys; -inf where a token does not see them.
    """

    keys: Tensor
    values: Tensor
    log_weight: Tensor | float = 0.0
    query_weight: Tensor | float = 0.0


@dataclass(frozen=True, eq=False)
class OwnKeys:
    """Chooses which of its own keys the image's tokens attend to, in the place of all of them.

    Attributes:
        site: an attention.
        fn: of queries, keys and values [B, heads, L, D] of text and image in the site's order, the number of
            text tokens, and the further keys of all `ExtraKeys` there, what is gathered, [B, heads, L, D].
    """

    site: Site
    fn: Callable[[Tensor, Tensor, Tensor, int, Sequence[KeyBlock]], Tensor]


@dataclass(frozen=True, eq=False)
class ExtraKeys:
    """Gives the image's tokens of an attention further keys, in one softmax with those that they have.

    Attributes:
        site: an attention.
        fn: the keys of the call under way; none of them leave the attention as it is.
        record: given the attention's own keys and values of the image's tokens, [B, heads, L, D] each,
            normalised and rotated: how a pass over a reference picture keeps what later calls add.
    """

    site: Site
    fn: Callable[[], Sequence[KeyBlock]] = tuple
    record: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True, eq=False)
class Observer:
    """Looks at an attention's queries and keys, and changes nothing.

    Attributes:
        site: an attention.
        fn: given what the site reads.
    """

    site: Site
    fn: Callable[[SiteInputs], None]


@dataclass(frozen=True, eq=False)
class Parameter:
    """Stands in for one of the denoiser's parameters, or for another attribute, while a call runs.

    Attributes:
        module: the module that has it.
        name: its name there, such as "weight".
        value: what takes its place; or, of the denoiser's own, what does.
    """

    module: nn.Module
    name: str
    value: nn.Parameter | Callable[[Any], Any]


class EditedCall(NamedTuple):
    """What a `Guidance` makes of a call.

    Attributes:
        arguments: the denoiser's, by name; those that are missing stay.
        rows: what each of the equal parts of the batch is for from here on; None where that stays.
    """

    arguments: Mapping[str, Any]
    rows: tuple[Rows, ...] | None = None


@dataclass(frozen=True, eq=False)
class Guidance:
    """Edits the inputs and the prediction of a denoiser call.

    A pipeline that computes u + w (c - u) draws exactly what is returned, if it is the same for u and c.

    Attributes:
        inputs: of the call, another one; or None, which leaves it. Called before any adapter prepares.
        prediction: of the call and the prediction [B, ...], another one; or None, which leaves it.
    """

    inputs: Callable[[Call], EditedCall | None] = lambda call: None
    prediction: Callable[[Call, Tensor], Tensor | None] = lambda call, prediction: None


Edit = Residual | OwnKeys | ExtraKeys | Observer | Parameter | Guidance
