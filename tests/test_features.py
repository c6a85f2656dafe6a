"""What else people do with their pipelines, together with an attached adapter."""

from typing import Any

import diffusers
import pytest
import torch
from conftest import TEXT_WIDTH, tiny_unet
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from test_support import PICTURE, controlnet, from_base
from tiny import RIDING, Calls, close, draw, trained_adapter
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.scene import Entity, Interaction, SceneError

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


def controlled(pipeline: Any, adapter: InteractionAdapter, **arguments: Any) -> torch.Tensor:
    with attach(pipeline, adapter) as handle:
        handle.set_scene([RIDING])
        return draw(pipeline, **arguments)


# --- LoRA, textual inversion, IP-Adapter ---


def lora_tensors(denoiser: PeftAdapterMixin, part: str = "unet") -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for every query and value projection of a pipeline's part, of one rank."""
    generator = torch.Generator().manual_seed(7)
    return {
        f"{part}.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name, module in denoiser.named_modules()
        if name.endswith(("to_q", "to_v"))
        for side, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2)))
    }


@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_lora_before_and_after_fused_and_not(base, order, fused):
    adapter = trained_adapter(base.unet)
    plain, without = draw(base), controlled(base, adapter)

    def load() -> None:
        base.load_lora_weights(lora_tensors(base.unet), adapter_name="style")
        if fused:
            base.fuse_lora()

    if order == "lora first":
        load()
    with attach(base, adapter) as handle:
        handle.set_scene([RIDING])
        if order == "adapter first":
            load()
        with_both = draw(base)
        handle.clear()
        lora_alone = draw(base)
        assert not any(close(with_both, other) for other in (plain, without, lora_alone))
        handle.set_scene([RIDING])
        if fused:
            base.unfuse_lora()
        base.unload_lora_weights()
        assert close(draw(base), without)
    assert close(draw(base), plain)
    with attach(base, trained_adapter(base.unet)) as handle:  # the two commute
        handle.set_scene([RIDING])
        load()
        assert close(draw(base), with_both)


def test_weights_of_a_lora_on_a_unet_with_a_list_of_layers(pipe):
    """As the packaged U-Net is: diffusers' own call fails there, and what it would call next does not."""
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": [1, 1]}).eval()
    adapter, tensors = trained_adapter(pipe.unet), lora_tensors(pipe.unet)
    pipe.load_lora_weights(tensors, adapter_name="style")
    with pytest.raises(TypeError, match="list"):
        pipe.set_adapters("style", 0.5)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        full = draw(pipe)
        diffusers.utils.set_weights_and_activate_adapters(pipe.unet, ["style"], [0.5])
        half = draw(pipe)
    pipe.unload_lora_weights()
    tensors = {name: t * 0.5 if "lora_B" in name else t for name, t in tensors.items()}
    pipe.load_lora_weights(tensors, adapter_name="weaker")
    assert close(controlled(pipe, adapter), half)
    assert not close(full, half)


def test_phrases_use_what_textual_inversion_taught(pipe, adapter):
    generator = torch.Generator().manual_seed(11)
    pipe.load_textual_inversion({"<rex>": torch.randn(2, 24, generator=generator)}, token="<rex>")
    pictures = []
    with attach(pipe, adapter) as handle:
        for who in ("<rex>", "<rex> <rex_1>", "rex"):
            handle.set_scene([Interaction(who, "riding", "bike", RIDING.subject_box, RIDING.object_box)])
            pictures.append(draw(pipe))
    taught, spelled_out, untaught = pictures
    assert close(taught, spelled_out), "one of the two vectors was left out"
    assert not close(taught, untaught)


