"""Which token attends to which: CLEAR's windows (arXiv 2412.16112, section 3)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interactdiff.errors import ClearError

SHAPES = ("circle", "square")
TRAINED_LENGTH = 64**2 + 512  # keys of a 1024 px picture of FLUX.1-dev, for which its scale is right


@dataclass(frozen=True)
class Pattern:
    """Which token attends to which, among the text tokens and the H x W image tokens, in raster order.

    Image token (y, x) attends to the image tokens at (y + dilation * dy, x + dilation * dx) that lie on the
    grid and have dy^2 + dx^2 < window^2 (circle) or max(|dy|, |dx|) < window (square), and to every text
    token. Text tokens attend to every text and image token. With `down_factor` d > 1 image tokens also attend
    to every pooled token.
    At the edge of the grid a window is cut off, as published; NATTEN's windows move inwards instead.

    Dilation is that of Dilated Neighborhood Attention (arXiv 2209.15001): the window keeps its number of keys
    and spans `dilation` times as far, and tokens attend to their own residue class of rows and columns alone.

    Attributes:
        grid: rows H and columns W of the image tokens, each from 1 up.
        text_length: text tokens T, from 0 up.
        window: radius r in steps, from 1 (a token attends to itself) up.
        down_factor: d; keys and values of d x d image tokens are pooled into one. 1: none are.
        shape: "circle" or "square".
        dilation: image tokens per step, from 1 up.
        text_first: text tokens come before the image's (Flux) or after them (SD3).

    Raises:
        ClearError: in one sentence, for a value out of its range or a grid that d does not divide.
    """

    grid: tuple[int, int]
    text_length: int = 0
    window: int = 16
    down_factor: int = 1
    shape: str = "circle"
    dilation: int = 1
    text_first: bool = True

    def __post_init__(self):
        sides = self.grid if isinstance(self.grid, tuple) else ()
        if len(sides) != 2 or not all(_whole(n, 1) for n in sides):
            raise ClearError(f"grid: expected two whole numbers from 1 up, (H, W), got {self.grid!r}")
        for name, least in (("text_length", 0), ("window", 1), ("down_factor", 1), ("dilation", 1)):
            if not _whole(value := getattr(self, name), least):
                raise ClearError(f"{name}: expected a whole number from {least} up, got {value!r}")
        if self.shape not in SHAPES:
            raise ClearError(f"shape: expected {' or '.join(SHAPES)}, got {self.shape!r}")
        if any(n % self.down_factor for n in self.grid):
            height, width = self.grid
            raise ClearError(
                f"down_factor: expected a number that divides the grid {height} x {width}, "
                f"got {self.down_factor}"
            )

    @property
    def image_length(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Text and image tokens."""
        return self.text_length + self.image_length

    @property
    def pooled_length(self) -> int:
        """Pooled keys."""
        return self.image_length // self.down_factor**2 if self.down_factor > 1 else 0

    @property
    def reach(self) -> int:
        """The farthest that a window reaches along an axis, in steps."""
        return self.window - 1

    @property
    def text(self) -> slice:
        """Where the text tokens stand."""
        return slice(0, self.text_length) if self.text_first else slice(self.image_length, self.length)

    @property
    def image(self) -> slice:
        """Where the image tokens stand."""
        return slice(self.text_length, self.length) if self.text_first else slice(0, self.image_length)

    def within(self, dy: Any, dx: Any) -> Any:
        """Whether steps lie in the window; numbers or tensors."""
        if self.shape == "circle":
            return dy * dy + dx * dx < self.window * self.window
        return (abs(dy) < self.window) & (abs(dx) < self.window)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """True where a token (row) attends to a key (column): bool [L, L + pooled], L^2 bytes."""
        height, width = self.grid
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        rows, columns = y[:, None] - y, x[:, None] - x
        steps = [offsets.div(self.dilation, rounding_mode="floor") for offsets in (rows, columns)]
        near = self.within(steps[0][:, None, :, None], steps[1][None, :, None, :])
        alike = [offsets % self.dilation == 0 for offsets in (rows, columns)]
        near &= alike[0][:, None, :, None] & alike[1][None, :, None, :]
        mask = torch.ones(self.length, self.length + self.pooled_length, dtype=torch.bool, device=device)
        mask[self.image, self.image] = near.reshape(self.image_length, self.image_length)
        mask[self.text, self.length :] = False
        return mask

    def pairs(self) -> int:
        """Queries times the keys that each of them attends to: the least work there is."""
        height, width = self.grid
        near = sum(
            max(height - abs(dy) * self.dilation, 0) * max(width - abs(dx) * self.dilation, 0)
            for dy, dx in self._steps()
        )
        everywhere = self.text_length + self.pooled_length
        return near + self.image_length * everywhere + self.text_length * self.length

    def _steps(self) -> Iterator[tuple[int, int]]:
        span = range(-self.reach, self.reach + 1)
        return ((dy, dx) for dy in span for dx in span if self.within(dy, dx))


def proportional_scale(key_length: int, head_dim: int, down_factor: int = 1) -> float:
    """Softmax scale that keeps attention as sharp over more keys than a base was trained on.

    sqrt(log(L, 64^2 + 512) / head_dim), with 10 L for L where keys are pooled, as published.

    Args:
        key_length: L, text and image keys before pooling, from 2 up.
        head_dim: width of a head.
        down_factor: above 1 where keys are pooled.

    Raises:
        ClearError: for a length that has no such scale.
    """
    if not _whole(key_length, 2):
        raise ClearError(f"key_length: expected a whole number from 2 up, got {key_length!r}")
    length = 10 * key_length if down_factor > 1 else key_length
    return math.sqrt(math.log(length, TRAINED_LENGTH) / head_dim)


def pool(tokens: Tensor, pattern: Pattern, spatial_weight: Tensor | None) -> Tensor:
    """Image tokens in blocks of d x d, summed with weights (CLEAR, section 3, the down-sampled variant).

    Args:
        tokens: image keys or values [B, heads, H * W, D].
        pattern: the grid and d.
        spatial_weight: [1, 1, 1, d, 1, d, 1]; None means 1 / d^2 throughout.

    Returns:
        [B, heads, H * W / d^2, D]
    """
    d, (height, width) = pattern.down_factor, pattern.grid
    blocks = tokens.unflatten(2, (height // d, d, width // d, d))
    pooled = blocks.mean((3, 5)) if spatial_weight is None else (blocks * spatial_weight).sum((3, 5))
    return pooled.flatten(2, 3).to(tokens.dtype)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
