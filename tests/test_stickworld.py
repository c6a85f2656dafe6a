"""The renderer's ground truth is exact, and within a group only pose and contact tell actions apart."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from interactdiff.stickworld.objects import PAINTERS
from interactdiff.stickworld.poses import POSES
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import (
    ACTIONS,
    BACKGROUNDS,
    COLOURS,
    GROUPS,
    HELD_OUT,
    OBJECTS,
    PLACES,
    WorldScene,
    sample_scene,
)

SEEDS = range(40)


def pixels_apart(one: tuple[float, ...], other: tuple[float, ...], size: int = 96) -> float:
    """Largest distance between the edges of two boxes, in pixels."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) * size


def test_the_world_is_as_large_as_promised() -> None:
    assert len(ACTIONS) >= 8
    assert len(OBJECTS) >= 8
    assert len(COLOURS) >= 6
    assert len(BACKGROUNDS) >= 4
    assert sum(len(actions) >= 2 for actions in GROUPS.values()) >= 4
    assert set(POSES) == set(ACTIONS)
    assert set(PAINTERS) == set(OBJECTS)


def test_a_seed_draws_one_picture_and_another_seed_another() -> None:
    assert sample_scene(3) == sample_scene(3)
    first, again, other = (render(sample_scene(seed)).image for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [96, 128])
def test_boxes_are_tight_on_masks_and_where_they_were_planned(size: int) -> None:
    for seed in SEEDS:
        scene = sample_scene(seed)
        things = render(scene, size).things
        assert len(things) == 2 * len(scene.triplets)
        for thing in things:
            rows, columns = np.nonzero(thing.mask)
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.box == tuple(v / size for v in tight)
            assert thing.mask.shape == (size, size)
        for triplet, subject, obj in zip(scene.triplets, things[::2], things[1::2], strict=True):
            assert (subject.name, subject.colour) == ("person", triplet.subject_colour)
            assert (obj.name, obj.colour) == (triplet.object, triplet.object_colour)
            assert pixels_apart(subject.box, triplet.subject_box, size) < 3 * size / 96
            assert pixels_apart(obj.box, triplet.object_box, size) < 3 * size / 96


def test_everything_is_inside_the_frame() -> None:
    for seed in range(1000):
        for triplet in sample_scene(seed).triplets:
            for box in (triplet.subject_box, triplet.object_box):
                assert 0 <= box[0] < box[2] <= 1
                assert 0 <= box[1] < box[3] <= 1


@pytest.mark.parametrize("group", GROUPS)
def test_within_a_group_boxes_stay_and_the_picture_changes(group: str) -> None:
    scenes = [sample_scene(seed, 1) for seed in range(200)]
    scene = next(s for s in scenes if s.triplets[0].group == group)
    drawn = []
    for action in GROUPS[group]:
        triplet = replace(scene.triplets[0], action=action)
        drawn.append(render(replace(scene, triplets=(triplet,))))
    for other in drawn[1:]:
        assert pixels_apart(drawn[0].things[0].box, other.things[0].box) < 2
        assert drawn[0].things[1].box == other.things[1].box
    for n, one in enumerate(drawn):
        for other in drawn[n + 1 :]:
            changed = (np.abs(one.image.astype(int) - other.image).max(-1) > 40).sum()
            assert changed > 0.15 * one.things[0].mask.sum()


def test_planned_boxes_do_not_depend_on_the_action() -> None:
    by_action = {action: [] for action in ACTIONS}
    for seed in range(6000):
        for triplet in sample_scene(seed, 1).triplets:
            person, obj = np.array(triplet.subject_box), np.array(triplet.object_box)
            by_action[triplet.action].append(np.concatenate([person[2:] - person[:2], obj - person]))
    for actions in GROUPS.values():
        samples = [np.array(by_action[action]) for action in actions]
        for sample in samples[1:]:
            spread = samples[0].std(0) * np.sqrt(1 / len(sample) + 1 / len(samples[0]))
            assert np.all(np.abs(sample.mean(0) - samples[0].mean(0)) < 4.5 * spread + 1e-9)


def test_people_and_objects_face_both_ways() -> None:
    facing = [t.facing for seed in range(200) for t in sample_scene(seed).triplets]
    assert 0.35 < facing.count("left") / len(facing) < 0.65


def test_captions_say_what_is_there() -> None:
    for seed in SEEDS:
        scene = sample_scene(seed)
        for triplet in scene.triplets:
            for word in (triplet.action, triplet.object, triplet.subject_colour, triplet.object_colour):
                assert word in scene.caption
            assert triplet.action not in scene.caption_without_verb
            assert triplet.object in scene.caption_without_verb
    assert len({sample_scene(seed).caption.split()[0] for seed in SEEDS}) > 2


def test_the_wording_tells_neither_action_nor_group() -> None:
    """As it would if what words the caption were seeded like what draws the scene."""
    wordings: dict[str, Counter[str]] = {action: Counter() for action in ACTIONS}
    places = set()
    for seed in range(2000):
        scene = sample_scene(seed, n_interactions=1)
        place = max((p for p in PLACES[scene.background] if p in scene.caption), key=len)
        places.add(place)
        wordings[scene.triplets[0].action][f"{scene.background} {PLACES[scene.background].index(place)}"] += 1
    assert places == {place for ways in PLACES.values() for place in ways}
    for counts in wordings.values():  # some 200 scenes an action, half of them of each wording
        second = sum(n for way, n in counts.items() if not way.endswith("0"))
        assert 0.3 < second / counts.total() < 0.7


def test_a_scene_is_asked_for_in_its_own_words() -> None:
    scene: WorldScene = sample_scene(0, 1)
    triplet = scene.triplets[0]
    (asked,) = scene.interactions()
    assert asked.subject == f"person in {triplet.subject_colour}"
    assert asked.object == f"{triplet.object_colour} {triplet.object}"
    assert asked.action == triplet.action
    (plain,) = scene.interactions(colours=False, action=False)
    assert (plain.subject, plain.action, plain.object) == ("person", None, triplet.object)


def test_counts_can_be_asked_for_and_scoring_has_its_own_seeds() -> None:
    assert [len(sample_scene(seed, 2).triplets) for seed in range(5)] == [2] * 5
    assert {len(sample_scene(seed).triplets) for seed in range(30)} == {1, 2}
    assert sample_scene(HELD_OUT + 1) != sample_scene(1)
