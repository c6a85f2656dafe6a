"""Published pipeline folders: a stock pipeline and an adapter come out, and none of their code runs."""

import shutil
from pathlib import Path

import pytest
import torch
from containers import edit, publish, write_unet_folder
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import RIDING, close, draw, trained_adapter

from interactdiff.checkpoint import AdapterError
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.pipelines import InteractionStableDiffusionPipeline, InteractionStableDiffusionXLPipeline
from interactdiff.pipelines.hub import is_published_folder, load_hub_folder


@pytest.fixture
def adapter(unet) -> InteractionAdapter:
    """Acts, and has no more than what is published has."""
    return trained_adapter(unet, grid_positions=False)


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


@pytest.mark.parametrize("unet_says", [None, "[]"], ids=["a stock U-Net", "an unreadable U-Net"])
def test_no_code_runs_of_a_folder_without_fusers_either(pipe, adapter, tmp_path, unet_says):
    publish(tmp_path, pipe, adapter)
    if unet_says is None:
        shutil.rmtree(tmp_path / "unet")
        pipe.unet.save_pretrained(tmp_path / "unet")
        edit(tmp_path / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    else:
        (tmp_path / "unet" / "config.json").write_text(unet_says)
    with pytest.raises(AdapterError):
        InteractionStableDiffusionPipeline.from_pretrained(
            tmp_path, trust_remote_code=True, custom_pipeline="pipeline_own"
        )
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("xl", [False, True])
def test_the_wrong_pipeline_is_told_the_right_one(request, tmp_path, xl):
    pipe = request.getfixturevalue("xl_pipe" if xl else "pipe")
    publish(tmp_path, pipe, trained_adapter(pipe.unet, grid_positions=False))
    right, wrong = StableDiffusionPipeline, InteractionStableDiffusionXLPipeline
    if xl:
        right, wrong = StableDiffusionXLPipeline, InteractionStableDiffusionPipeline
    with pytest.raises(AdapterError, match=rf"expected a {right.__name__} or .*, got {wrong.__name__}$"):
        wrong.from_pretrained(tmp_path)


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
