"""The studio without a browser: orders, drawing, limits, views, and code that draws a picture again."""

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
from interactdiff.app.artist import Artist, Facts, Order, Progress
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import OWN, filled, laid_out, order_of, place_of
from interactdiff.app.limits import MAX_UPLOAD_PIXELS, Limits, opened_picture
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.views import found_in, found_over, looked_over, tokens
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.maps import AttentionMaps
from interactdiff.methods import Work, methods
from interactdiff.models import ModelError
from interactdiff.picture import Record, read_record

SIZE = "width: expected at most 40000 pixels in all on this server"
TWICE, FOUR_TIMES = ({"high_resolution": {"scale": scale}} for scale in (2, 4))
DEMO = replace(EXAMPLES["riding"], steps=3)
FIELDS: dict[str, Any] = {
    "prompt": "a person", "negative_prompt": "", "seed": 3, "steps": 4, "guidance_scale": None,
    "strength": 1.0, "on": 1.0, "decay": 0.0, "fast": False, "width": 96, "height": 96, "images": 1,
    "compare": False, "look": True, "model": "stickworld", "adapter": OWN, "high_resolution.used": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def artist() -> Any:
    made = Artist(Limits(steps=40, pixels=200 * 200, images=3), device="cpu")
    yield made
    made.close()


def drawn(artist: Artist, order: Order) -> list[Progress]:
    return list(artist.draw(order, threading.Event()))


# --- drawing ---


def test_an_order_is_drawn_step_by_step(artist: Artist) -> None:
    told = drawn(artist, Order(DEMO, images=2, compare=True, look=True))
    shares = [one.share for one in told]
    assert shares == sorted(shares)
    assert [one.words for one in told if "of 3" in one.words][:3] == [
        f"Picture 1 of 4, step {n} of 3" for n in (1, 2, 3)
    ]
    assert any(one.picture is not None for one in told)
    assert any(one.left is not None and one.left > 0 for one in told)
    done = told[-1].done
    assert [(one.record.scene.seed, one.record.scene.strength, one.controlled) for one in done] == [
        (7, 1.0, True), (7, 0.0, False), (8, 1.0, True), (8, 0.0, False)
    ]  # fmt: skip
    assert [one.maps is not None for one in done] == [True, False, True, False]
    alone = ScenePipeline.from_pretrained(device="cpu")
    for one in done:
        assert read_record(one.path) == one.record
        assert Image.open(one.path).tobytes() == alone.generate(one.record.scene).tobytes()


def test_without_control_is_what_the_base_draws(artist: Artist) -> None:
    _, without = drawn(artist, Order(DEMO, compare=True))[-1].done
    assert (
        Image.open(without.path).tobytes()
        == ScenePipeline.from_pretrained(device="cpu").generate(replace(DEMO, interactions=())).tobytes()
    )


def test_stopping_ends_within_a_step_and_keeps_what_is_done(artist: Artist) -> None:
    stop, told = threading.Event(), []
    for one in artist.draw(Order(replace(DEMO, steps=20), images=3), stop):
        told.append(one)
        if one.words.startswith("Picture 2 of 3, step 2 "):
            stop.set()
    assert told[-1].words == "Stopped after 1 of 3 pictures"
    assert len(told[-1].done) == 1
    assert not any("step 4" in one.words and "Picture 2" in one.words for one in told)
    assert len(drawn(artist, Order(DEMO))[-1].done) == 1  # the next one is served


def test_a_page_that_goes_away_frees_the_models(artist: Artist) -> None:
    drawing = artist.draw(Order(replace(DEMO, steps=40), images=3), threading.Event())
    next(told for told in drawing if "step" in told.words)
    drawing.close()
    assert len(drawn(artist, Order(DEMO))[-1].done) == 1


def test_two_pages_do_not_mix(artist: Artist) -> None:
    """Two threads at once: each gets its own scene and seeds."""
    orders = [
        Order(replace(EXAMPLES[name], steps=3, seed=seed)) for name, seed in (("riding", 1), ("balancing", 2))
    ]
    alone = [Image.open(drawn(artist, order)[-1].done[0].path).tobytes() for order in orders]
    got: dict[int, bytes] = {}

    def draw(n: int) -> None:
        got[n] = Image.open(drawn(artist, orders[n])[-1].done[0].path).tobytes()

    threads = [threading.Thread(target=draw, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == alone


def test_a_model_is_loaded_once_and_one_at_a_time(artist: Artist, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ScenePipeline.from_pretrained

    def counted(model: str, *args: Any) -> ScenePipeline:
        loaded.append(model)
        return load(model, *args)

    monkeypatch.setattr(ScenePipeline, "from_pretrained", counted)
    artist.describe("stickworld", None)
    loaded.clear()
    drawn(artist, Order(DEMO))
    drawn(artist, Order(DEMO, images=2))
    assert loaded == []
    assert artist.describe("stickworld-dit", None) == Facts(96, {"high_resolution": None}, "cpu", "float32")
    assert "expected a Flux" in str(artist.describe("stickworld", None).unfit["high_resolution"])
    assert loaded == ["stickworld-dit", "stickworld"]


def test_a_method_draws_through_the_artist(artist: Artist) -> None:
    asked = {"high_resolution": {"scale": 2, "steps": 4, "strength": 0.5}}
    order = Order(replace(DEMO, steps=2), model="stickworld-dit", methods=asked, look=True)
    told = drawn(artist, order)
    (one,) = told[-1].done
    assert Image.open(one.path).size == (192, 192)
    assert [t.words for t in told if t.words.startswith("step")] == [f"step {n} of 4" for n in (1, 2, 3, 4)]
    assert one.record.methods["high_resolution"]["shift"] == 1.0  # what suits the model
    assert one.maps is not None
    drawer = ScenePipeline.from_pretrained("stickworld-dit", device="cpu")
    again = methods()["high_resolution"]
    values = one.record.methods["high_resolution"]
    assert (
        again.draw(drawer, values, drawer.generate, order.scene, None).tobytes() == Image.open(one.path).tobytes()
    )


# --- limits ---


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Order(replace(DEMO, steps=41)), "steps: expected at most 40 on this server, got 41"),
        (Order(replace(DEMO, width=208, height=208)), SIZE),
        (Order(DEMO, images=4), "images: expected 1 to 3 on this server, got 4"),
        (Order(DEMO, model="stickworld-dit", methods=FOUR_TIMES), SIZE),
        (Order(DEMO, methods=TWICE), "high_resolution: expected a Flux or Stable Diffusion 3 pipeline"),
        (Order(DEMO, methods={"magic": {}}), "method: expected one of clear, high_resolution, got 'magic'"),
        (Order(replace(DEMO, prompt="a" * 2001)), "prompt: expected at most 2000 letters, got 2001"),
        (Order(DEMO, methods={"high_resolution": 2}), "high_resolution: expected "),
        (Order(DEMO, model="x" * 5000), "expected a model that this server has, got 'xxx"),
        (Order(DEMO, model="a\0b"), "expected a model that this server has, got 'a"),
        (Order(DEMO, model="/etc"), "expected a model that this server has, got '/etc'"),
        (Order(DEMO, model="owner/name"), "expected a model that this server has, got 'owner/name'"),
        (Order(DEMO, adapter="../x"), "expected an adapter that this server has, got '../x'"),
        (Order(replace(DEMO, prompt="a " * 90)), "prompt: expected at most"),
    ],
)  # fmt: skip
def test_too_much_is_refused_in_words(artist: Artist, order: Any, message: str) -> None:
    with pytest.raises((SceneError, ModelError)) as refused:
        drawn(artist, order)
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
    Limits(steps=10, pixels=100).check_work(Work(100, 10), 1)
    with pytest.raises(SceneError, match="steps: expected at most 10 on this server, got 11"):
        Limits(steps=10, pixels=100).check_work(Work(100, 11), 1)


def test_uploads_are_whole_pictures_of_a_known_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGBA", (20, 10), "red")
    image.save(tmp_path / "a.png")
    assert (opened_picture(tmp_path / "a.png").mode, opened_picture(tmp_path / "a.png").size) == (
        "RGB",
        (20, 10),
    )
    image.save(tmp_path / "a.gif")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "c.png").write_text("<script>")
    for name in ("a.gif", "b.png", "c.png", "none.png"):
        with pytest.raises(SceneError, match="picture: expected a whole PNG, JPEG, WEBP, got something else"):
            opened_picture(tmp_path / name)
    monkeypatch.setattr("interactdiff.app.limits.MAX_UPLOAD_PIXELS", 199)
    with pytest.raises(SceneError, match="picture: expected at most 199 pixels, got 20 x 10"):
        opened_picture(tmp_path / "a.png")
    assert MAX_UPLOAD_PIXELS == 40_000_000


