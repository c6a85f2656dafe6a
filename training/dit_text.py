"""The text encoders of the embedded diffusion transformer."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizerFast, T5EncoderModel, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from interactdiff.training.tokenizer import token_ids

LENGTHS = 16  # tokens: texts are cut to multiples, so that a compiled transformer sees few shapes


class TextParts:
    """The tokenizers and frozen text encoders of a Flux pipeline."""

    def __init__(self, folder: str | Path, device: torch.device):
        load: Any = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.text_encoder = load.float().eval().to(device).requires_grad_(False)
        load = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder_2")
        self.text_encoder_2 = load.float().eval().to(device).requires_grad_(False)
        self.tokenizer: Any = CLIPTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
        self.tokenizer_2: Any = T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer_2")

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """[B, L] tokens of CLIP and [B, T] of T5, as `FluxPipeline` pads them."""
        device = self.text_encoder.device
        short, long = token_ids(self.tokenizer, texts), token_ids(self.tokenizer_2, texts)
        return short.to(device), long.to(device)

    def length(self, long: Tensor) -> int:
        """A multiple of `LENGTHS` that no text of T5's [B, T] tokens exceeds, at most T."""
        used = (long != self.tokenizer_2.pad_token_id).any(0).nonzero().max().item() + 1
        return min(math.ceil(used / LENGTHS) * LENGTHS, long.shape[1])

    @torch.no_grad()
    def states(self, short: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] states of T5 and [B, P] pooled state of CLIP, as `FluxPipeline` makes them."""
        return self.text_encoder_2(long).last_hidden_state, self.text_encoder(short).pooler_output
