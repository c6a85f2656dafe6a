"""Masks from attention: narrow attention equals the published matrices, and classes are those of its rule."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_concept import PAIR, photo
from tiny_dit import make_flux
from torch import Tensor

from interactdiff import AdapterError, Entity, Interaction, Scene, attach
from interactdiff.bench.concept import BASES
from interactdiff.bench.memory import peak_memory
from interactdiff.concept import ConceptAdapter, ConceptError, Looking, MaskSettings, find_masks, learn
from interactdiff.concept.capture import AttentionCapture, Layers, gathered
from interactdiff.concept.denoising import Denoising
from interactdiff.concept.finding import Finder, default_settings
from interactdiff.concept.losses import structural_similarity
from interactdiff.concept.masks import (
    assigned,
    box_mask,
    enlarged,
    from_zero_to_one,
    iou,
    make_masks,
    refined,
    to_grid,
)
from interactdiff.concept.prompts import prompt_rows
from interactdiff.concept.reference import reference_classes, reference_scores
from interactdiff.concept.scene_boxes import scene_boxes
from interactdiff.concept.words import joint_prompt
from interactdiff.sites import denoiser_of, find_sites

EVERYTHING = MaskSettings(minimum_area=0.0)
TWO = ["cat", "dog"]


@pytest.fixture(params=["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def captured(pipe: Any, size: tuple[int, int] = (32, 48), layers: Layers | None = None) -> tuple[Any, Finder]:
    """What a call at two noise levels shows, and what looked."""
    adapter = ConceptAdapter.for_pipeline(pipe).named("masks")
    denoising = Denoising.of(pipe)
    with attach(pipe, adapter) as handle, torch.no_grad():
        sized = denoising.sized(photo(size[1], size[0]), 32)
        finder = Finder(denoising, handle["concept:masks"], sized, ["c", "d"], "{0} on {1}")
        capture = AttentionCapture(denoising.denoiser, layers)
        latents = finder.latents.expand(2, -1, -1, -1)
        prompt = denoising.encode([finder.prompt.text], sized.size[::-1]).repeated(2)
        times = torch.tensor([100, 600])
        with handle["concept:masks"].capturing(capture):
            denoising.predict(denoising.noisy(latents, torch.randn(latents.shape), times), times, prompt)
    return capture, finder


def test_columns_and_spread_equal_the_matrices(any_pipe: Any) -> None:
    """Of pictures that are not square, for each row of a batch; in a transformer within the image."""
    torch.manual_seed(0)
    capture, _ = captured(any_pipe)
    layers, text = Layers.of(denoiser_of(any_pipe)), capture._text_length
    rows = [[1], [2, 3], [0]]
    cross, own = [], []
    height, width = capture._cross[0].grid(*capture._grid)
    assert height < width
    for path in layers.cross:
        whole = capture.probabilities(path)
        is_last = whole.shape[-1] > text and type(any_pipe).__name__ == "StableDiffusion3Pipeline"
        first = whole.shape[-1] - text if is_last else 0  # of the text among the keys
        cross.append(torch.stack([whole[..., [first + r for r in one]].mean(-1) for one in rows], 1))
    for path in layers.own:
        whole = capture.probabilities(path)
        if whole.shape[-1] != whole.shape[-2]:  # text beside the image
            is_last = type(any_pipe).__name__ == "StableDiffusion3Pipeline"
            whole = whole[..., :-text] if is_last else whole[..., text:]
            whole = whole / whole.sum(-1, keepdim=True)
        own.append(whole)
    expected = torch.stack(cross).mean((0, 3)).unflatten(2, (height, width))
    assert torch.allclose(capture.columns(rows), expected, atol=1e-6)
    maps = torch.rand(2, 3, *capture.grid)
    spread = torch.stack([one.mean(1) for one in own]).mean(0) @ maps.flatten(2).mT
    assert torch.allclose(capture.spread(maps), spread.mT.unflatten(2, capture.grid), atol=1e-5)


def test_what_is_captured_is_what_the_layer_attends_with(any_pipe: Any) -> None:
    """The captured matrix times the layer's own values is what its processor gathers, positions and all."""
    torch.manual_seed(0)
    denoiser, seen = denoiser_of(any_pipe), {}
    hooks = []
    sites = {site.path: site for site in find_sites(denoiser)}
    wanted = dict.fromkeys((*Layers.of(denoiser).cross, *Layers.of(denoiser).own))
    for path in wanted:
        site = sites[path]
        for name in ("to_v", "add_v_proj"):
            if isinstance(layer := getattr(site.module, name, None), torch.nn.Module):
                keep = partial(lambda key, _, __, out: seen.update({key: out}), (path, name))
                hooks.append(layer.register_forward_hook(keep))
        if site.out is None:
            keep = partial(lambda key, _, __, out: seen.update({key: out}), path)
            hooks.append(site.module.register_forward_hook(keep))
        else:
            keep = partial(lambda key, _, args: seen.update({key: args[0]}), path)
            hooks.append(site.out.register_forward_pre_hook(keep))
    capture, _ = captured(any_pipe)
    for hook in hooks:
        hook.remove()
    for path in wanted:
        site = sites[path]
        values = [seen[path, "to_v"]]
        if site.role == "joint":
            values.insert(0 if site.text == "first" else 1, seen[path, "add_v_proj"])
        by_head = torch.cat(values, 1).unflatten(2, (site.heads, -1)).transpose(1, 2)
        gathered_there = (capture.probabilities(path) @ by_head).transpose(1, 2).flatten(2)
        assert torch.allclose(seen[path][:, -gathered_there.shape[1] :], gathered_there, atol=1e-4), path


