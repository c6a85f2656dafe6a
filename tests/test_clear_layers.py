"""Layers trained for windows: how they are saved, loaded, checked and put in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_dit import draw, tiny_flux, trained_layers

from interactdiff import AdapterError, attach
from interactdiff.clear import ClearAdapter, ClearConfig, linearize
from interactdiff.clear.adapter import SPATIAL_WEIGHT, expected_tensors
from interactdiff.handle import attached_bindings


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
            handle["clear"].configure(min_tokens=0)
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
            assert handle["clear"].adapter.config == ClearConfig(window, factor)
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
    assert not attached_bindings(flux_pipe.transformer)


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


def test_a_fused_lora_would_be_lost_and_is_refused(flux_pipe: Any) -> None:
    transformer = flux_pipe.transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = trained_layers(tiny_flux(), ClearConfig(2))
    transformer.fuse_lora()
    with pytest.raises(AdapterError, match=r"a fused one at transformer_blocks\.0\.attn: unfuse it"):
        linearize(flux_pipe, weights=layers)
    linearize(flux_pipe, window=2).detach()  # the base's own layers keep it
    transformer.unfuse_lora()
    linearize(flux_pipe, weights=layers).detach()


def test_expected_tensors_are_those_that_were_published(flux_pipe: Any, sd3_pipe: Any) -> None:
    names = expected_tensors(flux_pipe.transformer, ClearConfig(8)).keys()
    joint = {f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    single = {f"single_transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_k", "to_v")}
    assert names == {f"{path}.{leaf}" for path in joint | single for leaf in ("weight", "bias")}
    assert "transformer_blocks.0.attn2.to_q.weight" in expected_tensors(sd3_pipe.transformer, ClearConfig(8))
