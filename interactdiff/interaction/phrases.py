"""Phrase features: what a pipeline's text encoders make of a phrase on its own.

Stable Diffusion 1.x and 2.x: the encoder's pooled output, before projection. SDXL: that of its first encoder,
and the projected one of its second, one after the other (768 + 1280 = 2048). Flux: that of its first encoder,
since T5 pools nothing; SD3: the projected ones of its first two, as its transformer gets them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from interactdiff.checkpoint import AdapterError
from interactdiff.scene import SceneError
from interactdiff.sites import denoiser_of

PhraseEncoder = Callable[[Sequence[str]], Mapping[str, Tensor]]


def pipeline_phrases(pipeline: Any, feature_dim: int) -> PhraseEncoder | None:
    """A pipeline's text encoders as a phrase encoder; None if it was loaded without one of them.

    Phrases may use what textual inversion has taught the pipeline.

    Args:
        pipeline: a diffusers pipeline.
        feature_dim: width of the features that the adapter reads.

    Raises:
        AdapterError: the encoders give features of another width.
    """
    pairs = [
        (getattr(pipeline, f"tokenizer{end}"), getattr(pipeline, f"text_encoder{end}"))
        for end in (("",) if isinstance(denoiser_of(pipeline), FluxTransformer2DModel) else ("", "_2"))
        if hasattr(pipeline, f"text_encoder{end}")
    ]
    if not pairs or any(part is None for pair in pairs for part in pair):
        return None
    widths = [_width(text_encoder) for _, text_encoder in pairs]
    if sum(widths) != feature_dim:
        raise AdapterError(
            f"expected a text encoder of width {feature_dim}, which the adapter's phrase features have, "
            f"got width {' + '.join(map(str, widths))}"
        )

    def encode(phrases: Sequence[str]) -> dict[str, Tensor]:
        features = []
        for tokenizer, text_encoder in pairs:
            convert = getattr(pipeline, "maybe_convert_prompt", lambda texts, _: texts)
            texts = convert(list(phrases), tokenizer)
            known = encode_phrases(tokenizer, text_encoder, texts, pipeline._execution_device)
            features.append([known[text] for text in texts])
        return {p: torch.cat(parts) for p, *parts in zip(phrases, *features, strict=True)}

    return encode


@torch.no_grad()
def encode_phrases(
    tokenizer: Any, text_encoder: Any, phrases: Sequence[str], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """One text encoder's pooled output of each phrase on its own, projected if the encoder projects.

    The state at end-of-text is read where the tokenizer put that token: a text encoder whose configuration
    has another id for it would pool some other token without a word.

    Args:
        tokenizer: the pipeline's, of CLIP.
        text_encoder: the pipeline's `CLIPTextModel` or `CLIPTextModelWithProjection`.
        phrases: any number, encoded in one batch; the encoder is causal, so padding does not reach
            end-of-text.
        device: where the encoder runs; where it lies if not given.

    Returns:
        For each phrase its [feature_dim] feature.

    Raises:
        SceneError: a phrase is longer than the encoder takes.
    """
    if not phrases:
        return {}
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    encoded = tokenizer(list(phrases), padding=True, return_tensors="pt", verbose=False)
    for phrase, length in zip(phrases, encoded.attention_mask.sum(dim=1).tolist(), strict=True):
        if length > limit:
            raise SceneError(
                f"expected phrases of at most {limit} tokens, which is what the text encoder takes, "
                f"got {length} for {phrase!r}"
            )
    ids = encoded.input_ids.to(text_encoder.device if device is None else device)
    states = text_encoder(ids).last_hidden_state
    ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    pooled = states[torch.arange(len(ids), device=states.device), ends.to(states.device)]
    if isinstance(text_encoder, CLIPTextModelWithProjection):
        pooled = text_encoder.text_projection(pooled)
    return dict(zip(phrases, pooled, strict=True))


def _width(text_encoder: Any) -> int:
    config, projects = text_encoder.config, isinstance(text_encoder, CLIPTextModelWithProjection)
    return config.projection_dim if projects else config.hidden_size
