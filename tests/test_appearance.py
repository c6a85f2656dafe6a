"""What persons and objects look like: independent of all else, the same wherever they are, and in words."""

import random
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from interactdiff.stickworld.appearance import (
    COLOURS,
    HAIR_COLOURS,
    HEADWEAR,
    OBJECT_ATTRIBUTES,
    PERSON_ATTRIBUTES,
    SECOND_COLOURS,
    SKINS,
    TROUSERS,
    Appearance,
    PersonAppearance,
    sample_object_appearance,
    sample_person_appearance,
)
from interactdiff.stickworld.captions import NAMED, PLACES, caption
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import ACTIONS, GROUPS, WorldScene

SCENES = [sample_scene(seed, 1, 1) for seed in range(3000)]
PALETTES = (COLOURS, SECOND_COLOURS, HAIR_COLOURS, TROUSERS, SKINS)
WORDS = {"stripes": ("striped", "stripes"), "dots": ("dotted", "dots"), "checks": ("checked", "checks")}


def test_there_are_as_many_looks_as_promised() -> None:
    assert len(PERSON_ATTRIBUTES["hair"]) >= 4
    assert len(PERSON_ATTRIBUTES["hair_colour"]) >= 4
    assert len(HEADWEAR) == 4
    assert "none" in HEADWEAR
    assert set(PERSON_ATTRIBUTES["pattern"]) == {"plain", "stripes", "dots", "checks", "star"}
    assert set(OBJECT_ATTRIBUTES["pattern"]) == {"plain", "stripes", "dots", "star"}
    assert len(TROUSERS) == len(SKINS) == 3
    assert {field.name for field in fields(PersonAppearance)} == {"colour", *PERSON_ATTRIBUTES}
    assert {field.name for field in fields(Appearance)} == {"colour", *OBJECT_ATTRIBUTES}


def test_attributes_are_those_that_can_be_seen() -> None:
    rng = random.Random(0)
    for _ in range(300):
        person, thing = sample_person_appearance(rng), sample_object_appearance(rng)
        for look, values in ((person, PERSON_ATTRIBUTES), (thing, OBJECT_ATTRIBUTES)):
            shown = look.attributes()
            assert next(iter(shown)) == "colour"
            assert all(shown[name] in values[name] for name in shown if name != "colour")
            assert ("second_colour" in shown) == (look.pattern != "plain")
            if look.second_colour is not None:
                assert look.second_colour != look.colour
        assert ("headwear_colour" in person.attributes()) == (person.headwear != "none")
    assert Appearance("red").attributes() == {"colour": "red", "pattern": "plain"}
    assert "headwear_colour" not in PersonAppearance("red").attributes()


