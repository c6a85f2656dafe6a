"""Times CLEAR's local attention against full attention, the published mask and the least work there is."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from tqdm.auto import tqdm

from interactdiff.bench.memory import peak_memory
from interactdiff.clear.attention import local_attention
from interactdiff.clear.flex import can_run_flex, compiled_flex
from interactdiff.clear.pattern import Pattern

FULL, PUBLISHED = "full", "published_flex"
OURS = ("tiles", "flex")
BACKENDS = (FULL, PUBLISHED, *OURS)
SLOW = 20.0  # seconds; what takes longer is timed once
MASK_BYTES = 8e9  # that the published mask may take to build; it is built from every pair of tokens


@dataclass(frozen=True)
class ClearShapes:
    """What is timed: a square grid, one attention call.

    Attributes:
        heads: of a batch of one.
        dim: of a head.
        dtype: in what precision.
        device: where.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device


class ClearBench:
    """A grid and a text length, and each way to compute attention over them.

    Args:
        grid: side of a square of image tokens.
        text: text tokens.
        shapes: heads, width and where.
    """

    def __init__(self, grid: int, text: int, shapes: ClearShapes):
        self.grid, self.text, self.shapes = grid, text, shapes
        generator = torch.Generator().manual_seed(0)
        size = (1, shapes.heads, grid * grid + text, shapes.dim)
        self.q, self.k, self.v = (
            torch.randn(size, generator=generator).to(shapes.device, shapes.dtype) for _ in range(3)
        )

    def pattern(self, window: int) -> Pattern:
        """Who sees whom."""
        return Pattern((self.grid, self.grid), self.text, window)

    def full(self) -> Tensor:
        """Every pair of tokens, by SDPA."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v)

    def ours(self, backend: str, window: int) -> Tensor:
        """`local_attention` with a backend."""
        size = (self.grid, self.grid)
        return local_attention(
            self.q, self.k, self.v, grid=size, text_length=self.text, window=window, backend=backend
        )

    def published(self, window: int) -> tuple[Callable[[], Tensor], float, float]:
        """Compiled FlexAttention over tokens in raster order, and the seconds for its mask and to compile.

        The mask is the circular window of CLEAR's section 3, made by `create_block_mask`, which looks at all
        pairs of tokens.
        """
        pattern, kernel = self.pattern(window), compiled_flex()
        start = time.perf_counter()
        size, device = pattern.length, self.shapes.device.type
        mask = flex.create_block_mask(raster_mask(pattern), None, None, size, size, device)
        built = time.perf_counter()

        def run() -> Tensor:
            return kernel(self.q, self.k, self.v, block_mask=mask)

        run()
        return run, built - start, time.perf_counter() - built

    def why_not(self, backend: str) -> str | None:
        """None if a backend can be timed here, or a sentence why not."""
        if backend in (PUBLISHED, "flex") and (why := can_run_flex(self.shapes.device, self.shapes.dtype)):
            return why
        needed = 2 * self.q.shape[2] ** 2
        if backend == PUBLISHED and needed > MASK_BYTES:
            return (
                f"its mask is made from every pair of tokens, which takes some {needed / 1e9:.0f} GB "
                f"here, over {MASK_BYTES / 1e9:.0f}"
            )
        return None


def raster_mask(pattern: Pattern) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The published mask over text, then image tokens in raster order, as FlexAttention takes it."""
    text, width, square = pattern.text_length, pattern.grid[1], pattern.window**2

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query - text, key - text
        dy, dx = q // width - k // width, q % width - k % width
        return (q < 0) | (k < 0) | (dy * dy + dx * dx < square)

    return attends


@torch.no_grad()
def bench_clear(
    grids: Sequence[int],
    windows: Sequence[int],
    texts: Sequence[int],
    shapes: ClearShapes,
    rounds: int,
    backends: Sequence[str] = BACKENDS,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Time each way for each grid and text length, all of these in turn within a round.

    Args:
        grids: sides of square grids of image tokens.
        windows: radii.
        texts: text tokens.
        shapes: heads, width and where.
        rounds: how often each way is timed; once, where a call takes longer than `SLOW` seconds.
        backends: which ways.
        progress: show a progress bar.

    Yields:
        A row for each way: `grid`, `window` (None for full attention, which has none), `text`, `dtype`,
        `backend`, and either `skipped`, a sentence, or `seconds`, the median of `rounds`, `peak_mb`, `pairs`
        of tokens that see each other, and for the published mask `mask_seconds` and `compile_seconds`. Where
        full attention is timed: `times_full`, how many times faster this is, by rounds, and `times_limit`,
        the time over that of these pairs at full attention's rate.
    """
    for grid, text in product(grids, texts):
        yield from _rows(ClearBench(grid, text, shapes), windows, rounds, backends, progress)


def _rows(
    bench: ClearBench, windows: Sequence[int], rounds: int, backends: Sequence[str], progress: bool
) -> list[dict[str, Any]]:
    device = bench.shapes.device
    rows: list[dict[str, Any]] = []
    ways: list[tuple[dict[str, Any], Callable[[], Tensor]]] = []
    for backend, window in _kinds(backends, windows):
        row = {"grid": bench.grid, "window": window, "text": bench.text}
        row |= {"dtype": str(bench.shapes.dtype).removeprefix("torch."), "backend": backend}
        rows.append(row)
        if why := bench.why_not(backend):
            row["skipped"] = why
            continue
        row["pairs"] = bench.q.shape[2] ** 2 if window is None else bench.pattern(window).pairs()
        run = _way(bench, backend, window, row)
        start = time.perf_counter()
        row["peak_mb"] = peak_memory(run, device)
        row["rounds"] = [time.perf_counter() - start]
        ways.append((row, run))
    ways = [(row, run) for row, run in ways if row["rounds"][0] < SLOW]
    for row, _ in ways:
        row["rounds"] = []
    for _ in tqdm(range(rounds), unit="round", desc=f"{bench.grid}x{bench.grid}", disable=not progress):
        for row, run in ways:
            row["rounds"].append(_timed(run, device))
    for row in rows:
        if "rounds" in row:
            row["seconds"] = statistics.median(row["rounds"])
    full = next((row for row in rows if row["backend"] == FULL and "seconds" in row), None)
    for row in rows:
        if full and "seconds" in row:
            row["times_full"] = _ratio(full["rounds"], row["rounds"])
            row["times_limit"] = full["pairs"] / row["pairs"] / row["times_full"]
    return rows


def _kinds(backends: Sequence[str], windows: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    for backend in backends:
        yield from ((backend, window) for window in ((None,) if backend == FULL else windows))


def _way(bench: ClearBench, backend: str, window: int | None, row: dict[str, Any]) -> Callable[[], Tensor]:
    """What to time, compiled where it needs to be."""
    if window is None:
        return bench.full
    if backend == PUBLISHED:
        run, row["mask_seconds"], row["compile_seconds"] = bench.published(window)
        return run
    run = partial(bench.ours, backend, window)
    if backend == "flex":
        run()
    return run


def _ratio(over: list[float], under: list[float]) -> float:
    """The median of each round's own ratio; of the medians, where one of them was timed once."""
    if len(over) == len(under):
        return statistics.median(a / b for a, b in zip(over, under, strict=True))
    return statistics.median(over) / statistics.median(under)


def _timed(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
