"""Draws what the pages ask for: one load of a model, one picture at a time, whoever asks."""

import queue
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from interactdiff.app.limits import Limits
from interactdiff.checkpoint import AdapterError
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.maps import AttentionMaps
from interactdiff.methods import Work, checked_methods, draw, methods, work
from interactdiff.models import ModelError
from interactdiff.picture import PictureError, Record, save_picture
from interactdiff.scene import MAX_SEED, Scene, SceneError

PREVIEW_EVERY = 0.25  # seconds at least between two looks at a picture under way
KEPT = 400  # pictures on the disk, of all pages together
REFUSALS = (SceneError, ModelError, AdapterError, PictureError)


class Stopped(Exception):
    """The user wants no more of it."""


@dataclass(frozen=True)
class Order:
    """What a page asks for.

    Attributes:
        scene: of the first picture; each next one has the next seed.
        images: how many.
        compare: whether to draw each without control too.
        model: a name that `Limits` lets through.
        adapter: likewise, or None for the model's own.
        methods: settings by the name of their method.
        look: whether to record where the pictures look.
    """

    scene: Scene
    images: int = 1
    compare: bool = False
    model: str = "stickworld"
    adapter: str | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    look: bool = False

    @property
    def scenes(self) -> list[tuple[Scene, bool]]:
        """Every picture's scene, and whether it is controlled."""
        controlled = bool(self.scene.items) and self.scene.strength > 0
        seeds = [(self.scene.seed + n) % (MAX_SEED + 1) for n in range(self.images)]
        scenes = []
        for seed in seeds:
            scene = replace(self.scene, seed=seed)
            scenes.append((scene, controlled))
            if self.compare and controlled:
                scenes.append((replace(scene, strength=0.0), False))
        return scenes


@dataclass(frozen=True)
class Drawn:
    """A picture that is done.

    Attributes:
        path: of the PNG, its record inside.
        record: how it was drawn.
        controlled: whether interactions acted.
        maps: where it looked, if that was recorded.
    """

    path: Path
    record: Record
    controlled: bool
    maps: AttentionMaps | None = None


@dataclass(frozen=True)
class Facts:
    """What a page has to know of a model.

    Attributes:
        size: of its pictures in pixels, where none is asked for.
        unfit: of each method why it is not for the model, or None.
        device: where it is.
        dtype: in what precision.
    """

    size: int
    unfit: dict[str, str | None]
    device: str
    dtype: str


@dataclass(frozen=True)
class Progress:
    """How far an order is.

    Attributes:
        words: what is being done.
        share: done of it all, 0 to 1.
        left: seconds, as far as can be told.
        picture: a look at the picture under way, if there is a new one.
        done: the pictures so far.
    """

    words: str
    share: float
    left: float | None = None
    picture: Image.Image | None = None
    done: tuple[Drawn, ...] = ()


