"""Attaching: the base is itself again afterwards, other adapters go on working, errors are in words."""

from types import SimpleNamespace

import pytest
import torch
from tiny import FEEDING, RIDING, Calls, close, draw, trained_adapter
from torch import nn

from interactdiff.checkpoint import AdapterError
from interactdiff.handle import Handle, attach
from interactdiff.scene import Entity, Scene, SceneError

DOG = Entity("dog", (0.1, 0.1, 0.5, 0.5))


def state_of(module: nn.Module) -> dict:
    """Everything of a module that attaching could leave changed."""
    hooks = [n for n in vars(module) if n.endswith("_hooks") or "_hooks_" in n]
    return {
        "keys": list(module.state_dict()),
        "modules": [(name, id(m), m.forward) for name, m in module.named_modules()],
        "hooks": [{n: dict(vars(m)[n]) for n in hooks} for m in module.modules()],
    }


def test_detached_base_is_what_it_was(pipe, adapter):
    before, processors, picture = state_of(pipe.unet), dict(pipe.unet.attn_processors), draw(pipe)
    handle = attach(pipe, adapter)
    handle.set_scene([RIDING])
    assert list(pipe.unet.state_dict()) == before["keys"], "adapter weights are in the base's state dict"
    assert not torch.equal(draw(pipe), picture)
    handle.detach()
    handle.detach()
    assert state_of(pipe.unet) == before
    assert all(pipe.unet.attn_processors[name] is p for name, p in processors.items())
    assert torch.equal(draw(pipe), picture)


def ask_nothing(handle: Handle) -> None: ...


def ask_and_clear(handle: Handle) -> None:
    handle.set_scene([RIDING])
    handle.clear()


@pytest.mark.parametrize(
    "ask",
    [
        ask_nothing,
        ask_and_clear,
        pytest.param(lambda handle: handle.set_scene([]), id="no interactions"),
        pytest.param(lambda handle: handle.set_scene([[], []]), id="no interactions for either prompt"),
        pytest.param(lambda handle: handle.set_scene([RIDING], strength=0.0), id="strength 0"),
        pytest.param(lambda handle: handle.set_scene([RIDING], schedule=0.0), id="schedule 0"),
    ],
)
def test_attached_with_nothing_asked_changes_no_bit_and_does_no_work(pipe, adapter, ask):
    prompts = ["a dog", "a bike"]
    picture = draw(pipe, prompts)
    work = Calls(*(module for fuser in adapter.fusers.values() for module in fuser.modules()))
    with attach(pipe, adapter) as handle:
        ask(handle)
        assert torch.equal(draw(pipe, prompts), picture)
    assert work.count == 0


@pytest.mark.parametrize("ending", ["normally", "in an error"])
def test_leaving_the_block_detaches(pipe, adapter, ending):
    before = state_of(pipe.unet)
    try:
        with attach(pipe, adapter):
            if ending == "in an error":
                raise KeyError
    except KeyError:
        pass
    assert state_of(pipe.unet) == before


def test_second_adapter_is_refused_until_the_first_is_off(pipe, adapter):
    handle = attach(pipe, adapter)
    attached = state_of(pipe.unet)
    with pytest.raises(AdapterError, match="expected a denoiser without interaction attached"):
        attach(pipe.unet, adapter)
    assert state_of(pipe.unet) == attached
    handle.detach()
    with pytest.raises(AdapterError, match="got a handle that is detached"):
        handle.set_scene([RIDING])
    attach(pipe.unet, adapter).detach()


def test_another_base_is_refused_untouched(pipe, adapter):
    before = state_of(pipe.unet)
    adapter.config.base.sites.pop(next(iter(adapter.config.base.sites)))
    with pytest.raises(AdapterError, match=r"expected the base that .* 10 sites of .* got .* 11 sites of"):
        attach(pipe, adapter)
    assert state_of(pipe.unet) == before


def test_a_base_that_differs_in_its_heads_alone_is_told_apart(pipe, adapter):
    path = next(iter(adapter.config.base.sites))
    width, heads = adapter.config.base.sites[path]
    adapter.config.base.sites[path] = (width, 2 * heads)
    with pytest.raises(AdapterError, match=rf"with {path} of width {width} and {2 * heads} heads, got"):
        attach(pipe, adapter)


def test_a_name_is_no_adapter(pipe):
    with pytest.raises(
        AdapterError,
        match=r"expected adapters, such as .*, got .stickworld-inter",
    ):
        attach(pipe, "stickworld-interaction")


