"""interactdiff convert: one line, the adapter alone, and nothing written where there is nothing to write."""

import os
import re

import pytest
import torch
from containers import as_gligen, under_ldm_names, write_unet_folder
from tiny import trained_adapter

from interactdiff.checkpoint import AdapterError
from interactdiff.cli import main
from interactdiff.commands.convert import convert
from interactdiff.interaction.adapter import InteractionAdapter


@pytest.fixture
def adapter(unet) -> InteractionAdapter:
    """Acts, and has no more than what is published has."""
    return trained_adapter(unet, grid_positions=False)


@pytest.fixture
def folder(unet, adapter, tmp_path):
    """Container C, and beside it container A."""
    write_unet_folder(tmp_path / "published" / "unet", unet, adapter)
    tensors = under_ldm_names(adapter.state_dict(), 1)
    torch.save({"model": tensors, "ema": tensors}, tmp_path / "published" / "interact-diffusion-v1-2.pth")
    return tmp_path / "published"


def check_equal(again: InteractionAdapter, adapter: InteractionAdapter, dtype: torch.dtype) -> None:
    assert again.config == adapter.config
    tensors = adapter.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name].to(dtype)), name


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        ("keep", torch.float32),
    ],
)
def test_the_adapter_alone_in_our_format(adapter, folder, tmp_path, dtype, expected):
    out = tmp_path / "new" / "out"
    done = convert(folder, out, dtype=dtype)
    assert sorted(os.listdir(out)) == ["adapter.safetensors", "config.json"]
    check_equal(InteractionAdapter.from_pretrained(out), adapter, expected)
    assert done.before == os.path.getsize(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert done.after == os.path.getsize(out / "adapter.safetensors")
    values = sum(tensor.numel() for tensor in adapter.state_dict().values())
    assert 0 < done.after - values * expected.itemsize < 40_000  # names and shapes
    assert done.words.startswith(
        "InteractDiffusion under diffusers' names, for a U-Net of no published kind ("
    )


def test_one_file_of_a_folder_by_its_name(adapter, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "convert",
        str(folder),
        str(out),
        "--weight-name",
        "interact-diffusion-v1-2.pth",
        "--dtype",
        "keep",
    ]
    assert main(arguments) == 0
    check_equal(InteractionAdapter.from_pretrained(out), adapter, torch.float32)
    line = capsys.readouterr().out
    assert re.fullmatch(
        r".*out: InteractDiffusion under LDM's names, for .* \(cross-attention width 24, 11 sites of width "
        r"16, 32\), "
        r"0\.\d MB -> 0\.\d MB\n",
        line,
    )


def test_what_is_ours_already_and_what_is_gligens(unet, tmp_path):
    ours = trained_adapter(unet)
    ours.save_pretrained(tmp_path / "ours")
    assert "own adapter" in convert(tmp_path / "ours", tmp_path / "ours").words  # in place
    check_equal(InteractionAdapter.from_pretrained(tmp_path / "ours"), ours, torch.float16)
    (tmp_path / "gligen").mkdir()
    torch.save(as_gligen(trained_adapter(unet, False).state_dict()), tmp_path / "gligen" / "weights.bin")
    unet.save_config(tmp_path / "gligen")
    assert convert(tmp_path / "gligen", tmp_path / "out").words.startswith("GLIGEN under diffusers' names")
    assert InteractionAdapter.from_pretrained(tmp_path / "out").config.max_interactions == 30


def test_what_cannot_be_written_is_not_read(tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "folder" / "adapter.safetensors").mkdir(parents=True)
    for out, reason in (
        (tmp_path / "a file", "a file"),
        (tmp_path / "a file" / "out", f"{tmp_path / 'a file'} is a file"),
        (tmp_path / "folder", "a folder"),
    ):
        with pytest.raises(AdapterError) as raised:
            convert(tmp_path / "nothing.pth", out)
        assert str(raised.value) == f"expected a folder that can be written, got {str(out)!r}: {reason}"
    with pytest.raises(AdapterError, match=r"expected a dtype of float16, .*, keep, got 'int8'"):
        convert(tmp_path / "nothing.pth", tmp_path / "out", dtype="int8")


def test_what_cannot_be_read_writes_nothing(tmp_path, capsys):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    assert main(["convert", str(tmp_path / "other.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("interactdiff: expected InteractDiffusion's weights, got none named position_net")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
