"""Phrase features: what a pipeline's text encoders make of a phrase on its own.

Stable Diffusion 1.x and 2.x: the encoder's pooled output, before projection. SDXL: that of its first encoder,
and the projected one of its second, one after the other (768 + 1280 = 2048). Flux: that of its first encoder,
since T5 pools nothing; SD3: the projected ones of its first two, as its transformer gets them. Where the only
encoder is T5 or a language model (Chroma, Flux2, Qwen-Image, Z-Image): the mean of its last hidden states
over the phrase's tokens, without those that a tokenizer adds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from interactdiff.adapter import PhraseEncoder
from interactdiff.errors import AdapterError, SceneError
from interactdiff.interaction.config import PhraseFeatures
from interactdiff.sites import denoiser_of, known_family


def pipeline_phrases(
    pipeline: Any, feature_dim: int, features: PhraseFeatures = "pooled"
) -> PhraseEncoder | None:
    """A pipeline's text encoders as a phrase encoder; None if it was loaded without one of them.

    Phrases may use what textual inversion has taught the pipeline. The encoders are those that the pipeline
    has when phrases are encoded.

    Args:
        pipeline: a diffusers pipeline.
        feature_dim: width of the features that the adapter reads.
        features: how a feature is made.

    Raises:
        AdapterError: the encoders give features of another width.
    """
    if not (encoders := _encoders(pipeline, features)):
        return None
    _check_width(encoders, feature_dim, features)

    def encode(phrases: Sequence[str]) -> dict[str, Tensor]:
        encoders = _encoders(pipeline, features)
        _check_width(encoders, feature_dim, features)
        made = []
        for tokenizer, text_encoder in encoders:
            convert = getattr(pipeline, "maybe_convert_prompt", lambda texts, _: texts)
            texts = convert(list(phrases), tokenizer)
            run: Callable[..., dict[str, Tensor]] = encode_phrases if features == "pooled" else mean_states
            known = run(tokenizer, text_encoder, texts, pipeline._execution_device)
            made.append([known[text] for text in texts])
        return {p: torch.cat(parts) for p, *parts in zip(phrases, *made, strict=True)}

    return encode


def encoder_names(pipeline: Any, features: PhraseFeatures) -> list[tuple[str, str]]:
    """The tokenizers and text encoders that make features, by their names in the pipeline."""
    alone = features == "mean" or known_family(denoiser_of(pipeline)).name == "Flux"
    names = [(f"tokenizer{end}", f"text_encoder{end}") for end in (("",) if alone else ("", "_2"))]
    return [pair for pair in names if hasattr(pipeline, pair[1])]


def _encoders(pipeline: Any, features: PhraseFeatures) -> list[tuple[Any, Any]]:
    """The pairs of tokenizer and text encoder that make features; none if one of them is missing."""
    names = encoder_names(pipeline, features)
    pairs = [(getattr(pipeline, tokenizer), getattr(pipeline, encoder)) for tokenizer, encoder in names]
    return [] if any(part is None for pair in pairs for part in pair) else pairs


def _check_width(encoders: Sequence[tuple[Any, Any]], feature_dim: int, features: PhraseFeatures) -> None:
    widths = [_width(text_encoder, features) for _, text_encoder in encoders]
    if sum(widths) != feature_dim:
        raise AdapterError(
            f"expected a text encoder of width {feature_dim}, which the adapter's phrase features have, "
            f"got width {' + '.join(map(str, widths))}"
        )


@torch.no_grad()
def mean_states(
    tokenizer: Any, text_encoder: Any, phrases: Sequence[str], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The mean of a text encoder's last hidden states over the tokens of each phrase on its own.

    The arguments, the result and the error are those of `encode_phrases`; the encoder may be T5 or a language
    model, and the tokenizer a processor that has one.
    """
    if not phrases:
        return {}
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    encoded = tokenizer(
        list(phrases),
        padding=True,
        padding_side="right",
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    attended = encoded.attention_mask
    _check_lengths(phrases, attended, tokenizer.model_max_length)
    place = text_encoder.device if device is None else device
    ids, attended = encoded.input_ids.to(place), attended.to(place)
    states = text_encoder(ids, attention_mask=attended, output_hidden_states=True).hidden_states[-1]
    own = (attended * (1 - encoded.special_tokens_mask.to(place)))[..., None].to(states)
    means = (states * own).sum(1) / own.sum(1).clamp(min=1)
    return dict(zip(phrases, means, strict=True))


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
    _check_lengths(phrases, encoded.attention_mask, limit)
    ids = encoded.input_ids.to(text_encoder.device if device is None else device)
    states = text_encoder(ids).last_hidden_state
    ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    pooled = states[torch.arange(len(ids), device=states.device), ends.to(states.device)]
    if isinstance(text_encoder, CLIPTextModelWithProjection):
        pooled = text_encoder.text_projection(pooled)
    return dict(zip(phrases, pooled, strict=True))


def _check_lengths(phrases: Sequence[str], attention_mask: Tensor, limit: int) -> None:
    for phrase, length in zip(phrases, attention_mask.sum(dim=1).tolist(), strict=True):
        if length > limit:
            raise SceneError(
                f"expected phrases of at most {limit} tokens, which is what the text encoder takes, "
                f"got {length} for {phrase!r}"
            )


def _width(text_encoder: Any, features: PhraseFeatures) -> int:
    config = text_encoder.config
    if features == "mean":
        return config.get_text_config().hidden_size
    return (
        config.projection_dim if isinstance(text_encoder, CLIPTextModelWithProjection) else config.hidden_size
    )
