"""README's support matrix: every base with every stock pipeline, real classes at tiny sizes."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny import FEEDING, RIDING, close, trained_adapter
from torch import Tensor

from interactdiff.checkpoint import AdapterError
from interactdiff.handle import attach

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIDE = 16  # pixels of a picture
PICTURE, MASK = (
    torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(10)),
    torch.ones(1, 1, SIDE, SIDE),
)


def named(base: Any, kind: str) -> Any:
    """diffusers' class of this kind for a base."""
    xl = "XL" if isinstance(base, diffusers.StableDiffusionXLPipeline) else ""
    return getattr(diffusers, f"StableDiffusion{xl}{kind}Pipeline")


def from_base(base: Any, kind: str, **parts: Any) -> Any:
    pipeline = named(base, kind).from_pipe(base, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def controlnet(base: Any) -> diffusers.ControlNetModel:
    torch.manual_seed(8)
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8))
    for layer in (net.controlnet_mid_block, *net.controlnet_down_blocks):
        torch.nn.init.normal_(layer.weight, std=0.1)  # it starts at zero, and would change nothing
    return net.eval()


def t2i_adapter() -> diffusers.T2IAdapter:
    torch.manual_seed(9)
    return diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2).eval()


PIPELINES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "text to image": (lambda base: base, {}),
    "image to image": (lambda base: from_base(base, "Img2Img"), {"image": PICTURE, "strength": 0.6}),
    "inpaint": (
        lambda base: from_base(base, "Inpaint"),
        {"image": PICTURE, "mask_image": MASK, "strength": 1.0},
    ),
    "ControlNet": (
        lambda base: from_base(base, "ControlNet", controlnet=controlnet(base)),
        {"image": PICTURE},
    ),
    "ControlNet image to image": (
        lambda base: from_base(base, "ControlNetImg2Img", controlnet=controlnet(base)),
        {"image": PICTURE, "control_image": PICTURE, "strength": 0.6},
    ),
    "ControlNet inpaint": (
        lambda base: from_base(base, "ControlNetInpaint", controlnet=controlnet(base)),
        {"image": PICTURE, "mask_image": MASK, "control_image": PICTURE, "strength": 1.0},
    ),
    "T2I-Adapter": (lambda base: from_base(base, "Adapter", adapter=t2i_adapter()), {"image": PICTURE}),
    "PAG": (lambda base: from_base(base, "PAG", pag_applied_layers=["mid"]), {"pag_scale": 2.0}),
}


def run(pipeline: Any, arguments: dict[str, Any], prompt: list[str], **more: Any) -> Tensor:
    """Latents from fixed noise, a noise for each image."""
    images = len(prompt) * more.get("num_images_per_prompt", 1)
    # pipelines repeat a condition for the images of a prompt, but not the picture that they start from
    rows = len(prompt) if {"controlnet", "adapter"} & pipeline.components.keys() else images
    arguments = {n: v.expand(rows, -1, -1, -1) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    takes_size = "height" in inspect.signature(pipeline.__call__).parameters
    size = {"height": SIDE, "width": SIDE} if takes_size else {}
    how = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent", **size}
    generator = [torch.Generator().manual_seed(20 + number) for number in range(images)]
    return pipeline(prompt=prompt, generator=generator, **{**how, **arguments, **more}).images


@pytest.mark.parametrize("kind", PIPELINES)
def test_stock_pipelines_take_the_adapter(base, kind):
    make, arguments = PIPELINES[kind]
    pipeline = make(base)
    plain = run(pipeline, arguments, ["a dog"])
    adapter = trained_adapter(base.unet)
    with attach(pipeline, adapter) as handle:
        assert torch.equal(run(pipeline, arguments, ["a dog"]), plain), "idle, it changes the picture"
        handle.set_scene([RIDING])
        controlled = run(pipeline, arguments, ["a dog"])
        assert not torch.allclose(controlled, plain, atol=1e-2), "it does not act"
        handle.set_scene([RIDING], fast=True)
        assert not torch.allclose(run(pipeline, arguments, ["a dog"]), plain, atol=1e-2)
        handle.set_scene([[RIDING], []])
        mixed = run(pipeline, arguments, ["a dog", "a bike"])
        assert close(mixed[0], controlled[0]), "an image of a batch is not what it is alone"
        handle.set_scene([[], [FEEDING]])
        assert close(run(pipeline, arguments, ["a dog", "a bike"])[0], plain[0])
    assert torch.equal(run(pipeline, arguments, ["a dog"]), plain), "detached, it leaves something"


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("base", ["sd1", "sdxl"], indirect=True)
def test_more_images_a_prompt_and_no_guidance(base, kind, guidance_scale):
    make, arguments = PIPELINES[kind]
    pipeline = make(base)
    options = {"guidance_scale": guidance_scale}
    with attach(pipeline, trained_adapter(base.unet)) as handle:
        handle.set_scene([RIDING])
        alone = run(pipeline, arguments, ["a dog"], **options)
        several = run(pipeline, arguments, ["a dog"], num_images_per_prompt=2, **options)
    assert len(several) == 2
    assert close(several[0], alone[0])


def test_pipelines_that_guide_by_a_picture_too_are_refused(base):
    other = from_base(base, "InstructPix2Pix")
    adapter = trained_adapter(base.unet)
    with pytest.raises(
        AdapterError, match=r"got StableDiffusion\w*InstructPix2PixPipeline: it guides by pic"
    ):
        attach(other, adapter)
    attach(base, adapter).detach()
