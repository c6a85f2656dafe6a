"""What one call of a denoiser is: step, rows, grid. Read from the call and its caller alone.

A denoiser may be shared by several pipelines, each with a scheduler and guidance of its own, and called from
several threads. So nothing is taken from the pipeline that an adapter was attached to where the stack says
who is calling. Everything is read when it is first needed: a call in which no adapter acts costs nothing.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from interactdiff.callers import Caller, caller_of, check_guidance
from interactdiff.errors import AdapterError, SceneError
from interactdiff.families import Grid
from interactdiff.schedule import StepClock
from interactdiff.sites import Denoiser, Site, known_family

Rows = Literal["conditional", "unconditional", "reference"]
"""What a part of a batch is for: the prompt, guidance's other half, or a pass that others read from."""


class Call:
    """One call of a denoiser.

    Attributes:
        arguments: the denoiser's, by name.
        guidance: the option of `set_scene`; None where the caller says.
    """

    def __init__(self, reader: "CallReader", arguments: Mapping[str, Any], rows: tuple[Rows, ...] | None):
        self.arguments, self._reader, self._rows = arguments, reader, rows
        self.guidance = reader.guidance

    @cached_property
    def _image(self) -> Any:
        return self.arguments[self._reader.kind.image]

    @cached_property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self._image)

    @cached_property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return (self._image if isinstance(self._image, Tensor) else self._image[0]).device

    @cached_property
    def autocast(self) -> torch.dtype | None:
        """What products of matrices are computed in, if not in their own dtype."""
        kind = self.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if on else None

    @cached_property
    def grid(self) -> Grid:
        """Rows and columns of a transformer's image tokens, or of a U-Net's latents.

        Raises:
            AdapterError: the image's tokens are not one whole grid.
        """
        return self._reader.grid(self.arguments)

    def image_slice(self, site: Site) -> slice | None:
        """Which tokens of a site's queries are those of the image that is denoised; None for all."""
        if site.kind is None:
            return None
        count = self.grid[0] * self.grid[1]
        if site.whole:
            first = self.text_length if site.text == "first" else 0
            return slice(first, first + count)
        packed = isinstance(self._image, Tensor) and self._image.ndim == 3
        return slice(0, count) if packed and self._image.shape[1] != count else None

    def token_count(self, site: Site) -> int | None:
        """How many tokens a site's queries are for; None where padding of unknown length joins them."""
        if site.kind is None:
            rows, columns = site.grid(*self.grid)
            return rows * columns
        packed = isinstance(self._image, Tensor) and self._image.ndim == 3
        count = self._image.shape[1] if packed else self.grid[0] * self.grid[1]
        if site.whole:
            return count + self.text_length if packed and self.text_length else None
        return count

    @cached_property
    def text_length(self) -> int:
        """Text tokens of attention over text and image."""
        text = self.arguments.get(self._reader.kind.text)
        return text.shape[1] if isinstance(text, Tensor) else 0

    @cached_property
    def caller(self) -> Any:
        """The pipeline that calls: the nearest on the stack that holds the denoiser; None if none does."""
        return self._caller.pipeline

    @cached_property
    def pipeline(self) -> Any:
        """The caller, or else the pipeline that was attached to; None for a bare denoiser."""
        return self._reader.pipeline if self.caller is None else self.caller

    @cached_property
    def timestep(self) -> float:
        """In the scheduler's units; of a batch the first counts.

        A transformer's is taken from the scheduler itself, since in bfloat16 neighbours may be one.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        if self._reader.is_transformer:
            indices = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
            index = next((index for index in indices if index is not None), None)
            if index is not None:
                timesteps = scheduler.timesteps  # type: ignore[union-attr]
                return float(timesteps[min(index, len(timesteps) - 1)])
        given = self.arguments[self._reader.kind.timestep]
        now = float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)
        return float(self._reader.kind.scheduler_units(now))

    @property
    def is_pass(self) -> bool:
        """Whether it is an adapter's own, over references alone."""
        return self._rows is not None and set(self._rows) == {"reference"}

    @cached_property
    def step(self) -> tuple[int, int] | None:
        """Which step of the run, from 0, and how many it has; None if there is no way to know.

        An adapter's own pass is no step: its timesteps may be those of any.
        """
        if self.is_pass:
            return None
        return self._reader.clock(self.pipeline).read(self.timestep)

    @cached_property
    def rows(self) -> tuple[Rows, ...]:
        """What each of the equal parts of the batch is for, in order.

        Raises:
            AdapterError: neither the call nor its caller tells, the caller guides by pictures too, or it
                calls with parts of its pictures.
        """
        if self._rows is not None:
            return self._rows
        parts = self._read_rows()
        self._check_pictures(len(parts))
        return parts

    def _read_rows(self) -> tuple[Rows, ...]:
        if self.guidance is not None and self._reader.kind.guidance == "batch":
            return self._parts(self.guidance, self._reader.pipeline)
        check_guidance(self.caller)
        for name in (self._caller.guider, self._reader.context):
            if name is not None:
                return (_conditional("uncond" not in name),)
        if self.arguments.get("skip_layers") is not None:
            return ("conditional",)  # SD3's skip-layer guidance: a call of its own, with the prompt alone
        if self._reader.kind.guidance == "calls" and self.pipeline is not None:
            return (_conditional(self._is_first_text()),)
        return self._parts(self._is_guided(), self.pipeline)

    @cached_property
    def thread(self) -> int:
        """Which thread calls: what is kept from call to call belongs to one."""
        return threading.get_ident()

    @cached_property
    def _caller(self) -> Caller:
        return caller_of(sys._getframe(), self._reader.denoiser)

    def _check_pictures(self, parts: int) -> None:
        """Make sure that the caller's pictures come as wholes, each in as many rows as there are parts.

        Pipelines that draw in windows call with parts of their latents; those that edit or guide by more than
        a prompt call with more rows, or with one half alone.

        Raises:
            AdapterError: they do not.
        """
        latents, image = self._caller.latents, self._image
        if latents is None:
            return
        name = type(self.caller).__name__
        first = image[0]
        if latents.ndim == 4 and first.ndim in (3, 4) and first.shape[-2:] != latents.shape[-2:]:
            whole, part = (f"{rows} x {columns}" for rows, columns in (latents.shape[-2:], first.shape[-2:]))
        elif latents.ndim == 3 and first.ndim == 2 and self.grid[0] * self.grid[1] != latents.shape[1]:
            whole, part = f"{latents.shape[1]} tokens", f"{self.grid[0] * self.grid[1]}"
        elif self.batch != parts * len(latents):
            raise AdapterError(
                f"expected {name} to call its denoiser with {parts} rows for each of {len(latents)} "
                f"pictures, got {self.batch} rows: which of them are the prompt's is not known"
            )
        else:
            return
        raise AdapterError(
            f"expected {name} to denoise its whole picture in one call, latents of {whole}, got {part}: "
            "boxes are shares of the whole picture"
        )

    def _parts(self, guided: bool, pipeline: Any) -> tuple[Rows, ...]:
        """The parts of a batch, the last of which may be that of perturbed attention."""
        halves = self._reader.kind.conditional if guided else (True,)
        perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
        return tuple(_conditional(part) for part in ([*halves, True] if perturbed else halves))

    def _is_guided(self) -> bool:
        if self.guidance is not None or self.pipeline is None:
            return bool(self.guidance)  # a bare denoiser's batches are conditional
        guided = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            raise AdapterError(
                f"expected a pipeline with do_classifier_free_guidance, got {type(self.pipeline).__name__} "
                "without it: give set_scene guidance=True or False"
            )
        if self.caller is None:
            raise AdapterError(
                "expected a pipeline to call the denoiser that was attached to through one, got another "
                "caller: give set_scene guidance=True or False"
            )
        return bool(guided)

    def _is_first_text(self) -> bool:
        """Whether the text is that of a step's first call, which is the prompt's."""
        timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        return self._reader.is_first_text(self.arguments[self._reader.kind.text], timesteps, self.timestep)


