"""Times a step of a Flux-shaped transformer alone, with interactions, with CLEAR's windows, and with both."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from interactdiff.bench.interaction import SCENE
from interactdiff.bench.memory import filled, peak_memory
from interactdiff.clear import linearize
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter


@dataclass(frozen=True)
class JointShapes:
    """A transformer's shapes, those of FLUX.1 but for the number of blocks, which are all alike.

    Attributes:
        heads: of 128 each; FLUX.1 has 24.
        blocks: how many joint and how many single ones; FLUX.1 has 19 and 38.
        text: tokens of the prompt.
        device: where.
        dtype: in what precision.
    """

    heads: int = 24
    blocks: tuple[int, int] = (1, 1)
    text: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


class JointBench:
    """One step in each way, over a square grid of image tokens.

    Args:
        shapes: of the transformer.
        grid: side of the grid.
        window: radius of CLEAR's windows.
    """

    def __init__(self, shapes: JointShapes, grid: int, window: int):
        self.shapes, self.window = shapes, window
        self.transformer = flux_transformer(shapes)
        self.adapter = InteractionAdapter.for_transformer(self.transformer)
        filled(self.adapter.to(shapes.device, shapes.dtype).eval())
        places = torch.cartesian_prod(*(torch.arange(grid, device=shapes.device),) * 2)
        self.features = torch.randn(self.adapter.config.feature_dim, device=shapes.device)
        text = (1, shapes.text)
        self.inputs: dict[str, Tensor] = {
            "hidden_states": self._noise(1, grid**2, 64),
            "timestep": self._noise(1).abs(),
            "encoder_hidden_states": self._noise(*text, 4096),
            "pooled_projections": self._noise(1, 768),
            "img_ids": nn.functional.pad(places, (1, 0)).to(shapes.dtype),
            "txt_ids": self._noise(shapes.text, 3) * 0,
        }

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.shapes.device, dtype=self.shapes.dtype)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One call of the transformer as it is."""
        out = self.transformer(**self.inputs).sample
        if self.shapes.device.type == "cuda":
            torch.cuda.synchronize(self.shapes.device)
        return out

    def round(self, measure: Any) -> dict[str, float]:
        """A measure of `step` in each way, in turn; what happens once a run has happened."""
        measured = {"plain": measure(self.step)}
        with attach(
            self.transformer, self.adapter, phrase_encoder=lambda texts: dict.fromkeys(texts, self.features)
        ) as handle:
            handle.set_scene(SCENE)
            self.step()  # makes the keys and values of a run
            measured["interaction"] = measure(self.step)
            with linearize(self.transformer, self.window, min_tokens=0):
                measured["interaction_clear"] = measure(self.step)
        with linearize(self.transformer, self.window, min_tokens=0):
            measured["clear"] = measure(self.step)
        return measured


def bench_joint(
    shapes: JointShapes, grid: int, window: int, rounds: int, progress: bool = True
) -> dict[str, Any]:
    """Time a step in every way, and take its memory.

    Args:
        shapes: of the transformer.
        grid: side of the grid of image tokens.
        window: radius of CLEAR's windows.
        rounds: how often each way is timed, in turn with the others.
        progress: show a progress bar.

    Returns:
        `grid`, `window`, `seconds` (medians over the rounds), `ratios` to plain (medians of each round's own)
        and `peak_mb` (weights aside) of plain, interaction, clear and interaction_clear.
    """
    bench = JointBench(shapes, grid, window)
    peaks = bench.round(lambda step: peak_memory(step, shapes.device))  # and the first call of each
    bar = tqdm(range(rounds), unit="round", desc=f"{grid}x{grid}", disable=not progress)
    timed = [bench.round(_seconds) for _ in bar]
    return {
        "grid": grid,
        "window": window,
        "seconds": {way: statistics.median(one[way] for one in timed) for way in peaks},
        "ratios": {way: statistics.median(one[way] / one["plain"] for one in timed) for way in peaks},
        "peak_mb": peaks,
    }


def _seconds(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def flux_transformer(shapes: JointShapes) -> FluxTransformer2DModel:
    """With random weights."""
    make: Any = FluxTransformer2DModel
    joint, single = shapes.blocks
    with torch.device("meta"):
        transformer = make(num_attention_heads=shapes.heads, num_layers=joint, num_single_layers=single)
    nn.Module.to(transformer, shapes.dtype)
    return filled(transformer.to_empty(device=shapes.device)).eval()
