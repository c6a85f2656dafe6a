"""Published weights: every container becomes the same adapter, and only the adapter is read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import as_gligen, sd15_checkpoint, under_ldm_names, write_unet_folder
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny import trained_adapter
from torch import Tensor

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.published import base_of, find_adapter
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.sites import Base
from interactdiff.sources import Source

Tensors = dict[str, Tensor]
NAME = "diffusion_pytorch_model"


@pytest.fixture
def adapter(unet) -> InteractionAdapter:
    """Acts, and has no more than what is published has."""
    return trained_adapter(unet, grid_positions=False)


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check_same(again: InteractionAdapter, adapter: InteractionAdapter) -> None:
    assert again.config == adapter.config
    assert not again.training
    expected = adapter.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# --- what the names look like ---

PREFIXES = [
    "",
    "module.",
    "model.",
    "unet.",
    "ema.",
    "state_dict.",
    "model.module.",
    "module.model.",
    "ema.module.",
    "model.diffusion_model.",
    "state_dict.model.diffusion_model.",
    "unet.module.model.",
]


@pytest.mark.parametrize("names", ["LDM's", "diffusers'"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_and_both_ways_to_name(unet, adapter, tmp_path, prefix, names):
    tensors = adapter.state_dict()
    tensors = under_ldm_names(tensors, 1) if names == "LDM's" else tensors
    torch.save(prefixed({**tensors, "out.0.weight": torch.zeros(1)}, prefix), tmp_path / "weights.pth")
    check_same(InteractionAdapter.from_pretrained(tmp_path / "weights.pth", unet=unet), adapter)


def test_the_original_checkpoint(unet, adapter, tmp_path):
    """Container A, with all that is in it; of the model and its moving average, the model."""
    tensors = under_ldm_names(adapter.state_dict(), 1)
    content = {
        "model": {"input_blocks.0.0.weight": torch.zeros(4), **tensors},
        "ema": {name: tensor + 1 for name, tensor in tensors.items()},
        "autoencoder": {"encoder.mid.block_1.norm1.weight": torch.zeros(4)},
        "text_encoder": {"transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4)},
        "diffusion": {"betas": torch.zeros(4)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 5e-5}]},
        "iters": 500_000,
    }
    torch.save(content, tmp_path / "interact-diffusion-v1-2.pth")
    check_same(InteractionAdapter.from_pretrained(tmp_path, unet=unet), adapter)
    del content["model"]
    torch.save(content, tmp_path / "interact-diffusion-v1-2.pth")
    again = InteractionAdapter.from_pretrained(tmp_path, unet=unet)
    name = "position_net.null_action_feature"
    assert torch.equal(again.state_dict()[name], adapter.state_dict()[name] + 1)


def test_two_adapters_in_one_file_are_refused(unet, adapter, tmp_path):
    tensors = adapter.state_dict()
    torch.save({"model": tensors, "unet": dict(tensors)}, tmp_path / "both.pth")
    with pytest.raises(
        AdapterError, match=r"one adapter among .*, got one below each of \['model\.', 'unet\.'\]"
    ):
        InteractionAdapter.from_pretrained(tmp_path / "both.pth", unet=unet)


# --- which file ---


@pytest.mark.parametrize("inside", ["", "unet", f"unet/{NAME}.safetensors"])
def test_hub_folders(unet, adapter, tmp_path, inside):
    write_unet_folder(tmp_path / "unet", unet, adapter)
    check_same(InteractionAdapter.from_pretrained(tmp_path / inside), adapter)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_hub_folders(unet, adapter, tmp_path, safe, variant):
    options = {"max_shard_size": "20KB", "safe_serialization": safe, "variant": variant}
    write_unet_folder(tmp_path / "unet", unet, adapter, **options)
    assert len(list((tmp_path / "unet").glob("*-of-*"))) > 5
    check_same(InteractionAdapter.from_pretrained(tmp_path), adapter)


def test_of_several_copies_the_one_that_fits_best(unet, adapter, tmp_path):
    def null(dtype: torch.dtype | None = None) -> tuple[float, torch.dtype]:
        again = InteractionAdapter.from_pretrained(tmp_path, dtype=dtype).position_net.null_action_feature
        return again[0].item(), again.dtype

    def write(value: float, **options: Any) -> None:
        adapter.position_net.null_action_feature.data.fill_(value)
        write_unet_folder(tmp_path / "unet", unet, adapter, **options)

    write(1.0, variant="fp16", safe_serialization=False)
    assert null() == (1.0, torch.float32)
    write(2.0, safe_serialization=False)
    assert null() == (2.0, torch.float32)
    assert null(torch.float16) == (1.0, torch.float16)
    write(3.0)
    assert null() == (3.0, torch.float32)
    assert null(torch.bfloat16) == (3.0, torch.bfloat16)
    write(4.0, variant="fp16")
    assert null(torch.float16) == (4.0, torch.float16)


def test_several_files_have_to_be_told_apart(unet, adapter, tmp_path):
    torch.save(adapter.state_dict(), tmp_path / "v1-2.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "v1-0.pth")
    with pytest.raises(
        AdapterError, match=r"^expected weight_name to say .*, got several: v1-0\.pth, v1-2\.pth$"
    ):
        InteractionAdapter.from_pretrained(tmp_path, unet=unet)
    check_same(InteractionAdapter.from_pretrained(tmp_path, weight_name="v1-2.pth", unet=unet), adapter)
    with pytest.raises(AdapterError, match=r"^expected v1-3\.pth in .*, got v1-0\.pth, v1-2\.pth$"):
        InteractionAdapter.from_pretrained(tmp_path, weight_name="v1-3.pth", unet=unet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"^expected weights in .*, got no file of them$"):
        InteractionAdapter.from_pretrained(tmp_path / "empty")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "unet" / f"{NAME}.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["weight_map"].update(a="missing.safetensors"), "got no 'missing.safetensors'"),
        (lambda c: c["weight_map"].update(a="../../secret.safetensors"), "got no '../../secret.safetensors'"),
        (lambda c: c["weight_map"].update(a="/etc/passwd"), "got no '/etc/passwd'"),
        (lambda c: c["weight_map"].update(a=3), "expected a weight_map from tensors to files"),
        (lambda c: c.pop("weight_map"), "expected a weight_map from tensors to files"),
    ],
)
def test_an_index_that_leads_nowhere(unet, adapter, tmp_path, change, message):
    folder = tmp_path / "folder"
    write_unet_folder(folder / "unet", unet, adapter, max_shard_size="20KB")
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    edit_index(folder, change)
    with pytest.raises(AdapterError) as raised:
        InteractionAdapter.from_pretrained(folder)
    assert message in str(raised.value)


def test_a_repository_that_is_in_the_cache(unet, adapter, tmp_path):
    """What the Hub's own cache looks like; no network."""
    repository = tmp_path / "models--someone--interactdiffusion"
    snapshot = repository / "snapshots" / ("0" * 40)
    write_unet_folder(snapshot / "unet", unet, adapter, max_shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    source = Source.of("someone/interactdiffusion", cache_dir=tmp_path, local_files_only=True)
    assert source.where == "someone/interactdiffusion"
    assert source.json("unet/config.json") is not None
    assert f"unet/{NAME}.safetensors.index.json" in source.names
    assert source.fetch("unet/config.json") == snapshot / "unet" / "config.json"
    with pytest.raises(
        AdapterError, match=r"got 'someone/interactdiffusion' \(LocalEntryNotFound.* for a\.bin\)"
    ):
        source.fetch("a.bin")


def test_our_own_files_in_another_dtype_and_for_another_base(unet, adapter, tmp_path):
    trained_adapter(unet).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        again = InteractionAdapter.from_pretrained(path, unet=unet, dtype=torch.bfloat16)
        assert again.config.grid_positions
        assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    with torch.device("meta"):
        sd = UNet2DConditionModel(cross_attention_dim=768)
    with pytest.raises(AdapterError, match=r"width 24, 11 sites .*, got SD 1\.x"):
        InteractionAdapter.from_pretrained(tmp_path, unet=sd)


# --- GLIGEN ---


@pytest.mark.parametrize("ldm", [True, False])
def test_gligen_is_a_start(unet, adapter, tmp_path, ldm):
    tensors = as_gligen(adapter.state_dict())
    assert len(tensors) == len(adapter.state_dict()) - 9
    torch.save({"model": under_ldm_names(tensors, 1) if ldm else tensors}, tmp_path / f"{NAME}.bin")
    again = InteractionAdapter.from_pretrained(tmp_path, unet=unet).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        if "linears" in name:
            action = again[name.replace("linears", "linear_action")]
            assert torch.equal(action, tensor)
            assert action.data_ptr() != again[name].data_ptr()
    assert torch.equal(
        again["position_net.null_action_feature"], tensors["position_net.null_positive_feature"]
    )
    slots, roles = (again[f"position_net.{n}_embedding.emb.weight"] for n in ("interaction", "position"))
    assert (slots.shape, roles.shape) == ((30, 24), (3, 24))
    assert slots.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(slots[:3], roles)
    twice = InteractionAdapter.from_pretrained(tmp_path, unet=unet).state_dict()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in again.items())


