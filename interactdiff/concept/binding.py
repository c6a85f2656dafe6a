"""Concepts attached: tokens in the pipeline, changed keys and values at their rows of the text."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from interactdiff.adapter import Binding, Edit, Host, Observer, Residual, SiteInputs
from interactdiff.calls import Call
from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.capture import AttentionCapture, observed_sites
from interactdiff.concept.encoders import NewTokens, check_new, text_encoders
from interactdiff.errors import AdapterError
from interactdiff.handle import attached_bindings
from interactdiff.sites import Site, known_family

Index = tuple[Tensor, Tensor]


class ConceptBinding(Binding):
    """An attached `ConceptAdapter`: `handle["concept"]`.

    Tokenizers and text encoders know the new tokens while it is attached. In a call whose text has none of
    them nothing acts, unless the concept changes all words.

    Attributes:
        new_tokens: one for each text encoder.
        detach_start: in training, whether the keys and values of the text's first token are constants, as in
            Custom Diffusion.
    """

    adapter: ConceptAdapter

    def __init__(self, adapter: ConceptAdapter, host: Host):
        super().__init__(adapter, host)
        self.detach_start = False
        self.capture: AttentionCapture | None = None
        self._index: Index | None = None
        self._text: tuple[Any, int | None, tuple[Index, Index]] | None = None
        self._text_argument = known_family(host.denoiser).call.text
        self._length = 0
        self._idle = self._warned = False
        self.new_tokens = self._tokens()
        self._residuals = tuple(
            Residual(site, partial(self._change, site, at), at)  # type: ignore[arg-type]
            for site, at in adapter.changed(host.denoiser)
        )
        self._observers = tuple(
            Observer(site, partial(self._observe, site)) for site in observed_sites(host.sites)
        )
        self.edits = self._residuals + self._observers

    def install(self) -> None:
        """Add the tokens to the pipeline's tokenizers and text encoders."""
        for tokens in self.new_tokens:
            tokens.install()

    def uninstall(self) -> None:
        """Take them out again."""
        for tokens in self.new_tokens:
            tokens.uninstall()

    def components(self) -> Mapping[str, Any]:
        """The tokenizers that know the tokens, and the text encoders."""
        pairs = [(one.encoder.tokenizer_name, one.encoder.name) for one in self.new_tokens]
        return {name: getattr(self.host.pipeline, name, None) for pair in pairs for name in pair}

    def prepare(self, call: Call) -> Collection[Edit]:
        """Find the concepts' rows of the text."""
        self._index, edits = None, ()
        text = call.arguments.get(self._text_argument)
        if self._residuals and isinstance(text, Tensor):
            own, every = self._rows(text)
            index = every if self.acts_on_all else own
            if len(index[0]) and not self._idle:
                self._index, self._length, edits = index, text.shape[1], self._residuals
            elif self.new_tokens and not self._warned:
                self._check_caller(call)
                self._check_memory()
        if self.capture is None:
            return edits
        self.capture.begin(call)
        return self.edits if edits else self._observers

    def mark(self, text: Tensor, rows: Tensor) -> None:
        """Say which rows of a text are the concepts', where it was not made by the pipeline's text encoders.

        Args:
            text: what the denoiser is going to be called with, [B, T, C]: this very tensor.
            rows: bool [B, T].
        """
        own, every = (one.nonzero(as_tuple=True) for one in (rows, torch.ones_like(rows)))
        self._text = ref(text), _version(text), ((own[0], own[1]), (every[0], every[1]))

    @property
    def acts_on_all(self) -> bool:
        """Whether all rows of the text are changed: if it was trained so and is the only concept."""
        if self.adapter.config.acts_on == "own":
            return False
        others = [
            one
            for one in attached_bindings(self.host.denoiser)
            if isinstance(one, ConceptBinding) and one.adapter.config.concepts
        ]
        return len(others) < 2

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Within the block keys and values are the base's."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    @contextmanager
    def capturing(self, capture: AttentionCapture) -> Iterator[AttentionCapture]:
        """Keep the queries and keys of the calls within the block."""
        self.capture = capture
        try:
            yield capture
        finally:
            self.capture = None

    def describe(self) -> str:
        """The tokens, and which words they change."""
        tokens = ", ".join(concept.token for concept in self.adapter.config.concepts)
        return f"{tokens} (changes {'all words' if self.acts_on_all else 'no other words'})" if tokens else ""

    def _check_caller(self, call: Call) -> None:
        """Say it once if another pipeline calls that shares the denoiser and not the tokenizers."""
        for name, tokenizer in self.components().items():
            theirs = getattr(call.caller, name, None)
            if theirs is not None and not isinstance(theirs, nn.Module) and len(theirs) < len(tokenizer):
                self._warned = True
                warnings.warn(
                    f"{self.adapter.name}: expected a {name} that knows {self.adapter.tokens[0]}, got "
                    f"another of {type(call.caller).__name__}: make that anew with from_pipe",
                    stacklevel=2,
                )
                return

    def _check_memory(self) -> None:
        """Say it once if a text has no rows of the tokens that may have had some which were forgotten."""
        if not self._warned and any(tokens.is_full for tokens in self.new_tokens):
            self._warned = True
            warnings.warn(
                f"{self.adapter.name}: expected one of the latest texts with {self.adapter.tokens[0]} that "
                "were encoded, got one without it, or an older one, in which its keys and values do not act: "
                "encode older prompt_embeds anew",
                stacklevel=2,
            )

    def _tokens(self) -> list[NewTokens]:
        """Those of each text encoder; the pipeline is looked at and left alone."""
        if not self.adapter.config.concepts:
            return []
        pipeline = self.host.pipeline
        encoders = [] if pipeline is None else text_encoders(pipeline)
        widths = {encoder.name: encoder.width(pipeline) for encoder in encoders}
        wanted = self.adapter.config.widths
        if pipeline is None or widths != wanted:
            got = "a bare denoiser" if pipeline is None else f"{_sizes(widths)} in {type(pipeline).__name__}"
            raise AdapterError(f"expected a pipeline with the concept's {_sizes(wanted)}, got {got}")
        if any(c.vectors > 1 for c in self.adapter.config.concepts) and not hasattr(
            pipeline, "maybe_convert_prompt"
        ):
            raise AdapterError(
                f"expected tokens of one vector for {type(pipeline).__name__}, which takes prompts as they "
                "are, got some of several"
            )
        offsets = [0, *(sum(list(widths.values())[:n]) for n in range(1, len(widths)))]
        made = []
        for encoder in encoders:
            check_new(pipeline, encoder, self.adapter.tokens)
            vectors = partial(self.adapter.all_vectors, encoder.name)
            made.append(NewTokens(pipeline, encoder, self.adapter.tokens, vectors, offsets))
        return made

    def _rows(self, text: Tensor) -> tuple[Index, Index]:
        """The concepts' rows of a call's text, and all; read once for the steps of a run."""
        if self._text is None or self._text[0]() is not text or self._text[1] != _version(text):
            found = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
            for tokens in self.new_tokens:
                found |= tokens.rows(text)
            self.mark(text, found)
        assert self._text is not None
        return self._text[2]

    def _change(self, site: Site, at: str, inputs: SiteInputs, output: Tensor) -> Tensor | None:
        if self._index is None or inputs.hidden_states is None:
            return None
        row, token = self._index
        if site.role == "single" and site.text == "last":
            token = token + (output.shape[1] - self._length)
        changed = self.adapter.projection(site, at)(inputs.hidden_states[row, token], output[row, token])
        output = output.index_put((row, token), changed)
        if self.detach_start:
            output = torch.cat([output[:, :1].detach(), output[:, 1:]], 1)
        return output

    def _observe(self, site: Site, inputs: SiteInputs) -> None:
        if self.capture is not None:
            self.capture.take(site, inputs)


def _version(text: Tensor) -> int | None:
    """What counts changes in place; inference tensors have no such thing."""
    return None if text.is_inference() else text._version


def _sizes(widths: dict[str, int]) -> str:
    named: Sequence[str] = [f"{name} of width {width}" for name, width in widths.items()]
    return " and ".join(named) or "no text encoder"
