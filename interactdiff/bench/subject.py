"""Times a guided step alone, with kept features of a reference, with the reference run anew, and naively.

The naive peer attends to all of the reference's tokens under a dense mask, [rows, 1, L, L + L_r].
Weights are random and shapes true; the VAE and the text encoders take no part in a step.
"""

import math
import statistics
import time
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
from interactdiff.bench.memory import peak_memory
from interactdiff.handle import Handle, attach
from interactdiff.sites import find_sites
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject

WEIGHT = 3.0
WAYS = ("plain", "cached", "fresh", "naive")


class SubjectPipeline(Guided):
    """A pipeline of a U-Net, a scheduler, and as much more as subjects ask for."""

    vae_scale_factor = 8

    def __init__(self, unet: UNet2DConditionModel, text: dict[str, Tensor]):
        super().__init__(unet, DDIMScheduler())
        make: Any = AutoencoderTiny
        self.vae = make(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
        self.vae.to(unet.device, unet.dtype)
        self.text = text

    @property
    def _execution_device(self) -> torch.device:
        return self.unet.device

    def encode_prompt(self, **_: Any) -> tuple[Any, ...]:
        """Of any prompt the same."""
        states, pooled = self.text["encoder_hidden_states"][:1], self.text.get("text_embeds")
        return (states, None) if pooled is None else (states, None, pooled[:1], None)


class SubjectBench:
    """One guided step of a U-Net in each way.

    Args:
        base: the shapes.
        foreground: share of the reference that is the subject.
        device: where.
        dtype: in what precision.
    """

    def __init__(self, base: BenchBase, foreground: float, device: torch.device, dtype: torch.dtype):
        self.base, self.device = base, device
        make: Any = UNet2DConditionModel
        with torch.device("meta"):
            unet = make(**base.unet, sample_size=base.latents)
        nn.Module.to(unet, dtype)
        self.unet = unet.to_empty(device=device).eval()
        with torch.no_grad():
            for parameter in self.unet.parameters():
                parameter.uniform_(-0.03, 0.03)
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        width = base.unet["cross_attention_dim"]
        self.inputs: dict[str, Any] = {
            "sample": noise(2, 4, base.latents, base.latents),
            "encoder_hidden_states": noise(2, base.text, width),
        }
        text = {"encoder_hidden_states": self.inputs["encoder_hidden_states"]}
        if "addition_time_embed_dim" in base.unet:
            times = 6 * base.unet["addition_time_embed_dim"]
            pooled = noise(2, base.unet["projection_class_embeddings_input_dim"] - times)
            self.inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": noise(2, 6)}
            text["text_embeds"] = pooled
        self.pipeline = SubjectPipeline(self.unet, text)
        self.pipeline.scheduler.set_timesteps(1)
        side = base.latents * self.pipeline.vae_scale_factor
        self.mask = Image.new("L", (side, side))
        self.mask.paste(255, (0, 0, round(side * foreground), side))
        self.subject = Subject("subject", Image.new("RGB", (side, side), "red"), self.mask)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One guided step, by whatever is attached."""
        out = self.unet(timestep=self.pipeline.scheduler.timesteps[0], **self.inputs).sample
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return out

    def attached(self, **settings: float) -> Handle:
        """With a subject."""
        handle = attach(self.pipeline, SubjectAdapter())
        handle["subject"].configure(reference_weight=WEIGHT, **settings)
        handle.set_scene([self.subject], guidance=True)
        return handle

    def naive(self) -> Tensor:
        """The reference at each step, as a row of the batch, and a dense mask."""
        own = dict(self.unet.attn_processors)
        mask = torch.frombuffer(bytearray(self.mask.tobytes()), dtype=torch.uint8)
        mask = mask.view(1, 1, self.mask.height, self.mask.width).to(self.device).float() / 255
        dense = {
            name: DenseProcessor(mask, WEIGHT) if ".attn1." in name else one for name, one in own.items()
        }
        self.unet.set_attn_processor(dict(dense))
        inputs = self.inputs
        try:
            self.inputs = {name: _with_reference(one) for name, one in inputs.items()}
            return self.step()[:2]
        finally:
            self.inputs = inputs
            self.unet.set_attn_processor(own)

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

    def least_ratio(self, foreground: float) -> float:
        """Operations of a step with kept features over those of a plain one."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        extra = 0.0
        for site in find_sites(self.unet):
            if site.role == "self":
                tokens = math.prod(site.grid(self.base.latents, self.base.latents))
                extra += 2 * 4 * tokens * foreground * tokens * site.dim
        return 1 + extra / counter.get_total_flops()


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
    base: BenchBase,
    foreground: float,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Time a step in every way, and take its memory.

    Args:
        base: the shapes.
        foreground: share of the reference that is the subject.
        device: where.
        dtype: in what precision.
        rounds: how often each way is timed, in turn with the others.
        progress: show a progress bar.

    Returns:
        `foreground`, `seconds` (medians over the rounds), `ratios` to plain (medians of each round's own),
        `peak_mb` (weights aside) of each of `WAYS`, and `least_ratio`, of operations.
    """
    bench = SubjectBench(base, foreground, device, dtype)
    peaks = bench.round(lambda step: peak_memory(step, device))  # and the first call of each
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
