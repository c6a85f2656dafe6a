"""An adapter for Flux and SD3: its file, its base, its sites and its gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RIDING, trained_adapter
from tiny_dit import (
    draw,
    flux_inputs,
    sd3_inputs,
    tiny_flux,
    tiny_sd3,
    trained_joint_adapter,
)

from interactdiff import AdapterError, InteractionAdapter, SceneError, attach
from interactdiff.sites import Base, joint_sites


def test_saved_and_loaded(dit_pipe: Any, tmp_path: Path) -> None:
    adapter = trained_joint_adapter(dit_pipe.transformer, structured=True, action_region="union")
    adapter.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    again = InteractionAdapter.from_pretrained(tmp_path)
    assert again.config == adapter.config
    drawn = []
    for one in (adapter, again):
        with attach(dit_pipe, one) as handle:
            handle.set_scene([RIDING])
            drawn.append(draw(dit_pipe))
    assert torch.equal(*drawn)


def test_wrong_bases_are_named_in_words(flux_pipe: Any, sd3_pipe: Any, pipe: Any) -> None:
    of_flux = trained_joint_adapter(flux_pipe.transformer)
    flux = r"Flux \(text width 12, 3 sites of width 32\)"
    with pytest.raises(
        AdapterError, match=rf"made for, {flux}, got SD3 \(text width 32, 2 sites of width 16"
    ):
        attach(sd3_pipe, of_flux)
    with pytest.raises(AdapterError, match=rf"made for, {flux}, got a U-Net of no published kind"):
        attach(pipe, of_flux)
    with pytest.raises(AdapterError, match=rf"made for, a U-Net .*, got {flux}"):
        attach(flux_pipe, trained_adapter(pipe.unet))
    deeper = tiny_flux(num_single_layers=3)
    with pytest.raises(AdapterError, match=rf"{flux}, got Flux \(text width 12, 4 sites"):
        attach(deeper, of_flux)


def test_the_configuration_is_checked(flux_pipe: Any, tmp_path: Path) -> None:
    trained_joint_adapter(flux_pipe.transformer).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for old, new in (('"parts": 2', '"parts": 0'), ('"union"', '"beside"'), ('"joint"', '"other"')):
        config.write_text(text.replace(old, new))
        with pytest.raises(AdapterError, match="expected the sizes of an adapter in its configuration"):
            InteractionAdapter.from_pretrained(tmp_path)


def test_the_region_of_an_action_is_the_adapters_unless_it_says(flux_pipe: Any) -> None:
    features = {phrase: torch.zeros(16) for phrase in ("person", "riding", "bike")}
    asked = [[RIDING], [replace(RIDING, action_region="between")], [replace(RIDING, action_region="union")]]
    for region, first in (
        ("between", RIDING.action_box_in("between")),
        ("union", RIDING.action_box_in("union")),
    ):
        adapter = trained_joint_adapter(flux_pipe.transformer, action_region=region)
        boxes = adapter.scene_tensors(asked, features)["action_boxes"][:, 0]
        expected = [first, RIDING.action_box_in("between"), RIDING.action_box_in("union")]
        assert torch.equal(boxes, torch.tensor(expected))


def test_gradients_reach_the_adapter_alone(dit_pipe: Any) -> None:
    transformer = dit_pipe.transformer.requires_grad_(False)
    adapter = trained_joint_adapter(transformer).train()
    width = adapter.config.feature_dim
    features = {phrase: torch.randn(width) for phrase in ("person", "riding", "bike")}
    with attach(transformer, adapter) as handle:
        handle["interaction"].set_tokens(adapter(**adapter.scene_tensors([[RIDING], []], features)))
        inputs = flux_inputs() if isinstance(transformer, type(tiny_flux())) else sd3_inputs()
        transformer(**inputs).sample.square().mean().backward()
        with pytest.raises(SceneError, match="expected tokens for 1 batch rows, got 2"):
            transformer(**{name: t[:1] if "ids" not in name else t for name, t in inputs.items()})
        with pytest.raises(SceneError, match="expected SceneTokens of width 8, got Tensor"):
            handle["interaction"].set_tokens(torch.zeros(2, 3, 8))
    unused = {"null_action_feature", "null_positive_feature", "null_position_feature"}
    silent = {n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.split(".")[-1] for name in silent} <= unused
    assert all(p.grad is None for p in transformer.parameters())


def test_sites_of_every_kind_of_attention() -> None:
    assert [(site.dim, site.heads, site.out is None) for site in joint_sites(tiny_flux())] == [
        (32, 2, False),
        (32, 2, True),
        (32, 2, True),
    ]
    plain = tiny_sd3(qk_norm=None, dual_attention_layers=())
    assert [site.query for site in joint_sites(plain)] == [b.attn.to_q for b in plain.transformer_blocks]
    assert Base.of(plain).sites == {f"transformer_blocks.{n}.attn": (16, 2) for n in range(2)}
    assert str(Base.of(plain)) == "SD3 (text width 32, 2 sites of width 16)"


def test_queries_are_read_the_same_normalised_or_not() -> None:
    """SD3's first models do not normalise: their queries come from the projection."""
    normalised, plain = tiny_sd3(), tiny_sd3(qk_norm=None)
    sites = [joint_sites(one)[0] for one in (normalised, plain)]
    by_head = torch.randn(1, 2, 5, 8)
    flat = by_head.transpose(1, 2).flatten(2)
    assert torch.equal(sites[0].by_head(by_head), sites[1].by_head(flat))
