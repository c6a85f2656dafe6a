"""The studio in a real browser: drawn with the mouse, by touch and by keyboard, as a user would."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, StudioPage, opened_browser, served_studio
from PIL import Image

from interactdiff.app.learning import parsed_concepts
from interactdiff.cli import main
from interactdiff.picture import read_record
from interactdiff.scene import Scene

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, which .ci/run installs")
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a studio where a picture may take long."""
    with served_studio("--max-queue", "8", "--max-steps", "1000") as (where, _):
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as chromium:
        yield chromium


@pytest.fixture
def studio(browser: Any, address: str) -> Iterator[StudioPage]:
    context = browser.new_context(**LAPTOP, accept_downloads=True)
    page = StudioPage(context.new_page(), address)
    yield page
    assert page.problems == []
    context.close()


def draw_riding(studio: StudioPage) -> None:
    studio.draw_box((0.3, 0.06), (0.68, 0.68), "person in blue")
    studio.draw_box((0.22, 0.56), (0.78, 0.95), "red bike")
    studio.link("person in blue", (0.5, 0.85), "riding")


def download(studio: StudioPage, path: Path) -> Path:
    with studio.page.expect_download() as saved:
        studio.page.locator("#gallery [aria-label='Download'], #gallery a[download] button").first.click()
    saved.value.save_as(path)
    return path


