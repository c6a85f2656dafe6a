"""New tokens in a pipeline's tokenizers and text encoders, by hooks that come off without a trace.

A tokenizer is replaced by a copy that knows the tokens. A text encoder keeps its table of embeddings: its
hooks hand it a known token in the place of each new one, put the learned vectors into what the table gives,
and keep the states that it makes of them. By those states the rows of a denoiser's text that belong to a
concept are found, however a pipeline pads, joins or repeats its text features.
"""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.concept.words import ConceptError
from interactdiff.errors import AdapterError
from interactdiff.scene_source import ORIGINAL

MOST_BYTES = 32 * 2**20  # of states of a text encoder at concepts that are remembered
COMPARED = 64  # values of a state, by which its row of a text is found
FINAL_NORMS = (
    "final_layer_norm",
    "text_model.final_layer_norm",
)  # a CLIP's, which pipelines call for clip_skip


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline and its tokenizer, by the names of the pipeline's attributes."""

    name: str
    tokenizer_name: str

    def module(self, pipeline: Any) -> Any:
        """The text encoder."""
        return getattr(pipeline, self.name)

    def tokenizer(self, pipeline: Any) -> Any:
        """The tokenizer, as it is now."""
        return getattr(pipeline, self.tokenizer_name)

    def width(self, pipeline: Any) -> int:
        """Of the embeddings."""
        return self.module(pipeline).get_input_embeddings().weight.shape[1]

    def word_vectors(self, pipeline: Any, word: str, vectors: int) -> Tensor:
        """[vectors, width] embeddings of a word; one vector is the mean over the word's tokens.

        Several vectors begin with those of the word's tokens, in order, and repeat the last.
        """
        ids = self.tokenizer(pipeline)(word, add_special_tokens=False).input_ids
        if not ids:
            raise ConceptError(f"expected a word that {self.tokenizer_name} has tokens for, got {word!r}")
        embeddings = self.module(pipeline).get_input_embeddings().weight
        own = embeddings[torch.tensor(ids, device=embeddings.device)].detach().float()
        if vectors == 1:
            return own.mean(0, keepdim=True)
        return own[[min(n, len(own) - 1) for n in range(vectors)]]


def text_encoders(pipeline: Any) -> list[TextEncoder]:
    """Those of a pipeline that are loaded, with their tokenizers."""
    pairs = [TextEncoder(f"text_encoder{end}", f"tokenizer{end}") for end in ("", "_2", "_3")]
    return [
        pair
        for pair in pairs
        if getattr(pipeline, pair.name, None) is not None
        and getattr(pipeline, pair.tokenizer_name, None) is not None
    ]


class NewTokens:
    """A concept's tokens in one tokenizer and text encoder of a pipeline.

    Args:
        pipeline: whose tokenizer and text encoder.
        encoder: which.
        tokens: the new tokens.
        vectors: their embeddings [len(tokens), width]; called in every pass, so that training sees through.
        offsets: columns at which the encoder's states may begin in the denoiser's text.

    Attributes:
        states: [N, `COMPARED`] of each text that is remembered, by a hash of them, the latest last.
        is_full: whether states of earlier texts had to be forgotten for them.
    """

    def __init__(
        self,
        pipeline: Any,
        encoder: TextEncoder,
        tokens: Sequence[str],
        vectors: Callable[[], Tensor],
        offsets: Sequence[int] = (0,),
    ):
        self.encoder, self.tokens = encoder, tuple(tokens)
        self._pipeline, self._vectors, self._offsets = pipeline, vectors, tuple(dict.fromkeys(offsets))
        self._hooks: list[RemovableHandle] = []
        self._installed = False
        self._local = threading.local()
        self.states: OrderedDict[bytes, Tensor] = OrderedDict()
        self.is_full = False
        self._made_of = b""

    def install(self) -> None:
        """Add the tokens.

        Raises:
            AdapterError: the tokenizer has one of them already.
        """
        check_new(self._pipeline, self.encoder, self.tokens)
        _extend(self._pipeline, self.encoder.tokenizer_name, self.tokens)
        self._installed = True
        module = self.encoder.module(self._pipeline)
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            *(table.register_forward_hook(self._embed) for table in token_tables(module)),
            module.register_forward_hook(self._after),
        ]

    def uninstall(self) -> None:
        """Take them out again; the tokenizer is the pipeline's own object once nobody's tokens are left."""
        while self._hooks:
            self._hooks.pop().remove()
        self.states.clear()
        if self._installed:
            self._installed = False
            _shorten(self._pipeline, self.encoder.tokenizer_name, self.tokens)

    @property
    def ids(self) -> list[int]:
        """Of the tokens, in the tokenizer as it is now."""
        return self.encoder.tokenizer(self._pipeline).convert_tokens_to_ids(list(self.tokens))

    def rows(self, text: Tensor) -> Tensor:
        """Which rows of the denoiser's text [B, T, C] are states of the tokens: bool [B, T]."""
        found = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        if not self.states:
            return found
        known = torch.cat(list(self.states.values())).to(text)
        for offset in self._offsets:
            found |= equal_rows(text[..., offset : offset + known.shape[1]], known)
        return found

    def _remember(self, states: Tensor, in_training: bool) -> None:
        """Keep states [N, C] by their first values, the latest up to `MOST_BYTES`.

        Args:
            states: of the tokens in a pass.
            in_training: whether vectors change from pass to pass; states of others never come again.
        """
        if in_training and (made_of := _bytes(self._vectors())) != self._made_of:
            self.states.clear()
            self._made_of = made_of
        kept = states[:, :COMPARED].clone()
        key = _bytes(kept)
        self.states.pop(key, None)
        self.states[key] = kept
        while sum(one.nbytes for one in self.states.values()) > MOST_BYTES:
            self.states.popitem(last=False)
            self.is_full = True

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        self._local.slots = None
        if not isinstance(ids, Tensor):
            return None
        own = torch.tensor(self.ids, device=ids.device)
        matches = ids[..., None] == own
        mask = matches.any(-1)
        if not mask.any():
            return None
        self._local.slots = mask, matches.int().argmax(-1)
        known = ids.masked_fill(mask, _ordinary_id(module.config))
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": known})

    def _embed(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        slots = getattr(self._local, "slots", None)
        if slots is None:
            return None
        mask, which = (t.reshape(embedded.shape[:2]).to(embedded.device) for t in slots)
        own = self._vectors().to(embedded)[which]
        return torch.where(mask[..., None], own, embedded)

    def _after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        slots, self._local.slots = getattr(self._local, "slots", None), None
        if slots is None:
            return
        mask = slots[0]
        norm = next((m for n, m in module.named_modules() if n in FINAL_NORMS), None)
        hidden = getattr(output, "hidden_states", None) or ()
        sequences = list(_sequences(output, mask.shape))
        in_training = any(states.requires_grad for states in sequences)
        with torch.no_grad():
            rows = [states.detach()[mask] for states in sequences]
            if norm is not None:  # of what clip_skip reads
                rows += [norm(states.detach()[mask]) for states in hidden]
            if rows:
                self._remember(torch.cat(rows), in_training)


def _bytes(values: Tensor) -> bytes:
    """A hash of a tensor's values."""
    flat = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).digest()


