"""The benchmark of references, at tiny sizes."""

import json
from pathlib import Path

import pytest
import torch

import interactdiff.bench.interaction as shapes
import interactdiff.bench.subject as bench
from interactdiff.bench.interaction import BenchBase
from interactdiff.bench.joint import JointShapes
from interactdiff.bench.subject import WAYS, SubjectBench, UNetSubjectBench, bench_subject
from interactdiff.bench.subject_flux import FluxSubjectBench
from interactdiff.cli import main

TINY = BenchBase(
    {
        "cross_attention_dim": 16, "attention_head_dim": 2, "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    latents=8,
    text=5,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def flux() -> FluxSubjectBench:
    return FluxSubjectBench(JointShapes(heads=1, text=5), 4, 0.5)


def test_every_way_is_what_it_is_called() -> None:
    timed = UNetSubjectBench(TINY, 0.5, CPU, torch.float32)
    assert calls_of(timed, timed.denoiser.conv_in) == [[(2, 8)], [(2, 8)], [(1, 8), (2, 8)], [(3, 8)]]


def test_every_way_in_a_transformer(flux: FluxSubjectBench) -> None:
    calls = calls_of(flux, flux.denoiser.x_embedder)
    assert calls == [[(1, 64)], [(1, 64)], [(1, 64), (1, 64)], [(1, 64)]]


def calls_of(timed: SubjectBench, first: torch.nn.Module) -> list[list[tuple[int, int]]]:
    """Rows and width of the inputs of each way's calls of the denoiser."""
    calls: list[tuple[int, int]] = []
    first.register_forward_hook(lambda _, args, __: calls.append((len(args[0]), args[0].shape[-1])))
    rows: dict[int, list[tuple[int, int]]] = {}

    def measure(step: object) -> torch.Tensor:
        calls.clear()
        out = step()  # type: ignore[operator]
        rows[len(rows)] = list(calls)
        return out

    drawn = timed.round(measure)
    assert tuple(drawn) == WAYS
    ways = list(drawn.values())
    assert all((a - b).abs().max() > 0 for n, a in enumerate(ways) for b in ways[:n])
    assert torch.equal(timed.step(), drawn["plain"]), "all was detached"
    assert 1 < timed.least_ratio(0.4) < timed.least_ratio(1.0)
    return list(rows.values())


def test_the_naive_transformer_attends_as_kept_features_do(flux: FluxSubjectBench) -> None:
    """In its first block, where the reference's tokens are what they are without a picture beside them."""
    first = flux.denoiser.transformer_blocks[0].attn
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with flux.attached(time_gap=0.0) as handle:
        flux.step()
        reference = handle["subject"].runner.reference_of(flux.subject)
        passes = handle["subject"].runner.passes()
        noised = passes.noised(reference.latents, reference.noise, [1000.0], flux.pipeline)
    rows = noised.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    flux.reference = rows
    flux.naive()
    assert torch.allclose(seen[-1][:, :16], seen[-2], atol=1e-5)


def test_the_naive_peer_attends_as_the_formula_says() -> None:
    from interactdiff.subject.attention import self_subject_attention_oracle

    timed = UNetSubjectBench(TINY, 0.5, CPU, torch.float32)
    attn = timed.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    states = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 64, 64)
    mask[..., 32:] = 0
    with torch.no_grad():
        got = bench.DenseProcessor(mask, 3.0)(attn, states)[:2]
        q, k, v = (
            getattr(attn, n)(states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for n in ("to_q", "to_k", "to_v")
        )
        m = torch.nn.functional.adaptive_avg_pool2d(mask, 8).flatten()
        out = self_subject_attention_oracle(q[:2], k[:2], v[:2], k[2:], v[2:], m, 3.0)
        expected = attn.to_out[0](out.transpose(1, 2).flatten(2))
    assert torch.allclose(got, expected, atol=1e-5)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.BASES, "sd15", TINY)
    file = tmp_path / "figures.json"
    assert main(["bench", "subject", "--rounds", "1", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    row = json.loads(file.read_text())["rows"][0]
    assert set(row["seconds"]) == set(row["ratios"]) == set(row["peak_mb"]) == set(WAYS)
    assert f"{row['least_ratio']:.3f}" in printed
    assert row["peak_mb"]["naive"] > row["peak_mb"]["plain"] > 0
    assert main(["bench", "subject", "--foreground", "0"]) == 2


def test_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 1.2, 2.0, 3.0, 2.0, 2.6, 4.0, 8.0, 4.0, 4.4, 9.0, 12.0])
    monkeypatch.setattr(bench, "_seconds", lambda _: next(seconds))
    bench_of = UNetSubjectBench(TINY, 0.5, CPU, torch.float32)
    row = bench_subject(bench_of, 0.5, rounds=3, progress=False)
    assert row["seconds"] == dict(zip(WAYS, [2.0, 2.6, 4.0, 8.0], strict=True))
    assert row["ratios"] == pytest.approx(dict(zip(WAYS, [1, 1.2, 2, 3], strict=True)))
