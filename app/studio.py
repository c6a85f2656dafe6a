"""What the page does: keeps canvas, text and table in step, draws, and opens what was drawn."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from interactdiff.app import api, looks, results
from interactdiff.app.artist import REFUSALS, Artist, Drawn
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import adapter_of, filled, laid_out, order_of, place_of, random_seed
from interactdiff.app.limits import opened_picture
from interactdiff.app.page import Page, Unfit
from interactdiff.app.views import VIEWS
from interactdiff.methods import methods
from interactdiff.picture import PictureError, Record, enlarged, installed_versions, read_record
from interactdiff.scene import Scene, SceneError

Updates = dict[Any, Any]  # of parts of the page
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = {**PRIVATE, "concurrency_id": "models", "concurrency_limit": 1}
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False}
LATEST: dict[str, Any] = {**AT_ONCE, "trigger_mode": "always_last"}


class Studio(Page):
    """The page at work.

    Args:
        artist: draws.
        model: chosen at first.
        adapter: likewise; None is the model's own.

    Raises:
        ModelError: there is no such model.
        AdapterError: there is no such adapter, or it is for another base.
    """

    def __init__(self, artist: Artist, model: str, adapter: str | None):
        described = artist.describe(model, adapter)
        super().__init__(artist.limits, model, adapter, **described)
        self.artist, self._own_size = artist, described["size"]
        self._stops: dict[str, threading.Event] = {}  # of each page that is drawing
        with self.blocks:
            api.add_to(self.blocks, artist)
            self._wire_forms()
            self._wire_drawing()
            self.blocks.load(None, js=looks.DROP)

    def _wire_forms(self) -> None:
        words = [self.canvas, self.prompt, self.suggested]
        self.canvas.input(self._canvas_edited, words, self.forms, **LATEST)
        for event in (self.text.blur, self.text.submit):
            event(self._text_edited, [self.text, *words], self.forms, **LATEST)
        self.table.input(self._table_edited, [self.table, *words], self.forms, **LATEST)
        self.dice.click(random_seed, None, self.seed, **AT_ONCE)
        for side in self.size:
            side.change(self._reshape, [self.canvas, *self.size], self.canvas, **LATEST)
        everything = [*self.forms, *self.fields.values(), *self.panels.values()]
        everything = list(dict.fromkeys(everything))
        for name, button in self.examples.items():
            button.click(self._example(name), self.canvas, everything, **AT_ONCE)
        self.open.upload(
            self._opened, [self.open, self.canvas], [*everything, self.status],
            **ONE_AT_A_TIME,
        )  # fmt: skip
        models = [self.fields["model"], self.fields["adapter"]]
        told = [*self.panels.values(), *self.fields.values(), self.errors["model"]]
        for field in models:
            field.input(self._model_chosen, models, told, **ONE_AT_A_TIME)

    def _wire_drawing(self) -> None:
        drawing = self.generate.click(
            self._generate,
            [self.canvas, self.lock, *self.fields.values()],
            [*self.results, self.generate, self.stop, self.seed, *self.errors.values()],
            **ONE_AT_A_TIME,
        )
        ended = [self.generate, self.stop, self.status, self.preview]
        self.stop.click(self._stopped, None, ended, cancels=[drawing], **AT_ONCE)
        self.blocks.unload(self._gone)
        seen = [self.drawn, self.chosen, self.view, self.token, self.step]
        for event in (self.view.input, self.token.input, self.step.release):
            event(self._show, seen, self.results, **LATEST)
        self.gallery.select(self._choose, [self.drawn, self.view], self.results, **AT_ONCE)
        self.over.click(self._draw_over, [self.drawn, self.chosen, self.canvas], self.canvas, **AT_ONCE)

    # --- canvas, text and table in step ---

    def _refused(self, place: str = "", error: Exception | None = None) -> Updates:
        """Show an error at its place, and none at the others."""
        hidden = {part: gr.update(visible=False) for part in self.errors.values()}
        return hidden | (
            {} if error is None else {self.errors[place]: gr.update(value=str(error), visible=True)}
        )

    def _in_step(self, document: Document, prompt: str, suggested: str, source: Any = None) -> Updates:
        """Every form of a canvas but the one that it was read from; the prompt, unless the user wrote it."""
        forms: Updates = {self.canvas: document, self.text: document.to_text()}
        forms |= {self.table: document.to_table(), self.suggested: document.prompt()}
        if prompt.strip() in ("", suggested):
            forms[self.prompt] = document.prompt()
        return {part: value for part, value in forms.items() if part is not source} | self._refused()

    def _canvas_edited(self, document: Document, prompt: str, suggested: str) -> Updates:
        return self._in_step(document, prompt, suggested, self.canvas)

    def _text_edited(self, text: str, document: Document, prompt: str, suggested: str) -> Updates:
        try:
            return self._in_step(document.with_text(text), prompt, suggested)
        except SceneError as error:
            return self._refused("text", error)

    def _table_edited(
        self, table: list[list[Any]], document: Document, prompt: str, suggested: str
    ) -> Updates:
        try:
            return self._in_step(document.with_table(table), prompt, suggested, self.table)
        except SceneError as error:
            return self._refused("text", error)

    def _reshape(self, document: Document, width: float | None, height: float | None) -> Document:
        aspect = (width or self._own_size) / (height or self._own_size)
        return document.changed(aspect=min(max(aspect, 0.1), 10.0))

    def _example(self, name: str) -> Callable[[Document], Updates]:
        return lambda document: self._restored(
            Record(EXAMPLES[name], "", None, "", ""), document, self._own_size
        )

    # --- models ---

    def _model_chosen(self, model: str | None, adapter: str | None) -> Updates:
        model = model or ""
        try:
            described = self.artist.describe(model, adapter_of(adapter))
        except REFUSALS as error:
            return {self.errors["model"]: gr.update(value=str(error), visible=True)}
        updates: Updates = dict.fromkeys(self.size, described["size"])
        updates |= self._fit(described["unfit"]) | {self.errors["model"]: gr.update(visible=False)}
        for name, method in methods().items():
            suited = method.checked(model, {})
            updates |= {self.fields[f"{name}.{setting}"]: value for setting, value in suited.items()}
        return updates

    def _fit(self, unfit: Unfit) -> Updates:
        """Show the panels of the methods that are for a model; what is not shown is not used."""
        panels: Updates = {
            panel: gr.update(visible=unfit[name] is None) for name, panel in self.panels.items()
        }
        return panels | {self.fields[f"{name}.used"]: False for name, reason in unfit.items() if reason}

    # --- drawing ---

    def _generate(
        self, document: Document, lock: bool, request: gr.Request, *values: Any
    ) -> Iterator[Updates]:
        named = dict(zip(self.fields, values, strict=True))
        if not lock:
            named["seed"] = random_seed()
        idle: Updates = {self.generate: gr.update(interactive=True), self.stop: gr.update(interactive=False)}
        idle[self.preview] = gr.update(value=None, visible=False)
        stop = self._stops[str(request.session_hash)] = threading.Event()
        done: list[Drawn] = []
        try:
            order = order_of(document, named)
            self.artist.check(order)
            yield self._refused() | {
                self.generate: gr.update(interactive=False),
                self.stop: gr.update(interactive=True),
                self.seed: order.scene.seed,
                self.status: looks.bar("Waiting for the model", 0.0),
            }
            for told in self.artist.draw(order, stop):
                done = list(told.done)
                said: Updates = {self.status: looks.bar(told.words, told.share, told.left)}
                if told.picture is not None:
                    said[self.preview] = gr.update(value=enlarged(told.picture), visible=True)
                yield said
        except REFUSALS as error:
            said = {self.status: looks.bar("Not drawn: see the message beside the field.")}
            yield self._refused(place_of(str(error)), error) | idle | said
        except Exception as error:  # whatever a model raises, the page and the server go on
            failure = RuntimeError(f"The model failed: {type(error).__name__}: {error}")
            yield self._refused("model", failure) | idle | {self.status: looks.bar("Not drawn.")}
        else:
            yield (results.shown(self, done, 0, VIEWS[0]) if done else {}) | idle

    def _stopped(self, request: gr.Request) -> Updates:
        self._stop(request)
        return {
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.status: looks.bar("Stopped."),
            self.preview: gr.update(visible=False),
        }

    def _stop(self, request: gr.Request) -> None:
        if (stop := self._stops.pop(str(request.session_hash), None)) is not None:
            stop.set()

    def _gone(self, request: gr.Request) -> None:
        self._stop(request)

    # --- results ---

    def _show(self, drawn: list[Drawn], chosen: int, view: str, token: str | None, step: float) -> Updates:
        return results.shown(self, drawn, chosen, view, token, int(step))

    def _choose(self, drawn: list[Drawn], view: str, event: gr.SelectData) -> Updates:
        return results.details(self, drawn, int(event.index), view)

    def _draw_over(self, drawn: list[Drawn], chosen: int, document: Document) -> Document:
        return document.changed(picture=self._served(drawn[chosen].path)) if drawn else document

    # --- files ---

    def _opened(self, path: str, document: Document) -> Updates:
        """A picture drawn here or a scene restores the page; any other picture comes under the boxes."""
        opened: Updates = {}
        try:
            if path.lower().endswith(".json"):
                record = Record(Scene.from_file(path), "", None, "", "")
                return opened | self._restored(record, document, self._own_size)
            with suppress(PictureError):
                record = read_record(path)
                described = self.artist.describe(record.model, record.adapter)
                opened |= self._restored(record, document, described["size"], described["unfit"])
                return opened | {self.status: looks.bar(_told_apart(record))}
            opened_picture(path)
            return (
                opened | self._refused() | {self.canvas: document.changed(picture=self._served(Path(path)))}
            )
        except REFUSALS as error:
            return opened | self._refused("open", error)

    def _restored(self, record: Record, document: Document, size: int, unfit: Unfit | None = None) -> Updates:
        """Every field as a record has it; models and methods too if there is `unfit`."""
        values = filled(record, size)
        if unfit is None:
            values = {name: value for name, value in values.items() if name not in ("model", "adapter")}
        canvas = laid_out(document, record.scene, size)
        fields = {self.fields[name]: value for name, value in values.items() if name in self.fields}
        panels = {} if unfit is None else self._fit(unfit)
        return panels | self._in_step(canvas, record.scene.prompt, "") | fields

    def _served(self, path: Path) -> str:
        """The address, relative to the page, of a copy that the page may show."""
        return "gradio_api/file=" + save_file_to_cache(path, cache_dir=self.blocks.GRADIO_CACHE)


def _told_apart(record: Record) -> str:
    """Whether the picture can be drawn again bit for bit, in words."""
    for name, now in installed_versions().items():
        if (then := record.versions.get(name)) != now:
            return f"Restored. It was drawn with {name} {then}, now there is {now}: pixels may differ."
    return "Restored: with the seed locked, Generate draws the same picture."
