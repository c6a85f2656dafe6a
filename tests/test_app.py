"""The studio without a browser: requests, generation, limits, views, and code that repeats a picture."""

import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interactdiff import Entity, Interaction, Scene, SceneError
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import OWN, error_place, filled, request_of, with_layout
from interactdiff.app.limits import Limits, opened_picture
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.views import attention_over, detections_in, detections_over, recorded_tokens
from interactdiff.app.worker import GenerationRequest as Request
from interactdiff.app.worker import ModelStatus, Progress, StoredImage, Worker
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.maps import AttentionMaps
from interactdiff.method_specs import Cost
from interactdiff.models import ModelError
from interactdiff.picture import Record, read_record
from interactdiff.registry import samplers
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT

SIZE = "width: expected at most 65536 pixels in all on this server"
TWICE, FOUR_TIMES = ({"high_resolution": {"scale": scale}} for scale in (2, 4))
DEMO = replace(EXAMPLES["riding"], steps=3)
FIELDS: dict[str, Any] = {
    "prompt": "a person", "negative_prompt": "", "seed": 3, "steps": 4, "guidance_scale": None,
    "strength": 1.0, "on": 1.0, "decay": 0.0, "fast": False, "width": 96, "height": 96, "images": 1,
    "compare": False, "record_attention": True, "model": "stickworld", "interaction.adapter": OWN,
    "high_resolution.used": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def worker() -> Any:
    made = Worker(Limits(steps=40, pixels=256 * 256, images=3), device="cpu")
    yield made
    made.close()


def drawn(worker: Worker, request: Request) -> list[Progress]:
    return list(worker.generate(request, threading.Event()))


# --- drawing ---


def test_an_order_is_drawn_step_by_step(worker: Worker) -> None:
    reports = drawn(worker, Request(DEMO, images=2, compare=True, record_attention=True))
    shares = [one.fraction for one in reports]
    assert shares == sorted(shares)
    assert [one.message for one in reports if "of 3" in one.message][:3] == [
        f"Picture 1 of 4, step {n} of 3" for n in (1, 2, 3)
    ]
    assert any(one.preview is not None for one in reports)
    assert any(one.seconds_left is not None and one.seconds_left > 0 for one in reports)
    done = reports[-1].images
    assert [(one.record.scene.seed, one.record.scene.strength, one.controlled) for one in done] == [
        (7, 1.0, True), (7, 0.0, False), (8, 1.0, True), (8, 0.0, False)
    ]  # fmt: skip
    assert [one.maps is not None for one in done] == [True, False, True, False]
    alone = ScenePipeline.from_pretrained(device="cpu")
    for one in done:
        assert read_record(one.path) == one.record
        assert Image.open(one.path).tobytes() == alone.generate(one.record.scene).tobytes()


def test_without_control_is_what_the_base_draws(worker: Worker) -> None:
    _, without = drawn(worker, Request(DEMO, compare=True))[-1].images
    assert (
        Image.open(without.path).tobytes()
        == ScenePipeline.from_pretrained(device="cpu").generate(replace(DEMO, interactions=())).tobytes()
    )


def test_stopping_ends_within_a_step_and_keeps_what_is_done(worker: Worker) -> None:
    stop, reports = threading.Event(), []
    for one in worker.generate(Request(replace(DEMO, steps=20), images=3), stop):
        reports.append(one)
        if one.message.startswith("Picture 2 of 3, step 2 "):
            stop.set()
    assert reports[-1].message == "Stopped after 1 of 3 pictures"
    assert len(reports[-1].images) == 1
    assert not any("step 4" in one.message and "Picture 2" in one.message for one in reports)
    assert len(drawn(worker, Request(DEMO))[-1].images) == 1  # the next one is served


def test_a_page_that_goes_away_frees_the_models(worker: Worker) -> None:
    drawing = worker.generate(Request(replace(DEMO, steps=40), images=3), threading.Event())
    next(reports for reports in drawing if "step" in reports.message)
    drawing.close()
    assert len(drawn(worker, Request(DEMO))[-1].images) == 1


def test_two_pages_do_not_mix(worker: Worker) -> None:
    """Two threads at once: each gets its own scene and seeds."""
    orders = [
        Request(replace(EXAMPLES[name], steps=3, seed=seed))
        for name, seed in (("riding", 1), ("balancing", 2))
    ]
    alone = [Image.open(drawn(worker, request)[-1].images[0].path).tobytes() for request in orders]
    got: dict[int, bytes] = {}

    def draw(n: int) -> None:
        got[n] = Image.open(drawn(worker, orders[n])[-1].images[0].path).tobytes()

    threads = [threading.Thread(target=draw, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == alone


def test_a_model_is_loaded_once_and_one_at_a_time(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ScenePipeline.from_pretrained

    def counted(model: str, *args: Any, **options: Any) -> ScenePipeline:
        loaded.append(model)
        return load(model, *args, **options)

    monkeypatch.setattr(ScenePipeline, "from_pretrained", counted)
    worker.describe("stickworld", {})
    loaded.clear()
    drawn(worker, Request(DEMO, model="stickworld"))
    drawn(worker, Request(DEMO, model="stickworld", images=2))
    assert loaded == []
    assert worker.describe("stickworld-dit", {}) == ModelStatus(
        128,
        {
            "clear": None,
            "concept": "expected weights for concept, got none for stickworld-dit",
            "subject": None,
            "high_resolution": None,
        },
        "cpu",
        "float32",
    )
    assert "expected a Flux" in str(worker.describe("stickworld", {}).unsupported["high_resolution"])
    assert loaded == ["stickworld-dit", "stickworld"]


def test_a_method_draws_through_the_worker(worker: Worker) -> None:
    asked = {"high_resolution": {"scale": 2, "steps": 4, "strength": 0.5}}
    request = Request(replace(DEMO, steps=2), model="stickworld-dit", methods=asked, record_attention=True)
    reports = drawn(worker, request)
    (one,) = reports[-1].images
    assert Image.open(one.path).size == (256, 256)
    assert [t.message for t in reports if t.message.startswith("step")] == [
        f"step {n} of 4" for n in (1, 2, 3, 4)
    ]
    assert one.record.methods["high_resolution"]["shift"] == 1.0  # what suits the model
    assert one.maps is not None
    pipeline = ScenePipeline.from_pretrained("stickworld-dit", device="cpu")
    again = pipeline.generate(request.scene, methods=one.record.methods)
    assert again.tobytes() == Image.open(one.path).tobytes()


# --- limits ---


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Request(replace(DEMO, steps=41)), "steps: expected at most 40 on this server, got 41"),
        (Request(replace(DEMO, width=288, height=288)), SIZE),
        (Request(DEMO, images=4), "images: expected 1 to 3 on this server, got 4"),
        (Request(DEMO, model="stickworld-dit", methods=FOUR_TIMES), SIZE),
        (Request(DEMO, model="stickworld", methods=TWICE), "high_resolution: expected a Flux or Stable "),
        (Request(DEMO, methods={"magic": {}}), "method: expected one of clear, concept, subject, "),
        (Request(replace(DEMO, prompt="a" * 2001)), "prompt: expected at most 2000 letters, got 2001"),
        (Request(replace(DEMO, negative_prompt="a" * 2001)), "negative_prompt: expected at most 2000"),
        (Request(replace(DEMO, entities=(Entity("a" * 2001, (0, 0, 1, 1)),))),
         "entity, phrase: expected at most 2000 letters, got 2001"),
        (Request(replace(DEMO, entities=(Entity("a", (0, 0, 1, 1)),) * 65)),
         "scene: expected at most 64 items on this server, got "),
        (Request(DEMO, methods={"high_resolution": 2}), "high_resolution: expected "),
        (Request(DEMO, model="x" * 5000), "expected a model that this server has, got 'xxx"),
        (Request(DEMO, model="a\0b"), "expected a model that this server has, got 'a"),
        (Request(DEMO, model="/etc"), "expected a model that this server has, got '/etc'"),
        (Request(DEMO, model="owner/name"), "expected a model that this server has, got 'owner/name'"),
        (Request(DEMO, adapters={"interaction": "../x"}), "expected an adapter that this server has"),
        (Request(replace(DEMO, prompt="a " * 90)), "prompt: expected at most"),
    ],
)  # fmt: skip
def test_too_much_is_refused_in_words(worker: Worker, asked: Any, message: str) -> None:
    with pytest.raises((SceneError, ModelError)) as refused:
        drawn(worker, asked)
    assert str(refused.value).startswith(message)


def test_models_are_opened_where_they_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(ModelError, match="got 'owner/name'"):  # no folder of ours, but a Hub id
        Limits(folders=(Path(),)).check_name("model", "owner/name")
    limits = Limits(folders=(tmp_path / "models",), names=("mine",), hub=True)
    for name in ("stickworld", "mine", str(tmp_path / "models/a"), "owner/name"):
        limits.check_name("model", name)
    for name in (
        str(tmp_path / "models/../secret"),
        "../secret",
        "a/b/c",
        "/etc/passwd",
        "~/x",
        str(tmp_path),
    ):
        with pytest.raises(
            ModelError, match=r"that this server has, or one from .* or the Hugging Face Hub, got"
        ):
            limits.check_name("model", name)


def test_work_is_bounded_by_its_largest_picture() -> None:
    Limits(steps=10, pixels=100).check_cost(Cost(100, 10), 1)
    with pytest.raises(SceneError, match="steps: expected at most 10 on this server, got 11"):
        Limits(steps=10, pixels=100).check_cost(Cost(100, 11), 1)


def test_uploads_are_whole_pictures_of_a_known_kind(tmp_path: Path) -> None:
    image = Image.new("RGBA", (20, 10), "red")
    image.save(tmp_path / "a.png")
    assert (opened_picture(tmp_path / "a.png").mode, opened_picture(tmp_path / "a.png").size) == (
        "RGB",
        (20, 10),
    )
    image.save(tmp_path / "a.gif")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "c.png").write_text("<script>")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for name in ("a.gif", "b.png", "c.png"):
        with pytest.raises(SceneError, match="picture: expected a whole PNG, JPEG, WEBP, got a file that is"):
            opened_picture(tmp_path / name)
    with pytest.raises(SceneError, match="picture: expected a whole PNG, JPEG, WEBP, got a file that en"):
        opened_picture(tmp_path / "d.png")
    with pytest.raises(SceneError, match="picture: expected a picture, got no file"):
        opened_picture(tmp_path / "none.png")
    Image.new("1", (8000, 5001)).save(tmp_path / "large.png")
    with pytest.raises(SceneError, match="picture: expected at most 40000000 pixels, got 8000 x 5001"):
        opened_picture(tmp_path / "large.png")


