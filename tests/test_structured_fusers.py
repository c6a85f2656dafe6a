"""Fusers whose tokens are seen from their own boxes alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import FEEDING, RIDING, close, draw, trained_adapter
from torch import Tensor

from interactdiff import Entity, Interaction, attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import encode_phrases
from interactdiff.interaction.tokens import SceneTokens
from interactdiff.scene import Box, SceneError

BALL = Entity("ball", (0.6, 0.05, 0.9, 0.3))


@pytest.fixture
def adapter(pipe: StableDiffusionPipeline) -> InteractionAdapter:
    return trained_adapter(pipe.unet, structured=True)


def touched(box: Box, rows: int, columns: int) -> list[bool]:
    """The slow oracle: cell by cell, row by row."""
    x0, y0, x1, y1 = box
    return [
        column / columns < x1 and (column + 1) / columns > x0 and row / rows < y1 and (row + 1) / rows > y0
        for row in range(rows)
        for column in range(columns)
    ]


def regions(item: Interaction | Entity) -> tuple[Box | None, Box | None, Box | None]:
    """Of subject, action and object; the action of an entity has none."""
    if isinstance(item, Entity):
        return item.box, None, item.box
    return item.subject_box, item.action_box_in("union"), item.object_box


def test_each_grid_sees_a_token_where_its_box_is(pipe: Any, adapter: InteractionAdapter) -> None:
    """At every level of the U-Net; the unconditional half sees none, and empty slots none."""
    scene, seen = [RIDING, BALL], {}
    with attach(pipe, adapter) as handle:
        handle.set_scene(scene)
        sites = handle["interaction"].sites
        for site in sites:
            site.fuser.attn.register_forward_hook(lambda _, args, __, site=site: seen.update({site: args[3]}))
        draw(pipe, num_inference_steps=1)
    assert len({mask.shape for mask in seen.values()}) == 2, "two levels"
    for mask in seen.values():
        assert ((mask == 0) | (mask == -torch.inf)).all()
        visual, mask = mask.shape[2], mask == 0
        side = round(visual**0.5)
        assert mask[..., :visual].all()
        assert not mask[0, ..., visual:].any()
        tokens = mask[1, 0, :, visual:].T.unflatten(0, (3, -1))  # [3 roles, N, cells]
        for slot, item in enumerate(scene):
            for role, box in enumerate(regions(item)):
                expected = [False] * visual if box is None else touched(box, side, side)
                assert tokens[role, slot].tolist() == expected
        assert not tokens[:, len(scene) :].any()


def test_where_a_box_is_decides_who_reads_its_token(pipe: Any, adapter: InteractionAdapter) -> None:
    """Of one fuser: the cells outside of every box are as with another phrase there."""
    read: list[Tensor] = []
    with attach(pipe, adapter) as handle:
        site = handle["interaction"].sites[0]
        site.fuser.attn.register_forward_hook(lambda _, __, out: read.append(out[-1]))
        for scene in ([BALL], [Entity("dog", BALL.box)], [Entity("dog", BALL.box), RIDING]):
            handle.set_scene(scene)
            draw(pipe, num_inference_steps=1)
    inside = torch.tensor(touched(BALL.box, 8, 8))
    ball, dog, both = read
    assert (ball - dog)[inside].abs().amax(1).min() > 0
    assert torch.equal(ball[~inside], dog[~inside])
    assert not torch.equal(dog[~inside], both[~inside])


def test_where_a_picture_looks_is_within_the_boxes(pipe: Any, adapter: InteractionAdapter) -> None:
    with attach(pipe, adapter) as handle, handle["interaction"].record_attention() as recorder:
        handle.set_scene([BALL])
        draw(pipe, num_inference_steps=1)
    maps = recorder.maps()
    assert maps is not None
    inside = (
        torch.tensor(touched(BALL.box, 4, 4)).reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert maps.of("subject", 0)[inside].min() > 0
    assert maps.of("subject", 0)[0, 0] == 0
    assert maps.of("action", 0).max() == 0


def test_an_items_own_strength(pipe: Any, adapter: InteractionAdapter) -> None:
    """At 0 it is as if it were not there; else it counts in the softmax as that many tokens."""
    masks: list[Tensor] = []
    with attach(pipe, adapter) as handle:

        def drawn(strength: float) -> Tensor:
            handle.set_scene([BALL, replace(RIDING, strength=strength)])
            return draw(pipe)

        handle.set_scene([BALL])
        alone = draw(pipe)
        assert close(drawn(0.0), alone)
        handle["interaction"].sites[0].fuser.attn.register_forward_hook(
            lambda _, args, __: masks.append(args[3])
        )
        assert not close(drawn(0.5), drawn(1.0))
    assert {round(weight, 4) for weight in masks[0].exp().unique().tolist()} == {0.0, 0.5, 1.0}


def test_tokens_given_by_row_act_as_the_scene_does(pipe: Any, adapter: InteractionAdapter) -> None:
    """As training gives them, with gradients."""
    scenes = [[RIDING, BALL], [FEEDING]]
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    names = ["person", "riding", "bike", "ball", "child", "feeding", "dog"]
    features = encode_phrases(pipe.tokenizer, pipe.text_encoder, names)
    with torch.no_grad(), attach(pipe, adapter) as handle:
        made = adapter(**adapter.scene_tensors(scenes, features))
        assert isinstance(made, SceneTokens)
        handle["interaction"].set_tokens(made)
        together = pipe.unet(sample, 7, context).sample
        for n, scene in enumerate(scenes):
            handle["interaction"].set_tokens(adapter(**adapter.scene_tensors([scene], features)))
            alone = pipe.unet(sample[n : n + 1], 7, context[n : n + 1]).sample
            assert close(alone, together[n : n + 1])
        with pytest.raises(SceneError, match=r"expected tokens of shape \[batch, 3N, 24\], got"):
            handle["interaction"].set_tokens(SceneTokens(made.tokens[..., :3], made.weights, made.boxes))
        with pytest.raises(SceneError, match="expected tokens as a SceneTokens, got Tensor"):
            handle["interaction"].set_tokens(made.tokens)


def test_an_untrained_one_changes_no_bit_and_its_file_says_what_it_is(pipe: Any, tmp_path: Path) -> None:
    before = draw(pipe)
    adapter = InteractionAdapter.for_unet(
        pipe.unet, max_interactions=3, hidden=16, structured=True, init="open"
    )
    with attach(pipe, adapter.eval()) as handle:
        handle.set_scene([RIDING])
        assert torch.equal(draw(pipe), before)
    adapter.save_pretrained(tmp_path)
    assert InteractionAdapter.from_pretrained(tmp_path).config == adapter.config
