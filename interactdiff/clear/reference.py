"""The oracle: every pair of tokens, a dense mask, one softmax. L^2 time and memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from interactdiff.adapter import KeyBlock
from interactdiff.clear.pattern import Pattern
from interactdiff.merge import for_queries


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: tuple[Tensor, Tensor] | None,
    pattern: Pattern,
    scale: float,
    extra: Sequence[KeyBlock] = (),
) -> Tensor:
    """`local_attention` as its definition says it, in float32 at least.

    Args:
        q: queries [B, heads, L, D].
        k: keys [B, heads, L, D].
        v: values [B, heads, L, D].
        pooled: pooled keys and values, each [B, heads, P, D].
        pattern: which token attends to which.
        scale: of the scores.
        extra: further keys of the image's tokens.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if pooled is not None:
        k, v = torch.cat((k, pooled[0]), 2), torch.cat((v, pooled[1]), 2)
    scores = scale * q.to(dtype) @ k.to(dtype).transpose(2, 3)
    scores = scores.masked_fill(~pattern.mask(q.device), -torch.inf)
    for block in extra:
        keys, values, weight, of_query = for_queries(block, q)
        further = scale * q.to(dtype) @ keys.to(dtype).transpose(2, 3) + weight.to(dtype)
        further[:, :, pattern.image] += of_query.to(dtype)
        unseen = torch.ones(pattern.length, 1, dtype=torch.bool, device=q.device)
        unseen[pattern.image] = False
        scores = torch.cat([scores, further.masked_fill(unseen, -torch.inf)], 3)
        v = torch.cat([v, values], 2)
    weights = scores.softmax(-1)
    return (weights @ v.to(dtype)).to(q.dtype)
