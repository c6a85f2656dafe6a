"""CLEAR in real denoisers: what attaching, configuring, loading and detaching do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import FEEDING, RIDING, trained_adapter
from tiny_dit import TEXT_LENGTH, shaken, tiny_flux
from torch import Tensor

from interactdiff import AdapterError, attach
from interactdiff.clear import ClearAdapter, ClearConfig, ClearError, linearize
from interactdiff.clear.adapter import SPATIAL_WEIGHT, expected_tensors
from interactdiff.clear.attention import least_tokens
from interactdiff.clear.handle import attached_clear
from interactdiff.sites import attention_sites, denoiser_of

PIPES = ["flux_pipe", "sd3_pipe", "pipe", "xl_pipe"]


def draw(pipe: Any, size: tuple[int, int] = (32, 32), **arguments: Any) -> Tensor:
    """A picture's latents from fixed noise."""
    if hasattr(pipe, "transformer"):
        arguments |= {"max_sequence_length": TEXT_LENGTH}
    generator = torch.Generator().manual_seed(0)
    height, width = size
    return pipe(
        "a dog", height=height, width=width, num_inference_steps=2, output_type="latent",
        generator=generator, **arguments,
    ).images  # fmt: skip


def trained_layers(denoiser: Any, config: ClearConfig) -> ClearAdapter:
    """Layers that differ from the base's, as training would leave them."""
    return shaken(ClearAdapter.for_denoiser(denoiser, config), 7)  # type: ignore[return-value]


@pytest.fixture(params=PIPES)
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_window_over_the_whole_grid_is_full_attention(any_pipe: Any) -> None:
    expected = draw(any_pipe)
    with linearize(any_pipe, window=100, min_tokens=0) as handle:
        assert torch.allclose(draw(any_pipe), expected, atol=1e-4)
        assert handle.active


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
        handle.configure(min_tokens=0)


def test_the_base_draws_below_the_least_tokens_and_it_is_said_once(
    any_pipe: Any, recwarn: pytest.WarningsRecorder
) -> None:
    expected = draw(any_pipe)
    handle = linearize(any_pipe, weights=trained_layers(denoiser_of(any_pipe), ClearConfig(2)))
    assert torch.equal(draw(any_pipe), expected)
    assert torch.equal(draw(any_pipe), expected)
    told = [str(w.message) for w in recwarn if "CLEAR is off" in str(w.message)]
    assert len(told) == 1
    assert f"below {least_tokens(2)} full attention is faster" in told[0]
    assert not handle.active


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
        on = [swap.site.level for swap in handle._swaps if swap.on]
    assert set(on) == {0}
    assert len(on) == sum(site.level == 0 for site in sites)


def test_backends_agree(any_pipe: Any) -> None:
    drawn = []
    for backend in ("reference", "tiles"):
        with linearize(any_pipe, window=3, min_tokens=0, backend=backend):
            drawn.append(draw(any_pipe))
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4)


def test_layers_are_saved_under_the_bases_own_names_and_load_again(flux_pipe: Any, tmp_path: Path) -> None:
    layers = trained_layers(flux_pipe.transformer, ClearConfig(3, 2))
    layers.save_pretrained(tmp_path / "mine")
    file = load_file(tmp_path / "mine" / "adapter.safetensors")
    own = dict(flux_pipe.transformer.named_parameters())
    assert {name for name in file if not name.endswith(SPATIAL_WEIGHT)} <= own.keys()
    assert "transformer_blocks.0.attn.to_out.0.weight" in file
    assert "single_transformer_blocks.1.attn.processor.spatial_weight" in file
    with linearize(flux_pipe, weights=layers, min_tokens=0):
        expected = draw(flux_pipe)
    for where in (tmp_path / "mine", tmp_path / "mine" / "adapter.safetensors"):
        loaded = ClearAdapter.from_pretrained(where)
        assert loaded.config == ClearConfig(3, 2)
        with attach(flux_pipe, loaded) as handle:
            handle.configure(min_tokens=0)
            assert torch.equal(draw(flux_pipe), expected)