def test_published_masks_are_reproduced(pipe: Any) -> None:
    """Spreading four times is the fourth power of the rescaled matrix; classes are as by the plain rule."""
    torch.manual_seed(1)
    unet = pipe.unet
    sharp = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k"))]
    for layer in sharp:
        layer.weight.data *= 10  # else four passes leave little but rounding
    sites = find_sites(unet)
    layers = Layers(
        tuple(site.path for site in sites if site.role == "cross" and site.level == 1),
        tuple(site.path for site in sites if site.role == "self" and site.level == 0),
    )
    capture, _ = captured(pipe, (32, 32), layers)
    rows = [[1], [3], [0]]
    scores = refined(capture, capture.columns(rows), MaskSettings())
    coarse = capture._cross[0].grid(*capture._grid)
    assert coarse[0] < capture.grid[0]
    for row in range(2):
        cross = torch.cat([capture.probabilities(path)[row] for path in layers.cross]).double()
        own = torch.cat([capture.probabilities(path)[row] for path in layers.own]).double()
        expected = reference_scores(cross, own, rows, capture.grid, coarse)
        assert torch.allclose(scores[row].double(), expected, atol=1e-5)
        for threshold in (0.0, 0.1, 0.4):
            classes = assigned(scores[row], threshold)
            assert (classes == reference_classes(expected, threshold)).float().mean() > 0.98


