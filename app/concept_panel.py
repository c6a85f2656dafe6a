"""The panel that learns concepts from a photo: names, boxes, masks, training with progress and stop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from interactdiff.app import theme
from interactdiff.app.document import Document
from interactdiff.app.form import adapter_choices, whole_number
from interactdiff.app.learning import (
    METHOD,
    MOST_CONCEPTS,
    LearnedConcept,
    LearnProgress,
    LearnRequest,
    learn,
    parsed_concepts,
    taken_boxes,
)
from interactdiff.app.limits import LEARNING_OFF, Limits, opened_picture
from interactdiff.app.uploads import UPLOAD, PictureUpload
from interactdiff.errors import InteractdiffError, SceneError

if TYPE_CHECKING:
    from interactdiff.app.studio import Studio

Updates = dict[Any, Any]
STEPS = 500
WORDS = (
    "Each thing in a photo becomes a word of its own, which draws it in new scenes. Name the things below. "
    "Boxes help to find them: put the photo under the canvas, draw a box around each thing, name it by its "
    "word, and take the boxes. What is learned stays until the server ends: download it to keep it."
)
TO_CANVAS = """() => setTimeout(() => {
  if (!document.querySelector('#canvas .picture').hidden) document.querySelector('#canvas').scrollIntoView();
}, 200)"""
FORM = f"up to {MOST_CONCEPTS}, a line each: TOKEN=WORD, then |x0,y0,x1,y1 if it is within that box"


class ConceptPanel:
    """Its fields; `wire` says what they do.

    Args:
        limits: of this server.

    Attributes:
        learned: what this page has learned, a tuple of `LearnedConcept`.
    """

    def __init__(self, limits: Limits):
        self.learned, self.job = gr.State(()), gr.State("")
        self.is_on = limits.learn_steps > 0
        with gr.Accordion("Learn concepts from a photo", open=False, elem_id="learn"):
            if not self.is_on:
                gr.Markdown(LEARNING_OFF)
                return
            gr.Markdown(WORDS)
            self.photo = PictureUpload(label="Photo", height=220, elem_id="learn-photo", **UPLOAD)
            self.photo_error = _error("learn-photo")
            with gr.Row():
                self.draw = gr.Button(
                    "Put it under the canvas", size="sm", min_width=130, elem_id="learn-draw"
                )
                self.take = gr.Button(
                    "Take boxes from the canvas", size="sm", min_width=130, elem_id="learn-take"
                )
            self.names = gr.Textbox(
                label="Concepts", info=FORM, lines=2, elem_id="learn-names",
                placeholder="<hero>=person|0.3,0.1,0.7,0.7",
            )  # fmt: skip
            self.names_error = _error("learn-names")
            self.steps = gr.Number(
                min(STEPS, limits.learn_steps), label="Steps", precision=0, elem_id="learn-steps",
                info="of training; some hundred are needed",
            )  # fmt: skip
            self.steps_error = _error("learn-steps")
            with gr.Row():
                self.find = gr.Button("Find masks", min_width=90, elem_id="learn-find")
                self.start = gr.Button("Learn", variant="primary", min_width=90, elem_id="learn-start")
                self.stop = gr.Button(
                    "Stop", variant="stop", interactive=False, min_width=70, elem_id="learn-stop"
                )
            self.status = gr.HTML(elem_id="learn-status", visible=False)
            shown: dict[str, Any] = {"visible": False, "interactive": False, "format": "png"}
            self.masks = gr.Image(label="Masks", buttons=["fullscreen"], elem_id="learn-masks", **shown)
            self.samples = gr.Image(
                label="Samples", buttons=["download", "fullscreen"], elem_id="learn-samples", **shown
            )
            self.download = gr.DownloadButton(
                "Download what was learned", visible=False, size="sm", elem_id="learn-download"
            )

    def wire(self, studio: "Studio", at_once: dict[str, Any], one_at_a_time: dict[str, Any]) -> None:
        """Say what the buttons do.

        Args:
            studio: the page.
            at_once: options of events that wait for nothing.
            one_at_a_time: options of those that need the models.
        """
        if not self.is_on:
            return
        self.studio = studio
        self.photo.input(lambda: self._errors(), None, self._lines, **at_once)
        under = [studio.canvas, *self._lines]
        drawn = self.draw.click(self._under_canvas, [self.photo, studio.canvas], under, **at_once)
        drawn.then(None, js=TO_CANVAS, **at_once)
        words = [studio.canvas, studio.prompt, studio.suggested]
        taken = [self.names, *studio.forms, *self._lines]
        self.take.click(self._taken, [self.names, *studio.size, *words], taken, **at_once)
        begun = [self.job, self.status, self.find, self.start, self.stop]
        ended = [*begun[1:], self.masks, self.samples, self.download, self.learned, *self._lines]
        ended += [studio.fields[f"{METHOD}.adapter"], studio.panels[METHOD]]
        model = studio.fields["model"]
        for button, run in ((self.find, self._find), (self.start, self._learn)):
            begin = button.click(self._begin, None, begun, **at_once)
            inputs = [self.job, self.photo, self.names, self.steps, model, self.learned]
            running = begin.then(run, inputs, ended, **one_at_a_time)
            running.failure(self._queue_full, self.job, begun[1:], **at_once)
        self.stop.click(studio.stop_job, self.job, self.stop, **at_once)

    @property
    def _lines(self) -> list[Any]:
        return [self.photo_error, self.names_error, self.steps_error]

    def _errors(self, line: Any = None, error: Exception | None = None) -> Updates:
        updates: Updates = {one: gr.update(visible=False) for one in self._lines}
        if error is not None:
            updates[line] = gr.update(value=theme.error_html(str(error)), visible=True)
        return updates

    # --- boxes ---

    def _under_canvas(self, photo: str | None, document: Document) -> Updates:
        """The photo comes under the canvas, which takes its shape."""
        try:
            picture = _opened(photo)
        except InteractdiffError as error:
            return self._errors(self.photo_error, error)
        aspect = min(max(picture.width / picture.height, 0.1), 10.0)
        address = self.studio.served(Path(str(photo)))
        return self._errors() | {self.studio.canvas: document.changed(picture=address, aspect=aspect)}

    def _taken(
        self,
        text: str | None,
        width: float | None,
        height: float | None,
        document: Document,
        prompt: str,
        suggested: str,
    ) -> Updates:
        """Boxes of the canvas become lines; the canvas is again that of the next picture."""
        try:
            document, text = taken_boxes(document, text or "")
        except InteractdiffError as error:
            return self._errors(self.names_error, error)
        shaped = self.studio.reshaped(document, width, height)
        return {self.names: text} | self.studio.in_step(shaped, prompt, suggested) | self._errors()

    # --- masks and training ---

    def _begin(self, request: gr.Request) -> Updates:
        return {
            self.job: self.studio.new_job(request),
            self.status: gr.update(value=theme.progress_html("Waiting for the models", 0.0), visible=True),
            self.find: gr.update(interactive=False),
            self.start: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }

    def _ended(self, message: str) -> Updates:
        return {
            self.status: gr.update(value=theme.progress_html(message), visible=True),
            self.find: gr.update(interactive=True),
            self.start: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
        }

    def _queue_full(self, job: str) -> Updates:
        self.studio.end_job(job)
        return self._ended("Too many are waiting: try again in a while.")

    def _find(self, job: str, photo: str | None, text: str | None, *rest: Any) -> Iterator[Updates]:
        _, model, learned = rest
        yield from self._run(job, photo, text, 0, model, learned)

    def _learn(self, job: str, photo: str | None, text: str | None, *rest: Any) -> Iterator[Updates]:
        steps, model, learned = rest
        yield from self._run(job, photo, text, steps or -1, model, learned)

    def _run(
        self,
        job: str,
        photo: str | None,
        text: str | None,
        steps: Any,
        model: str | None,
        learned: Sequence[LearnedConcept],
    ) -> Iterator[Updates]:
        """Find the masks, and with steps learn too."""
        ended, line = "Stopped.", self.photo_error
        try:
            picture = _opened(photo)
            line = self.names_error
            concepts, boxes = parsed_concepts(text or "")
            line = self.steps_error
            request = LearnRequest(picture, concepts, boxes, whole_number("steps", steps), model or "")
            self.studio.worker.limits.check_learning(request.steps)
            line = self.names_error
            yield self._errors() | {self.samples: gr.update(visible=False)}
            for report in learn(self.studio.worker, request, self.studio.stop_of(job)):
                if report.is_result:
                    ended = report.message
                if report.learned is not None:
                    learned = (*learned, report.learned)
                yield self._shown(report, learned)
        except InteractdiffError as error:
            ended = "Not learned: see the message beside the field."
            yield self._errors(line, error)
        except Exception as error:  # whatever a model raises, the page and the server go on
            ended = "Not learned: see the message beside the field."
            failure = RuntimeError(f"The model failed: {type(error).__name__}: {error}")
            yield self._errors(line, failure)
        finally:
            self.studio.end_job(job)
        yield self._ended(ended)

    def _shown(self, report: LearnProgress, learned: Sequence[LearnedConcept]) -> Updates:
        line = theme.progress_html(report.message, report.fraction, report.seconds_left)
        updates: Updates = {self.status: line}
        if report.masks is not None:
            updates[self.masks] = gr.update(value=report.masks, visible=True)
        if report.samples is not None:
            updates[self.samples] = gr.update(value=report.samples, visible=True)
        if report.learned is not None:
            choices = [*adapter_choices(METHOD), *((one.label, one.name) for one in learned)]
            updates |= {
                self.learned: tuple(learned),
                self.download: gr.update(value=report.learned.archive, visible=True),
                self.studio.fields[f"{METHOD}.adapter"]: gr.update(
                    choices=choices, value=report.learned.name
                ),
                self.studio.panels[METHOD]: gr.update(visible=True),
            }
        return updates


def _opened(photo: str | None) -> Any:
    if photo is None:
        raise SceneError("photo: expected a picture, got none: drop it above")
    return opened_picture(photo)


def _error(name: str) -> gr.HTML:
    return gr.HTML(visible=False, elem_classes="error", elem_id=f"error-{name}")
