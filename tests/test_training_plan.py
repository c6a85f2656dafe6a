"""The memory that a training takes, counted before anything is loaded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from interactdiff.cli import main
from interactdiff.errors import RecipeError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.sites import find_sites
from interactdiff.training.config import checked
from interactdiff.training.frozen_bases import frozen_base
from interactdiff.training.interaction_config import InteractionConfig
from interactdiff.training.memory import bare_pipeline, count_activations, counted_on_meta
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.plan import advice, plan_of, smaller
from interactdiff.training.run import load_config, plan

CONFIGS = Path(__file__).parent.parent / "training/configs"


def config_of(name: str, *changes: str) -> InteractionConfig:
    return checked(InteractionConfig, load_config(CONFIGS / f"{name}.yaml", list(changes)))


@pytest.mark.parametrize("fixture", ["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def test_what_is_counted_without_storage_is_what_is_kept(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipe: Any = request.getfixturevalue(fixture)
    pipe.save_pretrained(tmp_path)
    sizes: dict[str, Any] = {"max_interactions": 3, "hidden": 16}
    made = counted_on_meta(str(tmp_path), (32, 48), 2, torch.float32, None, sizes)
    encoders = [one for name, one in pipe.components.items() if name.startswith("text_encoder") and one]
    assert made.encoders == sum(p.numel() for one in encoders for p in one.parameters())
    base = frozen_base(pipe, LossConfig())
    adapter = InteractionAdapter.for_denoiser(base.denoiser, **sizes).train()
    assert made.adapter == sum(p.numel() for p in adapter.parameters())
    channels = bare_pipeline(str(tmp_path)).channels
    kept = count_activations(base, adapter, torch.zeros(2, channels, 16, 24))
    assert kept == made.activations
    assert 0 < kept.checkpointed < kept.kept
    assert not base.denoiser.is_gradient_checkpointing


def test_a_mask_is_counted_at_each_structured_fuser(pipe: Any) -> None:
    """[2, 1, L, L + 3N] float32, of a grid of 8 x 8 latents, halved at each level."""
    base, kept = frozen_base(pipe, LossConfig()), []
    for structured in (False, True):
        adapter = InteractionAdapter.for_unet(
            pipe.unet, max_interactions=3, hidden=16, structured=structured
        ).train()
        kept.append(count_activations(base, adapter, torch.zeros(2, 4, 8, 8)).kept)
    cells = [math.prod(site.grid(8, 8)) for site in find_sites(pipe.unet) if site.role == "self"]
    assert kept[1] - kept[0] == sum(2 * own * (own + 9) * 4 for own in cells)


@pytest.mark.parametrize(
    ("name", "base", "adapter", "gigabytes", "encoders"),
    [("sd15", 859.5, 211.0, 0.29, 0.123), ("sd35", 2243.2, 89.5, 0.72, 0.123 + 0.695 + 4.762)],
)
def test_published_bases_have_their_sizes(
    name: str, base: float, adapter: float, gigabytes: float, encoders: float
) -> None:
    config = config_of(f"{name}_interaction", "batch_size=1", "ema_decay=0")
    made = plan_of(config)
    assert f"{base:,.0f} M parameters; adapter: {adapter:,.1f} M" in made.about
    (activations,) = (value for key, value in made.parts.items() if key.startswith("activations"))
    assert activations / 1e9 == pytest.approx(1.15 * gigabytes, abs=0.03)
    # bf16 base; float32 adapter, gradients and two moments, and the copy that autocast makes
    weights = base * 2e-3 + adapter * (4 + 4 + 8 + 2) * 1e-3
    assert sum(made.parts.values()) / 1e9 == pytest.approx(weights + activations / 1e9, rel=1e-3)
    assert made.encoders / 1e9 == pytest.approx(2 * encoders, rel=1e-3)
    assert made.total == 1.0 + max(sum(made.parts.values()), made.encoders) / 1e9


def test_what_would_fit_is_named(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    config = config_of("smoke", "ema_decay=0.9", f"base={tmp_path}")
    assert advice(config, 80) == f"80 GB: fits, {80 - plan_of(config).total:.1f} GB to spare"
    least = list(smaller(config))
    totals = [plan_of(other).total for _, other in least]
    assert totals == sorted(totals, reverse=True)
    assert least[0][0] == "gradient_checkpointing=true"
    assert {other.batch_size * other.accumulate for _, other in least} == {8}
    said = advice(config, totals[3])
    assert said.endswith("--set gradient_checkpointing=true batch_size=1 accumulate=8")
    load_config(CONFIGS / "smoke.yaml", said.split("--set ")[1].split())
    assert advice(config, 1.0) == "1 GB: does not fit, whatever is set"


@pytest.mark.parametrize(
    ("name", "given", "left_out"),
    [
        ("hico_det_as_published", ["processes=2", "mixed_precision=fp16"], "shard"),
        ("sdxl_interaction", ["processes=2", "shard=true"], "optimizer"),
        ("sdxl_interaction", ["processes=2", "optimizer=prodigy"], "shard"),
    ],
)
def test_what_the_recipe_refuses_is_not_advised(name: str, given: list[str], left_out: str) -> None:
    found = list(smaller(config_of(name, *given)))
    assert f" {left_out}=" not in f" {found[-1][0]}"
    assert "base_quantization=nf4" in found[-1][0]
    for words, other in found:
        assert config_of(name, *given, *words.split()) == other


def test_sharing_weights_out_takes_less(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    options = ["gradient_checkpointing=true", f"base={tmp_path}", "processes=4", "ema_decay=0.9"]
    whole, shared = (plan_of(config_of("smoke", *options, f"shard={shard}")) for shard in ("no", "yes"))
    (adapter,) = (parts for name, parts in whole.parts.items() if name == "adapter, float32")
    # moments and average go to a quarter, and a quarter of the weights comes beside them
    assert (whole.total - shared.total) * 1e9 == pytest.approx(adapter * (0.75 * (2 + 1) - 0.25))
    assert next(smaller(config_of("smoke", *options)))[0] == "shard=true"


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(CONFIGS / "smoke.yaml")
    assert main(["train", file, "--plan", "24", "--set", f"output_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "24 GB: fits" in said
    assert "activations of 8 x 96 px, all kept" in said
    assert not (tmp_path / "run").exists()
    assert main(["train", file, "--plan", "-3"]) == 2
    with pytest.raises(RecipeError, match="expected the recipe interaction, got vae"):
        plan(CONFIGS / "stickworld_vae.yaml", [])
    with pytest.raises(RecipeError, match="expected the configuration files of a pipeline at nobody/nothing"):
        plan(file, ["base=nobody/nothing"])
