"""Subjects small enough to test with: pictures of blocks of colour, and an encoder that acts."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LAYERS = (-1, 0, 1)


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Width x height pixels of colour."""
    pixels = np.random.default_rng(seed).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """The left half."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:, : size[0] // 2] = 255
    return Image.fromarray(mask)


def dog(seed: int = 0, size: tuple[int, int] = (16, 16), **options: Any) -> Subject:
    """What the tests' prompts name."""
    return Subject("dog", picture(seed, size), **{"mask": half_mask(size)} | options)


def trained_subject_adapter(denoiser: Any, token_dim: int = 8) -> SubjectAdapter:
    """An adapter whose encoder acts, as training would leave it: every parameter random."""
    torch.manual_seed(5)
    adapter = SubjectAdapter.for_denoiser(denoiser, vision=VISION, token_dim=token_dim, layers=LAYERS)
    for parameter in adapter.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.3)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapter.eval()