def test_other_kinds_of_gligen_say_so(unet, adapter):
    tensors = as_gligen(adapter.state_dict())
    both = {name.replace("linears", "linears_text"): tensor for name, tensor in tensors.items()}
    with pytest.raises(AdapterError, match="got GLIGEN's for text and images"):
        InteractionAdapter.from_published(both, unet)
    keypoints = {name.replace("linears", "person_embeddings"): tensor for name, tensor in tensors.items()}
    with pytest.raises(AdapterError, match="position_net, got one of null_position_feature, null_pos"):
        InteractionAdapter.from_published(keypoints, unet)


# --- which base ---


def lazy(adapter: InteractionAdapter) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in adapter.state_dict().items()}


def a_unet(**config: Any) -> UNet2DConditionModel:
    make: Any = UNet2DConditionModel
    with torch.device("meta"):
        return make(**config)


SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
PUBLISHED = {
    "SD 1.x": {"cross_attention_dim": 768},
    "SD 2.x": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    "SDXL": SDXL,
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_heads_of_published_bases_are_known(kind):
    unet = a_unet(**PUBLISHED[kind])
    with torch.device("meta"):
        adapter = InteractionAdapter.for_unet(unet)
    base = base_of(lazy(adapter))
    assert base == Base.of(unet)
    assert str(base).startswith(kind)
    if kind == "SD 1.x":
        ldm = under_ldm_names(adapter.state_dict(), 2)
        found = find_adapter({name: LazyTensor.of(tensor) for name, tensor in ldm.items()})
        assert base_of(found.tensors) == base
    if kind == "SDXL":
        gligen = {name: LazyTensor.of(tensor) for name, tensor in as_gligen(adapter.state_dict()).items()}
        slots = find_adapter(gligen).tensors["position_net.interaction_embedding.emb.weight"]
        assert slots.shape == (32, 2048)


def test_the_heads_of_other_bases_have_to_be_told(unet, adapter, tmp_path):
    torch.save(adapter.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        AdapterError, match=r"^expected unet= or .* heads, got weights alone, for a U-Net of no .* 24"
    ):
        InteractionAdapter.from_pretrained(tmp_path)
    unet.save_config(tmp_path)
    check_same(InteractionAdapter.from_pretrained(tmp_path), adapter)
    a_unet(cross_attention_dim=768).save_config(tmp_path)  # another U-Net's does not help
    with pytest.raises(AdapterError, match="expected unet= or "):
        InteractionAdapter.from_pretrained(tmp_path)


def test_the_wrong_base_names_both(tmp_path):
    with torch.device("meta"):
        adapter = InteractionAdapter.for_unet(a_unet(**SDXL))
    with torch.serialization.skip_data():
        torch.save({n: torch.empty(t.shape) for n, t in adapter.state_dict().items()}, tmp_path / "xl.pth")
    with pytest.raises(
        AdapterError,
        match=r"^expected the base .*, SDXL \(cross-attention width 2048, 70 sites of width 640, 1280\), "
        r"got SD 1\.x \(cross-attention width 768, 16 sites of width 320, 640, 1280\)$",
    ):
        InteractionAdapter.from_pretrained(tmp_path / "xl.pth", unet=a_unet(cross_attention_dim=768))


# --- weights that are none ---


def test_other_weights_say_what_they_are_not(unet, adapter, tmp_path):
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(AdapterError, match=r"none named position_net or fuser among \d+ tensors such as "):
        InteractionAdapter.from_pretrained(tmp_path, unet=unet)
    tensors = adapter.state_dict()
    fusers = {name: tensor for name, tensor in tensors.items() if "fuser" in name}
    with pytest.raises(
        AdapterError, match="expected InteractDiffusion's or GLIGEN's position_net, got one of noth"
    ):
        InteractionAdapter.from_published(fusers, unet)
    tokenizer = {name: tensor for name, tensor in tensors.items() if "fuser" not in name}
    with pytest.raises(AdapterError, match="expected fusers among the weights, got 0 of them"):
        InteractionAdapter.from_published(tokenizer, unet)
    name = "position_net.interaction_embedding.emb.weight"
    with pytest.raises(AdapterError, match="expected InteractDiffusion's weights, got some of other shapes"):
        InteractionAdapter.from_published({**tensors, name: torch.zeros(3)}, unet)
    del tensors[name]
    with pytest.raises(
        AdapterError, match="expected InteractDiffusion's weights, got none named 'interaction_emb"
    ):
        InteractionAdapter.from_published(tensors, unet)


def test_few_bytes_do_not_fill_the_memory(unet, adapter, tmp_path):
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in adapter.state_dict().items()}
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(
        AdapterError, match=r"^expected tensors of at most the \d+ bytes of .*, got \d+ bytes$"
    ):
        InteractionAdapter.from_pretrained(tmp_path, unet=unet)


# --- memory ---

LOAD = """
import sys, torch
from pathlib import Path
from interactdiff.interaction.adapter import InteractionAdapter
adapter = InteractionAdapter.from_pretrained(sys.argv[1], dtype=torch.float16)
size = sum(tensor.nbytes for tensor in adapter.state_dict().values())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(size, int(status["VmHWM"].split()[0]) * 1024)  # resource's peak begins with that of the parent process
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_of_five_gigabytes_only_the_adapter_is_read(tmp_path):
    """Container A of true shapes; holes in the file stand for the values, so that it takes no disk."""
    file = tmp_path / "interact-diffusion-v1-2.pth"
    try:
        with torch.serialization.skip_data():
            torch.save(sd15_checkpoint(), file)
        assert file.stat().st_size > 5.1e9
        # glibc moves its limit between heap and mappings as it goes, which leaves gaps by chance.
        fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        command = [sys.executable, "-c", LOAD, str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=fixed)
        size, peak = map(int, run.stdout.split())
        assert size == pytest.approx(420.5e6, rel=1e-3)
        assert peak <= size + 600e6
    finally:
        file.unlink()
