"""CLEAR's operator: every backend against the reference, the reference against loops."""

import math
import os
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

import interactdiff.clear.attention as attention
import interactdiff.clear.flex as flex
import interactdiff.clear.tiles as tiles
import interactdiff.merge as parts
from interactdiff.bench.memory import peak_memory
from interactdiff.clear import (
    ClearError,
    Pattern,
    can_run_flex,
    can_run_tiles,
    choose_backend,
    local_attention,
    proportional_scale,
)

CPU = torch.device("cpu")
CASES = {
    "not multiples of a tile": {"grid": (9, 13), "text_length": 7, "window": 4},
    "interior tiles": {"grid": (21, 43), "text_length": 40, "window": 8},
    "wide tiles": {"grid": (25, 70), "text_length": 0, "window": 11},
    "within one window": {"grid": (3, 2), "text_length": 7, "window": 8},
    "one row": {"grid": (1, 37), "text_length": 3, "window": 5},
    "one column": {"grid": (37, 1), "text_length": 0, "window": 3},
    "itself alone": {"grid": (10, 9), "text_length": 2, "window": 1},
    "square": {"grid": (14, 30), "text_length": 5, "window": 5, "shape": "square"},
    "text last": {"grid": (12, 17), "text_length": 9, "window": 4, "text_first": False},
    "dilated": {"grid": (17, 23), "text_length": 5, "window": 3, "dilation": 3},
    "dilated beyond the grid": {"grid": (5, 7), "text_length": 5, "window": 2, "dilation": 6},
    "pooled": {"grid": (16, 24), "text_length": 40, "window": 4, "down_factor": 4},
    "pooled, no text": {"grid": (8, 12), "text_length": 0, "window": 3, "down_factor": 2},
    "all at once": {
        "grid": (16, 24),
        "text_length": 7,
        "window": 3,
        "down_factor": 4,
        "dilation": 2,
        "shape": "square",
        "text_first": False,
    },
}


