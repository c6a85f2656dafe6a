import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interactdiff.evaluation.hoi import picture_scores
from interactdiff.evaluation.world import held_out_scenes, look_at_renders, swap, swap_scores
from interactdiff.stickworld import model_path
from interactdiff.stickworld.detector import (
    COLOUR_NAMES,
    GRID,
    KINDS,
    Detector,
    Maps,
    cell_middles,
    detections,
)
from interactdiff.stickworld.world import ACTIONS, COLOURS, sample_scene
from interactdiff.training.detector import detection_loss, focal_loss, roughened, scene_truth
from interactdiff.training.recipe import checkpoints
from interactdiff.training.run import load_config, make_recipe

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "stickworld_detector.yaml"


def ideal_maps(truth: dict[str, torch.Tensor]) -> Maps:
    """What a perfect detector says: at every cell, the truth of the nearest person and object."""
    boxes, present = truth["boxes"], truth["present"]
    images = len(boxes)
    middles = cell_middles()
    maps = Maps(
        heat=torch.full((images, len(KINDS), GRID, GRID), -20.0),
        boxes=torch.zeros(images, 2, 4, GRID, GRID),
        colours=torch.zeros(images, 2, len(COLOURS), GRID, GRID),
        actions=torch.zeros(images, len(ACTIONS), GRID, GRID),
        towards=torch.zeros(images, 2, GRID, GRID),
    )
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    for image in range(images):
        for role in (0, 1):
            distance = (middles - centres[image, :, role, :, None, None]).square().sum(1)
            owner = distance.argmin(0)
            for n in range(2):
                if not present[image, n]:
                    continue
                mine, box = owner == n, boxes[image, n, role]
                kind = 0 if role == 0 else int(truth["kinds"][image, n])
                cell = divmod(int(distance[n].argmin()), GRID)
                maps.heat[image, kind, cell[0], cell[1]] = 20.0
                here = torch.cat([middles - box[:2, None, None], box[2:, None, None] - middles])
                maps.boxes[image, role][:, mine] = here[:, mine]
                maps.colours[image, role, truth["colours"][image, n, role]][mine] = 20.0
                if role == 0:
                    maps.actions[image, truth["actions"][image, n]][mine] = 20.0
                    towards = centres[image, n, 1][:, None, None] - middles
                    maps.towards[image][:, mine] = towards[:, mine]
    return maps


def test_ideal_maps_are_read_as_the_scenes_that_they_are_of() -> None:
    worlds = held_out_scenes(24, seed=0)
    found = detections(ideal_maps(scene_truth(worlds)))
    once = np.ones((1, len(worlds)))
    for name, score in picture_scores(found, [world.triplets for world in worlds]).items():
        assert score.value(once) == pytest.approx([1.0]), name
    for seen, world in zip(found, worlds, strict=True):
        assert len(seen.persons) == len(seen.objects) == len(seen.triplets) == len(world.triplets)
        assert all(triplet.score == pytest.approx(1, abs=1e-3) for triplet in seen.triplets)


def test_score_of_a_triplet_is_the_product_of_its_parts() -> None:
    worlds = held_out_scenes(1, seed=0)
    maps = ideal_maps(scene_truth(worlds))
    maps.heat.clamp_(max=1.0)
    maps.actions.mul_(0)
    seen = detections(maps)[0]
    heat = torch.tensor(1.0).sigmoid().item()
    assert seen.persons[0].score == pytest.approx(heat)
    assert seen.triplets[0].score == pytest.approx(heat * heat / len(ACTIONS))


def test_loss_is_least_for_ideal_maps_and_rises_with_every_mistake() -> None:
    truth = scene_truth(held_out_scenes(8, seed=1))
    least = detection_loss(ideal_maps(truth), truth).item()
    assert least == pytest.approx(0, abs=1e-3)
    spoil: dict[str, Callable[[Maps], Any]] = {
        "heat": lambda maps: maps.heat.mul_(0.05),
        "boxes": lambda maps: maps.boxes.add_(0.05),
        "colours": lambda maps: maps.colours.copy_(maps.colours.roll(1, 2)),
        "actions": lambda maps: maps.actions.copy_(maps.actions.roll(1, 1)),
        "towards": lambda maps: maps.towards.add_(0.05),
    }
    for name, mistake in spoil.items():
        maps = ideal_maps(truth)
        mistake(maps)
        assert detection_loss(maps, truth).item() > least + 0.1, name


