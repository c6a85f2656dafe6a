"""CLEAR attached: windows in the place of full attention, in each call whose grid is large enough."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from interactdiff.adapter import Binding, Edit, Host, KeyBlock, OwnKeys, Parameter
from interactdiff.calls import Call
from interactdiff.clear.adapter import ClearAdapter, site_layers
from interactdiff.clear.attention import least_tokens, local_attention
from interactdiff.clear.pattern import Pattern, proportional_scale
from interactdiff.errors import AdapterError, ClearError
from interactdiff.families import Grid
from interactdiff.processors import STAND_INS
from interactdiff.sites import Site


class ClearBinding(Binding):
    """An attached `ClearAdapter`: `handle["clear"]`.

    While a call runs in which windows act, the denoiser's modules hold the adapter's projections in the place
    of their own.
    """

    adapter: ClearAdapter

    def __init__(self, adapter: ClearAdapter, host: Host):
        super().__init__(adapter, host)
        self.backend, self.proportional, self.ntk_factor = "auto", False, 1.0
        self.min_tokens: int | None = None
        sites = host.sites_of("self", "joint", "single")
        self._sites = [WindowSite(site, self) for site in sites]
        self._positions = getattr(host.denoiser, "pos_embed", None)
        self._stretch: tuple[Parameter, ...] = ()
        if hasattr(self._positions, "theta"):
            assert isinstance(self._positions, nn.Module)
            self._stretch = (Parameter(self._positions, "theta", self._stretched),)
        self.edits = tuple(edit for site in self._sites for edit in site.edits) + self._stretch
        self._of: dict[tuple[int, ...], tuple[Edit, ...]] = {}
        self._acting: tuple[int, ...] = ()
        self._warned = False

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
            AdapterError: a value is out of range, or there are no rotary positions.
        """
        if min_tokens is not None and min_tokens < 0:
            raise AdapterError(f"expected min_tokens of 0 or more, got {min_tokens}")
        if ntk_factor is not None and not 1 <= ntk_factor < float("inf"):
            raise AdapterError(f"expected ntk_factor of 1 or more, got {ntk_factor}")
        if ntk_factor not in (None, 1) and not self._stretch:
            kind = type(self.host.denoiser).__name__
            raise AdapterError(f"expected ntk_factor 1, got {ntk_factor}: {kind} has no rotary positions")
        self.backend = self.backend if backend is None else backend
        self.min_tokens = self.min_tokens if min_tokens is None else min_tokens
        self.proportional = self.proportional if proportional is None else proportional
        self.ntk_factor = self.ntk_factor if ntk_factor is None else ntk_factor

    @property
    def active(self) -> bool:
        """Whether windows acted anywhere in the last call."""
        return bool(self._acting)

    @property
    def active_sites(self) -> list[Site]:
        """Where they did."""
        return [self._sites[number].site for number in self._acting]

    def prepare(self, call: Call) -> Collection[Edit]:
        """Let windows act wherever the call's grid is large enough.

        Raises:
            ClearError: a window cannot act on this grid, or beside diffusers' settings of attention.
        """
        self._acting = ()
        counts = [height * width for height, width in (one.site.grid(*call.grid) for one in self._sites)]
        least = self.min_tokens
        if least is None:
            least = least_tokens(self.adapter.config.window, self.host.denoiser.device)
        large = tuple(number for number, count in enumerate(counts) if count >= least)
        for number in large:
            self._sites[number].lay_out(call)
        if not large and not self._warned:
            self._warned = True
            rows, columns = call.grid
            warnings.warn(
                f"CLEAR is off at {rows} x {columns} tokens: below {least} full attention is "
                "faster; min_tokens=0 keeps it on",
                stacklevel=2,
            )
        self._acting = large
        if large not in self._of:
            chosen = tuple(edit for number in large for edit in self._sites[number].edits)
            self._of[large] = chosen + self._stretch if large else ()
        return self._of[large]

    def pass_key(self) -> Any:
        """The settings, all of which act in any pass."""
        return self.backend, self.min_tokens, self.proportional, self.ntk_factor

    def describe(self) -> str:
        """The window, and where it acted last."""
        return f"{self.adapter.config}, {len(self._acting)} of {len(self._sites)} attentions in the last call"

    def _stretched(self, theta: float) -> float:
        return theta * self.ntk_factor if self.ntk_factor != 1 else theta


class WindowSite:
    """One attention with its window.

    Attributes:
        site: the attention.
        edits: the window, and the adapter's projections.
        grid: rows and columns of image tokens in the call under way.
        backend: of `local_attention` there.
    """

    def __init__(self, site: Site, binding: ClearBinding):
        self.site, self._binding = site, binding
        own = binding.adapter.of_site(site.path)
        self._spatial_weight = binding.adapter.spatial_weight(site.path)
        self.edits: tuple[Edit, ...] = (
            OwnKeys(site, self._attend),
            *(
                Parameter(layer, leaf, own[f"{name}.{leaf}"])
                for name, layer in site_layers(site)
                for leaf, _ in layer.named_parameters(recurse=False)
                if f"{name}.{leaf}" in own
            ),
        )
        self.grid: Grid = (1, 1)
        self.backend = "auto"

    def lay_out(self, call: Call) -> None:
        """Take a call's grid.

        Raises:
            ClearError: the window cannot act on it.
        """
        self.grid = self.site.grid(*call.grid)
        self._pattern(call.text_length)
        if self.site.role == "joint" and call.image_slice(self.site) is not None:
            raise ClearError("expected windows over one picture's tokens, got those of several")
        self.backend = self._backend_beside(self.site.module.processor)

    def _pattern(self, text_length: int) -> Pattern:
        return self._binding.adapter.config.pattern(self.grid, text_length, self.site.text != "last")

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, text_length: int, extra: Sequence[KeyBlock]
    ) -> Tensor:
        config = self._binding.adapter.config
        scale = None
        if self._binding.proportional:
            scale = proportional_scale(key.shape[2], query.shape[3], config.down_factor)
        return local_attention(
            query, key, value,
            grid=self.grid,
            text_length=text_length,
            window=config.window,
            down_factor=config.down_factor,
            spatial_weight=self._spatial_weight,
            scale=scale,
            shape=config.shape,
            dilation=config.dilation,
            backend=self.backend,
            text_first=self.site.text != "last",
            extra=extra,
        )  # fmt: skip

    def _backend_beside(self, processor: Any) -> str:
        """The backend of `local_attention` that goes with what diffusers has set for a stock processor.

        "native" and its kin leave the choice to `local_attention`, "flex" is its flex; others attend to
        everything.

        Raises:
            ClearError: one of those, or context parallelism.
        """
        if type(processor).__name__ not in STAND_INS:
            return self._binding.backend  # the controller refuses it
        if getattr(processor, "_parallel_config", None) is not None:
            raise ClearError(
                "expected attention on one device, got context parallelism: a window needs its neighbours"
            )
        chosen = getattr(processor, "_attention_backend", None)
        if chosen is None:
            chosen, _ = _AttentionBackendRegistry.get_active_backend()
        name = AttentionBackendName(chosen).value
        if name == "flex":
            return "flex"
        if not name.lstrip("_").startswith("native"):
            raise ClearError(f"expected the attention backend native or flex for windows, got {name}")
        return self._binding.backend
