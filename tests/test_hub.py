"""Published pipeline folders: a stock pipeline and an adapter come out, and none of their code runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import write_unet_folder
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import RIDING, close, draw, trained_adapter

from interactdiff.attach import attach
from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.pipelines.hub import is_published_folder, load_hub_folder


@pytest.fixture
def adapter(unet) -> InteractionAdapter:
    """Acts, and has no more than what is published has."""
    return trained_adapter(unet, grid_positions=False)


def publish(folder: Path, pipeline: Any, adapter: InteractionAdapter, **options: Any) -> Path:
    """Container C or D: classes of the folder's own, whose code leaves a trace where it runs."""
    pipeline.save_pretrained(folder, **options)
    shutil.rmtree(folder / "unet")
    write_unet_folder(folder / "unet", pipeline.unet, adapter, **options)
    edit(
        folder / "model_index.json", _class_name=["pipeline_own", "OwnPipeline"], unet=["own_unet", "OwnUNet"]
    )
    edit(folder / "unet" / "config.json", _class_name="OwnUNet", attention_type="gated-own", own_key=3)
    for name in ("pipeline_own.py", "unet/own_unet.py", "own_unet.py"):
        (folder / name).write_text(f"open({str(folder / 'trace')!r}, 'w').close()\n")
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in one.state_dict().items()
    )


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_a_stock_pipeline_and_an_adapter_come_out(pipe, adapter, tmp_path, options):
    folder = publish(tmp_path, pipe, adapter, **options)
    assert is_published_folder(folder)
    again, its = load_hub_folder(
        StableDiffusionPipeline.from_pretrained,
        folder,
        trust_remote_code=True,
        custom_pipeline="pipeline_own",
    )
    assert type(again) is StableDiffusionPipeline
    assert type(again.unet) is UNet2DConditionModel
    assert not again.unet.training
    assert same_tensors(again.unet, pipe.unet)
    assert same_tensors(its, adapter)
    assert same_tensors(again.text_encoder, pipe.text_encoder)
    assert again.config._name_or_path == str(folder)
    assert not (folder / "trace").exists()
    again.set_progress_bar_config(disable=True)
    pictures = []
    for pipeline, its_adapter in ((again, its), (pipe, adapter)):
        with attach(pipeline, its_adapter) as handle:
            handle.set_scene([RIDING])
            pictures.append(draw(pipeline))
    assert close(*pictures)
    assert not close(pictures[0], draw(pipe))


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_dtype_and_variant_decide_what_is_read(pipe, adapter, tmp_path):
    publish(tmp_path, pipe, adapter)
    adapter.position_net.null_action_feature.data.fill_(9.0)
    write_unet_folder(tmp_path / "unet", pipe.unet, adapter, variant="fp16")  # the text encoder has none
    for options, dtype, is_variant in (
        ({"torch_dtype": torch.float16}, torch.float16, True),
        ({"dtype": torch.float32, "variant": "fp16"}, torch.float32, True),
        ({"torch_dtype": {"unet": torch.bfloat16, "default": torch.float32}}, torch.bfloat16, False),
        ({}, torch.float32, False),
    ):
        again, its = load_hub_folder(StableDiffusionPipeline.from_pretrained, tmp_path, **options)
        assert again.unet.dtype == dtype
        assert {tensor.dtype for tensor in its.state_dict().values()} == {dtype}
        assert (its.position_net.null_action_feature[0].item() == 9.0) == is_variant
    with pytest.raises(
        AdapterError, match=r"expected the variant bf16 in .*, got none of unet/diffusion_pytorch"
    ):
        load_hub_folder(StableDiffusionPipeline.from_pretrained, tmp_path, variant="bf16")


def test_sdxl(xl_pipe, tmp_path):
    adapter = trained_adapter(xl_pipe.unet, grid_positions=False)
    publish(tmp_path, xl_pipe, adapter, variant="fp16", max_shard_size="20KB")
    again, its = load_hub_folder(StableDiffusionXLPipeline.from_pretrained, tmp_path, variant="fp16")
    assert type(again) is StableDiffusionXLPipeline
    assert same_tensors(again.unet, xl_pipe.unet)
    assert same_tensors(again.text_encoder_2, xl_pipe.text_encoder_2)
    assert same_tensors(its, adapter)


def test_what_is_a_published_folder(pipe, adapter, tmp_path):
    pipe.save_pretrained(tmp_path / "stock")
    assert not is_published_folder(tmp_path / "stock")
    assert not is_published_folder(tmp_path)
    assert not is_published_folder("nobody/nothing-here", local_files_only=True)
    adapter.save_pretrained(tmp_path / "ours")
    assert not is_published_folder(tmp_path / "ours")
    write_unet_folder(tmp_path / "stock" / "unet", pipe.unet, adapter)  # stock classes, and yet fusers
    assert is_published_folder(tmp_path / "stock")
    edit(tmp_path / "stock" / "unet" / "config.json", attention_type="gated")
    assert is_published_folder(tmp_path / "stock")


def test_what_is_none_says_so(pipe, adapter, tmp_path):
    def load(folder: Path) -> None:
        load_hub_folder(StableDiffusionPipeline.from_pretrained, folder)

    with pytest.raises(AdapterError, match=r"expected a diffusers pipeline in .*, got no model_index\.json"):
        load(tmp_path)
    pipe.save_pretrained(tmp_path / "stock")
    with pytest.raises(
        AdapterError, match="expected InteractDiffusion's weights, got none named position_net"
    ):
        load(tmp_path / "stock")
    folder = publish(tmp_path / "published", pipe, adapter)
    edit(folder / "model_index.json", scheduler=["own_scheduler", "OwnScheduler"])
    with pytest.raises(
        AdapterError,
        match=r"expected classes of diffusers .*, got \['own_scheduler', 'OwnScheduler'\] for scheduler",
    ):
        load(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(folder / "unet" / "config.json", block_out_channels=[16, 64])
    with pytest.raises(AdapterError, match=r"expected the U-Net's .* to be "):
        load(folder)
    edit(folder / "unet" / "config.json", block_out_channels=[16])
    with pytest.raises(AdapterError, match="expected the configuration of a U-Net, got ValueError"):
        load(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"expected unet/config\.json in .*, got none"):
        load(folder)
