"""The fuser: the fast way against the formula, and where training starts."""

import pytest
import torch

from interactdiff.interaction.fuser import GatedSelfAttention, gated_self_attention_oracle, grid_features
from interactdiff.interaction.tokens import box_features

DIM, TOKEN, HEADS, HEIGHT, WIDTH, OBJECTS = 24, 10, 3, 4, 5, 6


def a_fuser(grid_positions: bool, init=None) -> GatedSelfAttention:
    torch.manual_seed(0)
    fuser = GatedSelfAttention(DIM, TOKEN, HEADS, grid_positions, init or "published")
    if init is None:
        for parameter in fuser.parameters():
            torch.nn.init.normal_(parameter.data, std=0.4)
    return fuser


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, HEIGHT * WIDTH, DIM, generator=generator)
    objects = torch.randn(2, OBJECTS, TOKEN, generator=generator)
    return x.to(dtype), objects.to(dtype), grid_features(HEIGHT, WIDTH)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid_positions", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_equals_the_oracle(dtype, scale, grid_positions, masked):
    fuser = a_fuser(grid_positions).to(dtype)
    x, objects, grid = inputs(dtype)
    chance = torch.Generator().manual_seed(2)
    weights = (2 * torch.rand(2, HEIGHT * WIDTH, OBJECTS, generator=chance) - 1).clamp(0)
    assert not weights.any(2).all(), "some cell sees no token"
    mask = weights.log() if masked else None
    fast = fuser(x, objects, scale, grid, mask)
    slow = gated_self_attention_oracle(fuser, x, objects, scale, grid, mask)
    assert fast.dtype == slow.dtype == dtype
    assert (fast - slow).abs().mean() < 4 * torch.finfo(dtype).eps * slow.abs().mean()
    assert (slow - x).abs().max() > 0.5, "the fuser does nothing here"


@torch.no_grad()
def test_grid_positions_reach_queries_and_keys():
    """Equal visual tokens read the objects differently in different cells, once they know where they are."""
    x, objects, grid = inputs()
    same = x[:, :1].expand_as(x).contiguous()
    for grid_positions in (False, True):
        out = a_fuser(grid_positions)(same, objects, 1.0, grid)
        assert torch.allclose(out[:, 0], out[:, -1], atol=1e-5) != grid_positions


def test_grid_features_are_those_of_each_cell_row_by_row():
    row, column = 1, 2
    features = grid_features(3, 4)
    cell = torch.tensor([[[column / 4, row / 3, (column + 1) / 4, (row + 1) / 3]]])
    assert features.shape == (12, 64)
    assert torch.allclose(features[row * 4 + column], box_features(cell)[0, 0])


@pytest.mark.parametrize(
    ("init", "learns_first"),
    [("published", {"alpha_attn", "alpha_dense"}), ("open", {"attn.to_out.0.weight", "ff.net.2.weight"})],
)
def test_untrained_is_identity_and_learns(init, learns_first):
    fuser = a_fuser(True, init)
    x, objects, grid = inputs()
    out = fuser(x, objects, 1.0, grid)
    assert torch.equal(out, x)
    out.square().sum().backward()
    moving = {name for name, p in fuser.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns_first <= moving


def test_scale_zero_is_identity():
    x, objects, grid = inputs()
    assert torch.equal(a_fuser(True)(x, objects, 0.0, grid), x)
