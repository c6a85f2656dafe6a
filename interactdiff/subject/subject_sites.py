"""What acts at one site: further keys of references, and the subject encoder's attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.adapter import ExtraKeys, KeyBlock, Residual, SiteInputs
from interactdiff.sites import Site
from interactdiff.subject.encoder import KeysValues, SubjectAttention


class KeySite:
    """An attention in which a picture's tokens see those of references.

    Attributes:
        site: the attention.
        edit: adds the references' keys.
        recorder: keeps the attention's own, in a pass over a reference.
        blocks: the keys of the call under way.
        kept: [K] which tokens of a reference a pass keeps.
        recorded: their keys and values [N, heads, K, D] each, after a pass.
    """

    def __init__(self, site: Site):
        self.site = site
        self.edit = ExtraKeys(site, self._blocks)
        self.recorder = ExtraKeys(site, record=self._record)
        self.blocks: Sequence[KeyBlock] = ()
        self.kept: Tensor | None = None
        self.recorded: tuple[Tensor, Tensor] | None = None

    def _blocks(self) -> Sequence[KeyBlock]:
        return self.blocks

    def _record(self, keys: Tensor, values: Tensor) -> None:
        if self.kept is not None:
            self.recorded = keys.index_select(2, self.kept), values.index_select(2, self.kept)


class EncoderSite:
    """A site at which a picture's tokens attend to the subjects' tokens of the encoder.

    In a U-Net's block it comes after the self-attention a: the edit makes a + beta SEA(LN(x + a)) of a, for
    which the block's own x + a is the paper's h1 (Eq. 1).

    Attributes:
        site: the block, or a transformer's attention.
        edit: adds what is attended to.
        subjects: keys and values of the call's subjects.
        shares: for each of them [B or 1, L or 1, 1] how much of its result each token gets, the weight
            included.
    """

    def __init__(self, site: Site, attention: SubjectAttention, norm: nn.LayerNorm | None):
        self.site, self._attention, self._norm = site, attention, norm
        self.edit = Residual(site, self._edit)
        self.subjects: Sequence[KeysValues] = ()
        self.shares: Sequence[Tensor] = ()
        self._prepared: dict[int, tuple[Tensor, KeysValues]] = {}

    @torch.no_grad()
    def prepare(self, tokens: Mapping[int, Tensor], shares: Sequence[Tensor]) -> None:
        """Lay out a call's subjects; keys and values are made once of the same tokens.

        Args:
            tokens: by a number for each subject, [1, M, token_dim].
            shares: as the attribute.
        """
        parameter = self._attention.to_k.weight
        for key, one in tokens.items():
            kept = self._prepared.get(key)
            if kept is None or kept[0] is not one or kept[1].keys.device != parameter.device:
                made = self._attention.keys_values(one.to(parameter.device, parameter.dtype))
                self._prepared[key] = one, made
        self.subjects, self.shares = [self._prepared[key][1] for key in tokens], shares

    def give(self, tokens: Tensor, share: Tensor) -> None:
        """Lay out tokens that training made; keys and values are made anew, with gradients.

        Args:
            tokens: [B or 1, M, token_dim].
            share: [B or 1, L, 1], as in `shares`.
        """
        tokens = tokens.to(self._attention.to_k.weight.dtype)
        self.subjects, self.shares = [self._attention.keys_values(tokens)], [share]

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        self.subjects, self.shares = (), ()
        self._prepared.clear()

    def _edit(self, inputs: SiteInputs, output: Tensor) -> Tensor | None:
        if not self.subjects:
            return None
        if self._norm is not None:
            assert inputs.hidden_states is not None
            queries = self._attention.queries(self._norm(inputs.hidden_states + output))
        else:
            assert inputs.queries is not None
            queries = inputs.queries
        mixed: Tensor | None = None
        for subject, share in zip(self.subjects, self.shares, strict=True):
            part = self._attention.attend(queries, subject) * share
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        out = self._attention.to_out[0]
        total = torch.stack(torch.broadcast_tensors(*self.shares)).sum(0)
        added = F.linear(mixed, out.weight) + total * out.bias  # type: ignore[arg-type]
        return output + added.to(output.dtype)
