"""Phrase features: what the text encoder makes of a phrase on its own."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from interactdiff.scene import SceneError

PhraseEncoder = Callable[[Sequence[str]], Mapping[str, Tensor]]


@torch.no_grad()
def encode_phrases(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: CLIPTextModel,
    phrases: Sequence[str],
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The text encoder's pooled output, before projection, of each phrase on its own.

    The state at end-of-text is read where the tokenizer put that token: a text encoder whose configuration
    has another id for it would pool some other token without a word.

    Args:
        tokenizer: the pipeline's.
        text_encoder: the pipeline's.
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
    pooled = states[torch.arange(len(ids), device=ids.device), ends.to(states.device)]
    return dict(zip(phrases, pooled, strict=True))
