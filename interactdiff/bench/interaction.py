"""Times a guided denoising step with control against the base alone and diffusers' own gated U-Net.

The U-Nets have true shapes and random weights. diffusers' U-Net with `attention_type="gated-text-image"` has
a fuser in every block, which it calls only when it is given boxes: the same U-Net is the plain one and the
gated one, the path that the published Hub pipeline takes. Our adapter shares those fusers' weights.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from interactdiff.bench.memory import filled, peak_memory
from interactdiff.handle import Handle, attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.scene import Interaction
from interactdiff.schedule import refreshes

RUN_STEPS = 30  # of the run that a fast step is the mean of
SCENE = (Interaction("person", "riding", "bike", (0.3, 0.2, 0.6, 0.8), (0.25, 0.5, 0.7, 0.95)),)


@dataclass(frozen=True)
class BenchBase:
    """A base's shapes.

    Attributes:
        unet: arguments of `UNet2DConditionModel`.
        latents: side of the latents.
        text: tokens of the prompt.
        interactions: slots for interactions; each is three tokens.
    """

    unet: dict[str, Any]
    latents: int
    text: int = 77
    interactions: int = 30


BASES = {
    "sd15": BenchBase({"cross_attention_dim": 768, "attention_head_dim": 8}, latents=64),
    "sdxl": BenchBase(
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        latents=128,
        interactions=32,
    ),
}


class Guided(DiffusionPipeline):
    """A pipeline with nothing but a U-Net and a scheduler, under guidance."""

    do_classifier_free_guidance = True

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


class Bench:
    """A base at its true shapes, and one guided denoising step in each way.

    Args:
        base: the shapes.
        device: where.
        dtype: in what precision.
    """

    def __init__(self, base: BenchBase, device: torch.device, dtype: torch.dtype):
        self.base, self.device = base, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet = gated_unet(base, device, dtype)
            self.adapter = adapter_of(self.unet, base.interactions)
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        width = self.adapter.config.base.cross_attention_dim
        # diffusers' position net makes two tokens of each box, one of its text and one of its image
        boxes = 3 * base.interactions // 2
        ones = torch.ones(2, boxes, device=device, dtype=dtype)
        self.gligen = {
            "boxes": torch.rand(2, boxes, 4, generator=generator).to(device, dtype),
            "masks": ones,
            "phrases_masks": ones,
            "image_masks": ones,
            "phrases_embeddings": noise(2, boxes, width),
            "image_embeddings": noise(2, boxes, width),
        }
        self.inputs: dict[str, Any] = {
            "sample": noise(2, 4, base.latents, base.latents),
            "encoder_hidden_states": noise(2, base.text, width),
        }
        if "addition_time_embed_dim" in base.unet:
            times = 6 * base.unet["addition_time_embed_dim"]
            text = base.unet["projection_class_embeddings_input_dim"] - times
            self.inputs["added_cond_kwargs"] = {"text_embeds": noise(2, text), "time_ids": noise(2, 6)}
        self.features = torch.randn(self.adapter.config.feature_dim, generator=generator)
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(RUN_STEPS)
        self.timesteps = scheduler.timesteps
        self.pipeline = Guided(self.unet, scheduler)

    def attached(self) -> Handle:
        """Our adapter on the U-Net; detach it before timing the others."""
        return attach(
            self.pipeline, self.adapter, phrase_encoder=lambda texts: dict.fromkeys(texts, self.features)
        )

    @torch.no_grad()
    def step(self, number: int = 0, **options: Any) -> Tensor:
        """One guided denoising step."""
        out = self.unet(timestep=self.timesteps[number], **self.inputs, **options).sample
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return out

    def gated(self) -> Tensor:
        """A step of diffusers' own gated U-Net."""
        return self.step(cross_attention_kwargs={"gligen": self.gligen})

    def round(self, first: int = 0) -> dict[str, float]:
        """Seconds of a step in each way, in turn, starting with another way each time.

        What happens once a run (keys and values) is left out of ours; the position net, which diffusers' path
        calls at every step, is in it.
        """
        ways = (lambda: {"plain": _timed(self.step)}, lambda: {"gated": _timed(self.gated)}, self._ours)
        seconds = {}
        for number in range(len(ways)):
            seconds |= ways[(first + number) % len(ways)]()
        return seconds

    def _ours(self) -> dict[str, float]:
        with self.attached() as handle:
            handle.set_scene(SCENE, guidance=True)
            self.step()  # makes the keys and values of a run
            seconds = {"exact": _timed(self.step)}
            handle.set_scene(SCENE, guidance=True, fast=True)
            self.step()
            seconds["refresh"] = _timed(lambda: self.step(0))
            return seconds | {"reuse": _timed(lambda: self.step(2))}

    def peaks(self) -> dict[str, float]:
        """Peak memory of each way in MB, weights aside; ours from the first step of a run on."""
        peaks = {"plain": peak_memory(self.step, self.device), "gated": peak_memory(self.gated, self.device)}
        with self.attached() as handle:
            handle.set_scene(SCENE, guidance=True)
            peaks["exact"] = peak_memory(self.step, self.device)
            handle.set_scene(SCENE, guidance=True, fast=True)
            peaks["fast"] = peak_memory(lambda: (self.step(0), self.step(2)), self.device)
        return peaks


