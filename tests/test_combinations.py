"""Interactions and windows together, and beside what else acts in a denoiser."""

from typing import Any

import pytest
import torch
from test_features import ip_adapter_tensors
from tiny import RIDING, Graphs, trained_adapter
from tiny import draw as draw_unet
from tiny_dit import draw, trained_joint_adapter, trained_layers
from torch import Tensor

from interactdiff import AdapterError, Handle, attach
from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.sites import denoiser_of


def both(pipe: Any, layers: bool = True) -> Handle:
    """A handle of interactions, with a scene, and of windows."""
    denoiser = denoiser_of(pipe)
    torch.manual_seed(0)
    windows = trained_layers(denoiser, ClearConfig(2)) if layers else ClearAdapter(ClearConfig(2)).eval()
    adapter = trained_adapter(denoiser) if hasattr(pipe, "unet") else trained_joint_adapter(denoiser)
    handle = attach(pipe, adapter, windows)
    handle["clear"].configure(min_tokens=0)
    handle.set_scene([RIDING])
    return handle


def test_compiled_they_are_one_graph_from_step_to_step(flux_pipe: Any, graphs: Graphs) -> None:
    plain = draw(flux_pipe, num_inference_steps=3)
    with both(flux_pipe):
        expected = draw(flux_pipe, num_inference_steps=3)
    flux_pipe.transformer.compile(backend=graphs, fullgraph=True)
    with both(flux_pipe) as handle:
        assert torch.allclose(draw(flux_pipe, num_inference_steps=3), expected, atol=1e-4)
        assert len(graphs) == 1
        draw(flux_pipe, num_inference_steps=5)
        assert len(graphs) == 1, "a step compiles anew"
        handle.detach("clear")
        assert not torch.allclose(draw(flux_pipe, num_inference_steps=3), expected, atol=1e-3)
    assert torch.allclose(draw(flux_pipe, num_inference_steps=3), plain, atol=1e-4)


@pytest.mark.parametrize("order", ["lora first", "adapters first"])
def test_beside_a_lora(flux_pipe: Any, order: str) -> None:
    peft = pytest.importorskip("peft")

    def load() -> None:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, flux_pipe.transformer)

    if order == "lora first":
        load()
    with both(flux_pipe, layers=order == "lora first") as handle:
        without = draw(flux_pipe)
        if order == "adapters first":
            load()
            assert not torch.allclose(draw(flux_pipe), without, atol=1e-2)
        drawn = draw(flux_pipe)
        handle.detach("interaction")
        assert not torch.allclose(draw(flux_pipe), drawn, atol=1e-2)
    with both(flux_pipe, layers=order == "lora first"):
        assert torch.equal(draw(flux_pipe), drawn)


def test_an_ip_adapter_loaded_beside_windows_on_a_unet(pipe: Any) -> None:
    """It makes every processor anew, and finds the base's own in place of them."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config: Any = CLIPVisionConfig
    torch.manual_seed(13)
    vision = config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    )
    shown = {"ip_adapter_image": Image.new("RGB", (16, 16), "red")}
    plain = draw_unet(pipe)
    with both(pipe) as handle:
        alone = draw_unet(pipe)
        pipe.load_ip_adapter(ip_adapter_tensors(pipe.unet), subfolder="", weight_name="")
        drawn = draw_unet(pipe, **shown)
        assert handle["clear"].active
        assert not torch.allclose(drawn, alone, atol=1e-3)
        pipe.unload_ip_adapter()
        assert torch.allclose(draw_unet(pipe), alone, atol=1e-4)
    assert torch.allclose(draw_unet(pipe), plain, atol=1e-4)


def test_offload(pipe: Any) -> None:
    """Of whole modules: with trained layers too. Of each layer: windows with the base's own layers alone."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    with both(pipe) as handle:
        expected = draw_unet(pipe)
        _, hook = cpu_offload_with_hook(pipe.unet, execution_device="cpu")
        assert torch.equal(draw_unet(pipe), expected)
        hook.remove()
        handle.detach()
    with both(pipe, layers=False):
        expected = draw_unet(pipe)
    handle, layers = both(pipe, layers=False), trained_layers(pipe.unet, ClearConfig(2))
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert torch.allclose(draw_unet(pipe), expected, atol=1e-4)
    handle.detach()
    with pytest.raises(AdapterError, match="expected weights in memory for layers to stand in for"):
        attach(pipe, layers)


@pytest.mark.parametrize("fixture", ["flux_pipe", "sd3_pipe", "pipe"])
def test_half_precision_and_back(fixture: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)

    def run() -> Tensor:
        return draw(pipe, num_inference_steps=1)

    with both(pipe):
        expected = run()
        pipe.to(torch.bfloat16)
        half = run()
        assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_nothing_of_a_scene_stays_when_windows_do(flux_pipe: Any) -> None:
    windows = ClearAdapter(ClearConfig(2)).eval()
    with attach(flux_pipe, windows) as handle:
        handle["clear"].configure(min_tokens=0)
        alone = draw(flux_pipe)
    with both(flux_pipe, layers=False) as handle:
        assert not torch.allclose(draw(flux_pipe), alone, atol=1e-2)
        handle.clear()
        assert torch.equal(draw(flux_pipe), alone)
        handle.set_scene([[RIDING]])
        handle.set_scene([])
        assert torch.equal(draw(flux_pipe), alone)
