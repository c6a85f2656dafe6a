"""InteractDiffusion's fuser: gated self-attention over visual and interaction tokens (paper section 3.3).

With t = norm1(cat(x, linear(objects))) and a schedule's value s, the published formula is

    x <- x + s * tanh(alpha_attn)  * SA(t)[:, :len(x)]
    x <- x + s * tanh(alpha_dense) * FF(norm2(x))

`gated_self_attention_oracle` is that formula, word for word. `GatedSelfAttention` computes the same from two
observations: only the rows of x are kept, so only they need queries; and norm1 acts row by row, so the
objects' keys and values do not depend on x and can be computed once for a whole denoising run.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from interactdiff.interaction.tokens import BOX_FEATURES, box_features

Init = Literal["published", "open"]
TOKENS_AT_ONCE = 1024  # of the feed-forward network: measured, fewer or all of a large grid take longer


class KeysValues(NamedTuple):
    """Keys and values of the object tokens, each [B, M, dim]."""

    keys: Tensor
    values: Tensor


def grid_features(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fourier features of every cell of a grid, in the units and the layout of the interaction boxes.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        device: where to put them.

    Returns:
        [height * width, 64] float32, row by row: the features of each cell's box, xyxy in [0, 1].
    """
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    cells = torch.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], dim=-1)
    return box_features(cells.reshape(1, -1, 4))[0]


class SelfAttention(nn.Module):
    """The attention layer's weights, under the published names: no bias on q, k, v; one on the output."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attend: [B, L, dim] queries over [B, M, dim] keys and values, projected to [B, L, dim].

        `attn_mask` is [B, 1, L, M], added to the scores; None adds nothing.
        """
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.to_out(attended.transpose(1, 2).flatten(-2))


class GatedSelfAttention(nn.Module):
    """The fuser of one transformer block, between its self-attention and its cross-attention.

    Args:
        dim: width of the block.
        token_dim: width of the interaction tokens.
        heads: attention heads, the block's own number.
        grid_positions: add the projected features of each visual token's cell to the normalised visual
            tokens. A small U-Net's tokens hardly know where they are, and the published fuser relies on a
            base whose tokens do; off for published weights.
        init: where training starts from; both leave the base as it is. "published": both gates at 0. "open":
            gates at 1 and zero output projections, so that gradients reach the projections undamped from the
            first step.
    """

    def __init__(
        self, dim: int, token_dim: int, heads: int, grid_positions: bool = False, init: Init = "published"
    ):
        super().__init__()
        self.linear = nn.Linear(token_dim, dim)
        self.attn = SelfAttention(dim, heads)
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.alpha_attn = nn.Parameter(torch.tensor(float(init == "open")))
        self.alpha_dense = nn.Parameter(torch.tensor(float(init == "open")))
        self.grid_positions = nn.Linear(BOX_FEATURES, dim) if grid_positions else None
        if init == "open":
            for parameter in (*self.attn.to_out.parameters(), *self.ff.net[2].parameters()):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        objects: Tensor,
        scale: float = 1.0,
        grid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Let visual tokens read interaction tokens.

        Args:
            x: [B, L, dim] visual tokens.
            objects: [B, M, token_dim] interaction tokens.
            scale: s, the schedule's value times the strength.
            grid: [L, 64] features of the visual tokens' cells, read only with `grid_positions`.
            attn_mask: [B, L, M], added to the scores of interaction tokens; None adds nothing.

        Returns:
            [B, L, dim].
        """
        nothing = torch.zeros_like(x)
        return x + self.update(x, nothing, self.keys_values(objects), scale, self.positions(grid), attn_mask)

    def keys_values(self, objects: Tensor) -> KeysValues:
        """Keys and values of [B, M, token_dim] interaction tokens: the same for every step of a run."""
        normalised = self.norm1(self.linear(objects))
        return KeysValues(self.attn.to_k(normalised), self.attn.to_v(normalised))

    def positions(self, grid: Tensor | None) -> Tensor | float:
        """What grid positions add to the normalised visual tokens: [L, dim], the same at every step; or 0."""
        if self.grid_positions is None or grid is None:
            return 0.0
        return self.grid_positions(grid.to(self.grid_positions.weight.dtype))

    def update(
        self,
        x: Tensor,
        attended: Tensor,
        objects: KeysValues,
        scale: Tensor | float,
        positions: Tensor | float,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Let visual tokens read interaction tokens, within a block that adds its self-attention's output.

        Gates are multiplied and added in one pass over memory, where a fuser can lose time; where they
        are 0, not a bit changes. The feed-forward network, eight times as wide, acts on some tokens
        after the other: what it makes stays in the cache, and the block's own decides how much memory a step
        takes.

        Args:
            x: [B, L, dim], the block's input.
            attended: [B, L, dim], its self-attention's output: the fuser acts on x + attended.
            objects: the interaction tokens' keys and values, from `keys_values`.
            scale: s, a float32 scalar.
            positions: from `positions`.
            attn_mask: [B, L, M], added to the scores of interaction tokens; None adds nothing.

        Returns:
            [B, L, dim] for the block to add to x in the place of `attended`.
        """
        read = self._attend(x + attended, objects, positions, attn_mask)
        updated = torch.addcmul(attended, read, scale * self.alpha_attn.tanh())
        del read
        gate = scale * self.alpha_dense.tanh()
        for first in range(0, x.shape[1], TOKENS_AT_ONCE):
            some = slice(first, first + TOKENS_AT_ONCE)
            part = updated[:, some]
            part.addcmul_(self.ff(self.norm2(x[:, some] + part)), gate)
        return updated

    def _attend(
        self, x: Tensor, objects: KeysValues, positions: Tensor | float, attn_mask: Tensor | None
    ) -> Tensor:
        visual = self.norm1(x) + positions
        keys = torch.cat([self.attn.to_k(visual), objects.keys], dim=1)
        values = torch.cat([self.attn.to_v(visual), objects.values], dim=1)
        if attn_mask is not None:  # nothing is added to the scores of visual tokens
            attn_mask = F.pad(attn_mask, (x.shape[1], 0))[:, None].to(keys.dtype)
        return self.attn(self.attn.to_q(visual), keys, values, attn_mask)


def gated_self_attention_oracle(
    fuser: GatedSelfAttention,
    x: Tensor,
    objects: Tensor,
    scale: float = 1.0,
    grid: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The published formula as it is written, every row attending to every row: slow, for tests to compare
    with.

    Args:
        fuser: the weights.
        x: [B, L, dim] visual tokens.
        objects: [B, M, token_dim] interaction tokens.
        scale: s.
        grid: [L, 64] features of the visual tokens' cells, read only with `grid_positions`.
        attn_mask: [B, L, M], added to the scores of interaction tokens; it is not in the published formula.

    Returns:
        [B, L, dim].
    """
    attn, visual = fuser.attn, x.shape[1]
    t = fuser.norm1(torch.cat([x, fuser.linear(objects)], dim=1))
    if fuser.grid_positions is not None and grid is not None:
        t = torch.cat([t[:, :visual] + fuser.grid_positions(grid.to(x.dtype)), t[:, visual:]], dim=1)
    q, k, v = (
        f(t).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)
    )
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores[:, :, :visual, visual:] += attn_mask[:, None]
    weights = scores.softmax(dim=-1)
    attended = attn.to_out((weights @ v).transpose(1, 2).flatten(-2))
    x = x + scale * fuser.alpha_attn.tanh() * attended[:, :visual]
    return x + scale * fuser.alpha_dense.tanh() * fuser.ff(fuser.norm2(x))
