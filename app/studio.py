"""What the page does: keeps canvas, text and table in step, generates, and opens earlier pictures."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from interactdiff.app import api, results, theme
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import (
    adapters_of,
    error_place,
    filled,
    random_seed,
    request_of,
    taken_from_canvas,
    with_layout,
)
from interactdiff.app.learning import LearnedConcept, with_learned
from interactdiff.app.limits import opened_picture
from interactdiff.app.page import Page, Unsupported
from interactdiff.app.picture_items import PlacedItem
from interactdiff.app.views import VIEWS
from interactdiff.app.worker import ModelStatus, StoredImage, Worker
from interactdiff.errors import InteractdiffError
from interactdiff.picture import NoRecordError, Record, enlarged, installed_versions, read_record
from interactdiff.registry import configurables, item_specs, methods
from interactdiff.scene import Scene, SceneError

Updates = dict[Any, Any]  # of parts of the page
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SAFE_SEED = 2**53  # the greatest whole number that JavaScript is sure of
ONE_AT_A_TIME: dict[str, Any] = {**PRIVATE, "concurrency_id": "models", "concurrency_limit": 1}
IN_TURN: dict[str, Any] = {**PRIVATE, "concurrency_id": "pages", "concurrency_limit": 2}
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False}
LATEST: dict[str, Any] = {**AT_ONCE, "trigger_mode": "always_last"}


class Studio(Page):
    """The page at work.

    Args:
        worker: generates.
        model: chosen at first.
        adapters: likewise, by the name of their method.

    Raises:
        ModelError: there is no such model.
        AdapterError: there is no such adapter, or it is for another base.
    """

    def __init__(self, worker: Worker, model: str, adapters: Mapping[str, str] | None = None):
        adapters = adapters or {}
        status = worker.describe(model, adapters)
        super().__init__(worker.limits, model, adapters, status.size, status.unsupported)
        self.worker = worker
        self._stops: dict[str, tuple[str, threading.Event]] = {}  # of each job its page, and what ends it
        with self.blocks:
            api.add_to(self.blocks, worker, model, adapters)
            self._wire_forms()
            self._wire_generation()
            self.concepts.wire(self, AT_ONCE, ONE_AT_A_TIME)
            self.blocks.load(None, js=theme.DROP)

    def _wire_forms(self) -> None:
        words = [self.canvas, self.prompt, self.suggested]
        self.canvas.input(self._canvas_edited, words, self.forms, **LATEST)
        for event in (self.text.blur, self.text.submit):
            event(self._text_edited, [self.text, *words], self.forms, **LATEST)
        self.table.input(self._table_edited, [self.table, *words], self.forms, **LATEST)
        for name, button in self.tools.items():
            take = partial(self._take_from_canvas, name)
            button.click(take, [self.fields[name], *words], [self.fields[name], *self.forms], **AT_ONCE)
        for name, pictures in self.pictures.items():
            pictures.wire(self.canvas, self.prompt, self.errors[name.partition(".")[0]], **AT_ONCE)
        self.seed.input(lambda: True, None, self.lock, **AT_ONCE)
        self.randomize.click(lambda: (random_seed(), True), None, [self.seed, self.lock], **AT_ONCE)
        for side in self.size:
            side.input(self._reshape, [self.canvas, *self.size], self.canvas, **LATEST)
        everything = [*self.forms, *self.fields.values(), *self.panels.values(), self.lock, self.status]
        everything += [part for one in self.pictures.values() for part in one.listed(())]
        everything = list(dict.fromkeys(everything))
        for name, button in self.examples.items():
            button.click(self._example(name), self.canvas, everything, **AT_ONCE)
        self.open.upload(self._opened, [self.open, self.canvas], everything, **IN_TURN)
        models = [self.fields["model"], self.fields["interaction.adapter"]]
        changed = [self.canvas, *self.panels.values(), *self.fields.values(), self.errors["model"]]
        for field in models:
            field.input(self._model_chosen, [*models, self.canvas], changed, **IN_TURN)

    def _wire_generation(self) -> None:
        begun = [self.job, self.seed, self.status, self.generate, self.stop]
        results = [*self.results, self.generate, self.stop, *self.errors.values()]
        begin = self.generate.click(self._begin, [self.lock, self.seed], begun, **AT_ONCE)
        inputs = [self.job, self.canvas, self.suggested, self.concepts.learned, *self.fields.values()]
        generation = begin.then(self._generate, inputs, results, **ONE_AT_A_TIME)
        generation.failure(self._queue_full, self.job, [self.status, self.generate, self.stop], **AT_ONCE)
        self.stop.click(self.stop_job, self.job, self.stop, **AT_ONCE)
        self.blocks.unload(self._page_closed)
        shown = [self.images, self.chosen, self.view, self.token, self.step]
        for event in (self.view.input, self.token.input, self.step.release):
            event(self._show, shown, self.results, **IN_TURN)
        self.gallery.select(self._choose, [self.images, self.view], self.results, **IN_TURN)
        self.background.click(
            self._use_as_background, [self.images, self.chosen, self.canvas], self.canvas, **AT_ONCE
        )

    # --- canvas, text and table in step ---

    def _errors(self, place: str = "", error: Exception | None = None) -> Updates:
        """Show an error at its place, and none at the others."""
        updates: Updates = {part: gr.update(visible=False) for part in self.errors.values()}
        if error is not None:
            updates[self.errors[place]] = gr.update(value=theme.error_html(str(error)), visible=True)
        return updates

    def in_step(self, document: Document, prompt: str, suggested: str, source: Any = None) -> Updates:
        """Every form of a canvas but the one that it was read from; the prompt, unless the user wrote it."""
        forms: Updates = {self.canvas: document, self.text: document.to_text()}
        forms |= {self.table: document.to_table(), self.suggested: document.prompt()}
        if prompt.strip() in ("", suggested):
            forms[self.prompt] = document.prompt()
        for pictures in self.pictures.values():
            forms |= pictures.choices(document)
        return {part: value for part, value in forms.items() if part is not source} | self._errors()

    def _canvas_edited(self, document: Document, prompt: str, suggested: str) -> Updates:
        return self.in_step(document, prompt, suggested, self.canvas)

    def _text_edited(self, text: str, document: Document, prompt: str, suggested: str) -> Updates:
        if text == document.to_text():
            return self._errors()
        try:
            return self.in_step(document.with_text(text), prompt, suggested)
        except SceneError as error:
            return self._errors("text", error)

    def _table_edited(
        self, table: list[list[Any]], document: Document, prompt: str, suggested: str
    ) -> Updates:
        try:
            return self.in_step(document.with_table(table), prompt, suggested, self.table)
        except SceneError as error:
            return self._errors("text", error)

    def _take_from_canvas(
        self, name: str, text: str, document: Document, prompt: str, suggested: str
    ) -> Updates:
        """Boxes of the canvas become items of a method, in the field of this name."""
        spec = item_specs()[name.rpartition(".")[2]]
        try:
            document, text = taken_from_canvas(spec, document, text)
        except SceneError as error:
            return self._errors("canvas", error)
        return {self.fields[name]: text} | self.in_step(document, prompt, suggested)

    def _reshape(self, document: Document, width: float | None, height: float | None) -> Any:
        return self.reshaped(document, width, height) if width and height else gr.skip()

    def reshaped(self, document: Document, width: float | None, height: float | None) -> Document:
        """The canvas in the shape of a picture of this size; as it is where that is none."""
        if not width or not height or width < 0 or height < 0:
            return document
        return document.changed(aspect=min(max(width / height, 0.1), 10.0))

    def _example(self, name: str) -> Callable[[Document], Updates]:
        record = Record(EXAMPLES[name], "", {}, "", "")
        return lambda document: self._restored(record, document)

    # --- models ---

    def _model_chosen(self, model: str | None, adapter: str | None, document: Document) -> Updates:
        model = model or ""
        try:
            status = self.worker.describe(model, adapters_of({"interaction.adapter": adapter}))
        except Exception as error:  # whatever a loader raises, the page goes on
            known = isinstance(error, InteractdiffError)
            message = str(error) if known else f"The model failed: {type(error).__name__}: {error}"
            return {self.errors["model"]: gr.update(value=theme.error_html(message), visible=True)}
        updates: Updates = dict.fromkeys(self.size, status.size)
        updates[self.canvas] = document.changed(aspect=1.0)
        updates |= self._show_panels(status.unsupported) | {self.errors["model"]: gr.update(visible=False)}
        for name, panel in configurables().items():
            settings = panel.checked(model, {})
            updates |= {self.fields[f"{name}.{setting}"]: value for setting, value in settings.items()}
        return updates

    def _show_panels(self, unsupported: Unsupported) -> Updates:
        """Show the panels of what a model can use; what is not shown is not used."""
        panels: Updates = {
            panel: gr.update(visible=unsupported[name] is None) for name, panel in self.panels.items()
        }
        return panels | {self.fields[f"{name}.used"]: False for name, reason in unsupported.items() if reason}

    # --- generation ---

    def _begin(self, lock: bool, seed: float | None, request: gr.Request) -> Updates:
        """What happens at once: the rest waits for its turn at the models."""
        return {
            self.job: self.new_job(request),
            self.seed: seed if lock else random_seed(),
            self.status: theme.progress_html("Waiting for the models", 0.0),
            self.generate: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }

    def _generate(
        self, job: str, document: Document, suggested: str, learned: Sequence[LearnedConcept], *values: Any
    ) -> Iterator[Updates]:
        named = dict(zip(self.fields, values, strict=True))
        if (named["prompt"] or "").strip() in ("", suggested):
            named["prompt"] = document.prompt()  # the page may not have received it yet
        ended: Updates = {
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.preview: gr.update(value=None, visible=False),
        }
        stop = self.stop_of(job)
        images: list[StoredImage] = []
        try:
            request = with_learned(request_of(document, named), learned)
            self.worker.check(request)
            yield self._errors()
            for report in self.worker.generate(request, stop):
                images = list(report.images)
                line = theme.progress_html(report.message, report.fraction, report.seconds_left)
                updates: Updates = {self.status: line}
                if report.preview is not None:
                    updates[self.preview] = gr.update(value=enlarged(report.preview), visible=True)
                yield updates
            if images:
                ended |= results.shown(self, images, 0, VIEWS[0])
            if stop.is_set() and len(images) < len(request.scenes):
                ended[self.status] = theme.progress_html(
                    f"Stopped: {len(images)} of {len(request.scenes)} pictures are done."
                )
            yield ended
        except InteractdiffError as error:
            line = theme.progress_html("Not generated: see the message beside the field.")
            yield self._errors(error_place(error), error) | ended | {self.status: line}
        except Exception as error:  # whatever a model raises, the page and the server go on
            failure = RuntimeError(f"The model failed: {type(error).__name__}: {error}")
            line = theme.progress_html("Not generated.")
            yield self._errors("model", failure) | ended | {self.status: line}
        finally:
            self.end_job(job)

    # --- jobs: what runs, and what ends it ---

    def new_job(self, request: gr.Request) -> str:
        """The name of a job of the page that asks."""
        job = uuid4().hex
        self._stops[job] = str(request.session_hash), threading.Event()
        return job

    def stop_of(self, job: str) -> threading.Event:
        """What ends a job."""
        return self._stops[job][1] if job in self._stops else threading.Event()

    def end_job(self, job: str) -> None:
        """Forget a job that is over."""
        self._stops.pop(job, None)

    def stop_job(self, job: str) -> Any:
        """End a job within a step."""
        if job in self._stops:
            self._stops[job][1].set()
        return gr.update(interactive=False)  # the last report is not to be overwritten

    def _queue_full(self, job: str) -> Updates:
        self.end_job(job)
        return {
            self.status: theme.progress_html("Too many are waiting: try again in a while."),
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
        }

    def _page_closed(self, request: gr.Request) -> None:
        """Stop the jobs of a page that was closed."""
        for page, stop in list(self._stops.values()):
            if page == str(request.session_hash):
                stop.set()

    # --- results ---

    def _show(
        self, images: list[StoredImage], chosen: int, view: str, token: str | None, step: float
    ) -> Updates:
        return self._while_there(lambda: results.shown(self, images, chosen, view, token, int(step or 0)))

    def _choose(self, images: list[StoredImage], view: str, event: gr.SelectData) -> Updates:
        return self._while_there(lambda: results.details(self, images, int(event.index), view))

    def _use_as_background(self, images: list[StoredImage], chosen: int, document: Document) -> Any:
        path = images[chosen].path if images else None
        return document.changed(picture=self.served(path)) if path and path.exists() else gr.skip()

    def _while_there(self, show: Callable[[], Updates]) -> Updates:
        try:
            return show()
        except FileNotFoundError:  # the oldest pictures are deleted
            line = "This picture is no longer on the server: generate it again."
            return {self.status: theme.progress_html(line)}

    # --- files ---

    def _opened(self, path: str, document: Document) -> Updates:
        """A picture generated here or a scene restores the page; any other picture comes under the boxes."""
        try:
            if path.lower().endswith(".json"):
                text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
                scene = Scene.from_json(text, source=Path(path).name)
                self.worker.limits.check_scene(scene)
                return self._restored(Record(scene, "", {}, "", ""), document)
            try:
                record = read_record(path)
                self.worker.limits.check_scene(record.scene)
            except NoRecordError:
                opened_picture(path)
                return self._errors() | {self.canvas: document.changed(picture=self.served(Path(path)))}
            try:
                weights = {name: at for name, at in record.adapters.items() if at is not None}
                status = self.worker.describe(record.model, weights)
            except InteractdiffError as error:  # its model is not here: the scene is
                restored = self._restored(record, document)
                shown = gr.update(value=theme.error_html(str(error)), visible=True)
                return restored | {self.errors["model"]: shown}
            return self._restored(record, document, status) | {
                self.status: theme.progress_html(reproducibility(record, status))
            }
        except InteractdiffError as error:
            return self._errors("open", error)

    def _restored(self, record: Record, document: Document, status: ModelStatus | None = None) -> Updates:
        """Every field as a record has it; models and methods too if its model is here."""
        size = None if status is None else status.size
        values = filled(record, size)
        if status is None:
            own = ("model", *(f"{name}.adapter" for name in methods()))
            values = {name: value for name, value in values.items() if name not in own}
        canvas = with_layout(document, record.scene, size)
        fields = {self.fields[name]: value for name, value in values.items() if name in self.fields}
        for name, pictures in self.pictures.items():
            fields |= pictures.listed([PlacedItem.restored(one.item, canvas) for one in values[name]])
        panels = {} if status is None else self._show_panels(status.unsupported)
        ready = {self.lock: True, self.status: theme.progress_html("Ready: Generate makes it.")}
        return panels | self.in_step(canvas, record.scene.prompt, "") | fields | ready

    def served(self, path: Path) -> str:
        """The address, relative to the page, of a copy that the page may show."""
        return "gradio_api/file=" + save_file_to_cache(path, cache_dir=self.blocks.GRADIO_CACHE)


def reproducibility(record: Record, status: ModelStatus) -> str:
    """Whether a picture can be generated again bit for bit here, in words."""
    differences = [
        f"{name} {then}, here it is {now}"
        for name, then, now in (
            *((name, record.versions.get(name), now) for name, now in installed_versions().items()),
            ("device", record.device, status.device),
            ("dtype", record.dtype, status.dtype),
        )
        if then != now
    ]
    if missing := [name for name in record.methods if name not in configurables()]:
        return f"Restored without {', '.join(missing)}, which is not here."
    if record.scene.seed > SAFE_SEED:
        return "Restored, but its seed is longer than a page can show: use interactdiff generate --from."
    if differences:
        return f"Restored. Pixels may differ: it was generated with {'; '.join(differences)}."
    return "Restored: Generate makes the same picture."
