"""Items that take a picture, such as subjects: upload, preview of the mask, phrase, place, and their list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from interactdiff.app import theme
from interactdiff.app.canvas_items import CanvasBox
from interactdiff.app.document import Document
from interactdiff.app.limits import opened_picture
from interactdiff.app.uploads import UPLOAD, PictureUpload
from interactdiff.errors import SceneError
from interactdiff.method_specs import ItemSpec, load_attribute
from interactdiff.picture import enlarged
from interactdiff.scene_checks import shown

Updates = dict[Any, Any]
ANYWHERE = ""
PLACE = "a box on the canvas; else that of an interaction with the same phrase"


@dataclass(frozen=True)
class PlacedItem:
    """An item that has a picture.

    Attributes:
        item: its `box` is where it was placed, or None.
        bound: the box of the canvas that it is bound to, as it was then; None for none.
    """

    item: Any
    bound: CanvasBox | None = None

    @classmethod
    def restored(cls, item: Any, document: Document) -> "PlacedItem":
        """An item of a scene, bound to the box of the canvas that is where the item is."""
        return cls(item, next((one for one in document.boxes if one.box == item.box), None))

    def on(self, document: Document) -> Any:
        """The item, where its box is now.

        Raises:
            SceneError: the box is gone.
        """
        if self.bound is None:
            return self.item
        box = document.box_like(self.bound)
        if box is None:
            name = f"{type(self.item).__name__.lower()} {shown(self.item.phrase)}"
            raise SceneError(
                f"{name}: expected its box {shown(self.bound.phrase)} on the canvas, got none: remove the "
                f"{name.split()[0]}, or draw the box again"
            )
        return replace(self.item, box=box.box)


class PictureItems:
    """The fields of a kind of items, and what they do.

    Args:
        spec: of the items, with `from_picture`.

    Attributes:
        kept: the items that are in the scene, a tuple of `PlacedItem`.
    """

    def __init__(self, spec: ItemSpec):
        self.spec = spec
        with gr.Row():
            side: dict[str, Any] = {"height": 170, "min_width": 130}
            self.picture = PictureUpload(label="Picture", elem_id=f"{spec.name}-picture", **side, **UPLOAD)
            self.mask = PictureUpload(label="Mask (optional)", elem_id=f"{spec.name}-mask", **side, **UPLOAD)
            self.preview = gr.Image(
                label="What is taken", visible=False, interactive=False, buttons=[], format="png",
                elem_id=f"{spec.name}-preview", **side,
            )  # fmt: skip
        self.note = gr.Markdown(visible=False, elem_id=f"{spec.name}-note")
        with gr.Row():
            self.phrase = gr.Dropdown(
                [], value="", label="Phrase", allow_custom_value=True, info="what the prompt calls it",
                min_width=150, elem_id=f"{spec.name}-phrase",
            )  # fmt: skip
            self.place = gr.Dropdown(
                [("anywhere", ANYWHERE)], value=ANYWHERE, label="Place", info=PLACE, min_width=150,
                elem_id=f"{spec.name}-place",
            )  # fmt: skip
        self.add = gr.Button(f"Add the {spec.name}", size="sm", elem_id=f"{spec.name}-add")
        self.kept, self.selected = gr.State(()), gr.State(None)
        self.gallery = gr.Gallery(
            label=f"{spec.key.capitalize()} of the scene", visible=False, interactive=False,
            columns=3, fit_columns=False,
            height="auto", object_fit="contain", allow_preview=False, buttons=[], format="png",
            elem_id=f"{spec.name}-list",
        )  # fmt: skip
        self.remove = gr.Button(
            "Remove the selected one", visible=False, interactive=False, size="sm",
            elem_id=f"{spec.name}-remove",
        )  # fmt: skip

    def wire(self, canvas: Any, prompt: Any, error: Any, **options: Any) -> None:
        """Say what its buttons do.

        Args:
            canvas: of the page.
            prompt: likewise.
            error: the line for errors.
            **options: of every event.
        """
        self._error = error
        looked = [self.preview, self.note, error]
        for upload in (self.picture, self.mask):
            upload.input(self._looked, [self.picture, self.mask, self.phrase], looked, **options)
        listed = [self.kept, self.gallery, self.remove, self.selected]
        given = [self.picture, self.mask, self.phrase, self.place, self.kept, canvas, prompt]
        emptied = [self.picture, self.mask, self.phrase, self.place]
        self.add.click(self._added, given, [*emptied, *looked, *listed], **options)
        self.gallery.select(self._selected, None, [self.selected, self.remove], **options)
        self.remove.click(self._removed, [self.kept, self.selected], listed, **options)

    def choices(self, document: Document) -> Updates:
        """The phrases and places that a canvas offers."""
        named = [box for box in document.boxes if box.phrase.strip()]
        phrases = list(dict.fromkeys(box.phrase for box in named))
        places = [("anywhere", ANYWHERE)]
        for box in named:
            same = sum(label.partition(" (")[0] == box.phrase for label, _ in places)
            places.append((f"{box.phrase} ({same + 1})" if same else box.phrase, box.id))
        return {self.phrase: gr.update(choices=phrases), self.place: gr.update(choices=places)}

    def listed(self, items: Sequence[PlacedItem]) -> Updates:
        """Items and what shows them."""
        pictures = [(self._preview(one.item)[0], _caption(one)) for one in items]
        return {
            self.kept: tuple(items),
            self.gallery: gr.update(value=pictures, visible=bool(items), selected_index=None),
            self.remove: gr.update(visible=bool(items), interactive=False),
            self.selected: None,
        }

    def _preview(self, item: Any) -> tuple[Any, str]:
        if self.spec.preview is None:
            return item.image.image, ""
        picture, words = load_attribute(self.spec.preview)(item)
        return enlarged(picture), words

    def _made(self, picture: str, mask: str | None, phrase: str, box: Any = None) -> Any:
        assert self.spec.from_picture is not None
        pixels = None if mask is None else opened_picture(mask, alpha=True)
        return self.spec.from_picture(phrase, opened_picture(picture, alpha=True), pixels, box)

    def _looked(self, picture: str | None, mask: str | None, phrase: str | None) -> Updates:
        """Show what of a picture is taken, as soon as it is there."""
        hidden = {self.preview: gr.update(value=None, visible=False), self.note: gr.update(visible=False)}
        if picture is None:
            return hidden | {self._error: gr.update(visible=False)}
        try:
            shown_picture, words = self._preview(self._made(picture, mask, phrase or self.spec.name))
        except SceneError as error:
            return hidden | self._shown_error(error)
        return {
            self.preview: gr.update(value=shown_picture, visible=True),
            self.note: gr.update(value=f"{words} Add it to use it.", visible=True),
            self._error: gr.update(visible=False),
        }

    def _added(
        self,
        picture: str | None,
        mask: str | None,
        phrase: str | None,
        place: str | None,
        kept: Sequence[PlacedItem],
        document: Document,
        prompt: str,
    ) -> Updates:
        """A picture becomes an item of the scene."""
        try:
            if picture is None:
                raise SceneError(
                    "picture: expected one of the " + self.spec.name + ", got none: drop it above"
                )
            bound = next((box for box in document.boxes if box.id == place), None)
            item = self._made(picture, mask, phrase or "", bound and bound.box)
            listed = self.listed((*kept, PlacedItem(item, bound)))
        except SceneError as error:
            return self._shown_error(error)
        is_named = item.phrase.lower() in (prompt or document.prompt()).lower()
        words = f"Added {item.phrase}." + ("" if is_named else " The prompt does not name it yet.")
        return listed | {
            self.picture: None,
            self.mask: None,
            self.phrase: "",
            self.place: ANYWHERE,
            self.preview: gr.update(value=None, visible=False),
            self.note: gr.update(value=words, visible=True),
            self._error: gr.update(visible=False),
        }

    def _selected(self, event: gr.SelectData) -> Updates:
        return {self.selected: int(event.index), self.remove: gr.update(interactive=True)}

    def _removed(self, kept: Sequence[PlacedItem], selected: int | None) -> Updates:
        left = [one for number, one in enumerate(kept) if number != selected]
        return self.listed(left)

    def _shown_error(self, error: Exception) -> Updates:
        return {self._error: gr.update(value=theme.error_html(str(error)), visible=True)}


def _caption(one: PlacedItem) -> str:
    if one.bound is not None:
        return f"{one.item.phrase}, in the box {one.bound.phrase}"
    return f"{one.item.phrase}, {'anywhere' if one.item.box is None else 'in a box of its own'}"
