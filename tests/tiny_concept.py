"""Concepts small enough to test with; tiny tokenizers spell their words letter by letter."""

from typing import Any

import torch
from PIL import Image
from tiny_dit import TEXT_LENGTH

from interactdiff.concept.adapter import ConceptAdapter

PAIR = {"<hero>": "cat", "<blob>": "dog"}
PROMPT = "<hero> on <blob>"  # short enough for ten tokens of T5


def trained_concept(pipe: Any, concepts: dict[str, str] | None = None, seed: int = 0, **options: Any) -> Any:
    """A concept that acts strongly, as training would leave it; in eval mode."""
    adapter = ConceptAdapter.for_pipeline(pipe, concepts or PAIR, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    return adapter.eval()


def draw(pipe: Any, prompt: str = PROMPT, **arguments: Any) -> torch.Tensor:
    """Latents of a picture from fixed noise, on any of the tiny pipelines."""
    side = 32 if hasattr(pipe, "transformer") else 16
    options: dict[str, Any] = {"num_inference_steps": 2, "height": side, "width": side}
    if hasattr(pipe, "transformer"):
        options["max_sequence_length"] = TEXT_LENGTH
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, output_type="latent", generator=generator, **options | arguments).images


def photo(width: int = 48, height: int = 24) -> Image.Image:
    """A red square and a blue one."""
    picture = Image.new("RGB", (width, height), "white")
    picture.paste("red", (2, 2, width // 2 - 2, height - 6))
    picture.paste("blue", (width // 2 + 2, 6, width - 2, height - 2))
    return picture


def halves(rows: int = 8, columns: int = 8) -> dict[str, torch.Tensor]:
    """A mask of the left for <hero>, of the lower right for <blob>."""
    left, right = torch.zeros(rows, columns), torch.zeros(rows, columns)
    left[:, : columns // 3], right[rows // 2 :, columns // 2 :] = 1, 1
    return {"<hero>": left, "<blob>": right}
