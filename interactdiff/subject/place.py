"""Where a subject shall be: which of the picture's tokens see it, with soft edges."""

from collections.abc import Sequence

import torch
from torch import Tensor

from interactdiff.families import Grid
from interactdiff.scene_checks import Box


def place(boxes: Sequence[Box], grid: Grid) -> Tensor:
    """[L] in [0, 1]: how far each cell of a grid lies within any of the boxes.

    It is the share of the cell that a box covers, which is what makes edges soft.

    Args:
        boxes: xyxy in [0, 1]; none of them is everywhere.
        grid: rows and columns of the picture's tokens.
    """
    rows, columns = grid
    if not boxes:
        return torch.ones(rows * columns)
    parts = []
    for x0, y0, x1, y1 in boxes:
        parts.append(torch.outer(_covered(rows, y0, y1), _covered(columns, x0, x1)).flatten())
    return torch.stack(parts).amax(0)


def _covered(cells: int, start: float, end: float) -> Tensor:
    """[cells] shares of each cell between start and end; the cell in the middle is always seen."""
    edges = torch.arange(cells + 1, dtype=torch.float64)
    low, high = edges[:-1].clamp(min=start * cells), edges[1:].clamp(max=end * cells)
    covered = (high - low).clamp(0, 1).float()
    middle = min(int((start + end) / 2 * cells), cells - 1)
    covered[middle] = max(float(covered[middle]), 0.5)
    return covered
