"""A field for a picture file, as a Gradio component."""

from typing import Any

import gradio as gr


class PictureUpload(gr.Image):
    """A picture that the user drops; the value is the file's path, which is not opened here.

    Gradio would refuse a damaged file in a passing note, and not beside the field.
    """

    is_template = True  # Gradio shows it by the script of its parent

    def preprocess(self, payload: Any) -> Any:
        """The path of the uploaded file."""
        return None if payload is None else payload.path


UPLOAD: dict[str, Any] = {
    "sources": ["upload"],
    "placeholder": "Drop a picture here, or click",
    "interactive": True,
    "buttons": [],
    "elem_classes": "takes-files",  # not those of the page, see theme.DROP
}
