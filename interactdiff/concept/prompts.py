"""Where a prompt's words are among the rows of a denoiser's text."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from interactdiff.concept.encoders import text_encoders
from interactdiff.concept.words import ConceptError, ConceptPrompt
from interactdiff.pipeline_calls import text_limits
from interactdiff.sites import denoiser_of, known_family
from interactdiff.token_offsets import with_offsets


@dataclass(frozen=True)
class PromptRows:
    """Rows of the text.

    Attributes:
        concepts: for each name those of its tokens.
        start: of the first token, which has seen nothing of the prompt; empty for encoders that have none.
        template: of the words around the names.
    """

    concepts: tuple[tuple[int, ...], ...]
    start: tuple[int, ...]
    template: tuple[int, ...]

    def of_background(self, background: str | None) -> tuple[int, ...]:
        """The rows of a background, see `MaskSettings`; empty where it has none."""
        return {"start": self.start, "template": self.template}.get(background or "", ())

    def classes(self, background: str | None) -> list[tuple[int, ...]]:
        """The rows of each concept, and of the background where it has some.

        Raises:
            ConceptError: the background has none.
        """
        if background == "complement":
            return list(self.concepts)
        rows = self.of_background(background)
        if not rows:
            raise ConceptError(
                f"expected a text with rows for the background {background!r}, got none: try another"
            )
        return [*self.concepts, rows]


def segments(pipeline: Any) -> list[tuple[Any, int, int]]:
    """The tokenizers whose positions are rows of the denoiser's text: tokenizer, first row, rows.

    Raises:
        ConceptError: the family's text is not laid out so.
    """
    family = known_family(denoiser_of(pipeline)).name
    if family == "U-Net":
        tokenizer = getattr(pipeline, "tokenizer", None) or pipeline.tokenizer_2
        return [(tokenizer, 0, tokenizer.model_max_length)]
    (_, limit), *_ = text_limits(pipeline)
    if family == "Flux":
        return [(pipeline.tokenizer_2, 0, limit)]
    if family == "SD3":
        clip = pipeline.tokenizer_max_length
        loaded = {encoder.name for encoder in text_encoders(pipeline)}  # diffusers fills others' rows with 0
        found = [(pipeline.tokenizer, 0, clip)] if "text_encoder" in loaded else []
        if "text_encoder_3" in loaded:
            found.append((pipeline.tokenizer_3, clip, limit))
        return found
    raise ConceptError(f"expected a base of U-Net, Flux, SD3 for concepts, got {family}")


def prompt_rows(pipeline: Any, prompt: ConceptPrompt) -> PromptRows:
    """Find the rows of a prompt's names.

    Args:
        pipeline: from text, with the names' new tokens where they are new.
        prompt: that names concepts.

    Raises:
        ConceptError: a name has no token of its own, or one beyond what the text encoder takes.
    """
    concepts: list[list[int]] = [[] for _ in prompt.names]
    start, template = [], []
    for tokenizer, first, limit in segments(pipeline):
        text, spans = _as_tokenized(pipeline, prompt, tokenizer)
        encoded = with_offsets(tokenizer)(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        offsets, special = encoded.offset_mapping, encoded.special_tokens_mask
        for row, ((begin, end), is_special) in enumerate(zip(offsets, special, strict=True)):
            if is_special:
                if row == 0:
                    start.append(first)
                continue
            own = [n for n, (low, high) in enumerate(spans) if begin < high and low < end]
            if own and row >= limit - 1:
                raise ConceptError(
                    f"expected a prompt of at most {limit} tokens, got {prompt.names[own[0]]} beyond them"
                )
            if row < limit:
                (concepts[own[0]] if own else template).append(first + row)
    for name, own in zip(prompt.names, concepts, strict=True):
        if not own:
            raise ConceptError(f"expected a word with tokens of its own in {prompt.text!r}, got {name!r}")
    return PromptRows(tuple(map(tuple, concepts)), tuple(start), tuple(template))


def _as_tokenized(pipeline: Any, prompt: ConceptPrompt, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text that a pipeline tokenizes, and where each name is in it.

    Pipelines write further tokens behind one of several vectors, which are part of its name.
    """
    parts = list(prompt.parts)
    if hasattr(pipeline, "maybe_convert_prompt"):
        parts = pipeline.maybe_convert_prompt(parts, tokenizer)
    begins = [0, *accumulate(map(len, parts))]
    return "".join(parts), [(begins[slot], begins[slot + 1]) for slot in prompt.slots]