# --- the form ---


def test_a_filled_form_is_an_order_and_an_order_fills_the_form() -> None:
    scene = Scene(
        "a person", DEMO.interactions, (Entity("ball", (0.1, 0.1, 0.2, 0.2), 0.5),), "rain", seed=9, steps=12,
        guidance_scale=2.5, strength=0.75, schedule=(0.25, 0.5, 0.25), fast=True, width=96, height=64,
    )  # fmt: skip
    record = Record(scene, "stickworld-dit", "stickworld-dit-interaction", "cpu", "float32")
    record = replace(
        record, methods={"high_resolution": methods()["high_resolution"].checked("stickworld-dit", {})}
    )
    values = FIELDS | filled(record, 96)
    order = order_of(laid_out(Document(), scene, 96), values)
    assert order.scene == scene
    assert (order.model, order.adapter, order.methods) == ("stickworld-dit", None, record.methods)
    assert laid_out(Document(), scene, 96).aspect == 1.5


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
        order_of(Document(), FIELDS | {field: value})
    assert place_of(refused.value) == place


def test_models_and_things_have_places_too() -> None:
    assert place_of(ModelError("expected a model that this server has, got 'x'")) == "model"
    assert place_of(SceneError("expected an adapter for 1 interactions, got none for x")) == "model"
    assert place_of(SceneError("interaction 1: expected a name for both boxes, got one without")) == "canvas"
    assert place_of(SceneError("high_resolution, strength: expected a number, got 2")) == "settings"