# --- the form ---


def test_a_filled_form_is_an_order_and_an_order_fills_the_form() -> None:
    scene = Scene(
        "a person", DEMO.interactions, (Entity("ball", (0.1, 0.1, 0.2, 0.2), 0.5),), "rain", seed=9, steps=12,
        guidance_scale=2.5, strength=0.75, schedule=(0.25, 0.5, 0.25), fast=True, width=96, height=64,
    )  # fmt: skip
    record = Record(scene, "stickworld-dit", {"interaction": "stickworld-dit-interaction"}, "cpu", "float32")
    record = replace(
        record, methods={"high_resolution": samplers()["high_resolution"].checked("stickworld-dit", {})}
    )
    values = FIELDS | filled(record, 96)
    request = request_of(with_layout(Document(), scene, 96), values)
    assert request.scene == scene
    assert (request.model, request.adapters, request.methods) == ("stickworld-dit", {}, record.methods)
    assert with_layout(Document(), scene, 96).aspect == 1.5


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("seed", 1.5, "settings"), ("seed", None, "settings"), ("steps", 0, "settings"),
        ("width", 97, "settings"), ("guidance_scale", 101, "settings"), ("decay", 0.5, "settings"),
        ("strength", 3, "canvas"), ("prompt", "\ud800", "prompt"),
    ],
)  # fmt: skip
def test_an_error_is_shown_beside_its_field(field: str, value: Any, place: str) -> None:
    with pytest.raises(SceneError) as refused:
        request_of(Document(), FIELDS | {field: value})
    assert error_place(refused.value) == place


