"""The published mask rule as it is written: matrices of all queries and keys. The slow oracle of `masks`."""

import torch
from torch import Tensor

from interactdiff.concept.masks import enlarged, from_zero_to_one


def reference_scores(
    cross: Tensor, own: Tensor, rows: list[list[int]], grid: tuple[int, int], coarse: tuple[int, int]
) -> Tensor:
    """R [K, h, w] of one picture.

    Args:
        cross: [maps, h' * w', text] probabilities of image tokens to the text, of all heads and layers.
        own: [maps, h * w, h * w] of the image tokens to each other.
        rows: for each class its rows of the text.
        grid: h and w.
        coarse: h' and w'.
    """
    probabilities = cross.mean(0).unflatten(0, coarse)
    columns = torch.stack([probabilities[..., one].mean(-1) for one in rows])
    maps = from_zero_to_one(enlarged(columns[None], grid)[0] ** 2)
    affinity = from_zero_to_one(own.mean(0))
    affinity = from_zero_to_one(torch.linalg.matrix_power(affinity, 4))
    spread = affinity @ maps.flatten(1).T
    return from_zero_to_one(spread.T.unflatten(1, grid))


def reference_classes(scores: Tensor, threshold: float = 0.1) -> Tensor:
    """Which class each pixel belongs to, by comparing every two: int64 [h, w], -1 where none wins."""
    classes = torch.full(scores.shape[1:], -1)
    for one in range(len(scores)):
        others = [other for other in range(len(scores)) if other != one]
        wins = torch.stack([scores[one] - scores[other] > threshold for other in others]).all(0)
        classes[wins] = one
    return classes
