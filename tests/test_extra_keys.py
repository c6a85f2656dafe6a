"""Extra keys: one softmax over an attention's own keys and further ones, whatever chooses its own."""

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from methods import EditsAdapter
from tiny import Graphs
from tiny_bases import draw as draw_base
from tiny_bases import tiny_base
from tiny_dit import draw, flux_inputs, tiny_flux
from torch import Tensor

from interactdiff import AdapterError, attach
from interactdiff.adapter import ExtraKeys, Host, KeyBlock
from interactdiff.clear import ClearAdapter, ClearConfig, local_attention
from interactdiff.clear.flex import can_run_flex
from interactdiff.clear.pattern import Pattern, pool
from interactdiff.merge import concatenated_attention, merged_attention
from interactdiff.sites import Site

INF = math.inf
B, HEADS, D = 2, 2, 8


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, extra: list[KeyBlock], scale: float, mask: Tensor | None = None
) -> Tensor:
    """The definition, row by row, with w as a factor of the exponentials: [B, heads, Q, D] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            powers = (scale * q[b, h] @ k[b, h].T).exp()
            powers = powers if mask is None else powers * mask
            sums, values = powers.sum(1), powers @ v[b, h]
            for block in extra:
                row = b % len(block.keys)
                weight = torch.as_tensor(block.log_weight).double().exp()
                weight = weight.expand(q.shape[0], 1, 1, block.keys.shape[2])[b, 0]
                of_query = torch.as_tensor(block.query_weight).double().exp()
                of_query = of_query.expand(q.shape[0], 1, q.shape[2], 1)[b, 0]
                more = (scale * q[b, h] @ block.keys[row, h].double().T).exp() * weight * of_query
                sums, values = sums + more.sum(1), values + more @ block.values[row, h].double()
            out[b, h] = values / sums[:, None]
    return out


def blocks(dtype: torch.dtype = torch.float32) -> list[KeyBlock]:
    """One for all rows at a constant weight; one for each row, with a weight for each key, some unseen."""
    weights = noise(B, 1, 1, 7, seed=5)
    weights[0, ..., 2], weights[1, ..., 4:] = -INF, -INF
    return [
        KeyBlock(noise(1, HEADS, 5, D, seed=1, dtype=dtype), noise(1, HEADS, 5, D, seed=2, dtype=dtype), 1.1),
        KeyBlock(
            noise(B, HEADS, 7, D, seed=3, dtype=dtype), noise(B, HEADS, 7, D, seed=4, dtype=dtype), weights
        ),
    ]


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("attention", [merged_attention, concatenated_attention])
def test_merging_is_one_softmax(attention: Any, dtype: torch.dtype, atol: float) -> None:
    q, k, v = (noise(B, HEADS, n, D, seed=10 + n, dtype=dtype) for n in (9, 11, 11))
    v = noise(B, HEADS, 11, D, seed=30, dtype=dtype)
    out = attention(q, k, v, blocks(dtype), 0.5)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), oracle(q, k, v, blocks(dtype), 0.5), atol=atol)


@pytest.mark.parametrize("attention", [merged_attention, concatenated_attention])
def test_a_block_has_weights_by_query_too(attention: Any) -> None:
    """As for a box in which queries see a reference: some do not, some by half; of one row, and of each."""
    q, k, v = (noise(B, HEADS, n, D, seed=10 + n) for n in (9, 11, 11))
    place = noise(1, 1, 9, 1, seed=6)
    place[:, :, :4] = -INF
    weighted = [
        block._replace(query_weight=weight)
        for block, weight in zip(blocks(), (place, noise(B, 1, 9, 1, seed=7)), strict=True)
    ]
    out = attention(q, k, v, weighted, 0.5)
    assert torch.allclose(out.double(), oracle(q, k, v, weighted, 0.5), atol=1e-5)
    alone = attention(q, k, v, [weighted[0]], 0.5)
    assert torch.allclose(alone[:, :, :4], attention(q, k, v, [], 0.5)[:, :, :4], atol=1e-6)
    if attention is merged_attention:
        assert torch.equal(alone[:, :, :4], attention(q, k, v, [], 0.5)[:, :, :4])


def test_queries_and_keys_may_be_wider_than_values() -> None:
    """As autocast has them after a norm."""
    q, k = noise(B, HEADS, 5, D), noise(B, HEADS, 6, D, seed=1)
    v = noise(B, HEADS, 6, D, seed=2)
    block = KeyBlock(noise(B, HEADS, 3, D, seed=3), noise(B, HEADS, 3, D, seed=4), torch.zeros(1, 1, 1, 1))
    made = merged_attention(q, k, v.bfloat16(), [block], 0.4)
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.float(), merged_attention(q, k, v, [block], 0.4), atol=0.03)


def test_a_block_of_weight_0_changes_no_bit_and_weight_w_counts_w_times() -> None:
    q, k, v = noise(B, HEADS, 6, D, seed=1), noise(B, HEADS, 8, D, seed=2), noise(B, HEADS, 8, D, seed=3)
    keys, values = noise(1, HEADS, 4, D, seed=4), noise(1, HEADS, 4, D, seed=5)
    plain = merged_attention(q, k, v, [], 0.4)
    for nothing in (-INF, torch.full((B, 1, 1, 1), -INF), torch.full((1, 1, 1, 4), -INF)):
        assert torch.equal(merged_attention(q, k, v, [KeyBlock(keys, values, nothing)], 0.4), plain)
    thrice = merged_attention(q, k, v, [KeyBlock(keys, values)] * 3, 0.4)
    assert torch.allclose(
        merged_attention(q, k, v, [KeyBlock(keys, values, math.log(3))], 0.4), thrice, atol=1e-5
    )


def test_gradients_are_those_of_the_definition() -> None:
    tensors = [noise(1, HEADS, 5, D, seed=n, dtype=torch.float64).requires_grad_() for n in range(5)]
    q, k, v, keys, values = tensors

    def of(attention: Any) -> list[Tensor]:
        out = attention(q, k, v, [KeyBlock(keys, values, 0.7)], 0.5)
        return list(torch.autograd.grad(out.square().sum(), tensors))

    for mine, own in zip(of(merged_attention), of(oracle_with_gradients), strict=True):
        assert torch.allclose(mine, own, atol=1e-9)


def oracle_with_gradients(q: Tensor, k: Tensor, v: Tensor, extra: list[KeyBlock], scale: float) -> Tensor:
    own, more = (scale * q @ k.mT).exp(), (scale * q @ extra[0].keys.mT + extra[0].log_weight).exp()
    return (own @ v + more @ extra[0].values) / (own.sum(-1, keepdim=True) + more.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("backend", "pooled", "by_query"),
    [*product(("reference", "tiles"), (False, True), (False, True)), ("flex", True, True)],
)
def test_extra_keys_beside_windows(backend: str, pooled: bool, by_query: bool) -> None:
    """Image tokens see their windows, the text and the further keys; text tokens not the further ones."""
    if backend == "flex" and (why_not := can_run_flex(torch.device("cpu"), torch.float32)):
        pytest.skip(why_not)
    grid, text = (6, 8), 5
    down_factor, text_first = (2, False) if pooled else (1, True)
    pattern = Pattern(grid, text, 2, down_factor, text_first=text_first)
    q, k, v = (noise(B, HEADS, pattern.length, D, seed=n) for n in (20, 21, 22))
    extra, expected_of = blocks(), blocks()
    if by_query:
        place = noise(1, 1, grid[0] * grid[1], 1, seed=6)
        place[:, :, 10:20] = -INF
        of_all = torch.zeros(1, 1, pattern.length, 1)
        of_all[:, :, pattern.image] = place
        extra[1], expected_of[1] = (
            b._replace(query_weight=w) for b, w in zip([extra[1]] * 2, (place, of_all), strict=True)
        )
    with torch.no_grad():
        arguments: dict[str, Any] = {
            "grid": grid,
            "text_length": text,
            "window": 2,
            "down_factor": down_factor,
        }
        arguments |= {"text_first": text_first, "backend": backend, "scale": 0.6}
        out = local_attention(q, k, v, **arguments, extra=extra)
        windows = local_attention(q, k, v, **arguments)
    keys, values = k, v
    if down_factor > 1:
        keys, values = (torch.cat([t, pool(t[:, :, pattern.image], pattern, None)], 2) for t in (k, v))
    expected = oracle(q, keys, values, expected_of, 0.6, pattern.mask().double())
    assert torch.allclose(out[:, :, pattern.image].double(), expected[:, :, pattern.image], atol=1e-5)
    assert torch.equal(out[:, :, pattern.text], windows[:, :, pattern.text])
    assert not torch.allclose(out[:, :, pattern.image], windows[:, :, pattern.image], atol=1e-2)


# --- in denoisers ---


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe", "sd3_pipe"])
def test_own_keys_are_recorded_as_they_are_attended_to(fixture: str, request: pytest.FixtureRequest) -> None:
    """Where the image attends to itself alone, all keys counted twice are as all of them counted once."""
    pipe = request.getfixturevalue(fixture)
    expected = draw(pipe, num_inference_steps=1)
    kept: dict[str, KeyBlock] = {}
    shapes: list[tuple[int, ...]] = []

    def make(host: Host) -> list[ExtraKeys]:
        def record(site: Site, keys: Tensor, values: Tensor) -> None:
            weight = 0.0 if fixture == "pipe" else -INF
            kept[site.path] = KeyBlock(keys.clone(), values.clone(), weight)
            shapes.append(tuple(keys.shape))

        def again(site: Site) -> list[KeyBlock]:
            return [kept[site.path]]

        return [
            ExtraKeys(site, partial(again, site), partial(record, site)) for site in host.sites_of(*ROLES)
        ]

    with attach(pipe, EditsAdapter(make, "recording")):
        assert torch.allclose(draw(pipe, num_inference_steps=1), expected, atol=1e-4)
    assert {shape[2] for shape in shapes} <= {256, 64, 16}, "image tokens alone, at every level"
    assert len(kept) == len(shapes) or fixture == "pipe"


def extra(block: KeyBlock, *roles: str, acts: bool = True) -> EditsAdapter:
    """The same further keys at every attention of some roles, as many heads and as wide as it has."""

    def blocks_of(site: Site) -> list[KeyBlock]:
        heads, width = site.heads, site.dim // site.heads
        keys, values = (t[:, :1, :, :1].expand(-1, heads, -1, width) for t in block[:2])
        return [KeyBlock(keys, values, block.log_weight)] if acts else []

    def make(host: Host) -> list[ExtraKeys]:
        return [ExtraKeys(site, lambda site=site: blocks_of(site)) for site in host.sites_of(*roles)]

    return EditsAdapter(make, "extra")


BLOCK = KeyBlock(noise(1, 1, 6, 1, seed=40), noise(1, 1, 6, 1, seed=41), 0.5)
ROLES = ("self", "joint", "single")


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe", "sd3_pipe"])
def test_extra_keys_act_in_every_denoiser_and_leave_nothing(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(fixture)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    expected, processors = draw(pipe), dict(denoiser.attn_processors)
    with attach(pipe, extra(BLOCK, *ROLES, acts=False)):
        assert torch.equal(draw(pipe), expected), "no keys, but another picture"
    with attach(pipe, extra(KeyBlock(BLOCK.keys, BLOCK.values, -INF), *ROLES)):
        assert torch.allclose(draw(pipe), expected, atol=1e-4)
    with attach(pipe, extra(BLOCK, *ROLES)):
        drawn = draw(pipe)
        assert all(denoiser.attn_processors[name] is own for name, own in processors.items())
    assert not torch.allclose(drawn, expected, atol=1e-3)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("name", ["Flux2 dev", "Qwen-Image", "Z-Image"])
def test_extra_keys_in_the_newer_bases(name: str) -> None:
    pipe = tiny_base(name)
    expected = draw_base(pipe)
    with attach(pipe, extra(BLOCK, *ROLES, acts=False)):
        assert torch.equal(draw_base(pipe), expected)
    with attach(pipe, extra(KeyBlock(BLOCK.keys, BLOCK.values, -INF), *ROLES)):
        assert torch.allclose(draw_base(pipe), expected, atol=1e-4)
    with attach(pipe, extra(BLOCK, *ROLES)):
        drawn = draw_base(pipe)
    with attach(pipe, extra(BLOCK, *ROLES), ClearAdapter(ClearConfig(100)).eval()) as handle:
        handle["clear"].configure(min_tokens=0)
        assert torch.allclose(draw_base(pipe), drawn, atol=1e-3)
    assert not torch.allclose(drawn, expected, atol=1e-3)


def test_attention_slicing_changes_nothing(pipe: Any) -> None:
    with attach(pipe, extra(BLOCK, "self")):
        whole = draw(pipe)
        pipe.enable_attention_slicing(1)
        assert torch.allclose(draw(pipe), whole, atol=1e-4)
    pipe.disable_attention_slicing()
    assert not torch.allclose(draw(pipe), whole, atol=1e-3)


def test_a_window_over_everything_is_plain_attention_with_extra_keys_too(flux_pipe: Any) -> None:
    with attach(flux_pipe, extra(BLOCK, *ROLES)):
        plain = draw(flux_pipe)
    for adapters in (
        [extra(BLOCK, *ROLES), ClearAdapter(ClearConfig(100)).eval()],
        [ClearAdapter(ClearConfig(100)).eval(), extra(BLOCK, *ROLES)],
    ):
        with attach(flux_pipe, *adapters) as handle:
            handle["clear"].configure(min_tokens=0)
            assert torch.allclose(draw(flux_pipe), plain, atol=1e-4)


def test_what_cannot_have_extra_keys_is_refused_in_words(flux_pipe: Any) -> None:
    transformer = flux_pipe.transformer
    transformer.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"expected separate projections at .*, got fused ones"):
        attach(flux_pipe, extra(BLOCK, *ROLES))
    transformer.unfuse_qkv_projections()
    with attach(transformer, extra(BLOCK, *ROLES)), pytest.raises(AdapterError, match="no attention mask"):
        transformer(**flux_inputs(), joint_attention_kwargs={"attention_mask": torch.ones(69, 69)})


def test_extra_keys_are_one_graph_under_torch_compile(graphs: Graphs) -> None:
    transformer, inputs = tiny_flux(), flux_inputs()
    with torch.no_grad(), attach(transformer, extra(BLOCK, *ROLES)):
        expected = transformer(**inputs).sample
        compiled: Any = torch.compile(transformer, backend=graphs, fullgraph=True)
        for timestep in (0.5, 0.4, 0.3):
            inputs["timestep"] = torch.full((2,), timestep)
            out = compiled(**inputs).sample
            expected = expected if timestep == 0.5 else transformer(**inputs).sample
            assert torch.allclose(out, expected, atol=1e-4)
    assert len(graphs) == 1