def test_drawn_generated_downloaded_and_dropped_back(
    studio: StudioPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_riding(studio)
    assert studio.tags() == ["person in blue", "red bike", "riding"]
    studio.expect("prompt", "a person in blue riding a red bike")
    studio.fill("seed", "4")  # not a random one, of which one in five is not detected to ride
    studio.generate()
    assert studio.page.locator("#preview").is_hidden()
    path = download(studio, tmp_path / "picture.png")
    record = read_record(path)
    (one,) = record.scene.interactions
    assert (one.subject, one.action, one.object) == ("person in blue", "riding", "red bike")
    assert one.subject_box == pytest.approx((0.3, 0.06, 0.68, 0.68), abs=0.01)
    assert str(record.scene.seed) == studio.value("seed") == "4"

    studio.page.locator("#view label", has_text="Detections").click()
    studio.page.locator("#note", has_text="riding 0.").wait_for()  # control worked
    studio.page.locator("#view label", has_text="Attention").click()
    studio.page.locator("#token").wait_for()

    studio.open_panel("codes")
    command = studio.page.locator("#command .cm-content").inner_text()
    assert command.startswith("interactdiff generate --model stickworld-dit")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--from", "picture.png", "--out", "again.png"]) == 0
    assert Image.open("again.png").tobytes() == Image.open("picture.png").tobytes()

    studio.page.reload()
    studio.wait_until_ready()
    assert studio.tags() == []
    drop(studio, path, "image/png")
    studio.tag("riding").wait_for()
    assert studio.tags() == ["person in blue", "red bike", "riding"]
    studio.expect("seed", str(record.scene.seed))
    studio.expect("prompt", record.scene.prompt)
    studio.page.locator("#lock input").check()
    studio.generate()
    assert download(studio, tmp_path / "dropped.png").read_bytes() == path.read_bytes()


def drop(studio: StudioPage, path: Path, kind: str, onto: str = "#title") -> None:
    """Let a file fall anywhere on the page, or onto a part of it."""
    data = studio.page.evaluate_handle(
        """([bytes, name, type]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return data;
        }""",
        [list(path.read_bytes()), path.name, kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        studio.page.dispatch_event(onto, event, {"dataTransfer": data})


def test_undo_redo_delete_and_nudge(studio: StudioPage) -> None:
    draw_riding(studio)
    keys = studio.page.keyboard
    studio.page.locator("#canvas .stage").focus()
    keys.press("Control+z")  # the action's name
    assert studio.tags() == ["action?", "person in blue", "red bike"]
    keys.press("Control+z")  # the link
    assert studio.tags() == ["person in blue", "red bike"]
    keys.press("Control+Shift+z")
    keys.press("Control+y")
    assert studio.tags() == ["person in blue", "red bike", "riding"]
    studio.expect("prompt", "a person in blue riding a red bike")

    studio.tag("person in blue").click()
    left = "() => parseFloat(document.querySelector('#canvas .box.selected').style.left)"
    before = studio.page.evaluate(left)
    keys.press("ArrowRight")
    keys.press("Shift+ArrowRight")
    assert studio.page.evaluate(left) == pytest.approx(before + 6, abs=0.02)
    keys.press("Escape")
    assert studio.page.locator("#canvas .box.selected").count() == 0
    studio.tag("red bike").click()
    keys.press("Delete")
    assert studio.tags() == ["person in blue"]  # its link goes with it
    studio.page.locator("#canvas [data-do=undo]").click()
    assert studio.tags() == ["person in blue", "red bike", "riding"]


def test_boxes_are_moved_resized_and_linked_by_shift(studio: StudioPage) -> None:
    studio.draw_box((0.1, 0.1), (0.4, 0.4), "dog")
    studio.draw_box((0.5, 0.5), (0.9, 0.9), "cat")
    studio.page.mouse.click(*studio.at(0.25, 0.25))
    studio.drag((0.25, 0.25), (0.35, 0.3))  # by its inside, once it is selected
    studio.drag((0.5, 0.45), (0.6, 0.5))  # by its corner
    box = studio.page.evaluate(
        "() => ['left', 'top', 'width', 'height'].map((k) => "
        "parseFloat(document.querySelector('#canvas .box.selected').style[k]))"
    )
    assert box == pytest.approx([20, 15, 40, 35], abs=1)
    studio.page.keyboard.down("Shift")
    studio.page.mouse.click(*studio.at(0.7, 0.8))
    studio.page.keyboard.up("Shift")
    studio.page.keyboard.type("chasing")
    studio.page.keyboard.press("Enter")
    assert studio.tags() == ["cat", "chasing", "dog"]
    assert studio.page.locator("#canvas .region").count() == 1
    names = studio.page.locator("#canvas datalist[id$=-actions] option").evaluate_all(
        "(all) => all.map((one) => one.value)"
    )
    assert "riding" in names


def test_canvas_text_and_table_stay_in_step(studio: StudioPage) -> None:
    studio.draw_box((0.1, 0.1), (0.4, 0.7), "person")
    studio.open_panel("forms")
    studio.expect("text", "person")
    studio.fill("text", "person=riding=bike\nball").blur()
    studio.tag("riding").wait_for()
    assert studio.tags() == ["ball", "bike", "person", "riding"]
    studio.expect("prompt", "a person riding a bike and a ball")
    cell = studio.page.locator("#table [role=gridcell]", has_text="riding").first
    cell.dblclick()
    editor = studio.page.locator("#table [role=gridcell] :is(input, textarea)").first
    editor.fill("pushing")
    editor.press("Enter")
    studio.tag("pushing").wait_for()
    studio.expect("text", "person=pushing=bike\nball")

    studio.fill("text", "person=riding").blur()
    refusal = studio.page.locator("#error-text")
    refusal.wait_for()
    assert "line 1: expected subject=action=object" in refusal.inner_text()
    assert studio.tags() == ["ball", "bike", "person", "pushing"]

    studio.page.locator("#prompt textarea").fill("my own words")
    studio.page.locator("#canvas .stage").focus()
    studio.tag("ball").click()
    studio.page.keyboard.press("Delete")
    studio.expect("text", "person=pushing=bike")
    assert studio.value("prompt") == "my own words"


def test_errors_stand_beside_what_caused_them(studio: StudioPage) -> None:
    studio.drag((0.1, 0.1), (0.4, 0.7))
    studio.page.locator("#generate").click()
    studio.page.locator("#error-canvas", has_text="expected a name for every box").wait_for()
    studio.page.locator("#canvas [data-do=clear]").click()
    studio.open_panel("settings")
    studio.fill("model", "/etc").press("Enter")
    studio.page.locator("#error-model", has_text="expected a model that this server has").wait_for()
    assert studio.page.locator("#generate").is_enabled()


def generate_for_long(studio: StudioPage) -> None:
    """Generate so much that it is not done before it is stopped, however busy the machine is."""
    studio.fill("steps", "1000")
    studio.fill("images", "4")
    studio.page.locator("#generate").click()


def test_stopping_and_drawing_on(studio: StudioPage) -> None:
    studio.page.get_by_role("button", name="riding").click()
    studio.tag("riding").wait_for()
    studio.open_panel("settings")
    generate_for_long(studio)
    studio.page.locator("#status", has_text="step ").wait_for()
    studio.page.locator("#preview img").wait_for()
    studio.page.locator("#stop").click()
    studio.page.locator("#status", has_text="Stopped").wait_for()
    studio.fill("steps", "4")
    studio.fill("images", "1")
    studio.page.locator("#compare input").check()
    studio.generate()
    assert studio.page.locator("#gallery", has_text="without control").count() == 1
    studio.page.locator("#gallery button img").first.click()
    studio.page.locator("#background").click()
    studio.page.locator("#canvas .picture:visible").wait_for()
    # it is shown before it is loaded
    studio.page.wait_for_function("() => document.querySelector('#canvas .picture').naturalWidth === 128")


def test_a_full_queue_is_refused_in_words(browser: Any) -> None:
    """Two pages beside one that draws, where one may wait."""
    with served_studio("--max-queue", "1", "--max-steps", "1000", "--port", "7899") as (where, _):
        context = browser.new_context(**LAPTOP)
        pages = [StudioPage(context.new_page(), where) for _ in range(3)]
        for page in pages:
            page.open_panel("settings")
            generate_for_long(page)  # the first still draws when the last asks
            page.page.locator("#status", has_text="step " if page is pages[0] else "a").wait_for()
        pages[2].page.locator("#status", has_text="Too many are waiting").wait_for()
        assert pages[2].page.locator("#generate").is_enabled()
        pages[1].page.locator("#stop").click()
        pages[0].page.locator("#stop").click()
        for page in pages[:2]:
            page.page.locator("#status", has_text="Stopped: ").wait_for()
        context.close()


def test_a_scene_file_and_another_picture_can_be_dropped(studio: StudioPage, tmp_path: Path) -> None:
    scene = Scene.from_dict(
        {"prompt": "a wide one", "width": 128, "height": 64, "seed": 11,
         "entities": [{"phrase": "ball", "box": [0.1, 0.1, 0.3, 0.6]}]}
    )  # fmt: skip
    (tmp_path / "scene.json").write_text(scene.to_json())
    drop(studio, tmp_path / "scene.json", "application/json")
    studio.tag("ball").wait_for()
    studio.expect("seed", "11")
    frame = studio.page.locator("#canvas .stage").bounding_box()
    assert frame is not None
    assert frame["width"] / frame["height"] == pytest.approx(2, abs=0.05)
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "photo.jpg")
    drop(studio, tmp_path / "photo.jpg", "image/jpeg")
    studio.page.locator("#canvas .picture:visible").wait_for()
    (tmp_path / "bad.json").write_text(json.dumps({"promt": "x"}))
    drop(studio, tmp_path / "bad.json", "application/json")
    studio.page.locator("#error-open", has_text="expected only the keys").wait_for()
    assert studio.tags() == ["ball"]


def test_panels_of_methods_come_and_go_with_the_model(studio: StudioPage) -> None:
    studio.page.locator("#high_resolution").wait_for()
    studio.open_panel("settings")
    studio.page.locator("#model input").click()
    studio.page.get_by_role("option", name="stickworld", exact=True).click()
    studio.page.locator("#high_resolution").wait_for(state="hidden")


def test_a_phone_by_touch_in_the_dark(browser: Any, address: str) -> None:
    context = browser.new_context(**PHONE, color_scheme="dark")
    studio = StudioPage(context.new_page(), address)
    page = studio.page
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="riding").tap()
    studio.tag("riding").wait_for()
    page.locator("#canvas [data-do=remove]").wait_for()
    page.touchscreen.tap(*studio.at(0.5, 0.9))
    page.locator("#canvas .box.selected .tag", has_text="red bike").wait_for()
    page.locator("#canvas .linker").tap()
    page.touchscreen.tap(*studio.at(0.5, 0.2))
    assert page.locator("#canvas .tag.verb").count() == 2  # the bike now does something to the person
    page.locator("#canvas [data-do=undo]").tap()
    studio.generate()
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background[4:-1].split(",")[:3]) < 60
    assert studio.problems == []
    context.close()


