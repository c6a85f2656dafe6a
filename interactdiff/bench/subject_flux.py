"""A step of a Flux-shaped transformer with a reference in each way of `bench.subject`."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from interactdiff.bench.joint import JointShapes, flux_transformer
from interactdiff.bench.subject import WEIGHT, SubjectBench, tiny_vae
from interactdiff.sites import find_sites

PIXELS = 16  # a side, of an image token


class FluxSubjectPipeline(DiffusionPipeline):
    """A pipeline of a transformer, a scheduler, and as much more as subjects ask for."""

    vae_scale_factor = 8

    def __init__(self, transformer: FluxTransformer2DModel, text: dict[str, Tensor]):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
        self.vae, self.text = tiny_vae(transformer, 16), text

    @property
    def _execution_device(self) -> torch.device:
        return self.transformer.device

    def encode_prompt(self, **_: Any) -> tuple[Tensor, Tensor, None]:
        """Of any prompt the same."""
        return self.text["encoder_hidden_states"], self.text["pooled_projections"], None


class FluxSubjectBench(SubjectBench):
    """One step in each way, of one row: its guidance is distilled.

    Args:
        shapes: of the transformer.
        grid: side of the grid of image tokens.
        foreground: share of the reference that is the subject.

    Attributes:
        reference: image tokens of the naive way's reference, [1, grid^2, C].
    """

    guided = False

    def __init__(self, shapes: JointShapes, grid: int, foreground: float):
        transformer = flux_transformer(shapes)
        config: Any = transformer.config
        self.grid = grid
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(shapes.device, shapes.dtype)

        text = {
            "encoder_hidden_states": noise(1, shapes.text, config.joint_attention_dim),
            "pooled_projections": noise(1, config.pooled_projection_dim),
        }
        places = torch.cartesian_prod(*(torch.arange(grid, device=shapes.device),) * 2)
        self.inputs = {
            "hidden_states": noise(1, grid**2, config.in_channels),
            **text,
            "img_ids": F.pad(places, (1, 0)).to(shapes.dtype),
            "txt_ids": torch.zeros(shapes.text, 3, device=shapes.device, dtype=shapes.dtype),
        }
        self.reference = self.inputs["hidden_states"]
        super().__init__(FluxSubjectPipeline(transformer, text), PIXELS * grid, foreground)

    def time(self) -> Tensor:
        """In thousandths of the scheduler's."""
        time = self.pipeline.scheduler.timesteps[:1].to(self.device) / 1000
        return time.to(self.inputs["hidden_states"].dtype)

    def naive(self) -> Tensor:
        """The reference as further image tokens at each step, and a dense mask over all of them."""
        own, tokens, text = self.inputs, self.grid**2, self.inputs["encoder_hidden_states"].shape[1]
        mask = torch.frombuffer(bytearray(self.mask.tobytes()), dtype=torch.uint8).float() / 255
        shares = F.adaptive_avg_pool2d(mask.view(1, 1, *self.mask.size), self.grid).flatten()
        bias = torch.zeros(text + 2 * tokens, text + 2 * tokens)
        bias[: text + tokens, text + tokens :] = (WEIGHT * shares).log().clamp(min=-1e4)
        bias[:text, text + tokens :] = -1e4  # the prompt does not see the reference
        try:
            self.inputs = own | {
                "hidden_states": torch.cat([own["hidden_states"], self.reference], 1),
                "img_ids": own["img_ids"].repeat(2, 1),
                "joint_attention_kwargs": {"attention_mask": bias.to(own["hidden_states"])},
            }
            return self.step()[:, :tokens]
        finally:
            self.inputs = own

    def extra_operations(self, foreground: float) -> float:
        """Of all blocks' attentions, whose image tokens alone see the reference."""
        tokens = self.grid**2
        dims = (site.dim for site in find_sites(self.denoiser) if site.role != "block")
        return sum(4 * tokens * foreground * tokens * dim for dim in dims)
