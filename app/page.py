"""The page's parts: who does what to what on the left, the pictures on the right."""

from typing import Any

import gradio as gr

from interactdiff.app import looks
from interactdiff.app.canvas import SceneCanvas
from interactdiff.app.document import COLUMNS
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import method_fields, random_seed, settings_fields
from interactdiff.app.limits import Limits
from interactdiff.app.views import VIEWS
from interactdiff.methods import methods
from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.world import ACTIONS, OBJECTS

NAMES = ("person", *(f"person in {colour}" for colour in COLOURS), *OBJECTS)  # of the embedded world
TITLE = "# interactdiff\nDraw who does what to what, and where, and get that picture."
OPEN = "A PNG drawn here, a scene as JSON, or any picture to draw over: drop it anywhere on the page."
Unfit = dict[str, str | None]  # of each method why it is not for a model, or None


class Page:
    """Builds the parts; `fields` are those that decide a picture, by name, `errors` lines beside the fields.

    Args:
        limits: of the sliders.
        model: chosen at first.
        adapter: likewise; None is the model's own.
        size: of its pictures, in pixels.
        unfit: of each method why it is not for the model, or None.
    """

    def __init__(self, limits: Limits, model: str, adapter: str | None, size: int, unfit: Unfit):
        self.errors: dict[str, gr.HTML] = {}
        with gr.Blocks(
            title="interactdiff", delete_cache=(600, 3600), analytics_enabled=False
        ) as self.blocks:
            gr.Markdown(TITLE, elem_id="title")
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._ask()
                with gr.Column(scale=5, min_width=320):
                    self._answer()
                    self._settings(limits, model, adapter, size)
                    self._methods(model, unfit)
                    self._files()
        self.fields |= {"prompt": self.prompt, "seed": self.seed}
        self.size = [self.fields["width"], self.fields["height"]]
        self.forms = [self.canvas, self.text, self.table, self.prompt, self.suggested, *self.errors.values()]
        self.results = [self.status, self.preview, self.gallery, self.view, self.looking, self.token]
        self.results += [self.step, self.found, self.after, self.codes, self.python, self.command]
        self.results += [self.drawn, self.chosen]

    def _ask(self) -> None:
        self.canvas = SceneCanvas(names=NAMES, actions=ACTIONS, elem_id="canvas")
        self._error("canvas")
        self.prompt = gr.Textbox(
            label="Prompt",
            lines=2,
            elem_id="prompt",
            placeholder="suggested from the boxes, until you write one",
        )
        self._error("prompt")
        self.suggested = gr.Textbox("", visible=False)  # the prompt is still ours where it says this
        with gr.Row():
            gr.Markdown("Try an example", elem_id="hint")
            self.examples = {name: gr.Button(name, size="sm", min_width=60) for name in EXAMPLES}
        with gr.Accordion("As text or a table", open=False, elem_id="forms"):
            self.text = gr.Textbox(
                label="Text", lines=3, placeholder="person=riding=bike", elem_id="text",
                info="a line each: subject=action=object, or a thing; an action of - leaves it open",
            )  # fmt: skip
            self._error("text")
            self.table = gr.Dataframe(
                headers=list(COLUMNS), column_limits=(len(COLUMNS), len(COLUMNS)), label="Table",
                datatype=["str", "str", "str", "str", "str", "number", "str"], type="array", interactive=True,
                elem_id="table",
            )  # fmt: skip

    def _answer(self) -> None:
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="generate", scale=3, min_width=160
            )
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
        with gr.Row(elem_id="seeds"):
            self.seed = gr.Number(random_seed(), label="Seed", precision=0, min_width=120, elem_id="seed")
            self.dice = gr.Button("Dice", min_width=70, scale=0, elem_id="dice")
            self.lock = gr.Checkbox(False, label="Lock", min_width=90, scale=0, elem_id="lock")
        self.status = gr.HTML(looks.bar("Draw boxes or try an example, then generate."), elem_id="status")
        self.preview = gr.Image(
            visible=False,
            show_label=False,
            interactive=False,
            height=400,
            buttons=[],
            format="png",
            elem_id="preview",
        )
        self.gallery = gr.Gallery(
            label="Pictures", columns=2, object_fit="contain", height=420, visible=False, interactive=False,
            buttons=["download", "fullscreen"], format="png", elem_id="gallery",
        )  # fmt: skip
        self.view = gr.Radio(list(VIEWS), value=VIEWS[0], label="Show", visible=False, elem_id="view")
        with gr.Row(visible=False) as self.looking:
            self.token = gr.Dropdown([], label="Looking for", elem_id="token", scale=2)
            self.step = gr.Slider(
                0, 1, value=0, step=1, label="Step", info="0: the mean of all", elem_id="step"
            )
        self.found = gr.Markdown(visible=False, elem_id="found")
        self.drawn, self.chosen, self.turn = gr.State([]), gr.State(0), gr.State("")
        with gr.Row(visible=False) as self.after:
            self.over = gr.Button("Draw over this picture", size="sm", elem_id="over")
        with gr.Accordion("Copy as code", open=False, visible=False, elem_id="codes") as self.codes:
            self.python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")
            self.command = gr.Code(
                label="Command line", language="shell", interactive=False, elem_id="command"
            )

    def _settings(self, limits: Limits, model: str, adapter: str | None, size: int) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.fields: dict[str, Any] = settings_fields(limits, model, adapter, size)
        self._error("settings")
        self._error("model")

    def _methods(self, model: str, unfit: Unfit) -> None:
        self.panels: dict[str, gr.Accordion] = {}
        for name, method in methods().items():
            with gr.Accordion(method.title, open=False, visible=unfit[name] is None, elem_id=name) as panel:
                self.fields |= method_fields(method, model)
            self.panels[name] = panel

    def _files(self) -> None:
        types = [".png", ".jpg", ".jpeg", ".webp", ".json"]
        with gr.Column(elem_id="open"):
            self.open = gr.UploadButton("Open a picture or a scene", file_types=types, size="sm")
            gr.Markdown(OPEN)
        self._error("open")

    def _error(self, name: str) -> None:
        self.errors[name] = gr.HTML(visible=False, elem_classes="refusal", elem_id=f"refusal-{name}")
