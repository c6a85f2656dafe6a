"""How the image tokens of a joint attention read interaction tokens: cross-attention of their own beside it.

With q the attention's normalised queries of the image, not yet rotated, P what grid positions add to them,
K and V the keys and values of the interaction tokens and s a schedule's value, what the attention gathers for
the image becomes

    o <- o + s * tanh(alpha) * softmax1((q + P) K^T / sqrt(d)) V

before the attention's own output projection. softmax1 has a key of zeros, whose value is zero, so that a
query may attend to nothing. Nothing depends on the attention's own keys: how many of them an image token
attends to, all or those in a window, is the base's business. Cost and memory are linear in image tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.interaction.fuser import Init, KeysValues
from interactdiff.interaction.tokens import BOX_FEATURES, SceneTokens


class TokenParts(nn.Module):
    """Some parts of every token, each with keys of its own, made of all three tokens of its interaction.

    One key for a whole person could only say that a person is there, not which of its cells is the head.

    Args:
        token_dim: width of the tokens.
        parts: of each token.
        hidden: width inside.
    """

    def __init__(self, token_dim: int, parts: int, hidden: int):
        super().__init__()
        self.parts = parts
        self.spread = nn.Sequential(
            nn.Linear(3 * token_dim, hidden), nn.SiLU(), nn.Linear(hidden, 3 * parts * token_dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[S, 3N, D] tokens, all subjects, all actions, all objects, to [S, 3N, parts, D]."""
        together = tokens.unflatten(1, (3, -1)).transpose(1, 2).flatten(2)  # [S, N, 3D]
        spread = self.spread(together).unflatten(-1, (3, self.parts, -1))  # [S, N, 3, parts, D]
        return tokens[:, :, None] + spread.transpose(1, 2).flatten(1, 2)


class JointCrossAttention(nn.Module):
    """Keys and values of the interaction tokens for one attention, and the gate.

    Args:
        dim: width of the attention, all heads together.
        token_dim: width of the interaction tokens.
        heads: the attention's own number.
        init: where training starts from; both leave the base as it is. "published": the gate at 0. "open":
            the gate at 1 and values of zero, so that gradients reach them undamped from the first step.
    """

    def __init__(self, dim: int, token_dim: int, heads: int, init: Init = "published"):
        super().__init__()
        self.heads = heads
        self.to_k = nn.Linear(token_dim, dim, bias=False)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_v = nn.Linear(token_dim, dim, bias=False)
        self.grid_positions = nn.Linear(BOX_FEATURES, dim, bias=False)
        self.alpha = nn.Parameter(torch.tensor(float(init == "open")))
        if init == "open":
            nn.init.zeros_(self.to_v.weight)

    def keys_values(self, scenes: SceneTokens) -> KeysValues:
        """[S, heads, M + 1, D] each, the last one zeros: the same for every step of a run."""
        keys = self.norm_k(self._by_head(self.to_k(scenes.tokens)))
        values = self._by_head(self.to_v(scenes.tokens) * scenes.weights[..., None].to(scenes.tokens.dtype))
        return KeysValues(*(F.pad(one, (0, 0, 0, 1)) for one in (keys, values)))

    def positions(self, grid: Tensor) -> Tensor:
        """What grid positions add to the queries, [heads, L, D], of [L, 64] features of the cells."""
        return self._by_head(self.grid_positions(grid.to(self.grid_positions.weight.dtype)))

    def forward(
        self,
        queries: Tensor,
        scenes: KeysValues,
        positions: Tensor,
        scale: Tensor | float,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """What is added to what the attention gathers for the image's tokens.

        Args:
            queries: [R, heads, L, D].
            scenes: keys and values, a row for each row of the queries, from `keys_values`.
            positions: from `positions`.
            scale: s, a float32 scalar.
            attn_mask: as from `SceneTokens.attn_mask`, a row for each row of the queries.

        Returns:
            [R, L, dim].
        """
        keys, values = scenes
        values = values * (scale * self.alpha.tanh()).to(values.dtype)
        read = F.scaled_dot_product_attention(queries + positions, keys, values, attn_mask=attn_mask)
        return read.transpose(1, 2).flatten(2)

    def _by_head(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


def joint_cross_attention_oracle(
    module: JointCrossAttention,
    queries: Tensor,
    scenes: SceneTokens,
    grid: Tensor,
    scale: float,
    attn_mask: Tensor,
) -> Tensor:
    """The formula as it is written, one scene after the other and only the tokens that there are: slow, for
    tests to compare with.

    Args:
        module: the weights.
        queries: [S, heads, L, D].
        scenes: the tokens.
        grid: [L, 64] features of the image tokens' cells.
        scale: s.
        attn_mask: [S, L, M] bool.

    Returns:
        [S, L, dim].
    """
    rows = []
    for n, tokens in enumerate(scenes.tokens):
        columns = []
        for h, part in enumerate(torch.arange(queries.shape[1] * queries.shape[3]).chunk(module.heads)):
            q = queries[n, h] + grid @ module.grid_positions.weight[part].T
            k = module.norm_k(tokens @ module.to_k.weight[part].T)
            v = tokens @ module.to_v.weight[part].T * scenes.weights[n][:, None]
            powers = (q @ k.T / q.shape[-1] ** 0.5).exp() * (attn_mask[n] & (scenes.weights[n] != 0))
            columns.append(powers @ v / (1 + powers.sum(-1, keepdim=True)))
        rows.append(torch.cat(columns, -1))
    return scale * module.alpha.tanh() * torch.stack(rows)
