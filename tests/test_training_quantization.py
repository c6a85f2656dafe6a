"""Frozen bases whose layers are kept in 8 or 4 bits."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import config_of, exported_world
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from interactdiff.errors import RecipeError
from interactdiff.training.config import checked
from interactdiff.training.frozen_bases import FrozenBase
from interactdiff.training.interaction import InteractionRecipe
from interactdiff.training.interaction_config import InteractionConfig
from interactdiff.training.plan import plan_of
from interactdiff.training.quantization import BYTES, check_quantization, quantize, quantized_layers
from interactdiff.training.run import load_config, make_recipe

CONFIGS = Path(__file__).parent.parent / "training/configs"
PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_world(tmp_path_factory.mktemp("pictures"))


class Block(nn.Module):
    """Linear layers inside blocks and outside, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(
            [nn.Linear(128, 256), nn.Sequential(nn.GELU(), nn.Linear(256, 64, False))]
        )
        self.kernels = nn.ModuleDict({"blocks": nn.Conv1d(64, 64, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedder(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("kind", "off"), [("int8", 0.02), ("fp8", 0.05), ("nf4", 0.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_blocks_compute_nearly_the_same_in_fewer_bits(
    kind: str, off: float, dtype: torch.dtype
) -> None:
    pytest.importorskip(PACKAGES[kind])
    torch.manual_seed(0)
    module = Block().to(dtype).requires_grad_(False)
    names = [name for _, name, _ in quantized_layers(module)]
    assert names == ["0", "1"]
    x = torch.randn(2, 9, 64, dtype=dtype, requires_grad=True)
    wanted, embedder = module(x), module.embedder
    (gradient,) = torch.autograd.grad(wanted.float().square().mean(), x)
    quantize(module, kind, CPU)
    assert module.embedder is embedder
    assert not any(p.requires_grad for p in module.parameters())
    saved: list[int] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        got = module(x)
    assert got.dtype == dtype
    assert 128 * 256 not in saved, "a widened weight is kept for the backward pass"
    (theirs,) = torch.autograd.grad(got.float().square().mean(), x)
    for one, other in ((got, wanted), (theirs, gradient)):
        far = ((one - other).float().norm() / other.float().norm()).item()
        assert 1e-4 < far < off


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("base", ["pipe", "flux_pipe"])
def test_an_adapter_is_trained_on_a_quantized_base(
    base: str, kind: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip(PACKAGES[kind])
    request.getfixturevalue(base).save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, gradient_checkpointing=True)
    whole = make_recipe(config).train()
    recipe: Any = make_recipe(config | {"base_quantization": kind, "output_dir": str(tmp_path / "less")})
    assert not [*quantized_layers(recipe.base.denoiser)]
    before = {name: t.detach().clone() for name, t in recipe.model.state_dict().items()}
    losses = recipe.train()
    assert losses == pytest.approx(whole, rel=0.1)
    assert losses != whole
    assert any(not torch.equal(before[name], t) for name, t in recipe.model.state_dict().items())
    assert (tmp_path / "less/samples/000004.png").is_file()
    assert f"float32 with layers in {kind}" in recipe.precision


def test_a_plan_counts_quantized_layers() -> None:
    parts = {}
    for kind in ("null", "int8", "nf4"):
        config = checked(
            InteractionConfig,
            load_config(CONFIGS / "flux_interaction.yaml", ["batch_size=1", f"base_quantization={kind}"]),
        )
        made = plan_of(config).parts
        (parts[kind],) = (value for name, value in made.items() if name.startswith("base, frozen"))
    assert parts["null"] == pytest.approx(2 * 11.9e9, rel=1e-3)
    assert 0.5 < parts["int8"] / parts["null"] < 0.51
    assert 0.26 < parts["nf4"] / parts["null"] < 0.28


@pytest.mark.parametrize("kind", BYTES)
def test_a_quantisation_without_its_package_is_one_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(
        RecipeError, match=f"base_quantization: expected the package {PACKAGES[kind]} for {kind}, got none"
    ):
        check_quantization(kind)


def test_layers_that_are_trained_are_not_quantized() -> None:
    with pytest.raises(RecipeError, match="base_quantization: expected none for layers that are trained"):
        load_config(CONFIGS / "flux_clear.yaml", ["base_quantization=int8"])
    with pytest.raises(RecipeError, match="base_quantization: expected none, int8, fp8 or nf4, got 'int9'"):
        load_config(CONFIGS / "smoke.yaml", ["base_quantization=int9"])


def test_the_largest_text_encoder_has_gone_when_the_denoiser_comes(
    flux_pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux_pipe.save_pretrained(tmp_path / "base")
    encoders: list[Any] = []
    drop, cache_more = FrozenBase.drop, InteractionRecipe.cache_more

    def dropping(base: FrozenBase, *names: str) -> None:
        encoders.extend(weakref.ref(base.encoders[name]) for name in names)
        drop(base, *names)

    def caching(recipe: InteractionRecipe, *args: Any) -> None:
        gc.collect()
        assert [one() for one in encoders] == [None]
        cache_more(recipe, *args)

    monkeypatch.setattr(FrozenBase, "drop", dropping)
    monkeypatch.setattr(InteractionRecipe, "cache_more", caching)
    make_recipe(config_of(tmp_path / "base", pictures, tmp_path))
    assert len(encoders) == 2