@pytest.mark.parametrize(("window", "factor"), [(8, 1), (16, 1), (32, 1), (8, 4), (16, 4)])
def test_published_files_load_by_their_names(
    flux_pipe: Any, tmp_path: Path, window: int, factor: int
) -> None:
    layers = trained_layers(flux_pipe.transformer, ClearConfig(window, factor))
    name = f"clear_local_{window}{'' if factor == 1 else f'_down_{factor}'}.safetensors"
    save_file(layers.state_dict(), tmp_path / name)
    for weights in (tmp_path / name, tmp_path):
        with linearize(flux_pipe, window, factor, weights) as handle:
            assert handle.adapter.config == ClearConfig(window, factor)
    with pytest.raises(AdapterError) as refused:
        linearize(flux_pipe, 64, 2, tmp_path / name)
    assert str(refused.value) == (
        f"expected layers for window 64 and down factor 2, got {name}, which is for window {window} and "
        f"down factor {factor}"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("transformer_blocks.0.attn.to_q.weight"),
            "to_q.weight [32, 32], got no such tensor",
        ),
        (lambda t: t.update({"norm_out.extra": torch.zeros(1)}), "extra no such tensor, got [1]"),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.bias": torch.zeros(3)}),
            "to_q.bias [32], got [3]",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused_before_anything_is_touched(
    flux_pipe: Any, tmp_path: Path, change: Any, words: str
) -> None:
    tensors = trained_layers(flux_pipe.transformer, ClearConfig(8)).state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "clear_local_8.safetensors")
    with pytest.raises(AdapterError) as refused:
        linearize(flux_pipe, 8, weights=tmp_path / "clear_local_8.safetensors")
    assert words in str(refused.value)
    assert "window 8 and down factor 1 for FluxTransformer2DModel" in str(refused.value)
    assert attached_clear(flux_pipe.transformer) is None


def test_a_file_whose_name_tells_nothing_needs_a_window(flux_pipe: Any, tmp_path: Path) -> None:
    layers = trained_layers(flux_pipe.transformer, ClearConfig(4, 2))
    save_file(layers.state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(AdapterError, match=r"tells its window by its name, or a window, got mine\.safe"):
        ClearAdapter.from_pretrained(tmp_path / "mine.safetensors")
    loaded = ClearAdapter.from_pretrained(tmp_path / "mine.safetensors", window=4)
    assert loaded.config == ClearConfig(4, 2)  # the factor stands in the weights of pooling


@pytest.mark.parametrize("first", [True, False])
def test_a_lora_stays_on_top_of_trained_layers(flux_pipe: Any, first: bool) -> None:
    transformer = flux_pipe.transformer
    layers = trained_layers(tiny_flux(), ClearConfig(2))

    def add_lora() -> None:
        torch.manual_seed(5)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))

    expected = draw(flux_pipe)
    if first:
        add_lora()
    with linearize(flux_pipe, weights=layers, min_tokens=0):
        if not first:
            without = draw(flux_pipe)
            add_lora()
            assert not torch.allclose(draw(flux_pipe), without, atol=1e-3)
        drawn = draw(flux_pipe)
        transformer.delete_adapters("default")
        assert not torch.allclose(draw(flux_pipe), drawn, atol=1e-3)
    assert torch.equal(draw(flux_pipe), expected)


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
            assert {p.dtype for p in handle.adapter.parameters()} == {dtype}
    assert {tensor.dtype for tensor in drawn} == {dtype}
    assert torch.allclose(*drawn, atol=0.1)


