"""The packaged models: their size, that stock classes load them, and that the adapter does what is asked."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from interactdiff.clear import ClearAdapter, linearize
from interactdiff.cli import main
from interactdiff.concept import find_masks
from interactdiff.evaluation.bootstrap import with_interval
from interactdiff.evaluation.captions import text_scores
from interactdiff.evaluation.images import feature_distance
from interactdiff.evaluation.likeness import PERSON, lone_scene, sample_known
from interactdiff.evaluation.sampling import PictureRequest, Sampling, draw_pictures, held_out_scenes
from interactdiff.evaluation.subjects import evaluate_subjects
from interactdiff.evaluation.words import mask_iou
from interactdiff.evaluation.world import evaluate_world, packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import EvaluationOptions
from interactdiff.models import MODEL, PACKAGED, default_adapter, resolve
from interactdiff.picture import read_record
from interactdiff.pipeline_calls import call_arguments
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.registry import configurables
from interactdiff.scene import Scene
from interactdiff.stickworld import model_path
from interactdiff.stickworld.render import render


def files_of(*names: str) -> list[Path]:
    return [path for name in names for path in model_path(name).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("names", "megabytes"),
    [
        (("stickworld", "stickworld-interaction"), 24),
        (("stickworld-dit", "stickworld-dit-clear"), 17),
        (("stickworld-dit-interaction",), 2.5),
        (("stickworld-subject", "stickworld-dit-subject"), 2.6),
    ],
)
def test_the_models_are_small_float16_safetensors(names: tuple[str, ...], megabytes: float) -> None:
    files = files_of(*names)
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert {path.name for path in files if path.suffix == ".txt"} <= {"merges.txt"}
    assert sum(path.stat().st_size for path in files) <= megabytes * 1_000_000
    for path in files:
        if path.name == "config.json":
            assert "_name_or_path" not in path.read_text(encoding="utf-8"), "a path where it was made"
        if path.suffix == ".safetensors":
            assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}


def test_all_packaged_weights_are_of_46_mb_together() -> None:
    weights = [path for path in model_path("").rglob("*") if path.suffix == ".safetensors"]
    assert len(weights) == 13
    assert sum(path.stat().st_size for path in weights) <= 46_000_000


def test_the_transformer_draws_what_captions_say_and_its_windows_nearly_the_same() -> None:
    """`evaluate --world` and benchmarks/stickworld_clear.py have scores; this catches weights mixed up."""
    scene_pipeline = ScenePipeline.from_pretrained("stickworld-dit", device="cpu")
    assert type(scene_pipeline.pipeline) is FluxPipeline
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    detector = packaged_detector()
    scenes = held_out_scenes(8, 3)
    requests = [PictureRequest(n, scene.caption) for n, scene in enumerate(scenes)]
    draw = partial(draw_pictures, requests, scene_pipeline, 3, Sampling(10, 3.0))
    full = draw()
    scores = text_scores(detector.detect(full), scenes)
    found = {name: with_interval(score, len(scenes))[0] for name, score in scores.items()}
    assert found.pop("appearance_acc") > 0.5
    assert min(found.values()) > 0.6
    distances = []
    trained = ClearAdapter.from_pretrained(model_path("stickworld-dit-clear"))
    for layers in (trained, ClearAdapter(trained.config).eval()):
        with linearize(scene_pipeline.pipeline, weights=layers, min_tokens=0) as handle:
            distances.append(feature_distance(detector, draw(), full).mean())
            assert handle["clear"].active
    assert 0 < distances[0] < 0.9 * distances[1]


def test_the_base_is_a_stock_pipeline_without_a_safety_checker() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(model_path("stickworld"))
    assert pipe.safety_checker is None
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a person", num_inference_steps=2).images[0].size == (128, 128)


def test_the_demo_draws_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "out/demo.png\n"
    with Image.open("out/demo.png") as picture:
        assert picture.width > 2 * picture.height
    assert read_record("out/demo.png").model == MODEL


def test_guidance_is_what_suits_the_packaged_model() -> None:
    scene_pipeline = ScenePipeline.from_pretrained("stickworld", device="cpu")
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    own, asked, stock = (
        scene_pipeline.generate(Scene("a dog", steps=2, guidance_scale=g)) for g in (None, 4.0, 7.5)
    )
    assert own.tobytes() == asked.tobytes() != stock.tobytes()
    elsewhere = replace(scene_pipeline, model="/a/folder")
    assert elsewhere.generate(Scene("a dog", steps=2)).tobytes() == stock.tobytes()


@pytest.mark.parametrize("model", PACKAGED)
def test_control_beats_the_caption(model: str) -> None:
    adapter = default_adapter(model)
    scene_pipeline = ScenePipeline.from_pretrained(model, device="cpu")
    table = evaluate_world(
        model, adapter, scenes=4, seed=3, steps=6, batch_size=12, device="cpu", progress=False,
        scene_pipeline=scene_pipeline,
        guidance_scale=PACKAGED[model].guidance_scale,
    )  # fmt: skip
    rows = table["rows"]
    assert rows["real"]["box_acc"] > 0.9
    assert rows["adapter"]["box_acc"] > 0.9 > 0.6 > rows["base"]["box_acc"]
    assert rows["adapter"]["action_acc"] > rows["boxes_only"]["action_acc"]


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's public names alone."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:3]]
    imported = {line.split()[1] for block in blocks for line in block.splitlines() if "import" in line}
    assert imported == {"diffusers", "interactdiff"}
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert Image.open("out.png").size == (128, 128)
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert read_record("out.png").model == "stickworld-dit"


def test_the_example_of_the_model_card_calls_each_pipeline_as_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = model_path("README.md").read_text(encoding="utf-8")
    example = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "model card", "exec"), names)
    assert Image.open("unet.png").size == Image.open("transformer.png").size == (128, 128)
    expected = call_arguments(names["pipe"], names["prompt"], None, PACKAGED["stickworld-dit"].guidance_scale)
    assert expected == {"prompt": names["prompt"], **names["flux"]}
    assert f"guidance_scale={PACKAGED['stickworld'].guidance_scale})" in example


@pytest.mark.parametrize("model", ["stickworld", "stickworld-dit"])
def test_a_subject_is_known_again_by_its_picture(model: str) -> None:
    """`evaluate --subject` has figures of more subjects."""
    pipeline = ScenePipeline.from_pretrained(model, device="cpu", methods={"subject": {}})
    pipeline.pipeline.set_progress_bar_config(disable=True)
    table = evaluate_subjects(pipeline, EvaluationOptions(3, 2, 8, 6, rows=("text", "encoder")))
    rows = table["rows"]
    assert rows["encoder"]["identity"] > rows["text"]["identity"] + 0.15
    assert "pairs" not in table


@pytest.mark.parametrize("model", PACKAGED)
def test_what_suits_a_packaged_model_are_settings_that_there_are(model: str) -> None:
    assert PACKAGED[model].settings.keys() <= configurables().keys()
    for one in configurables().values():
        assert one.checked(model, {}).keys() == {setting.name for setting in one.settings}


@pytest.mark.parametrize("model", ["stickworld", "stickworld-dit"])
def test_masks_of_words_lie_on_what_they_name(model: str) -> None:
    """With the power that suits each model; benchmarks/concept_masks.py has figures of more renders."""
    pipeline = load_pipeline(resolve("model", model), torch.device("cpu"), torch.float32)
    ious = []
    for number in range(3):
        rng = random.Random(number)
        known = [sample_known(PERSON, rng), sample_known(None, rng)]
        drawn = render((shown := lone_scene(known, number)).scene, 128)
        words = [one.name for one in known]
        found = find_masks(pipeline, Image.fromarray(drawn.image), words, prompt="a {0} and a {1}")
        large = torch.nn.functional.interpolate(found.masks[None, :2].float(), (128, 128))[0] > 0.5
        truths = [drawn.things[n].mask for n in shown.numbers]
        ious += [mask_iou(one.numpy(), truth) for one, truth in zip(large, truths, strict=True)]
    assert sum(ious) / len(ious) > 0.6


@pytest.mark.parametrize("name", PACKAGED)
def test_transformers_4_and_5_read_the_text_encoder(name: str) -> None:
    """Under other names transformers 4 draws its weights at random without an error."""
    assert all(
        key.startswith("text_model.")
        for key in load_file(model_path(name) / "text_encoder/model.safetensors")
    )
    pipe = ScenePipeline.from_pretrained(name, device="cpu").pipeline
    loaded = pipe.text_encoder.state_dict()
    for key, tensor in load_file(model_path(name) / "text_encoder/model.safetensors").items():
        mine = loaded.get(key, loaded.get(key.removeprefix("text_model.")))
        assert torch.equal(mine, tensor.float()), key
