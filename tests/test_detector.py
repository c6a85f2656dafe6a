import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from recipes import resume
from tiny_dit import tiny_autoencoder
from world_truth import perfect

from interactdiff.evaluation.attributes import head_accuracies
from interactdiff.evaluation.hoi import picture_scores
from interactdiff.evaluation.sampling import action_swap, detect_renders, held_out_scenes
from interactdiff.evaluation.world import swap_scores
from interactdiff.stickworld import model_path
from interactdiff.stickworld.attribute_reader import (
    OBJECT_HEADS,
    PERSON_HEADS,
)
from interactdiff.stickworld.detector import (
    KINDS,
    SIZE,
    STRIDE,
    Detections,
    Detector,
    Maps,
    cell_middles,
    located,
    paired,
)
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import ACTIONS, WorldScene
from interactdiff.training.detector import (
    as_pictures,
    attribute_loss,
    detection_loss,
    focal_loss,
    present_boxes,
    roughened,
    scene_truth,
    shaken,
)
from interactdiff.training.run import load_config, make_recipe
from interactdiff.training.run_folder import checkpoints

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "stickworld_detector.yaml"
GRID = SIZE // STRIDE
TINY = (8, 8, 8, 8)


def ideal_maps(truth: dict[str, torch.Tensor]) -> Maps:
    """What a perfect detector says: at every cell, the truth of the nearest person and object."""
    boxes, present = truth["boxes"], truth["present"]
    images = len(boxes)
    middles = cell_middles(GRID)
    maps = Maps(
        heat=torch.full((images, len(KINDS), GRID, GRID), -20.0),
        boxes=torch.zeros(images, 2, 4, GRID, GRID),
        actions=torch.zeros(images, len(ACTIONS) + 1, GRID, GRID),
        towards=torch.zeros(images, 2, GRID, GRID),
        attributes=tuple(
            {
                name: 20.0 * torch.nn.functional.one_hot(wanted[:, k].clamp(min=0), len(values))
                for k, (name, values) in enumerate(heads.items())
            }
            for role, heads in enumerate((PERSON_HEADS, OBJECT_HEADS))
            for wanted in [truth["attributes"][:, role][present[:, role]]]
        ),
    )
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    for image in range(images):
        for role in (0, 1):
            distance = (middles - centres[image, role, :, :, None, None]).square().sum(1)
            owner = distance.argmin(0)
            for n in present[image, role].nonzero().flatten().tolist():
                mine, box = owner == n, boxes[image, role, n]
                kind = 0 if role == 0 else int(truth["kinds"][image, n])
                cell = divmod(int(distance[n].argmin()), GRID)
                maps.heat[image, kind, cell[0], cell[1]] = 20.0
                here = torch.cat([middles - box[:2, None, None], box[2:, None, None] - middles])
                maps.boxes[image, role][:, mine] = here[:, mine]
                if role == 0:
                    maps.actions[image, truth["actions"][image, n]][mine] = 20.0
                    if (aim := int(truth["targets"][image, n])) >= 0:
                        towards = centres[image, 1, aim][:, None, None] - middles
                        maps.towards[image][:, mine] = towards[:, mine]
    return maps


def read(maps: Maps) -> list[Detections]:
    return paired(located(maps), maps)


def test_ideal_maps_are_read_as_the_scenes_that_they_are_of() -> None:
    scenes = held_out_scenes(40, seed=0)
    assert {len(scene.triplets) for scene in scenes} == {0, 1, 2, 3}
    found = read(ideal_maps(scene_truth(scenes)))
    once = np.ones((1, len(scenes)))
    scores = picture_scores(found, scenes)
    for name in ("hoi_map", "box_acc", "action_acc"):
        assert scores[name].value(once) == pytest.approx([1.0]), name
    for picture, scene in zip(found, scenes, strict=True):
        whole = perfect(scene)
        assert len(picture.persons) == len(whole.persons)
        assert len(picture.objects) == len(whole.objects)
        assert len(picture.triplets) == len(scene.triplets)
        assert sum(person.action is None for person in picture.persons) == sum(
            entity.name == "person" for entity in scene.entities
        )
        assert all(triplet.score == pytest.approx(1, abs=1e-3) for triplet in picture.triplets)


