"""Times a step alone, with kept features of a reference, with the reference run at each step, and naively.

The naive peer attends to all of the reference's tokens under a dense mask, [rows, 1, L, L + L_r].
Weights are random and shapes true; the VAE and the text encoders take no part in a step.
"""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from interactdiff.bench.interaction import BenchBase, Guided
from interactdiff.bench.memory import filled, peak_memory
from interactdiff.handle import Handle, attach
from interactdiff.sites import denoiser_of, find_sites
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject

WEIGHT = 3.0
WAYS = ("plain", "cached", "fresh", "naive")


class SubjectBench(ABC):
    """One step of a denoiser in each way.

    Args:
        pipeline: of the denoiser, a scheduler, and as much more as subjects ask for.
        side: of the picture and of the reference, in pixels.
        foreground: share of the reference that is the subject.
    """

    inputs: dict[str, Any]
    guided = True

    def __init__(self, pipeline: Any, side: int, foreground: float):
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        self.device = self.denoiser.device
        self.pipeline.scheduler.set_timesteps(1)
        self.mask = Image.new("L", (side, side))
        self.mask.paste(255, (0, 0, round(side * foreground), side))
        self.subject = Subject("subject", Image.new("RGB", (side, side), "red"), self.mask)

    @abstractmethod
    def time(self) -> Tensor:
        """The timestep as the denoiser is given it."""

    @torch.no_grad()
    def step(self) -> Tensor:
        """One step, by whatever is attached."""
        out = self.denoiser(timestep=self.time(), **self.inputs).sample
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return out

    def attached(self, **settings: float) -> Handle:
        """With a subject."""
        handle = attach(self.pipeline, SubjectAdapter())
        handle["subject"].configure(reference_weight=WEIGHT, **settings)
        handle.set_scene([self.subject], guidance=self.guided)
        return handle

    @abstractmethod
    def naive(self) -> Tensor:
        """A step with the reference in it and a dense mask."""

    def round(self, measure: Callable[[Callable[[], Tensor]], Any]) -> dict[str, Any]:
        """A measure of a step in each way, in turn; what happens once a run has happened."""
        measured = {"plain": measure(self.step)}
        with self.attached():
            self.step()
            measured["cached"] = measure(self.step)
        with self.attached(fresh_noise=1):
            measured["fresh"] = measure(self.step)
        measured["naive"] = measure(self.naive)
        return measured

    @abstractmethod
    def extra_operations(self, foreground: float) -> float:
        """What attending to the foreground's tokens takes, at the least."""

    def least_ratio(self, foreground: float) -> float:
        """Operations of a step with kept features over those of a plain one."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return 1 + self.extra_operations(foreground) / counter.get_total_flops()


class UNetSubjectPipeline(Guided):
    """A pipeline of a U-Net, a scheduler, and as much more as subjects ask for."""

    vae_scale_factor = 8

    def __init__(self, unet: UNet2DConditionModel, text: dict[str, Tensor]):
        super().__init__(unet, DDIMScheduler())
        self.vae, self.text = tiny_vae(unet, 4), text

    @property
    def _execution_device(self) -> torch.device:
        return self.unet.device

    def encode_prompt(self, **_: Any) -> tuple[Any, ...]:
        """Of any prompt the same."""
        states, pooled = self.text["encoder_hidden_states"][:1], self.text.get("text_embeds")
        return (states, None) if pooled is None else (states, None, pooled[:1], None)


def tiny_vae(denoiser: Any, channels: int) -> AutoencoderTiny:
    """One of 8 pixels a latent, which takes no part in a step."""
    make: Any = AutoencoderTiny
    sizes = {name: (8,) * 4 for name in ("encoder_block_out_channels", "decoder_block_out_channels")}
    return make(latent_channels=channels, **sizes).eval().to(denoiser.device, denoiser.dtype)


class UNetSubjectBench(SubjectBench):
    """One guided step of a U-Net in each way.

    Args:
        base: the shapes.
        foreground: share of the reference that is the subject.
        device: where.
        dtype: in what precision.
    """

    def __init__(self, base: BenchBase, foreground: float, device: torch.device, dtype: torch.dtype):
        self.base = base
        make: Any = UNet2DConditionModel
        with torch.device("meta"):
            unet = make(**base.unet, sample_size=base.latents)
        nn.Module.to(unet, dtype)
        unet = filled(unet.to_empty(device=device)).eval()
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        width = base.unet["cross_attention_dim"]
        self.inputs = {
            "sample": noise(2, 4, base.latents, base.latents),
            "encoder_hidden_states": noise(2, base.text, width),
        }
        text = {"encoder_hidden_states": self.inputs["encoder_hidden_states"]}
        if "addition_time_embed_dim" in base.unet:
            times = 6 * base.unet["addition_time_embed_dim"]
            pooled = noise(2, base.unet["projection_class_embeddings_input_dim"] - times)
            self.inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": noise(2, 6)}
            text["text_embeds"] = pooled
        super().__init__(UNetSubjectPipeline(unet, text), 8 * base.latents, foreground)

    def time(self) -> Tensor:
        """The scheduler's."""
        return self.pipeline.scheduler.timesteps[0]

    def naive(self) -> Tensor:
        """The reference at each step, as a row of the batch, and a dense mask."""
        own = dict(self.denoiser.attn_processors)
        mask = torch.frombuffer(bytearray(self.mask.tobytes()), dtype=torch.uint8)
        mask = mask.view(1, 1, self.mask.height, self.mask.width).to(self.device).float() / 255
        dense = {
            name: DenseProcessor(mask, WEIGHT) if ".attn1." in name else one for name, one in own.items()
        }
        self.denoiser.set_attn_processor(dict(dense))
        inputs = self.inputs
        try:
            self.inputs = {name: _with_reference(one) for name, one in inputs.items()}
            return self.step()[:2]
        finally:
            self.inputs = inputs
            self.denoiser.set_attn_processor(own)

    def extra_operations(self, foreground: float) -> float:
        """Of all self-attentions."""
        extra = 0.0
        for site in find_sites(self.denoiser):
            if site.role == "self":
                tokens = math.prod(site.grid(self.base.latents, self.base.latents))
                extra += 2 * 4 * tokens * foreground * tokens * site.dim
        return extra


