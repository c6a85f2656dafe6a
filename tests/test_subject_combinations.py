"""Subjects beside everything else that acts in a denoiser: any order, the same bits."""

from inspect import signature
from itertools import permutations
from typing import Any, cast

import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from test_features import ip_adapter_tensors, lora_tensors
from test_support import PICTURE, controlnet, from_base
from tiny import RIDING, Calls, Graphs, close, trained_adapter
from tiny import draw as draw_unet
from tiny_dit import draw, shaken, trained_joint_adapter, trained_layers
from tiny_subject import dog, half_mask, picture, trained_subject_adapter
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from interactdiff import AdapterError, Handle, attach
from interactdiff.adapter import Adapter
from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
make_flux_controlnet, make_flux_controlnet_pipeline = cast(Any, (FluxControlNetModel, FluxControlNetPipeline))
PERSON = Subject("person", picture(2), mask=half_mask())


@pytest.fixture(params=["pipe", "flux_pipe", "sd3_pipe"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def adapters_of(pipe: Any) -> dict[str, Adapter]:
    denoiser = denoiser_of(pipe)
    interaction = trained_adapter(denoiser) if hasattr(pipe, "unet") else trained_joint_adapter(denoiser)
    torch.manual_seed(0)
    windows = trained_layers(denoiser, ClearConfig(3))
    return {"interaction": interaction, "clear": windows, "subject": trained_subject_adapter(denoiser)}


def test_with_interactions_and_windows_the_order_of_attaching_changes_no_bit(any_pipe: Any) -> None:
    adapters, plain, drawn = adapters_of(any_pipe), draw(any_pipe), []
    for order in permutations(adapters):
        handles = [attach(any_pipe, adapters[order[0]]), attach(any_pipe, *(adapters[n] for n in order[1:]))]
        of: dict[str, Handle] = {name: handle for handle in handles for name in handle}
        of["clear"]["clear"].configure(min_tokens=0)
        of["subject"]["subject"].configure(encoder_weight=0.5)
        for handle in handles:
            takes = {"interaction": RIDING, "subject": PERSON}
            handle.set_scene(
                [item for name, item in takes.items() if name in handle],
                **(
                    {"all_items": [[RIDING, PERSON]]}
                    if "subject" in handle and "interaction" not in handle
                    else {}
                ),
            )
        drawn.append(draw(any_pipe))
        for handle in handles:
            handle.detach()
        assert torch.equal(draw(any_pipe), plain)
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    assert not torch.allclose(drawn[0], plain, atol=1e-3)


@pytest.mark.parametrize("beside", ["interaction", "clear"])
def test_each_of_a_pair_still_acts(any_pipe: Any, beside: str) -> None:
    adapters = adapters_of(any_pipe)
    items = {"interaction": [RIDING], "clear": []}[beside]

    def run(*names: str, subjects: tuple[Subject, ...] = ()) -> Tensor:
        with attach(any_pipe, *(adapters[name] for name in names)) as handle:
            if "clear" in names:
                handle["clear"].configure(min_tokens=0)
            handle.set_scene([*(items if beside in names else []), *subjects])
            return draw(any_pipe)

    both, alone = run(beside, "subject", subjects=(PERSON,)), run("subject", subjects=(PERSON,))
    other = run(beside)
    assert torch.equal(run(beside, "subject"), other), "attached without subjects it changes no bit"
    assert not torch.allclose(both, alone, atol=1e-4)
    assert not torch.allclose(both, other, atol=1e-4)


def test_a_window_over_everything_is_full_attention_with_references_too(any_pipe: Any) -> None:
    with attach(any_pipe, SubjectAdapter()) as handle:
        handle.set_scene([PERSON])
        expected = draw(any_pipe)
    with attach(any_pipe, SubjectAdapter(), ClearAdapter(ClearConfig(100)).eval()) as handle:
        handle["clear"].configure(min_tokens=0)
        handle.set_scene([PERSON])
        assert torch.allclose(draw(any_pipe), expected, atol=1e-3)


def test_a_pass_over_a_reference_leaves_a_schedule_and_fast_control_alone(pipe: Any) -> None:
    """Weightless subjects beside an interaction of two steps of five: its own bits."""
    adapters = adapters_of(pipe)
    for fast in (False, True):
        drawn = []
        for subjects in ([], [PERSON]):
            with attach(pipe, adapters["interaction"], SubjectAdapter()) as handle:
                handle["subject"].configure(
                    layers=0.5, reference_weight=1e-30 if subjects else 3.0, rows_at_once=1
                )
                handle.set_scene([RIDING, *subjects], 1.0, 0.4, fast=fast)
                drawn.append(draw(pipe, num_inference_steps=5))
        assert torch.allclose(drawn[0], drawn[1], atol=1e-5)


# --- beside what diffusers loads ---


def drawn(pipe: Any, **run: Any) -> Tensor:
    return (draw if hasattr(pipe, "transformer") else draw_unet)(pipe, **run)


def subject_drawn(pipe: Any, **run: Any) -> Tensor:
    with attach(pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        return drawn(pipe, **run)


@pytest.mark.parametrize("order", ["lora first", "adapter first"])
@pytest.mark.parametrize(
    ("fixture", "part", "arguments"),
    [("pipe", "unet", "cross_attention_kwargs"), ("flux_pipe", "transformer", "joint_attention_kwargs")],
)
def test_lora(fixture: str, part: str, arguments: str, order: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    tensors = lora_tensors(denoiser_of(pipe), part)
    without = subject_drawn(pipe)
    if order == "lora first":
        pipe.load_lora_weights(tensors, adapter_name="style")
        expected = subject_drawn(pipe)
    else:
        with attach(pipe, SubjectAdapter()) as handle:
            handle.set_scene([dog()])
            drawn(pipe)
            pipe.load_lora_weights(tensors, adapter_name="style")
            expected = drawn(pipe)
            assert torch.equal(subject_drawn_again(handle, pipe), expected)
    assert not close(expected, without)
    weaker = subject_drawn(pipe, **{arguments: {"scale": 0.5}})
    assert not torch.allclose(weaker, expected, atol=1e-4)
    assert torch.equal(subject_drawn(pipe), expected)
    pipe.unload_lora_weights()
    assert close(subject_drawn(pipe), without)


def subject_drawn_again(handle: Handle, pipe: Any) -> Tensor:
    handle["subject"].runner.cache.clear()
    return drawn(pipe)


def test_an_ip_adapter(pipe: Any) -> None:
    config: Any = CLIPVisionConfig
    torch.manual_seed(13)
    vision = config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(vision).eval()
    extractor = CLIPImageProcessor(size=16, crop_size=16)
    pipe.register_modules(image_encoder=encoder, feature_extractor=extractor)
    shown = {"ip_adapter_image": Image.new("RGB", (16, 16), "red")}
    pipe.load_ip_adapter(ip_adapter_tensors(pipe.unet), subfolder="", weight_name="")
    alone, both = draw_unet(pipe, **shown), subject_drawn(pipe, **shown)
    assert not torch.allclose(both, alone, atol=1e-5)
    with attach(pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        assert torch.equal(draw_unet(pipe, **shown), both)
        other = draw_unet(pipe, ip_adapter_image=Image.new("RGB", (16, 16), "blue"))
        assert len(handle["subject"].runner.cache._kept) == 1, "the IP-Adapter's picture is the sample's"
    assert not torch.allclose(other, both, atol=1e-5)
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=encoder, feature_extractor=extractor)
    without = draw_unet(pipe)
    with attach(pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        draw_unet(pipe)
        pipe.load_ip_adapter(ip_adapter_tensors(pipe.unet), subfolder="", weight_name="")
        assert torch.equal(draw_unet(pipe, **shown), both), "attached after the subject"
        pipe.unload_ip_adapter()
    assert torch.equal(draw_unet(pipe), without)


@pytest.mark.parametrize("kind", ["ControlNet", "Img2Img", "Inpaint"])
def test_controlnet_image_to_image_and_inpainting(pipe: Any, kind: str) -> None:
    extra = {"controlnet": controlnet(pipe)} if kind == "ControlNet" else {}
    other = from_base(pipe, kind, **extra)
    other.set_progress_bar_config(disable=True)
    inputs: dict[str, Any] = {"image": PICTURE, "generator": torch.Generator().manual_seed(0)}
    if kind == "Inpaint":
        inputs |= {"mask_image": half_mask(), "height": 16, "width": 16}
    if kind != "ControlNet":
        inputs["strength"] = 0.7

    def run(subjects: list[Subject]) -> Tensor:
        inputs["generator"].manual_seed(0)
        with attach(other, SubjectAdapter()) as handle:
            handle.set_scene(subjects)
            calls = Calls(other.unet)
            out = other("a dog", num_inference_steps=4, output_type="latent", **inputs).images
            assert calls.count == (4 if kind == "ControlNet" else 2) + bool(subjects)
            return out

    alone, both = run([]), run([dog()])
    assert not torch.allclose(both, alone, atol=1e-5)
    assert torch.equal(run([dog()]), both)


def test_controlnet_on_a_transformer(flux_pipe: Any) -> None:
    shape = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    shape += ("joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    config = flux_pipe.transformer.config
    net = shaken(make_flux_controlnet(**{name: config[name] for name in shape}), 8)
    names = signature(FluxControlNetPipeline.__init__).parameters.keys() & flux_pipe.components.keys()
    parts = {name: flux_pipe.components[name] for name in names}
    other = make_flux_controlnet_pipeline(**parts, controlnet=net)
    other.set_progress_bar_config(disable=True)
    alone, residuals = draw(other, control_image=PICTURE), []
    other.transformer.register_forward_pre_hook(
        lambda _, __, given: residuals.append(given.get("controlnet_block_samples") is not None),
        with_kwargs=True,
    )
    with attach(other, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        both = draw(other, control_image=PICTURE)
        assert residuals == [True, False, True], "of the picture, and not of the reference"
        assert not torch.allclose(draw(other, control_image=1 - PICTURE), both, atol=1e-4)
        assert residuals[3:] == [True, True], "the reference is kept"
    assert not torch.allclose(both, alone, atol=1e-4)
    assert torch.equal(draw(other, control_image=PICTURE), alone)


def test_an_ip_adapter_of_flux_is_refused_in_words_and_survived(flux_pipe: Any) -> None:
    """Its processors add a third output, which those that merge the reference's keys do not have."""
    expected = subject_drawn(flux_pipe)
    attention = flux_pipe.transformer.transformer_blocks[0].attn
    own = attention.processor
    refused = pytest.raises(
        AdapterError, match=r"stock attention processor .* got FluxIPAdapterAttnProcessor"
    )
    with attach(flux_pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        attention.set_processor(FluxIPAdapterAttnProcessor(32, 8))
        with refused:
            draw(flux_pipe)
        attention.set_processor(own)
        assert torch.equal(draw(flux_pipe), expected)
    attention.set_processor(FluxIPAdapterAttnProcessor(32, 8))
    with refused:
        attach(flux_pipe, SubjectAdapter())


def test_half_precision(any_pipe: Any) -> None:
    with attach(any_pipe, trained_subject_adapter(denoiser_of(any_pipe))) as handle:
        handle.set_scene([dog()])
        expected = draw(any_pipe, num_inference_steps=1)
        handle.clear()
        plain = draw(any_pipe, num_inference_steps=1)
        any_pipe.to(torch.bfloat16)
        handle.set_scene([dog()])
        half = draw(any_pipe, num_inference_steps=1)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().mean() < 0.2 * expected.abs().mean()
    assert not torch.equal(expected, plain)


def test_compiled_it_draws_the_same(flux_pipe: Any, graphs: Graphs) -> None:
    with attach(flux_pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        expected = draw(flux_pipe, num_inference_steps=3)
        handle["subject"].runner.cache.clear()
        flux_pipe.transformer.compile(backend=graphs, fullgraph=True)
        assert torch.allclose(draw(flux_pipe, num_inference_steps=3), expected, atol=1e-4)
        assert len(graphs) == 1
