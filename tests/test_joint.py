"""The adapter's cross-attention beside a joint attention, against its formula; and who sees which token."""

import pytest
import torch

from interactdiff.interaction.fuser import grid_features
from interactdiff.interaction.joint import (
    JointCrossAttention,
    SceneTokens,
    TokenParts,
    joint_cross_attention_oracle,
)

GRID, HEADS, WIDTH = (4, 6), 2, 16
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def scenes(dtype: torch.dtype = torch.float32) -> SceneTokens:
    """Two scenes of four tokens, one of which is missing in the second."""
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.2, 0.3], [0, 0, 1, 1]])
    weights = torch.tensor([[1.0, 1.0, 0.5, 2.0], [1.0, 0.0, 1.0, 1.0]])
    tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    return SceneTokens(tokens.to(dtype), weights, boxes.expand(2, 4, 4))


def reader(dtype: torch.dtype = torch.float32) -> JointCrossAttention:
    torch.manual_seed(1)
    made = JointCrossAttention(WIDTH, 8, HEADS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter.data, std=0.4)
    return made.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("structured", [False, True])
def test_reads_as_the_formula_says(structured: bool, dtype: torch.dtype) -> None:
    queries = torch.randn(2, HEADS, 24, 8, generator=torch.Generator().manual_seed(2))
    asked, module = scenes(torch.float64), reader(torch.float64)
    seen, grid = asked.attn_mask(GRID, structured), grid_features(*GRID)
    assert seen is not None
    cells = seen[:, 0, :, :-1].expand(2, 24, 4)
    expected = joint_cross_attention_oracle(module, queries.double(), asked, grid.double(), 0.7, cells)
    fast, tokens = reader(dtype), scenes(dtype)
    read = fast(queries.to(dtype), fast.keys_values(tokens), fast.positions(grid), torch.tensor(0.7), seen)
    assert read.dtype == dtype
    assert torch.allclose(read.double(), expected, atol=TOLERANCE[dtype])
    assert expected.abs().max() > 0.05


def test_a_token_is_seen_by_the_cells_that_its_box_touches() -> None:
    seen = scenes().attn_mask(GRID, structured=True)
    assert seen is not None
    cells = seen[0, 0].unflatten(0, GRID)
    assert cells[..., 0].nonzero().tolist() == [[y, x] for y in range(2) for x in range(3)]
    assert cells[..., 1].nonzero().tolist() == [[y, x] for y in (2, 3) for x in (3, 4, 5)]
    assert cells[..., 2].nonzero().tolist() == [[1, 1]]  # of no area
    assert cells[..., 3].all()
    assert cells[..., 4].all()  # the key of zeros
    assert not seen[1, 0, :, 1].any()  # a token that is not there


def test_no_mask_is_made_where_all_see_all() -> None:
    whole = scenes()._replace(weights=torch.ones(2, 4))
    assert whole.attn_mask(GRID, structured=False) is None
    seen = scenes().attn_mask(GRID, structured=False)
    assert seen is not None
    assert seen.shape == (2, 1, 1, 5)


def test_a_cell_that_sees_nothing_is_left_alone() -> None:
    module, asked = reader(), scenes()
    only = SceneTokens(*(t[:, :1] for t in asked))
    read = module(
        torch.randn(2, HEADS, 24, 8),
        module.keys_values(only),
        module.positions(grid_features(*GRID)),
        1.0,
        only.attn_mask(GRID, structured=True),
    )
    outside = torch.ones(GRID, dtype=torch.bool)
    outside[:2, :3] = False
    assert read[:, outside.flatten()].abs().max() == 0
    assert read[:, ~outside.flatten()].abs().min() > 0


@pytest.mark.parametrize("init", ["published", "open"])
def test_untrained_it_says_nothing_and_can_learn(init: str) -> None:
    torch.manual_seed(0)
    module = JointCrossAttention(WIDTH, 8, HEADS, init)  # type: ignore[arg-type]
    read = module(
        torch.randn(2, HEADS, 24, 8),
        module.keys_values(scenes()),
        module.positions(grid_features(*GRID)),
        1.0,
    )
    assert read.abs().max() == 0
    (read * torch.randn_like(read)).sum().backward()
    learns = module.alpha if init == "published" else module.to_v.weight
    assert learns.grad is not None
    assert learns.grad.abs().sum() > 0


def test_parts_know_all_tokens_of_their_interaction_and_of_no_other() -> None:
    torch.manual_seed(0)
    parts = TokenParts(token_dim=4, parts=3, hidden=8)
    tokens = torch.randn(1, 6, 4)  # two interactions: subjects 0 and 1, actions 2 and 3, objects 4 and 5
    before = parts(tokens)
    assert before.shape == (1, 6, 3, 4)
    tokens[0, 2] += 1  # the first one's action
    changed = (parts(tokens) - before).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [True, False, True, False, True, False]
    assert (before[:, :, 0] - before[:, :, 1]).abs().min() > 0