def test_no_matrix_of_all_tokens_is_made() -> None:
    """At 64 x 64 tokens the matrix of a head has 16.8 million numbers."""
    queries, keys = torch.randn(1, 2, 4096, 8), torch.randn(1, 2, 4096, 8)
    values = torch.rand(1, 4096, 3)
    peak = peak_memory(lambda: gathered(queries, keys, values), torch.device("cpu"))
    assert peak < 8, f"{peak} MB"
    few = [t[:, :, :64] for t in (queries, keys)]
    expected = (few[0] @ few[1].mT * 8**-0.5).softmax(-1).mean(1) @ values[:, :64]
    assert torch.allclose(gathered(*few, values[:, :64]), expected, atol=1e-5)
    many = torch.rand(1, 64, 20)  # more columns than a head is wide
    expected = (few[0] @ few[1].mT * 8**-0.5).softmax(-1).mean(1) @ many
    assert torch.allclose(gathered(*few, many), expected, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_classes_of_blobs(count: int) -> None:
    scores = torch.zeros(count + 1, 12, 12)
    for number in range(count):
        scores[number, 2 * number : 2 * number + 2, 3:9] = 1
    scores[-1] = 0.4
    classes = assigned(scores, 0.1)
    for number in range(count):
        assert (classes == number).sum() == 12
    assert classes.equal(reference_classes(scores))
    assert (classes == count).sum() == 144 - 12 * count
    random = torch.rand(count + 1, 12, 12)
    assert assigned(random, 0.1).equal(reference_classes(random))
    assert (assigned(random, 0.1, "nearest") >= 0).all()


def test_ties_and_what_is_no_number_win_nothing() -> None:
    scores = torch.tensor([0.9, 0.9, 0.1])[:, None, None].repeat(1, 4, 4)
    assert (assigned(scores, 0.0) == -1).all()
    scores[0] = torch.nan
    assert (assigned(scores, 0.1) == 1).all()
    scores[:] = torch.nan
    assert (assigned(scores, 0.1) == -1).all()
    assert torch.equal(from_zero_to_one(torch.full((2, 3, 3), 0.7)), torch.zeros(2, 3, 3))


def test_given_masks_and_boxes() -> None:
    scores = torch.full((3, 8, 8), 0.1)
    scores[0, :, :4], scores[1, :, 4:] = 0.9, 0.8
    masks = make_masks(TWO, scores, EVERYTHING, boxes={"cat": (0.0, 0.0, 1.0, 0.5)})
    assert masks.masks[0].sum() == 16, "the box cuts it"
    assert masks.areas["dog"] == 0.5
    given = torch.zeros(16, 16)
    given[:, 12:] = 1
    masks = make_masks(TWO, scores, EVERYTHING, given={"cat": given})
    assert masks.masks[0].sum() == 16
    assert masks.masks[1].sum() == 16
    assert (masks.masks.sum(0) <= 1).all()
    other = torch.zeros(16, 16)
    other[:4, :4] = 1
    both = make_masks(TWO, scores, EVERYTHING, given={"cat": given, "dog": other})
    assert torch.equal(both.masks.sum(0), torch.ones(8, 8).long()), "the background is what is left"
    for wrong, words in (
        ({"cat": torch.zeros(4, 4)}, "expected a mask that is not empty for cat"),
        ({"cat": given, "dog": given}, "a mask of its own for each concept, got the same for cat and dog"),
        ({"cow": given}, "expected boxes and masks of cat, dog, got one of cow"),
    ):
        with pytest.raises(ConceptError, match=words):
            make_masks(TWO, scores, EVERYTHING, given=wrong)
    assert box_mask((0.25, 0.0, 0.75, 1.0), (2, 4)).tolist() == [[0, 1, 1, 0]] * 2
    assert to_grid(torch.eye(4), (2, 2)).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert to_grid(torch.ones(2, 2), (4, 4)).max() == 1


def test_boxes_of_interactions_are_concepts_boxes(pipe: Any) -> None:
    """Of phrases that are the word or the token; a concept's own box comes before the scene's."""
    left, right, low = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 1.0)
    rides = (
        Interaction("Person", "riding", "bike", left, low),
        Interaction("person", "near", "d", low, right),
    )
    scene = Scene("", rides, (Entity("<ball>", right), Entity("tall person", (0.0, 0.0, 1.0, 1.0))))
    words = {"<hero>": "person", "<ball>": "red ball", "<cow>": "cow"}
    assert scene_boxes(scene, words) == {"<hero>": (0.0, 0.0, 0.75, 1.0), "<ball>": right}
    with pytest.raises(ConceptError, match="expected phrases of the scene of cow, got Person, person, bi"):
        scene_boxes(scene, {"<cow>": "cow"})
    options: Any = {"size": 32, "prompt": "{0} on {1}", "looking": Looking((100,), masks=EVERYTHING)}
    given = find_masks(pipe, photo(), ["c", "d"], boxes={"c": left, "d": right}, **options)
    read = find_masks(pipe, photo(), ["c", "d"], boxes={"c": left}, scene=scene, **options)
    assert torch.equal(read.scores, given.scores)
    assert not read.scores[1, :, : read.scores.shape[2] // 2].any()
    seen: list[Any] = []
    looking = Looking((100,), masks=MaskSettings(0.0, minimum_area=0.0, unassigned="nearest"))
    learn(pipe, photo(), {"<c>": "d"}, scene=scene, steps=1, size=32, looking=looking, on_masks=seen.append)
    assert not seen[0].scores[0, :, : seen[0].scores.shape[2] // 2].any()


def test_the_table_of_masks_is_of_what_is_found(pipe: Any) -> None:
    """A row for each choice of layers and power; with the default ones the IoU is that of find_masks."""
    bench = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/concept_masks.py"))
    settings = MaskSettings(0.0, unassigned="nearest", minimum_area=0.0)
    values = bench["scored"](pipe, 1, 64, settings, 0)
    assert list(values) == [(n, p) for n in bench["chosen_layers"](pipe.unet) for p in bench["POWERS"]]
    assert len(bench["as_markdown"](values).splitlines()) == 2 + len(values)
    image, words, truths = bench["rendered"](0, 0, 64)
    looking = Looking(bench["TIMESTEPS"], masks=settings)
    found = find_masks(pipe, image, words, size=64, prompt=bench["TEMPLATE"], looking=looking)
    expected = sum(bench["overlaps"](found, truths)) / 2
    assert values["default", 4][-1] == pytest.approx(expected)
    assert 0 < expected < 1


def squares(side: int, shift: int = 0, grow: int = 0) -> Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    first = 8 + shift - grow
    mask[8 - grow : 8 + side + grow, first : first + side + 2 * grow] = True
    return mask


def test_the_published_gate_lets_small_masks_vanish_and_overlap_does_not() -> None:
    """SSIM of the squares of the table in the method's description, and IoU of the same."""
    nothing = torch.zeros(32, 32, dtype=torch.bool)
    for one, other, expected in (
        (squares(4), nothing, 0.85),
        (squares(6), nothing, 0.79),
        (squares(8), nothing, 0.71),
        (squares(12), nothing, 0.52),
        (squares(4), squares(4, shift=1), 0.93),
        (squares(16), squares(16, shift=1), 0.80),
        (squares(8), squares(8, grow=1), 0.77),
        (squares(16), squares(16, grow=1), 0.59),
    ):
        assert float(structural_similarity(one, other)) == pytest.approx(expected, abs=0.006)
    assert float(iou(squares(4), nothing)) == 0
    assert float(iou(squares(16), squares(16, shift=1))) == pytest.approx(0.88, abs=0.01)
    assert float(iou(nothing, nothing)) == 1


def test_a_photo_of_any_aspect_is_looked_at(any_pipe: Any) -> None:
    """Twice the same, with the background that the base's text has; the pipeline is left as it was."""
    settings = default_settings(any_pipe)
    is_flux = type(any_pipe).__name__ == "FluxPipeline"
    assert settings.background == ("complement" if is_flux else "start")
    looking = Looking(
        (100, 500),
        masks=MaskSettings(0.0, background=settings.background, minimum_area=0.0, unassigned="nearest"),
    )
    options: Any = {"prompt": "{0} on {1}", "looking": looking, "given": {"c": torch.eye(9)}}
    masks = find_masks(any_pipe, photo(90, 50), ["c", "d"], size=32, **options)
    again = find_masks(any_pipe, photo(90, 50), ["c", "d"], size=32, **options)
    assert torch.equal(masks.scores, again.scores)
    assert masks.masks.shape[2] > masks.masks.shape[1]
    assert masks.masks.sum(0).unique().tolist() == [1]
    assert not denoiser_of(any_pipe)._forward_pre_hooks


def test_where_words_are(any_pipe: Any) -> None:
    rows = prompt_rows(any_pipe, joint_prompt("{0} {1} d", ["cd", "on"]))
    is_flux = type(any_pipe).__name__ == "FluxPipeline"
    if type(any_pipe).__name__ == "StableDiffusion3Pipeline":
        assert rows.concepts == ((1, 2), (3, 4))
    elif not is_flux:
        assert rows == type(rows)(((1, 2), (3, 4)), (0,), (5,))
    with attach(any_pipe, ConceptAdapter.for_pipeline(any_pipe, PAIR)):
        both = prompt_rows(any_pipe, joint_prompt("{0} on {1}", list(PAIR)))
        turned = prompt_rows(any_pipe, joint_prompt("{1}, on {0}", list(PAIR)))
    assert [len(own) for own in both.concepts] == [1, 1]
    assert both.concepts[0] < both.concepts[1]
    assert turned.concepts[0] > turned.concepts[1]
    with pytest.raises(ConceptError, match="expected a word with tokens of its own in 'a  ', got ' '"):
        prompt_rows(any_pipe, joint_prompt("a {0}", [" "]))


def test_words_within_others_are_where_their_slots_are(pipe: Any) -> None:
    """Neither a word within another concept's, nor one within the template's, nor the template's itself."""
    rows = partial(prompt_rows, pipe)
    inside = rows(joint_prompt("{0} or {1}", ["adman", "man"]))
    assert inside.concepts == ((1, 2, 3, 4, 5), (8, 9, 10))
    assert rows(joint_prompt("{0} or {1}", ["man", "adman"])).concepts == ((1, 2, 3), (6, 7, 8, 9, 10))
    assert rows(joint_prompt("photo of {0}", ["hot"])).concepts == ((8, 9, 10),)
    assert rows(joint_prompt("man or {0}", ["man"])).concepts == ((6, 7, 8),)
    with attach(pipe, ConceptAdapter.for_pipeline(pipe, {"<a>": "cat"}, vectors=2)):
        assert rows(joint_prompt("a {0} <a>", ["<a>"])).concepts == ((2, 3),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 256}, "expected a photo of at least 64 pixels a side, got 48 x 24"),
        ({"words": [*"abcdefghijklmnopqrst"]}, "expected at most 4 concepts in a photo of 48 x 24 pixels"),
        ({"words": ["a", "a"]}, "expected each concept once"),
        ({"words": ["a", ""]}, "expected a word for each concept, got an empty one"),
        ({"prompt": "very " * 9 + "{0} and {1}"}, "expected a prompt of at most 24 tokens, got c beyond"),
        (
            {"boxes": {"d": (0.0, 0.0, 0.01, 0.01)}},
            r"expected d in the photo, got a mask of 0.0 % of it: try",
        ),
    ],
)
def test_refusals(pipe: Any, change: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"words": ["c", "d"], "size": 32} | change
    with pytest.raises(ConceptError, match=words):
        find_masks(pipe, photo(), **options)
    assert not pipe.unet._forward_pre_hooks


