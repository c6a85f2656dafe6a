"""Self-subject attention as it is written (DreamTuner, Eq. 3): slow, for tests to compare with."""

import torch
from torch import Tensor


def self_subject_attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reference_k: Tensor,
    reference_v: Tensor,
    mask: Tensor,
    weight: float,
    seen: Tensor | None = None,
) -> Tensor:
    """softmax(q [k, k_r]^T / sqrt(d) + log m) [v, v_r], m = [1, w_ref m_r]: with the whole matrix.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        reference_k: of the reference [B or 1, heads, K, D], all of its tokens.
        reference_v: likewise.
        mask: m_r [K] in [0, 1].
        weight: w_ref.
        seen: [L] in [0, 1], how far each query sees the reference; None is 1.
    """
    keys, values = (
        torch.cat([own, other.expand(len(q), -1, -1, -1)], 2)
        for own, other in ((k, reference_k), (v, reference_v))
    )
    seen = torch.ones(q.shape[2]) if seen is None else seen
    m = torch.cat([torch.ones(q.shape[2], k.shape[2]), weight * seen[:, None] * mask[None]], 1)
    scores = q.double() @ keys.double().mT / q.shape[-1] ** 0.5 + m.double().log()
    return (scores.softmax(-1) @ values.double()).to(q.dtype)
