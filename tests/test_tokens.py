"""Tokens: boxes and phrases in, [subjects, actions, objects] out."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import BOXES_ONLY, FEEDING, RIDING
from torch import Tensor

from interactdiff.interaction.phrases import encode_phrases
from interactdiff.interaction.tokens import (
    InteractionTokenizer,
    between_boxes,
    box_features,
    scene_phrases,
    scene_tensors,
    token_table,
)
from interactdiff.scene import Entity, Interaction, SceneError

WIDTH, TOKEN, SLOTS = 5, 7, 3


@pytest.fixture
def position_net() -> InteractionTokenizer:
    torch.manual_seed(0)
    tokenizer = InteractionTokenizer(WIDTH, TOKEN, SLOTS, hidden=11)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter.data)
    return tokenizer.eval()


def tensors_of(*scenes: tuple[Interaction, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    phrases = sorted(scene_phrases([(RIDING, FEEDING)]))
    features = {phrase: torch.randn(WIDTH, generator=generator) for phrase in phrases}
    return scene_tensors(scenes, features, SLOTS)


def split_roles(tokens: Tensor) -> tuple[Tensor, ...]:
    assert tokens.shape[1:] == (3 * SLOTS, TOKEN)
    return tokens.split(SLOTS, dim=1)


def test_box_features_are_sines_then_cosines_of_xyxy_at_each_frequency():
    box = (0.1, 0.25, 0.7, 1.0)
    expected = []
    for k in range(8):
        expected += [math.sin(100 ** (k / 8) * edge) for edge in box]
        expected += [math.cos(100 ** (k / 8) * edge) for edge in box]
    features = box_features(torch.tensor([[box]]))
    assert torch.allclose(features[0, 0], torch.tensor(expected), atol=1e-5)


def test_box_features_of_half_precision_boxes_are_computed_in_float32():
    boxes = torch.tensor([[[0.1, 0.25, 0.7, 0.9]]]).half()
    assert box_features(boxes).dtype == torch.float32
    assert torch.equal(box_features(boxes), box_features(boxes.float()))


@pytest.mark.parametrize(
    ("subject", "thing", "between"),
    [
        pytest.param((0.0, 0.0, 0.2, 0.3), (0.5, 0.6, 0.9, 0.8), (0.2, 0.3, 0.5, 0.6), id="gap"),
        pytest.param((0.0, 0.0, 1.0, 1.0), (0.5, 0.6, 0.9, 0.8), (0.5, 0.6, 0.9, 0.8), id="nested"),
        pytest.param((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 0.9, 0.5), (0.5, 0.0, 0.5, 0.5), id="touching"),
        pytest.param((0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9), (0.2, 0.4, 0.6, 0.7), id="overlapping"),
    ],
)
def test_between_box(subject, thing, between):
    boxes = torch.tensor(subject), torch.tensor(thing)
    assert torch.equal(between_boxes(*boxes), torch.tensor(between))
    assert torch.equal(between_boxes(*reversed(boxes)), torch.tensor(between))
    assert Interaction("a", "b", "c", subject, thing).between_box == pytest.approx(between)


def test_action_token_moves_with_the_between_box_only(position_net):
    """Another object box with the same between box leaves the action as it is, and not the object."""
    wider = Interaction("person", "riding", "bike", RIDING.subject_box, (0.2, 0.4, 1.0, 1.0))
    assert wider.between_box == RIDING.between_box
    before, after = (split_roles(position_net(**tensors_of((i,)))) for i in (RIDING, wider))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_null_action_changes_only_its_own_token(position_net):
    with_action, boxes_only, empty = (
        split_roles(position_net(**tensors_of(scene))) for scene in ((RIDING,), (BOXES_ONLY,), ())
    )
    subjects, actions, objects = zip(with_action, boxes_only, strict=True)
    assert torch.equal(*subjects)
    assert torch.equal(*objects)
    assert not torch.equal(*actions)
    assert torch.allclose(boxes_only[1], empty[1]), "a null action is an empty slot's"


def test_empty_slots_hold_nothing_of_the_scene(position_net):
    tensors = tensors_of((RIDING, FEEDING))
    unconditional = position_net(**{**tensors, "masks": torch.zeros(1, SLOTS)})
    assert torch.allclose(unconditional, position_net(**tensors_of(())))
    one_slot = split_roles(position_net(**tensors_of((RIDING,))))
    for role, null in zip(one_slot, split_roles(unconditional), strict=True):
        assert torch.allclose(role[:, 1:], null[:, 1:])
        assert not torch.allclose(role[:, :1], null[:, :1])


def test_tables_are_added_by_slot_and_by_role(position_net):
    tensors = tensors_of((RIDING, RIDING))
    before = split_roles(position_net(**tensors))
    with torch.no_grad():
        position_net.interaction_embedding.emb.weight[1] += 1
        position_net.position_embedding.emb.weight[2] += 10
    subjects, actions, objects = (
        after - b for after, b in zip(split_roles(position_net(**tensors)), before, strict=True)
    )
    by_slot = torch.tensor([0.0, 1.0, 0.0])[None, :, None].expand_as(subjects)
    for moved, expected in ((subjects, by_slot), (objects, by_slot), (actions, by_slot + 10)):
        assert torch.allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 2.0])
def test_strength_goes_from_an_empty_slot_to_the_interaction_and_on(position_net, strength):
    empty, full = position_net(**tensors_of((FEEDING,))), position_net(**tensors_of((FEEDING, RIDING)))
    tokens = position_net(**tensors_of((FEEDING, replace(RIDING, strength=strength))))
    if strength == 1:
        assert torch.equal(tokens, full)
    assert torch.allclose(tokens, empty + strength * (full - empty), atol=1e-4)
    assert not torch.allclose(full, empty)


def test_the_action_s_token_is_of_its_region(position_net):
    between = split_roles(position_net(**tensors_of((RIDING,))))
    union = split_roles(position_net(**tensors_of((replace(RIDING, action_region="union"),))))
    around = tensors_of((RIDING,)) | {"action_boxes": torch.tensor([[[0.1, 0.1, 0.9, 0.9]] * SLOTS])}
    assert torch.allclose(union[1][:, 0], split_roles(position_net(**around))[1][:, 0], atol=1e-5)
    assert not torch.allclose(union[1][:, 0], between[1][:, 0])
    assert torch.equal(union[0], between[0])
    assert torch.equal(union[2], between[2])


def test_an_entity_is_subject_and_object_of_no_action(position_net):
    tokens = position_net(**tensors_of((RIDING, Entity("dog", FEEDING.object_box))))
    alone = Interaction("dog", None, "dog", FEEDING.object_box, FEEDING.object_box)
    assert torch.equal(tokens, position_net(**tensors_of((RIDING, alone))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_stay_close(position_net, dtype):
    tensors = tensors_of((RIDING, FEEDING))
    expected = position_net(**tensors)
    tokens = position_net.to(dtype)(**tensors)
    assert tokens.dtype == dtype
    assert (tokens - expected).abs().mean() < 2 * torch.finfo(dtype).eps * expected.abs().mean()


def test_the_table_of_tokens_makes_the_tokens_again(position_net):
    tokens = position_net(**tensors_of((RIDING, FEEDING), (), (BOXES_ONLY,), ()))
    table, index = token_table(tokens, [2, 0, 1])
    assert torch.allclose(table[index], tokens, atol=1e-5)
    assert len(table) == 3 * (SLOTS + 2 + 0 + 1)


def test_scenes_share_phrases():
    assert scene_phrases([(RIDING, BOXES_ONLY), (FEEDING, RIDING)]) == [
        "person",
        "riding",
        "bike",
        "child",
        "feeding",
        "dog",
    ]


def test_an_entity_s_phrase_is_encoded_too():
    assert scene_phrases([(RIDING, Entity("red ball", RIDING.subject_box))])[-1] == "red ball"


def test_too_many_interactions_say_the_limit():
    with pytest.raises(SceneError, match=r"^expected at most 3 interactions an image, got 4$"):
        tensors_of((RIDING,) * 4)


def test_phrase_features_are_the_pooled_output_of_each_phrase_alone(pipe):
    features = encode_phrases(pipe.tokenizer, pipe.text_encoder, ["dog", "person in red"])
    assert list(features) == ["dog", "person in red"]
    for phrase, feature in features.items():
        alone = pipe.text_encoder(pipe.tokenizer(phrase, return_tensors="pt").input_ids).pooler_output[0]
        assert torch.allclose(feature, alone, atol=1e-6)
    assert not torch.allclose(features["dog"], features["person in red"])


def test_long_phrases_are_refused_not_cut(pipe):
    encode_phrases(pipe.tokenizer, pipe.text_encoder, ["a" * 22])
    message = r"^expected phrases of at most 24 tokens, .* got 25 for 'a{23}'$"
    with pytest.raises(SceneError, match=message):
        encode_phrases(pipe.tokenizer, pipe.text_encoder, ["dog", "a" * 23])