def test_focal_loss_by_hand() -> None:
    logits = torch.zeros(3)
    target = torch.tensor([1.0, 0.0, 0.5])
    log2 = np.log(2)
    expected = 0.25 * log2 + 0.25 * log2 + 0.5**4 * 0.25 * log2
    assert focal_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_truth_of_scenes_holds_what_is_planned() -> None:
    scene = sample_scene(3, n_interactions=1)
    truth = scene_truth([scene, sample_scene(4, n_interactions=2)])
    assert truth["present"].tolist() == [[True, False], [True, True]]
    triplet = scene.triplets[0]
    assert KINDS[truth["kinds"][0, 0]] == triplet.object
    assert ACTIONS[truth["actions"][0, 0]] == triplet.action
    colours = tuple(COLOUR_NAMES[n] for n in truth["colours"][0, 0])
    assert colours == (triplet.subject_colour, triplet.object_colour)
    torch.testing.assert_close(truth["boxes"][0, 0, 1], torch.tensor(triplet.object_box))


def test_roughened_pictures_stay_pictures_and_repeat_with_the_seed() -> None:
    images = torch.rand(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    rough = roughened(images, torch.Generator().manual_seed(1))
    assert torch.equal(rough, roughened(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(rough, roughened(images, torch.Generator().manual_seed(2)))
    assert rough.shape == images.shape
    assert rough.min() >= 0
    assert rough.max() <= 1


def test_detector_takes_any_size_and_stays_under_a_million_parameters() -> None:
    torch.manual_seed(0)
    detector = Detector().eval()
    assert sum(p.numel() for p in detector.parameters()) < 1_000_000
    assert len(detector.detect(torch.rand(2, 3, 64, 80))) == 2
    with pytest.raises(ValueError, match=r"expected pictures .* got \[3, 96, 96\]"):
        detector.detect(torch.rand(3, 96, 96))


def test_detector_is_the_same_from_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector((8, 8, 16, 16)).half().float().eval()
    detector.save_pretrained(tmp_path / "made" / "detector")
    loaded = Detector.from_pretrained(tmp_path / "made" / "detector")
    images = torch.rand(1, 3, 96, 96)
    assert torch.equal(detector(images).heat, loaded(images).heat)
    assert not loaded.training
    assert {p.name for p in (tmp_path / "made" / "detector").iterdir()} == {
        "detector.safetensors",
        "config.json",
    }


def test_detector_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    Detector((8, 8, 8, 8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["actions"][0] = "juggling"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a detector of the actions"):
        Detector.from_pretrained(tmp_path)


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:
    config = load_config(CONFIG, [])
    config |= {
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "export_to": str(folder / "detector"),
        "renders": 24,
        "model": {"widths": [8, 8, 8, 8]},
        "steps": 4,
        "batch_size": 4,
        "warmup_steps": 1,
        "mixed_precision": "no",
        "log_every": 1,
        "checkpoint_every": 2,
        "sample_every": 4,
    }
    return config | changes


def test_recipe_resumes_with_the_losses_of_an_unbroken_run(tmp_path: Path) -> None:
    unbroken = make_recipe(tiny_config(tmp_path)).train()
    exported = Detector.from_pretrained(tmp_path / "detector")
    again = make_recipe(tiny_config(tmp_path))
    again.resume(str(checkpoints(tmp_path / "run")[0]))
    assert again.step == 2
    assert again.train() == pytest.approx(unbroken[2:], abs=0)
    assert (tmp_path / "run" / "samples" / "000004.png").is_file()
    resumed = Detector.from_pretrained(tmp_path / "detector").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in exported.state_dict().items())


def test_packaged_detector_sees_what_is_in_renders() -> None:
    detector = Detector.from_pretrained(model_path("detector"))
    worlds = held_out_scenes(60, seed=11)
    scores = picture_scores(look_at_renders(worlds, detector, 30), [world.triplets for world in worlds])
    once = np.ones((1, len(worlds)))
    got = {name: float(score.value(once)[0]) for name, score in scores.items()}
    assert min(got.values()) > 0.97, got


def test_packaged_detector_follows_an_action_changed_in_place() -> None:
    detector = Detector.from_pretrained(model_path("detector"))
    worlds = held_out_scenes(20, seed=12)
    swaps = [swap(number, world, seed=0) for number, world in enumerate(worlds)]
    changed = []
    for s in swaps:
        for action in s.actions:
            triplets = list(worlds[s.scene].triplets)
            triplets[s.chosen] = replace(triplets[s.chosen], action=action)
            changed.append(replace(worlds[s.scene], triplets=tuple(triplets)))
    orders = [order for s in swaps for order in s.pictures]
    seen = dict(zip(orders, look_at_renders(changed, detector, 30), strict=True))
    seen |= {
        s.without: s_seen for s, s_seen in zip(swaps, look_at_renders(worlds, detector, 30), strict=True)
    }
    assert swap_scores(swaps, worlds, seen)["adapter"].value(np.ones((1, len(worlds))))[0] > 0.97


def test_packaged_detector_sees_nothing_where_nothing_is() -> None:
    detector = Detector.from_pretrained(model_path("detector"))
    flat = torch.full((1, 3, 96, 96), 0.8)
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for seen in detector.detect(torch.cat([flat, noise])):
        assert not any(triplet.score > 0.3 for triplet in seen.triplets)