def _ordinary_id(config: Any) -> int:
    """An id that means nothing to an encoder; the lowest, since old CLIPs take the highest for the end."""
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return next(number for number in range(4) if number not in special)


def token_tables(text_encoder: Any) -> list[nn.Module]:
    """The modules that look tokens up: T5 has two, which share their weights and of which it calls one."""
    weight = text_encoder.get_input_embeddings().weight
    return [one for one in text_encoder.modules() if isinstance(one, nn.Embedding) and one.weight is weight]


def equal_rows(text: Tensor, known: Tensor) -> Tensor:
    """Which rows of [B, T, C] are equal to any of [N, C]: bool [B, T]; no [B, T, N, C] is made."""
    if text.shape[-1] != known.shape[1]:
        return torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
    likely = (text[:, :, None, :4] == known[:, :4]).all(-1).nonzero()
    row, token, which = likely.unbind(1)
    same = (text[row, token] == known[which]).all(-1)
    found = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
    found[row[same], token[same]] = True
    return found


def check_new(pipeline: Any, encoder: TextEncoder, tokens: Sequence[str]) -> None:
    """Make sure that a tokenizer does not have tokens yet.

    Raises:
        AdapterError: it has one of them.
    """
    known = encoder.tokenizer(pipeline).get_vocab()
    for token in tokens:
        if token in known:
            raise AdapterError(
                f"expected a new token, got {token}, which the pipeline's {encoder.tokenizer_name} has"
            )


def _extend(pipeline: Any, name: str, tokens: Sequence[str]) -> None:
    current = getattr(pipeline, name)
    original, groups = getattr(current, ORIGINAL, (current, ()))
    setattr(pipeline, name, _extended(original, (*groups, tuple(tokens))))


def _shorten(pipeline: Any, name: str, tokens: Sequence[str]) -> None:
    current = getattr(pipeline, name)
    original, groups = getattr(current, ORIGINAL, (None, ()))
    if tuple(tokens) not in groups:
        return  # somebody has put a tokenizer of their own there since
    left = tuple(group for group in groups if group != tuple(tokens))
    setattr(pipeline, name, _extended(original, left) if left else original)


def _extended(original: Any, groups: tuple[tuple[str, ...], ...]) -> Any:
    copied = extended(original, [token for group in groups for token in group])
    setattr(copied, ORIGINAL, (original, groups))
    copied.save_pretrained = original.save_pretrained  # the tokens' vectors are not the text encoder's
    return copied


def extended(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy of a tokenizer that knows further tokens, whatever stands around them."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return copied


def _sequences(output: Any, shape: torch.Size) -> Iterator[Tensor]:
    """All [B, L, C] states in a text encoder's output."""
    parts = output if isinstance(output, list | tuple) else getattr(output, "values", tuple)()
    for part in parts:
        if isinstance(part, Tensor):
            if part.ndim == 3 and part.shape[:2] == shape:
                yield part
        elif isinstance(part, list | tuple):
            yield from _sequences(part, shape)