def test_settings_that_are_refused() -> None:
    for make, words in (
        (lambda: Looking((1000,)), "expected timesteps of 0 to 999"),
        (lambda: Looking(()), "expected timesteps of 0 to 999"),
        (lambda: Looking(seed=10**20), "expected seed to be a whole number from 0 to 4294967295"),
        (lambda: Looking(blocks=()), "expected some of a transformer's blocks, got none"),
        (lambda: MaskSettings(power=-1), "expected power to be a whole number from 0 to 64, got -1"),
        (lambda: MaskSettings(exponent=0.0), r"expected exponent to be a number from 0\.1 to 10, got 0\.0"),
        (lambda: MaskSettings(minimum_area=2.0), "expected minimum_area to be a number from 0 to 1, got 2"),
        (lambda: MaskSettings(threshold=1.0), "expected a threshold of 0 up to 1"),
        (
            lambda: MaskSettings(background="sky"),
            "expected background of start, template, complement",
        ),
    ):
        with pytest.raises(ConceptError, match=words):
            make()


def test_layers(unet: Any, sd3_pipe: Any) -> None:
    with torch.device("meta"):
        large, flux = UNet2DConditionModel(**BASES["sdxl"].unet), make_flux(num_layers=4, num_single_layers=8)
    levels = {site.path: site.level for site in find_sites(large)}
    layers = Layers.of(large)
    assert ({levels[path] for path in layers.cross}, {levels[path] for path in layers.own}) == ({2}, {1})
    assert all(".transformer_blocks.5.attn2" in path for path in layers.cross), "of ten in a row the middle"
    chosen = Layers.of(flux).cross
    assert len(chosen) == 6
    assert chosen[1] == "transformer_blocks.3.attn"
    assert chosen[2:] == tuple(f"single_transformer_blocks.{n}.attn" for n in (1, 3, 5, 7))
    assert Layers.of(sd3_pipe.transformer, [1]).own == ("transformer_blocks.1.attn",)
    with pytest.raises(AdapterError, match="expected blocks of 0 to 1, got"):
        Layers.of(sd3_pipe.transformer, [2])
    assert enlarged(torch.rand(1, 1, 3, 4), (6, 8)).shape[2:] == (6, 8)


