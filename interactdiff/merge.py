"""Attention over several blocks of keys in one softmax, merged by log-sum-exp.

The softmax over all keys is the mean of the blocks' own results, weighted by their sums of exponentials. With
L1, L2 the log-sum-exps of two blocks' scores and w what each of the second one's keys counts

    out = (1 - g) out1 + g out2,    g = sigmoid(L2 + log w - L1)

The gradient of a block, given the *merged* result, is exact (ring attention, arXiv 2310.01889).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.adapter import KeyBlock

NO_KEY = -1e4  # what a bias of -inf becomes: nothing beside any key, and finite in every dtype
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
        bias: [N or 1, M or 1, Q, K], added to the scores; each query has a key where it is finite.
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
        scores = _scores(q[part, :, rows], k[part], _of(bias, part, rows), scale)
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
        scores = _scores(q[part, :, rows], k[part], _of(bias, part, rows), scale)
        weights = scores.sub_(lse[part, :, rows, None]).exp_()
        above = grad[part, :, rows].to(dtype)
        to_v[part] += weights.mT @ above
        to_scores = (above @ v[part].to(dtype).mT).sub_(mean[part, :, rows]).mul_(weights).mul_(scale)
        to_q[part, :, rows] = to_scores @ k[part].to(dtype)
        to_k[part] += to_scores.mT @ q[part, :, rows].to(dtype)
    return to_q.to(q.dtype), to_k.to(q.dtype), to_v.to(q.dtype)


def merged_attention(q: Tensor, k: Tensor, v: Tensor, extra: Sequence[KeyBlock], scale: float) -> Tensor:
    """Attention to all keys of `k`, and to those of further blocks.

    Args:
        q: queries [B, heads, Q, D].
        k: keys [B, heads, K, D].
        v: values [B, heads, K, D].
        extra: further blocks.
        scale: of the scores.

    Returns:
        [B, heads, Q, D]
    """
    if needs_gradients(q, k, v, extra):
        return concatenated_attention(q, k, v, extra, scale)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm leaves them in float32
    return merge_extra(*attend(q, k, v, None, scale), q, extra, scale)


def merge_extra(out: Tensor, lse: Tensor, q: Tensor, extra: Sequence[KeyBlock], scale: float) -> Tensor:
    """Merge what attention to some keys gave with attention to further blocks. Has no gradients.

    Args:
        out: [B, heads, Q, D].
        lse: log-sum-exps of the scores [B, heads, Q], float32 at least.
        q: queries [B, heads, Q, D].
        extra: further blocks.
        scale: of the scores.

    Returns:
        [B, heads, Q, D], in the dtype of `out`.
    """
    for block in extra:
        keys, values, weight, of_query = for_queries(block, q)
        if weight.shape[-1] == 1:  # one for the whole block, so that no kernel needs a bias
            part, part_lse = attend(q, keys, values, None, scale)
            part_lse = part_lse + weight[..., 0].to(part_lse.dtype)
        else:
            bias = weight.clamp(min=NO_KEY).to(q.dtype).expand(-1, -1, q.shape[2], -1)
            part, part_lse = attend(q, keys, values, bias, scale)
        part_lse = part_lse + of_query[..., 0].to(part_lse.dtype)
        share = torch.sigmoid(part_lse - lse)[..., None].to(out.dtype)
        out, lse = torch.lerp(out, part, share), torch.logaddexp(lse, part_lse)
    return out


def concatenated_attention(
    q: Tensor, k: Tensor, v: Tensor, extra: Sequence[KeyBlock], scale: float
) -> Tensor:
    """The definition, which has gradients: all keys one after the other, and their weights a bias.

    The arguments and the result are those of `merged_attention`.
    """
    blocks = [for_queries(block, q) for block in extra]
    keys, values = (torch.cat([own, *(block[n] for block in blocks)], 2) for n, own in enumerate((k, v)))
    weights = [q.new_zeros(1, 1, 1, k.shape[2])] + [
        (weight + of_query).clamp(min=NO_KEY).to(q.dtype).expand(-1, -1, -1, more.shape[2])
        for more, _, weight, of_query in blocks
    ]
    queries = max(weight.shape[2] for weight in weights)
    bias = torch.cat([weight.expand(len(q), -1, queries, -1) for weight in weights], 3)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)


def needs_gradients(*parts: Tensor | Sequence[KeyBlock] | None) -> bool:
    """Whether any of these tensors, or of these blocks', needs a gradient."""
    tensors = [t for part in parts for t in (_tensors(part) if isinstance(part, Sequence) else (part,))]
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def merge_into(parts: Sequence[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
    """Write one part or two merged, each a result [..., D] and its log-sum-exp [...], to out and lse."""
    (first, first_lse), *others = parts
    if not others:
        out.copy_(first)
        lse.copy_(first_lse)
    for part, part_lse in others:
        share = torch.sigmoid(part_lse - first_lse)[..., None].to(out.dtype)
        torch.lerp(first, part, share, out=out)
        torch.logaddexp(first_lse, part_lse, out=lse)


def _tensors(blocks: Sequence[KeyBlock]) -> list[Tensor]:
    return [t for block in blocks for t in block if isinstance(t, Tensor)]


def for_queries(block: KeyBlock, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block's keys and values for each row of the queries' batch, and in float32 its weights by key and by
    query."""
    keys, values = (t.to(q.dtype).expand(len(q), -1, -1, -1) for t in (block.keys, block.values))
    keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (keys, values))  # kernels assume it
    by_key, by_query = (
        weight.to(q.device)
        if isinstance(weight, Tensor)
        else torch.full((1, 1, 1, 1), weight, dtype=torch.float32, device=q.device)
        for weight in (block.log_weight, block.query_weight)
    )
    return keys, values, by_key, by_query


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


def _of(bias: Tensor | None, part: slice, rows: slice) -> Tensor | None:
    """The bias of some rows of a batch, and some queries."""
    return bias if bias is None else bias[part if len(bias) > 1 else slice(None), :, rows]
