"""Where the words of things look: cross-attention of tiny pipelines, and maps made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT_WIDTH, tiny_unet
from diffusers import StableDiffusionPipeline
from torch import Tensor

from interactdiff.evaluation import words
from interactdiff.evaluation.words import (
    attention,
    conditioning,
    mask_iou,
    recorded,
    word_iou,
    word_map,
    word_mask,
    word_span,
    word_tokens,
)
from interactdiff.models import ModelError
from interactdiff.sites import denoiser_of
from interactdiff.stickworld.captions import Described
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(params=["pipe", "flux_pipe"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def hooks(pipeline: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in denoiser_of(pipeline).modules())


def test_word_iou_is_measured_on_both_kinds_of_models_and_leaves_them_as_they_were(pipeline: Any) -> None:
    scenes = [sample_scene(HELD_OUT + n, 1) for n in range(2)]
    before = hooks(pipeline)
    got = word_iou(pipeline, scenes, 32, seed=0)
    assert list(got) == ["objects", "persons"]
    assert all(0 <= value <= 1 for value in got.values())
    assert word_iou(pipeline, scenes, 32, seed=0) == got
    assert hooks(pipeline) == before


def test_attention_is_that_of_the_finest_grid_and_its_rows_are_shares(pipeline: Any) -> None:
    weights = attention(pipeline, "a dog", PIXELS, seed=0)
    to_words, to_image = weights.finest
    unet = hasattr(pipeline, "unet")
    tokens = 256 if unet else 64  # 16 x 16 latents; a transformer's tokens are of 2 x 2
    assert to_words.shape == (tokens, 24 if unet else 10)
    assert to_image.shape == (tokens, tokens)
    torch.testing.assert_close(to_image.sum(1), torch.ones(tokens))
    assert to_words.min() >= 0
    calls = len(words.NOISE_LEVELS)
    if unet:
        grids = {n: weights.to_words[n].sum(1) for n in weights.to_words}
        assert len(grids) > 1
        assert all((rows / calls).allclose((rows / calls).round(), atol=1e-4) for rows in grids.values())
    else:  # words and image share the attention of three blocks
        total = to_words.sum(1) + weights.to_image[tokens].sum(1)
        torch.testing.assert_close(total, torch.full((64,), 3.0 * calls))
    assert not attention(pipeline, "a dog", PIXELS, seed=1).finest[0].equal(to_words)
    assert not attention(pipeline, "a red bike", PIXELS, seed=0).finest[0].equal(to_words)


class Keeping:
    """diffusers' own attention, written out, that keeps its weights."""

    def __init__(self, kept: list[Tensor]):
        self.kept = kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        weights = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            self.kept.append(weights.mean(0))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ value))


def test_weights_of_a_unet_are_those_that_its_attention_uses(pipe: StableDiffusionPipeline) -> None:
    unet: Any = pipe.unet
    kept: list[Tensor] = []
    unet.set_attn_processor(Keeping(kept))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]))
    text = torch.randn(1, 7, unet.config["cross_attention_dim"])
    with torch.no_grad(), recorded(unet) as weights:
        unet(*inputs, encoder_hidden_states=text)
    for tokens, got in weights.to_words.items():
        torch.testing.assert_close(got, sum(one for one in kept if len(one) == tokens))
    assert sum(len(one) == 64 for one in kept) > 1


def test_weights_of_flux_make_the_output_of_its_attention(flux_pipe: Any) -> None:
    """Of values that are 1 for text and 0 for the image, each image token gets what it gives to text."""
    transformer = flux_pipe.transformer
    arguments = conditioning(flux_pipe, "a dog", 32)
    block = transformer.single_transformer_blocks[0].attn
    seen: list[Tensor] = []
    lengths = arguments["encoder_hidden_states"].shape[1]

    def spoken(module: Any, args: Any, output: Tensor) -> Tensor:
        marked = torch.zeros_like(output)
        marked[:, :lengths] = 1
        return marked

    hook = block.to_v.register_forward_hook(spoken)
    after = block.register_forward_hook(lambda m, a, output: seen.append(output[0, lengths:].mean(1)))
    others = [transformer.transformer_blocks[0].attn, transformer.single_transformer_blocks[1].attn]
    with torch.no_grad(), recorded(transformer) as weights:
        for other in others:
            other._forward_pre_hooks.clear()  # only this block is recorded
        transformer(hidden_states=torch.randn(1, 64, 16), timestep=torch.tensor([0.2]), **arguments)
    hook.remove()
    after.remove()
    torch.testing.assert_close(weights.to_words[64].sum(1), seen[0], atol=1e-5, rtol=1e-4)


