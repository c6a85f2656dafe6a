"""One picture of a coarse-to-fine run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One picture of a run.

    Attributes:
        index: 0 is drawn from text, each other one from the picture before it.
        height: in pixels.
        width: in pixels.
        grid: rows and columns of image tokens. Twice the size are 4 times as many tokens, for which full
            attention takes 16 times as long.
        steps: denoising steps that are taken.
    """

    index: int
    height: int
    width: int
    grid: tuple[int, int]
    steps: int