def test_a_subject_from_a_picture_is_placed_and_comes_back(studio: StudioPage, tmp_path: Path) -> None:
    page = studio.page
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("green", (16, 0, 48, 64))
    picture.save(tmp_path / "green.png")
    studio.draw_box((0.1, 0.1), (0.4, 0.9), "person")
    studio.open_panel("subject")
    page.locator("#subject-picture [aria-dropeffect]").wait_for()
    drop(studio, tmp_path / "green.png", "image/png", "#subject-picture [aria-dropeffect]")
    page.locator("#subject-note", has_text="50 % of the picture is taken, by its white background").wait_for()
    page.locator("#subject-preview img").wait_for()
    assert page.locator("#canvas .picture").is_hidden()  # it fell on its field alone
    page.locator("#subject-place input").click()
    page.get_by_role("option", name="person").click()
    page.locator("#subject-add").click()
    page.locator("#error-subject", has_text="phrase: expected").wait_for()
    studio.fill("subject-phrase", "person").press("Enter")
    page.locator("#subject-add").click()
    page.locator("#subject-list", has_text="person, in the box person").wait_for()
    studio.tag("person").click()
    studio.drag((0.25, 0.5), (0.45, 0.5))  # the subject follows its box
    studio.open_panel("settings")
    studio.fill("steps", "2")
    studio.generate()
    path = download(studio, tmp_path / "picture.png")
    scene = read_record(path).scene
    (subject,) = scene.extra_items
    assert subject.phrase == "person"
    assert subject.image.image.tobytes() == picture.tobytes()
    assert subject.box == scene.entities[0].box == pytest.approx((0.3, 0.1, 0.6, 0.9), abs=0.01)
    page.locator("#subject-list button img").click()
    page.locator("#subject-remove:enabled").click()
    page.locator("#subject-list").wait_for(state="hidden")
    drop(studio, path, "image/png")
    page.locator("#subject-list", has_text="person, in the box person").wait_for()