def test_a_unet_whose_attention_is_all_to_words_is_not_refined(pipe: StableDiffusionPipeline) -> None:
    """Each of the three blocks of the finest grid attends to words twice then, at every noise level."""
    pipe.unet = tiny_unet(TEXT_WIDTH, only_cross_attention=True)
    to_words, to_image = attention(pipe, "a dog", PIXELS, seed=0).finest
    assert torch.equal(to_image, torch.eye(256))
    torch.testing.assert_close(to_words.sum(1), torch.full((256,), 6.0 * len(words.NOISE_LEVELS)))


def test_a_map_made_by_hand_on_the_mask_has_iou_one(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grid of the render's size, and tokens that are looked at from the pixels of their own thing."""
    scene = sample_scene(HELD_OUT + 5, 1, 0)
    size = 32
    masks = [thing.mask for thing in render(scene, size).things]
    limit = 200

    def by_hand(pipeline: Any, caption: str, image: np.ndarray, seed: int) -> words.WordAttention:
        weights = words.WordAttention()
        to_words = torch.zeros(size * size, limit)
        for described, mask in zip(scene.described.things, masks, strict=True):
            for token in word_tokens(pipeline, caption, word_span(caption, described), limit):
                to_words[:, token] = torch.from_numpy(mask.flatten().astype(np.float32))
        weights.to_words[size * size] = to_words
        weights.to_image[size * size] = torch.eye(size * size)
        return weights

    monkeypatch.setattr(words, "attention", by_hand)
    assert word_iou(pipeline, [scene], size, 0) == {"objects": 1.0, "persons": 1.0}
    masks.reverse()
    assert max(word_iou(pipeline, [scene], size, 0).values()) < 0.5


def test_refinement_spreads_a_map_over_what_looks_alike() -> None:
    alike = torch.zeros(16, 16)
    alike[:4, :4] = 1 / 4  # the first row of a 4 x 4 grid looks at itself
    alike[4:, 4:] = 1 / 12
    to_words = torch.zeros(16, 3)
    to_words[1, 2] = 0.9
    assert word_map(to_words, torch.eye(16), [2]).nonzero().flatten().tolist() == [1]
    assert word_map(to_words, alike, [2]).tolist() == [1.0] * 4 + [0.0] * 12
    assert word_map(to_words, alike, [0, 1]).tolist() == [0.0] * 16
    mask = word_mask(word_map(to_words, alike, [2]), 8)
    assert mask[:2].all()
    assert not mask[3:].any()


def test_iou_of_masks_by_hand() -> None:
    left, top = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], top[:2] = True, True
    assert mask_iou(left, left) == 1
    assert mask_iou(left, top) == pytest.approx(1 / 3)
    assert mask_iou(left & ~left, top & ~top) == 0


def test_the_words_of_a_thing_are_its_own() -> None:
    caption = "a person in blue riding a striped red bike with white dots in the park"
    person = Described("person", {}, (0, 16))
    bike = Described("bike", {}, (24, caption.index(" in the park")))
    assert caption[slice(*person.span)] == "a person in blue"
    assert caption[slice(*word_span(caption, person))] == "a person in blue"
    assert caption[slice(*word_span(caption, bike))] == "striped red bike"
    for seed in range(60):
        scene = sample_scene(seed)
        for thing in scene.described.things:
            said = scene.caption[slice(*word_span(scene.caption, thing))]
            assert thing.name == "person" or said.endswith(thing.name)
            assert thing.attributes["colour"] in said


def test_tokens_of_words_are_found_by_their_characters(pipe: StableDiffusionPipeline, flux_pipe: Any) -> None:
    caption = "a red bike"
    assert word_tokens(pipe, caption, (2, 5), 24) == [2, 3, 4]  # a token a letter, after the start and "a"
    assert word_tokens(pipe, caption, (6, 10), 24) == [5, 6, 7, 8]
    assert word_tokens(pipe, caption, (6, 10), 7) == [5, 6]
    assert word_tokens(pipe, caption, (6, 10), 5) == []
    t5 = flux_pipe.tokenizer_2
    for span in ((2, 5), (6, 10)):
        tokens = word_tokens(flux_pipe, caption, span, 100)
        assert t5.decode([t5(caption).input_ids[n] for n in tokens]).strip() == caption[slice(*span)]


def test_other_denoisers_are_refused_in_words(sd3_pipe: Any) -> None:
    with pytest.raises(ModelError, match="expected a U-Net or a Flux transformer, got a SD3"):
        word_iou(sd3_pipe, [sample_scene(0)], 32, 0)
    assert hooks(sd3_pipe) == 0