def ip_adapter_tensors(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter file's tensors: four image tokens, and keys and values for every cross-attention."""
    generator = torch.Generator().manual_seed(12)
    width, tokens, embedding = unet.config.cross_attention_dim, 4, 16
    crossing = [
        (n, unet.get_submodule(n.removesuffix(".processor"))) for n in unet.attn_processors if "attn2" in n
    ]
    attention = {
        f"{2 * number + 1}.to_{what}_ip.weight": torch.randn(a.to_k.out_features, width, generator=generator)
        * 0.3
        for number, (_, a) in enumerate(crossing)
        for what in ("k", "v")
    }
    image = {
        "proj.weight": torch.randn(tokens * width, embedding, generator=generator) * 0.3,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": image, "ip_adapter": attention}


@pytest.mark.parametrize("order", ["ip-adapter first", "adapter first"])
def test_ip_adapter_in_both_orders(base, order):
    config: Any = CLIPVisionConfig
    torch.manual_seed(13)
    vision = config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    base.register_modules(
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    )
    adapter = trained_adapter(base.unet)
    plain, without = draw(base), controlled(base, adapter)

    def load() -> None:
        base.load_ip_adapter(ip_adapter_tensors(base.unet), subfolder="", weight_name="")

    shown = {"ip_adapter_image": Image.new("RGB", (16, 16), "red")}
    if order == "ip-adapter first":
        load()
    with attach(base, adapter) as handle:
        handle.set_scene([RIDING])
        if order == "adapter first":
            load()
        with_both = draw(base, **shown)
        handle.clear()
        image_alone = draw(base, **shown)
        handle.set_scene([RIDING])
        assert any(isinstance(p, IPAdapterAttnProcessor2_0) for p in base.unet.attn_processors.values())
        assert not any(close(with_both, other) for other in (plain, without, image_alone))
        base.unload_ip_adapter()
        assert close(draw(base), without)
    assert close(draw(base), plain)


# --- schedulers ---

SCHEDULERS = {  # name: options, and the calls that 4 steps take
    "LCMScheduler": ({}, 4),
    "TCDScheduler": ({}, 4),
    "EulerDiscreteScheduler": ({}, 4),
    "EulerAncestralDiscreteScheduler": ({}, 4),
    "DPMSolverMultistepScheduler": ({"algorithm_type": "sde-dpmsolver++"}, 4),
    "DPMSolverSinglestepScheduler": ({}, 4),
    "UniPCMultistepScheduler": ({}, 4),
    "DEISMultistepScheduler": ({}, 4),
    "LMSDiscreteScheduler": ({}, 4),
    "PNDMScheduler": ({"skip_prk_steps": True}, 5),
    "HeunDiscreteScheduler": ({}, 7),
    "KDPM2DiscreteScheduler": ({}, 7),
    "KDPM2AncestralDiscreteScheduler": ({}, 7),
    "DPMSolverSDEScheduler": ({}, 7),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_count_steps_with_every_scheduler(pipe, adapter, name):
    options, calls = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    unet, fuser = Calls(pipe.unet), Calls(next(iter(adapter.fusers.values())).attn.to_q)
    run = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(14)}
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        draw(pipe, **run)
        assert (unet.count, fuser.count) == (calls, calls)
        handle.set_scene([RIDING], schedule=0.5)
        draw(pipe, **run)
    steps_of_order_2 = {7: 3 if "Heun" in name else 4, 5: 3, 4: 2}
    assert fuser.count - calls == steps_of_order_2[calls]


def test_few_steps_with_guidance_inside_the_unet(pipe, tokenizer):
    """Latent consistency models embed the guidance scale: a batch has no unconditional half."""
    pipe.unet = tiny_unet(TEXT_WIDTH, time_cond_proj_dim=8)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    adapter = trained_adapter(pipe.unet)
    run = {"num_inference_steps": 2, "guidance_scale": 8.0}
    plain = draw(pipe, generator=torch.Generator().manual_seed(15), **run)
    with attach(pipe, adapter) as handle:
        handle.set_scene([[RIDING], []])
        both = draw(pipe, ["a dog", "a dog"], generator=torch.Generator().manual_seed(15), **run)
    assert both.isfinite().all()
    assert not close(both[:1], plain)


def test_a_callback_that_ends_guidance_midway(base):
    def stop_guiding(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline._guidance_scale = 1.0
            tensors = {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return tensors

    names = ["prompt_embeds"] + ["add_text_embeds", "add_time_ids"] * hasattr(base, "text_encoder_2")
    dynamic = {"callback_on_step_end": stop_guiding, "callback_on_step_end_tensor_inputs": names}
    adapter = trained_adapter(base.unet)
    guided = controlled(base, adapter)
    ended = controlled(base, adapter, **dynamic)
    assert not torch.equal(ended, guided)
    assert not close(ended, draw(base, **dynamic))


def test_a_base_that_stops_early_for_a_refiner(xl_pipe, xl_adapter):
    fuser = Calls(next(iter(xl_adapter.fusers.values())).attn.to_q)
    unet = Calls(xl_pipe.unet)
    with attach(xl_pipe, xl_adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        draw(xl_pipe, num_inference_steps=10, denoising_end=0.6)
    assert (unet.count, fuser.count) == (6, 3)


def test_a_controlnet_pipeline_that_stops_early(xl_pipe, xl_adapter):
    """It counts its timesteps before it cuts them."""
    pipeline = from_base(xl_pipe, "ControlNet", controlnet=controlnet(xl_pipe))
    fuser, unet = Calls(next(iter(xl_adapter.fusers.values())).attn.to_q), Calls(xl_pipe.unet)
    with attach(pipeline, xl_adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        draw(pipeline, num_inference_steps=10, denoising_end=0.6, image=PICTURE)
    assert (unet.count, fuser.count) == (6, 3)


# --- memory, devices, precision, files ---


def test_what_saves_memory_changes_nothing(base):
    adapter = trained_adapter(base.unet)
    expected = controlled(base, adapter)
    base.enable_attention_slicing(1)
    assert close(controlled(base, adapter), expected)
    base.vae.enable_tiling()
    base.vae.enable_slicing()
    with attach(base, adapter) as handle:
        handle.set_scene([RIDING])
        tiled = base("a dog", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert tiled.shape == (1, 32, 32, 3)
    base.disable_attention_slicing()
    base.enable_freeu(s1=1.0, s2=1.0, b1=1.0, b2=1.0)
    assert close(controlled(base, adapter), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_before_and_after_attaching(base, when):
    """What `enable_model_cpu_offload` does, which itself refuses where there is only a CPU."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    def offload() -> None:
        for part in ("text_encoder", "text_encoder_2"):
            if hasattr(base, part):
                cpu_offload_with_hook(getattr(base, part), execution_device="cpu")
        cpu_offload(base.unet, execution_device=torch.device("cpu"))

    adapter = trained_adapter(base.unet)
    expected = controlled(base, adapter)
    if when == "before":
        offload()
    with attach(base, adapter) as handle:
        if when == "after":
            offload()
        handle.set_scene([RIDING])
        assert base.unet.device.type == "meta", "nothing is offloaded"
        assert close(draw(base), expected)
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(base, dtype):
    adapter = trained_adapter(base.unet)
    expected = controlled(base, adapter)
    base.to(dtype)
    half = controlled(base, adapter)
    assert half.dtype == dtype
    assert (half - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_saved_and_reloaded_both_draw_the_same(base, tmp_path):
    adapter = trained_adapter(base.unet)
    expected = controlled(base, adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(
        tmp_path / "base", **({} if hasattr(base, "text_encoder_2") else {"safety_checker": None})
    )
    again.set_progress_bar_config(disable=True)
    assert torch.equal(controlled(again, InteractionAdapter.from_pretrained(tmp_path / "adapter")), expected)


# --- entities ---


def test_too_many_of_both_kinds(pipe, adapter):
    with (
        attach(pipe, adapter) as handle,
        pytest.raises(SceneError, match="3 interactions and entities an image, got 4"),
    ):
        handle.set_scene([RIDING, RIDING, RIDING, Entity("dog", (0.1, 0.1, 0.4, 0.4))])
