"""Generates what the pages ask for: one load of a model, one picture at a time, whoever asks."""

import gc
import queue
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from PIL import Image

from interactdiff.adapter_loading import chosen_adapters
from interactdiff.app.limits import Limits
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.maps import AttentionMaps
from interactdiff.method_specs import Cost
from interactdiff.models import MODEL, ModelError, resolve
from interactdiff.picture import Record, save_picture
from interactdiff.pipeline_loading import load_pipeline, usable_device
from interactdiff.registry import configurables, used_methods
from interactdiff.scene import MAX_SEED, Scene

PREVIEW_EVERY = 0.25  # seconds at least between two previews
KEPT = 400  # pictures on the disk, of all pages together
KEPT_ADAPTERS = 8  # that were learned, likewise


class Stopped(Exception):
    """The user has pressed Stop, or the server is shutting down."""


@dataclass(frozen=True)
class GenerationRequest:
    """What a page asks for.

    Attributes:
        scene: of the first picture; each next one has the next seed.
        images: how many.
        compare: whether to generate each without control too.
        model: a name that `Limits` lets through.
        adapters: likewise, by the name of their method; the model's own for those that are left out.
        methods: settings of methods and of a sampler, by name.
        record_attention: whether to record attention maps.
    """

    scene: Scene
    images: int = 1
    compare: bool = False
    model: str = MODEL
    adapters: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record_attention: bool = False

    @property
    def scenes(self) -> list[tuple[Scene, bool]]:
        """Every picture's scene, and whether it is controlled."""
        controlled = bool(self.scene.extra_items or (self.scene.items and self.scene.strength > 0))
        seeds = [(self.scene.seed + n) % (MAX_SEED + 1) for n in range(self.images)]
        scenes = []
        for seed in seeds:
            scene = replace(self.scene, seed=seed)
            scenes.append((scene, controlled))
            if self.compare and controlled:
                scenes.append((replace(scene, strength=0.0, extra_items=()), False))
        return scenes


