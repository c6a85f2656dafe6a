"""Samplers: what a new one generates, what is refused, and high resolution."""

from dataclasses import replace
from typing import Any

import pytest

from interactdiff import Scene, SceneError, generate
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import Setting
from interactdiff.registry import samplers

BADGE = "new|0.0,0.0,0.5,0.5|strength=0.5"


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
    assert pipeline.cost(scene, used).pixels == 128 * 128


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
        ({"nothing": {}}, "method: expected one of clear, concept, subject, high_resolution, got 'nothing'"),
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
