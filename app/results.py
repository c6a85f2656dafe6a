"""The pictures that are done: what is shown of them, and code that generates them again."""

from typing import Any

import gradio as gr
from PIL import Image

from interactdiff.app import theme
from interactdiff.app.page import Page
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.views import VIEWS, attention_over, detections_in_file, recorded_tokens
from interactdiff.app.worker import StoredImage
from interactdiff.models import PACKAGED
from interactdiff.picture import overlay

Updates = dict[Any, Any]
PICTURE, LAYOUT, DETECTIONS, ATTENTION = VIEWS


def shown(
    page: Page, images: list[StoredImage], chosen: int, view: str, token: str | None = None, step: int = 0
) -> Updates:
    """The gallery in a view, and what belongs to the chosen picture.

    Args:
        page: whose parts are updated.
        images: the pictures.
        chosen: which of them.
        view: one of `VIEWS`.
        token: "role slot", of whose attention is shown.
        step: counted from 1; 0 is the mean of all.
    """
    if not images:
        return {}
    recorded = next((one.maps for one in images if one.maps is not None), None)
    choices = recorded_tokens(images[0].record.scene)
    token = token if token in [value for _, value in choices] else choices[0][1] if choices else None
    last = 0 if recorded is None else len(recorded.steps)
    step = min(step, last)
    pictures = [(_in_view(one, view, token, step), _caption(one)) for one in images]
    return {
        page.gallery: gr.update(value=pictures, visible=True, **_gallery(len(images))),
        page.view: gr.update(value=view, visible=True),
        page.attention: gr.update(visible=view == ATTENTION and recorded is not None),
        page.token: gr.update(choices=choices, value=token),
        page.step: gr.update(maximum=max(last, 1), value=step),
        page.images: images,
        page.status: theme.progress_html(_status(images)),
        **details(page, images, chosen, view),
    }


def details(page: Page, images: list[StoredImage], chosen: int, view: str) -> Updates:
    """What belongs to the chosen picture alone."""
    if not images:
        return {}
    one = images[chosen := min(chosen, len(images) - 1)]
    words = ""
    if view == DETECTIONS:
        words = f"Picture {chosen + 1}: {detections_in_file(one.path)[1]}."
        if one.record.model not in PACKAGED:
            words += " The detector is trained on the embedded world alone."
    if view == ATTENTION and one.maps is None:
        words = "Nothing was recorded: generate with interactions and with *Record attention maps*."
    return {
        page.note: gr.update(value=words, visible=bool(words)),
        page.after: gr.update(visible=True),
        page.codes: gr.update(visible=True),
        page.python: as_python(one.record, one.path.name, one.learned),
        page.command: as_command(one.record, one.path.name, one.learned),
        page.chosen: chosen,
    }


def _gallery(pictures: int) -> dict[str, Any]:
    """One picture is shown large, several in two columns."""
    if pictures == 1:
        return {"selected_index": 0, "preview": True, "height": 420}
    return {"selected_index": None, "preview": False, "height": "auto"}


def _in_view(one: StoredImage, view: str, token: str | None, step: int) -> Any:
    scene = one.record.scene
    if view == LAYOUT:
        return overlay(_open(one), scene.interactions, scene.entities, scene.extra_items)
    if view == DETECTIONS:
        return detections_in_file(one.path)[0]
    if view == ATTENTION and one.maps is not None and token is not None:
        role, slot = token.split()
        at = None if step == 0 else one.maps.steps[min(step, len(one.maps.steps)) - 1]
        return attention_over(_open(one), one.maps, role, int(slot), at)
    return str(one.path)  # the file itself: downloads keep the record


def _open(one: StoredImage) -> Image.Image:
    with Image.open(one.path) as image:
        return image.convert("RGB")


def _caption(one: StoredImage) -> str:
    scene = one.record.scene
    without = "" if one.controlled or not scene.items else ", without control"
    return f"seed {scene.seed}{without}"


def _status(images: list[StoredImage]) -> str:
    sizes = {_open(one).size for one in images}
    size = ", ".join(f"{wide} x {high} px" for wide, high in sorted(sizes))
    return f"{len(images)} picture{'s' * (len(images) > 1)} generated, {size}. The scene is inside each PNG."
