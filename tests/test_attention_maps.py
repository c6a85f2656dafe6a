"""Where a picture looks: the recorder against attention written out, and that it changes nothing."""

from typing import Any

import pytest
import torch
from tiny import FEEDING, RIDING, trained_adapter
from tiny import draw as draw_unet
from tiny_dit import draw as draw_dit
from tiny_dit import trained_joint_adapter

import interactdiff.interaction.maps as maps_module
from interactdiff import Entity, attach
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.fuser import KeysValues, SelfAttention
from interactdiff.interaction.maps import QUERIES_AT_ONCE, fuser_attention, joint_attention
from interactdiff.scene import Scene


@pytest.mark.parametrize("structured", [False, True])
def test_a_fusers_attention_is_that_of_its_softmax(structured: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 3)
    image, tokens = QUERIES_AT_ONCE + 5, 6
    queries, keys = torch.randn(2, image, 12), torch.randn(2, image + tokens, 12)
    weights = torch.rand(2, 1, image, image + tokens).round(decimals=1)
    got = fuser_attention(attention, queries, keys, keys, weights.log() if structured else None)
    one_hot = torch.cat([torch.zeros(image, tokens), torch.eye(tokens)])  # values that tell the keys apart
    wanted = torch.zeros(image, tokens)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        powers = (queries[1, :, part] @ keys[1, :, part].T / 2).exp()
        powers = powers * weights[1, 0] if structured else powers
        wanted += powers / powers.sum(-1, keepdim=True) @ one_hot / 3
    assert torch.allclose(got, wanted, atol=1e-6)


def test_what_a_joint_attention_reads_is_its_softmax_with_a_key_of_zeros() -> None:
    torch.manual_seed(0)
    queries, positions = torch.randn(2, 3, 5, 4), torch.randn(3, 5, 4)
    keys = torch.cat([torch.randn(2, 3, 6, 4), torch.zeros(2, 3, 1, 4)], 2)
    seen = torch.rand(2, 1, 5, 7) > 0.5
    seen[..., -1] = True
    got = joint_attention(None, queries, KeysValues(keys, keys), positions, 1.0, seen)
    powers = ((queries[1] + positions) @ keys[1, :, :-1].mT / 2).exp() * seen[1, ..., :-1]
    assert torch.allclose(got, (powers / (1 + powers.sum(-1, keepdim=True))).mean(0), atol=1e-6)


def test_maps_are_means_over_sites_on_the_finest_grid(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hooks' own arguments, kept and put together by hand; large grids are pooled."""
    kept: list[torch.Tensor] = []

    def keeping(attention: Any, *args: Any) -> torch.Tensor:
        kept.append(fuser_attention(attention, *args))
        return kept[-1]

    monkeypatch.setattr(maps_module, "fuser_attention", keeping)
    monkeypatch.setattr(maps_module, "FINEST", 4)
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle, handle["interaction"].record_attention() as recorder:
        handle.set_scene([RIDING])
        draw_unet(pipe, num_inference_steps=1)
    maps = recorder.maps()
    assert maps is not None
    grown = []
    for weights in kept:
        side = round(len(weights) ** 0.5)
        one = weights.T.reshape(3, 3, side, side)
        one = torch.nn.functional.adaptive_avg_pool2d(one, 4) if side > 4 else one
        grown.append(torch.nn.functional.interpolate(one, (4, 4), mode="bilinear"))
    assert len(grown) > 1
    assert torch.allclose(maps.weights[0], torch.stack(grown).mean(0), atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_recording_a_unet_changes_nothing(pipe: Any, guidance: float) -> None:
    scene = [RIDING, Entity("red ball", (0.5, 0.5, 0.9, 0.9))]
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene(scene, schedule=2 / 3)
        expected = draw_unet(pipe, guidance_scale=guidance)
        with handle["interaction"].record_attention(slots=2) as recorder:
            assert recorder.maps() is None
            assert torch.equal(draw_unet(pipe, guidance_scale=guidance), expected)
            maps = recorder.maps()
        assert maps is not None
        assert maps.steps == (0, 1)  # of three, two are controlled
        assert maps.weights.shape == (2, 3, 2, 8, 8)  # of three slots, one is empty
        total = maps.weights.sum((1, 2))
        assert (total > 0).all()
        assert (total < 1).all()  # the rest goes to the image itself
        assert torch.equal(maps.of("object", 1), maps.weights[:, 2, 1].mean(0))
        assert torch.equal(maps.of("subject", 0, step=1), maps.weights[1, 0, 0])
        draw_unet(pipe)
        assert torch.equal(recorder.maps().weights, maps.weights)  # the hooks are gone
        recorder.clear()
        assert recorder.maps() is None
        with pytest.raises(ValueError, match="expected a role of subject, action, object and a slot below 2"):
            maps.of("verb", 0)
        with pytest.raises(ValueError, match="expected a recorded step, 0 to 1, got 2"):
            maps.of("action", 0, step=2)


def test_recording_a_transformer_changes_nothing(dit_pipe: Any) -> None:
    guided = {"negative_prompt": ""} | ({"true_cfg_scale": 3.0} if "Flux" in type(dit_pipe).__name__ else {})
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer)) as handle:
        handle.set_scene([RIDING, FEEDING])
        expected = draw_dit(dit_pipe, **guided)
        with handle["interaction"].record_attention() as recorder:
            assert torch.equal(draw_dit(dit_pipe, **guided), expected)
        maps = recorder.maps()
        assert maps is not None
        assert maps.steps == (0, 1)
        assert maps.weights.shape == (2, 3, 2, 8, 8)  # parts are one token again


@pytest.mark.parametrize("model", ["stickworld", "stickworld-dit"])
def test_the_packaged_models_look_at_a_thing_where_it_is(model: str) -> None:
    from interactdiff.commands.demo import DEMO

    scene_pipeline = ScenePipeline.from_pretrained(model, device="cpu")
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    assert scene_pipeline.handle is not None
    with scene_pipeline.handle["interaction"].record_attention() as recorder:
        scene_pipeline.generate(Scene(DEMO.prompt, DEMO.interactions, seed=7, steps=6))
    maps = recorder.maps()
    assert maps is not None
    rows, columns = maps.weights.shape[-2:]
    for role, (x0, y0, x1, y1) in (
        ("subject", DEMO.interactions[0].subject_box),
        ("object", DEMO.interactions[0].object_box),
    ):
        inside = torch.zeros(rows, columns, dtype=torch.bool)
        inside[round(y0 * rows) : round(y1 * rows), round(x0 * columns) : round(x1 * columns)] = True
        looked = maps.of(role, 0)
        assert looked[inside].mean() > 1.5 * looked[~inside].mean()
