"""Benchmarks and doctor, at tiny sizes and on the command line."""

import json

import pytest
import torch
from tiny import RIDING, trained_adapter

import interactdiff.bench.interaction
from interactdiff.bench.interaction import BASES, Bench, BenchBase, bench_interaction, operations
from interactdiff.bench.memory import peak_memory
from interactdiff.cli import main
from interactdiff.doctor import backends, doctor
from interactdiff.handle import attach
from interactdiff.sites import KINDS

CPU = torch.device("cpu")
TINY = BenchBase(
    {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    latents=16,
    interactions=4,
)


def test_exact_is_what_diffusers_fusers_do_with_the_same_tokens():
    """The bench compares like with like: its two paths give the same picture of the same tokens."""
    bench = Bench(TINY, CPU, torch.float32)
    tokens = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    bench.unet.position_net = torch.nn.Identity()
    gated = bench.step(cross_attention_kwargs={"gligen": {"input": tokens}})
    plain = bench.step()
    with bench.attached() as handle, torch.no_grad():
        handle["interaction"].set_tokens(tokens)
        assert (bench.step() - gated).abs().max() < 1e-6
    assert (plain - gated).abs().max() > 5e-5
    assert torch.equal(bench.step(), plain)


def test_token_work_is_done_once_a_run_and_counted_so(monkeypatch):
    """In the timed steps of ours no key or value of a token is computed."""
    bench = Bench(TINY, CPU, torch.float32)
    seen = []
    fuser = next(iter(bench.adapter.fusers.values()))
    fuser.linear.register_forward_hook(lambda *_: seen.append("tokens"))
    timed = interactdiff.bench.interaction._timed
    monkeypatch.setattr(
        interactdiff.bench.interaction, "_timed", lambda run: (seen.append("timed"), timed(run))[1]
    )
    bench.round()
    assert seen == ["timed", "timed", "tokens", "timed", "tokens", "timed", "timed"]


def test_a_row_has_all_that_is_promised():
    row = bench_interaction(TINY, torch.bfloat16, 1, CPU, progress=False)
    seconds = {f"{way}_s" for way in ("plain", "gated", "exact", "refresh", "reuse", "fast")}
    assert seconds | {"ratios", "operations", "peak_mb"} == row.keys()
    assert row["fast_s"] == pytest.approx(0.2 * row["refresh_s"] + 0.8 * row["reuse_s"])  # 6 of 30 steps
    assert row["peak_mb"].keys() == {"plain", "gated", "exact", "fast"}
    assert row["peak_mb"]["fast"] > row["peak_mb"]["exact"] > row["peak_mb"]["plain"] > 0.1


def test_operations_of_true_shapes():
    counted = operations(BASES["sd15"])
    assert counted["gated_over_plain"] == pytest.approx(1.43, abs=0.01)
    assert counted["gated_over_plain"] - 0.02 < counted["exact_over_plain"] < counted["gated_over_plain"]


def test_peak_memory_counts_what_lives_at_once():
    kept = []

    def run() -> None:
        torch.ones(250_000).add(1)  # 1 MB and 1 MB more, both gone after
        kept.append(torch.ones(125_000))

    assert peak_memory(run, CPU) == pytest.approx(2.0, abs=0.05)
    assert peak_memory(lambda: (run(), run()), CPU) == pytest.approx(2.5, abs=0.05)


def test_bench_on_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(BASES, "sd15", TINY)
    out = tmp_path / "bench.json"
    assert main(["bench", "interaction", "--base", "sd15", "--rounds", "1", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["base"], row["dtype"], row["rounds"]) == ("sd15", "float32", 1)
    assert "ours exact over gated" in capsys.readouterr().out
    assert main(["bench", "interaction", "--json", str(tmp_path)]) == 2
    assert "--json: expected a file that can be written" in capsys.readouterr().err
    assert main(["bench", "interaction", "--rounds", "0"]) == 2


def test_the_bases_have_their_kinds_and_true_numbers_of_fusers():
    kinds = {}
    for name, base in BASES.items():
        bench = Bench(base, torch.device("meta"), torch.float32)
        config = bench.adapter.config.base
        kinds[name] = KINDS[config.cross_attention_dim], len(config.sites)
        fusers = sum(p.numel() for f in bench.adapter.fusers.values() for p in f.parameters()) / 1e6
        assert fusers == pytest.approx({"sd15": 208.0, "sdxl": 1810}[name], rel=0.01)
    assert kinds == {"sd15": ("SD 1.x", 16), "sdxl": ("SDXL", 70)}


def test_doctor_says_what_can_run_and_why_not(capsys):
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in report
    assert "no pipeline was given" in report
    for name, why in backends().items():
        assert f"{name}: {why or 'can run'}" in report
    if not torch.cuda.is_available():
        assert backends()["cuda"]


def test_doctor_says_what_is_attached(pipe):
    assert "adapters: none" in doctor(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        assert "interaction scene: none" in doctor(pipe)
        handle.set_scene([[RIDING], []], strength=0.5, schedule=(0.2, 0.3, 0.5), fast=True)
        report = doctor(pipe)
        assert "11 sites of width 16, 32), " in report
        assert "interaction scene: 2 scenes at strength 0.5, schedule [0.2, 0.3, 0.5], fast" in report
        handle["interaction"].set_tokens(torch.zeros(1, 9, 24))
        assert "interaction scene: tokens at strength 1" in doctor(pipe)
    assert "adapters: none" in doctor(pipe)


def test_doctor_loads_what_it_is_asked_about(capsys):
    assert main(["doctor", "--model", "stickworld"]) == 0
    report = capsys.readouterr().out
    for words in ("interaction adapter: 2.9 M parameters", "max_interactions 6", "structured True"):
        assert words in report
