"""The pictures that are done: what is shown of them, and code that draws them again."""

from typing import Any

import gradio as gr
from PIL import Image

from interactdiff.app import looks
from interactdiff.app.artist import Drawn
from interactdiff.app.page import Page
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.views import VIEWS, found_in_file, looked_over, tokens
from interactdiff.models import MODELS
from interactdiff.picture import overlay

Updates = dict[Any, Any]
PICTURE, ASKED, FOUND, LOOKED = VIEWS


def shown(
    page: Page, drawn: list[Drawn], chosen: int, view: str, token: str | None = None, step: int = 0
) -> Updates:
    """The gallery in a view, and what belongs to the chosen picture.

    Args:
        page: whose parts are updated.
        drawn: the pictures.
        chosen: which of them.
        view: one of `VIEWS`.
        token: "role slot", of what is looked for.
        step: counted from 1; 0 is the mean of all.
    """
    if not drawn:
        return {}
    recorded = next((one.maps for one in drawn if one.maps is not None), None)
    choices = tokens(drawn[0].record.scene)
    token = token if token in [value for _, value in choices] else choices[0][1] if choices else None
    last = 0 if recorded is None else len(recorded.steps)
    step = min(step, last)
    pictures = [(_in_view(one, view, token, step), _caption(one)) for one in drawn]
    return {
        page.gallery: gr.update(value=pictures, visible=True, **_gallery(len(drawn))),
        page.view: gr.update(value=view, visible=True),
        page.looking: gr.update(visible=view == LOOKED and recorded is not None),
        page.token: gr.update(choices=choices, value=token),
        page.step: gr.update(maximum=max(last, 1), value=step),
        page.drawn: drawn,
        page.status: looks.bar(_status(drawn)),
        **details(page, drawn, chosen, view),
    }


def details(page: Page, drawn: list[Drawn], chosen: int, view: str) -> Updates:
    """What belongs to the chosen picture alone."""
    if not drawn:
        return {}
    one = drawn[chosen := min(chosen, len(drawn) - 1)]
    words = ""
    if view == FOUND:
        words = f"Picture {chosen + 1}: {found_in_file(one.path)[1]}."
        if one.record.model not in MODELS:
            words += " The detector knows the embedded world alone; other pictures are beyond it."
    if view == LOOKED and one.maps is None:
        words = "Nothing was recorded: draw with control and with *Record where it looks*."
    return {
        page.found: gr.update(value=words, visible=bool(words)),
        page.after: gr.update(visible=True),
        page.codes: gr.update(visible=True),
        page.python: as_python(one.record),
        page.command: as_command(one.record),
        page.chosen: chosen,
    }


def _gallery(pictures: int) -> dict[str, Any]:
    """One picture is shown large, several in two columns."""
    if pictures == 1:
        return {"selected_index": 0, "preview": True, "height": 420}
    return {"selected_index": None, "preview": False, "height": "auto"}


def _in_view(one: Drawn, view: str, token: str | None, step: int) -> Any:
    scene = one.record.scene
    if view == ASKED:
        return overlay(_open(one), scene.interactions, scene.entities)
    if view == FOUND:
        return found_in_file(one.path)[0]
    if view == LOOKED and one.maps is not None and token is not None:
        role, slot = token.split()
        at = None if step == 0 else one.maps.steps[min(step, len(one.maps.steps)) - 1]
        return looked_over(_open(one), one.maps, role, int(slot), at)
    return str(one.path)  # the file itself: downloads keep the record


def _open(one: Drawn) -> Image.Image:
    with Image.open(one.path) as image:
        return image.convert("RGB")


def _caption(one: Drawn) -> str:
    scene = one.record.scene
    without = "" if one.controlled or not scene.items else ", without control"
    return f"seed {scene.seed}{without}"


def _status(drawn: list[Drawn]) -> str:
    sizes = {_open(one).size for one in drawn}
    size = ", ".join(f"{wide} x {high} px" for wide, high in sorted(sizes))
    return f"{len(drawn)} picture{'s' * (len(drawn) > 1)} drawn, {size}. The scene is inside each PNG."
