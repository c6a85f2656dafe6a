"""Methods are found in their folders: a new one is in every front end without a line changed elsewhere."""

import importlib
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from interactdiff import Entity, InteractdiffError, Interaction, Scene, SceneError, generate
from interactdiff.adapter_loading import UNNAMED
from interactdiff.app.canvas_items import CanvasBox
from interactdiff.app.document import Document
from interactdiff.app.form import error_place, filled, request_of, with_layout
from interactdiff.app.limits import Limits
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.studio import Studio
from interactdiff.app.worker import Worker
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import MethodError
from interactdiff.picture import overlay, read_record
from interactdiff.registry import methods, recipes, samplers, used_methods
from interactdiff.scene_schema import json_schema
from interactdiff.training.run import load_config, make_recipe

RIDE = Interaction("person in blue", "riding", "red bike", (0.32, 0.06, 0.68, 0.68), (0.23, 0.58, 0.77, 0.95))
BADGE = "new|0.0,0.0,0.5,0.5|strength=0.5"


def test_what_the_package_has() -> None:
    assert list(methods()) == ["clear", "concept", "interaction", "subject"]
    assert list(samplers()) == ["high_resolution"]
    assert recipes().keys() == {
        "adapter",
        "interaction",
        "distill",
        "distill_pictures",
        "subject",
        "subject_tuning",
    }


# --- a new folder ---