def test_boxes_and_masks_are_cropped_with_the_photo(pipe: Any) -> None:
    """A photo's edges are cut to a multiple of pixels; the photo as its own mask is the oracle."""
    denoising, size = Denoising.of(pipe), (100, 52)
    white = Image.new("L", size)
    white.paste(255, (50, 13, 90, 39))
    crop, sized = denoising.crop(size, 64), denoising.sized(white, 64)
    assert crop.kept != (0.0, 0.0, 1.0, 1.0)
    assert (crop.width, crop.height) == sized.size
    grid = sized.size[1] // 4, sized.size[0] // 4
    expected = to_grid(torch.from_numpy(np.array(sized.convert("L"))) / 255, grid)
    mask = crop.mask(torch.from_numpy(np.array(white)) / 255)
    assert (to_grid(mask, grid) - expected).abs().max() < 0.3, "within a pixel of the mask"
    x0, y0, x1, y1 = crop.box((0.5, 0.25, 0.9, 0.75))
    inside = expected > 0.5
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    found = columns[0] / grid[1], rows[0] / grid[0], (columns[-1] + 1) / grid[1], (rows[-1] + 1) / grid[0]
    assert (x0, y0, x1, y1) == pytest.approx([float(n) for n in found], abs=0.5 / min(grid))
    back = np.array(crop.restored(sized.convert("L"), size)) > 127
    assert (back == (np.array(white) > 127)).mean() > 0.97
    assert crop.box((0.0, 0.0, 1.0, 1.0)) == (0.0, 0.0, 1.0, 1.0)
