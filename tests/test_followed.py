"""What scenes are made of and changes beneath them, in place: followed from the next run on, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiny import RIDING, close, draw, trained_adapter
from tiny_concept import draw as draw_concept
from tiny_concept import trained_concept
from tiny_dit import draw as draw_dit
from tiny_dit import trained_joint_adapter, trained_layers
from tiny_subject import dog, trained_subject_adapter
from torch import Tensor, nn

from interactdiff import AdapterError, Interaction, attach
from interactdiff.clear import ClearConfig, linearize
from interactdiff.fingerprints import fingerprint, weights_digest
from interactdiff.subject.adapter import SubjectAdapter

ADAPTERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "interaction": (lambda pipe: trained_adapter(pipe.unet), RIDING),
    "subject": (lambda pipe: trained_subject_adapter(pipe.unet), dog()),
}


@torch.no_grad()
def halve(module: nn.Module) -> None:
    """In place, as no counter of PyTorch's sees it."""
    for parameter in module.parameters():
        parameter.data.mul_(0.5)


def average(module: nn.Module) -> None:
    """Swap in the weights of an average, as trainers do before they draw."""
    EMAModel([nn.Parameter(0.8 * one.detach()) for one in module.parameters()]).copy_to(module.parameters())


def load(module: nn.Module) -> None:
    module.load_state_dict({name: 0.7 * tensor for name, tensor in module.state_dict().items()})


def add_lora(encoder: Any) -> None:
    torch.manual_seed(0)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def fuse_lora(encoder: Any) -> None:
    add_lora(encoder)
    for layer in encoder.modules():
        if hasattr(layer, "merge"):
            layer.merge()


