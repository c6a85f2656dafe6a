"""The oracle: every pair of tokens, a dense mask, one softmax. L^2 time and memory."""

import torch
from torch import Tensor

from interactdiff.clear.pattern import Pattern


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, pooled: tuple[Tensor, Tensor] | None, pattern: Pattern, scale: float
) -> Tensor:
    """`local_attention` as its definition says it, in float32 at least.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: who sees whom.
        scale: of the scores.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if pooled is not None:
        k, v = torch.cat((k, pooled[0]), 2), torch.cat((v, pooled[1]), 2)
    scores = scale * q.to(dtype) @ k.to(dtype).transpose(2, 3)
    weights = scores.masked_fill(~pattern.mask(q.device), -torch.inf).softmax(-1)
    return (weights @ v.to(dtype)).to(q.dtype)