def test_models_and_things_have_places_too() -> None:
    assert error_place(ModelError("expected a model that this server has, got 'x'")) == "model"
    assert error_place(SceneError("expected an adapter for 1 interactions, got none for x")) == "model"
    assert (
        error_place(SceneError("interaction 1: expected a name for both boxes, got one without")) == "canvas"
    )
    assert error_place(SceneError("high_resolution, strength: expected a number, got 2")) == "settings"


# --- what is shown ---


@pytest.mark.parametrize("model", ["stickworld-dit", "stickworld"])
def test_the_detector_finds_what_was_drawn(model: str) -> None:
    pipeline = ScenePipeline.from_pretrained(model, device="cpu")
    image = pipeline.generate(replace(EXAMPLES["balancing"], steps=12))
    assert detections_in(image).triplets[0].action == "balancing"
    over, reports = detections_over(image)
    assert over.size == (512, 512)
    assert reports.startswith("purple person 0.")
    assert "balancing" in reports
    empty = Image.new("RGB", (96, 96))
    assert detections_over(empty)[1] == "nothing above the least score"


def test_the_detector_reads_what_persons_look_like() -> None:
    scene = sample_scene(HELD_OUT + 3, n_interactions=1, n_entities=0)
    one = detections_in(Image.fromarray(render(scene).image)).triplets[0]
    assert one.action == scene.triplets[0].action
    assert one.person.attributes["hair"] == scene.triplets[0].subject_appearance.hair