def bench_interaction(
    base: BenchBase, dtype: torch.dtype, rounds: int, device: torch.device, progress: bool = True
) -> dict[str, Any]:
    """Time a base in every way, and count operations and memory.

    Args:
        base: the shapes.
        dtype: in what precision.
        rounds: how often each way is timed, in turn with the others.
        device: where.
        progress: show a progress bar.

    Returns:
        Medians over the rounds: `plain_s`, `gated_s`, `exact_s`; `refresh_s`, `reuse_s` and `fast_s`, the
        mean step of a run of 30 in fast mode; `ratios`, medians of each round's own; `operations`, by
        counting; `peak_mb`.
    """
    bench = Bench(base, device, dtype)
    refreshed = sum(refreshes(step) for step in range(RUN_STEPS)) / RUN_STEPS
    bench.step()  # the first call allocates what later ones find
    timed = []
    for number in tqdm(range(rounds), unit="round", disable=not progress):
        seconds = bench.round(number)
        seconds["fast"] = refreshed * seconds["refresh"] + (1 - refreshed) * seconds["reuse"]
        timed.append(seconds)
    ratios = {
        f"{way}_over_{other}": statistics.median(t[way] / t[other] for t in timed)
        for way, other in (("gated", "plain"), ("exact", "gated"), ("exact", "plain"), ("fast", "plain"))
    }
    return {
        **{f"{way}_s": statistics.median(t[way] for t in timed) for way in sorted(timed[0])},
        "ratios": ratios,
        "operations": operations(base),
        "peak_mb": bench.peaks(),
    }


def operations(base: BenchBase) -> dict[str, float]:
    """Operations of a guided step, counted on shapes alone: `plain_tflop`, and ratios to it."""
    bench = Bench(base, torch.device("meta"), torch.float32)
    plain, gated = _flops(bench.step), _flops(bench.gated)
    with bench.attached() as handle:
        handle.set_scene(SCENE, guidance=True)
        exact = _flops(lambda: bench.step(1))
    return {"plain_tflop": plain / 1e12, "gated_over_plain": gated / plain, "exact_over_plain": exact / plain}


def gated_unet(base: BenchBase, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """diffusers' U-Net with a fuser in every block, random weights and open gates."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet, attention_type="gated-text-image")
    nn.Module.to(unet, dtype)
    filled(unet.to_empty(device=device))
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, GatedSelfAttentionDense):
                for gate in (module.alpha_attn, module.alpha_dense):
                    cast(Tensor, gate).fill_(0.5)
    return unet.eval()


def adapter_of(unet: UNet2DConditionModel, interactions: int) -> InteractionAdapter:
    """Our adapter around the fusers of diffusers' gated U-Net, whose weights it shares."""
    with torch.device("meta"):
        adapter = InteractionAdapter.for_unet(unet, max_interactions=interactions)
    tensors = {
        name: torch.empty_like(t, device=unet.device, dtype=unet.dtype).uniform_(-0.03, 0.03)
        for name, t in adapter.state_dict().items()
        if name.startswith("position_net.")
    }
    for path in adapter.config.base.sites:
        fuser = cast(nn.Module, unet.get_submodule(path).fuser)
        tensors |= {f"{path}.fuser.{name}": t for name, t in fuser.state_dict().items()}
    return InteractionAdapter.from_tensors(adapter.config, tensors).eval()


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
