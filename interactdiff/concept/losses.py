"""What concepts are trained on: masked denoising, and attention that follows masks (AttenCraft, section 3.3).

`published_*` are the losses as the released code has them, for comparison; docs/concept.md lists how they
differ.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.concept.masks import from_zero_to_one

EPSILON = 1e-16
SSIM_WINDOW = 7  # pixels a side


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions over the last dimension [..., N], in nats: [...]."""
    middle = (p + q) / 2
    terms = [t * (t + EPSILON).log() for t in (p, q, middle)]
    return (0.5 * terms[0] + 0.5 * terms[1] - terms[2]).sum(-1)


def attention_loss(columns: Tensor, masks: Tensor) -> Tensor:
    """How far attention to each class is from its mask, as distributions over the picture: [B, K], 0 to ln 2.

    Args:
        columns: attention to the classes [B, K, h, w], with gradients.
        masks: [K, h, w] in [0, 1], constants.
    """
    p, q = (t / t.sum(-1, keepdim=True).clamp(min=EPSILON) for t in (columns.flatten(-2), masks.flatten(-2)))
    return divergence(p, q)


def published_attention_loss(columns: Tensor, masks: Tensor) -> Tensor:
    """As `attention_loss`, of the softmax of maps from 0 to 1: [B, K], at most 0.111."""
    p, q = (t.flatten(-2).softmax(-1) for t in (from_zero_to_one(columns), masks.float()))
    return divergence(p, q)


def masked_error(predicted: Tensor, target: Tensor, masks: Tensor, full_image_weight: float = 0.0) -> Tensor:
    """The squared error within the masks of a picture's concepts, each mask divided by its own area.

    Args:
        predicted: [B, C, H, W].
        target: likewise.
        masks: of the concepts that the prompt names, [K, H, W] in [0, 1].
        full_image_weight: share of the error over the whole picture, in [0, 1].
    """
    error = (predicted - target).pow(2).mean((0, 1))[None]  # [1, H, W]
    within = (masks * error).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1e-6)
    return (1 - full_image_weight) * within.mean() + full_image_weight * error.mean()


def published_masked_error(
    predicted: Tensor, target: Tensor, masks: Tensor, full_image_weight: float = 0.5
) -> Tensor:
    """As the released code: the union of masks enters squared, channels are summed, the picture divides.

    Arguments are those of `masked_error`, with masks on their coarse grid: they are enlarged by bicubic
    interpolation, which overshoots. One latent at the border counts for nothing. Half of the loss is of the
    whole picture, since a mask of one row meets a batch of two.
    """
    union = masks.amax(0)[None, None]
    union = F.interpolate(union, predicted.shape[2:], mode="bicubic", align_corners=False)
    valid = F.pad(torch.ones_like(predicted[:, :1, 1:-1, 1:-1]), (1, 1, 1, 1))
    parts = []
    for weight in (union, torch.ones_like(union)):
        error = (weight * predicted - weight * target).pow(2)
        parts.append((valid * error).sum() / valid.sum())
    return (1 - full_image_weight) * parts[0] + full_image_weight * parts[1]


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """SSIM of masks [h, w] in [0, 1], as scikit-image has it for a range of 1, from 7 pixels a side on.

    Windows of 7 x 7, sample covariance, those that lie within the picture alone.
    """
    x, y = (t.float()[None, None] for t in (one, other))
    mean_x, mean_y = (F.avg_pool2d(t, SSIM_WINDOW, 1) for t in (x, y))
    count = SSIM_WINDOW**2
    unbiased = count / (count - 1)
    var_x = unbiased * (F.avg_pool2d(x * x, SSIM_WINDOW, 1) - mean_x**2)
    var_y = unbiased * (F.avg_pool2d(y * y, SSIM_WINDOW, 1) - mean_y**2)
    covariance = unbiased * (F.avg_pool2d(x * y, SSIM_WINDOW, 1) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def sampling_weights(ratios: Sequence[float], exponent: float = 1.0) -> list[float]:
    """How often each concept is drawn alone: a share of 1, more for those that attention finds less well.

    Args:
        ratios: of each concept, its attention within its mask over that without.
        exponent: how strongly that counts; 0 for equal shares.
    """
    lags = [max(ratio, 1e-6) ** -exponent for ratio in ratios]
    shares = [lag / sum(lags) for lag in lags]
    clamped = [min(max(share, 0.1), 0.9) for share in shares]
    return [share / sum(clamped) for share in clamped]
