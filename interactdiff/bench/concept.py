"""What capturing attention costs in training, at true shapes with random weights.

A step trains changes of keys and values of a frozen U-Net on the denoising error: alone, and with the
attention loss on columns of the captured layers. What the published code keeps is counted: the probabilities
of every layer, for the two rows of its batch.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from interactdiff.adapter import SiteInputs
from interactdiff.bench.interaction import BASES as INTERACTION_BASES
from interactdiff.bench.interaction import BenchBase
from interactdiff.bench.memory import filled, peak_memory
from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.capture import AttentionCapture, Layers
from interactdiff.concept.config import ConceptConfig
from interactdiff.concept.losses import attention_loss
from interactdiff.concept.masks import MaskSettings, refined
from interactdiff.concept.projections import projection_weight, text_projections
from interactdiff.handle import attach
from interactdiff.sites import find_sites

BASES = {
    "sd21": BenchBase(
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        latents=64,
    ),
    "sdxl": INTERACTION_BASES["sdxl"],
    "tiny": BenchBase(
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": (2, 4),
        },
        latents=16,
    ),
}
ROWS = ((4,), (6,), (0,))  # of two concepts and the background
PUBLISHED_BATCH = 2  # a photo and a picture of the prior
BYTES = 4


@dataclass
class ConceptBench:
    """A base and one training step.

    Attributes:
        base: the shapes.
        device: where.
        dtype: of the frozen base; what is trained is in float32.
    """

    base: BenchBase
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**self.base.unet)
        nn.Module.to(unet, self.dtype)
        self.unet: Any = filled(unet.to_empty(device=self.device)).eval().requires_grad_(False)
        chosen = text_projections(unet, "kv", True)
        shapes: Any = {f"{site.path}.{at}": tuple(projection_weight(site, at).shape) for site, at in chosen}
        self.adapter = ConceptAdapter(ConceptConfig(), shapes).to(self.device).train()
        self.handle = attach(unet, self.adapter)
        self.binding = self.handle["concept"]
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        side, width = self.base.latents, self.base.unet["cross_attention_dim"]
        self.sample, self.noise = noise(1, 4, side, side), noise(1, 4, side, side)
        self.text = noise(1, self.base.text, width).requires_grad_()  # as a learned token makes it
        self.arguments: dict[str, Any] = {}
        if "addition_time_embed_dim" in self.base.unet:
            times = 6 * self.base.unet["addition_time_embed_dim"]
            pooled = self.base.unet["projection_class_embeddings_input_dim"] - times
            self.arguments["added_cond_kwargs"] = {"text_embeds": noise(1, pooled), "time_ids": noise(1, 6)}
        self.rows = torch.zeros(1, self.base.text, dtype=torch.bool, device=self.device)
        self.rows[0, [ROWS[0][0], ROWS[1][0]]] = True
        self.layers = Layers.of(unet)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=0.0)

    def step(self, attention: bool) -> None:
        """One training step.

        Args:
            attention: whether with the attention loss.
        """
        capture = AttentionCapture(self.unet, self.layers, own=False)
        self.binding.mark(self.text, self.rows)
        if attention:
            with self.binding.capturing(capture):
                predicted = self._predict()
        else:
            predicted = self._predict()
        loss = (predicted.float() - self.noise.float()).pow(2).mean()
        if attention:
            columns = capture.columns(ROWS)[0]
            loss = loss + attention_loss(columns, torch.ones_like(columns)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.text.grad = None
        self._wait()

    def _predict(self) -> Tensor:
        time_step = torch.tensor([100], device=self.device)
        return self.unet(self.sample, time_step, encoder_hidden_states=self.text, **self.arguments).sample

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def published_bytes(base: BenchBase) -> int:
    """What a copy of the published capture takes: probabilities of every layer, in float32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet)
    floats = 0
    for site in find_sites(unet):
        if site.role in ("self", "cross"):
            queries = site.grid(base.latents, base.latents)[0] ** 2
            floats += site.heads * queries * (queries if site.role == "self" else base.text)
    return PUBLISHED_BATCH * floats * BYTES


def capture_peaks(base: BenchBase, device: torch.device) -> dict[str, float]:
    """Memory of what is made of the captured layers' queries and keys, which a step keeps anyway.

    Args:
        base: true shapes, of which nothing but the captured layers is made.
        device: where.

    Returns:
        Peaks in MB: `columns_mb`, the attention loss with its gradients; `masks_mb`, mask finding;
        `matrices_mb`, the probabilities of the same layers, by counting.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet)
    layers = Layers.of(unet)
    capture = AttentionCapture(unet, layers)
    capture.begin_grid((base.latents, base.latents), base.text)
    matrices = 0
    for site in find_sites(unet):
        if site.path not in (*layers.cross, *layers.own):
            continue
        rows, columns = site.grid(base.latents, base.latents)
        keys = base.text if site.role == "cross" else rows * columns
        matrices += site.heads * rows * columns * keys * BYTES
        width = site.module.inner_dim // site.heads
        queries, own = (
            torch.randn(1, site.heads, count, width, device=device).requires_grad_()
            for count in (rows * columns, keys)
        )
        capture.take(site, SiteInputs(None, queries, own))

    def columns_and_gradients() -> None:
        made = capture.columns(ROWS)[0]
        attention_loss(made, torch.ones_like(made)).mean().backward()

    @torch.no_grad()
    def masks() -> None:
        refined(capture, capture.columns(ROWS), MaskSettings())

    return {
        "columns_mb": peak_memory(columns_and_gradients, device),
        "masks_mb": peak_memory(masks, device),
        "matrices_mb": matrices / 1e6,
    }


def bench_concept(base: BenchBase, dtype: torch.dtype, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time and memory of a step with the attention loss against one without.

    Args:
        base: the shapes.
        dtype: of the base.
        rounds: how often each is timed, in turn; 0 leaves whole steps out.
        device: where.

    Returns:
        What `capture_peaks` returns, and `published_copy_mb`, by counting. Of whole steps the medians
        `plain_s` and `attention_s`, the median of the rounds' `ratio`, and peaks in MB above the weights,
        `plain_mb` and `attention_mb`.
    """
    counted = {**capture_peaks(base, device), "published_copy_mb": published_bytes(base) / 1e6}
    if not rounds:
        return counted
    bench = ConceptBench(base, device, dtype)
    try:
        for attention in (False, True):
            bench.step(attention)  # the first call allocates what later ones find
        timed = []
        for number in range(rounds):
            ways = (False, True) if number % 2 == 0 else (True, False)
            seconds = {way: _timed(lambda way=way: bench.step(way)) for way in ways}
            timed.append((seconds[False], seconds[True]))
        return {
            "plain_s": statistics.median(plain for plain, _ in timed),
            "attention_s": statistics.median(ours for _, ours in timed),
            "ratio": statistics.median(ours / plain for plain, ours in timed),
            "plain_mb": peak_memory(lambda: bench.step(False), device),
            "attention_mb": peak_memory(lambda: bench.step(True), device),
            **counted,
        }
    finally:
        bench.handle.detach()


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
