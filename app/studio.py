"""What the page does: keeps canvas, text and table in step, draws, and opens what was drawn."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from interactdiff.app import api, looks, results
from interactdiff.app.artist import REFUSALS, Artist, Drawn, Facts
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import adapter_of, filled, laid_out, order_of, place_of, random_seed
from interactdiff.app.limits import opened_picture
from interactdiff.app.page import Page, Unfit
from interactdiff.app.views import VIEWS
from interactdiff.methods import methods
from interactdiff.picture import NoRecordError, Record, enlarged, installed_versions, read_record
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
        artist: draws.
        model: chosen at first.
        adapter: likewise; None is the model's own.

    Raises:
        ModelError: there is no such model.
        AdapterError: there is no such adapter, or it is for another base.
    """

    def __init__(self, artist: Artist, model: str, adapter: str | None):
        facts = artist.describe(model, adapter)
        super().__init__(artist.limits, model, adapter, facts.size, facts.unfit)
        self.artist = artist
        self._stops: dict[str, tuple[str, threading.Event]] = {}  # of each turn its page, and what ends it
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
        self.seed.input(lambda: True, None, self.lock, **AT_ONCE)
        self.dice.click(lambda: (random_seed(), True), None, [self.seed, self.lock], **AT_ONCE)
        for side in self.size:
            side.input(self._reshape, [self.canvas, *self.size], self.canvas, **LATEST)
        everything = [*self.forms, *self.fields.values(), *self.panels.values(), self.lock, self.status]
        everything = list(dict.fromkeys(everything))
        for name, button in self.examples.items():
            button.click(self._example(name), self.canvas, everything, **AT_ONCE)
        self.open.upload(self._opened, [self.open, self.canvas], everything, **IN_TURN)
        models = [self.fields["model"], self.fields["adapter"]]
        told = [self.canvas, *self.panels.values(), *self.fields.values(), self.errors["model"]]
        for field in models:
            field.input(self._model_chosen, [*models, self.canvas], told, **IN_TURN)

    def _wire_drawing(self) -> None:
        begun = [self.turn, self.seed, self.status, self.generate, self.stop]
        results = [*self.results, self.generate, self.stop, *self.errors.values()]
        begin = self.generate.click(self._begin, [self.lock, self.seed], begun, **AT_ONCE)
        asked = [self.turn, self.canvas, self.suggested, *self.fields.values()]
        drawing = begin.then(self._generate, asked, results, **ONE_AT_A_TIME)
        drawing.failure(self._turned_away, self.turn, [self.status, self.generate, self.stop], **AT_ONCE)
        self.stop.click(self._stopped, self.turn, self.stop, **AT_ONCE)
        self.blocks.unload(self._gone)
        seen = [self.drawn, self.chosen, self.view, self.token, self.step]
        for event in (self.view.input, self.token.input, self.step.release):
            event(self._show, seen, self.results, **IN_TURN)
        self.gallery.select(self._choose, [self.drawn, self.view], self.results, **IN_TURN)
        self.over.click(self._draw_over, [self.drawn, self.chosen, self.canvas], self.canvas, **AT_ONCE)

    # --- canvas, text and table in step ---

    def _refused(self, place: str = "", error: Exception | None = None) -> Updates:
        """Show an error at its place, and none at the others."""
        updates: Updates = {part: gr.update(visible=False) for part in self.errors.values()}
        if error is not None:
            updates[self.errors[place]] = gr.update(value=looks.refusal(str(error)), visible=True)
        return updates

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
        if text == document.to_text():
            return self._refused()
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

    def _reshape(self, document: Document, width: float | None, height: float | None) -> Any:
        if not width or not height or width < 0 or height < 0:
            return gr.skip()
        return document.changed(aspect=min(max(width / height, 0.1), 10.0))

    def _example(self, name: str) -> Callable[[Document], Updates]:
        record = Record(EXAMPLES[name], "", None, "", "")
        return lambda document: self._restored(record, document)

    # --- models ---

    def _model_chosen(self, model: str | None, adapter: str | None, document: Document) -> Updates:
        model = model or ""
        try:
            facts = self.artist.describe(model, adapter_of(adapter))
        except REFUSALS as error:
            return {self.errors["model"]: gr.update(value=looks.refusal(str(error)), visible=True)}
        updates: Updates = dict.fromkeys(self.size, facts.size)
        updates[self.canvas] = document.changed(aspect=1.0)
        updates |= self._fit(facts.unfit) | {self.errors["model"]: gr.update(visible=False)}
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

    def _begin(self, lock: bool, seed: float | None, request: gr.Request) -> Updates:
        """What happens at once: the rest waits for its turn at the models."""
        turn = uuid4().hex
        self._stops[turn] = str(request.session_hash), threading.Event()
        return {
            self.turn: turn,
            self.seed: seed if lock else random_seed(),
            self.status: looks.bar("Waiting for the models", 0.0),
            self.generate: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }

    def _generate(self, turn: str, document: Document, suggested: str, *values: Any) -> Iterator[Updates]:
        named = dict(zip(self.fields, values, strict=True))
        if (named["prompt"] or "").strip() in ("", suggested):
            named["prompt"] = document.prompt()  # the page may not have heard of it yet
        ended: Updates = {
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.preview: gr.update(value=None, visible=False),
        }
        _, stop = self._stops.get(turn, ("", threading.Event()))
        done: list[Drawn] = []
        try:
            order = order_of(document, named)
            self.artist.check(order)
            yield self._refused()
            for told in self.artist.draw(order, stop):
                done = list(told.done)
                said: Updates = {self.status: looks.bar(told.words, told.share, told.left)}
                if told.picture is not None:
                    said[self.preview] = gr.update(value=enlarged(told.picture), visible=True)
                yield said
            if done:
                ended |= results.shown(self, done, 0, VIEWS[0])
            if stop.is_set() and len(done) < len(order.scenes):
                ended[self.status] = looks.bar(
                    f"Stopped: {len(done)} of {len(order.scenes)} pictures are drawn."
                )
            yield ended
        except REFUSALS as error:
            said = {self.status: looks.bar("Not drawn: see the message beside the field.")}
            yield self._refused(place_of(error), error) | ended | said
        except Exception as error:  # whatever a model raises, the page and the server go on
            failure = RuntimeError(f"The model failed: {type(error).__name__}: {error}")
            yield self._refused("model", failure) | ended | {self.status: looks.bar("Not drawn.")}
        finally:
            self._stops.pop(turn, None)

    def _stopped(self, turn: str) -> Any:
        if turn in self._stops:
            self._stops[turn][1].set()
        return gr.update(interactive=False)  # what the drawing says last is not to be overwritten

    def _turned_away(self, turn: str) -> Updates:
        """The queue is full."""
        self._stops.pop(turn, None)
        return {
            self.status: looks.bar("Too many are waiting: try again in a while."),
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
        }

    def _gone(self, request: gr.Request) -> None:
        """End what a page that was closed still waits for."""
        for page, stop in list(self._stops.values()):
            if page == str(request.session_hash):
                stop.set()

    # --- results ---

    def _show(self, drawn: list[Drawn], chosen: int, view: str, token: str | None, step: float) -> Updates:
        return self._while_there(lambda: results.shown(self, drawn, chosen, view, token, int(step or 0)))

    def _choose(self, drawn: list[Drawn], view: str, event: gr.SelectData) -> Updates:
        return self._while_there(lambda: results.details(self, drawn, int(event.index), view))

    def _draw_over(self, drawn: list[Drawn], chosen: int, document: Document) -> Any:
        path = drawn[chosen].path if drawn else None
        return document.changed(picture=self._served(path)) if path and path.exists() else gr.skip()

    def _while_there(self, show: Callable[[], Updates]) -> Updates:
        try:
            return show()
        except FileNotFoundError:  # many pictures were drawn since
            return {self.status: looks.bar("This picture is no longer on the server: draw it again.")}

    # --- files ---

    def _opened(self, path: str, document: Document) -> Updates:
        """A picture drawn here or a scene restores the page; any other picture comes under the boxes."""
        try:
            if path.lower().endswith(".json"):
                text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
                scene = Scene.from_json(text, source=Path(path).name)
                return self._restored(Record(scene, "", None, "", ""), document)
            try:
                record = read_record(path)
            except NoRecordError:
                opened_picture(path)
                return self._refused() | {self.canvas: document.changed(picture=self._served(Path(path)))}
            try:
                facts = self.artist.describe(record.model, record.adapter)
            except REFUSALS as error:  # what it was drawn with is not here: the scene is
                restored = self._restored(record, document)
                shown = gr.update(value=looks.refusal(str(error)), visible=True)
                return restored | {self.errors["model"]: shown}
            return self._restored(record, document, facts) | {
                self.status: looks.bar(told_apart(record, facts))
            }
        except REFUSALS as error:
            return self._refused("open", error)

    def _restored(self, record: Record, document: Document, facts: Facts | None = None) -> Updates:
        """Every field as a record has it; models and methods too if there are facts about its model."""
        size = None if facts is None else facts.size
        values = filled(record, size)
        if facts is None:
            values = {name: value for name, value in values.items() if name not in ("model", "adapter")}
        canvas = laid_out(document, record.scene, size)
        fields = {self.fields[name]: value for name, value in values.items() if name in self.fields}
        panels = {} if facts is None else self._fit(facts.unfit)
        said = {self.lock: True, self.status: looks.bar("Ready: Generate draws it.")}
        return panels | self._in_step(canvas, record.scene.prompt, "") | fields | said

    def _served(self, path: Path) -> str:
        """The address, relative to the page, of a copy that the page may show."""
        return "gradio_api/file=" + save_file_to_cache(path, cache_dir=self.blocks.GRADIO_CACHE)


def told_apart(record: Record, facts: Facts) -> str:
    """Whether a picture can be drawn again bit for bit here, in words."""
    differences = [
        f"{name} {then}, here it is {now}"
        for name, then, now in (
            *((name, record.versions.get(name), now) for name, now in installed_versions().items()),
            ("device", record.device, facts.device),
            ("dtype", record.dtype, facts.dtype),
        )
        if then != now
    ]
    if missing := [name for name in record.methods if name not in methods()]:
        return f"Restored without {', '.join(missing)}, which is not here."
    if record.scene.seed > SAFE_SEED:
        return "Restored, but its seed is longer than a page can show: interactdiff generate --from draws it."
    if differences:
        return f"Restored. Pixels may differ: it was drawn with {'; '.join(differences)}."
    return "Restored: Generate draws the same picture."
