"""Models with weights of one variant alone, or in `.bin` files: loaded, and no pickle is executed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interactdiff.cli import main
from interactdiff.errors import ModelError
from interactdiff.pipeline_loading import load_pipeline

CPU = torch.device("cpu")


@pytest.fixture
def plain(pipe: Any, tmp_path: Path) -> Path:
    """The folder of a tiny pipeline, in safetensors."""
    pipe.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_pipeline(str(folder), CPU, torch.float32)
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(loaded, part).state_dict().items()
    }


def as_variant(
    folder: Path, name: str = "fp16", parts: tuple[str, ...] = ("unet", "vae", "text_encoder")
) -> None:
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", f".{name}.safetensors")))


def as_bin(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        name = file.name.replace(".safetensors", ".bin")
        name = name if name.startswith("diffusion") else name.replace("model", "pytorch_model")
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def as_bin_of_a_variant(folder: Path) -> None:
    as_variant(folder)
    as_bin(folder)


def as_bin_shards(folder: Path) -> None:
    as_bin(folder)
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    tensors = list(torch.load(file, weights_only=True).items())
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    halves = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    for name, half in zip(names, halves, strict=True):
        torch.save(dict(half), file.with_name(name))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {k: n for n, half in zip(names, halves, strict=True) for k, _ in half},
    }
    (folder / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    file.unlink()


def as_variant_of_one_part(folder: Path) -> None:
    as_variant(folder, parts=("unet",))


def as_bin_of_one_part(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize(
    "change",
    [as_variant, as_bin, as_bin_of_a_variant, as_bin_shards, as_variant_of_one_part, as_bin_of_one_part],
)
def test_what_is_there_is_loaded(plain: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    expected = weights(plain)
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    change(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    got = weights(folder)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in got.items())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_variant_can_be_chosen(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    as_variant(folder, "ema")
    other = tmp_path / "both"
    shutil.copytree(plain, other)
    for file in folder.glob("*/*.safetensors"):
        shutil.copy(file, other / file.parent.name / file.name)
    chosen = load_pipeline(str(other), CPU, torch.float32, "ema")
    assert torch.equal(
        chosen.unet.conv_in.weight, load_pipeline(str(plain), CPU, torch.float32).unet.conv_in.weight
    )
    with pytest.raises(ModelError, match=r"expected weights of the variant fp16 in .*, got ema"):
        load_pipeline(str(other), CPU, torch.float32, "fp16")
    with pytest.raises(ModelError, match="got plain weights alone"):
        load_pipeline(str(plain), CPU, torch.float32, "fp16")
    command = ["generate", "a", "--model", str(folder), "--steps", "1", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "a.png"), "--variant", "fp16"]) == 2
    assert "interactdiff: expected weights of the variant fp16 in " in capsys.readouterr().err
    size = ["--width", "64", "--height", "64"]
    assert main([*command, *size, "--out", str(tmp_path / "a.png"), "--variant", "ema"]) == 0
    assert (tmp_path / "a.png").is_file()


def test_parts_of_different_variants_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    as_variant(folder, "fp16", ("unet",))
    as_variant(folder, "bf16", ("vae",))
    with pytest.raises(
        ModelError, match=r"expected one variant that all parts in .* have, got .*unet: fp16; vae: bf16"
    ):
        load_pipeline(str(folder), CPU, torch.float32)


class Hostile:
    """Would run a command if it were unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


def test_no_pickle_of_a_model_is_executed(plain: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(plain, folder)
    as_bin(folder)
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {"more": Hostile(marker)}, file)
    with pytest.raises(
        ModelError, match=r"expected torch weights at .*, got a pickle that calls posix\.system"
    ):
        load_pipeline(str(folder), CPU, torch.float32)
    assert not marker.exists()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"expected torch weights at .*, got "):
        load_pipeline(str(folder), CPU, torch.float32)