def test_its_items_are_flags_and_its_scores_too(badge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert '--badge LABEL|BOX a badge: "new|0.1,0.1,0.3,0.2"' in said
    assert "a method or a sampler (clear, concept, subject, badge, high_resolution, inverted)" in said
    assert "--badge scores of Badges" in said


def test_its_recipes_and_benches_are_found(
    badge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "badge: Badges\n" in report
    assert "inverted: Inverted, a sampler\n" in report
    assert main(["bench", "badge"]) == 0
    assert capsys.readouterr().out == "nothing\n"
    (tmp_path / "badge.yaml").write_text("recipe: badge\nsteps: 3\n")
    recipe = make_recipe(load_config(tmp_path / "badge.yaml", ["steps=4"]))
    assert type(recipe).__name__ == "BadgeRecipe"
    assert recipe.config.model_dump() == {"recipe": "badge", "steps": 4}


def test_its_items_stand_in_scene_files(badge: Any, tmp_path: Path) -> None:
    one = badge.parse(BADGE)
    scene = Scene("a", (RIDE,), extra_items=(one,))
    assert scene.items == (RIDE, one)
    written = scene.to_dict()
    assert written["badges"] == [{"label": "new", "box": [0.0, 0.0, 0.5, 0.5], "strength": 0.5}]
    assert "extra_items" not in written
    assert Scene.from_json(scene.to_json()) == scene
    assert json_schema()["properties"]["badges"] == {"type": "array", "items": {"type": "object"}}
    with pytest.raises(SceneError, match="badge 1: box: expected four numbers"):
        Scene.from_dict(written | {"badges": [{"label": "new", "box": [0]}]})
    with pytest.raises(SceneError, match=r"expected only the keys .*badges, .*got 'badge'"):
        Scene.from_dict({"prompt": "a", "badge": []})


def test_it_draws_with_interactions_and_clear_and_is_in_the_record(
    badge: Any, badge_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["generate", "a person", "--model", "stickworld-dit", "--steps", "2", "--device", "cpu"]
    pictures = {}
    for name, flags in {
        "plain": [],
        "all": ["--badge", BADGE, "--adapter", f"badge={badge_weights}", "--method", "badge:gain=2"],
        "gained": ["--badge", BADGE, "--adapter", f"badge={badge_weights}", "--method", "badge:gain=4"],
        "made": ["--badge", BADGE],
    }.items():
        items = ["--interaction", RIDE.to_text(), "--method", "clear:min_tokens=0"]
        assert main([*common, *items, *flags, "--out", f"{name}.png"]) == 0
        pictures[name] = Image.open(f"{name}.png").tobytes()
    assert len(set(pictures.values())) == 4
    record = read_record("all.png")
    assert record.scene.extra_items == (badge.parse(BADGE),)
    packaged = {"interaction": "stickworld-dit-interaction", "clear": "stickworld-dit-clear"}
    assert record.adapters == {**packaged, "badge": str(badge_weights)}
    assert record.methods == {"badge": {"gain": 2.0}, "clear": {"min_tokens": 0}}
    assert read_record("made.png").adapters["badge"] is None
    assert read_record("made.png").methods["badge"] == {"gain": 1.0}
    for name in ("all", "made"):
        assert main(["generate", "--from", f"{name}.png", "--out", "again.png", "--overlay"]) == 0
        assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()
    boxes = overlay(Image.open("all.png"), (RIDE,))
    assert ImageChops.difference(Image.open("again.overlay.png"), boxes).getbbox() is not None


def test_attached_and_not_asked_for_it_changes_no_bit(badge: Any, badge_weights: Path) -> None:
    scene = Scene("a person", (RIDE,), steps=2)
    plain = generate(scene, device="cpu")
    attached = generate(scene, adapters={"badge": str(badge_weights)}, device="cpu")
    assert attached.image.tobytes() == plain.image.tobytes()
    assert attached.record.adapters["badge"] == str(badge_weights)
    adapter = importlib.import_module("interactdiff.badge.adapter").BadgeAdapter
    given = generate(
        replace(scene, extra_items=(badge.parse(BADGE),)), adapters=[adapter(3.0).eval()], device="cpu"
    )
    assert given.image.tobytes() != plain.image.tobytes()
    assert given.record.adapters["badge"] == UNNAMED
    with pytest.raises(InteractdiffError, match=r"expected as adapter .*got 'an adapter given"):
        generate(scene, adapters=given.record.adapters, device="cpu")
    with pytest.raises(
        InteractdiffError, match="expected an adapter of clear, concept, interaction, subject, badge, got"
    ):
        generate(scene, adapters={"x": None})


def test_items_without_an_adapter_name_the_method(badge: Any, pipe: Any) -> None:
    scene = Scene("a", extra_items=(badge.parse(BADGE),))
    with pytest.raises(SceneError, match=r"expected an adapter for 1 badges \(badge\), got none for tiny"):
        ScenePipeline(pipe, None, "tiny").generate(scene)
    assert used_methods(scene, {"clear": {}}) == {"clear": {}, "badge": {}}


def test_its_scores_are_evaluated(
    badge: Any, badge_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    flags = ["--scenes", "2", "--steps", "2", "--device", "cpu", "--adapter", f"badge={badge_weights}"]
    assert main(["evaluate", "--badge", *flags, "--json", str(table)]) == 0
    lines = capsys.readouterr().out.split()
    values = json.loads(table.read_text())
    inside, outside = (values["scores"][name] for name in ("inside", "outside"))
    assert lines == ["inside", f"{inside:.3f}", "outside", f"{outside:.3f}"]
    assert inside > outside
    assert (values["method"], values["adapters"]["badge"]) == ("badge", str(badge_weights))
    assert main(["evaluate", "--badge", "--world"]) == 2


def test_it_has_a_panel_in_the_studio(
    badge: Any, badge_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Limits(folders=(tmp_path,)), device="cpu")
    studio = Studio(worker, "stickworld")
    assert list(studio.panels) == ["clear", "concept", "subject", "badge", "high_resolution", "inverted"]
    shown = [name for name, panel in studio.panels.items() if panel.visible]
    assert shown == ["clear", "subject", "badge", "inverted"]
    values = {name: getattr(field, "value", None) for name, field in studio.fields.items()}
    assert values["badge.gain"] == 1.0
    values |= {
        "badge.items.badges": BADGE + "\n\n",
        "badge.gain": 2.0,
        "badge.adapter": str(badge_weights),
        "steps": 2,
    }
    values |= {"record_attention": False}
    request = request_of(Document().with_scene(Scene("", (RIDE,))), values)
    assert request.scene.extra_items == (badge.parse(BADGE),)
    assert request.adapters == {"badge": str(badge_weights)}
    assert request.methods == {"badge": {"gain": 2.0}}
    *_, last = worker.generate(request, threading.Event())
    (one,) = last.images
    assert one.controlled
    restored = values | filled(one.record, 96)
    again = request_of(with_layout(Document(), one.record.scene, 96), restored)
    assert again.scene == one.record.scene
    assert (again.adapters, again.methods) == (request.adapters, request.methods)
    with pytest.raises(SceneError, match="badge 1: expected two parts") as refused:
        request_of(Document(), values | {"badge.items.badges": "new"})
    assert error_place(refused.value) == "settings"

    monkeypatch.chdir(tmp_path)
    exec(as_python(one.record), {})
    assert Path("picture.png").read_bytes() == one.path.read_bytes()
    Path("picture.png").unlink()
    assert main(shlex.split(as_command(one.record))[1:]) == 0
    assert Path("picture.png").read_bytes() == one.path.read_bytes()
    worker.close()


def test_its_items_are_drawn_on_the_canvas(badge: Any) -> None:
    worker = Worker(Limits(), device="cpu")
    studio = Studio(worker, "stickworld")
    assert list(studio.tools) == ["badge.items.badges"]
    canvas = Document().with_scene(Scene("", (RIDE,), (Entity("new", (0.0, 0.0, 0.25, 0.5)),)))
    field = studio.fields["badge.items.badges"]
    updates = studio._take_from_canvas("badge.items.badges", BADGE, canvas, "", "")
    assert updates[field].splitlines() == [BADGE, "new|0.0,0.0,0.25,0.5|strength=1.0"]
    assert [box.phrase for box in updates[studio.canvas].boxes] == ["person in blue", "red bike"]
    assert updates[studio.prompt] == "a person in blue riding a red bike"
    unnamed = Document((CanvasBox("t1", " ", (0.0, 0.0, 0.5, 0.5)),))
    updates = studio._take_from_canvas("badge.items.badges", "", unnamed, "", "")
    assert "label: expected a phrase" in updates[studio.errors["canvas"]]["value"]
    assert field not in updates
    worker.close()


def test_adapters_come_and_go_on_one_loaded_model(badge: Any, badge_weights: Path, tmp_path: Path) -> None:
    worker = Worker(Limits(folders=(tmp_path,)), device="cpu")
    plain = worker._pipeline("stickworld", {}, {})
    before = list(plain.denoiser.state_dict())
    with_badge = worker._pipeline("stickworld", {"badge": str(badge_weights)}, {"badge": {}})
    assert with_badge.pipeline is plain.pipeline
    assert set(with_badge.adapters) == {"interaction", "badge"}
    with pytest.raises(InteractdiffError, match="expected a badge adapter in"):
        worker._pipeline("stickworld", {"badge": str(tmp_path)}, {"badge": {}})
    again = worker._pipeline("stickworld", {}, {})
    assert again.pipeline is plain.pipeline
    assert set(again.adapters) == {"interaction"}
    assert list(again.denoiser.state_dict()) == before
    worker.close()


# --- what cannot be found ---


def installed(folder: Path, module: str, entry: str) -> None:
    """Another package with an entry point."""
    info = folder / "others-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[interactdiff.methods]\nother = {entry}\n")
    (folder / "others_spec.py").write_text(module)


SPEC = "from interactdiff.registry import *\nSPEC = MethodSpec('{}', 'Other', 'Another.', recipes={})\n"


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    methods.cache_clear()
    yield tmp_path / "site"
    methods.cache_clear()
    sys.modules.pop("others_spec", None)


def test_other_packages_have_entry_points(other: Path) -> None:
    installed(other, SPEC.format("other", "{}"), "others_spec:SPEC")
    assert list(methods()) == ["clear", "concept", "interaction", "subject", "other"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "import nothing_such",
            "expected a SPEC in others_spec:SPEC, got ModuleNotFoundError: No module named",
        ),
        ("SPEC = 3", "expected others_spec:SPEC to hold a MethodSpec, got 3"),
        (
            SPEC.format("clear", "{}"),
            "expected one method with the name clear, got it in interactdiff.clear.spec and",
        ),
        (SPEC.format("other", "{'adapter': ''}"), "expected one method with the recipe adapter, got it in"),
    ],
)
def test_a_method_that_is_broken_is_one_sentence(
    other: Path, module: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(other, module, "others_spec:SPEC")
    assert main(["generate", "a"]) == 2
    assert capsys.readouterr().err.startswith(f"interactdiff: {message}")
    with pytest.raises(MethodError):
        methods()


@pytest.mark.parametrize(("key", "name"), [("prompt", "Badge"), ("badges", "Seed")])
def test_an_item_cannot_take_what_a_scene_has(
    badge: Any, tmp_path: Path, key: str, name: str, capsys: Any
) -> None:
    file = tmp_path / "methods/badge/spec.py"
    text = (
        file.read_text()
        .replace('"badges"', f'"{key}"')
        .replace("(Badge,", f"(type('{name}', (Badge,), {{}}),")
    )
    assert text.count('Badge, "') == 1
    file.write_text(text.replace('Badge, "', f"type('{name}', (Badge,), {{}}), \""))
    for module in [one for one in sys.modules if one.startswith("interactdiff.badge")]:
        del sys.modules[module]
    methods.cache_clear()
    assert main(["generate", "a"]) == 2
    said = capsys.readouterr().err
    assert ("the scene's key prompt" in said) if key == "prompt" else ("got --seed" in said)
