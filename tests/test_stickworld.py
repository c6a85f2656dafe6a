"""The renderer's ground truth is exact, and within a group only pose and contact tell actions apart."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from interactdiff.scene import Box
from interactdiff.stickworld.appearance import COLOURS, Appearance, PersonAppearance
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.objects import PAINTERS
from interactdiff.stickworld.poses import POSES
from interactdiff.stickworld.render import Rendering, Thing, render
from interactdiff.stickworld.world import ACTIONS, BACKGROUNDS, GROUPS, HELD_OUT, OBJECTS, WorldScene

SEEDS = range(60)


def pixels_apart(one: Box, other: Box, size: int = 96) -> float:
    """Largest distance between the edges of two boxes, in pixels."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) * size


def alone(group: str) -> WorldScene:
    """A scene of one interaction of a group and nothing else."""
    scenes = (sample_scene(seed, 1, 0) for seed in range(200))
    return next(scene for scene in scenes if scene.triplets[0].group == group)


def each_action(scene: WorldScene, size: int = 96) -> list[Rendering]:
    """A scene of one interaction with each action of its group."""
    return [
        render(replace(scene, triplets=(replace(scene.triplets[0], action=action),)), size)
        for action in GROUPS[scene.triplets[0].group]
    ]


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
    assert first.shape == (128, 128, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [96, 128, 192])
def test_boxes_are_tight_on_masks_and_where_they_were_planned(size: int) -> None:
    for seed in SEEDS:
        scene = sample_scene(seed)
        things = render(scene, size).things
        assert len(things) == 2 * len(scene.triplets) + len(scene.entities)
        for thing, planned in zip(things, scene.things, strict=True):
            rows, columns = np.nonzero(thing.mask)
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.box == tuple(v / size for v in tight)
            assert thing.mask.shape == (size, size)
            assert (thing.name, thing.appearance) == (planned.name, planned.appearance)
            assert pixels_apart(thing.box, planned.box, size) < 3 * size / 96
        for triplet, subject, thing in zip(scene.triplets, things[::2], things[1::2], strict=False):
            assert (subject.name, subject.colour) == ("person", triplet.subject_colour)
            assert (thing.name, thing.colour) == (triplet.object, triplet.object_colour)


def test_everything_is_inside_the_frame() -> None:
    for seed in range(1000):
        for thing in sample_scene(seed).things:
            assert 0 <= thing.box[0] < thing.box[2] <= 1
            assert 0 <= thing.box[1] < thing.box[3] <= 1


def test_counts_are_those_of_the_issue_and_can_be_given() -> None:
    scenes = [sample_scene(seed) for seed in range(400)]
    assert {len(scene.triplets) for scene in scenes} == {0, 1, 2, 3}
    assert {len(scene.entities) for scene in scenes} == {0, 1, 2}
    assert all(scene.things for scene in scenes)
    lone = [entity.name for scene in scenes for entity in scene.entities]
    assert 0.2 < lone.count("person") / len(lone) < 0.5
    assert set(lone) == {"person", *OBJECTS}
    for triplets in range(4):
        for entities in range(3):
            scene = sample_scene(7, triplets, entities)
            assert len(scene.triplets) == triplets
            assert len(scene.entities) == max(entities, triplets == 0)
    assert sample_scene(HELD_OUT + 1) != sample_scene(1)


def test_layouts_are_as_wide_as_what_a_user_draws() -> None:
    """Small and large persons, and objects that overlap most of their riders or hardly any."""
    scenes = [sample_scene(seed) for seed in range(1500)]
    heights = [t.subject_box[3] - t.subject_box[1] for scene in scenes for t in scene.triplets]
    assert min(heights) < 0.25
    assert max(heights) > 0.8
    covered = [
        (min(t.subject_box[3], t.object_box[3]) - t.object_box[1]) / (t.object_box[3] - t.object_box[1])
        for scene in scenes
        for t in scene.triplets
        if t.group == "atop"
    ]
    assert min(covered) < 0.25
    assert np.mean(np.array(covered) > 0.5) > 0.1


@pytest.mark.parametrize("group", GROUPS)
def test_within_a_group_boxes_stay_and_the_picture_changes(group: str) -> None:
    drawn = each_action(alone(group))
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
        for triplet in sample_scene(seed, 1, 0).triplets:
            person, thing = np.array(triplet.subject_box), np.array(triplet.object_box)
            by_action[triplet.action].append(np.concatenate([person[2:] - person[:2], thing - person]))
    for actions in GROUPS.values():
        samples = [np.array(by_action[action]) for action in actions]
        for sample in samples[1:]:
            spread = samples[0].std(0) * np.sqrt(1 / len(sample) + 1 / len(samples[0]))
            assert np.all(np.abs(sample.mean(0) - samples[0].mean(0)) < 4.5 * spread + 1e-9)