def test_a_heat_map_is_hot_where_the_attention_is() -> None:
    weights = torch.zeros(2, 3, 1, 8, 8)
    weights[1, 0, 0, 2, 5] = 0.4
    over = np.asarray(
        attention_over(Image.new("RGB", (96, 96)), AttentionMaps(weights, (0, 1)), "subject", 0)
    )
    light = over.astype(int).sum(-1)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 60, column // 60) == (2, 5)
    cold = np.asarray(
        attention_over(Image.new("RGB", (96, 96)), AttentionMaps(weights, (0, 1)), "subject", 0, step=0)
    )
    assert (cold == cold[0, 0]).all()


def test_what_can_be_looked_for_is_what_was_asked() -> None:
    scene = replace(DEMO, entities=(Entity("ball", (0.1, 0.1, 0.2, 0.2)),))
    assert recorded_tokens(scene) == [
        ("subject: person in blue", "subject 0"),
        ("action: riding", "action 0"),
        ("object: red bike", "object 0"),
        ("entity: ball", "subject 1"),
    ]


# --- code that draws the same picture ---

BOXES = (0.3, 0.1, 0.7, 0.7), (0.2, 0.5, 0.8, 0.9)
AWKWARD = Scene(
    "-a 'person'\n$HOME", (Interaction("person in blue", None, "red bike", *BOXES, 0.5, "union"),),
    (Entity("ball", (0.1, 0.1, 1 / 3, 0.2)),), "-x", 7, 2, 3.5, 0.9, (0.5, 0.5, 0.0), True, 96, 64,
)  # fmt: skip
BARRED = Scene(
    "a", (Interaction("a|b", "riding", "red bike", (0.3, 0.1, 0.7, 0.7), (0.2, 0.5, 0.8, 0.9)),), steps=1
)
ENLARGED = {"high_resolution": {"scale": 2, "strength": 0.5, "steps": 4, "shift": 1.0, "window": 0}}


def given(worker: Worker, scene: Scene) -> StoredImage:
    """A picture of the scene; the barred one is of another model, and enlarged."""
    used, model = ({}, "stickworld") if scene is not BARRED else (ENLARGED, "stickworld-dit")
    (one,) = drawn(worker, Request(scene, model=model, methods=used))[-1].images
    return one


@pytest.mark.parametrize("scene", [DEMO, AWKWARD, BARRED])
def test_python_code_repeats_the_picture(
    scene: Scene, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = given(worker, scene)
    code = as_python(one.record)
    assert {line.split()[1] for line in code.splitlines() if line.startswith("from")} == {"interactdiff"}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})
    assert Path("picture.png").read_bytes() == one.path.read_bytes()


@pytest.mark.parametrize("scene", [DEMO, AWKWARD, BARRED])
def test_the_command_repeats_the_picture(
    scene: Scene, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = given(worker, scene)
    command = as_command(one.record)
    monkeypatch.chdir(tmp_path)
    if scene is BARRED:  # the shell writes its scene to a file
        command = command.replace("interactdiff generate", f"{sys.executable} -m interactdiff generate")
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    else:
        name, *words = shlex.split(command)
        assert name == "interactdiff"
        assert main(words) == 0
    assert Path("picture.png").read_bytes() == one.path.read_bytes()