CHANGES: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "an average of the adapter": ("interaction", lambda pipe, adapter: average(adapter)),
    "another state of the adapter": ("interaction", lambda pipe, adapter: load(adapter)),
    "the text encoder's data": ("interaction", lambda pipe, adapter: halve(pipe.text_encoder)),
    "a LoRA of the text encoder": ("interaction", lambda pipe, adapter: add_lora(pipe.text_encoder)),
    "a fused LoRA": ("interaction", lambda pipe, adapter: fuse_lora(pipe.text_encoder)),
    "the dtype": ("interaction", lambda pipe, adapter: pipe.to(torch.bfloat16)),
    "the denoiser's average": ("subject", lambda pipe, adapter: average(pipe.unet)),
    "the VAE's data": ("subject", lambda pipe, adapter: halve(pipe.vae)),
    "an average of the subject adapter": ("subject", lambda pipe, adapter: average(adapter)),
    "the subjects' text encoder": ("subject", lambda pipe, adapter: halve(pipe.text_encoder)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_change_in_place_are_followed(pipe: Any, kind: str) -> None:
    """A run draws what it draws where the scene is set after the change."""
    name, change = CHANGES[kind]
    make, item = ADAPTERS[name]
    adapter = make(pipe)
    with attach(pipe, adapter) as handle:
        handle.set_scene([item])
        before = draw(pipe)
        change(pipe, adapter)
        drawn = draw(pipe)
    with attach(pipe, adapter) as handle:
        handle.set_scene([item])
        assert torch.equal(draw(pipe), drawn)
    assert not torch.equal(before, drawn)


def test_a_bare_denoiser_s_scene_follows_its_adapter(unet: Any) -> None:
    adapter, x, context = trained_adapter(unet), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    features = {phrase: torch.ones(24) for phrase in ("person", "riding", "bike")}
    with torch.no_grad(), attach(unet, adapter, phrase_encoder=lambda _: features) as handle:
        handle.set_scene([RIDING])
        unet(x, 1, context)
        load(adapter)
        drawn = unet(x, 1, context).sample
        handle.set_scene([RIDING])
        assert torch.equal(unet(x, 1, context).sample, drawn)


def test_a_scene_is_encoded_once_where_nothing_changes(pipe: Any) -> None:
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        scene = handle["interaction"].scene
        draw(pipe)
        draw(pipe, guidance_scale=1.0)
        assert handle["interaction"].scene is scene


def test_fingerprints_read_odd_tensors() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    module.register_buffer("expanded", torch.ones(1).expand(50))
    module.register_buffer("flags", torch.tensor([True, False]))
    module.register_buffer("meta", torch.empty(3, device="meta"))
    before, digest = fingerprint(module), weights_digest(module)
    assert (fingerprint(module), weights_digest(module)) == (before, digest)
    module.weight.data[1] *= 2
    assert fingerprint(module) != before
    assert weights_digest(module) != digest


def test_a_digest_tells_one_changed_value_of_many() -> None:
    module = nn.Linear(100, 100)
    before = weights_digest(module)
    module.weight.data[37, 41] += 1e-3
    assert weights_digest(module) != before
    module.weight.data[37, 41] -= 1e-3
    assert weights_digest(copy.deepcopy(module).half()) != before


# --- weights come out as they went in ---


@pytest.mark.parametrize("kind", ["interaction", "subject", "joint", "windows"])
def test_an_adapter_comes_out_bit_for_bit(pipe: Any, flux_pipe: Any, kind: str) -> None:
    """Though it was in the denoiser's dtype meanwhile, and saved in its own."""
    one = pipe if kind in ADAPTERS else flux_pipe
    if kind == "windows":
        adapter: Any = trained_layers(one.transformer, ClearConfig(2))
    else:
        adapter = ADAPTERS[kind][0](one) if one is pipe else trained_joint_adapter(one.transformer)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    denoiser = one.unet if one is pipe else one.transformer
    one.to(torch.bfloat16)
    if kind == "windows":
        with linearize(one, weights=adapter, min_tokens=0):
            draw_dit(one)
    else:
        with attach(one, adapter) as handle:
            handle.set_scene([ADAPTERS.get(kind, (None, RIDING))[1]])
            draw_dit(one)
            assert next(adapter.parameters()).dtype == torch.bfloat16
            saved = adapter.exact_state()
            assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
            denoiser.to(torch.float32)
            one.to(torch.float32)
            draw_dit(one)
            assert torch.equal(next(adapter.parameters()), next(iter(before.values())))
    after = adapter.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_adapter_in_denoisers_of_two_dtypes(pipe: Any) -> None:
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
        with attach(half, adapter) as other:
            other.set_scene([RIDING])
            draw(half)
            assert torch.equal(draw(pipe), expected)
            draw(half)
        assert torch.equal(draw(pipe), expected)


def test_weights_that_were_changed_while_they_were_cast_stay_changed(pipe: Any) -> None:
    adapter = trained_adapter(pipe.unet)
    pipe.to(torch.bfloat16)
    with attach(pipe, adapter):
        load(adapter)
        changed = next(adapter.parameters()).clone()
    assert torch.equal(next(adapter.parameters()), changed)


# --- modes ---


def test_what_is_kept_serves_in_any_mode(pipe: Any) -> None:
    """Set and drawn within inference mode and autocast, then with gradients, then plainly."""
    x, context = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 5, 24)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            handle.set_scene([RIDING], guidance=True)
            draw(pipe)
        pipe.unet(x, 1, context).sample.sum().backward()
        assert x.grad is not None
        assert torch.equal(draw(pipe), expected)


def test_subjects_after_a_run_under_autocast(pipe: Any) -> None:
    adapter = trained_subject_adapter(pipe.unet)
    drawn = []
    for half_first in (False, True):
        with attach(pipe, adapter) as handle:
            handle.set_scene([dog()])
            if half_first:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    draw(pipe)
            drawn.append(draw(pipe))
    assert torch.equal(drawn[0], drawn[1])


# --- components that were replaced or taken out ---


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder"])
def test_another_encoder_beneath_a_concept_is_refused(pipe: Any, name: str) -> None:
    """Before it encodes a token that it does not know."""
    own = getattr(pipe, name)
    with attach(pipe, trained_concept(pipe)):
        expected, knowing = draw_concept(pipe), getattr(pipe, name)
        other = copy.deepcopy(own) if name == "tokenizer" else type(own)(own.config).eval()
        setattr(pipe, name, other)
        with pytest.raises(AdapterError, match=f"expected the {name} that concept was attached with, got an"):
            draw_concept(pipe)
        setattr(pipe, name, knowing)
        assert torch.equal(draw_concept(pipe), expected)
    assert "check_inputs" not in vars(pipe)