@pytest.mark.parametrize("how", ["whole", "wrapped"])
def test_compiled_as_one_graph_and_for_sizes_above_and_below(flux_pipe: Any, how: str) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layers = trained_layers(flux_pipe.transformer, ClearConfig(2))
    plain = draw(flux_pipe)
    with linearize(flux_pipe, weights=layers, min_tokens=0):
        expected = draw(flux_pipe)
    if how == "whole":
        flux_pipe.transformer.compile(backend=count, fullgraph=True)
    else:
        flux_pipe.transformer = torch.compile(flux_pipe.transformer, backend=count, fullgraph=True)
    handle = linearize(flux_pipe, weights=layers, min_tokens=0)
    assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)
    assert len(graphs) == 1
    handle.configure(min_tokens=1000)
    with pytest.warns(UserWarning, match="CLEAR is off"):
        assert torch.allclose(draw(flux_pipe), plain, atol=1e-4)
    handle.configure(min_tokens=0)
    assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)
    torch.compiler.reset()


def test_proportional_scale_and_rotary_base_change_pictures_and_end(flux_pipe: Any) -> None:
    own = flux_pipe.transformer.pos_embed.theta
    with linearize(flux_pipe, window=3, min_tokens=0) as handle:
        plain = draw(flux_pipe)
        handle.configure(proportional=True)
        scaled = draw(flux_pipe)
        handle.configure(proportional=False, ntk_factor=10.0)
        stretched = draw(flux_pipe)
        assert flux_pipe.transformer.pos_embed.theta == 10 * own
        handle.configure(min_tokens=1000)
        with pytest.warns(UserWarning, match="CLEAR is off"):
            draw(flux_pipe)
        assert flux_pipe.transformer.pos_embed.theta == own
        handle.configure(min_tokens=0)
        draw(flux_pipe)
    assert flux_pipe.transformer.pos_embed.theta == own
    assert not torch.allclose(plain, scaled, atol=1e-3)
    assert not torch.allclose(plain, stretched, atol=1e-3)


def test_attention_backends_of_diffusers_reach_the_windows(flux_pipe: Any) -> None:
    transformer = flux_pipe.transformer
    own = [site.attention.processor for site in attention_sites(transformer)]
    with linearize(flux_pipe, window=3, min_tokens=0):
        expected = draw(flux_pipe)
        transformer.set_attention_backend("_native_math")
        assert torch.allclose(draw(flux_pipe), expected, atol=1e-4)
        for site in attention_sites(transformer):
            site.attention.processor._attention_backend = "xformers"
        with pytest.raises(ClearError, match="backend native or flex for windows, got xformers"):
            draw(flux_pipe)
        transformer.reset_attention_backend()
        site.attention.processor._parallel_config = object()
        with pytest.raises(ClearError, match="got context parallelism"):
            draw(flux_pipe)
        site.attention.processor._parallel_config = None
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
    assert attached_clear(flux_pipe.transformer) is None
    assert attached_clear(sd3_pipe.transformer) is None
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
        with pytest.raises(ClearError, match="got 32 tokens with places in 4 x 4"):
            transformer(**call | {"img_ids": reference, "hidden_states": torch.zeros(1, 32, 16)})
        attention = transformer.transformer_blocks[0].attn
        states, text = torch.zeros(1, 16, 32), torch.zeros(1, 3, 32)
        with pytest.raises(ClearError, match="image_rotary_emb, the tables of rotary positions, got none"):
            attention(states, text)
        with pytest.raises(ClearError, match="expected no attention mask beside a window, got one"):
            attention(states, text, attention_mask=torch.ones(19, 19))


def test_new_processors_made_by_an_ip_adapter_are_refused_in_words(flux_pipe: Any) -> None:
    with linearize(flux_pipe, window=2, min_tokens=0):
        draw(flux_pipe)
        kind = type(flux_pipe.transformer.transformer_blocks[0].attn.processor)
        with pytest.raises(AdapterError, match="load the IP-Adapter before it is attached"):
            kind()


def test_expected_tensors_are_those_that_were_published(flux_pipe: Any, sd3_pipe: Any) -> None:
    names = expected_tensors(flux_pipe.transformer, ClearConfig(8)).keys()
    joint = {f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    single = {f"single_transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_k", "to_v")}
    assert names == {f"{path}.{leaf}" for path in joint | single for leaf in ("weight", "bias")}
    assert "transformer_blocks.0.attn2.to_q.weight" in expected_tensors(sd3_pipe.transformer, ClearConfig(8))
