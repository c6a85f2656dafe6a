"""The studio's fields for items with pictures, without a browser: subjects from file to record and back."""

import threading
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from test_app import FIELDS

from interactdiff import Subject
from interactdiff.app.canvas_items import CanvasBox
from interactdiff.app.document import Document
from interactdiff.app.form import error_place, filled, request_of, with_layout
from interactdiff.app.limits import Limits, opened_picture
from interactdiff.app.picture_items import PictureItems, PlacedItem
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.worker import Worker
from interactdiff.cli import main
from interactdiff.errors import SceneError
from interactdiff.picture import read_record
from interactdiff.registry import item_specs
from interactdiff.subject.foreground import preview

LEFT = (0.1, 0.2, 0.4, 0.9)
SETTINGS = {"subject.used": False, "subject.encoder_weight": 0.2, "subject.reference_weight": 3.0}
SETTINGS |= {"subject.encoder_guidance": 0.0, "subject.attention_without_box": 1}
SETTINGS |= {"subject.guidance": 0.0, "subject.guidance_share": 0.9, "subject.time_gap": 1}
SETTINGS |= {"subject.layers": 1.0, "subject.schedule": 1.0, "subject.extra_row": 0}
SETTINGS |= {"subject.fresh_noise": 0, "subject.position_shift": 0.0, "subject.position_scale": 0.5}


def figure(mode: str = "RGB", background: Any = "white") -> Image.Image:
    """A green figure in the middle half of 64 x 48 pixels."""
    picture = Image.new(mode, (64, 48), background)
    picture.paste("green", (16, 0, 48, 48))
    return picture


def mask() -> Image.Image:
    left = Image.new("L", (64, 48))
    left.paste(255, (0, 0, 16, 48))
    return left


@pytest.mark.parametrize(
    ("subject", "words", "column"),
    [
        (Subject("person", figure(), mask()), "25 % of the picture is taken, by its mask.", 8),
        (Subject("person", figure("RGBA", (9, 9, 9, 0))), "50 % of the picture is taken, by its alpha ", 32),
        (Subject("person", figure()), "50 % of the picture is taken, by its white background.", 32),
        (Subject("person", figure(background="black")), "The whole picture is taken: no mask, ", 8),
    ],
)
def test_what_is_taken_is_seen_and_said(subject: Subject, words: str, column: int) -> None:
    seen, how = preview(subject)
    assert how.startswith(words)
    pixels, own = np.asarray(seen), np.asarray(subject.image.image.convert("RGB"))
    assert (pixels[:, column] == own[:, column]).all()
    if "%" in how:
        assert abs(pixels[:, 60].astype(int) - own[:, 60]).min() > 50  # shaded


@pytest.fixture(scope="module")
def fields() -> PictureItems:
    with gr.Blocks():
        made = PictureItems(item_specs()["subjects"])
        made.wire(gr.Textbox(), gr.Textbox(), gr.HTML(), queue=False)
    return made


