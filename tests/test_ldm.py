"""LDM's names: every weight finds its place in a diffusers U-Net, and every fuser its site."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.ldm import adapter_tensors_from_ldm, unet_config_from_ldm, unet_from_ldm
from interactdiff.sites import Base

LDM = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_heads": 4,
    "num_res_blocks": 1,
    "transformer_depth": 1,
    "context_dim": 24,
}


def ldm_shapes(params: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an LDM U-Net, laid out as its constructor does."""
    shapes: dict[str, tuple[int, ...]] = {}
    base, text, emb = params["model_channels"], params["context_dim"], 4 * params["model_channels"]

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def resnet(name: str, width: int, out: int) -> None:
        add(f"{name}.in_layers.0", width)
        add(f"{name}.in_layers.2", out, width, 3, 3)
        add(f"{name}.emb_layers.1", out, emb)
        add(f"{name}.out_layers.0", out)
        add(f"{name}.out_layers.3", out, out, 3, 3)
        if width != out:
            add(f"{name}.skip_connection", out, width, 1, 1)

    def transformer(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        add(f"{name}.proj_in", width, width, 1, 1)
        add(f"{name}.proj_out", width, width, 1, 1)
        for block in range(params["transformer_depth"]):
            stem = f"{name}.transformer_blocks.{block}"
            for attention, read in (("attn1", width), ("attn2", text)):
                add(f"{stem}.{attention}.to_q", width, width, bias=False)
                add(f"{stem}.{attention}.to_k", width, read, bias=False)
                add(f"{stem}.{attention}.to_v", width, read, bias=False)
                add(f"{stem}.{attention}.to_out.0", width, width)
            for norm in ("norm1", "norm2", "norm3"):
                add(f"{stem}.{norm}", width)
            add(f"{stem}.ff.net.0.proj", 8 * width, width)
            add(f"{stem}.ff.net.2", width, 4 * width)

    add("time_embed.0", emb, base)
    add("time_embed.2", emb, emb)
    add("input_blocks.0.0", base, params["in_channels"], 3, 3)
    width, skips, factor, number = base, [base], 1, 1
    for level, multiplier in enumerate(params["channel_mult"]):
        for _ in range(params["num_res_blocks"]):
            resnet(f"input_blocks.{number}.0", width, base * multiplier)
            width = base * multiplier
            if factor in params["attention_resolutions"]:
                transformer(f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if level != len(params["channel_mult"]) - 1:
            add(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number, factor = number + 1, factor * 2
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width)
    resnet("middle_block.2", width, width)
    number = 0
    for level, multiplier in reversed(list(enumerate(params["channel_mult"]))):
        for layer in range(params["num_res_blocks"] + 1):
            resnet(f"output_blocks.{number}.0", width + skips.pop(), base * multiplier)
            width, after = base * multiplier, 1
            if factor in params["attention_resolutions"]:
                transformer(f"output_blocks.{number}.1", width)
                after = 2
            if level and layer == params["num_res_blocks"]:
                add(f"output_blocks.{number}.{after}.conv", width, width, 3, 3)
                factor //= 2
            number += 1
    add("out.0", width)
    add("out.2", params["out_channels"], width, 3, 3)
    return shapes


@pytest.mark.parametrize(
    ("layout", "heads"),
    [
        ({"channel_mult": [1, 2], "attention_resolutions": [1]}, {4}),
        ({"channel_mult": [1, 2, 3], "num_res_blocks": 2, "attention_resolutions": [1, 2]}, {4}),
        ({"channel_mult": [1, 2, 2, 2], "num_res_blocks": 2, "attention_resolutions": [4, 2, 1]}, {4}),
        (
            {
                "channel_mult": [1, 2, 4],
                "num_res_blocks": 1,
                "attention_resolutions": [2, 4],
                "transformer_depth": 2,
            },
            {4},
        ),
        (
            {
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [1, 2],
                "num_head_channels": 16,
            },
            {2, 4},
        ),
    ],
)
def test_every_weight_of_an_ldm_unet_finds_its_place(layout, heads):
    params = {**LDM, **layout}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in ldm_shapes(params).items()}
    unet = unet_from_ldm(tensors, params)
    sums = sorted(round(tensor.sum().item(), 3) for tensor in tensors.values())
    assert sorted(round(tensor.sum().item(), 3) for tensor in unet.state_dict().values()) == sums
    assert {heads for _, heads in Base.of(unet).sites.values()} == heads
    assert unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 24)).sample.shape == (1, 4, 8, 8)


def test_an_ldm_unet_that_is_not_whole_says_so():
    params = {**LDM, "channel_mult": [1, 2], "attention_resolutions": [1]}
    tensors = {name: torch.zeros(shape) for name, shape in ldm_shapes(params).items()}
    del tensors["middle_block.1.norm.weight"]
    with pytest.raises(
        AdapterError,
        match=r"^expected the U-Net's mid_block\.attentions\.0\.norm\.weight to be \[64\], got no",
    ):
        unet_from_ldm(tensors, params)


def test_unknown_fusers_are_refused():
    with pytest.raises(AdapterError, match=r"expected fusers of type 'gatedSA', got 'gatedCA'"):
        unet_config_from_ldm({**LDM, "fuser_type": "gatedCA"})


def test_adapter_names_of_stable_diffusion_1():
    """The published stems, in a file without a U-Net."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    numbers = [("input_blocks", n) for n in (1, 2, 4, 5, 7, 8)] + [("output_blocks", n) for n in range(3, 12)]
    stems = [f"{side}.{n}.1" for side, n in numbers] + ["middle_block.1"]
    rest = "transformer_blocks.0.fuser.linear.weight"
    ours = adapter_tensors_from_ldm({f"{stem}.{rest}": torch.zeros(1) for stem in stems}, 2)
    assert set(ours) == {f"{path}.fuser.linear.weight" for path in Base.of(unet).sites}
    assert len(ours) == 16
    found = {
        stem: next(iter(adapter_tensors_from_ldm({f"{stem}.{rest}": torch.zeros(1)}, 2))) for stem in stems
    }
    assert found["input_blocks.4.1"].startswith("down_blocks.1.attentions.0.")
    assert found["output_blocks.11.1"].startswith("up_blocks.3.attentions.2.")
    assert found["middle_block.1"].startswith("mid_block.attentions.0.")