def inputs(case, dtype=torch.float32, batch=2, heads=3, dim=8, grad=False):
    """q, k, v with the strides that processors give them, and weights for pooling or None."""
    generator = torch.Generator().manual_seed(1)
    length = math.prod(case["grid"]) + case["text_length"]
    q, k, v = (
        torch.randn(batch, length, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    d = case.get("down_factor", 1)
    weight = torch.rand(1, 1, 1, d, 1, d, 1, generator=generator) * 2 / d**2 if d > 1 else None
    if grad:
        for tensor in (q, k, v, weight):
            if tensor is not None:
                tensor.requires_grad_()
    return q, k, v, weight


def attend(tensors, case, backend, **options):
    q, k, v, weight = tensors
    return local_attention(q, k, v, spatial_weight=weight, backend=backend, **case, **options)


def gradients(tensors, case, backend):
    out = attend(tensors, case, backend)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return torch.autograd.grad(out, [t for t in tensors if t is not None], above)


def loops(q, k, v, weight, case, scale):
    """The definition, token by token."""
    pattern = Pattern(**case)
    height, width = pattern.grid
    d = pattern.down_factor
    texts = range(pattern.length)[pattern.text]
    place = dict(zip(product(range(height), range(width)), range(pattern.length)[pattern.image], strict=True))
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (t.double() for t in (q, k, v))
    pooled = []
    for top, left in product(range(0, height, d), range(0, width, d)) if d > 1 else ():
        block = [
            (place[top + a, left + b], weight[0, 0, 0, a, 0, b, 0]) for a, b in product(range(d), range(d))
        ]
        pooled.append(tuple(sum(w * t[:, :, i] for i, w in block) for t in (k, v)))
    everyone = [(k[:, :, i], v[:, :, i]) for i in range(pattern.length)]
    for i in texts:
        out[:, :, i] = softmax_mean(q[:, :, i], everyone, scale)
    for (y, x), i in place.items():
        seen = [everyone[t] for t in texts] + pooled
        for (other_y, other_x), j in place.items():
            dy, dx = (other_y - y) / pattern.dilation, (other_x - x) / pattern.dilation
            near = max(abs(dy), abs(dx)) if pattern.shape == "square" else math.hypot(dy, dx)
            if dy == int(dy) and dx == int(dx) and near < pattern.window:
                seen.append(everyone[j])
        out[:, :, i] = softmax_mean(q[:, :, i], seen, scale)
    return out


def softmax_mean(query, seen, scale):
    keys, values = (torch.stack(tensors) for tensors in zip(*seen, strict=True))
    return (((scale * query * keys).sum(-1)).softmax(0)[..., None] * values).sum(0)


@pytest.mark.parametrize(
    "case",
    [
        {"grid": (5, 6), "text_length": 3, "window": 3},
        {"grid": (4, 6), "text_length": 2, "window": 2, "shape": "square", "text_first": False},
        {"grid": (4, 6), "text_length": 2, "window": 2, "down_factor": 2},
        {"grid": (5, 6), "text_length": 0, "window": 2, "dilation": 2},
    ],
)
def test_the_reference_is_the_definition(case):
    tensors = inputs(case)
    expected = loops(*tensors, case, scale=0.7)
    assert (attend(tensors, case, "reference", scale=0.7) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pairs_are_the_mask_counted(case):
    pattern = Pattern(**case)
    assert pattern.pairs() == pattern.mask().sum()


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiles_and_their_gradients_are_the_reference(case, kernel, monkeypatch):
    assert parts.fused(CPU)
    if kernel == "plain":
        monkeypatch.setattr(parts, "fused", lambda device: False)
    tensors = inputs(case, grad=True)
    expected, out = (attend(tensors, case, backend) for backend in ("reference", "tiles"))
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 3e-6
    for exact, got in zip(*(gradients(tensors, case, b) for b in ("reference", "tiles")), strict=True):
        assert exact.abs().max() > 0.01
        assert (got - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float64, 1e-12)]
)
def test_tiles_in_other_dtypes(dtype, tolerance, kernel, monkeypatch):
    if kernel == "plain":
        monkeypatch.setattr(parts, "fused", lambda device: False)
    for name in ("interior tiles", "all at once"):
        tensors = inputs(CASES[name], dtype, grad=True)
        expected, out = (attend(tensors, CASES[name], backend) for backend in ("reference", "tiles"))
        assert out.dtype == dtype
        assert (out - expected).abs().max() < tolerance
        grads = zip(*(gradients(tensors, CASES[name], b) for b in ("reference", "tiles")), strict=True)
        for exact, got in grads:
            assert (got - exact).norm() < 2 * tolerance * exact.norm()


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("limit", [1, 1e5])
def test_tiles_in_small_portions_are_the_same(kernel, limit, monkeypatch):
    """One head, one or three strips of tiles, some rows of scores at a time."""
    if kernel == "plain":
        monkeypatch.setattr(parts, "fused", lambda device: False)
    case = CASES["interior tiles"]
    tensors = inputs(case, grad=True)
    expected, exact = attend(tensors, case, "tiles"), gradients(tensors, case, "tiles")
    for module, name in ((tiles, "STRIP_BYTES"), (tiles, "GRADIENT_BYTES"), (parts, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, limit)
    assert (attend(tensors, case, "tiles") - expected).abs().max() < 1e-6
    for one, other in zip(gradients(tensors, case, "tiles"), exact, strict=True):
        assert (one - other).abs().max() < 1e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    text_length=st.sampled_from([0, 1, 7]),
    window=st.integers(1, 14),
    shape=st.sampled_from(["circle", "square"]),
    dilation=st.integers(1, 4),
    text_first=st.booleans(),
)
def test_tiles_of_any_size(**case):
    tensors = inputs(case, batch=1, heads=1)
    expected, out = (attend(tensors, case, backend) for backend in ("reference", "tiles"))
    assert (out - expected).abs().max() < 3e-6


@pytest.mark.parametrize("tile", [(4, 8), (16, 8)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flex_visits_exactly_what_is_seen(case, tile, monkeypatch):
    """Blocks taken in full, and the mask within blocks taken in part, without compiling a kernel."""
    monkeypatch.setitem(flex.TILE, "cpu", tile)
    pattern, size = Pattern(**case), math.prod(tile)
    layout = flex.layout_of.__wrapped__(pattern, CPU)
    block_mask, keys = layout.block_mask, len(layout.keys)
    inside = create_mask(block_mask.mask_mod, 1, 1, layout.queries, keys, CPU)[0, 0]
    visited = torch.zeros_like(inside)
    for kind, whole in (("", False), ("full_", True)):
        counts, indices = (
            getattr(block_mask, f"{kind}kv_{name}")[0, 0] for name in ("num_blocks", "indices")
        )
        for row, count in enumerate(counts):
            for column in indices[row, :count]:
                block = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
                visited[block] = True if whole else inside[block]
    places = torch.cat((layout.places, _places_of_pooled(pattern, layout)))
    assert torch.equal(visited[layout.places][:, places], pattern.mask())
    padding = torch.ones(keys, dtype=torch.bool)
    padding[places] = False
    assert not visited[layout.places][:, padding].any()
    assert torch.equal(inside[layout.places], visited[layout.places])  # what an unfused kernel would take


def _places_of_pooled(pattern, layout):
    return torch.arange(pattern.pooled_length) + layout.queries


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("all at once", torch.float32, 3e-6), ("interior tiles", torch.bfloat16, 0.02)],
)
def test_flex_is_the_reference(name, dtype, tolerance):
    tensors = inputs(CASES[name], dtype)
    expected, out = (attend(tensors, CASES[name], backend) for backend in ("reference", "flex"))
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < tolerance


def test_flex_keeps_a_bounded_number_of_layouts():
    flex.layout_of.cache_clear()
    for window in range(1, 2 * flex.LAYOUTS):
        kept = flex.layout_of(Pattern((4, 4), 0, window), CPU)
        assert flex.layout_of(Pattern((4, 4), 0, window), CPU) is kept
    assert flex.layout_of.cache_info().currsize == flex.LAYOUTS


def test_tiles_take_memory_in_proportion_to_tokens():
    """Four times the tokens: some four times the memory, forwards and backwards; a dense mask: 16 times."""

    def peaks(side, backend):
        case = {"grid": (side, side), "text_length": 7, "window": 5}
        tensors = inputs(case, batch=1, heads=2, grad=True)
        with torch.no_grad():
            forward = peak_memory(lambda: attend(tensors, case, backend), CPU)
        return forward, peak_memory(lambda: gradients(tensors, case, backend), CPU)

    for small, large in zip(peaks(32, "tiles"), peaks(64, "tiles"), strict=True):
        assert 3 * small < large < 5 * small
    assert peaks(64, "reference")[0] > 12 * peaks(32, "reference")[0]


def test_tiles_are_one_operator_to_torch_compile():
    """No break of the graph, forwards or backwards, and torch's own checks of such an operator."""
    case = CASES["pooled"]
    tensors = inputs(case, grad=True)
    compiled = torch.compile(partial(attend, case=case, backend="tiles"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(tensors), attend(tensors, case, "tiles")
    assert torch.equal(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    for got, exact in zip(torch.autograd.grad(out.square().sum(), tensors), wanted, strict=True):
        assert torch.allclose(got, exact, atol=1e-6)
    q, k, v, _ = inputs({"grid": (6, 5), "text_length": 3}, batch=1, grad=True)
    flags = [3, 2, 0, 1, 1]
    torch.library.opcheck(tiles._forward, (q, k, v, k[:, :, :2], v[:, :, :2], [6, 5], flags, 0.3))


def test_autocast_takes_what_sdpa_would():
    case = CASES["pooled"]
    tensors = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(tensors, case, "tiles")
    assert out.dtype == torch.bfloat16
    assert (out - attend(tensors, case, "reference")).abs().max() < 0.03


def test_default_scale_and_default_weights():
    case = CASES["pooled"]
    q, k, v, _ = inputs(case)
    plain = attend((q, k, v, None), case, "tiles")
    means = torch.full((1, 1, 1, 4, 1, 4, 1), 1 / 16)
    assert (attend((q, k, v, means), case, "tiles", scale=8**-0.5) - plain).abs().max() < 1e-6
    assert (attend((q, k, v, means), case, "tiles", scale=0.5) - plain).abs().max() > 0.01


def test_proportional_scale():
    trained = 64**2 + 512
    assert proportional_scale(trained, 128) == pytest.approx(128**-0.5)
    assert proportional_scale(trained**2, 128) == pytest.approx((2 / 128) ** 0.5)
    assert proportional_scale(1000, 64, down_factor=4) == pytest.approx(proportional_scale(10_000, 64))
    with pytest.raises(ClearError, match="key_length: expected a whole number from 2 up, got 1"):
        proportional_scale(1, 64)


def test_the_automatic_choice_says_why():
    small, large = Pattern((4, 4), 7), Pattern((64, 64), 7)
    assert choose_backend(small, "cpu", torch.float32) == (
        "reference",
        f"23 tokens are few enough for a dense mask, up to {attention.DENSE_TOKENS}",
    )
    assert choose_backend(large, "cpu", torch.float32) == (
        "tiles",
        "on cpu tiles are faster than FlexAttention, and have gradients",
    )
    assert choose_backend(large, "cuda", torch.float64) == (
        "tiles",
        "FlexAttention takes float32, bfloat16 or float16, got float64",
    )


def test_the_choice_is_obeyed(monkeypatch):
    called = []
    for name, run in list(attention._RUN.items()):
        monkeypatch.setitem(
            attention._RUN, name, lambda *args, name=name, run=run: called.append(name) or run(*args)
        )
    monkeypatch.setattr(attention, "DENSE_TOKENS", 100)
    for grid in ((9, 9), (10, 10)):
        case = {"grid": grid, "text_length": 7, "window": 2}
        attend(inputs(case), case, "auto")
    attend(inputs(case), case, "reference")
    assert called == ["reference", "tiles", "reference"]


def test_an_explicit_backend_refuses_in_the_words_of_the_choice(monkeypatch):
    case = CASES["one row"]
    why = can_run_flex(CPU, torch.float32, grad=True)
    assert why == "FlexAttention has no gradients on cpu"
    refusal = f"backend: expected one that can run here, got 'flex': {why}"
    with pytest.raises(ClearError, match=f"^{refusal}$"):
        attend(inputs(case, grad=True), case, "flex")
    q, k, v, _ = (None if t is None else t.int() for t in inputs(case))
    with pytest.raises(
        ClearError, match="got 'tiles': tiles take float32, float64, bfloat16 or float16, got int32"
    ):
        attend((q, k, v, None), case, "tiles")
    assert can_run_tiles(CPU, torch.float16) is None
    assert can_run_flex(torch.device("mps"), torch.float32) == "FlexAttention runs on cpu or cuda, got mps"
    monkeypatch.setitem(os.environ, "PATH", "")
    assert can_run_flex(CPU, torch.float32).startswith(
        "FlexAttention needs a C++ compiler, and none was found ("
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": 0}, "window: expected a whole number from 1 up, got 0"),
        ({"window": 2.5}, "window: expected a whole number from 1 up, got 2.5"),
        ({"dilation": 0}, "dilation: expected a whole number from 1 up, got 0"),
        ({"text_length": -1}, "text_length: expected a whole number from 0 up, got -1"),
        ({"grid": (4, 0)}, "grid: expected two whole numbers from 1 up, (H, W), got (4, 0)"),
        ({"grid": (4, 6, 1)}, "grid: expected two whole numbers from 1 up, (H, W), got (4, 6, 1)"),
        ({"grid": (4, 7)}, "grid: expected 4 x 7 image and 3 text tokens, 31 in all, got 27"),
        ({"text_length": 4}, "grid: expected 4 x 6 image and 4 text tokens, 28 in all, got 27"),
        ({"shape": "round"}, "shape: expected circle or square, got 'round'"),
        ({"down_factor": 4}, "down_factor: expected a number that divides the grid 4 x 6, got 4"),
        ({"backend": "fast"}, "backend: expected auto, reference, tiles, flex, got 'fast'"),
        (
            {"spatial_weight": torch.ones(2, 2)},
            "spatial_weight: expected None with down_factor 1, which pools nothing, got a tensor",
        ),
        (
            {"down_factor": 2, "spatial_weight": torch.ones(2, 2)},
            "spatial_weight: expected shape (1, 1, 1, 2, 1, 2, 1), got (2, 2)",
        ),
        (
            {"k": torch.zeros(1, 1, 26, 8)},
            "q, k, v: expected one shape [B, heads, L, D], got (1, 1, 27, 8), (1, 1, 26, 8), (1, 1, 27, 8)",
        ),
        (
            {"v": torch.zeros(1, 1, 27, 8, dtype=torch.float16)},
            "q, k, v: expected one dtype and device, got torch.float32 on cpu, torch.float32 on cpu, "
            "torch.float16 on cpu",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes, sentence):
    right = {name: torch.zeros(1, 1, 27, 8) for name in "qkv"}
    right |= {"grid": (4, 6), "text_length": 3, "window": 2}
    local_attention(**right)
    with pytest.raises(ClearError) as refusal:
        local_attention(**(right | changes))
    assert str(refusal.value) == sentence
