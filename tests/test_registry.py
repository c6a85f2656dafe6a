"""Methods are found in their folders: a new one is in every front end without a line changed elsewhere."""

import importlib
import json
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

import interactdiff
from interactdiff import InteractdiffError, Interaction, Scene, SceneError, generate
from interactdiff.app.document import Document
from interactdiff.app.form import error_place, filled, request_of, with_layout
from interactdiff.app.limits import Limits
from interactdiff.app.snippets import as_command, as_python
from interactdiff.app.studio import Studio
from interactdiff.app.worker import Worker
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.picture import overlay, read_record
from interactdiff.registry import MethodError, Setting, methods, recipes, samplers, used_methods
from interactdiff.scene_schema import json_schema
from interactdiff.training.run import load_config, make_recipe

RIDE = Interaction("person in blue", "riding", "red bike", (0.32, 0.06, 0.68, 0.68), (0.23, 0.58, 0.77, 0.95))
BADGE = "new|0.0,0.0,0.5,0.5|strength=0.5"


@pytest.fixture
def badge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One more folder of the package, with a method in it; the class of its items."""
    shutil.copytree(Path(__file__).parent / "toy/badge", tmp_path / "methods/badge")
    monkeypatch.setattr(interactdiff, "__path__", [*interactdiff.__path__, str(tmp_path / "methods")])
    methods.cache_clear()
    yield importlib.import_module("interactdiff.badge.items").Badge
    methods.cache_clear()
    for name in [name for name in sys.modules if name.startswith("interactdiff.badge")]:
        del sys.modules[name]
    vars(interactdiff).pop("badge", None)


@pytest.fixture
def weights(badge: Any, tmp_path: Path) -> Path:
    """A saved adapter of badges that acts strongly."""
    importlib.import_module("interactdiff.badge.adapter").BadgeAdapter(3.0).save_pretrained(
        tmp_path / "weights"
    )
    return tmp_path / "weights"


def test_what_the_package_has() -> None:
    assert list(methods()) == ["clear", "interaction"]
    assert list(samplers()) == ["high_resolution"]
    assert recipes().keys() == {"adapter", "distill"}


# --- a new folder ---


def test_its_items_are_flags_and_its_scores_too(badge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert '--badge LABEL|BOX a badge: "new|0.1,0.1,0.3,0.2"' in said
    assert "a method or a sampler (clear, badge, high_resolution, inverted)" in said
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
    assert recipe.config == {"recipe": "badge", "steps": 4}


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
    badge: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["generate", "a person", "--model", "stickworld-dit", "--steps", "2", "--device", "cpu"]
    pictures = {}
    for name, flags in {
        "plain": [],
        "all": ["--badge", BADGE, "--adapter", f"badge={weights}", "--method", "badge:gain=2"],
        "gained": ["--badge", BADGE, "--adapter", f"badge={weights}", "--method", "badge:gain=4"],
        "made": ["--badge", BADGE],
    }.items():
        items = ["--interaction", RIDE.to_text(), "--method", "clear:min_tokens=0"]
        assert main([*common, *items, *flags, "--out", f"{name}.png"]) == 0
        pictures[name] = Image.open(f"{name}.png").tobytes()
    assert len(set(pictures.values())) == 4
    record = read_record("all.png")
    assert record.scene.extra_items == (badge.parse(BADGE),)
    assert record.adapters == {
        "interaction": "stickworld-dit-interaction", "clear": "stickworld-dit-clear", "badge": str(weights)
    }  # fmt: skip
    assert record.methods == {"badge": {"gain": 2.0}, "clear": {"min_tokens": 0}}
    assert read_record("made.png").adapters["badge"] is None
    assert read_record("made.png").methods["badge"] == {"gain": 1.0}
    for name in ("all", "made"):
        assert main(["generate", "--from", f"{name}.png", "--out", "again.png", "--overlay"]) == 0
        assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()
    boxes = overlay(Image.open("all.png"), (RIDE,))
    assert ImageChops.difference(Image.open("again.overlay.png"), boxes).getbbox() is not None


def test_attached_and_not_asked_for_it_changes_no_bit(badge: Any, weights: Path) -> None:
    scene = Scene("a person", (RIDE,), steps=2)
    plain = generate(scene, device="cpu")
    attached = generate(scene, adapters={"badge": str(weights)}, device="cpu")
    assert attached.image.tobytes() == plain.image.tobytes()
    assert attached.record.adapters["badge"] == str(weights)
    adapter = importlib.import_module("interactdiff.badge.adapter").BadgeAdapter
    given = generate(
        replace(scene, extra_items=(badge.parse(BADGE),)), adapters=[adapter(3.0).eval()], device="cpu"
    )
    assert given.image.tobytes() != plain.image.tobytes()
    with pytest.raises(InteractdiffError, match="expected an adapter of clear, interaction, badge, got"):
        generate(scene, adapters={"x": None})


def test_items_without_an_adapter_name_the_method(badge: Any, pipe: Any) -> None:
    scene = Scene("a", extra_items=(badge.parse(BADGE),))
    with pytest.raises(SceneError, match=r"expected an adapter for 1 badges \(badge\), got none for tiny"):
        ScenePipeline(pipe, None, "tiny").generate(scene)
    assert used_methods(scene, {"clear": {}}) == {"clear": {}, "badge": {}}


def test_its_scores_are_evaluated(
    badge: Any, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    flags = ["--scenes", "2", "--steps", "2", "--device", "cpu", "--adapter", f"badge={weights}"]
    assert main(["evaluate", "--badge", *flags, "--json", str(table)]) == 0
    lines = capsys.readouterr().out.split()
    values = json.loads(table.read_text())
    inside, outside = (values["scores"][name] for name in ("inside", "outside"))
    assert lines == ["inside", f"{inside:.3f}", "outside", f"{outside:.3f}"]
    assert inside > outside
    assert (values["method"], values["adapters"]["badge"]) == ("badge", str(weights))
    assert main(["evaluate", "--badge", "--world"]) == 2


def test_it_has_a_panel_in_the_studio(
    badge: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Limits(folders=(tmp_path,)), device="cpu")
    studio = Studio(worker, "stickworld")
    assert list(studio.panels) == ["clear", "badge", "high_resolution", "inverted"]
    shown = [name for name, panel in studio.panels.items() if panel.visible]
    assert shown == ["clear", "badge", "inverted"]
    values = {name: getattr(field, "value", None) for name, field in studio.fields.items()}
    assert values["badge.gain"] == 1.0
    values |= {
        "badge.items.badges": BADGE + "\n\n",
        "badge.gain": 2.0,
        "badge.adapter": str(weights),
        "steps": 2,
    }
    values |= {"record_attention": False}
    request = request_of(Document().with_scene(Scene("", (RIDE,))), values)
    assert request.scene.extra_items == (badge.parse(BADGE),)
    assert request.adapters == {"badge": str(weights)}
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


def test_adapters_come_and_go_on_one_loaded_model(badge: Any, weights: Path, tmp_path: Path) -> None:
    worker = Worker(Limits(folders=(tmp_path,)), device="cpu")
    plain = worker._pipeline("stickworld", {}, {})
    before = list(plain.denoiser.state_dict())
    with_badge = worker._pipeline("stickworld", {"badge": str(weights)}, {"badge": {}})
    assert with_badge.pipeline is plain.pipeline
    assert set(with_badge.adapters) == {"interaction", "badge"}
    with pytest.raises(InteractdiffError, match="expected a badge adapter in"):
        worker._pipeline("stickworld", {"badge": str(tmp_path)}, {"badge": {}})
    again = worker._pipeline("stickworld", {}, {})
    assert again.pipeline is plain.pipeline
    assert set(again.adapters) == {"interaction"}
    assert list(again.denoiser.state_dict()) == before
    worker.close()


# --- samplers ---


def test_a_sampler_draws_and_says_what_it_costs(badge: Any) -> None:
    pipeline = ScenePipeline.from_pretrained("stickworld", device="cpu")
    scene = Scene("a dog", steps=2)
    used = {"inverted": {}}
    plain, inverted = pipeline.generate(replace(scene, steps=4)), pipeline.generate(scene, methods=used)
    assert inverted.tobytes() == bytes(255 - byte for byte in plain.tobytes())
    both = {"inverted": {}, "badge": {"gain": 4.0}}
    marked = replace(scene, extra_items=(badge.parse(BADGE),))
    pipeline = ScenePipeline.from_pretrained("stickworld", device="cpu", methods=both)
    twice = pipeline.generate(replace(marked, steps=4), methods={"badge": {"gain": 4.0}})
    assert pipeline.generate(marked, methods=both).tobytes() == bytes(255 - byte for byte in twice.tobytes())
    assert (pipeline.cost(scene, {}).steps, pipeline.cost(scene, used).steps) == (2, 4)
    assert pipeline.cost(scene, used).pixels == 96 * 96


def test_two_samplers_are_refused(badge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "stickworld-dit", "--method", "high_resolution", "--method", "inverted"]
    assert main(["generate", "a", *flags]) == 2
    sentence = "method: expected one sampler at most, got high_resolution and inverted"
    assert capsys.readouterr().err == f"interactdiff: {sentence}\n"
    with pytest.raises(SceneError, match=sentence):
        generate(Scene("a"), methods={"high_resolution": {}, "inverted": {}})


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ({"nothing": {}}, "method: expected one of clear, high_resolution, got 'nothing'"),
        ({"high_resolution": {"size": 2}}, "high_resolution: expected settings of scale, strength, steps, "),
        ({"high_resolution": {"scale": 3}}, "high_resolution, scale: expected one of 2, 4, 8, got 3"),
        ({"high_resolution": {"strength": 0}}, "high_resolution, strength: expected a number from 0.05 to 1"),
        ({"high_resolution": {"steps": 1.5}}, "high_resolution, steps: expected a whole number from 1 to"),
        ({"clear": {}}, "clear: expected an adapter attached for it, got none for tiny"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_one_sentence(flux_pipe: Any, used: Any, message: str) -> None:
    with pytest.raises(SceneError) as refused:
        ScenePipeline(flux_pipe, None, "tiny").checked_settings(used)
    assert str(refused.value).startswith(message)


def test_few_steps_at_little_strength_are_refused_before_anything_is_drawn(flux_pipe: Any) -> None:
    pipeline = ScenePipeline(flux_pipe, None, "tiny")
    used = {"high_resolution": {"steps": 2, "strength": 0.05}}
    with pytest.raises(
        SceneError, match=r"high_resolution, steps: expected at least 20 for strength 0\.05, got 2"
    ):
        pipeline.generate(Scene("a", steps=1, width=32, height=32), methods=used)


def test_values_suit_the_model_where_none_are_given() -> None:
    spec = samplers()["high_resolution"]
    assert spec.checked("owner/flux", {})["strength"] == 0.7
    assert spec.checked("stickworld-dit", {"scale": 4.0}) == {
        "scale": 4, "strength": 0.25, "steps": 20, "shift": 1.0, "window": 8
    }  # fmt: skip
    with pytest.raises(SceneError, match="x: expected a whole number from 0 to 3, got True"):
        Setting("x", "X", 1, 0, 3, "").checked(True)


@pytest.mark.parametrize("family", ["flux_pipe", "sd3_pipe"])
def test_high_resolution_draws_on_within_windows_and_without(
    family: str, request: pytest.FixtureRequest
) -> None:
    pipeline = ScenePipeline(request.getfixturevalue(family), None, "tiny")
    scene = Scene("a cat", steps=2, width=32, height=32, guidance_scale=2.0)
    steps: list[int] = []
    previews: list[Any] = []

    def on_step(step: int, preview: Any) -> None:
        steps.append(step)
        previews.append(preview())

    drawn = {}
    for window in (0, 1):
        used = {"high_resolution": {"scale": 2, "steps": 4, "strength": 0.5, "shift": 1.0, "window": window}}
        steps.clear()
        drawn[window] = pipeline.generate(scene, on_step, methods=used)
        assert drawn[window].size == (64, 64)
        assert steps == [0, 1, 2, 3]
        assert pipeline.cost(scene, used).steps == 4
    assert [preview.size for preview in previews[:4]] == [(32, 32), (32, 32), (64, 64), (64, 64)]
    assert drawn[0].tobytes() == drawn[1].tobytes()  # 16 x 16 tokens are too few for windows to pay


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
    assert list(methods()) == ["clear", "interaction", "other"]


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
    file.write_text(text.replace("ItemSpec(Badge", f"ItemSpec(type('{name}', (Badge,), {{}})"))
    for module in [one for one in sys.modules if one.startswith("interactdiff.badge")]:
        del sys.modules[module]
    methods.cache_clear()
    assert main(["generate", "a"]) == 2
    said = capsys.readouterr().err
    assert ("the scene's key prompt" in said) if key == "prompt" else ("got --seed" in said)
