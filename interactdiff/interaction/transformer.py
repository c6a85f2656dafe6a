"""How an adapter acts in a transformer: by two hooks at each joint attention, and nothing else is touched.

    the queries, after             keep q
    its output projection, before  o -> o + what `JointCrossAttention` reads
    (or the attention itself, after, where a block projects the outputs of its parts together)

The attention's processor is left alone, so whichever is there goes on working: diffusers' own, CLEAR's, one
of an IP-Adapter. Published adapters that come as processors fight over that one place.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.call import Call, Reading
from interactdiff.interaction.config import JointConfig
from interactdiff.interaction.fuser import KeysValues, grid_features
from interactdiff.interaction.joint import JointCrossAttention, SceneTokens
from interactdiff.interaction.tokens import Item
from interactdiff.scene import SceneError
from interactdiff.sites import JointSite, TokenGrid, Transformer, joint_sites


class JoinedSite:
    """A joint attention with the adapter's.

    Attributes:
        call: what the transformer call under way needs; None where nothing is asked.
    """

    def __init__(self, site: JointSite, reader: JointCrossAttention):
        self.site, self.reader = site, reader
        self.call: Call | None = None
        self._queries: Tensor | None = None
        self._scenes: KeysValues | None = None
        self._positions: tuple[tuple[int, int], Tensor] | None = None
        self._kept: Tensor | None = None
        self._hooked: tuple[nn.Module | None, ...] = ()
        self._hooks: list[RemovableHandle] = []

    def hook(self) -> None:
        """Hook the adapter in, or anew where a LoRA has taken the place of what was hooked."""
        modules = self.site.query, self.site.out
        if self._hooked == modules:
            return
        self.unhook()
        self._hooked = modules
        if self.site.out is None:
            attended = self.site.attention.register_forward_hook(self._after)
        else:
            attended = self.site.out.register_forward_pre_hook(self._before_out)
        self._hooks = [self.site.query.register_forward_hook(self._keep_queries), attended]

    def unhook(self) -> None:
        """Take the adapter out."""
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked = ()

    def prepare(self, tokens: SceneTokens, size: tuple[int, int]) -> None:
        """Compute what no step changes, once: keys and values, and the positions of a grid."""
        with torch.no_grad():
            if self._scenes is None:
                self._scenes = self.reader.keys_values(tokens)
            if self._positions is None or self._positions[0] != size:
                self._positions = size, self._positions_of(size, tokens.tokens.device)

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        self.call = self._queries = self._scenes = self._positions = self._kept = None

    def _positions_of(self, size: tuple[int, int], device: torch.device) -> Tensor:
        return self.reader.positions(grid_features(*size, device))

    def _keep_queries(self, _: nn.Module, __: tuple[Any, ...], queries: Tensor) -> None:
        if self.call is not None:
            self._queries = queries

    def _before_out(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        read = self._read(0)
        return None if read is None else (args[0] + read.to(args[0].dtype), *args[1:])

    def _after(self, _: nn.Module, __: tuple[Any, ...], attended: Tensor) -> Tensor | None:
        first = 0 if self.call is None else self.call.text_length
        read = self._read(first)
        if read is None:
            return None
        return torch.cat([attended[:, :first], attended[:, first:] + read.to(attended.dtype)], 1)

    def _read(self, first: int) -> Tensor | None:
        """[B, L, dim], what to add for the image's tokens, whose queries begin at the `first` one."""
        call, queries, self._queries = self.call, self._queries, None
        if call is None:
            return None
        if queries is None or len(queries) != call.batch:
            kind = type(self.site.attention.processor).__name__
            got = "none of them" if queries is None else f"{len(queries)} at a time"
            raise AdapterError(
                f"expected {self.site.path} to make queries for {call.batch} batch rows, got {got}: "
                f"interactions cannot act beside {kind}"
            )
        read = self._kept if call.reuse else self._computed(call, self._by_head(queries)[:, :, first:])
        if call.keep:
            self._kept = cast(Tensor, read).detach()
        if read is None or call.controlled is None:
            return read
        return read.new_zeros(call.batch, *read.shape[1:]).index_copy(0, call.controlled, read)

    def _computed(self, call: Call, queries: Tensor) -> Tensor:
        """[R, L, dim]: what the rows that have a scene read."""
        if call.controlled is not None:
            queries = queries[call.controlled]
        if call.tokens is not None:
            scenes = self.reader.keys_values(call.tokens)
            positions = self._positions_of(call.size, queries.device)
        else:
            scenes = KeysValues(*(t[call.rows] for t in cast(KeysValues, self._scenes)))
            positions = cast(tuple[Any, Tensor], self._positions)[1]
        return self.reader(queries, scenes, positions, call.scale, call.seen)

    def _by_head(self, queries: Tensor) -> Tensor:
        """[B, heads, L, D]."""
        if self.site.heads_first:
            return queries
        queries = queries if queries.ndim == 4 else queries.unflatten(2, (self.site.heads, -1))
        return queries.transpose(1, 2)


