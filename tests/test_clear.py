"""CLEAR in real denoisers: what attaching, configuring and detaching do."""

from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny import FEEDING, RIDING, Graphs, trained_adapter
from tiny_dit import draw, trained_layers

from interactdiff import AdapterError, attach
from interactdiff.clear import ClearConfig, ClearError, linearize
from interactdiff.clear.attention import least_tokens
from interactdiff.handle import attached_bindings
from interactdiff.processors import keys_processor
from interactdiff.sites import attention_sites, denoiser_of

PIPES = ["flux_pipe", "sd3_pipe", "pipe", "xl_pipe"]


@pytest.fixture(params=PIPES)
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_window_over_the_whole_grid_is_full_attention(any_pipe: Any) -> None:
    expected = draw(any_pipe)
    with linearize(any_pipe, window=100, min_tokens=0) as handle:
        assert torch.allclose(draw(any_pipe), expected, atol=1e-4)
        assert handle["clear"].active


def test_a_small_window_acts_and_detaching_leaves_nothing(any_pipe: Any) -> None:
    denoiser = denoiser_of(any_pipe)
    expected = draw(any_pipe)
    processors, parameters = dict(denoiser.attn_processors), dict(denoiser.named_parameters())
    values = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    hooks = len(denoiser._forward_pre_hooks)
    layers = trained_layers(denoiser, ClearConfig(2, 2))
    handle = linearize(any_pipe, weights=layers, min_tokens=0)
    assert not torch.allclose(draw(any_pipe), expected, atol=1e-2)
    assert denoiser.state_dict().keys() == values.keys()
    handle.detach()
    handle.detach()
    assert all(denoiser.attn_processors[name] is own for name, own in processors.items())
    assert all(dict(denoiser.named_parameters())[name] is own for name, own in parameters.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in denoiser.state_dict().items())
    assert len(denoiser._forward_pre_hooks) == hooks
    assert torch.equal(draw(any_pipe), expected)
    with pytest.raises(AdapterError, match="got a handle that is detached"):
        handle["clear"].configure(min_tokens=0)


def test_the_base_draws_below_the_least_tokens_and_it_is_said_once(
    any_pipe: Any, recwarn: pytest.WarningsRecorder
) -> None:
    expected = draw(any_pipe)
    handle = linearize(any_pipe, weights=trained_layers(denoiser_of(any_pipe), ClearConfig(2)))
    assert torch.equal(draw(any_pipe), expected)
    assert torch.equal(draw(any_pipe), expected)
    messages = [str(w.message) for w in recwarn if "CLEAR is off" in str(w.message)]
    assert len(messages) == 1
    assert f"below {least_tokens(2)} full attention is faster" in messages[0]
    assert not handle["clear"].active


def test_the_grid_comes_from_each_call(any_pipe: Any) -> None:
    with linearize(any_pipe, window=2, min_tokens=0):
        together = [draw(any_pipe, size) for size in ((32, 32), (16, 48), (48, 16), (32, 32))]
    for size, drawn in zip(((32, 32), (16, 48), (48, 16)), together, strict=False):
        with linearize(any_pipe, window=2, min_tokens=0):
            assert torch.equal(draw(any_pipe, size), drawn)
    assert torch.equal(together[0], together[3])


def test_only_large_grids_of_a_unet_get_windows(pipe: Any) -> None:
    sites = attention_sites(pipe.unet)
    with linearize(pipe, window=2, min_tokens=8 * 16) as handle:  # 32 px: 16 x 16 latents, 8 x 8 below
        draw(pipe)
        on = [site.level for site in handle["clear"].active_sites]
    assert set(on) == {0}
    assert len(on) == sum(site.level == 0 for site in sites)


def test_backends_agree(any_pipe: Any) -> None:
    drawn = []
    for backend in ("reference", "tiles"):
        with linearize(any_pipe, window=3, min_tokens=0, backend=backend):
            drawn.append(draw(any_pipe))
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4)