# --- what is shown ---


def test_the_detector_finds_what_was_drawn() -> None:
    drawer = ScenePipeline.from_pretrained("stickworld-dit", device="cpu")
    image = drawer.generate(replace(EXAMPLES["balancing"], steps=12))
    assert found_in(image).triplets[0].action == "balancing"
    over, told = found_over(image)
    assert over.size == (480, 480)
    assert told.startswith("purple person 0.")
    assert "balancing" in told
    assert found_over(Image.new("RGB", (96, 96)))[1] == "nothing that is sure enough"


def test_a_heat_map_is_hot_where_the_attention_is() -> None:
    weights = torch.zeros(2, 3, 1, 8, 8)
    weights[1, 0, 0, 2, 5] = 0.4
    over = np.asarray(looked_over(Image.new("RGB", (96, 96)), AttentionMaps(weights, (0, 1)), "subject", 0))
    light = over.astype(int).sum(-1)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 60, column // 60) == (2, 5)
    cold = np.asarray(
        looked_over(Image.new("RGB", (96, 96)), AttentionMaps(weights, (0, 1)), "subject", 0, step=0)
    )
    assert (cold == cold[0, 0]).all()


def test_what_can_be_looked_for_is_what_was_asked() -> None:
    scene = replace(DEMO, entities=(Entity("ball", (0.1, 0.1, 0.2, 0.2)),))
    assert tokens(scene) == [
        ("subject: person in blue", "subject 0"),
        ("action: riding", "action 0"),
        ("object: red bike", "object 0"),
        ("thing: ball", "subject 1"),
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


@pytest.mark.parametrize("scene", [DEMO, AWKWARD, BARRED])
def test_code_draws_the_same_picture(scene: Scene, tmp_path: Path, artist: Artist) -> None:
    asked, model = ({}, "stickworld") if scene is not BARRED else (ENLARGED, "stickworld-dit")
    (one,) = drawn(artist, Order(scene, model=model, methods=asked))[-1].done
    expected = one.path.read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    subprocess.run(
        [sys.executable, "-c", as_python(one.record)], cwd=tmp_path / "a", check=True, capture_output=True
    )
    assert (tmp_path / "a/picture.png").read_bytes() == expected
    command = as_command(one.record).replace(
        "interactdiff generate", f"{sys.executable} -m interactdiff generate"
    )
    subprocess.run(["bash", "-c", command], cwd=tmp_path / "b", check=True, capture_output=True)
    assert (tmp_path / "b/picture.png").read_bytes() == expected