class ScenesOfTransformer:
    """Tokens for joint attentions: of each scene those of the slots that it fills.

    Published fusers read the tokens of empty slots, and in the unconditional half nothing else. A joint
    attention has no need of that: an image without a scene, and the unconditional half, are the base's own.

    Args:
        tokens: of S scenes, or of each batch row.
        structured: whether a token is seen by its region alone.
        given: whether there is a row for each batch row.
    """

    def __init__(self, tokens: SceneTokens, structured: bool, given: bool):
        self.tokens, self._structured, self.given = tokens, structured, given
        self.scenes = len(tokens.tokens)
        self._filled = [bool(one) for one in (tokens.weights != 0).any(1).tolist()] if not given else []
        self._seen: tuple[Tensor | None, tuple[int, int], Tensor | None] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "ScenesOfTransformer":
        """The same elsewhere."""
        tokens, weights, boxes = (t.to(device) for t in self.tokens)
        self.tokens, self._seen = SceneTokens(tokens.to(dtype), weights, boxes), None
        return self

    def controls(self, scene: int, conditional: bool) -> bool:
        """Whether a batch row is controlled: in the conditional half, where its scene is not empty."""
        return conditional and self._filled[scene]

    def rows(self, scenes: list[tuple[int, bool]]) -> Tensor:
        """[R] the scenes of batch rows."""
        return torch.tensor([scene for scene, _ in scenes], device=self.tokens.tokens.device)

    def seen(self, rows: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """Which tokens each image token sees; made once for a grid and these rows."""
        if self._seen is None or self._seen[0] is not rows or self._seen[1] != size:
            seen = self.tokens.seen(size, self._structured)
            self._seen = rows, size, seen if seen is None or rows is None else seen[rows]
        return self._seen[2]


class InTransformer:
    """An adapter in a transformer.

    Pipelines that guide Flux by a negative prompt call it twice a step, with the prompt first: within a step
    another text than the first one is the negative prompt's.

    Attributes:
        sites: where it acts.
        pipeline: whose calls these are; may be None.
    """

    def __init__(self, transformer: Transformer, adapter: InteractionAdapter, pipeline: Any):
        self._transformer, self._adapter, self.pipeline = transformer, adapter, pipeline
        self._structured = cast(JointConfig, adapter.config.joint).structured
        readers = adapter.readers
        self.sites = [JoinedSite(site, readers[site.path]) for site in joint_sites(transformer)]
        self._forward = signature(type(transformer).forward)
        self._step: tuple[Any, ...] = ()
        self._grid = TokenGrid()

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        """What the transformer's arguments say.

        Raises:
            AdapterError: the image's tokens are not one whole grid.
        """
        call = self._forward.bind_partial(self._transformer, *args, **kwargs).arguments
        states, text = call["hidden_states"], call["encoder_hidden_states"]
        timestep, halves = self._timestep(call["timestep"]), None
        if call.get("skip_layers") is not None:
            halves = (True,)  # SD3's skip-layer guidance: a call of its own, with the prompt alone
        elif isinstance(self._transformer, FluxTransformer2DModel) and self.pipeline is not None:
            halves = (self._is_prompt(text, timestep),)
        grid = self._grid(self._transformer, call)
        return Reading(len(states), grid, timestep, states.device, text.shape[1], halves)

    def scenes(self, scenes: Sequence[Sequence[Item]], features: Mapping[str, Tensor]) -> ScenesOfTransformer:
        """Tokens of scenes, as many slots as the fullest one fills."""
        made = self._adapter(**self._adapter.scene_tensors(scenes, features))
        there = (made.weights != 0).any(0)
        tokens = SceneTokens(made.tokens[:, there], made.weights[:, there], made.boxes[:, there])
        return ScenesOfTransformer(tokens, self._structured, given=False)

    def rows(self, tokens: Any) -> ScenesOfTransformer:
        """Tokens of each batch row, as the adapter makes them.

        Raises:
            SceneError: they are not that.
        """
        width = self._adapter.config.token_dim
        if not isinstance(tokens, SceneTokens) or tokens.tokens.shape[-1] != width:
            got = (
                f"width {tokens.tokens.shape[-1]}"
                if isinstance(tokens, SceneTokens)
                else type(tokens).__name__
            )
            raise SceneError(f"expected SceneTokens of width {width}, got {got}")
        return ScenesOfTransformer(tokens, self._structured, given=True)

    def forget(self) -> None:
        """Let go of everything that belongs to a scene or a run."""
        self._step, self._grid = (), TokenGrid()
        for site in self.sites:
            site.forget()

    def _timestep(self, given: Tensor) -> Tensor:
        """In the scheduler's units; from the scheduler itself, since in bfloat16 neighbours may be one."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        indices = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
        index = next((index for index in indices if index is not None), None)
        if index is not None:
            timesteps = cast(Any, scheduler).timesteps
            return timesteps[min(index, len(timesteps) - 1)]
        return given * 1000 if isinstance(self._transformer, FluxTransformer2DModel) else given

    def _is_prompt(self, text: Tensor, timestep: Tensor) -> bool:
        step = self.pipeline.scheduler.timesteps, float(timestep.flatten()[0])
        if len(self._step) == 0 or self._step[0] is not step[0] or self._step[1] != step[1]:
            self._step = (*step, text)
        return text is self._step[2]
