"""CLEAR's distillation (arXiv 2412.16112, section 4): windows learn to do what full attention did.

The base is the teacher, and the student is the base with other attention projections: the layers that they
share are in memory once. Both see pictures that the base drew itself.
"""

import copy
import hashlib
import random
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from pydantic import model_validator
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from interactdiff.checkpoint import save_tensors
from interactdiff.clear.adapter import SPATIAL_WEIGHT, ClearAdapter, ClearConfig
from interactdiff.errors import RecipeError
from interactdiff.files import write_aside
from interactdiff.handle import attach
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.sites import attention_sites
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.world import HELD_OUT
from interactdiff.training.config import (
    Count,
    Keys,
    Location,
    MeanAndDeviation,
    OptionalLocation,
    Rate,
    RecipeConfig,
    choice,
)
from interactdiff.training.dit import FlowBatch, encoded
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import grid


def sharing_copy(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Another module with the very same parameters and buffers: they are in memory once."""
    tensors = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


class AttentionOutputs:
    """What the attentions of a transformer gave in its last call, in the order of its sites."""

    def __init__(self, transformer: FluxTransformer2DModel):
        self.states: list[Tensor] = []
        for site in attention_sites(transformer):
            site.module.register_forward_hook(self._keep)
        transformer.register_forward_pre_hook(lambda *_: self.states.clear())

    def _keep(self, module: nn.Module, args: object, output: Any) -> None:
        self.states.append(torch.cat(output[::-1], 1) if isinstance(output, tuple) else output)


class Distillation:
    """The loss of a student that shares its teacher's layers.

    Args:
        teacher: its attentions' outputs are aimed at.
        student: is called after it, on the same inputs.
        output_weight: of the loss against the teacher's output.
        attention_weight: of the loss against its attentions' outputs.
    """

    def __init__(
        self,
        teacher: FluxTransformer2DModel,
        student: FluxTransformer2DModel,
        output_weight: float,
        attention_weight: float,
    ):
        self.teacher, self.student = AttentionOutputs(teacher), AttentionOutputs(student)
        self.output_weight, self.attention_weight = output_weight, attention_weight

    def loss(self, flow: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Flow matching, and the teacher's output and attention outputs (section 4, equations 5 to 7).

        Args:
            flow: the loss of flow matching.
            predicted: by the student, in its last call.
            wanted: what the teacher predicts, in its last call.
        """
        pairs = zip(self.student.states, self.teacher.states, strict=True)
        attention = torch.stack([F.mse_loss(mine.float(), own.float()) for mine, own in pairs]).mean()
        output = F.mse_loss(predicted.float(), wanted.float())
        return flow + self.output_weight * output + self.attention_weight * attention


class WindowSizes(Keys):
    """Arguments of `ClearConfig`."""

    window: Count = 16
    down_factor: Count = 1
    shape: Annotated[str, choice("circle", "square")] = "circle"
    dilation: Count = 1

    @model_validator(mode="after")
    def _can_be_computed(self) -> "WindowSizes":
        ClearConfig(**self.model_dump())
        return self


def layers_of(student: FluxTransformer2DModel, sizes: WindowSizes, init_from: str | None) -> ClearAdapter:
    """The layers that are trained, in a student.

    Args:
        student: whose attentions they stand in for.
        sizes: of the windows.
        init_from: folder of layers to go on from, or None.

    Raises:
        RecipeError: those are for other windows.
    """
    adapter = ClearAdapter.for_denoiser(student, ClearConfig(**sizes.model_dump()))
    if init_from:
        trained = ClearAdapter.from_pretrained(init_from)
        trained.check(student)
        missing, unexpected = adapter.load_state_dict(trained.state_dict(), strict=False)
        if unexpected or not all(name.endswith(SPATIAL_WEIGHT) for name in missing):
            raise RecipeError(
                f"expected layers of which {adapter.config} can go on, got layers for {trained.config}"
            )
    return adapter


class DataConfig(Keys):
    """Pictures that the base draws itself.

    Attributes:
        folder: where they are kept.
        pictures: how many.
        prompts: a text file with one a line, or null for captions of stickworld.
        size: pixels.
        steps: denoising steps.
        guidance_scale: classifier-free guidance, which is distilled with the base.
        batch_size: drawn at a time.
    """

    folder: Location
    pictures: Count
    prompts: OptionalLocation = None
    size: Count
    steps: Count
    guidance_scale: Rate
    batch_size: Count


class DistillConfig(RecipeConfig):
    """The keys of `DistillRecipe`.

    Attributes:
        batch_size: pictures of a step.
        base: pipeline folder or Hub id.
        clear: the windows.
        init_from: folder of layers to go on from, or null; those trained without pooling are a start for
            pooling.
        data: what is trained on.
        logits: of the times, see `FlowBatch`; null, as published, spreads them evenly.
        output_weight: of the loss against the teacher's output.
        attention_weight: of the loss against its attentions' outputs.
    """

    batch_size: Count
    base: Location
    clear: WindowSizes
    init_from: OptionalLocation = None
    data: DataConfig
    logits: MeanAndDeviation = None
    output_weight: Rate
    attention_weight: Rate


class DistillRecipe(Recipe[DistillConfig]):
    """Trains a `ClearAdapter`: the attention projections of a Flux base, and the weights of pooling."""

    config_type = DistillConfig

    def build(self) -> nn.Module:
        config = self.config
        load: Any = FluxPipeline.from_pretrained
        self.pipe: Any = load(config.base).to(self.device, torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.teacher = self.pipe.transformer.requires_grad_(False).eval()
        self.student = sharing_copy(self.teacher)
        adapter = layers_of(self.student, config.clear, config.init_from)
        self.handle = attach(self.student, adapter.train())
        self.handle["clear"].configure(min_tokens=0)
        weights = config.output_weight, config.attention_weight
        self.distillation = Distillation(self.teacher, self.student, *weights)
        self.data = self_generated(self.pipe, config.data, config.seed)
        self.empty = encoded(self.pipe, [""])
        return adapter

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config.seed * 1_000_003 + step)
        count = len(self.data["latents"])
        chosen = [rng.randrange(count) for _ in range(self.config.batch_size)]
        return {name: tensor[chosen].float().to(self.device) for name, tensor in self.data.items()}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """See `Distillation.loss`."""
        flow = FlowBatch(**batch, generator=generator, logits=self.config.logits)
        with torch.no_grad():
            wanted = self.predicted(self.teacher, flow.inputs)
        predicted = self.predicted(self.student, flow.inputs)
        return self.distillation.loss(flow.loss(predicted), predicted, wanted)

    def predicted(self, transformer: FluxTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
        """The flow that pictures are drawn by.

        A base with a guidance embedding predicts it in one call, as in the paper. Any other is guided by a
        second call without a prompt (arXiv 2207.12598, equation 6): what both come to is distilled, since
        their errors are drawn with as many times over.
        """
        scale = self.config.data.guidance_scale
        if cast(Any, transformer.config).guidance_embeds:
            return transformer(**inputs, guidance=torch.full_like(inputs["timestep"], scale)).sample
        if scale <= 1:
            return transformer(**inputs).sample
        both = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items() if "_ids" not in name}
        for name, empty in zip(("encoder_hidden_states", "pooled_projections"), self.empty, strict=True):
            both[name] = torch.cat([inputs[name], empty.expand_as(inputs[name])])
        conditional, unconditional = transformer(**inputs | both).sample.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """The teacher's pictures above the student's, from the same noise."""
        data = self.config.data
        prompts = [sample_scene(HELD_OUT + n).caption for n in range(8)]
        if data.prompts:
            prompts = read_prompts(data.prompts)[:8]
        rows = []
        for transformer in (self.teacher, self.student):
            self.pipe.transformer = transformer
            rows.append(draw(self.pipe, prompts, data, 0, "pt").float().cpu() * 2 - 1)
        self.pipe.transformer = self.teacher
        return grid(torch.cat(rows), len(prompts))

    def export(self) -> None:
        adapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
        ClearAdapter(adapter.config, half).save_pretrained(self.config.export_to)


def draw(pipe: Any, prompts: list[str], data: DataConfig, seed: int, output_type: str) -> Tensor:
    """What the base draws for prompts, each from noise of its own."""
    return repeatable_call(
        pipe,
        **call_arguments(pipe, prompts, guidance_scale=data.guidance_scale),
        height=data.size,
        width=data.size,
        num_inference_steps=data.steps,
        generator=[torch.Generator().manual_seed(seed + n) for n in range(len(prompts))],
        output_type=output_type,
    ).images


@torch.no_grad()
def self_generated(pipe: Any, data: DataConfig, seed: int) -> dict[str, Tensor]:
    """Latents that the base draws, with the text states that they were drawn by; made once and kept.

    A part is written as soon as it is drawn, so that a run that was cut off goes on where it stopped.

    Returns:
        `latents` [N, C, H, W], `text` [N, T, D] and `pooled` [N, P], float16 on the CPU.
    """
    folder = Path(data.folder) / _made_of(pipe, data, seed)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(data.prompts) if data.prompts else None
    firsts = range(0, data.pictures, data.batch_size)
    parts = []
    for first in tqdm(firsts, desc="pictures of the base", disable=None):
        file = folder / f"{first:06d}.safetensors"
        if not file.exists():
            numbers = range(first, min(first + data.batch_size, data.pictures))
            texts = [prompts[n % len(prompts)] if prompts else sample_scene(n).caption for n in numbers]
            part = _drawn(pipe, texts, data, seed * 1_000_003 + first)
            write_aside(file, lambda aside, part=part: save_tensors(aside, part))
        with safe_open(file, "pt") as opened:
            parts.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _drawn(pipe: Any, texts: list[str], data: DataConfig, seed: int) -> dict[str, Tensor]:
    tokens = draw(pipe, texts, data, seed, "latent")
    latents = pipe._unpack_latents(tokens, data.size, data.size, pipe.vae_scale_factor)
    text, pooled = encoded(pipe, texts)
    tensors = {"latents": latents, "text": text, "pooled": pooled}
    return {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}


def _made_of(pipe: Any, data: DataConfig, seed: int) -> str:
    """A name for the pictures that this base draws under these settings."""
    settings = data.model_dump(exclude={"folder", "pictures"})
    mark = hashlib.sha256(repr((sorted(settings.items()), seed)).encode())
    for parameter in pipe.transformer.parameters():
        mark.update(parameter.detach().float().sum().cpu().numpy().tobytes())
    return mark.hexdigest()[:12]


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        RecipeError: there are none.
    """
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise RecipeError(f"expected prompts in {path}, one a line, got none")
    return prompts