def test_people_and_objects_face_both_ways() -> None:
    facing = [t.facing for seed in range(200) for t in sample_scene(seed).triplets]
    assert 0.35 < facing.count("left") / len(facing) < 0.65


def eroded(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose eight neighbours are in it: what is behind does not shine through there."""
    for axis in (0, 1):
        mask = mask & np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask


def test_the_background_varies_apart_from_what_draws_the_scene() -> None:
    """Its variations change nothing of the things, and are not those of the scene's own random numbers."""
    for seed in range(8):
        scene = sample_scene(seed)
        one, other = render(scene), render(replace(scene, seed=seed + 1000))
        inside = np.any([eroded(thing.mask) for thing in one.things], 0)
        assert not np.array_equal(one.image, other.image)
        assert inside.any()
        same = (one.image[inside] == other.image[inside]).all(-1)
        assert same.mean() > 0.99  # but for gaps narrower than a pixel, as between locks of hair
        assert scene.background_seed != scene.seed
        assert scene.background_seed != sample_scene(seed + 1).background_seed


def drawn_alike(one: Thing, other: Thing) -> bool:
    return (one.name, one.appearance) == (other.name, other.appearance)


def test_the_same_persons_and_objects_are_drawn_into_another_scene() -> None:
    one, other = sample_scene(1, 2, 1), sample_scene(2, 2, 1)
    one = replace(one, entities=(replace(other.entities[0], appearance=other.entities[0].appearance),))
    looks = [thing.appearance for thing in one.things]
    things = render(other, 128, looks).things
    assert [thing.appearance for thing in things] == looks
    assert [thing.box for thing in things][1::2] == [thing.box for thing in render(other).things][1::2]
    assert np.array_equal(render(other, 128, looks).image, render(other.with_appearances(tuple(looks))).image)
    kept = render(other, 128, [None] * len(looks))
    assert all(map(drawn_alike, kept.things, render(other).things))
    assert np.array_equal(kept.image, render(other).image)


def test_appearances_that_do_not_fit_the_things_are_refused() -> None:
    scene = sample_scene(1, 1, 0)
    with pytest.raises(ValueError, match="expected 2 appearances, got 1"):
        render(scene, 96, [None])
    with pytest.raises(ValueError, match="expected an appearance of a person, got a Appearance"):
        render(scene, 96, [Appearance("red"), None])
    with pytest.raises(ValueError, match=f"of a {scene.triplets[0].object}, got a PersonAppearance"):
        render(scene, 96, [None, PersonAppearance("red")])


def test_a_scene_is_asked_for_in_its_own_words() -> None:
    scene = sample_scene(0, 1, 2)
    triplet = scene.triplets[0]
    (asked,) = scene.interactions()
    assert asked.subject == f"person in {triplet.subject_colour}"
    assert asked.object == f"{triplet.object_colour} {triplet.object}"
    assert asked.action == triplet.action
    (plain,) = scene.interactions(colours=False, action=False)
    assert (plain.subject, plain.action, plain.object) == ("person", None, triplet.object)
    for entity, item in zip(scene.entities, scene.lone_entities(), strict=True):
        assert item.box == entity.box
        assert entity.appearance.colour in item.phrase
        assert entity.name in item.phrase
    assert [item.phrase for item in scene.lone_entities(colours=False)] == [e.name for e in scene.entities]


def test_the_world_is_bit_for_bit_that_of_the_packaged_models() -> None:
    """Pictures, captions, phrases, masks and boxes of 200 scenes, as when the models were trained."""
    digest = hashlib.sha256()
    for seed in [*range(150), *range(HELD_OUT, HELD_OUT + 50)]:
        scene = sample_scene(seed)
        drawn = render(scene)
        digest.update(drawn.image.tobytes())
        items = (scene.interactions(), scene.lone_entities())
        for words in (scene.caption, scene.caption_without_verb, repr(items)):
            digest.update(words.encode())
        for thing in drawn.things:
            digest.update(thing.mask.tobytes())
            digest.update(repr(thing.box).encode())
    assert digest.hexdigest() == "e6d838d626a5ca6eef581a3af0d319842eaa9a41028c251277aa5458992697cd"
