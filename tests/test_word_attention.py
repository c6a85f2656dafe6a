"""The loss of attention to words: its tokens, its value against a slow oracle, and what it teaches."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from interactdiff import attach
from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.capture import AttentionCapture, Layers
from interactdiff.concept.denoising import Denoising
from interactdiff.sites import denoiser_of, find_sites
from interactdiff.stickworld.layouts import MOST_THINGS, sample_scene
from interactdiff.training.compiling import compile_each_shape
from interactdiff.training.tokenizer import make_t5_tokenizer, make_tokenizer
from interactdiff.training.word_attention import (
    WordAttention,
    WordRegions,
    word_attention_loss,
    word_tokens,
)
from interactdiff.training.world_data import WordedCaption, varied_caption

CAPTION = "a red bike and a person in blue"


@pytest.fixture(params=["pipe", "flux_pipe"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_words_of_a_person_go_on_to_the_verb() -> None:
    """Where there is one: keywords, and captions without verbs, have none."""
    with_verbs, rng = 0, random.Random(1)
    for seed in range(60):
        scene = sample_scene(seed)
        caption = varied_caption(scene, rng)
        text, spans = WordedCaption.of(caption)
        for n, (thing, (first, last)) in enumerate(zip(caption.things, spans, strict=True)):
            verb = caption.actions[n // 2] if n < 2 * len(scene.triplets) and n % 2 == 0 else None
            assert text[first:last] == text[slice(*thing.span)] + ("" if verb is None else f" {verb}")
            with_verbs += verb is not None
    assert with_verbs > 30


@pytest.mark.parametrize("make", [make_tokenizer, make_t5_tokenizer])
def test_tokens_are_those_of_the_words(make: Any) -> None:
    """In every wording, keywords too; what is cut off has none."""
    tokenizer, rng = make(200), random.Random(0)
    captions = [WordedCaption.of(varied_caption(sample_scene(seed), rng)) for seed in range(60)]
    found = word_tokens(tokenizer, [*captions, WordedCaption("")], 200)
    assert found.shape == (61, MOST_THINGS, 200)
    assert not found[60].any()
    for one, tokens in zip(captions, found, strict=False):
        ids = tokenizer(one.text).input_ids
        assert not tokens[len(one.spans) :].any()
        for (first, last), own in zip(one.spans, tokens, strict=False):
            said = tokenizer.decode([ids[n] for n in own.nonzero()[:, 0].tolist()])
            assert said.replace(" ", "") == one.text[first:last].replace(" ", "")
    cut = word_tokens(make(12), captions, 10)
    assert torch.equal(cut, found[:60, :, :10] & cut)
    assert (cut.any(2).sum(1) < found[:60].any(2).sum(1)).any()


def regions(batch: int, tokens: int, side: int) -> WordRegions:
    """Of two things a picture, which overlap. Nothing of the first picture is said, and one of the last."""
    generator = torch.Generator().manual_seed(1)
    said = torch.zeros(batch, 3, tokens, dtype=torch.bool)
    said[:, 0, 1:3] = said[:, 1, 4:7] = True
    said[-1, 1] = said[0] = False
    masks = (torch.rand(batch, 3, side, side, generator=generator) < 0.4).float()
    masks[:, 2] = 0
    return WordRegions(said, masks)


def oracle(attention: Tensor, wanted: WordRegions, weights: Tensor) -> float:
    """Cell by cell, of a grid half as fine as the masks."""
    total, side = 0.0, wanted.masks.shape[2] // 2
    for b in range(len(attention)):
        if not wanted.tokens[b].any():
            continue
        nats = 0.0
        for cell in range(side * side):
            y, x = divmod(cell, side)
            shares = [float(m[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()) for m in wanted.masks[b]]
            whole = max(1.0, sum(shares))
            to_things = [float(attention[b, cell, one].sum()) for one in wanted.tokens[b]]
            for share, to_thing, said in zip(shares, to_things, wanted.tokens[b], strict=True):
                if said.any():
                    nats -= share / whole * np.log(max(to_thing, 1e-6))
            nats -= (1 - sum(shares) / whole) * np.log(max(1 - sum(to_things), 1e-6))
        total += float(weights[b]) * nats / side**2
    return total / len(attention)


def test_the_loss_is_the_oracles_and_least_where_attention_follows_the_silhouettes() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, weights = regions(4, 9, 8), torch.tensor([1.0, 0.2, 0.7, 1.0])
    attention = torch.randn(4, 16, 9, generator=generator).softmax(-1)
    loss = word_attention_loss(attention, wanted, weights)
    assert loss.item() == pytest.approx(oracle(attention, wanted, weights), rel=1e-4)
    masks = torch.zeros(4, 3, 8, 8)
    masks[:, 0, :4], masks[:, 1, 4:, :4] = 1, 1
    apart = WordRegions(regions(4, 9, 8).tokens, masks)
    follows = torch.zeros(4, 4, 4, 9)
    follows[:, :2, :, 1], follows[:, 2:, :2, 5], follows[:, 2:, 2:, 8] = 1, 1, 1
    right, wrong = (
        word_attention_loss(one.flatten(1, 2), apart, weights) for one in (follows, follows.roll(1, 1))
    )
    assert 0 <= right < 1e-5 < 1 < wrong


def watched(denoiser: Any) -> tuple[str, ...]:
    """The paths of all attentions to the text."""
    return tuple(site.path for site in find_sites(denoiser) if site.role in ("cross", "joint", "single"))


def predict(pipeline: Any) -> AttentionCapture:
    """What `AttentionCapture` sees of a call of the denoiser, with gradients."""
    denoising = Denoising.of(pipeline)
    capture = AttentionCapture(denoising.denoiser, Layers(watched(denoising.denoiser), ()))
    generator = torch.Generator().manual_seed(0)
    with attach(pipeline, ConceptAdapter.for_pipeline(pipeline).named("words")) as handle:
        latents = denoising.latents(Image.new("RGB", (32, 32), "red"))
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.tensor([300])
        prompt = denoising.encode([CAPTION], (32, 32))
        with handle["concept:words"].capturing(capture):
            denoising.predict(denoising.noisy(latents, noise, times), times, prompt)
    return capture


def test_a_compiled_model_shows_the_same(pipeline: Any) -> None:
    denoiser: Any = denoiser_of(pipeline)
    attention = WordAttention(denoiser.train())
    denoising = Denoising.of(pipeline)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt, times = denoising.encode([CAPTION], (32, 32)), torch.tensor([300])
    maps = []
    for compiled in (False, True):
        if compiled:
            compile_each_shape(denoiser, "eager")
        denoising.predict(latents, times, prompt)
        maps.append(attention.maps(next(iter(prompt.arguments.values())).shape[1]))
    assert len(maps[0]) == len(maps[1]) > 1
    for one, other in zip(*maps, strict=True):
        torch.testing.assert_close(one, other)


def test_maps_are_the_denoisers_attention_to_the_text(pipeline: Any) -> None:
    denoiser: Any = denoiser_of(pipeline)
    attention = WordAttention(denoiser.train())
    order: list[str] = []
    named = dict(denoiser.named_modules())
    for path in (paths := watched(denoiser)):
        named[path].register_forward_hook(lambda *_, path=path: order.append(path))
    capture = predict(pipeline)
    maps = attention.maps(capture.text_length)
    assert len(maps) == len(order) == len(paths) > 1
    for path, got in zip(order, maps, strict=True):
        whole = capture.probabilities(path)[..., : capture.text_length]
        expected = (whole / whole.sum(-1, keepdim=True)).mean(1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert attention.maps(1) == []
    denoiser.eval()
    predict(pipeline)
    assert attention.maps(1) == [], "kept while nothing is trained"


def test_the_loss_is_of_float32_under_autocast(pipeline: Any) -> None:
    attention, losses = WordAttention(denoiser_of(pipeline).train()), []
    for mixed in (False, True):
        capture = predict(pipeline)
        wanted = regions(2, capture.text_length, 16)
        alone = WordRegions(wanted.tokens[1:], wanted.masks[1:])
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(attention.loss(alone, torch.ones(1)))
    assert losses[0] > 0.1
    assert torch.equal(*losses)