def test_score_of_a_triplet_is_the_product_of_its_parts() -> None:
    maps = ideal_maps(scene_truth([sample_scene(0, 1, 0)]))
    maps.heat.clamp_(max=1.0)
    maps.actions.fill_(-20)
    maps.actions[:, :4] = 0
    picture = read(maps)[0]
    heat = torch.tensor(1.0).sigmoid().item()
    assert picture.persons[0].score == pytest.approx(heat)
    assert picture.triplets[0].score == pytest.approx(heat * heat / 4)


def test_who_does_nothing_is_in_no_triplet() -> None:
    maps = ideal_maps(scene_truth([sample_scene(0, 1, 0)]))
    maps.actions.mul_(0)
    maps.actions[:, -1] = 0.1  # likeliest, and each action is likely enough
    picture = read(maps)[0]
    assert picture.persons[0].action is None
    assert picture.objects
    assert picture.triplets == ()


def test_loss_is_least_for_ideal_maps_and_rises_with_every_mistake() -> None:
    truth = scene_truth(held_out_scenes(8, seed=1))
    least = detection_loss(ideal_maps(truth), truth).item()
    assert least == pytest.approx(0, abs=1e-3)
    spoil: dict[str, Callable[[Maps], Any]] = {
        "heat": lambda maps: maps.heat.mul_(0.05),
        "boxes": lambda maps: maps.boxes.add_(0.05),
        "actions": lambda maps: maps.actions.copy_(maps.actions.roll(1, 1)),
        "towards": lambda maps: maps.towards.add_(0.05),
    }
    for name, mistake in spoil.items():
        maps = ideal_maps(truth)
        mistake(maps)
        assert detection_loss(maps, truth).item() > least + 0.1, name


def test_loss_of_attributes_counts_those_that_things_have() -> None:
    truth = scene_truth(held_out_scenes(16, seed=1))
    attributes = ideal_maps(truth).attributes
    assert attribute_loss(attributes, truth).item() == pytest.approx(0, abs=1e-3)
    for logits in attributes:
        for values in logits.values():
            kept = values.clone()
            values.copy_(values.roll(1, 1))
            assert attribute_loss(attributes, truth).item() > 10
            values.copy_(kept)
    wanted = truth["attributes"][:, 1][truth["present"][:, 1]]
    plain = wanted[:, list(OBJECT_HEADS).index("second_colour")] < 0
    assert plain.any()
    attributes[1]["second_colour"][plain] = torch.randn(int(plain.sum()), 4)
    assert attribute_loss(attributes, truth).item() == pytest.approx(0, abs=1e-3)


def test_focal_loss_by_hand() -> None:
    logits = torch.zeros(3)
    target = torch.tensor([1.0, 0.0, 0.5])
    log2 = np.log(2)
    expected = 0.25 * log2 + 0.25 * log2 + 0.5**4 * 0.25 * log2
    assert focal_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_truth_of_scenes_holds_what_is_planned() -> None:
    scene = sample_scene(3, n_interactions=1, n_entities=2)
    truth = scene_truth([scene, sample_scene(4, n_interactions=0, n_entities=1)])
    things = [[t for t in scene.things if (t.name == "person") == person] for person in (True, False)]
    triplet = scene.triplets[0]
    assert truth["present"].sum((1, 2)).tolist() == [4, 1]
    assert KINDS[truth["kinds"][0, 0]] == triplet.object
    assert ACTIONS[truth["actions"][0, 0]] == triplet.action
    assert truth["actions"][0, 1:].unique().tolist() == [len(ACTIONS)]
    assert truth["targets"][0].tolist() == [0, -1, -1, -1, -1]
    for role, heads in enumerate((PERSON_HEADS, OBJECT_HEADS)):
        assert truth["present"][0, role].sum() == len(things[role])
        for n, thing in enumerate(things[role]):
            torch.testing.assert_close(truth["boxes"][0, role, n], torch.tensor(thing.box))
            indices = dict(zip(heads, truth["attributes"][0, role, n].tolist(), strict=False))
            shown = {name: heads[name][index] for name, index in indices.items() if index >= 0}
            assert shown == thing.appearance.attributes()