def test_files_that_are_no_subjects_are_refused_in_words(fields: PictureItems, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("x")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    figure().save(tmp_path / "good.png")
    Image.new("L", (64, 48)).save(tmp_path / "mask.png")
    good = str(tmp_path / "good.png")
    for picture, mask_file, message in (
        (str(tmp_path / "bad.png"), None, "picture: expected a whole PNG, JPEG, WEBP, got a file that "),
        (str(tmp_path / "white.png"), None, "subject &#x27;subject&#x27;: expected pixels of it in its pict"),
        (good, str(tmp_path / "mask.png"), "mask: expected light pixels where the subject is, got an empty"),
        (good, str(tmp_path / "white.png"), "mask: expected 64 x 48 pixels, as its picture has once both"),
    ):
        updates = fields._looked(picture, mask_file, "")
        assert message in updates[fields._error]["value"]
        assert updates[fields.preview]["visible"] is False
    nameless = fields._added(good, None, "", "", (), Document(), "")
    assert "phrase: expected" in nameless[fields._error]["value"]
    nothing = fields._added(None, None, "person", "", (), Document(), "")
    assert "picture: expected one of the subject, got none" in nothing[fields._error]["value"]


def test_subjects_are_added_placed_and_removed(fields: PictureItems, tmp_path: Path) -> None:
    figure("RGBA", (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert opened_picture(tmp_path / "a.png", alpha=True).mode == "RGBA"
    canvas = Document(
        (CanvasBox("t1", "person", LEFT), CanvasBox("t2", "person", LEFT), CanvasBox("t3", "", LEFT))
    )
    assert fields.choices(canvas)[fields.place]["choices"] == [
        ("anywhere", ""), ("person", "t1"), ("person (2)", "t2")
    ]  # fmt: skip
    added = fields._added(str(tmp_path / "a.png"), None, "dog", "t2", (), canvas, "a person")
    (one,) = added[fields.kept]
    assert (one.item.phrase, one.item.image.mode, one.item.box, one.bound.id) == ("dog", "RGBA", LEFT, "t2")
    assert one.item.image.path is None  # no file of the server in any record or code
    assert added[fields.note]["value"] == "Added dog. The prompt does not name it yet."
    assert added[fields.gallery]["value"][0][1] == "dog, in the box person"
    two = fields._added(str(tmp_path / "a.png"), None, "person", "", added[fields.kept], canvas, "")
    assert [item.item.phrase for item in two[fields.kept]] == ["dog", "person"]
    left = fields._removed(two[fields.kept], 0)
    assert [item.item.phrase for item in left[fields.kept]] == ["person"]


def test_a_subject_follows_its_box() -> None:
    box = CanvasBox("t1", "person", LEFT)
    one = PlacedItem(Subject("person", figure(), box=LEFT), box)
    for there in (
        CanvasBox("t1", "dog", (0.5, 0.5, 0.9, 0.9)),
        CanvasBox("t9", "person", (0.5, 0.5, 0.9, 0.9)),
    ):
        assert one.on(Document((CanvasBox("t8", "cat", LEFT), there))).box == there.box
    with pytest.raises(
        SceneError, match="subject 'person': expected its box 'person' on the canvas, got"
    ) as no:
        one.on(Document())
    assert error_place(no.value) == "subject"
    assert error_place(SceneError("subjects: expected at most 8, got 9")) == "subject"
    assert PlacedItem(one.item).on(Document()).box == LEFT


def test_the_record_and_the_code_bring_a_subject_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the page to a PNG, code with its pixels or without, and the page again."""
    monkeypatch.chdir(tmp_path)
    box = CanvasBox("t1", "person", LEFT)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)  # PNG makes it no smaller
    kept = (PlacedItem(Subject("person", Image.fromarray(noise), mask()), box),)
    values = FIELDS | SETTINGS | {"subject.items.subjects": kept, "steps": 1}
    request = request_of(Document((box,)), values)
    assert request.scene.extra_items == (Subject("person", Image.fromarray(noise), mask(), LEFT),)
    worker = Worker(Limits(), device="cpu")
    (one,) = list(worker.generate(request, threading.Event()))[-1].images
    kept_bytes = one.path.read_bytes()
    worker.close()
    (tmp_path / "downloaded.png").write_bytes(kept_bytes)
    record = read_record("downloaded.png")
    assert record.scene == request.scene
    restored = FIELDS | filled(record, 96)
    assert restored["subject.used"]
    canvas = with_layout(Document(), record.scene, 96)
    assert PlacedItem.restored(restored["subject.items.subjects"][0].item, canvas).bound == canvas.boxes[0]
    assert request_of(canvas, restored).scene == request.scene
    for longest in (50_000, 100):
        monkeypatch.setattr("interactdiff.app.snippets.LONGEST_CODE", longest)
        exec(compile(as_python(record), "snippet", "exec"), {})
        assert Path("picture.png").read_bytes() == kept_bytes
    assert len(as_python(record)) < 500
    said, command = as_command(record).splitlines()
    assert said.startswith("#")
    assert main(command.split()[1:]) == 0
    assert Image.open("picture.png").tobytes() == Image.open("downloaded.png").tobytes()
