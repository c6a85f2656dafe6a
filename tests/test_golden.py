"""Golden vectors: what the reference implementation computed, for every file in the folder $GOLDEN_DIR.

A file's kind is known by its tensors and every size is read from it, so files of other sizes run unchanged.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from safetensors import safe_open
from torch import Tensor

from interactdiff.adapter import Host
from interactdiff.clear import ClearAdapter, ClearBinding, ClearConfig
from interactdiff.clear.adapter import SPATIAL_WEIGHT
from interactdiff.clear.binding import WindowSite
from interactdiff.clear.flex import can_run_flex
from interactdiff.families import FAMILIES
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.fuser import GatedSelfAttention
from interactdiff.interaction.ldm import adapter_tensors_from_ldm, unet_from_ldm
from interactdiff.interaction.tokens import InteractionTokenizer
from interactdiff.processors import keys_processor
from interactdiff.sites import Site

BACKENDS = ["auto", "reference", "tiles", "flex"]
FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


class Golden:
    """One file, its tensors by the first part of their names: in, out, state."""

    def __init__(self, file: Path):
        with safe_open(file, "pt") as opened:
            self.metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.tensors = tensors
        self.inputs, self.outputs, self.state = (
            {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
            for part in ("in.", "out.", "state.")
        )

    @property
    def kind(self) -> str | None:
        """Which of the four this is; None for vectors of other methods."""
        if any(name.startswith("time_embed.") for name in self.state):
            return "ldm_unet"
        if any(name.endswith("null_position_feature") for name in self.state):
            return "hoi_tokens"
        if "cases" in self.metadata:
            return "clear_attention"
        return "gated_self_attention" if "alpha_attn" in self.state else None

    def scaled_outputs(self, name: str) -> dict[float, Tensor]:
        """The outputs by their scale: `eps` (1) and `eps_scale_0`, or `scale_1` and `scale_0.35`."""
        cut = {key.removeprefix(name): value for key, value in self.outputs.items() if key.startswith(name)}
        return {float(key.removeprefix("_scale").removeprefix("_") or 1): value for key, value in cut.items()}


def files(kind: str) -> list[Path]:
    return [file for file in sorted(FOLDER.glob("*.safetensors")) if Golden(file).kind == kind]


def golden_cases(kind: str) -> pytest.MarkDecorator:
    found = [pytest.param(Golden(file), id=file.stem) for file in files(kind)]
    none = pytest.param(None, marks=pytest.mark.skip(f"no vectors of {kind} in {FOLDER}"), id=kind)
    return pytest.mark.parametrize("golden", found or [none])


def off_by(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


def tokenizer_of(state: dict[str, Tensor]) -> InteractionTokenizer:
    state = {name.removeprefix("position_net."): tensor for name, tensor in state.items()}
    tokenizer = InteractionTokenizer(**InteractionTokenizer.sizes_of(state))
    tokenizer.load_state_dict(state)
    return tokenizer


def clear_cases() -> list[Any]:
    return [
        pytest.param(golden, name, case, id=f"{file.stem}-{name}")
        for file in files("clear_attention")
        for golden in [Golden(file)]
        for name, case in json.loads(golden.metadata["cases"]).items()
    ]


def test_the_folder_has_vectors():
    assert any(Golden(file).kind for file in FOLDER.glob("*.safetensors"))


@golden_cases("hoi_tokens")
@torch.no_grad()
def test_tokens(golden: Golden):
    tokens = tokenizer_of(golden.state)(**golden.inputs)
    assert off_by(tokens, golden.outputs["tokens"]) < 1e-4


@golden_cases("gated_self_attention")
@torch.no_grad()
def test_fuser(golden: Golden):
    dim, token_dim = golden.state["linear.weight"].shape
    fuser = GatedSelfAttention(dim, token_dim, int(golden.metadata["heads"]))
    fuser.load_state_dict(golden.state)
    x, outputs = golden.inputs["x"], golden.scaled_outputs("scale")
    for scale, expected in outputs.items():
        assert off_by(fuser(x, golden.inputs["objs"], scale), expected) < 1e-4


@golden_cases("ldm_unet")
@torch.no_grad()
def test_whole_unet_through_the_converter(golden: Golden):
    params = json.loads(golden.metadata["config"])
    unet = unet_from_ldm(golden.state, params)
    tensors = adapter_tensors_from_ldm(golden.state, params["num_res_blocks"])
    adapter = InteractionAdapter.from_published(tensors, unet)
    scene = dict(golden.inputs)
    x, timesteps, context = (scene.pop(name) for name in ("x", "timesteps", "context"))
    with attach(unet, adapter) as handle:
        for scale, expected in golden.scaled_outputs("eps").items():
            handle["interaction"].set_tokens(adapter(**scene), strength=scale)
            assert off_by(unet(x, timesteps, context).sample, expected) < 1e-3, f"scale {scale}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("golden", "name", "case"), clear_cases())
@torch.no_grad()
def test_clear_attention(golden: Golden, name: str, case: dict[str, int], backend: str):
    inputs, outputs, state = (
        {
            key.removeprefix(f"{name}.{part}."): t
            for key, t in golden.tensors.items()
            if key.startswith(f"{name}.{part}.")
        }
        for part in ("in", "out", "state")
    )
    if backend == "flex" and (why_not := can_run_flex(torch.device("cpu"), torch.float32)):
        pytest.skip(why_not)
    layer = flux_attention(state, case)
    pooling = {f"attn.{SPATIAL_WEIGHT}": state["spatial_weight"]} if "spatial_weight" in state else {}
    adapter = ClearAdapter(ClearConfig(case["window_size"], case["down_factor"]), pooling)
    layer.processor = keys_processor(site := Site("attn", layer, "joint", kind=FAMILIES[0].sites[0]))
    binding = ClearBinding(adapter, Host(layer, (site,), None))  # type: ignore[arg-type]
    binding.configure(backend=backend, proportional="proportional" in name)
    window = WindowSite(site, binding)
    window.grid, window.backend = (case["height"], case["width"]), backend
    layer.processor.own, layer.processor.text_length = window.edits[0].fn, case["text_length"]  # type: ignore[union-attr]
    tables = inputs.pop("rope_cos"), inputs.pop("rope_sin")
    got = layer(**inputs, image_rotary_emb=tables)
    got = got if isinstance(got, tuple) else (got,)
    for states, expected in zip(got, ("hidden_states", "encoder_hidden_states"), strict=False):
        assert off_by(states, outputs[expected]) < 1e-4


def flux_attention(state: dict[str, Tensor], case: dict[str, int]) -> FluxAttention:
    """A joint block's attention, or a single block's."""
    width = case["heads"] * case["head_dim"]
    kind: dict[str, Any] = {"pre_only": True}
    if "add_q_proj.weight" in state:
        kind = {"added_kv_proj_dim": width, "context_pre_only": False}
    layer = FluxAttention(
        width, heads=case["heads"], dim_head=case["head_dim"], out_dim=width, bias=True, eps=1e-6, **kind
    )
    layer.load_state_dict({key: tensor for key, tensor in state.items() if key != "spatial_weight"})
    return layer
