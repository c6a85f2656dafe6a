"""The canvas as a Gradio component: its value is a `Document`."""

from pathlib import Path
from typing import Any

import gradio as gr

from interactdiff.app.document import Document

ASSETS = Path(__file__).parent / "assets"


class SceneCanvas(gr.HTML):
    """Boxes, names and links, drawn with a mouse, a finger or the keyboard.

    Its `input` event is an edit of the user's; changes that come from Python cause none.

    Args:
        value: what is on it.
        names: suggested for things.
        actions: suggested for links.
    """

    def __init__(
        self,
        value: Document | None = None,
        *,
        names: tuple[str, ...] = (),
        actions: tuple[str, ...] = (),
        **options: Any,
    ):
        files = ("canvas.html", "canvas.css", "canvas_view.js", "canvas.js")
        html, css, view, js = ((ASSETS / name).read_text(encoding="utf-8") for name in files)
        # Gradio reads constructor arguments off the component, and takes one that is not there for an event.
        self.names, self.actions = list(names), list(actions)
        super().__init__(
            value=value or Document(),
            names=self.names,
            actions=self.actions,
            html_template=html,
            css_template=css,
            js_on_load=view + js,  # one script
            apply_default_css=False,
            **options,
        )

    def preprocess(self, payload: Any) -> Any:
        """What the page sends as a `Document`.

        Raises:
            SceneError: it is no canvas.
        """
        return Document.from_value(payload)

    def postprocess(self, value: Any) -> Any:
        """What the page reads of a `Document`."""
        return value.to_value() if isinstance(value, Document) else Document.from_value(value).to_value()

    def api_info(self) -> dict[str, Any]:
        """The value's JSON type."""
        return {"type": "object"}
