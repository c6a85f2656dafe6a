"""The studio learns concepts, without a browser: names and boxes, the worker's job, what is kept, limits."""

import threading
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image
from tiny_concept import photo

from interactdiff.app import worker as worker_module
from interactdiff.app.canvas_items import CanvasBox, CanvasLink
from interactdiff.app.concept_panel import ConceptPanel
from interactdiff.app.document import Document
from interactdiff.app.learning import (
    LearnedConcept,
    LearnProgress,
    LearnRequest,
    learn,
    parsed_concepts,
    taken_boxes,
    with_learned,
)
from interactdiff.app.limits import LEARNING_OFF, Limits, opened_picture
from interactdiff.app.serve import LOCAL, PUBLIC
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.studio import Studio
from interactdiff.app.worker import GenerationRequest, Worker
from interactdiff.cli import main
from interactdiff.concept.words import Concept
from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.models import ModelError
from interactdiff.picture import Record, read_record
from interactdiff.scene import Interaction, Scene

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 1.0)
ZIP = Path("concept.zip")
HERO, BLOB = Concept("<hero>", "person"), Concept("<blob>", "ball")


# --- names and boxes ---


def test_lines_are_concepts_with_boxes() -> None:
    concepts, boxes = parsed_concepts("<hero>=person | 0,0,0.5,1\n\n<blob>=ball\n<a-b>=red box|box=0.5,0,1,1")
    assert concepts == (HERO, BLOB, Concept("<a-b>", "red box"))
    assert boxes == {"<hero>": LEFT, "<a-b>": (0.5, 0, 1, 1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one concept, got none"),
        ("hero=person", "expected a concept's token in angle brackets, such as <hero>, got 'hero'"),
        ("<hero>", "expected TOKEN=WORD, such as <hero>=person, got '<hero>'"),
        ("<hero>=person|1,2", "the box of <hero>: expected "),
        ("<hero>=person\n<hero>=ball", "expected each concept once, got <hero> twice"),
        ("\n".join(f"<t{n}>=ball" for n in range(5)), "expected at most 4 concepts of a photo, got 5"),
    ],
)
def test_other_lines_are_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(InteractdiffError) as refused:
        parsed_concepts(text)
    assert str(refused.value).startswith(message)


def test_boxes_of_the_canvas_become_lines() -> None:
    linked = CanvasBox("t1", "man", LEFT), CanvasBox("t2", "bike", RIGHT)
    names = ("person", "red ball", "red ball", "<x>=dog")
    boxes = [CanvasBox(f"b{n}", name, LEFT) for n, name in enumerate(names)]
    canvas = Document((*linked, *boxes), (CanvasLink("l1", "t1", "t2"),), picture="photo")
    left, text = taken_boxes(canvas, "<hero>=person\n<kept>=car|0,0,1,1")
    assert text.splitlines() == [
        "<hero>=person|0,0,0.5,1", "<kept>=car|0,0,1,1", "<red-ball>=red ball|0,0,0.5,1",
        "<red-ball-2>=red ball|0,0,0.5,1", "<x>=dog|0,0,0.5,1",
    ]  # fmt: skip
    assert (left.boxes, left.links, left.picture) == (linked, canvas.links, None)
    for boxes, message in (
        ((), "expected boxes on the canvas"),
        ((CanvasBox("t1", "", LEFT),), "expected a n"),
    ):
        with pytest.raises(InteractdiffError, match=message):
            taken_boxes(Document(boxes), "")


def test_learned_concepts_are_used_where_their_tokens_are() -> None:
    old, hero, blob = (LearnedConcept(n, (f"<{n}>",), "stickworld", ZIP) for n in ("old", "hero", "blob"))
    again = LearnedConcept("again", ("<hero>", "<other>"), "stickworld", ZIP)
    elsewhere = LearnedConcept("elsewhere", ("<blob>",), "stickworld-dit", ZIP)
    learned = (old, hero, blob, again, elsewhere)
    scene = Scene("a <blob>", (Interaction("<hero>", "riding", "bike", LEFT, RIGHT),))
    request = with_learned(GenerationRequest(scene, model="stickworld"), learned)
    assert request.adapters == {"concept": "again", "concept:1": "blob"}  # the later <hero>
    assert request.methods == {"concept": {}}
    chosen = GenerationRequest(
        scene, model="stickworld", adapters={"concept": "hero"}, methods={"concept": {}}
    )
    assert with_learned(chosen, learned).adapters == {"concept": "hero", "concept:1": "blob"}
    other = GenerationRequest(scene, model="stickworld-dit")
    with pytest.raises(
        SceneError, match="prompt: expected the model stickworld, on which <hero> was learned, go"
    ):
        with_learned(other, learned)
    unknown = {"concept": "/of/the/user"}  # which may have the token
    assert with_learned(replace(other, adapters=unknown), learned).adapters == {
        "concept": "/of/the/user", "concept:1": "elsewhere",
    }  # fmt: skip
    plain = GenerationRequest(Scene("a hero"))
    assert with_learned(plain, learned) == plain


