"""The losses of learning concepts by hand, and the maps that they are of."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from interactdiff.concept.capture import gathered
from interactdiff.concept.losses import (
    attention_loss,
    divergence,
    masked_error,
    published_attention_loss,
    published_masked_error,
)


def test_divergence_of_the_published_loss_is_at_most_a_ninth_of_a_nat() -> None:
    half = torch.zeros(1, 32, 32)
    half[:, :16] = 1
    worst = published_attention_loss(half, 1 - half)
    assert 0.105 < float(worst) <= 0.1115
    assert float(attention_loss(half, 1 - half)) == pytest.approx(0.6931, abs=1e-3)
    assert float(published_attention_loss(half, half)) == pytest.approx(0, abs=1e-6)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    m = (p + q) / 2
    expected = 0.5 * F.kl_div(m.log(), p, reduction="sum") + 0.5 * (torch.tensor(1 / 0.75)).log()
    assert float(divergence(p, q)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("loss", [attention_loss, published_attention_loss])
def test_attention_is_drawn_into_its_mask(loss: Any) -> None:
    torch.manual_seed(0)
    columns = torch.rand(2, 8, 8).requires_grad_()
    masks = torch.zeros(2, 8, 8)
    masks[0, :4], masks[1, 4:] = 1, 1
    loss(columns, masks).sum().backward()
    assert columns.grad is not None
    inner = columns.grad[
        :, 1:7, 1:7
    ]  # of the published one, the extremes of a map have gradients of their own
    assert inner[masks[:, 1:7, 1:7] == 1].mean() < inner[masks[:, 1:7, 1:7] == 0].mean()


@pytest.mark.parametrize("rows", [1, 3])
def test_masked_error_by_hand(rows: int) -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    masks = torch.rand(rows, 6, 8)
    by_hand = torch.zeros(())
    for mask in masks:
        total = sum(
            float(mask[y, x] * ((predicted - target)[0, :, y, x] ** 2).mean())
            for y in range(6)
            for x in range(8)
        )
        by_hand += total / float(mask.sum()) / rows
    assert float(masked_error(predicted, target, masks)) == pytest.approx(float(by_hand), rel=1e-5)
    everything = F.mse_loss(predicted, target)
    assert torch.allclose(masked_error(predicted, target, masks, 1.0), everything)
    half = masked_error(predicted, target, masks, 0.5)
    assert float(half) == pytest.approx(0.5 * float(by_hand) + 0.5 * float(everything), rel=1e-5)


def test_the_published_error_is_half_of_the_whole_picture() -> None:
    """A mask of one row, of the photo and of ones for the prior, times a batch of one: as the code has it."""
    torch.manual_seed(0)
    predicted, target = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    masks = torch.zeros(2, 32, 32)
    masks[0, 4:10, 4:10], masks[1, 20:28, 12:30] = 1, 1
    union = F.interpolate(masks.amax(0)[None, None], (64, 64), mode="bicubic", align_corners=False)
    assert union.min() < -0.05, "bicubic masks overshoot"
    weights = torch.cat([union.repeat(1, 4, 1, 1), torch.ones(1, 4, 64, 64)])
    error = (weights * predicted - weights * target) ** 2
    valid = torch.zeros(2, 1, 64, 64)
    valid[:, :, 1:-1, 1:-1] = 1
    expected = (valid * error).sum((1, 2, 3)) / valid.sum((1, 2, 3))
    assert torch.allclose(published_masked_error(predicted, target, masks), expected.mean())
    assert torch.allclose(published_masked_error(predicted, target, masks, 0.0), expected[0])


def test_maps_are_float32_in_autocast() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 9, 8), torch.rand(1, 9, 3)
    expected = gathered(queries, keys, values)
    with torch.autocast("cpu", torch.bfloat16):
        got = gathered(queries, keys, values)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_losses_of_several_noised_copies_are_means() -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8)
    masks, columns = torch.rand(2, 6, 8), torch.rand(3, 2, 6, 8)
    pairs = [(one[None], other[None]) for one, other in zip(predicted, target, strict=True)]
    for share in (0.0, 0.3):
        each = torch.stack([masked_error(*pair, masks, share) for pair in pairs])
        assert torch.allclose(masked_error(predicted, target, masks, share), each.mean())
        each = torch.stack([published_masked_error(*pair, masks, share) for pair in pairs])
        assert torch.allclose(published_masked_error(predicted, target, masks, share), each.mean())
    for loss in (attention_loss, published_attention_loss):
        assert torch.equal(loss(columns, masks), torch.stack([loss(one, masks) for one in columns]))
