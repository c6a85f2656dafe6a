"""Scenes: everything that may be asked for, everything that may not, and JSON there and back."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interactdiff.scene import Box, Entity, Interaction, Scene, SceneError
from interactdiff.scene_forms import interactions_from_lists, interactions_from_text
from interactdiff.scene_schema import json_schema

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

DOCS = Path(__file__).parent.parent / "docs"
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
RIDING = Interaction("person", "riding", "bike", (0.3, 0.2, 0.62, 0.8), (0.28, 0.55, 0.7, 0.92))

edges = st.floats(0.0, 1.0)
spans = st.tuples(edges, edges).filter(lambda span: span[0] != span[1]).map(sorted)
boxes = st.tuples(spans, spans).map(lambda spans: (spans[0][0], spans[1][0], spans[0][1], spans[1][1]))
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
phrases = texts.filter(lambda text: text.strip() != "")
strengths = st.floats(0, 2)
regions = st.sampled_from(["between", "union"])
interactions = st.builds(Interaction, phrases, st.none() | phrases, phrases, boxes, boxes, strengths, regions)
entities = st.builds(Entity, phrases, boxes, strengths)
schedules = st.floats(0, 1) | st.sampled_from([(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), [0.5, 0.25, 0.25]])
sides = st.none() | st.integers(1, 512).map(lambda n: 8 * n)
scenes = st.builds(
    Scene,
    texts,
    st.lists(interactions, max_size=4).map(tuple),
    st.lists(entities, max_size=2).map(tuple),
    negative_prompt=texts,
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 1000),
    guidance_scale=st.none() | st.floats(0, 100),
    strength=strengths,
    schedule=schedules,
    fast=st.booleans(),
    width=sides,
    height=sides,
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


@given(scenes)
def test_json_there_and_back(scene: Scene) -> None:
    assert Scene.from_json(scene.to_json()) == scene
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@given(boxes, boxes)
def test_good_boxes_are_taken_and_the_action_lies_between_them(subject: Box, thing: Box) -> None:
    one = Interaction("person", None, "bike", subject, thing)
    assert (one.subject_box, one.object_box) == (subject, thing)
    for axis in (0, 1):
        low, high = one.between_box[axis], one.between_box[axis + 2]
        starts, ends = (subject[axis], thing[axis]), (subject[axis + 2], thing[axis + 2])
        assert (low, high) == tuple(sorted((max(starts), min(ends))))  # the overlap, or else the gap


@given(st.lists(st.floats(), max_size=6))
def test_a_box_is_taken_exactly_if_it_is_one(edges: list[float]) -> None:
    good = len(edges) == 4 and 0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1
    if good:
        Interaction("a", "b", "c", tuple(edges), WHOLE)
    else:
        with pytest.raises(SceneError, match=r"^object_box: expected .* got "):
            Interaction("a", "b", "c", WHOLE, tuple(edges))


def refusal(make: Callable[[Any], object], value: Any) -> str:
    """What the scene error says; a stand-in that is no worse if there is none."""
    try:
        make(value)
    except SceneError as error:
        return str(error)
    return "expected and got"


@given(anything)
def test_no_json_does_worse_than_a_scene_error(values: Any) -> None:
    for said in (
        refusal(Scene.from_dict, values),
        refusal(Interaction.from_dict, values),
        refusal(Scene.from_dict, {"prompt": "", "interactions": [values]}),
    ):
        assert "expected" in said
        assert "\n" not in said


@given(st.text(max_size=60))
def test_no_text_does_worse_than_a_scene_error(text: str) -> None:
    for read in (Interaction.parse, Scene.from_json):
        with pytest.raises(SceneError, match="expected"):
            read(text)


@given(st.text("|,. 0123456789-abn", max_size=60))
def test_the_command_line_form_is_read_or_refused(text: str) -> None:
    assert "expected" in refusal(Interaction.parse, text)


@given(st.builds(Interaction, *[st.text("abc é", min_size=1).filter(str.strip)] * 3, boxes, boxes))
def test_the_command_line_form_there_and_back(one: Interaction) -> None:
    said = [",".join(map(repr, box)) for box in (one.subject_box, one.object_box)]
    assert Interaction.parse("|".join([one.subject, one.action or "-", one.object, *said])) == one


def test_a_dash_leaves_the_action_open() -> None:
    assert Interaction.parse("person|-|bike|0,0,1,1|0,0,1,1").action is None


@pytest.mark.parametrize(
    ("subject", "thing", "between"),
    [
        ((0.0, 0.0, 0.2, 1.0), (0.6, 0.0, 1.0, 1.0), (0.2, 0.0, 0.6, 1.0)),  # disjoint: the gap
        ((0.0, 0.0, 1.0, 1.0), (0.2, 0.3, 0.4, 0.5), (0.2, 0.3, 0.4, 0.5)),  # nested: the inner one
        ((0.0, 0.0, 0.5, 1.0), (0.5, 0.2, 1.0, 0.8), (0.5, 0.2, 0.5, 0.8)),  # touching: no area
        ((0.3, 0.2, 0.62, 0.8), (0.28, 0.55, 0.7, 0.92), (0.3, 0.55, 0.62, 0.8)),  # overlapping
    ],
)
def test_between_box(subject: Box, thing: Box, between: Box) -> None:
    assert Interaction("a", "b", "c", subject, thing).between_box == between
    assert Interaction("a", "b", "c", thing, subject).between_box == between


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_boxes_may_be_lists_arrays_and_tensors(make) -> None:
    one = Interaction("a", "b", "c", make([0.25, 0.0, 0.5, 1.0]), WHOLE)
    assert one.subject_box == (0.25, 0.0, 0.5, 1.0)
    assert all(type(edge) is float for edge in one.subject_box)


@pytest.mark.parametrize("box", [None, "0,0,1,1", 1.0, {0: 0.0}, (0, 0, 1), (0, 0, 1, True), (0, 0, 1, "1")])
def test_what_is_no_box(box: Any) -> None:
    with pytest.raises(SceneError, match="subject_box: expected"):
        Interaction("a", "b", "c", box, WHOLE)


@pytest.mark.parametrize("phrase", ["", "  \n", None, 3, b"person", "\ud800"])
def test_what_is_no_phrase(phrase: Any) -> None:
    with pytest.raises(SceneError, match="subject: expected"):
        Interaction(phrase, "b", "c", WHOLE, WHOLE)
    with pytest.raises(SceneError, match="object: expected"):
        Interaction("a", "b", phrase, WHOLE, WHOLE)
    if phrase is not None:
        with pytest.raises(SceneError, match="action: expected"):
            Interaction("a", phrase, "c", WHOLE, WHOLE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("negative_prompt", 1),
        ("interactions", "person"),
        ("interactions", [RIDING.subject]),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", True),
        ("steps", 0),
        ("steps", 1001),
        ("guidance_scale", math.inf),
        ("strength", 2.01),
        ("strength", "1"),
        ("strength", 10**400),
        ("schedule", math.nan),
        ("schedule", -0.1),
        ("width", 100),
        ("height", 0),
        ("height", 8192),
    ],
)
def test_what_is_no_scene(field: str, value: Any) -> None:
    with pytest.raises(SceneError, match=rf"^{field}: expected .*, got "):
        Scene(**{"prompt": "a", field: value})


def test_messages_stay_short() -> None:
    with pytest.raises(SceneError) as raised:
        Interaction("a", "b", "c", list(range(10_000)), WHOLE)
    assert len(str(raised.value)) < 200


def test_lists_of_unequal_length_are_refused_with_their_lengths() -> None:
    made = interactions_from_lists(["person"], [None], ["bike"], [WHOLE], [WHOLE])
    assert made == (Interaction("person", None, "bike", WHOLE, WHOLE),)
    with pytest.raises(SceneError, match="1 subject_phrases, 2 action_phrases, 1 object_phrases"):
        interactions_from_lists(["person"], ["riding", "riding"], ["bike"], [WHOLE], [WHOLE])
    with pytest.raises(SceneError, match="subject_phrases: expected a list, got 'person'"):
        interactions_from_lists("person", ["riding"], ["bike"], [WHOLE], [WHOLE])
    with pytest.raises(SceneError, match="interaction 2: object: expected a phrase"):
        interactions_from_lists(["a", "a"], ["b", "b"], ["c", ""], [WHOLE] * 2, [WHOLE] * 2)


def test_the_union_region_is_the_smallest_box_around_both() -> None:
    left, right = (0.1, 0.3, 0.4, 0.9), (0.6, 0.2, 0.9, 0.5)
    assert Interaction("a", "b", "c", left, right).action_box == (0.4, 0.3, 0.6, 0.5)
    assert Interaction("a", "b", "c", left, right, action_region="union").action_box == (0.1, 0.2, 0.9, 0.9)
    assert Interaction("a", "b", "c", left, right).action_box_in("union") == (0.1, 0.2, 0.9, 0.9)
    assert Interaction("a", "b", "c", left, right, action_region="between").action_box_in("union")[0] == 0.4


def test_options_follow_the_command_line_s_form() -> None:
    text = "person|riding|bike|0.3,0.2,0.62,0.8|0.28,0.55,0.7,0.92"
    assert Interaction.parse(text) == RIDING
    changed = Interaction.parse(text + "|strength=0.5| action_region=union")
    assert (changed.strength, changed.action_region) == (0.5, "union")
    assert Entity.parse("red ball|0,0,1,1|strength=2") == Entity("red ball", WHOLE, 2.0)
    for kind, wrong, message in (
        (Interaction, text + "|strength=3", "strength: expected a number from 0 to 2, got 3.0"),
        (Interaction, text + "|strength=much", "strength: expected a number, got 'much'"),
        (
            Interaction,
            text + "|action_region=around",
            "action_region: expected between or union, got 'around'",
        ),
        (Interaction, text + "|colour=red", "expected five parts, .*, got 6"),
        (Entity, "red ball", r"expected two parts, phrase\|x0,y0,x1,y1, got 1"),
        (Entity, "red ball|0,0,1,1|action_region=union", "expected two parts, .* got 3"),
        (Entity, "|0,0,1,1", "phrase: expected a phrase, got ''"),
        (Entity, "ball|0.5,0,0.5,1", "box: expected x0 < x1, got x0 = 0.5 and x1 = 0.5"),
    ):
        with pytest.raises(SceneError, match=f"^{message}"):
            kind.parse(wrong)


def test_text_of_the_automatic1111_extension() -> None:
    text = "person = riding=bike; cat=-=dog;"
    made = interactions_from_text(text, [WHOLE, WHOLE], [WHOLE, RIDING.object_box])
    assert made[0] == Interaction("person", "riding", "bike", WHOLE, WHOLE)
    assert made[1] == Interaction("cat", None, "dog", WHOLE, RIDING.object_box)
    with pytest.raises(SceneError, match=r"^interaction 2: expected subject=action=object, got ' cat=dog'$"):
        interactions_from_text("a=b=c; cat=dog", [WHOLE] * 2, [WHOLE] * 2)
    with pytest.raises(SceneError, match="expected lists of equal length, got 1 subject_phrases"):
        interactions_from_text("a=b=c", [WHOLE] * 2, [WHOLE] * 2)


def test_shares_of_a_schedule_without_decay_are_one_share() -> None:
    assert Scene("a", schedule=(0.25, 0.0, 0.75)) == Scene("a", schedule=0.25)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": "a", "seed": ' + "1" * 5000 + "}"])
def test_absurd_json_is_refused(text: str) -> None:
    with pytest.raises(SceneError, match="nested too deep or digits too many"):
        Scene.from_json(text)


def test_files_that_are_no_text_and_no_files(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(
        SceneError, match=r"bytes\.json: expected JSON text in UTF-8, got other bytes at byte 12"
    ):
        Scene.from_file(tmp_path / "bytes.json")
    with pytest.raises(SceneError, match="expected a scene file, got"):
        Scene.from_file(tmp_path)
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}')
    assert Scene.from_file(tmp_path / "bom.json") == Scene("a")


def test_the_shipped_schema_is_the_one_of_the_code() -> None:
    assert json.loads((DOCS / "scene.schema.json").read_text(encoding="utf-8")) == json_schema()


def test_the_documented_example_is_a_scene() -> None:
    text = (DOCS / "scene.md").read_text(encoding="utf-8")
    example = text.split("```json\n")[1].split("```")[0]
    scene = Scene.from_json(example)
    assert (len(scene.interactions), len(scene.entities)) == (2, 1)
    assert scene.interactions[1].action is None
