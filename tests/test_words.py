"""Where the words of things look: cross-attention of tiny pipelines, and maps made by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT_WIDTH, tiny_unet
from diffusers import StableDiffusionPipeline
from torch import Tensor

from interactdiff import attach
from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.capture import AttentionCapture
from interactdiff.concept.masks import from_zero_to_one
from interactdiff.evaluation import words
from interactdiff.evaluation.words import (
    captured,
    mask_iou,
    word_iou,
    word_layers,
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


@contextmanager
def looking(pipeline: Any, caption: str = "a red bike", seed: int = 0) -> Iterator[AttentionCapture]:
    with attach(pipeline, ConceptAdapter.for_pipeline(pipeline).named("words")) as handle:
        yield captured(pipeline, handle["concept:words"], caption, PIXELS, seed)


def matrices(capture: AttentionCapture, denoiser: Any) -> tuple[Tensor, Tensor]:
    """The slow oracle: [N, T] attention to words and [N, N] to the image, rows of the second with sum 1."""
    layers, text = word_layers(denoiser), capture.text_length
    mean = {path: capture.probabilities(path).mean((0, 1)) for path in {*layers.cross, *layers.own}}
    to_words: Any = sum(mean[path][:, :text] for path in layers.cross)
    to_image: Any = sum(mean[path][:, -len(mean[path]) :] for path in layers.own)  # a transformer's come last
    return to_words, to_image / to_image.sum(1, keepdim=True) if layers.own else torch.eye(len(to_words))


def test_a_map_is_that_of_the_whole_matrices(pipeline: Any) -> None:
    denoiser = denoiser_of(pipeline)
    with looking(pipeline) as capture:
        to_words, to_image = matrices(capture, denoiser)
        assert to_words.shape == ((256, 24) if hasattr(pipeline, "unet") else (64, 10))
        for tokens in ([2], [3, 4, 5]):
            expected = to_words[:, tokens].mean(1).double().square()
            for _ in range(words.REFINEMENTS):
                expected = to_image.double() @ expected
            expected = (expected - expected.min()) / (expected.max() - expected.min())
            got = word_map(capture, tokens)
            assert got.shape == ((16, 16) if hasattr(pipeline, "unet") else (8, 8))
            torch.testing.assert_close(got.flatten().double(), expected, atol=5e-3, rtol=0)
    with looking(pipeline, seed=1) as other:
        assert not torch.allclose(word_map(other, [2]), word_map(capture, [2]), atol=1e-2)


def test_a_denoiser_is_called_at_the_noise_levels_that_are_said(pipeline: Any) -> None:
    times: list[Any] = []
    hook = denoiser_of(pipeline).register_forward_pre_hook(
        lambda _, args, given: times.append(given["timestep"] if "timestep" in given else args[1]),
        with_kwargs=True,
    )
    with looking(pipeline):
        pass
    hook.remove()
    (levels,) = times
    scale = 1 if hasattr(pipeline, "unet") else 1000
    assert (levels * scale).tolist() == pytest.approx(words.NOISE_LEVELS)


@pytest.mark.parametrize(("all_to_words", "layers"), [(False, 3), (True, 6)])
def test_a_unets_maps_are_of_its_finest_grid_and_not_refined(
    pipe: StableDiffusionPipeline, all_to_words: bool, layers: int
) -> None:
    """Three blocks, each of which attends to words twice where all attention is to words."""
    pipe.unet = tiny_unet(TEXT_WIDTH, only_cross_attention=all_to_words)
    found = word_layers(pipe.unet)
    assert (len(found.cross), found.own) == (layers, ())
    with looking(pipe) as capture:
        columns = capture.columns([[2]]).mean(0, keepdim=True)
        assert torch.equal(word_map(capture, [2]), from_zero_to_one(columns.square())[0, 0])


class ByHand:
    """A capture of attention that is known: [N, T] to words, and [N, N] to the image of a square grid."""

    has_own = True

    def __init__(self, to_words: Tensor, to_image: Tensor):
        self.to_words, self.to_image = to_words, to_image
        self.side, self.text_length = round(len(to_words) ** 0.5), to_words.shape[1]

    def columns(self, rows: Any) -> Tensor:
        maps = torch.stack([self.to_words[:, own].mean(1) for own in rows])
        return maps.unflatten(1, (self.side, self.side))[None]

    def spread(self, maps: Tensor, renormalised: bool) -> Tensor:
        assert not renormalised
        return (maps.flatten(2) @ self.to_image.T).unflatten(2, maps.shape[2:])


def test_a_map_made_by_hand_on_the_mask_has_iou_one(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grid of the render's size, and tokens that are looked at from the pixels of their own thing."""
    scene = sample_scene(HELD_OUT + 5, 1, 0)
    size = 32
    masks = [thing.mask for thing in render(scene, size).things]
    limit = 200

    def by_hand(pipeline: Any, binding: Any, caption: str, image: np.ndarray, seed: int) -> Any:
        to_words = torch.zeros(size * size, limit)
        for described, mask in zip(scene.described.things, masks, strict=True):
            for token in word_tokens(pipeline, caption, word_span(caption, described), limit):
                to_words[:, token] = torch.from_numpy(mask.flatten().astype(np.float32))
        return ByHand(to_words, torch.eye(size * size))

    monkeypatch.setattr(words, "captured", by_hand)
    assert word_iou(pipeline, [scene], size, 0) == {"objects": 1.0, "persons": 1.0}
    masks.reverse()
    assert max(word_iou(pipeline, [scene], size, 0).values()) < 0.5


def test_refinement_spreads_a_map_over_what_looks_alike() -> None:
    alike = torch.zeros(16, 16)
    alike[:4, :4] = 1 / 4  # the first row of a 4 x 4 grid looks at itself
    alike[4:, 4:] = 1 / 12
    to_words = torch.zeros(16, 3)
    to_words[1, 2] = 0.9

    def looked(to_image: Tensor, tokens: list[int]) -> Tensor:
        capture: Any = ByHand(to_words, to_image)
        return word_map(capture, tokens)

    assert looked(torch.eye(16), [2]).flatten().nonzero().flatten().tolist() == [1]
    assert looked(alike, [2]).flatten().tolist() == [1.0] * 4 + [0.0] * 12
    assert looked(alike, [0, 1]).flatten().tolist() == [0.0] * 16
    mask = word_mask(looked(alike, [2]), 8)
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