class Artist:
    """Has the models, and draws; shared by all pages.

    Args:
        limits: what an order may ask for.
        device: a torch device, or "auto".
        dtype: of the models, or "auto".
    """

    def __init__(self, limits: Limits, device: str = "auto", dtype: str = "auto"):
        self.limits, self._device, self._dtype = limits, device, dtype
        self._folder = tempfile.TemporaryDirectory(prefix="interactdiff-")
        self._loaded: tuple[tuple[str, str | None], ScenePipeline] | None = None
        # One thread for good: torch keeps memory for every thread that it ever ran in.
        self._worker = ThreadPoolExecutor(1, "artist")
        self._pictures: OrderedDict[Path, None] = OrderedDict()
        self._closing = threading.Event()

    def _drawer(self, model: str, adapter: str | None) -> ScenePipeline:
        """The models of these names; one pair is loaded at a time."""
        self.limits.check_name("model", model)
        if adapter is not None:
            self.limits.check_name("adapter", adapter)
        if self._loaded is None or self._loaded[0] != (model, adapter):
            self._loaded = None  # first, so that two models are never in memory
            drawer = ScenePipeline.from_pretrained(model, adapter, self._device, self._dtype)
            drawer.pipeline.set_progress_bar_config(disable=True)
            self._loaded = (model, adapter), drawer
        return self._loaded[1]

    def describe(self, model: str, adapter: str | None) -> Facts:
        """What a page has to know of a model.

        Raises:
            ModelError: this server does not open it, or there is no such model.
            AdapterError: the adapter is damaged, or for another base.
        """

        def describe() -> Facts:
            drawer = self._drawer(model, adapter)
            unfit = {name: method.why_not(drawer.pipeline) for name, method in methods().items()}
            denoiser = drawer.denoiser
            return Facts(drawer.size, unfit, denoiser.device.type, str(denoiser.dtype).removeprefix("torch."))

        return self._worker.submit(describe).result()

    def check(self, order: Order) -> None:
        """Refuse an order before it waits.

        Raises:
            SceneError: it asks for too much.
            ModelError: this server does not open its model.
        """
        self.limits.check_scene(order.scene)
        size = (order.scene.width or 8) * (order.scene.height or 8)
        self.limits.check_work(Work(size, order.scene.steps), order.images)
        self.limits.check_name("model", order.model)
        if order.adapter is not None:
            self.limits.check_name("adapter", order.adapter)

    def draw(self, order: Order, stop: threading.Event) -> Iterator[Progress]:
        """Draw an order, and tell about it as it goes; the last thing told has all pictures.

        Args:
            order: what to draw.
            stop: ends it within a step; what is done by then is kept.

        Raises:
            SceneError, ModelError, AdapterError: in one sentence, before anything is drawn.
        """
        told: queue.Queue[Progress | BaseException | None] = queue.Queue()

        def run() -> None:
            try:
                self._draw(order, stop, told)
                told.put(None)
            except BaseException as error:  # carried to the page that asked
                told.put(error)

        self._worker.submit(run)
        try:
            while (said := told.get()) is not None:
                if isinstance(said, BaseException):
                    raise said
                yield said
        finally:
            stop.set()  # the page has gone: nobody waits for the rest

    def _draw(self, order: Order, stop: threading.Event, told: "queue.Queue[Any]") -> None:
        if stop.is_set():
            return
        told.put(Progress("Loading the model", 0.0))
        drawer = self._drawer(order.model, order.adapter)
        self.check(order)
        cost, scenes = work(drawer, order.scene, order.methods), order.scenes
        self.limits.check_work(cost, order.images)
        settings = checked_methods(drawer, order.methods)
        done: list[Drawn] = []
        began, looked = time.monotonic(), 0.0
        for number, (scene, controlled) in enumerate(scenes):
            title = f"Picture {number + 1} of {len(scenes)}, " if len(scenes) > 1 else ""

            def on_step(step: int, look: Any, number: int = number, title: str = title) -> None:
                nonlocal looked
                if stop.is_set() or self._closing.is_set():
                    raise Stopped
                now = time.monotonic()
                share = (number + min((step + 1) / cost.steps, 1.0)) / len(scenes)
                left = (now - began) * (1 - share) / share
                picture = None
                if now - looked >= PREVIEW_EVERY:
                    picture = look()
                    looked = time.monotonic()  # not before: a look may take longer than a step
                words = f"{title}step {min(step + 1, cost.steps)} of {cost.steps}"
                told.put(Progress(words, share, left, picture, tuple(done)))

            handle = drawer.handle if order.look and controlled else None
            slots = len(scene.items)
            try:
                with nullcontext() if handle is None else handle.record_attention(slots) as recorder:
                    image = draw(drawer, scene, order.methods, on_step)
            except Stopped:
                break
            record = drawer.record(scene, settings)
            maps = None if recorder is None else recorder.maps()
            done.append(Drawn(self.keep(image, record), record, controlled, maps))
        words = "Done" if len(done) == len(scenes) else f"Stopped after {len(done)} of {len(scenes)} pictures"
        told.put(Progress(words, 1.0, 0.0, None, tuple(done)))

    def keep(self, image: Image.Image, record: Record) -> Path:
        """Write a picture, its record inside; the oldest ones go once there are many."""
        path = Path(self._folder.name) / f"interactdiff-{record.scene.seed}-{uuid4().hex[:8]}.png"
        save_picture(image, path, record)
        self._pictures[path] = None
        while len(self._pictures) > KEPT:
            self._pictures.popitem(last=False)[0].unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Draw no more, and delete every picture."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)
        self._folder.cleanup()