def test_an_adapter_that_cannot_move_leaves_nothing(pipe, adapter, monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    before = state_of(pipe.unet)
    monkeypatch.setattr(adapter, "to", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        attach(pipe, adapter)
    assert state_of(pipe.unet) == before


def test_weights_of_several_dtypes_become_one(pipe, adapter):
    next(iter(adapter.fusers.values())).half()
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        assert draw(pipe).isfinite().all()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("other", ["pipe.vae", "pipe.text_encoder"])
def test_what_has_no_denoiser_is_refused(pipe, adapter, other):
    with pytest.raises(
        AdapterError, match=r"expected a UNet2DConditionModel, .* or a pipeline that has one, got"
    ):
        attach(getattr(pipe, other.removeprefix("pipe.")), adapter)


def test_a_text_encoder_of_another_width_is_refused(pipe, unet):
    adapter = trained_adapter(unet)
    attach(unet, adapter).detach()
    pipe.text_encoder.config.hidden_size = 32
    with pytest.raises(AdapterError, match=r"expected a text encoder of width 24, .* got width 32"):
        attach(pipe, adapter)


def test_a_whole_scene_is_its_items_and_how_they_act(pipe, adapter):
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING, DOG], strength=0.5, schedule=0.7, fast=True)
        expected = draw(pipe)
        scene = Scene("a dog", interactions=(RIDING,), entities=(DOG,), strength=0.5, schedule=0.7, fast=True)
        handle.set_scene(scene)
        assert torch.equal(draw(pipe), expected)
        assert handle.describe() == "interaction: 1 scene at strength 0.5, schedule [0.7, 0, 0.3], fast"
        handle.clear()
        assert handle.describe() == ""


# --- devices, dtypes, other adapters ---


@pytest.mark.parametrize("when", ["before", "after"])
def test_follows_the_base_to_half_precision(pipe, adapter, when):
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
    if when == "before":
        pipe.to(torch.bfloat16)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        pipe.to(torch.bfloat16)
        picture = draw(pipe)
    assert picture.dtype == torch.bfloat16
    assert (picture - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_lora_before_and_after(pipe, adapter, order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def load_lora() -> None:
        torch.manual_seed(7)
        pipe.unet.add_adapter(config)

    if order == "lora first":
        load_lora()
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        if order == "adapter first":
            without = draw(pipe)
            load_lora()
            assert not close(draw(pipe), without)
        picture = draw(pipe)
    alone = draw(pipe)
    assert not close(picture, alone)
    assert not any("fuser" in name for name in pipe.unet.state_dict())
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        assert torch.equal(draw(pipe), picture)


def test_other_attention_processors_do_not_matter(pipe, adapter):
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
        pipe.enable_attention_slicing(1)
        assert close(draw(pipe), expected)
        pipe.disable_attention_slicing()
        pipe.unet.set_default_attn_processor()
        assert close(draw(pipe), expected)


def test_generator_makes_a_run_repeatable(pipe, adapter):
    def run(seed: int) -> torch.Tensor:
        return draw(pipe, latents=None, eta=1.0, generator=torch.Generator().manual_seed(seed))

    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        first = run(1)
        assert torch.equal(run(1), first)
        assert not torch.equal(run(2), first)


# --- what does not work refuses in words ---


def test_a_batch_that_scenes_cannot_explain(pipe, adapter):
    message = "^expected a batch of 2 times a multiple of 3 rows, for 3 scenes with guidance on, got 4 rows$"
    with attach(pipe, adapter) as handle:
        handle.set_scene([[RIDING], [], [FEEDING]])
        with pytest.raises(SceneError, match=message):
            draw(pipe, ["a dog", "a bike"])
        handle["interaction"].set_tokens(torch.randn(3, 9, 24))
        with pytest.raises(SceneError, match=r"^expected tokens for 2 batch rows, got 3$"):
            draw(pipe)


def test_a_pipeline_that_does_not_tell_of_guidance_has_to_be_told(pipe, adapter):
    other = SimpleNamespace(**pipe.components, _execution_device="cpu")
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with attach(other, adapter) as handle:
        base = pipe.unet(x, 1, context).sample
        handle.set_scene([RIDING])
        with pytest.raises(AdapterError, match=r"got SimpleNamespace without it: give set_scene guidance="):
            pipe.unet(x, 1, context)
        handle.set_scene([RIDING], guidance=True)
        assert not close(pipe.unet(x, 1, context).sample, base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([RIDING] * 4,), "^expected at most 3 interactions an image, got 4$"),
        (([RIDING], 2.5), r"^strength: expected a number from 0 to 2, got 2.5$"),
        (([RIDING], float("nan")), r"^strength: expected a number from 0 to 2, got nan$"),
        (([RIDING], 1.0, 1.5), "^schedule: expected a share in"),
        (
            (["person|riding|bike"],),
            "^expected items of Interaction or Entity, or a sequence of them for each prompt, ",
        ),
        (
            ([RIDING, [FEEDING]],),
            "^expected items of Interaction or Entity, or a sequence of them for each prompt, ",
        ),
        (
            (None,),
            "^expected items of Interaction or Entity, or a sequence of them for each prompt, got None$",
        ),
    ],
)
def test_a_bad_scene_is_refused_and_the_last_one_stays(pipe, adapter, arguments, message):
    with attach(pipe, adapter) as handle:
        handle.set_scene([FEEDING])
        expected = draw(pipe)
        with pytest.raises(SceneError, match=message):
            handle.set_scene(*arguments)
        assert torch.equal(draw(pipe), expected)


def test_tokens_of_another_width_are_refused(unet, adapter):
    with (
        attach(unet, adapter) as handle,
        pytest.raises(SceneError, match=r"\[batch, 3N, 24\], got \[1, 9, 7\]"),
    ):
        handle["interaction"].set_tokens(torch.randn(1, 9, 7))


def test_a_bare_unet_cannot_read_phrases(unet, adapter):
    with attach(unet, adapter) as handle, pytest.raises(AdapterError, match="to encode phrases, got none"):
        handle.set_scene([RIDING])
