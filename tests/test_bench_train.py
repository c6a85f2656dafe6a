"""The benchmark of training, at tiny sizes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from interactdiff.cli import main
from interactdiff.training import bench, memory
from interactdiff.training.bench import TrainBench, TrainingBase, start_seconds
from interactdiff.training.objectives import Diffusion
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.published_shapes import Shapes

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNET = {
    "cross_attention_dim": 16, "attention_head_dim": 2, "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
TINY = TrainingBase("tiny", 64, 3, [TEXT], (32, 32, 32, 32))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.PUBLISHED, "tiny", Shapes(UNet2DConditionModel, UNET))
    monkeypatch.setitem(bench.BASES, "sd15", TINY)
    monkeypatch.setattr(bench, "LOADED", 4)
    monkeypatch.setattr(bench, "LOADER_SECONDS", 0.1)


def test_a_step_trains_the_adapter_alone(tmp_path: Path) -> None:
    made = TrainBench(TINY, 64, 2, CPU, torch.float32)
    source = bench.synthesised(tmp_path / "pictures", 4, 64)
    batches = made.loading(tmp_path / "cache", source, 0).batches(made.base.objective)
    batch = next(batches)
    assert batch["latents"].shape == (2, 4, 8, 8)
    frozen = [p.clone() for p in made.base.denoiser.parameters()]
    before = [p.clone() for p in made.adapter.parameters()]
    losses = [made.step(batch).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, made.base.denoiser.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(before, made.adapter.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_a_start_on_caches_is_faster() -> None:
    objective = Diffusion({"prediction_type": "epsilon"}, LossConfig())
    seconds = start_seconds(600, objective)
    assert 0 < seconds["cached"] < 0.5 * seconds["first"]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = ["--rounds", "1", "--workers", "0", "--pictures", "20", "--device", "cpu", "--json", str(file)]
    words += ["--resolution", "128", "--batch-size", "4"]
    assert main(["bench", "train", "--base", "sd15", *words]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    kept, checkpointed = row["ways"]["kept"], row["ways"]["checkpointed"]
    assert kept["peak_mb"] > checkpointed["peak_mb"] > 0
    for one in (kept, checkpointed):
        assert one["examples_per_s"] == pytest.approx(4 / (one["step_s"] + one["wait_s"]))
        assert 0 < one["waiting"] < 1
    assert 0 < row["waiting_without_caches"] < 1
    fastest = min(kept["step_s"], checkpointed["step_s"])
    assert row["loader_over_step"] == pytest.approx(row["loader_per_s"] * fastest / 4)
    assert f"{row['loader_per_s']:.0f} examples/s" in printed
    assert "20 pictures to the first batch" in printed
