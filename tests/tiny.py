"""Things small enough to test with, shared by the tests: scenes, and an adapter that acts."""

from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.scene import Interaction

RIDING = Interaction("person", "riding", "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))
FEEDING = Interaction("child", "feeding", "dog", (0.0, 0.2, 0.4, 0.9), (0.5, 0.5, 1.0, 1.0))
BOXES_ONLY = Interaction("person", None, "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))


def trained_adapter(
    unet: UNet2DConditionModel, grid_positions: bool = True, **options: Any
) -> InteractionAdapter:
    """An adapter that acts, as training would leave it: every parameter random, gates open."""
    torch.manual_seed(2)
    options = {"max_interactions": 3, "hidden": 16, "grid_positions": grid_positions, **options}
    adapter = InteractionAdapter.for_unet(unet, **options)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    for fuser in adapter.fusers.values():
        fuser.alpha_attn.data.fill_(1.0)
        fuser.alpha_dense.data.fill_(-0.7)
    return adapter.eval()


def draw(pipe: StableDiffusionPipeline, prompt: str | list[str] = "a dog", **arguments) -> Tensor:
    """Run a pipeline from fixed noise to latents, [images, 4, 8, 8]; give `latents` to use other noise."""
    images = (1 if isinstance(prompt, str) else len(prompt)) * arguments.get("num_images_per_prompt", 1)
    noise = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=pipe.unet.dtype)
    arguments = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 3.0, **arguments}
    return cast(Any, pipe)(prompt, output_type="latent", **arguments).images


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the noise of another batch size."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


class Calls:
    """Counts how often some modules run."""

    def __init__(self, *modules: nn.Module):
        self.count = 0
        for module in modules:
            module.register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.count += 1


class Graphs(list[Any]):
    """A backend of `torch.compile` that keeps the graphs it gets, and runs them as they are."""

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.append(graph)
        return graph.forward