class DenseProcessor:
    """Attends over all own and reference keys under a dense mask; the reference is the batch's last row."""

    def __init__(self, mask: Tensor, weight: float):
        self.mask, self.weight = mask, weight

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B + 1, L, C] states, the last row the reference's."""
        q, k, v = (
            getattr(attn, name)(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for name in ("to_q", "to_k", "to_v")
        )
        rows, tokens = len(q) - 1, q.shape[2]
        side = round(tokens**0.5)
        shares = F.adaptive_avg_pool2d(self.mask, side).flatten()
        m = torch.cat([torch.ones_like(shares), self.weight * shares])
        bias = m.log().clamp(min=-1e4).to(q.dtype).repeat(rows, 1, tokens, 1)
        keys, values = (torch.cat([t[:-1], t[-1:].repeat(rows, 1, 1, 1)], 2) for t in (k, v))
        seeing = F.scaled_dot_product_attention(q[:-1], keys, values, attn_mask=bias)
        out = torch.cat([seeing, F.scaled_dot_product_attention(q[-1:], k[-1:], v[-1:])])
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _with_reference(value: Any) -> Any:
    """The inputs with one row more, the reference's."""
    if isinstance(value, dict):
        return {name: _with_reference(one) for name, one in value.items()}
    return torch.cat([value, value[:1]])


def bench_subject(
    bench: SubjectBench, foreground: float, rounds: int, progress: bool = True
) -> dict[str, Any]:
    """Time a step in every way, and take its memory.

    Args:
        bench: of a base.
        foreground: share of the reference that is the subject.
        rounds: how often each way is timed, in turn with the others.
        progress: show a progress bar.

    Returns:
        `foreground`, `seconds` (medians over the rounds), `ratios` to plain (medians of each round's own),
        `peak_mb` (weights aside) of each of `WAYS`, and `least_ratio`, of operations.
    """
    peaks = bench.round(lambda step: peak_memory(step, bench.device))  # and the first call of each
    bar = tqdm(range(rounds), unit="round", disable=not progress)
    timed = [bench.round(_seconds) for _ in bar]
    return {
        "foreground": foreground,
        "seconds": {way: statistics.median(one[way] for one in timed) for way in WAYS},
        "ratios": {way: statistics.median(one[way] / one["plain"] for one in timed) for way in WAYS},
        "peak_mb": peaks,
        "least_ratio": bench.least_ratio(foreground),
    }


def _seconds(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
