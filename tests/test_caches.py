"""Attention caches of diffusers, fused projections and merged tokens at the sites where adapters act."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention import BasicTransformerBlock
from tiny import RIDING, close, trained_adapter
from tiny import draw as draw_unet
from tiny_dit import draw, tiny_sd3, trained_joint_adapter
from torch import Tensor, nn

from interactdiff import AdapterError, attach
from interactdiff.clear import linearize

STEPS: dict[str, Any] = {"num_inference_steps": 4}
ALWAYS = (-1, 10000)  # timesteps within which a cache may skip


def pyramid(where: tuple[int, int] = ALWAYS) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=where,
        current_timestep_callback=lambda: 500,  # every step is within the range
    )


def faster(pipe: Any) -> Any:
    """Flux is distilled and says which timestep it is at; of SD3 the unconditional half is left out."""
    distilled = hasattr(pipe, "current_timestep")
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900 if distilled else 0),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        attention_weight_callback=lambda _: 0.0,
        is_guidance_distilled=distilled,
        tensor_format="BCHW",
        current_timestep_callback=lambda: pipe.current_timestep if distilled else 500,
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "pooled_projections",
        ],
    )


CACHES: dict[str, Callable[[Any], Any]] = {
    "PyramidAttentionBroadcast": lambda _: pyramid(),
    "FasterCache": faster,
    "TaylorSeerCache": lambda _: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1
    ),
    "FirstBlockCache": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.01),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_on_a_transformer_are_controlled(flux_pipe: Any, cache: str) -> None:
    """As strongly as without: the picture is nearer to the controlled one than to the base's own."""
    plain = draw(flux_pipe, **STEPS)
    adapter = trained_joint_adapter(flux_pipe.transformer)
    with attach(flux_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        exact = draw(flux_pipe, **STEPS)
        flux_pipe.transformer.enable_cache(CACHES[cache](flux_pipe))
        cached = draw(flux_pipe, **STEPS)
        assert torch.equal(draw(flux_pipe, **STEPS), cached), "a run leaves something to the next one"
        handle.clear()
        idle = draw(flux_pipe, **STEPS)
    assert torch.equal(draw(flux_pipe, **STEPS), idle)
    assert (cached - exact).norm() < (cached - plain).norm()
    assert (cached - idle).norm() > 0.5 * (exact - plain).norm()


class CachedWithItsEdits(nn.Module):
    """An attention whose output, what adapters add to it included, is computed in every second call."""

    def __init__(self, attention: Any):
        super().__init__()
        self.attention, self.calls, self.kept = attention, 0, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls % 2 == 0:
            self.kept = self.attention(*args, **kwargs)
        self.calls += 1
        return self.kept


def test_what_a_cached_attention_reads_is_what_it_read(flux_pipe: Any) -> None:
    """Reuse by diffusers, which knows nothing of the edits, is reuse of the edited outputs."""
    transformer = flux_pipe.transformer
    with attach(flux_pipe, trained_joint_adapter(transformer)) as handle:
        handle.set_scene([RIDING])
        transformer.enable_cache(pyramid())
        cached = draw(flux_pipe, **STEPS)
        transformer.disable_cache()
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn = CachedWithItsEdits(block.attn)
        assert torch.allclose(draw(flux_pipe, **STEPS), cached, atol=1e-5)


def test_a_cache_on_a_unet_keeps_attention_and_not_control(pipe: Any) -> None:
    """The fuser reads the block's present input, beside what its self-attention put out before."""
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        exact = draw_unet(pipe)
        diffusers.apply_pyramid_attention_broadcast(pipe.unet, pyramid((0, 0)))
        assert torch.equal(draw_unet(pipe), exact), "where it skips nothing, nothing changes"
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
        registry.remove_hook("pyramid_attention_broadcast", recurse=True)
        diffusers.apply_pyramid_attention_broadcast(pipe.unet, pyramid())
        cached = draw_unet(pipe)
        registry.reset_stateful_hooks(recurse=True)
        handle.clear()
        without = draw_unet(pipe)
    assert not close(cached, exact)
    assert (cached - exact).norm() < (without - exact).norm()


def test_a_cache_that_leaves_a_half_of_the_batch_out_is_named(sd3_pipe: Any) -> None:
    with attach(sd3_pipe, trained_joint_adapter(sd3_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        diffusers.apply_faster_cache(sd3_pipe.transformer, faster(sd3_pipe))
        with pytest.raises(AdapterError, match=r"batch rows.*cannot act beside FasterCacheDenoiserHook"):
            draw(sd3_pipe, num_inference_steps=6, guidance_scale=3.0)


# --- fused projections ---


def test_queries_of_fused_projections_in_sd3(sd3_pipe: Any) -> None:
    """SD3's own shape: with SD3.5's second attention diffusers cannot fuse, and its norms it leaves out."""
    sd3_pipe.register_modules(transformer=tiny_sd3(qk_norm=None, dual_attention_layers=()))
    transformer = sd3_pipe.transformer
    adapter = trained_joint_adapter(transformer)
    with attach(sd3_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        separate = draw(sd3_pipe)
        transformer.fuse_qkv_projections()
        assert torch.allclose(draw(sd3_pipe), separate, atol=1e-4)
        transformer.unfuse_qkv_projections()
        assert torch.equal(draw(sd3_pipe), separate)
    transformer.fuse_qkv_projections()
    with attach(sd3_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        assert torch.allclose(draw(sd3_pipe), separate, atol=1e-4)


def test_fused_projections_in_flux_and_in_a_unet(flux_pipe: Any, pipe: Any) -> None:
    for one, denoiser, run in (
        (flux_pipe, flux_pipe.transformer, lambda: draw(flux_pipe)),
        (pipe, pipe.unet, lambda: draw_unet(pipe)),
    ):
        adapter = trained_adapter(denoiser) if one is pipe else trained_joint_adapter(denoiser)
        with attach(one, adapter) as handle:
            handle.set_scene([RIDING])
            separate = run()
            denoiser.fuse_qkv_projections()
            assert torch.allclose(run(), separate, atol=1e-3)


def test_windows_beside_projections_that_were_fused_since_are_refused_or_equal(flux_pipe: Any) -> None:
    with linearize(flux_pipe, window=2, min_tokens=0):
        separate = draw(flux_pipe)
        flux_pipe.transformer.fuse_qkv_projections()
        assert torch.allclose(draw(flux_pipe), separate, atol=1e-5)


# --- fewer tokens than the block has ---


class Merged(BasicTransformerBlock):
    """A block whose self-attention sees every second token, as token merging does."""

    def forward(self, hidden_states: Tensor, *_: Any, encoder_hidden_states: Any = None, **__: Any) -> Tensor:
        attended = self.attn1(self.norm1(hidden_states)[:, ::2])
        hidden_states = hidden_states + attended.repeat_interleave(2, 1)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        return hidden_states + self.ff(self.norm3(hidden_states))


def test_merged_tokens_in_a_unet_are_refused_in_words(pipe: Any) -> None:
    for block in pipe.unet.modules():
        if type(block) is BasicTransformerBlock:
            block.__class__ = Merged
    plain = draw_unet(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        assert torch.equal(draw_unet(pipe), plain)
        handle.set_scene([RIDING])
        with pytest.raises(AdapterError, match=r"attend with its block's 64 tokens of 2 batch rows, got 32"):
            draw_unet(pipe)


Change = Callable[[Tensor], Tensor]


def around(attention: Any, before: Change, text: Change, after: Change) -> None:
    """Change the tokens that an attention over text and image sees, and change what it gathers back."""
    own = attention.forward

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        out, text_out = own(before(hidden_states), text(encoder_hidden_states), **kwargs)
        return after(out), text_out[: len(encoder_hidden_states)]

    attention.forward = forward


def test_a_transformer_with_merged_tokens_is_refused_in_words(sd3_pipe: Any) -> None:
    attention = sd3_pipe.transformer.transformer_blocks[0].attn
    around(attention, lambda t: t[:, ::2], lambda t: t, lambda t: t.repeat_interleave(2, 1))
    plain = draw(sd3_pipe)
    with attach(sd3_pipe, trained_joint_adapter(sd3_pipe.transformer)) as handle:
        assert torch.equal(draw(sd3_pipe), plain)
        handle.set_scene([RIDING])
        with pytest.raises(
            AdapterError, match=r"blocks.0.attn to attend with 64 tokens, got 32: a tool within the denoiser"
        ):
            draw(sd3_pipe)


def test_a_transformer_with_attention_in_tiles_is_refused_in_words(sd3_pipe: Any) -> None:
    attention = sd3_pipe.transformer.transformer_blocks[0].attn
    around(
        attention,
        lambda t: torch.cat(t.chunk(2, 1)),
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat(t.chunk(2), 1),
    )
    with attach(sd3_pipe, trained_joint_adapter(sd3_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        with pytest.raises(AdapterError, match=r"queries for 2 batch rows, got 4 at a time: a tool within"):
            draw(sd3_pipe)


def test_attention_in_tiles_within_a_unet_s_own_is_controlled(pipe: Any) -> None:
    """What splits and joins tokens within the attention, as HyperTile does, is of no matter to a block."""

    def tile(attention: Any) -> None:
        own = attention.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batch, length, width = hidden_states.shape
            out = own(hidden_states.reshape(2 * batch, length // 2, width), *args, **kwargs)
            return out.reshape(batch, length, width)

        attention.forward = forward

    for block in pipe.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            tile(block.attn1)
    plain = draw_unet(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        assert not close(draw_unet(pipe), plain)
    assert torch.equal(draw_unet(pipe), plain)