# --- on the worker's thread ---


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("interactdiff.app.learning.PREVIEW_EVERY", 0.0)
    monkeypatch.setattr("interactdiff.app.worker.KEPT_ADAPTERS", 1)
    monkeypatch.setattr("interactdiff.concept.learner.SAMPLE_STEPS", 1)
    made = Worker(Limits(learn_steps=30), device="cpu")
    yield made
    made.close()


def asked(steps: int, **options: Any) -> LearnRequest:
    boxes = options.pop("boxes", {"<hero>": LEFT, "<blob>": RIGHT})
    return LearnRequest(photo(96, 96), (HERO, BLOB), boxes, steps, **options)


def test_from_a_photo_to_a_picture_and_no_more_than_is_kept(worker: Worker) -> None:
    (*_, masks) = learn(worker, asked(0), threading.Event())  # the masks alone
    assert masks.message.startswith("Masks, in shares of the photo: <hero> ")
    assert masks.masks is not None
    assert masks.masks.width > 3 * 96
    reports = list(learn(worker, asked(3), threading.Event()))
    messages = [one.message for one in reports]
    assert messages[:2] == ["Loading the model", "Looking for the concepts in the photo"]
    assert [message.split(",")[0] for message in messages[3:6]] == [f"Step {n} of 3" for n in (1, 2, 3)]
    assert all(one.seconds_left is not None for one in reports[3:6])
    said = "Learned, after step 3: write <hero> and <blob> in the prompt."
    assert messages[6:] == ["Drawing samples", said]
    done = reports[-1]
    assert done.samples is not None
    assert done.learned is not None
    assert done.learned.name.startswith("concept-hero-blob-")
    with zipfile.ZipFile(done.learned.archive) as archive:
        assert sorted(archive.namelist()) == ["adapter.safetensors", "config.json"]

    pixels = {}
    for prompt in ("a <hero>", "a person"):
        scene = Scene(prompt, seed=1, steps=2, width=96, height=96)
        request = with_learned(GenerationRequest(scene, model="stickworld"), (done.learned,))
        (one,) = list(worker.generate(request, threading.Event()))[-1].images
        expected = {"concept": done.learned.name} if prompt == "a <hero>" else {}
        adapters = read_record(one.path).adapters
        assert str(worker.folder).encode() not in one.path.read_bytes()
        assert one.learned == set(expected.values())
        assert {name: at for name, at in adapters.items() if name != "interaction"} == expected
        pixels[prompt] = Image.open(one.path).tobytes()
    assert pixels["a <hero>"] != pixels["a person"]
    with pytest.raises(ModelError, match="expected an adapter that this server has"):
        worker.describe("stickworld", {"concept": "/elsewhere"})

    stop, reports = threading.Event(), []
    for one in learn(worker, asked(30), stop):
        reports.append(one)
        if one.message.startswith("Step 1 of 30"):
            stop.set()
    last: LearnProgress = reports[-1]
    assert last.message.startswith("Stopped after step ")
    assert last.message.endswith(" of 30: what is learned so far is kept.")
    assert last.samples is None
    assert last.learned is not None
    assert last.learned.archive.with_suffix("").joinpath("adapter.safetensors").is_file()
    assert not done.learned.archive.with_suffix("").exists()  # only so many are kept
    assert not done.learned.archive.exists()
    with pytest.raises(ModelError, match="expected a concept that this server still has"):
        worker.describe("stickworld", {"concept": done.learned.name})

    learning = learn(worker, asked(30), threading.Event())
    next(one for one in learning if one.message.startswith("Step"))
    learning.close()  # the page has gone
    assert list(learn(worker, asked(0), threading.Event()))  # the next one is served