def test_concepts_are_learned_from_a_photo_and_used(studio: StudioPage, tmp_path: Path) -> None:
    page = studio.page
    picture = Image.new("RGB", (96, 96), "skyblue")
    picture.paste("red", (20, 40, 60, 90))
    picture.save(tmp_path / "photo.png")
    studio.open_panel("learn")
    page.locator("#learn-start").click()
    page.locator("#error-learn-photo", has_text="photo: expected a picture, got none").wait_for()
    page.locator("#learn-photo input[type=file]").set_input_files(tmp_path / "photo.png")
    page.locator("#learn-photo img").wait_for()
    page.locator("#learn-draw").click()
    page.locator("#canvas .picture:visible").wait_for()
    there = "() => Math.abs(document.querySelector('#canvas').getBoundingClientRect().top) < 2"
    page.wait_for_function(there)  # the page scrolls to where boxes are drawn
    studio.draw_box((0.2, 0.4), (0.65, 0.95), "ball")
    page.locator("#learn-take").click()
    page.wait_for_function("() => document.querySelector('#learn-names textarea').value")
    (concept,), boxes = parsed_concepts(studio.value("learn-names"))
    assert (concept.token, concept.word) == ("<ball>", "ball")
    assert boxes["<ball>"] == pytest.approx((0.2, 0.4, 0.65, 0.95), abs=0.01)
    assert studio.tags() == []
    page.locator("#learn-find:enabled").click()
    page.locator("#learn-masks img").wait_for()
    page.locator("#learn-start:enabled").click()
    page.locator("#learn-status", has_text="Step ").wait_for()
    page.locator("#learn-stop:enabled").click()
    page.locator("#learn-status", has_text="what is learned so far is kept").wait_for()
    page.locator("#learn-download").wait_for()
    page.locator("#concept").wait_for()  # its panel offers what was learned
    studio.open_panel("settings")
    studio.fill("steps", "2")
    page.locator("#prompt textarea").fill("a <ball> on the beach")
    studio.generate()
    record = read_record(download(studio, tmp_path / "picture.png"))
    assert str(record.adapters["concept"]).startswith("concept-ball-")
