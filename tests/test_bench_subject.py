"""The benchmark of references, at tiny sizes."""

import json
from pathlib import Path

import pytest
import torch

import interactdiff.bench.interaction as shapes
import interactdiff.bench.subject as bench
from interactdiff.bench.interaction import BenchBase
from interactdiff.bench.subject import WAYS, SubjectBench, bench_subject
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


def test_every_way_is_what_it_is_called() -> None:
    timed = SubjectBench(TINY, 0.5, CPU, torch.float32)
    calls: list[int] = []
    timed.unet.conv_in.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    rows: dict[int, list[int]] = {}

    def measure(step: object) -> torch.Tensor:
        calls.clear()
        out = step()  # type: ignore[operator]
        rows[len(rows)] = list(calls)
        return out

    drawn = timed.round(measure)
    assert tuple(drawn) == WAYS
    assert list(rows.values()) == [[2], [2], [1, 2], [3]]
    ways = list(drawn.values())
    assert all((a - b).abs().max() > 0 for n, a in enumerate(ways) for b in ways[:n])
    assert torch.equal(timed.step(), drawn["plain"]), "all was detached"
    assert 1 < timed.least_ratio(0.4) < timed.least_ratio(1.0)


def test_the_naive_peer_attends_as_the_formula_says() -> None:
    from interactdiff.subject.attention import self_subject_attention_oracle

    timed = SubjectBench(TINY, 0.5, CPU, torch.float32)
    attn = timed.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
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
    row = bench_subject(TINY, 0.5, CPU, torch.float32, rounds=3, progress=False)
    assert row["seconds"] == dict(zip(WAYS, [2.0, 2.6, 4.0, 8.0], strict=True))
    assert row["ratios"] == pytest.approx(dict(zip(WAYS, [1, 1.2, 2, 3], strict=True)))