@pytest.mark.parametrize("clear_first", [True, False])
def test_windows_and_interactions_in_one_unet(pipe: Any, clear_first: bool) -> None:
    plain = draw(pipe)
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING, FEEDING])
        controlled = draw(pipe)
    order = [lambda: linearize(pipe, window=2, min_tokens=0), lambda: attach(pipe, adapter)]
    handles = [make() for make in (order if clear_first else reversed(order))]
    interaction: Any = handles[1] if clear_first else handles[0]
    windows = draw(pipe)
    interaction.set_scene([RIDING, FEEDING])
    both = draw(pipe)
    assert not any(torch.allclose(a, b, atol=1e-3) for a in (plain, controlled) for b in (windows, both))
    assert not torch.allclose(windows, both, atol=1e-3)
    for handle in handles:
        handle.detach()
    assert torch.equal(draw(pipe), plain)


def test_image_to_image_and_controlnet_share_the_attached_transformer(flux_pipe: Any) -> None:
    again: Any = FluxImg2ImgPipeline(**{n: c for n, c in flux_pipe.components.items()})
    again.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    plain = draw(again, **arguments)
    assert "joint_attention_kwargs" in FluxControlNetPipeline.__call__.__annotations__
    with linearize(flux_pipe, window=2, min_tokens=0):
        assert not torch.allclose(draw(again, **arguments), plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(flux_pipe: Any, dtype: torch.dtype) -> None:
    flux_pipe.to(dtype)
    layers = trained_layers(flux_pipe.transformer, ClearConfig(3, 2))
    drawn = []
    for backend in ("reference", "tiles"):
        with linearize(flux_pipe, weights=layers, min_tokens=0, backend=backend) as handle:
            drawn.append(draw(flux_pipe))
            assert {p.dtype for p in handle["clear"].adapter.parameters()} == {dtype}
    assert {tensor.dtype for tensor in drawn} == {dtype}
    assert torch.allclose(*drawn, atol=0.1)


def test_compiled_as_one_graph_and_for_sizes_above_and_below(flux_pipe: Any, graphs: Graphs) -> None:
    layers = trained_layers(flux_pipe.transformer, ClearConfig(2))
    plain = draw(flux_pipe)
    with linearize(flux_pipe, weights=layers, min_tokens=0):
        expected = draw(flux_pipe)
    flux_pipe.transformer = torch.compile(flux_pipe.transformer, backend=graphs, fullgraph=True)
    handle = linearize(flux_pipe, weights=layers, min_tokens=0)
    assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)
    assert len(graphs) == 1
    handle["clear"].configure(min_tokens=1000)
    with pytest.warns(UserWarning, match="CLEAR is off"):
        assert torch.allclose(draw(flux_pipe), plain, atol=1e-4)
    handle["clear"].configure(min_tokens=0)
    assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)


def test_proportional_scale_and_rotary_base_change_pictures_and_end(flux_pipe: Any) -> None:
    own, during = flux_pipe.transformer.pos_embed.theta, []
    flux_pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, _: during.append(module.theta))
    with linearize(flux_pipe, window=3, min_tokens=0) as handle:
        plain = draw(flux_pipe)
        handle["clear"].configure(proportional=True)
        scaled = draw(flux_pipe)
        handle["clear"].configure(proportional=False, ntk_factor=10.0)
        stretched = draw(flux_pipe)
        assert set(during) == {own, 10 * own}
        assert flux_pipe.transformer.pos_embed.theta == own, "it is stretched between calls too"
        during.clear()
        handle["clear"].configure(min_tokens=1000)
        with pytest.warns(UserWarning, match="CLEAR is off"):
            draw(flux_pipe)
        assert set(during) == {own}
        handle["clear"].configure(min_tokens=0)
        draw(flux_pipe)
    assert flux_pipe.transformer.pos_embed.theta == own
    assert not torch.allclose(plain, scaled, atol=1e-3)
    assert not torch.allclose(plain, stretched, atol=1e-3)


def test_attention_backends_of_diffusers_reach_the_windows(flux_pipe: Any) -> None:
    transformer = flux_pipe.transformer
    own = [site.module.processor for site in attention_sites(transformer)]
    with linearize(flux_pipe, window=3, min_tokens=0):
        expected = draw(flux_pipe)
        transformer.set_attention_backend("_native_math")
        assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)
        for site in attention_sites(transformer):
            site.module.processor._attention_backend = "xformers"
        with pytest.raises(ClearError, match="backend native or flex for windows, got xformers"):
            draw(flux_pipe)
        transformer.reset_attention_backend()
        site.module.processor._parallel_config = object()
        with pytest.raises(ClearError, match="got context parallelism"):
            draw(flux_pipe)
        site.module.processor._parallel_config = None
    transformer.set_attention_backend("native")
    assert [p._attention_backend for p in own] == ["native"] * 3
    transformer.reset_attention_backend()


