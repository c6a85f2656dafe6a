"""Methods are found in the package, and front ends offer what is found."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import interactdiff
from interactdiff import SceneError
from interactdiff.app.artist import Artist
from interactdiff.app.form import order_of
from interactdiff.app.limits import Limits
from interactdiff.app.studio import Studio
from interactdiff.generation import ScenePipeline
from interactdiff.methods import Setting, checked_methods, draw, methods, work
from interactdiff.scene import Scene

MAGIC = """
from PIL import ImageOps
from interactdiff.methods import Method, Setting, Work

METHOD = Method(
    name="magic",
    title="Magic",
    about="Turns colours around.",
    settings=(
        Setting("power", "Power", 1, 0, 3, "More is more."),
        Setting("share", "Share", 0.5, 0.0, 1.0, "Of it."),
    ),
    why_not=lambda pipeline: None,
    draw=lambda drawer, values, way, scene, on_step: ImageOps.invert(way(scene, on_step)),
    work=lambda drawer, values, scene: Work(7, scene.steps * 2),
)
"""


@pytest.fixture
def magic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more folder of the package, with a method in it."""
    (tmp_path / "magic").mkdir()
    (tmp_path / "magic/__init__.py").touch()
    (tmp_path / "magic/method.py").write_text(MAGIC)
    monkeypatch.setattr(interactdiff, "__path__", [*interactdiff.__path__, str(tmp_path)])
    methods.cache_clear()
    yield
    methods.cache_clear()
    for name in ("interactdiff.magic", "interactdiff.magic.method"):
        sys.modules.pop(name, None)


def test_what_the_package_has() -> None:
    assert list(methods()) == ["high_resolution"]


def test_a_new_method_is_drawn_with_and_has_a_panel(magic: None) -> None:
    artist = Artist(Limits(), device="cpu")
    studio = Studio(artist, "stickworld", None)
    assert list(studio.panels) == ["high_resolution", "magic"]
    assert (studio.panels["high_resolution"].visible, studio.panels["magic"].visible) == (False, True)
    values = {name: getattr(field, "value", None) for name, field in studio.fields.items()}
    order = order_of(
        studio.canvas.preprocess(None), values | {"magic.used": True, "magic.power": 2, "steps": 2}
    )
    assert order.methods == {"magic": {"power": 2, "share": 0.5}}
    artist.close()
    drawer = ScenePipeline.from_pretrained("stickworld", device="cpu")
    scene = Scene("a dog", steps=2)
    plain, turned = (draw(drawer, scene, asked) for asked in ({}, order.methods))
    assert turned.tobytes() == bytes(255 - byte for byte in plain.tobytes())
    assert (work(drawer, scene, {}).steps, work(drawer, scene, order.methods).steps) == (2, 4)
    assert work(drawer, scene, order.methods).pixels == 96 * 96


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nothing": {}}, "method: expected one of high_resolution, got 'nothing'"),
        ({"high_resolution": {"size": 2}}, "high_resolution: expected settings of scale, strength, steps, "),
        ({"high_resolution": {"scale": 3}}, "high_resolution, scale: expected one of 2, 4, 8, got 3"),
        ({"high_resolution": {"strength": 0}}, "high_resolution, strength: expected a number from 0.05 to 1"),
        ({"high_resolution": {"steps": 1.5}}, "high_resolution, steps: expected a whole number from 1 to"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_one_sentence(flux_pipe: Any, asked: Any, message: str) -> None:
    with pytest.raises(SceneError) as refused:
        checked_methods(ScenePipeline(flux_pipe, None, "tiny"), asked)
    assert str(refused.value).startswith(message)


def test_few_steps_at_little_strength_are_refused_before_anything_is_drawn(flux_pipe: Any) -> None:
    drawer = ScenePipeline(flux_pipe, None, "tiny")
    asked = {"high_resolution": {"steps": 2, "strength": 0.05}}
    with pytest.raises(
        SceneError, match=r"high_resolution, steps: expected at least 20 for strength 0\.05, got 2"
    ):
        draw(drawer, Scene("a", steps=1, width=32, height=32), asked)


def test_values_suit_the_model_where_none_are_given() -> None:
    method = methods()["high_resolution"]
    assert method.checked("owner/flux", {})["strength"] == 0.7
    assert method.checked("stickworld-dit", {"scale": 4.0}) == {
        "scale": 4, "strength": 0.25, "steps": 20, "shift": 1.0, "window": 8
    }  # fmt: skip
    with pytest.raises(SceneError, match="x: expected a whole number from 0 to 3, got True"):
        Setting("x", "X", 1, 0, 3, "").checked(True)


@pytest.mark.parametrize("family", ["flux_pipe", "sd3_pipe"])
def test_high_resolution_draws_on_within_windows_and_without(
    family: str, request: pytest.FixtureRequest
) -> None:
    drawer = ScenePipeline(request.getfixturevalue(family), None, "tiny")
    scene = Scene("a cat", steps=2, width=32, height=32, guidance_scale=2.0)
    steps: list[int] = []
    looks: list[Any] = []

    def on_step(step: int, look: Any) -> None:
        steps.append(step)
        looks.append(look())

    drawn = {}
    for window in (0, 1):
        asked = {"high_resolution": {"scale": 2, "steps": 4, "strength": 0.5, "shift": 1.0, "window": window}}
        steps.clear()
        drawn[window] = draw(drawer, scene, asked, on_step)
        assert drawn[window].size == (64, 64)
        assert steps == [0, 1, 2, 3]
        assert work(drawer, replace(scene), asked).steps == 4
    assert [look.size for look in looks[:4]] == [(32, 32), (32, 32), (64, 64), (64, 64)]
    assert drawn[0].tobytes() == drawn[1].tobytes()  # 16 x 16 tokens are too few for windows to pay