def independent(one: list[str], other: list[str]) -> bool:
    """Whether a table of counts is what independence makes of it, by chi-square with five sigmas to spare."""
    rows, columns = sorted(set(one)), sorted(set(other))
    counts = Counter(zip(one, other, strict=True))
    table = np.array([[counts[row, column] for column in columns] for row in rows], dtype=float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    freedom = (len(rows) - 1) * (len(columns) - 1)
    return float(((table - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def told_by() -> dict[str, list[str]]:
    """What an appearance must not depend on, for each scene."""

    def place(scene: WorldScene) -> str:
        return max((words for words in PLACES[scene.background] if words in scene.caption), key=len)

    triplets = [scene.triplets[0] for scene in SCENES]
    return {
        "action": [triplet.action for triplet in triplets],
        "group": [triplet.group for triplet in triplets],
        "object": [triplet.object for triplet in triplets],
        "facing": [triplet.facing for triplet in triplets],
        "height": [f"{5 * (t.subject_box[3] - t.subject_box[1]):.0f}" for t in triplets],
        "place": [f"{4 * t.subject_box[0]:.0f}" for t in triplets],
        "background": [scene.background for scene in SCENES],
        "wording": [place(scene) for scene in SCENES],
        "verbs": [" ".join(scene.caption.split()[:2]) for scene in SCENES],
    }


def test_independence_can_be_refuted() -> None:
    actions = [scene.triplets[0].action for scene in SCENES]
    assert not independent(actions, [scene.triplets[0].group for scene in SCENES])
    rng = random.Random(0)
    slightly = [action if rng.random() < 0.1 else rng.choice(ACTIONS) for action in actions]
    assert not independent(actions, slightly)


def test_appearance_depends_on_nothing_else() -> None:
    others = told_by()
    del others["verbs"]  # "someone in" and the like: a caption begins with what is named of the person
    persons = [scene.triplets[0].subject_appearance for scene in SCENES]
    objects = [scene.triplets[0].object_appearance for scene in SCENES]
    for name, other in others.items():
        for attribute in ("colour", *PERSON_ATTRIBUTES):
            assert independent([str(getattr(p, attribute)) for p in persons], other), (name, attribute)
        for attribute in ("colour", *OBJECT_ATTRIBUTES):
            assert independent([str(getattr(o, attribute)) for o in objects], other), (name, attribute)
    assert independent([p.colour for p in persons], [o.colour for o in objects])
    assert independent([str(p.pattern) for p in persons], [str(o.pattern) for o in objects])


def test_the_wording_tells_neither_action_nor_group() -> None:
    """As it would if what words the caption were seeded like what draws the scene."""
    actions = [scene.triplets[0].action for scene in SCENES]
    groups = [scene.triplets[0].group for scene in SCENES]
    others = told_by()
    for wording in (others["verbs"], [f"{len(scene.described.things[0].attributes)}" for scene in SCENES]):
        common = {words for words, n in Counter(wording).items() if n > 60}
        grouped = [words if words in common else "other" for words in wording]
        assert independent(actions, grouped)
        assert independent(groups, grouped)
    for place in (0, 1):
        first = [str(PLACES[s.background][place] in s.caption) for s in SCENES]
        assert independent(actions, first)
    assert {w for w in others["wording"]} == {place for ways in PLACES.values() for place in ways}


def palette(image: np.ndarray, mask: np.ndarray) -> set[tuple[int, int, int]]:
    """The colours of clothes, hair and skin that at least two pixels of a thing have exactly."""
    known = {colour for colours in PALETTES for colour in colours.values()}
    counts = Counter(map(tuple, image[mask].tolist()))
    return {colour for colour, n in counts.items() if n >= 2 and colour in known}


def colours_of(look: Appearance) -> set[tuple[int, int, int]]:
    colours = {COLOURS[look.colour]}
    if look.second_colour is not None:
        colours.add(SECOND_COLOURS[look.second_colour])
    if isinstance(look, PersonAppearance):
        colours |= {HAIR_COLOURS[str(look.hair_colour)], TROUSERS[str(look.trousers)], SKINS[str(look.skin)]}
        if look.headwear_colour is not None:
            colours.add(COLOURS[look.headwear_colour])
    return colours


@pytest.mark.parametrize("size", [128, 192])
def test_a_person_keeps_its_colours_in_every_pose_and_size(size: int) -> None:
    rng = random.Random(1)
    for group, actions in GROUPS.items():
        scene = next(s for s in SCENES if s.triplets[0].group == group)
        scene = replace(scene, entities=())
        for _ in range(3):
            look = sample_person_appearance(rng)
            for action in actions:
                acting = replace(scene, triplets=(replace(scene.triplets[0], action=action),))
                drawn = render(acting, size, [look, None])
                shown = palette(drawn.image, drawn.things[0].mask)
                assert shown <= colours_of(look), (action, look)
                # hair is no whole pixel wide where little of it is seen under a hat
                hidden = set() if size > 128 else {HAIR_COLOURS[str(look.hair_colour)]}
                assert colours_of(look) - shown <= hidden, (action, look)


def test_every_attribute_can_be_seen() -> None:
    """Another value of any attribute changes the picture, within the thing alone."""
    rng = random.Random(2)
    scene = replace(SCENES[0], entities=())
    for number, values in ((0, PERSON_ATTRIBUTES), (1, OBJECT_ATTRIBUTES)):
        look = scene.things[number].appearance
        look = replace(look, colour="red", pattern="dots", second_colour="white")
        if isinstance(look, PersonAppearance):
            look = replace(look, headwear="cap", headwear_colour="green")
        looks: list[Appearance | None] = [None, None]
        looks[number] = look
        before = render(scene, 128, looks)
        for attribute in ("colour", *values):
            choices = COLOURS if attribute == "colour" else values[attribute]
            other = rng.choice([v for v in choices if v not in (getattr(look, attribute), "none", "plain")])
            looks[number] = replace(look, **{attribute: other})
            after = render(scene, 128, looks)
            changed = (before.image != after.image).any(-1)
            assert changed.sum() > 5, attribute
            near = before.things[number].mask | after.things[number].mask
            for axis in (0, 1):
                near = near | np.roll(near, 1, axis) | np.roll(near, -1, axis)
            assert not (changed & ~near).any(), attribute


def said(value: str, words: str) -> bool:
    """Whether an attribute's value is among words."""
    if value == "none":
        return "no hat" in words
    return any(word in words.replace(",", "").split() or word in words for word in WORDS.get(value, (value,)))


def test_captions_say_what_is_there() -> None:
    for seed in range(60):
        scene = sample_scene(seed)
        for triplet in scene.triplets:
            for word in (triplet.action, triplet.object, triplet.subject_colour, triplet.object_colour):
                assert word in scene.caption
            assert triplet.action not in scene.caption_without_verb
            assert triplet.object in scene.caption_without_verb
    assert len({sample_scene(seed).caption.split()[0] for seed in range(60)}) > 2


def test_spans_are_the_words_of_their_things() -> None:
    for seed in range(400):
        scene = sample_scene(seed)
        described = scene.described
        ends = sorted(thing.span for thing in described.things)
        assert all(before[1] <= after[0] for before, after in pairwise(ends))
        for thing, shown in zip(described.things, scene.things, strict=True):
            words = described.text[slice(*thing.span)]
            assert words.split()[0] in ("a", "an", "someone")
            assert thing.name == shown.name
            assert thing.name == "person" or thing.name in words.split()
            assert thing.attributes.items() <= shown.appearance.attributes().items()
            for value in thing.attributes.values():
                assert said(value, words), (value, words)
        outside = described.text
        for first, last in reversed(ends):
            outside = outside[:first] + outside[last:]
        assert not any(said(colour, outside) for colour in COLOURS)


def test_attributes_that_are_not_named_are_not_in_the_words() -> None:
    for seed in range(400):
        described = sample_scene(seed).described
        for thing in described.things:
            if thing.name != "person":
                continue
            words = described.text[slice(*thing.span)]
            for name in ("hair", "hair_colour", "skin", "trousers"):
                if name not in thing.attributes:
                    noun = "hair" if name.startswith("hair") else name
                    values = PERSON_ATTRIBUTES[name]
                    assert not any(f"{value} {noun}" in words for value in values), (name, words)
            if "pattern" not in thing.attributes:
                assert not any(word in words for ways in WORDS.values() for word in ways)


def test_each_attribute_is_named_about_a_quarter_of_the_time() -> None:
    named: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for scene in SCENES:
        for thing, shown in zip(scene.described.things, scene.things, strict=True):
            for name, value in shown.appearance.attributes().items():
                key = "plain pattern" if (name, value) == ("pattern", "plain") else name
                total[key] += 1
                named[key] += name in thing.attributes
    shares = {name: named[name] / total[name] for name in total}
    assert shares.pop("colour") == 1
    assert 0.08 < shares.pop("plain pattern") < 0.2  # half as often, as there is less to say
    for name in ("second_colour", "headwear_colour"):  # said with the pattern, and with the hat
        assert 0.08 < shares.pop(name) < NAMED
    assert set(shares) == {"pattern", "hair", "hair_colour", "headwear", "trousers", "skin"}
    assert all(abs(share - NAMED) < 0.04 for share in shares.values()), shares


def test_what_a_caption_leaves_out_can_be_told() -> None:
    scene = SCENES[0]
    for seed in range(30):
        bare = caption(scene, random.Random(seed), verbs=False, colours=False, place=False)
        assert bare.actions == (None,)
        assert bare.background is None
        assert scene.triplets[0].action not in bare.text
        assert not any(words in bare.text for words in PLACES[scene.background])
        assert all("colour" not in thing.attributes for thing in bare.things)
        whole = caption(scene, random.Random(seed))
        assert whole.actions == (scene.triplets[0].action,)
        assert whole.background == scene.background