def test_bad_input_is_one_sentence(flux_pipe: Any, sd3_pipe: Any) -> None:
    for arguments, words in (
        ({"window": 0}, "window: expected a whole number from 1 up, got 0"),
        ({"down_factor": 0}, "down_factor: expected a whole number from 1 up, got 0"),
        ({"min_tokens": -1}, "expected min_tokens of 0 or more, got -1"),
        ({"ntk_factor": 0.5}, "expected ntk_factor of 1 or more, got 0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            linearize(flux_pipe, **arguments)
    with pytest.raises(AdapterError, match="SD3Transformer2DModel has no rotary positions"):
        linearize(sd3_pipe, ntk_factor=10.0)
    with pytest.raises(AdapterError, match="or a pipeline that has one, got Linear"):
        linearize(torch.nn.Linear(1, 1))
    assert not attached_bindings(flux_pipe.transformer)
    assert not attached_bindings(sd3_pipe.transformer)
    with (
        linearize(flux_pipe, window=2, down_factor=3, min_tokens=0),
        pytest.raises(ClearError, match="expected a number that divides the grid 8 x 8, got 3"),
    ):
        draw(flux_pipe)


def test_what_cannot_have_windows_is_refused(flux_pipe: Any, pipe: Any) -> None:
    with linearize(flux_pipe), pytest.raises(AdapterError, match="got one that has it"):
        linearize(flux_pipe)
    attention = flux_pipe.transformer.transformer_blocks[0].attn
    own = attention.processor
    attention.set_processor(FluxIPAdapterAttnProcessor(32, 8))
    with pytest.raises(AdapterError, match=r"stock attention processor .* got FluxIPAdapterAttnProcessor"):
        linearize(flux_pipe)
    attention.set_processor(own)
    flux_pipe.transformer.fuse_qkv_projections()
    with pytest.raises(AdapterError, match="expected separate projections"):
        linearize(flux_pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    with linearize(pipe, window=2, min_tokens=0):
        pipe.enable_attention_slicing(1)
        kind = type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__
        assert kind == "SlicedAttnProcessor"


def test_calls_that_windows_cannot_serve_are_refused_before_anything_runs(flux_pipe: Any) -> None:
    transformer = flux_pipe.transformer
    tokens = torch.zeros(1, 16, 16)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    call = {
        "hidden_states": tokens,
        "encoder_hidden_states": torch.zeros(1, 3, 12),
        "pooled_projections": torch.zeros(1, 16),
        "timestep": torch.ones(1),
        "img_ids": ids,
        "txt_ids": torch.zeros(3, 3),
    }
    with linearize(transformer, window=2, min_tokens=0):
        transformer(**call)
        reference = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])  # Kontext's second picture
        with pytest.raises(AdapterError, match="got 32 tokens with places in 4 x 4"):
            transformer(**call | {"img_ids": reference, "hidden_states": torch.zeros(1, 32, 16)})
        mask = {"attention_mask": torch.ones(19, 19)}
        with pytest.raises(AdapterError, match=r"expected no attention mask beside windows .*attn, got one"):
            transformer(**call, joint_attention_kwargs=mask)
        attention = transformer.transformer_blocks[0].attn
        processor = keys_processor(attention_sites(transformer)[0])
        states, text = torch.zeros(1, 16, 32), torch.zeros(1, 3, 32)
        with pytest.raises(AdapterError, match="image_rotary_emb, the tables of rotary positions, got none"):
            processor(attention, states, text)


def test_processors_of_an_ip_adapter_are_refused_in_words_and_survived(flux_pipe: Any) -> None:
    """Between calls the base has its own processors, so that whoever replaces them replaces those."""
    attention = flux_pipe.transformer.transformer_blocks[0].attn
    own = attention.processor
    with linearize(flux_pipe, window=2, min_tokens=0):
        expected = draw(flux_pipe)
        assert attention.processor is own
        attention.set_processor(FluxIPAdapterAttnProcessor(32, 8))
        with pytest.raises(
            AdapterError, match=r"stock attention processor .* got FluxIPAdapterAttnProcessor"
        ):
            draw(flux_pipe)
        attention.set_processor(type(own)())
        assert torch.equal(draw(flux_pipe), expected)
    assert type(attention.processor) is type(own)
