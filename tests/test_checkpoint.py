"""Files: what is saved comes back; what is damaged, or made for another base, says so."""

import json
import os
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import trained_adapter

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.lazy_tensors import safetensors_tensors
from interactdiff.sites import Base

# --- our own format ---


@pytest.mark.parametrize("grid_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_adapter_comes_back(unet, tmp_path, grid_positions, dtype):
    adapter = trained_adapter(unet, grid_positions).to(dtype)
    adapter.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["adapter.safetensors", "config.json"]
    again = InteractionAdapter.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == adapter.config
    assert not again.training
    tensors = adapter.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name]), name
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_names_are_the_published_ones(unet):
    names = set(trained_adapter(unet, grid_positions=False).state_dict())
    tokenizer = {name for name in names if name.startswith("position_net.")}
    assert len(tokenizer) == 17
    assert len(names - tokenizer) == 17 * 11
    assert {"position_net.linears.4.bias", "position_net.interaction_embedding.emb.weight"} < tokenizer
    assert "mid_block.attentions.0.transformer_blocks.1.fuser.attn.to_out.0.bias" in names


def test_saving_over_an_adapter_replaces_it(unet, tmp_path):
    adapter = trained_adapter(unet)
    adapter.save_pretrained(tmp_path)
    adapter.position_net.null_action_feature.data.fill_(9.0)
    adapter.save_pretrained(tmp_path)
    again = InteractionAdapter.from_pretrained(tmp_path)
    assert again.position_net.null_action_feature.eq(9.0).all()


def remove_all(folder) -> None:
    shutil.rmtree(folder)


def forget_config(folder) -> None:
    (folder / "config.json").unlink()


def lock_config(folder) -> None:
    forget_config(folder)
    (folder / "config.json").mkdir()


def forget_weights(folder) -> None:
    (folder / "adapter.safetensors").unlink()


def truncate(folder) -> None:
    data = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(data[: len(data) // 2])


def scribble(folder) -> None:
    (folder / "adapter.safetensors").write_bytes(b"not safetensors, but long enough to have a header")


def pickle(folder) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "adapter.safetensors")


def garble(folder) -> None:
    (folder / "config.json").write_text('{"method": "interaction",')


def edit_config(**changes):
    def edit(folder) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


BAD_PATH = {"cross_attention_dim": 24, "sites": {"mid..x": [16, 2]}}
TAKEN_PATH = {"cross_attention_dim": 24, "sites": {"mid.forward": [16, 2]}}


def drop_a_tensor(folder) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors.pop("position_net.null_action_feature")
    save_file(tensors, folder / "adapter.safetensors")


def make_whole_numbers(folder) -> None:
    tensors = {name: tensor.int() for name, tensor in load_file(folder / "adapter.safetensors").items()}
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (make_whole_numbers, r"expected the adapter's .* in floating point, got torch\.int32"),
        (remove_all, r"expected an adapter's folder or the id of one on .*, got '.*adapter'"),
        (
            forget_config,
            r"expected config\.json and adapter\.safetensors in .*, got no config\.json",
        ),
        (lock_config, r"expected config\.json and adapter\.safetensors in .*, got no config\.json"),
        (forget_weights, r"expected safetensors weights at .*adapter\.safetensors, got no such file"),
        (truncate, r"expected a whole safetensors file at .*adapter\.safetensors, got"),
        (scribble, r"expected a whole safetensors file at .*adapter\.safetensors, got"),
        (pickle, r"expected a whole safetensors file at .*adapter\.safetensors, got"),
        (garble, r"expected JSON in .*config\.json, got .*line 1 column 26"),
        (edit_config(method="subject"), r"method and version .*interaction.* got .*subject"),
        (edit_config(version=2), r"method and version .* got \('interaction', 2\)"),
        (edit_config(hidden=None), r"expected the sizes of an adapter in its .*, got ValueError: None where"),
        (edit_config(base={}), r"expected the sizes of an adapter in its .*, got KeyError: 'sites'"),
        (edit_config(hidden=-1), r"expected the sizes of an adapter in its .*, got ValueError: -1 where"),
        (
            edit_config(base=BAD_PATH),
            r"expected the sizes of an adapter in its .*, got ValueError: 'mid\.\.x'",
        ),
        (
            edit_config(base=TAKEN_PATH),
            r"expected the sizes of an adapter in its .*, got ValueError: 'mid\.forward'",
        ),
        (edit_config(hidden=17), r"expected the adapter's .*linear_action\.0\.bias to be \[17\], got \[16\]"),
        (drop_a_tensor, r"expected the adapter's .*null_action_feature to be \[24\], got no such tensor"),
    ],
)
def test_damaged_adapters_say_so_in_one_sentence(unet, tmp_path, damage, message):
    trained_adapter(unet).save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message) as raised:
        InteractionAdapter.from_pretrained(tmp_path / "adapter")
    assert "\n" not in str(raised.value)


def test_an_unknown_id_says_so():
    with pytest.raises(AdapterError, match=r"got 'nobody/nothing-here' \(LocalEntryNotFoundError"):
        InteractionAdapter.from_pretrained("nobody/nothing-here")


def test_a_folder_is_no_safetensors_file(tmp_path):
    with pytest.raises(AdapterError, match="expected a whole safetensors file"):
        safetensors_tensors(tmp_path)


def test_an_adapter_for_another_base_names_both(unet):
    published = Base(2048, {f"block.{i}": (640, 10) for i in range(70)})
    with pytest.raises(AdapterError) as raised:
        published.check(unet)
    assert str(raised.value) == (
        "expected the base that the adapter is made for, "
        "SDXL (cross-attention width 2048, 70 sites of width 640), "
        "got a U-Net of no published kind (cross-attention width 24, 11 sites of width 16, 32)"
    )


# --- published weights ---


def test_published_weights_tell_every_size(unet):
    adapter = trained_adapter(unet, grid_positions=False)
    others = {"conv_in.weight": torch.zeros(1)}
    again = InteractionAdapter.from_published({**adapter.state_dict(), **others}, unet)
    assert again.config == adapter.config
    assert all(torch.equal(t, adapter.state_dict()[name]) for name, t in again.state_dict().items())


def test_published_weights_for_another_base_name_both(unet):
    tensors = trained_adapter(unet, grid_positions=False).state_dict()
    with torch.device("meta"):
        sd = UNet2DConditionModel(cross_attention_dim=768)
    with pytest.raises(
        AdapterError, match=r"width 24, 11 sites of width 16, 32\), got SD 1\.x .*width 768, 16 sites"
    ):
        InteractionAdapter.from_published(tensors, sd)


def test_weights_of_something_else_are_refused(unet):
    with pytest.raises(AdapterError, match="expected InteractDiffusion's weights, got none named"):
        InteractionAdapter.from_published({"conv_in.weight": torch.zeros(1)}, unet)