class CallReader:
    """Reads the calls of one denoiser.

    Attributes:
        denoiser: the denoiser.
        pipeline: the one that was attached to; may be None.
        guidance: whether batches come in two halves; None where the caller says so.
        num_inference_steps: of a run without a pipeline.
    """

    def __init__(self, denoiser: Denoiser, pipeline: Any):
        self.denoiser, self.pipeline = denoiser, pipeline
        family = known_family(denoiser)
        self.kind, self.is_transformer = family.call, bool(family.sites)
        self.guidance: bool | None = None
        self.num_inference_steps: int | None = None
        self._local = threading.local()
        self._grid: tuple[object, Grid] | None = None

    def configure(self, guidance: bool | None, num_inference_steps: int | None) -> None:
        """What the calls of a new scene's runs are, where they do not say."""
        self.guidance, self.num_inference_steps = guidance, num_inference_steps
        self._local = threading.local()

    def read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: tuple[Rows, ...] | None = None
    ) -> Call:
        """A call of the denoiser with these arguments, and what its rows are for where that is known."""
        return Call(self, self.named(args, kwargs), rows or getattr(self._local, "rows", None))

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by the names that the denoiser's class has for them, whoever has wrapped it."""
        return {**dict(zip(_parameters(type(self.denoiser)), args, strict=False)), **kwargs}

    @contextmanager
    def passing(self, *rows: Rows) -> Iterator[None]:
        """Say what the rows of calls within the block are for, as a pass for references does."""
        before = getattr(self._local, "rows", None)
        self._local.rows = rows
        try:
            yield
        finally:
            self._local.rows = before

    @property
    def is_nested(self) -> bool:
        """Whether an adapter's own pass is under way in this thread."""
        return getattr(self._local, "rows", None) is not None

    @property
    def context(self) -> str | None:
        """The name of the `cache_context` that this thread is in."""
        return getattr(self._local, "context", None)

    def wrap_context(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `cache_context`, which also tells this reader its name."""

        @contextmanager
        def wrapped(name: str, **options: Any) -> Iterator[Any]:
            before = self.context
            self._local.context = name
            try:
                with cache_context(name, **options) as entered:
                    yield entered
            finally:
                self._local.context = before

        return wrapped

    def clock(self, pipeline: Any) -> StepClock:
        """The clock of a pipeline's run in this thread."""
        clocks = self._local.__dict__.setdefault("clocks", {})
        alive, clock = clocks.get(id(pipeline), (None, None))
        if clock is None or (alive is not None and alive() is not pipeline):
            for key in [key for key, (other, _) in clocks.items() if other is not None and other() is None]:
                del clocks[key]
            alive, held = _weak(pipeline)
            clock = StepClock(held, self.num_inference_steps)
            clocks[id(pipeline)] = alive, clock
        return clock

    def grid(self, arguments: Mapping[str, Any]) -> Grid:
        """`CallKind.grid`; places of tokens, the same tensor at every step of a run, are read once."""
        places = arguments.get("img_ids")
        if places is None or arguments.get("kv_cache_mode") is not None:
            return self.kind.grid(arguments, self.denoiser.config)
        if self._grid is None or self._grid[0] is not places:
            self._grid = places, self.kind.grid(arguments, self.denoiser.config)
        return self._grid[1]

    def is_first_text(self, text: object, timesteps: object, timestep: float) -> bool:
        """Whether a text is the one that the first call of this step had, in a run of these timesteps."""
        first = self._local.__dict__.get("first")
        if first is None or first[0] is not timesteps or first[1] != timestep:
            first = self._local.first = timesteps, timestep, text
        return text is first[2]


def scenes_of_rows(call: Call, scenes: int) -> list[tuple[int, Rows]]:
    """For each row of a call's batch its scene, from 0, and what it is for.

    Rows of a prompt are neighbours, as `num_images_per_prompt` makes them, in each part of the batch.

    Raises:
        SceneError: so many scenes do not explain the batch.
    """
    parts = call.rows
    images, rest = divmod(call.batch, len(parts))
    if rest or images % scenes:
        guided = "on" if "unconditional" in parts else "off"
        raise SceneError(
            f"expected a batch of {len(parts)} times a multiple of {scenes} rows, for {scenes} scenes "
            f"with guidance {guided}, got {call.batch} rows"
        )
    per_prompt = images // scenes
    return [(image // per_prompt, part) for part in parts for image in range(images)]


def _conditional(is_conditional: bool) -> Rows:
    return "conditional" if is_conditional else "unconditional"


@lru_cache
def _parameters(denoiser: type) -> tuple[str, ...]:
    return tuple(signature(denoiser.forward).parameters)[1:]  # type: ignore[attr-defined]


def _weak(pipeline: Any) -> tuple[Any, Any]:
    """A weak reference to a pipeline and a weak stand-in for it, so that a clock keeps none alive."""
    try:
        return weakref.ref(pipeline), weakref.proxy(pipeline)
    except TypeError:  # None, and whatever has no weak references
        return None, pipeline
