"""The page's components: the scene on the left, the pictures and the settings on the right."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from interactdiff.app import theme
from interactdiff.app.canvas import SceneCanvas
from interactdiff.app.concept_panel import ConceptPanel
from interactdiff.app.document import COLUMNS
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import has_pictures, panel_fields, random_seed, settings_fields
from interactdiff.app.limits import Limits
from interactdiff.app.picture_items import PictureItems
from interactdiff.app.views import VIEWS
from interactdiff.registry import configurables
from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.world import ACTIONS, OBJECTS

NAMES = ("person", *(f"person in {colour}" for colour in COLOURS), *OBJECTS)  # of the embedded world
TITLE = "# interactdiff\nDraw who does what to what, and where, and get that picture."
OPEN = "A PNG generated here, a scene as JSON, or any picture as a background: drop it anywhere on the page."
Unsupported = dict[str, str | None]  # of each method and sampler why a model cannot use it, or None


class Page:
    """Builds the components; `fields` are those that decide a picture, by name, `errors` lines beside them.

    Args:
        limits: of the sliders.
        model: chosen at first.
        adapters: likewise, by the name of their method.
        size: of its pictures, in pixels.
        unsupported: of each method and sampler why the model cannot use it, or None.
    """

    def __init__(
        self,
        limits: Limits,
        model: str,
        adapters: Mapping[str, str],
        size: int,
        unsupported: Unsupported,
    ):
        self.errors: dict[str, gr.HTML] = {}
        with gr.Blocks(
            title="interactdiff", delete_cache=(600, 3600), analytics_enabled=False
        ) as self.blocks:
            gr.Markdown(TITLE, elem_id="title")
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._scene()
                with gr.Column(scale=5, min_width=320):
                    self._pictures()
                    self._settings(limits, model, adapters, size)
                    self._panels(limits, model, adapters, unsupported)
                    self.concepts = ConceptPanel(limits)
                    self._files()
        self.fields |= {"prompt": self.prompt, "seed": self.seed}
        self.size = [self.fields["width"], self.fields["height"]]
        self.forms = [self.canvas, self.text, self.table, self.prompt, self.suggested, *self.errors.values()]
        self.forms += [part for one in self.pictures.values() for part in (one.phrase, one.place)]
        self.results = [self.status, self.preview, self.gallery, self.view, self.attention, self.token]
        self.results += [self.step, self.note, self.after, self.codes, self.python, self.command]
        self.results += [self.images, self.chosen]

    def _scene(self) -> None:
        self.canvas = SceneCanvas(names=NAMES, actions=ACTIONS, elem_id="canvas")
        self._error("canvas")
        self.prompt = gr.Textbox(
            label="Prompt",
            lines=2,
            elem_id="prompt",
            placeholder="suggested from the boxes, until you write one",
        )
        self._error("prompt")
        self.suggested = gr.Textbox("", visible=False)  # equal to the prompt until the user edits it
        with gr.Row():
            gr.Markdown("Try an example", elem_id="hint")
            self.examples = {name: gr.Button(name, size="sm", min_width=60) for name in EXAMPLES}
        with gr.Accordion("As text or a table", open=False, elem_id="forms"):
            self.text = gr.Textbox(
                label="Text", lines=3, placeholder="person=riding=bike", elem_id="text",
                info="a line each: subject=action=object, or a phrase; an action of - leaves it open",
            )  # fmt: skip
            self._error("text")
            self.table = gr.Dataframe(
                headers=list(COLUMNS), column_limits=(len(COLUMNS), len(COLUMNS)), label="Table",
                datatype=["str", "str", "str", "str", "str", "number", "str"], type="array", interactive=True,
                elem_id="table",
            )  # fmt: skip

    def _pictures(self) -> None:
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="generate", scale=3, min_width=160
            )
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
        with gr.Row(elem_id="seeds"):
            self.seed = gr.Number(random_seed(), label="Seed", precision=0, min_width=120, elem_id="seed")
            self.randomize = gr.Button("Random", min_width=90, scale=0, elem_id="randomize")
            self.lock = gr.Checkbox(False, label="Lock", min_width=90, scale=0, elem_id="lock")
        hint = theme.progress_html("Draw boxes or try an example, then generate.")
        self.status = gr.HTML(hint, elem_id="status")
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
        with gr.Row(visible=False) as self.attention:
            self.token = gr.Dropdown([], label="Phrase", elem_id="token", scale=2)
            self.step = gr.Slider(
                0, 1, value=0, step=1, label="Step", info="0: the mean of all", elem_id="step"
            )
        self.note = gr.Markdown(visible=False, elem_id="note")
        self.images, self.chosen, self.job = gr.State([]), gr.State(0), gr.State("")
        with gr.Row(visible=False) as self.after:
            self.background = gr.Button("Use as background", size="sm", elem_id="background")
        with gr.Accordion("Copy as code", open=False, visible=False, elem_id="codes") as self.codes:
            self.python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")
            self.command = gr.Code(
                label="Command line", language="shell", interactive=False, elem_id="command"
            )

    def _settings(self, limits: Limits, model: str, adapters: Mapping[str, str], size: int) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.fields: dict[str, Any] = settings_fields(limits, model, adapters, size)
        self._error("settings")
        self._error("model")

    def _panels(
        self, limits: Limits, model: str, adapters: Mapping[str, str], unsupported: Unsupported
    ) -> None:
        self.panels: dict[str, gr.Accordion] = {}
        self.tools: dict[str, gr.Button] = {}
        self.pictures: dict[str, PictureItems] = {}
        for name, one in configurables().items():
            visible = unsupported[name] is None
            with gr.Accordion(one.title, open=False, visible=visible, elem_id=name) as panel:
                made = panel_fields(one, limits, model, adapters)
            self.fields |= made.fields
            self.tools |= made.tools
            self.pictures |= made.pictures
            self.panels[name] = panel
            if has_pictures(one):
                self._error(name)

    def _files(self) -> None:
        types = [".png", ".jpg", ".jpeg", ".webp", ".json"]
        with gr.Column(elem_id="open"):
            self.open = gr.UploadButton("Open a picture or a scene", file_types=types, size="sm")
            gr.Markdown(OPEN)
        self._error("open")

    def _error(self, name: str) -> None:
        self.errors[name] = gr.HTML(visible=False, elem_classes="error", elem_id=f"error-{name}")
