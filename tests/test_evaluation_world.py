"""Drawing held-out scenes and scoring the pictures, with tiny real models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from world_truth import perfect

from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.cli import main
from interactdiff.errors import AdapterError
from interactdiff.evaluation.sampling import (
    PictureRequest,
    Sampling,
    action_swap,
    detect_pictures,
    draw_pictures,
    held_out_scenes,
    reduced,
    row_requests,
)
from interactdiff.evaluation.table import format_table
from interactdiff.evaluation.world import evaluate_world, packaged_detector, swap_scores
from interactdiff.generation import ScenePipeline
from interactdiff.handle import attach, attached_bindings
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import ModelError
from interactdiff.scene import SceneError
from interactdiff.stickworld.detector import Detections, Detector
from interactdiff.stickworld.world import GROUPS, HELD_OUT


def test_held_out_scenes_are_beyond_training_and_differ_by_seed() -> None:
    scenes = held_out_scenes(5, seed=1)
    assert all(scene.seed >= HELD_OUT for scene in scenes)
    assert not {s.seed for s in scenes} & {s.seed for s in held_out_scenes(5, seed=0)}


def test_scenes_can_be_of_a_number_of_interactions() -> None:
    for count in range(4):
        scenes = held_out_scenes(5, 0, n_interactions=count)
        assert [len(scene.triplets) for scene in scenes] == [count] * 5


def test_swap_changes_one_action_and_nothing_else() -> None:
    for number, scene in enumerate(held_out_scenes(12, seed=0)):
        if not scene.triplets:
            continue
        swap = action_swap(number, scene, seed=0)
        action = scene.triplets[swap.triplet].action
        assert action in swap.actions
        assert swap.actions in GROUPS.values()
        assert not any(action in request.prompt for request in swap.pictures)
        for request, wanted in zip(swap.pictures, swap.actions, strict=True):
            items: list[Any] = list(request.items)
            assert items[len(scene.triplets) :] == list(scene.lone_entities())
            assert items[swap.triplet].action == wanted
            items[swap.triplet] = replace(items[swap.triplet], action=None)
            assert tuple(items) == swap.without.items
            assert request.prompt == swap.without.prompt


def test_swap_followed_is_one_and_boxes_only_is_chance() -> None:
    scenes = held_out_scenes(30, seed=0)
    swaps = [action_swap(n, scene, 0) for n, scene in enumerate(scenes) if scene.triplets]
    assert 0 < len(swaps) < len(scenes)
    found = {}
    for swap in swaps:
        person = perfect(scenes[swap.scene]).triplets[swap.triplet].person
        for request, action in zip(swap.pictures, swap.actions, strict=True):
            found[request] = Detections((replace(person, action=action),), (), ())
        found[swap.without] = Detections((person,), (), ())
    once = np.ones((1, len(scenes)))
    scores = {name: float(one.value(once)[0]) for name, one in swap_scores(swaps, scenes, found).items()}
    pictures = [1 / len(swap.actions) for swap in swaps for _ in swap.actions]
    assert scores["adapter"] == 1
    assert scores["chance"] == pytest.approx(np.mean(pictures))
    assert scores["boxes_only"] == pytest.approx(scores["chance"])


def test_rows_are_drawn_with_entities_beside_the_interactions() -> None:
    scenes = held_out_scenes(12, seed=0)
    assert any(scene.entities for scene in scenes)
    rows = row_requests(scenes, controlled=True, fast=True, clear=True)
    assert list(rows) == ["base", "boxes_only", "adapter", "adapter_fast", "adapter_clear"]
    for n, scene in enumerate(scenes):
        assert rows["base"][n].items == ()
        assert rows["adapter"][n].items == (*scene.interactions(), *scene.lone_entities())
        assert rows["boxes_only"][n].items == (*scene.interactions(action=False), *scene.lone_entities())
        assert {rows[row][n].prompt for row in rows if row != "boxes_only"} == {scene.caption}
        assert [rows[f"adapter_{way}"][n].way for way in ("fast", "clear")] == ["fast", "clear"]


@pytest.fixture
def scene_pipeline(pipe: StableDiffusionPipeline, adapter: InteractionAdapter) -> ScenePipeline:
    return ScenePipeline(pipe, attach(pipe, adapter), "tiny", {"interaction": "tiny-adapter"})


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector((8, 8, 8, 8), reader_widths=(8, 8, 8, 8)).eval()


def test_evaluate_world_gives_the_whole_table(scene_pipeline: ScenePipeline, detector: Detector) -> None:
    table = evaluate_world(
        "", "", 2, 5, 2, 3, "cpu", progress=False, scene_pipeline=scene_pipeline, detector=detector
    )
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter"]
    scores = ["hoi_map", "box_acc", "action_acc", "colour_acc"]
    for name, row in table["rows"].items():
        assert list(row) == scores + ["identity"] * (name in ("real", "adapter"))
        assert all(0 <= share <= 1 for share in row.values())
    assert list(table["action_swap"]) == ["adapter", "boxes_only", "chance"]
    assert list(table["intervals"]["rows"]["base"]) == scores
    assert list(table["text"]) == list(table["intervals"]["text"]) == ["real", "base"]
    for row in table["text"].values():
        assert list(row) == ["object_acc", "action_acc", "colour_acc", "appearance_acc"]
    assert table["word_iou"] is None
    assert (table["scenes"], table["seed"]) == (2, 5)
    assert (table["guidance_scale"], table["size"]) == (4.0, 16)
    text = format_table(table)
    assert "real renders" in text
    assert "found anywhere" in text
    assert "attributes right at their boxes: real renders" in text
    assert f"chance {100 * table['action_swap']['chance']:.1f}" in text


def test_fast_control_has_a_row_of_its_own(scene_pipeline: ScenePipeline, detector: Detector) -> None:
    table = evaluate_world(
        "", "", 1, 5, 3, 3, "cpu", progress=False, fast=True, scene_pipeline=scene_pipeline, detector=detector
    )
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter", "adapter_fast"]
    assert "adapter, fast" in format_table(table)


def test_windows_have_a_row_of_their_own(scene_pipeline: ScenePipeline, detector: Detector) -> None:
    windows = ClearAdapter(ClearConfig(2)).eval()
    table = evaluate_world(
        "",
        "",
        1,
        5,
        3,
        3,
        "cpu",
        progress=False,
        scene_pipeline=scene_pipeline,
        detector=detector,
        clear=windows,
    )
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter", "adapter_clear"]
    assert "adapter+clear" in format_table(table)
    names = [binding.adapter.name for binding in attached_bindings(scene_pipeline.denoiser)]
    assert names == ["interaction"]


def test_without_an_adapter_there_are_the_rows_that_need_none(
    pipe: StableDiffusionPipeline, scene_pipeline: ScenePipeline, detector: Detector
) -> None:
    full = evaluate_world(
        "", "", 2, 5, 2, 3, "cpu", progress=False, scene_pipeline=scene_pipeline, detector=detector
    )
    assert scene_pipeline.handle is not None
    scene_pipeline.handle.detach()
    bare = ScenePipeline(pipe, None, "tiny")
    table = evaluate_world(
        "", None, 2, 5, 2, 3, "cpu", progress=False, scene_pipeline=bare, detector=detector
    )
    assert table["action_swap"] is table["intervals"]["action_swap"] is table["adapter"] is None
    assert list(table) == list(full)
    for part in (table, table["intervals"]):
        whole = full if part is table else full["intervals"]
        assert part["rows"] == {row: whole["rows"][row] for row in ("real", "base")}
        assert part["text"] == whole["text"]
    text = format_table(table)
    assert "base, text only" in text
    assert "action swap" not in text
    with pytest.raises(
        AdapterError, match="expected an adapter for the row of fast control, got none for tiny"
    ):
        evaluate_world("", None, 2, 5, 2, 3, "cpu", fast=True, scene_pipeline=bare, detector=detector)


def test_pictures_are_drawn_at_a_size_and_averaged_down_to_the_detectors(
    scene_pipeline: ScenePipeline, detector: Detector
) -> None:
    drawn = draw_pictures([PictureRequest(0, "a person")], scene_pipeline, 0, Sampling(1, size=24))
    assert drawn.shape == (1, 3, 24, 24)
    table = evaluate_world(
        "", "", 1, 5, 1, 3, "cpu", progress=False, size=24, scene_pipeline=scene_pipeline, detector=detector
    )
    assert table["size"] == 24
    assert "of 24 px" in format_table(table)
    large = torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    corners = large.unflatten(2, (96, 2)).unflatten(4, (96, 2))
    torch.testing.assert_close(reduced(large, 96), corners.mean((3, 5)))
    assert reduced(large[..., :96, :96], 96).equal(large[..., :96, :96])
    assert reduced(large[..., :24, :24], 96).shape == (2, 3, 24, 24)
    with pytest.raises(SceneError, match="size: expected a multiple of 8 pixels, got 20"):
        evaluate_world("", "", 1, 5, 1, 3, "cpu", size=20, scene_pipeline=scene_pipeline, detector=detector)


def test_a_unet_is_called_as_it_always_was(
    scene_pipeline: ScenePipeline, pipe: StableDiffusionPipeline
) -> None:
    request = PictureRequest(3, "a person")
    got = draw_pictures([request], scene_pipeline, 2, Sampling(2, 3.0))
    noise = torch.Generator().manual_seed(HELD_OUT + 2_000_003)
    plain: Any = pipe
    wanted = plain(
        ["a person"], generator=[noise], output_type="pt", num_inference_steps=2, guidance_scale=3.0
    )
    assert torch.equal(got, wanted.images)


def test_evaluate_on_the_command_line_prints_the_table_and_writes_it(
    pipe: StableDiffusionPipeline,
    adapter: InteractionAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    adapter.save_pretrained(tmp_path / "adapter")
    models = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    out = tmp_path / "score.json"
    sizes = ["--scenes", "2", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--interactions", "1"]
    assert main(["evaluate", "--world", *sizes, *models, "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["rows"]["real"]["box_acc"] == 1.0  # by the packaged detector
    assert table["rows"]["base"]["hoi_map"] == 0.0
    assert format_table(table) in capsys.readouterr().out
    without = [*models[:2], "--size", "24", "--guidance-scale", "3"]
    assert main(["evaluate", "--world", *sizes, *without, "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert list(table["rows"]) == list(table["text"]) == ["real", "base"]
    assert list(table["text"]["real"]) == ["object_acc", "action_acc", "colour_acc", "appearance_acc"]
    assert min(table["text"]["real"].values()) == 1.0
    assert (table["size"], table["guidance_scale"], table["action_swap"]) == (24, 3.0, None)
    assert format_table(table) in capsys.readouterr().out


def test_a_detector_brings_its_world(
    pipe: StableDiffusionPipeline, detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    detector.save_pretrained(tmp_path / "detector")
    out = tmp_path / "score.json"
    flags = ["evaluate", "--world", "--scenes", "2", "--steps", "1", "--device", "cpu", "--json", str(out)]
    flags += ["--model", str(tmp_path / "model"), "--interactions", "3", "--word-iou", "1"]
    assert main([*flags, "--detector", str(tmp_path / "detector")]) == 0
    table = json.loads(out.read_text())
    assert "identity" in table["rows"]["real"]
    assert "appearance_acc" in table["text"]["base"]
    assert list(table["word_iou"]) == ["objects", "persons"]
    assert format_table(table) in capsys.readouterr().out
    assert main([*flags, "--detector", str(tmp_path / "none")]) == 2
    assert "expected the detector in" in capsys.readouterr().err
    flags[flags.index("3")] = "4"
    assert main([*flags, "--detector", str(tmp_path / "detector")]) == 2
    assert "expected 0 to 3 interactions a scene, got 4" in capsys.readouterr().err


def test_pictures_do_not_depend_on_the_batch(scene_pipeline: ScenePipeline) -> None:
    scenes = held_out_scenes(3, seed=0)
    requests = [PictureRequest(n, scene.caption, scene.interactions()) for n, scene in enumerate(scenes)]
    together = draw_pictures(requests, scene_pipeline, seed=0, how=Sampling(2))
    alone = torch.cat(
        [draw_pictures([request], scene_pipeline, seed=0, how=Sampling(2)) for request in requests]
    )
    assert together.shape == (3, 3, 16, 16)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_base_row_is_the_base_and_the_others_are_not(
    scene_pipeline: ScenePipeline, pipe: StableDiffusionPipeline
) -> None:
    scene = held_out_scenes(1, seed=0)[0]
    controlled = draw_pictures(
        [PictureRequest(0, scene.caption, scene.interactions())], scene_pipeline, seed=0, how=Sampling(2)
    )
    uncontrolled = draw_pictures([PictureRequest(0, scene.caption)], scene_pipeline, seed=0, how=Sampling(2))
    assert scene_pipeline.handle is not None
    scene_pipeline.handle.detach()
    without = draw_pictures(
        [PictureRequest(0, scene.caption)], ScenePipeline(pipe, None, "tiny"), seed=0, how=Sampling(2)
    )
    assert torch.equal(uncontrolled, without)
    assert not torch.allclose(uncontrolled, controlled, atol=1e-3)


def test_a_picture_requested_twice_is_drawn_once(scene_pipeline: ScenePipeline, detector: Detector) -> None:
    drawn = []
    hook = scene_pipeline.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _, args: drawn.append(len(args[0]))
    )
    requests = [PictureRequest(0, "a person"), PictureRequest(1, "a person"), PictureRequest(0, "a person")]
    found = detect_pictures(
        requests, scene_pipeline, detector, seed=0, how=Sampling(1), batch_size=8, progress=False
    )
    hook.remove()
    assert sum(drawn) == 2
    assert set(found) == set(requests)


def test_seed_out_of_range_is_refused(scene_pipeline: ScenePipeline, detector: Detector) -> None:
    with pytest.raises(SceneError, match=r"expected a seed .* got -1"):
        evaluate_world("", "", 1, -1, 1, 1, "cpu", scene_pipeline=scene_pipeline, detector=detector)


def test_missing_detector_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("interactdiff.evaluation.world.model_path", lambda name: tmp_path / name)
    with pytest.raises(ModelError, match="packaged detector"):
        packaged_detector()