@dataclass(frozen=True)
class StoredImage:
    """A picture that is done.

    Attributes:
        path: of the PNG, its record inside.
        record: how it was generated.
        controlled: whether items of the scene acted.
        maps: its attention maps, if they were recorded.
        learned: which adapters of the record are the server's own, for download as archives.
    """

    path: Path
    record: Record
    controlled: bool
    maps: AttentionMaps | None = None
    learned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelStatus:
    """What a page has to know of a model.

    Attributes:
        size: of its pictures in pixels, where the scene has none.
        unsupported: of each method and sampler why the model cannot use it, or None.
        device: where it is.
        dtype: in what precision.
    """

    size: int
    unsupported: dict[str, str | None]
    device: str
    dtype: str


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        message: what is being done.
        fraction: done of it all, 0 to 1.
        seconds_left: as far as can be estimated.
        preview: of the picture under way, if there is a new one.
        images: the pictures so far.
    """

    message: str
    fraction: float
    seconds_left: float | None = None
    preview: Image.Image | None = None
    images: tuple[StoredImage, ...] = ()


class Worker:
    """Has the models, and generates; shared by all pages.

    Args:
        limits: what a request may ask for.
        device: a torch device, or "auto".
        dtype: of the models, or "auto".

    Attributes:
        folder: where pictures are stored until `close`.
    """

    def __init__(self, limits: Limits, device: str = "auto", dtype: str = "auto"):
        self.limits, self._device, self._dtype = limits, device, dtype
        self._folder = tempfile.TemporaryDirectory(prefix="interactdiff-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._loaded: tuple[str, dict[str, Any], ScenePipeline] | None = None
        # One thread for good: torch keeps memory for every thread that it ever ran in.
        self._thread = ThreadPoolExecutor(1, "worker")
        self._stored: OrderedDict[Path, None] = OrderedDict()
        self._adapters: dict[str, Path | None] = {}  # learned ones by name; None once it was deleted
        self._closing = threading.Event()

    def _pipeline(
        self, model: str, adapters: Mapping[str, str], methods: Mapping[str, Mapping[str, Any]]
    ) -> ScenePipeline:
        """The model with these adapters; one model is loaded at a time."""
        self._check_names(model, adapters)
        adapters = {method: str(self._adapters.get(name) or name) for method, name in adapters.items()}
        chosen = chosen_adapters(model, adapters, methods)
        if self._loaded is not None and self._loaded[0] == model:
            _, attached, pipeline = self._loaded
            if attached != chosen:
                self._loaded = model, {}, pipeline.detached()  # if the others are refused
                self._loaded = model, chosen, ScenePipeline.attached(pipeline.pipeline, model, chosen)
        else:
            self._unload()
            options = self._device, self._dtype
            pipeline = ScenePipeline.from_pretrained(model, adapters, *options, methods=methods)
            pipeline.pipeline.set_progress_bar_config(disable=True)
            self._loaded = model, chosen, pipeline
        return self._loaded[2]

    def _unload(self) -> None:
        """Free the model before another is loaded, so that two are never in memory. Nobody may hold it."""
        self._loaded = None
        gc.collect()  # hooks and modules refer to each other

    def without_adapters(self, model: str) -> Any:
        """A model's diffusers pipeline in float32, with no adapter attached, for use on the worker's thread.

        Raises:
            ModelError: this server does not open it, or there is no such model.
        """
        self._check_names(model, {})
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == model and loaded[2].denoiser.dtype == torch.float32:
            self._loaded = model, {}, loaded[2].detached()
            return loaded[2].pipeline
        loaded = None
        self._unload()
        alone = load_pipeline(resolve("model", model), usable_device(self._device), torch.float32)
        alone.set_progress_bar_config(disable=True)
        return alone

    def describe(self, model: str, adapters: Mapping[str, str]) -> ModelStatus:
        """What a page has to know of a model.

        Raises:
            ModelError: this server does not open it, or there is no such model.
            AdapterError: an adapter is damaged, or for another base.
        """

        def describe() -> ModelStatus:
            pipeline = self._pipeline(model, adapters, {})
            unsupported = {name: pipeline.unsupported(name) for name in configurables()}
            denoiser = pipeline.denoiser
            dtype = str(denoiser.dtype).removeprefix("torch.")
            return ModelStatus(pipeline.size, unsupported, denoiser.device.type, dtype)

        return self._thread.submit(describe).result()

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request before it waits.

        Raises:
            SceneError: it asks for too much.
            ModelError: this server does not open its model.
        """
        self.limits.check_scene(request.scene)
        size = (request.scene.width or 8) * (request.scene.height or 8)
        self.limits.check_cost(Cost(size, request.scene.steps), request.images)
        self._check_names(request.model, request.adapters)

    def generate(self, request: GenerationRequest, stop: threading.Event) -> Iterator[Progress]:
        """Carry out a request and report progress; the last report has all pictures.

        Args:
            request: what to generate.
            stop: ends it within a step; what is done by then is kept.

        Raises:
            InteractdiffError: in one sentence, before anything is generated.
        """
        return self.run(lambda report: self._generate(request, stop, report), stop)

    def run(self, job: Callable[[Callable[[Any], None]], None], stop: threading.Event) -> Iterator[Any]:
        """Do a job on the worker's thread, once it is its turn, and yield what it reports.

        Args:
            job: is given what reports.
            stop: set once nobody waits for the reports any more.
        """
        reports: queue.Queue[Any] = queue.Queue()

        def run() -> None:
            try:
                if not stop.is_set():
                    job(reports.put)
                reports.put(None)
            except BaseException as error:  # carried to the page that waits
                reports.put(error)

        self._thread.submit(run)
        try:
            while (report := reports.get()) is not None:
                if isinstance(report, BaseException):
                    raise report
                yield report
        finally:
            stop.set()  # the page has gone: nobody waits for the rest

    def _generate(
        self, request: GenerationRequest, stop: threading.Event, report: Callable[[Progress], None]
    ) -> None:
        report(Progress("Loading the model", 0.0))
        self.check(request)
        used = used_methods(request.scene, request.methods)
        pipeline = self._pipeline(request.model, request.adapters, used)
        cost, scenes = pipeline.cost(request.scene, used), request.scenes
        self.limits.check_cost(cost, request.images)
        settings = pipeline.checked_settings(used)
        images: list[StoredImage] = []
        began, last_preview = time.monotonic(), 0.0
        for number, (scene, controlled) in enumerate(scenes):
            title = f"Picture {number + 1} of {len(scenes)}, " if len(scenes) > 1 else ""

            def on_step(step: int, preview: Any, number: int = number, title: str = title) -> None:
                nonlocal last_preview
                if self.is_ended(stop):
                    raise Stopped
                now = time.monotonic()
                fraction = (number + min((step + 1) / cost.steps, 1.0)) / len(scenes)
                left = (now - began) * (1 - fraction) / fraction
                picture = None
                if now - last_preview >= PREVIEW_EVERY:
                    picture = preview()
                    last_preview = time.monotonic()  # not before: a preview may take longer than a step
                message = f"{title}step {min(step + 1, cost.steps)} of {cost.steps}"
                report(Progress(message, fraction, left, picture, tuple(images)))

            slots = len(scene.interactions) + len(scene.entities)
            record_maps = request.record_attention and controlled and slots > 0
            binding = pipeline.handle["interaction"] if record_maps and pipeline.handle is not None else None
            try:
                with nullcontext() if binding is None else binding.record_attention(slots) as recorder:
                    image = pipeline.generate(scene, on_step, methods=used)
            except Stopped:
                break
            record = self._with_names(pipeline.record(scene, settings))
            maps = None if recorder is None else recorder.maps()
            learned = frozenset(self._adapters).intersection(record.adapters.values())
            images.append(StoredImage(self.store(image, record), record, controlled, maps, learned))
        message = f"Stopped after {len(images)} of {len(scenes)} pictures"
        if len(images) == len(scenes):
            message = "Done"
        report(Progress(message, 1.0, 0.0, None, tuple(images)))

    def store(self, image: Image.Image, record: Record) -> Path:
        """Write a picture, its record inside; the oldest ones go once there are many."""
        path = self.folder / f"interactdiff-{record.scene.seed}-{uuid4().hex[:8]}.png"
        save_picture(image, path, record)
        self._stored[path] = None
        while len(self._stored) > KEPT:
            self._stored.popitem(last=False)[0].unlink(missing_ok=True)
        return path

    def keep_adapter(self, folder: Path) -> str:
        """Let requests name an adapter in the worker's folder; the oldest ones go once there are many.

        Args:
            folder: of it, whose name no other one has; an archive may lie beside it.

        Returns:
            Its name, which is that of the folder.
        """
        self._adapters[folder.name] = folder
        kept = [one for one in self._adapters.values() if one is not None]
        for oldest in kept[:-KEPT_ADAPTERS]:
            self._adapters[oldest.name] = None
            shutil.rmtree(oldest, ignore_errors=True)
            oldest.with_suffix(".zip").unlink(missing_ok=True)
        return folder.name

    def _with_names(self, record: Record) -> Record:
        """A record in which learned adapters go by their names: the server's folders are not for others."""
        names = {str(folder): name for name, folder in self._adapters.items() if folder is not None}
        adapters = {method: names.get(at or "", at) for method, at in record.adapters.items()}
        return replace(record, adapters=adapters)

    def is_ended(self, stop: threading.Event | None = None) -> bool:
        """Whether a job has to end: it was stopped, or the server is shutting down."""
        return self._closing.is_set() or (stop is not None and stop.is_set())

    def close(self) -> None:
        """Generate no more, and delete every picture."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def _check_names(self, model: str, adapters: Mapping[str, str]) -> None:
        self.limits.check_name("model", model)
        for name in adapters.values():
            if self._adapters.get(name) is not None:
                continue
            if name in self._adapters:
                raise ModelError(
                    "expected a concept that this server still has, got one that was deleted for newer ones: "
                    "learn it again"
                )
            self.limits.check_name("adapter", name)
