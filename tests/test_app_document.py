"""The canvas and its forms: a scene's items, text and a table say the same, both ways."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interactdiff import Entity, Interaction, Scene, SceneError
from interactdiff.app.canvas_items import CanvasBox, CanvasLink
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES

PERSON, BIKE = (0.1, 0.1, 0.5, 0.8), (0.05, 0.5, 0.7, 0.95)
RIDING = Document(
    (CanvasBox("t1", "person", PERSON), CanvasBox("t2", "bike", BIKE)),
    (CanvasLink("l1", "t1", "t2", "riding"),),
    aspect=1.5,
)

words = st.text("abc de", min_size=1, max_size=8).map(str.strip).filter(bool)
edges = st.tuples(*[st.integers(0, 98)] * 2).map(lambda two: (min(two) / 100, (max(two) + 1) / 100))
boxes = st.tuples(edges, edges).map(lambda sides: (sides[0][0], sides[1][0], sides[0][1], sides[1][1]))
strengths = st.sampled_from([0.0, 0.5, 1.0, 2.0])
regions = st.sampled_from([None, "between", "union"])
interactions = st.builds(Interaction, words, st.none() | words, words, boxes, boxes, strengths, regions)
entities = st.builds(Entity, words, boxes, strengths)
scenes = st.builds(
    Scene,
    st.just("a"),
    st.lists(interactions, max_size=4).map(tuple),
    st.lists(entities, max_size=3).map(tuple),
)


@given(scenes)
def test_every_form_of_a_scene_is_the_scene(scene: Scene) -> None:
    document = Document().with_scene(scene)
    wanted = (scene.interactions, scene.entities)
    assert document.items == wanted
    assert Document.from_value(document.to_value()) == document
    assert document.with_table(document.to_table()).items == wanted
    assert document.with_text(document.to_text()).items == wanted


def test_a_person_who_does_two_things_is_one_box() -> None:
    scene = Scene(
        "a",
        (
            Interaction("person", "riding", "bike", PERSON, BIKE),
            Interaction("person", "holding", "cup", PERSON, (0.6, 0.1, 0.7, 0.2)),
        ),
    )
    document = Document().with_scene(scene)
    assert [box.phrase for box in document.boxes] == ["person", "bike", "cup"]
    assert {link.subject for link in document.links} == {"t1"}
    assert document.to_text() == "person=riding=bike\nperson=holding=cup"
    renamed = document.with_text("person=riding=bike\nchild=holding=cup")  # of one line alone: they part
    assert [row.words for row in renamed.rows] == [("person", "riding", "bike"), ("child", "holding", "cup")]
    assert renamed.rows[1].subject_box == PERSON


def test_text_renames_removes_reorders_and_places_what_is_new() -> None:
    document = RIDING.with_text("man=pushing=bike")
    assert document.rows[0].words == ("man", "pushing", "bike")
    assert (document.rows[0].subject_box, document.rows[0].object_box) == (PERSON, BIKE)
    assert document.boxes[1].id == "t2"  # what stays keeps its id
    assert document.aspect == 1.5
    more = RIDING.with_text("dog=chasing=cat; person=riding=bike;\nball")
    assert [row.words for row in more.rows] == [
        ("dog", "chasing", "cat"),
        ("person", "riding", "bike"),
        ("ball", "", None),
    ]
    assert more.rows[1].subject_box == PERSON  # by its words, though another line stands first now
    assert len({box.box for box in more.boxes}) == 5  # nothing new lies under anything else
    assert RIDING.with_text("").boxes == ()
    begun = Document((CanvasBox("t1", "person", PERSON),)).with_text("person=riding=bike\nball")
    assert begun.rows[0].subject_box == PERSON  # the lone person acts now, and is not renamed to a ball
    assert begun.rows[1].subject_box != PERSON
    again = RIDING.with_text("person=riding=bike\nperson=holding=cup")
    assert [box.phrase for box in again.boxes].count("person") == 1  # a phrase that is there is the same box


def test_a_line_that_is_no_line_is_named() -> None:
    with pytest.raises(SceneError, match=r"line 2: expected subject=action=object, or a phrase, got 'a=b'"):
        RIDING.with_text("person=riding=bike\na=b")


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (3, "0.1, 0.2", "row 1: subject box: expected four numbers x0,y0,x1,y1, got 2 in '0.1, 0.2'"),
        (3, "0.5,0.2,0.1,0.9", "row 1: subject box: expected x0 < x1, got x0 = 0.5 and x1 = 0.1"),
        (4, "", "row 1: expected an object and its box, or neither, got one of them"),
        (5, "much", "row 1: strength: expected a number from 0 to 2, got 'much'"),
        (6, "left", "row 1: region: expected between, union or nothing, got 'left'"),
    ],
)
def test_a_cell_that_is_wrong_is_named(column: int, cell: str, message: str) -> None:
    table = RIDING.to_table()
    table[0][column] = cell
    with pytest.raises(SceneError) as refused:
        RIDING.with_table(table)
    assert str(refused.value) == message


def test_a_table_takes_empty_rows_and_new_ones() -> None:
    table = [*RIDING.to_table(), [""] * 7, ["ball", "", "", "0.8,0.8,0.9,0.9", "", None, ""]]
    document = RIDING.with_table(table)
    assert document.items[1] == (Entity("ball", (0.8, 0.8, 0.9, 0.9)),)


def test_more_than_anybody_draws_is_refused_at_once() -> None:
    lines = "\n".join(f"a{n}=b=c{n}" for n in range(200_000))
    with pytest.raises(SceneError, match="expected at most 200 boxes and links, got 400000"):
        RIDING.with_text(lines)
    entities = tuple(Entity("ball", PERSON) for _ in range(201))
    with pytest.raises(SceneError, match="expected at most 200 boxes and links, got 201"):
        RIDING.with_scene(Scene("a", (), entities))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(SceneError, match="row 1: expected 7 cells, got 8"):
        RIDING.with_table([[*RIDING.to_table()[0], ""]])


def test_a_box_without_a_name_outlives_the_text() -> None:
    document = Document((CanvasBox("t1", "", PERSON), CanvasBox("t2", "cat", BIKE)))
    assert document.to_text() == "cat"
    assert [box.phrase for box in document.with_text("dog").boxes] == ["dog", ""]


def test_what_has_no_name_yet_can_be_shown_but_not_drawn() -> None:
    unnamed = replace(RIDING, boxes=(RIDING.boxes[0], replace(RIDING.boxes[1], phrase="")))
    assert unnamed.to_text() == "person=riding="
    assert unnamed.with_text("person=riding=") == replace(unnamed, revision=1)
    with pytest.raises(SceneError, match="interaction 1: expected a name for both boxes, got one without"):
        _ = unnamed.items
    with pytest.raises(SceneError, match="expected a name for every box"):
        _ = Document((CanvasBox("t1", " ", PERSON),)).items


@pytest.mark.parametrize("action", ["", "-"])
def test_an_action_that_is_left_open_is_boxes_only(action: str) -> None:
    document = replace(RIDING, links=(replace(RIDING.links[0], action=action),))
    assert document.items[0][0].action is None
    assert document.to_text() == "person=-=bike"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("person=riding=bike", "a person riding a bike"),
        ("old man=feeding=the ducks\numbrella", "an old man feeding the ducks and an umbrella"),
        ("person=-=bike", "a person and a bike"),
        ("two dogs=chasing=Garfield", "two dogs chasing Garfield"),
        ("", ""),
    ],
)
def test_the_prompt_says_what_the_canvas_says(text: str, prompt: str) -> None:
    assert Document().with_text(text).prompt() == prompt


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object with"),
        ({"boxes": 3}, "boxes: expected a list"),
        ({"boxes": [{"id": "a", "phrase": "x", "box": [0, 0, 2, 1]}]}, "box: expected x1 to be a"),
        ({"boxes": [{"id": "a", "phrase": 3, "box": [0, 0, 1, 1]}]}, "phrase: expected text, got 3"),
        ({"boxes": [{"id": "a", "phrase": "x", "box": [0, 0, 1, 1], "z": 1}]}, "expected only the keys"),
        ({"links": [{"id": "l", "subject": "a", "object": "b"}]}, "expected links between boxes, got a"),
        ({"aspect": 0}, "aspect: expected a number from 0.01 to 100, got 0"),
        ({"boxes": [{"id": "a", "phrase": "x", "box": [0, 0, 1, 1]}] * 2}, "boxes with ids of their own"),
    ],
)  # fmt: skip
def test_what_is_no_canvas_is_refused(value: Any, message: str) -> None:
    with pytest.raises(SceneError, match=message):
        Document.from_value(value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_of_the_embedded_world(name: str) -> None:
    from interactdiff.stickworld.appearance import COLOURS
    from interactdiff.stickworld.world import ACTIONS, OBJECTS

    known = {"person", "in", *COLOURS, *OBJECTS}
    for one in EXAMPLES[name].interactions:
        assert one.action in ACTIONS
        assert {*one.subject.split(), *one.object.split()} <= known
