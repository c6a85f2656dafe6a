"""What runs on a GPU, against its oracles there; `benchmarks/on_device.sh` calls this where there is one."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import trained_joint_adapter

from interactdiff import Interaction, attach
from interactdiff.clear import linearize
from interactdiff.clear.attention import can_run_flex, local_attention
from interactdiff.clear.pattern import Pattern
from interactdiff.clear.reference import reference_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCENE = [Interaction("person", "riding", "bike", (0.1, 0.1, 0.6, 0.8), (0.3, 0.5, 0.9, 0.95))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["tiles", "flex"])
@pytest.mark.parametrize("window", [3, 8])
def test_windows_are_the_reference(backend: str, dtype: torch.dtype, window: int) -> None:
    device = torch.device("cuda")
    if backend == "flex" and (reason := can_run_flex(device, dtype)):
        pytest.skip(reason)
    generator = torch.Generator(device).manual_seed(0)
    grid, text = (20, 28), 12
    q, k, v = (
        torch.randn(2, 4, grid[0] * grid[1] + text, 64, generator=generator, device=device) for _ in range(3)
    )
    pattern = Pattern(grid, text, window)
    exact = reference_attention(q.double(), k.double(), v.double(), None, pattern, 64**-0.5)
    found = local_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), grid=grid, text_length=text, window=window, backend=backend
    )
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < DTYPES[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_unet_pipeline_is_its_own_again(pipe: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    pipe.to("cuda", dtype)
    plain = draw(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        assert torch.equal(draw(pipe), plain)
        handle.set_scene(SCENE)
        controlled = draw(pipe)
        assert not torch.equal(controlled, plain)
        assert torch.isfinite(controlled).all()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_pipeline_is_its_own_again(flux_pipe: Any, dtype: torch.dtype) -> None:
    flux_pipe.to("cuda", dtype)
    plain = draw_dit(flux_pipe)
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        assert torch.equal(draw_dit(flux_pipe), plain)
        handle.set_scene(SCENE)
        assert not torch.equal(draw_dit(flux_pipe), plain)
        with linearize(flux_pipe, window=2, min_tokens=0):
            assert torch.isfinite(draw_dit(flux_pipe)).all()
    assert torch.equal(draw_dit(flux_pipe), plain)


def test_one_graph_under_inductor(flux_pipe: Any) -> None:
    flux_pipe.to("cuda")
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene(SCENE)
        eager = draw_dit(flux_pipe)
        flux_pipe.transformer.compile(fullgraph=True)
        compiled = draw_dit(flux_pipe)
    assert (compiled - eager).abs().mean() < 0.01
