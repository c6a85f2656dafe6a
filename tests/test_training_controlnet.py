"""A frozen ControlNet in training: what diffusers' pipelines compute with it, and never trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safetensors import safe_open
from test_training_subject import subject_config
from tiny_dit import CLIP_WIDTH, T5_WIDTH, TEXT_LENGTH, shaken, tiny_flux
from tiny_subject import VISION, picture
from torch import nn

from interactdiff.data.latents import vae_mean
from interactdiff.errors import RecipeError
from interactdiff.sites import denoiser_of
from interactdiff.training.control import load_control
from interactdiff.training.frozen_bases import frozen_base
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.run import make_recipe

classes: Any = ControlNetModel, SD3ControlNetModel, FluxControlNetModel
UNet, SD3, Flux = classes
SD3_SHAPE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8}
SD3_SHAPE |= {"num_attention_heads": 2, "joint_attention_dim": 2 * CLIP_WIDTH, "caption_projection_dim": 16}
SD3_SHAPE |= {"pooled_projection_dim": 2 * CLIP_WIDTH, "out_channels": 4, "pos_embed_max_size": 32}
FLUX_SHAPE = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
FLUX_SHAPE |= {"num_attention_heads": 2, "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": CLIP_WIDTH}
FLUX_SHAPE |= {"axes_dims_rope": (4, 6, 6)}


def net_of(pipe: Any, **options: Any) -> Any:
    """A ControlNet of a tiny pipeline's family that acts."""
    denoiser: Any = denoiser_of(pipe)
    if hasattr(pipe, "unet"):
        return shaken(UNet.from_unet(denoiser, conditioning_embedding_out_channels=(4, 8)), 9)
    sd3 = type(denoiser).__name__.startswith("SD3")
    return shaken(SD3(**SD3_SHAPE | options) if sd3 else Flux(**FLUX_SHAPE | options), 9)


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sd": ("pipe", StableDiffusionControlNetPipeline, {}),
    "sdxl": ("xl_pipe", StableDiffusionXLControlNetPipeline, {}),
    "sd3": ("sd3_pipe", StableDiffusion3ControlNetPipeline, {"force_zeros_for_pooled_projection": False}),
    "sd3, no pooled captions": ("sd3_pipe", StableDiffusion3ControlNetPipeline, {}),
    "sd3.5 large": (
        "sd3_pipe",
        StableDiffusion3ControlNetPipeline,
        {"use_pos_embed": False, "joint_attention_dim": None},
    ),
    "flux": ("flux_pipe", FluxControlNetPipeline, {"guidance_embeds": True}),
    "flux, a hint block": (
        "flux_pipe",
        FluxControlNetPipeline,
        {"conditioning_embedding_channels": 16, "num_layers": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_those_of_diffusers_pipelines(
    case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fixture, kind, options = CASES[case]
    pipe: Any = request.getfixturevalue(fixture)
    if "conditioning_embedding_channels" in options:  # a hint block takes 8 pixels for a token
        levels: Any = {"block_out_channels": (8,) * 3, "down_block_types": ("DownEncoderBlock2D",) * 3}
        levels |= {"up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 4, "shift_factor": 0.0}
        pipe.register_modules(vae=AutoencoderKL(**levels).eval(), transformer=tiny_flux(num_layers=4))
    pipe.vae.register_to_config(shift_factor=0.4 if fixture.startswith(("sd3", "flux")) else None)
    pipe.vae.quant_conv.weight.data[4:], pipe.vae.quant_conv.bias.data[4:] = 0, -60  # no noise in latents
    net_of(pipe, **options).save_pretrained(tmp_path / "net")
    base = frozen_base(pipe, LossConfig(guidance=2.0))
    control = base.control = load_control(str(tmp_path / "net"), base, torch.float32, 0.7)

    side, image = (16 if hasattr(pipe, "unet") else 32), picture(3, (32, 32))
    image = image.resize((side, side))
    seen: list[Any] = []
    hook = base.denoiser.register_forward_hook(lambda *one: seen.append(one[1:]), with_kwargs=True)
    arguments: dict[str, Any] = {"controlnet_conditioning_scale": 0.7, "num_inference_steps": 1}
    arguments["image" if hasattr(pipe, "unet") else "control_image"] = image
    arguments |= {"max_sequence_length": TEXT_LENGTH} if hasattr(pipe, "transformer") else {}
    guidance = 2.0 if fixture == "flux_pipe" else 1.0
    kind(**pipe.components, controlnet=control.net)(
        "a dog", height=side, width=side, guidance_scale=guidance, output_type="latent", **arguments
    )
    hook.remove()
    ((args, given, output),) = seen
    given = {**dict(zip(("sample", "timestep"), args, strict=False)), **given}
    noisy = given.get("sample", given.get("hidden_states"))
    times = given["timestep"].expand(1) / (1000 if fixture == "sd3_pipe" else 1)
    pooled = (given.get("added_cond_kwargs") or {}).get("text_embeds", given.get("pooled_projections"))
    states = {"states": given["encoder_hidden_states"], "pooled": pooled}
    wanted = output[0]
    if fixture == "flux_pipe":
        cells = side // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        noisy, wanted = (
            pipe._unpack_latents(one, cells, cells, vae_scale_factor=1) for one in (noisy, wanted)
        )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    batch = {name: [(side, side)] for name in ("original_size", "target_size")} | {"crop": [(0, 0)]}
    batch["control"] = pixels if control.reads_pixels else vae_mean(pipe.vae, control.shifted)(pixels)
    with torch.no_grad():
        made = base.predict(noisy, times, states, batch | {"controlled": torch.ones(1)})
        plain = base.predict(noisy, times, states, batch | {"controlled": torch.zeros(1)})
        base.control = None
        assert torch.equal(base.predict(noisy, times, states, batch), plain)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made, plain, atol=1e-2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with a subject each; the first two have control images, twice as large."""
    folder, rows = tmp_path_factory.mktemp("controlled"), []
    for number in range(4):
        picture(number, (40, 32)).save(folder / f"{number}.png")
        row: dict[str, Any] = {"file_name": f"{number}.png", "prompt": "a dog"}
        row["subjects"] = [{"phrase": "dog", "image": f"{number}.png"}]
        if number < 2:
            picture(number + 9, (80, 64)).save(folder / f"depth-{number}.png")
            row["conditioning_image"] = f"depth-{number}.png"
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def controlled(pipe: Any, pictures: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    net_of(pipe).save_pretrained(folder / "net")
    config = subject_config(pipe, pictures, folder, folder, **changes)
    config |= {"image_encoder": None, "vision": VISION, "train_image_encoder": True}
    return config | {"controlnet": str(folder / "net"), "controlnet_scale": 0.8} | changes


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
def test_an_encoder_is_trained_beside_it(
    fixture: str, request: pytest.FixtureRequest, pictures: Path, tmp_path: Path
) -> None:
    pipe: Any = request.getfixturevalue(fixture)
    config = controlled(
        pipe, pictures, tmp_path, batch_size=4, steps=2, flip=1.0, gradient_checkpointing=True
    )
    recipe: Any = make_recipe(config)
    net, base = recipe.base.control.net, recipe.base
    for attention, _ in recipe.model.attentions.values():  # zero at the start, which stops all others
        nn.init.normal_(attention.to_out[0].weight, std=0.1)
    batch = recipe.batch(0)
    assert batch["controlled"].tolist() == [float(name < "2") for name in batch["name"]]
    row = batch["controlled"].tolist().index(1.0)
    crop = recipe.data.framing.place(40, 32, (), flipped=True)
    image = Image.open(pictures / f"depth-{batch['name'][row]}").resize(
        crop.size[::-1], Image.Resampling.BICUBIC, box=tuple(2 * edge for edge in crop.window)
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).flip(-1) / 127.5 - 1
    expected = pixels if fixture == "pipe" else vae_mean(recipe.pipe.vae)(pixels[None])[0].bfloat16()
    torch.testing.assert_close(batch["control"][row], expected, rtol=1e-2, atol=1e-2)

    loss = recipe.loss(batch, recipe.generator(0))
    loss.backward()
    assert all(one.grad is None and not one.requires_grad for one in net.parameters())
    trained = [one for one in recipe.model.parameters() if one.requires_grad and one.grad is not None]
    assert sum(bool(one.grad.abs().sum()) for one in trained) > len(trained) / 2
    noisy, times, states = base.noisy(batch, recipe.device, recipe.dtype)
    scales = 0.8 * batch["controlled"]
    with torch.no_grad():
        recipe.condition(batch)
        if fixture == "pipe":
            down, middle = net(noisy, times, states["states"], (batch["control"] + 1) / 2, return_dict=False)
            predicted = base.denoiser(
                noisy,
                times,
                states["states"],
                down_block_additional_residuals=[one * scales.view(-1, 1, 1, 1) for one in down],
                mid_block_additional_residual=middle * scales.view(-1, 1, 1, 1),
            ).sample
        else:
            inputs, size = base.arguments(noisy, times, states, batch), noisy.shape
            latents = recipe.pipe._pack_latents(batch["control"].float(), *size)
            joint, single = net(**inputs, controlnet_cond=latents, return_dict=False)
            inputs["controlnet_block_samples"] = [one * scales.view(-1, 1, 1) for one in joint]
            inputs["controlnet_single_block_samples"] = [one * scales.view(-1, 1, 1) for one in single]
            predicted = base.unpacked(base.denoiser(**inputs).sample, noisy)
        assert torch.allclose(base.loss_between(predicted, batch), loss, rtol=1e-5)

        frozen = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet_") and "embed" not in name:  # as a new one begins
                parameter.zero_()
        zeros = recipe.loss(batch, recipe.generator(0))
        recipe.base.control = None
        assert torch.equal(recipe.loss(batch, recipe.generator(0)), zeros)
        assert not torch.allclose(zeros, loss)
        net.load_state_dict(frozen)
    recipe.config.drops.control = 0.25
    recipe.base.control = recipe.load_control()
    assert recipe.base.control.drop == 0.25
    recipe.model.zero_grad()
    recipe.train()
    after = recipe.base.control.net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    names = set()
    for file in [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "adapter").rglob("*.safetensors")]:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    assert names
    assert not [name for name in names if "control" in name]


def test_what_cannot_be_used_is_one_sentence(
    pipe: Any, sd3_pipe: Any, pictures: Path, tmp_path: Path
) -> None:
    config = controlled(pipe, pictures, tmp_path)
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "rows").mkdir()
    picture(0).save(tmp_path / "rows/2.png")
    (tmp_path / "rows/metadata.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(
        RecipeError, match=r"controlnet: expected rows with a conditioning_image in .*rows, got"
    ):
        make_recipe(config | {"data": str(tmp_path / "rows")})
    base, net = frozen_base(pipe, LossConfig()), tmp_path / "net"

    def refused(folder: Path, of: Any = base) -> str:
        with pytest.raises(RecipeError) as error:
            load_control(str(folder), of, torch.float32)
        return str(error.value).replace(str(folder), "FOLDER")

    expected = "controlnet: expected a SD3ControlNetModel for the base, got a ControlNetModel at FOLDER"
    assert refused(net, frozen_base(sd3_pipe, LossConfig())) == expected
    options: Any = json.loads((net / "config.json").read_text()) | {"cross_attention_dim": 32}
    UNet.from_config(options).save_pretrained(tmp_path / "wider")
    wider = "controlnet: expected cross_attention_dim 24 for the base, got 32 at FOLDER"
    assert refused(tmp_path / "wider") == wider
    file = net / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(net).startswith("controlnet: expected a ControlNetModel at FOLDER, got ")
    file.rename(net / "diffusion_pytorch_model.bin")
    assert refused(net).startswith("controlnet: expected a ControlNetModel at FOLDER, got ")
    assert refused(tmp_path / "none").startswith("controlnet: expected a ControlNetModel at FOLDER, got ")