def test_boxes_that_are_read_are_those_of_their_pictures_and_a_little_off() -> None:
    scenes = held_out_scenes(6, seed=4)
    for role, boxes in enumerate(present_boxes(scene_truth(scenes))):
        wanted = [
            (thing.box, n)
            for n, scene in enumerate(scenes)
            for thing in scene.things
            if (thing.name != "person") == bool(role)
        ]
        assert boxes[1].tolist() == [n for _, n in wanted]
        torch.testing.assert_close(boxes[0], torch.tensor([box for box, _ in wanted]))
        moved, pictures = shaken(boxes, torch.Generator().manual_seed(0))
        assert torch.equal(pictures, boxes[1])
        sides = (boxes[0][:, 2:] - boxes[0][:, :2]).repeat(1, 2)
        share = (moved - boxes[0]).abs() / sides
        assert 0.04 < share.max() <= 0.0601


def test_roughened_pictures_stay_pictures_and_repeat_with_the_seed() -> None:
    images = torch.rand(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    rough = roughened(images, torch.Generator().manual_seed(1))
    assert torch.equal(rough, roughened(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(rough, roughened(images, torch.Generator().manual_seed(2)))
    assert rough.shape == images.shape
    assert rough.min() >= 0
    assert rough.max() <= 1


def test_detector_takes_any_size_and_is_small() -> None:
    torch.manual_seed(0)
    detector = Detector().eval()
    assert sum(p.numel() for p in detector.parameters()) < 1_300_000
    assert len(detector.detect(torch.rand(2, 3, 64, 80))) == 2
    with pytest.raises(ValueError, match=r"expected pictures .* got \[3, 96, 96\]"):
        detector.detect(torch.rand(3, 96, 96))


def test_detector_is_the_same_from_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector((8, 8, 16, 16), 64, TINY).half().float().eval()
    detector.save_pretrained(tmp_path / "made" / "detector")
    loaded = Detector.from_pretrained(tmp_path / "made" / "detector")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(detector(images).heat, loaded(images).heat)
    assert loaded.detect(images) == detector.detect(images)
    assert loaded.size == 64
    assert not loaded.training
    assert {p.name for p in (tmp_path / "made" / "detector").iterdir()} == {
        "detector.safetensors",
        "config.json",
    }


def test_detector_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    Detector(TINY, reader_widths=TINY).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    for name, spoil in {
        "actions": lambda values: values.append("juggling"),
        "attributes of persons": lambda values: values.pop("hair"),
    }.items():
        config = json.loads(written)
        spoil(config[name])
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"expected a detector of the {name}"):
            Detector.from_pretrained(tmp_path)


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:
    config = load_config(CONFIG, [])
    config |= {
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "export_to": str(folder / "detector"),
        "renders": 24,
        "held_out": 4,
        "model": {"widths": TINY, "size": 64, "reader_widths": TINY},
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
    resume(again, str(checkpoints(tmp_path / "run")[0]))
    assert again.step == 2
    assert again.train(overwrite=True) == pytest.approx(unbroken[2:], abs=0)
    assert (tmp_path / "run" / "samples" / "000004.png").is_file()
    resumed = Detector.from_pretrained(tmp_path / "detector").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in exported.state_dict().items())


def test_pictures_pass_through_autoencoders_and_every_head_is_scored(tmp_path: Path) -> None:
    folders = [str(tmp_path / "vae"), str(tmp_path / "coarse_vae")]
    tiny_autoencoder(4).save_pretrained(folders[0])
    tiny_autoencoder(4, 3).save_pretrained(folders[1])
    recipe = make_recipe(tiny_config(tmp_path, autoencoders=folders))
    images = recipe.batch(0)["images"]
    vae = recipe.autoencoders[0]
    passed = recipe.autoencoded(images, vae)
    assert passed.shape == images.shape
    assert 0 <= passed.min() <= passed.max() <= 1
    noisy = [recipe.autoencoded(images, vae, torch.Generator().manual_seed(n)) for n in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], passed)
    assert not torch.equal(recipe.autoencoded(images, recipe.autoencoders[1]), passed)
    recipe.train()
    (row,) = map(json.loads, (tmp_path / "run" / "accuracy.jsonl").read_text().splitlines())
    assert list(row) == ["step", "renders", *folders]
    assert all({"person", "object"} <= set(row[name]) for name in ("renders", *folders))


def packaged(scenes: list[WorldScene]) -> list[Detections]:
    return detect_renders(scenes, Detector.from_pretrained(model_path("detector")), 30)


def test_packaged_detector_sees_what_is_in_renders() -> None:
    scenes = held_out_scenes(60, 11)
    found = packaged(scenes)
    once = np.ones((1, len(scenes)))
    got = {name: float(score.value(once)[0]) for name, score in picture_scores(found, scenes).items()}
    assert min(got.values()) > 0.97, got
    heads = head_accuracies(found, scenes)
    assert min(heads.values()) > 0.95, heads


def test_packaged_detector_reads_renders_through_the_packaged_autoencoder() -> None:
    """`accuracy.jsonl` of its recipe has the whole score, of 512 renders."""
    detector = Detector.from_pretrained(model_path("detector"))
    autoencoder: Any = AutoencoderTiny.from_pretrained(model_path("stickworld-dit") / "vae")
    scenes = held_out_scenes(60, 11)
    images = torch.stack([as_pictures(render(scene).image[None])[0] for scene in scenes])
    with torch.no_grad():
        drawn = autoencoder(2 * images - 1).sample.clamp(-1, 1) / 2 + 0.5
        found = detector.detect(drawn)
    assert -10 * (drawn - images).square().mean((1, 2, 3)).log10().mean() > 25  # dB
    heads = head_accuracies(found, scenes)
    assert min(heads.values()) > 0.9, heads


def test_packaged_detector_follows_an_action_changed_in_place() -> None:
    scenes = held_out_scenes(20, 12)
    swaps = [action_swap(n, scene, seed=0) for n, scene in enumerate(scenes) if scene.triplets]
    changed = []
    for swap in swaps:
        for action in swap.actions:
            triplets = list(scenes[swap.scene].triplets)
            triplets[swap.triplet] = replace(triplets[swap.triplet], action=action)
            changed.append(replace(scenes[swap.scene], triplets=tuple(triplets)))
    requests = [request for swap in swaps for request in swap.pictures]
    found = dict(zip(requests, packaged(changed), strict=True))
    as_they_are = packaged(scenes)
    found |= {swap.without: as_they_are[swap.scene] for swap in swaps}
    assert swap_scores(swaps, scenes, found)["adapter"].value(np.ones((1, len(scenes))))[0] > 0.97


def test_packaged_detector_sees_nothing_where_nothing_is() -> None:
    detector = Detector.from_pretrained(model_path("detector"))
    flat = torch.full((1, 3, detector.size, detector.size), 0.8)
    noise = torch.rand(flat.shape, generator=torch.Generator().manual_seed(0))
    for picture in detector.detect(torch.cat([flat, noise])):
        assert not any(triplet.score > 0.3 for triplet in picture.triplets)