def test_another_vae_beneath_a_subject_is_refused(pipe: Any) -> None:
    with attach(pipe, trained_subject_adapter(pipe.unet)) as handle:
        handle.set_scene([dog()])
        pipe.vae = copy.deepcopy(pipe.vae)
        with pytest.raises(AdapterError, match="expected the vae that the scene was encoded with, got an"):
            draw(pipe)
        handle.set_scene([dog()])
        draw(pipe)


@pytest.mark.parametrize("kind", ["interaction", "subject"])
def test_text_encoders_that_were_taken_out_are_not_missed(pipe: Any, kind: str) -> None:
    """As to save memory, once prompts and scene are encoded; also where the pipeline is cast then."""
    adapter, items = SubjectAdapter(), [dog()]
    if kind == "interaction":
        adapter, items = trained_adapter(pipe.unet), [RIDING]
    text, negative = pipe.encode_prompt("a dog", "cpu", 1, True)

    def run(dtype: torch.dtype = torch.float32) -> Tensor:
        own = {"prompt_embeds": text.to(dtype), "negative_prompt_embeds": negative.to(dtype)}
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
        return pipe(height=16, width=16, **own, **options).images

    with attach(pipe, adapter) as handle:
        handle.set_scene(items)
        expected = run()
        pipe.text_encoder = pipe.tokenizer = None
        assert torch.equal(run(), expected)
        pipe.unet.to(torch.bfloat16)
        assert run(torch.bfloat16).isfinite().all()
        if kind == "subject":
            with pytest.raises(AdapterError, match="got it without its tokenizer and text_encoder"):
                handle.set_scene([dog(1)])


def test_encoders_that_a_scene_is_not_made_of_may_be_others(flux_pipe: Any) -> None:
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        expected = draw_dit(flux_pipe)
        flux_pipe.text_encoder_2 = copy.deepcopy(flux_pipe.text_encoder_2)  # T5: no phrase is read by it
        assert torch.equal(draw_dit(flux_pipe), expected)


def test_a_concept_may_come_and_go_beneath_a_scene(pipe: Any) -> None:
    """A phrase that has its token is encoded anew."""
    hero = Interaction("<hero>", "riding", "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))
    concept = trained_concept(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([hero])
        without = draw(pipe)
        with attach(pipe, concept):
            known = draw(pipe)
            handle.set_scene([hero])
            assert torch.equal(draw(pipe), known)
        assert not close(known, without)
        assert torch.equal(draw(pipe), without)


def test_a_pipeline_that_lacks_a_concept_s_tokens_is_named(pipe: Any) -> None:
    before = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with attach(pipe, trained_concept(pipe)):
        with pytest.warns(UserWarning, match="expected a tokenizer that knows <hero>, got another of Stable"):
            draw_concept(before)
        after = diffusers.StableDiffusionPipeline.from_pipe(pipe)
        assert torch.equal(draw_concept(after), draw_concept(pipe))


def test_saved_beside_a_concept_the_pipeline_is_its_own(pipe: Any, tmp_path: Any) -> None:
    with attach(pipe, trained_concept(pipe)):
        draw_concept(pipe)
        pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert len(again.tokenizer) == len(pipe.tokenizer)
    assert torch.equal(draw(again, "<hero>"), draw(pipe, "<hero>"))


def test_a_run_without_a_step_says_that_nothing_is_drawn_of_the_scene(pipe: Any) -> None:
    enlarge = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    run = lambda: enlarge(  # noqa: E731
        "a dog", image=torch.rand(1, 3, 16, 16), strength=0.01, num_inference_steps=8, output_type="latent"
    )
    with attach(enlarge, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        with pytest.warns(UserWarning, match="expected a run of one step at least, got none"):
            run()


def test_a_bare_denoiser_that_is_offloaded_layer_by_layer(unet: Any) -> None:
    features = {phrase: torch.ones(24) for phrase in ("person", "riding", "bike")}
    adapter, x, context = trained_adapter(unet), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    drawn = []
    for offloaded in (False, True):
        if offloaded:
            cpu_offload(unet, execution_device=torch.device("cpu"))
        with torch.no_grad(), attach(unet, adapter, phrase_encoder=lambda _: features) as handle:
            handle.set_scene([RIDING])
            drawn.append(unet(x, 1, context).sample)
    assert torch.equal(drawn[0], drawn[1])
