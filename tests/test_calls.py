"""What a denoiser's call is comes from the call and its caller, never from another pipeline's last run."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tiny import FEEDING, RIDING, close, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import flux_inputs, tiny_flux, trained_joint_adapter
from torch import Tensor

from interactdiff import AdapterError, attach
from interactdiff.calls import CallReader
from interactdiff.families import grid_of_ids


def sharing(pipe: Any) -> Any:
    """Another pipeline with the same modules, and a scheduler and a tokenizer of its own.

    Fast tokenizers keep padding and truncation as state, and are not for several threads at once.
    """
    own = {
        "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config),
        "tokenizer": copy.deepcopy(pipe.tokenizer),
    }
    other = type(pipe)(**{**pipe.components, **own}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def expected(pipe: Any, adapter: Any, **arguments: Any) -> Tensor:
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        return draw(pipe, **arguments)


def test_a_run_within_another_run_s_callback_is_another_run(pipe: Any) -> None:
    """What fast control has kept is of one pipeline's run."""
    other = sharing(pipe)

    def within(_: Any, step: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step in (1, 4):
            draw(other, "a bike", num_inference_steps=5, guidance_scale=5.0)
        return state

    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING], fast=True, schedule=0.9)
        expected = draw(pipe, num_inference_steps=8)
        assert torch.equal(draw(pipe, num_inference_steps=8, callback_on_step_end=within), expected)


def test_a_pipeline_that_shares_the_denoiser_is_read_itself(pipe: Any) -> None:
    """Neither guidance nor steps are those of the pipeline that was attached to."""
    adapter, other = trained_adapter(pipe.unet), sharing(pipe)
    runs: list[dict[str, Any]] = [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "num_inference_steps": 6}]
    alone = [expected(pipe, adapter, **run) for run in runs]
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        for _ in range(2):
            assert torch.equal(draw(pipe, **runs[0]), alone[0])
            assert torch.equal(draw(other, **runs[1]), alone[1])


