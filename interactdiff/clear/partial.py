"""Attention to a part of the keys, its merge with other parts, and its gradient.

Parts are merged by log-sum-exp: the softmax over all keys is the mean of the parts' own, weighted by their
sums of exponentials. The gradient of a part, given the *merged* result, is exact (ring attention, arXiv
2310.01889).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 64e6  # of scores at a time, where they are written out
FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def fused(device: torch.device) -> bool:
    """Whether torch's kernel for CPUs is there, which also returns log-sum-exps; it is private to torch."""
    return device.type == "cpu" and all(hasattr(torch.ops.aten, name) for name in FUSED)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention to these keys.

    Args:
        q: queries [N, M, Q, D], of any strides.
        k: keys [N, M, K, D].
        v: values [N, M, K, D].
        bias: [1, M or 1, Q, K], added to the scores; each query has a key where it is finite.
        scale: of the scores.

    Returns:
        The result [N, M, Q, D] and the log-sum-exp of the scores [N, M, Q], float32 at least.
    """
    if fused(q.device):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return kernel(q, k, v, attn_mask=bias, scale=scale)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for part, rows in _chunks(q, k):
        scores = _scores(q[part, :, rows], k[part], None if bias is None else bias[:, :, rows], scale)
        lse[part, :, rows] = total = scores.logsumexp(-1)
        out[part, :, rows] = (scores.sub_(total[..., None]).exp_() @ v[part].to(scores.dtype)).to(q.dtype)
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients.

    Args:
        grad: gradient of the merged result [N, M, Q, D].
        q: as in `attend`.
        k: as in `attend`.
        v: as in `attend`.
        bias: as in `attend`.
        scale: as in `attend`.
        out: the merged result [N, M, Q, D].
        lse: the merged log-sum-exp [N, M, Q].

    Returns:
        Gradients of q, k and v, of their shapes.
    """
    if fused(q.device):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return kernel(grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    to_q, to_k, to_v = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    mean = (grad.to(dtype) * out).sum(-1, keepdim=True)
    for part, rows in _chunks(q, k):
        scores = _scores(q[part, :, rows], k[part], None if bias is None else bias[:, :, rows], scale)
        weights = scores.sub_(lse[part, :, rows, None]).exp_()
        above = grad[part, :, rows].to(dtype)
        to_v[part] += weights.mT @ above
        to_scores = (above @ v[part].to(dtype).mT).sub_(mean[part, :, rows]).mul_(weights).mul_(scale)
        to_q[part, :, rows] = to_scores @ k[part].to(dtype)
        to_k[part] += to_scores.mT @ q[part, :, rows].to(dtype)
    return to_q.to(q.dtype), to_k.to(q.dtype), to_v.to(q.dtype)


def merge(parts: Sequence[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
    """Write one part or two merged, each a result [..., D] and its log-sum-exp [...], to out and lse."""
    (first, first_lse), *others = parts
    if not others:
        out.copy_(first)
        lse.copy_(first_lse)
    for part, part_lse in others:
        share = torch.sigmoid(part_lse - first_lse)[..., None].to(out.dtype)
        torch.lerp(first, part, share, out=out)
        torch.logaddexp(first_lse, part_lse, out=lse)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """In float32 at least: rounded scores would be rounded exponents."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (scale * q.to(dtype)) @ k.to(dtype).mT
    return scores if bias is None else scores.add_(bias)


def _chunks(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Ranges of N and Q whose scores fit `CHUNK_BYTES`."""
    n, m, queries, _ = q.shape
    of_query = 4 * m * k.shape[2]
    step = min(max(int(CHUNK_BYTES // (of_query * queries)), 1), n)
    rows = min(max(int(CHUNK_BYTES // (of_query * step)), 1), queries)
    return [
        (slice(i, i + step), slice(j, j + rows)) for i in range(0, n, step) for j in range(0, queries, rows)
    ]