def test_a_concept_that_is_not_found_is_shown_and_named(worker: Worker) -> None:
    speck = asked(0, boxes={"<hero>": (0.0, 0.0, 0.01, 0.01), "<blob>": RIGHT})  # no cell's middle is in it
    reports: list[LearnProgress] = []
    with pytest.raises(
        InteractdiffError, match=r"expected <hero> in the photo, got 0.0 % of its pixels: try an"
    ):
        reports.extend(learn(worker, speck, threading.Event()))  # keeps those before the error
    assert reports[-1].masks is not None
    for request, message in (
        (LearnRequest(photo(10, 10), (HERO,)), "expected a photo of at least 32 pixels a side, got 10 x 10"),
        (
            LearnRequest(photo(96, 96), (HERO,), model="/etc"),
            "expected a model that this server has, got '/e",
        ),
    ):
        with pytest.raises(InteractdiffError, match=message):
            list(learn(worker, request, threading.Event()))


def test_the_panel_says_how_a_job_ended(worker: Worker, tmp_path: Path) -> None:
    """Stopped while it waits, which is no mistake beside a field; what is one; and what came of it."""
    studio = Studio(worker, "stickworld")
    panel, lines = studio.concepts, "<hero>=person|0,0,0.5,1\n<blob>=ball|0.5,0.25,1,1"
    photo(96, 96).save(tmp_path / "photo.png")

    def ended(steps: int, text: str = lines, stopped: bool = False) -> str:
        studio._stops["job"] = "page", threading.Event()
        if stopped:
            studio.stop_job("job")
        *_, last = panel._run("job", str(tmp_path / "photo.png"), text, steps, "stickworld", ())
        return last[panel.status]["value"]

    assert "Stopped." in ended(3, stopped=True)
    assert "Not learned: see the message beside the field." in ended(3, "<hero>")
    assert "Masks, in shares of the photo" in ended(0)
    assert "Learned, after step 1" in ended(1)


def test_code_reads_what_was_learned_from_its_archive() -> None:
    name = "concept-hero-1a2b3c4d"
    record = Record(Scene("a <hero>"), "stickworld", {"concept": name, "clear": "/a"}, "cpu", "float32")
    long = replace(record, scene=Scene("a " * 30_000))
    for made in (record, long):
        for code in (as_python(made, "a.png", {name}), as_command(made, "a.png", {name})):
            first, rest = code.split("\n", 1)
            assert first.startswith("# ")
            assert first.endswith("unzip concept-hero-1a2b3c4d.zip -d concept-hero-1a2b3c4d")
            assert (name in rest) != ("read_record(" in rest)  # which has the name
    assert not as_python(record, "a.png").startswith("#")


def test_two_models_are_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model is loaded anew in float32 to learn on."""
    worker = Worker(Limits(learn_steps=1), device="cpu", dtype="bfloat16")
    alive: list[bool] = []
    try:
        worker.describe("stickworld", {})
        assert worker._loaded is not None
        before = weakref.ref(worker._loaded[2].denoiser)
        load = worker_module.load_pipeline

        def watched(*args: Any) -> Any:
            alive.append(before() is not None)
            return load(*args)

        monkeypatch.setattr(worker_module, "load_pipeline", watched)
        assert worker._thread.submit(worker.without_adapters, "stickworld").result().dtype == torch.float32
        assert alive == [False]
    finally:
        worker.close()


# --- limits ---


def test_learning_is_limited_and_off_for_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert (PUBLIC.learn_steps, LOCAL.learn_steps) == (0, 2000)
    Limits(learn_steps=5).check_learning(5)
    for limits, steps, message in (
        (Limits(), 1, "Learning is off on this server"),
        (Limits(learn_steps=5), 6, "steps: expected 1 to 5 to learn in, got 6"),
        (Limits(learn_steps=5), -1, "steps: expected 1 to 5 to learn in, got -1"),
    ):
        with pytest.raises(InteractdiffError, match=message):
            limits.check_learning(steps)
    with gr.Blocks() as page:
        assert not ConceptPanel(PUBLIC).is_on
    assert LEARNING_OFF in [getattr(block, "value", None) for block in page.blocks.values()]
    assert not any(isinstance(block, gr.Button) for block in page.blocks.values())
    assert main(["app", "--max-learn-steps", "-1"]) == 2
    assert "--max-learn-steps: expected a number from 0 up, got -1" in capsys.readouterr().err


def test_photos_are_taken_upright(tmp_path: Path) -> None:
    """As a browser shows them, or boxes would be elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert opened_picture(tmp_path / "a.jpg").size == (20, 40)