def test_image_to_image_of_the_same_modules_follows_its_own_steps(pipe: Any) -> None:
    adapter = trained_adapter(pipe.unet)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def enlarge() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        options: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
        return other("a dog", image=image, generator=generator, **options).images

    with attach(other, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        alone = enlarge()
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        draw(pipe, guidance_scale=1.0)
        assert torch.equal(enlarge(), alone)


@pytest.mark.parametrize("fast", [False, True])
def test_a_view_of_the_pipeline_for_each_thread(pipe: Any, fast: bool) -> None:
    adapter = trained_adapter(pipe.unet)
    runs: list[dict[str, Any]] = [
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_inference_steps": 7},
        {"num_inference_steps": 5, "prompt": "a bike"},
    ]
    views = [sharing(pipe) for _ in runs]
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.7, fast=fast)
        alone = [draw(view, **run) for view, run in zip(views, runs, strict=True)]
        with ThreadPoolExecutor(len(runs)) as pool:
            together = list(pool.map(lambda one: draw(one[0], **one[1]), zip(views, runs, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


OTHERS = "expected the scene that this thread draws, got one that another thread has set or cleared since"


@pytest.mark.parametrize("change", ["set", "clear"])
@pytest.mark.parametrize("when", ["before the run", "within the run"])
def test_threads_that_set_scenes_over_each_other_s_are_refused(pipe: Any, change: str, when: str) -> None:
    with attach(pipe, trained_adapter(pipe.unet)) as handle, ThreadPoolExecutor(1) as pool:

        def elsewhere() -> None:
            handle.set_scene([FEEDING]) if change == "set" else handle.clear()

        def within(_: Any, step: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
            if step == 1 and when == "within the run":
                pool.submit(elsewhere).result()
            return state

        run = lambda: draw(pipe, callback_on_step_end=within, num_inference_steps=4)  # noqa: E731
        handle.set_scene([RIDING])
        if when == "before the run":
            pool.submit(elsewhere).result()
        if (change, when) == ("clear", "before the run"):
            run()  # there is no scene to be drawn
        else:
            with pytest.raises(AdapterError, match=OTHERS):
                run()
        when = ""
        handle.set_scene([RIDING])
        expected = run()
        assert torch.equal(pool.submit(run).result() if change == "clear" else run(), expected)


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
def test_a_run_under_autocast_leaves_nothing_behind(fixture: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    adapter = trained_adapter(denoiser) if fixture == "pipe" else trained_joint_adapter(denoiser)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        before = draw_dit(pipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = draw_dit(pipe)
        assert torch.equal(draw_dit(pipe), before)
    assert half.isfinite().all()
    assert (half.float() - before).abs().mean() < 0.2 * before.abs().mean()


def test_a_caller_of_ones_own_says_whether_it_guides(pipe: Any) -> None:
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with torch.no_grad(), attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        draw(pipe, guidance_scale=1.0)
        with pytest.raises(AdapterError, match=r"got another caller: give set_scene guidance=True or False"):
            pipe.unet(x, 1, context)
        drawn = []
        for guidance in (True, False):
            handle.set_scene([RIDING], guidance=guidance)
            drawn.append(pipe.unet(x, 1, context).sample)
        assert torch.equal(drawn[0][1], drawn[1][1])
        assert not close(drawn[0][0], drawn[1][0])


def test_cache_contexts_say_which_half_a_call_is() -> None:
    """Whatever the order of calls, and whoever calls."""
    transformer, inputs = tiny_flux(), flux_inputs()
    features = {phrase: torch.ones(16) for phrase in ("person", "riding", "bike")}
    with torch.no_grad():
        base = transformer(**inputs).sample
        with attach(
            transformer, trained_joint_adapter(transformer), phrase_encoder=lambda _: features
        ) as handle:
            handle.set_scene([RIDING])
            with transformer.cache_context("uncond"):
                assert torch.equal(transformer(**inputs).sample, base)
            with transformer.cache_context("cond"):
                assert not close(transformer(**inputs).sample, base)
        assert "cache_context" not in vars(transformer)


def test_arguments_are_read_by_name_whoever_has_wrapped_forward(unet: Any) -> None:
    reader = CallReader(unet, None)
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    sample, text = torch.zeros(3, 4, 6, 10), torch.zeros(3, 5, 24)
    for args, kwargs in (
        ((sample, 7, text), {}),
        ((sample,), {"timestep": torch.tensor([7, 8, 9]), "encoder_hidden_states": text}),
    ):
        call = reader.read(args, kwargs)
        assert (call.batch, call.grid, call.timestep, call.text_length) == (3, (6, 10), 7.0, 5)


def test_a_modular_pipeline_with_a_guider_is_read(xl_pipe: Any) -> None:
    """Its calls come one at a time, tagged by the guider."""
    modular = pytest.importorskip("diffusers.modular_pipelines")
    from diffusers import ClassifierFreeGuidance

    blocks = modular.StableDiffusionXLAutoBlocks().get_workflow("text2image")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        **{n: m for n, m in xl_pipe.components.items() if m is not None and n in pipe.component_names},
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    adapter = trained_adapter(xl_pipe.unet)

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {
            "height": 16,
            "width": 16,
            "num_inference_steps": 2,
            "output_type": "latent",
        }
        return pipe(prompt="a dog", generator=generator, output="images", **options)

    plain = run()
    rows: list[Any] = []
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        prepare = handle["interaction"].prepare
        handle["interaction"].prepare = lambda call: (rows.append(call.rows), prepare(call))[1]
        drawn = run()
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
        with pytest.raises(
            AdapterError, match="got another UNet2DConditionModel: attach to the pipeline again"
        ):
            pipe.update_components(unet=copy.deepcopy(type(xl_pipe.unet).from_config(xl_pipe.unet.config)))
        pipe.update_components(unet=xl_pipe.unet)
    assert sorted(set(rows)) == [("conditional",), ("unconditional",)]
    assert not torch.allclose(torch.as_tensor(drawn), torch.as_tensor(plain), atol=1e-3)
    assert torch.equal(torch.as_tensor(run()), torch.as_tensor(plain))


def test_places_of_tokens_are_one_grid_of_the_first_picture() -> None:
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    own = torch.stack([torch.zeros(12), y.flatten(), x.flatten(), torch.zeros(12)], 1)
    further = own + torch.tensor([10.0, 0, 0, 0])
    assert grid_of_ids(torch.cat([own, further])[None]) == (3, 4)
    assert grid_of_ids(own * 0.3 + 1.7) == (3, 4)
    with pytest.raises(AdapterError, match="got 12 tokens with places in 3 x 4"):
        grid_of_ids(own.flip(0))


def test_pipelines_that_called_are_not_kept_alive(pipe: Any) -> None:
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        other = sharing(pipe)
        draw(other)
        alive = weakref.ref(other)
        del other
        gc.collect()
        assert alive() is None
        draw(sharing(pipe))
