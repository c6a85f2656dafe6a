"""Who calls a denoiser, and with what of its pictures: followed, or refused by the caller's name."""

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import FEEDING, RIDING, Calls, close, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import trained_joint_adapter
from torch import Tensor

from interactdiff import AdapterError, attach

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

# --- parts of a picture, and other numbers of rows than guidance has ---


class InWindows(StableDiffusionPipeline):
    """Denoises one half of the picture after the other, as MultiDiffusion, DemoFusion and tilers do."""

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 2) -> Tensor:  # type: ignore[override]
        self._guidance_scale = 1.0
        text, _ = self.encode_prompt(prompt, "cpu", 1, False)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
        with self.progress_bar(total=num_inference_steps):
            for timestep in self.scheduler.timesteps:
                noise = [self.predict(half, timestep, text) for half in latents.chunk(2, 3)]
                latents = self.scheduler.step(torch.cat(noise, 3), timestep, latents).prev_sample
        return latents

    def predict(self, window: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(window, timestep, encoder_hidden_states=text).sample


class HalfAfterHalf(StableDiffusionPipeline):
    """Calls once for each half of guidance, as what saves memory does, and says nothing of which it is."""

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:  # type: ignore[override]
        self._guidance_scale = 3.0
        text, negative = self.encode_prompt(prompt, "cpu", 1, True)
        self.scheduler.set_timesteps(1)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with self.progress_bar(total=1):
            uncond, cond = (
                self.unet(latents, 500, encoder_hidden_states=half).sample for half in (negative, text)
            )
        return uncond + 3 * (cond - uncond)


def of(pipe: Any, kind: Any) -> Any:
    parts = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    known = signature(kind.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in known}
    other = kind(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def panorama(pipe: Any) -> Tensor:
    """Latents of 64 x 72: two windows of 64 x 64."""
    return pipe(
        "a dog", height=128, width=144, num_inference_steps=1, output_type="latent", guidance_scale=3.0
    ).images


CALLERS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "own windows": (
        InWindows,
        lambda pipe: pipe("a dog"),
        r"InWindows .* latents of 8 x 16, got 8 x 8: boxes",
    ),
    "panorama": (
        diffusers.StableDiffusionPanoramaPipeline,
        panorama,
        "StableDiffusionPanoramaPipeline to denoise its whole picture .* latents of 64 x 72, got 64 x 64",
    ),
    "editing prompts": (
        diffusers.SemanticStableDiffusionPipeline,
        lambda pipe: draw(pipe, editing_prompt=["a bike", "a child"]),
        "SemanticStableDiffusionPipeline to call its denoiser with 2 rows for each of 1 pictures, got 4 rows",
    ),
    "one half of guidance in a call": (
        HalfAfterHalf,
        lambda pipe: pipe("a dog"),
        "HalfAfterHalf to call its denoiser with 2 rows for each of 1 pictures, got 1 rows",
    ),
}


@pytest.mark.parametrize("kind", CALLERS)
def test_parts_of_a_picture_are_refused_by_name(pipe: Any, kind: str) -> None:
    """Also where it was said whether batches come in two halves, as for pipelines that do not say it."""
    cls, run, words = CALLERS[kind]
    other = of(pipe, cls)
    with attach(other, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING], guidance=True if kind == "editing prompts" else None)
        with pytest.raises(AdapterError, match=words):
            run(other)
        handle.clear()
        run(other)


def test_such_pipelines_are_controlled_where_they_call_as_others_do(pipe: Any) -> None:
    """A panorama of one window without guidance, and editing without an editing prompt, are plain runs."""
    adapter = trained_adapter(pipe.unet)
    size = {"height": 16, "width": 16}
    for kind, scale, guidance in (
        (diffusers.StableDiffusionPanoramaPipeline, 1.0, None),
        (diffusers.SemanticStableDiffusionPipeline, 3.0, True),
    ):
        with attach(pipe, adapter) as handle:
            handle.set_scene([RIDING])
            expected = draw(pipe, guidance_scale=scale)
        other = of(pipe, kind)
        with attach(other, adapter) as handle:
            handle.set_scene([RIDING], guidance=guidance)
            assert torch.allclose(draw(other, guidance_scale=scale, **size), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["text to image", "image to image"])
def test_a_batch_of_prompts_and_pictures_is_no_part(dit_pipe: Any, kind: str) -> None:
    """Two prompts with two pictures each, in the packed latents of Flux and in those of SD3."""
    options: dict[str, Any] = {"num_images_per_prompt": 2}
    pipe = dit_pipe
    if kind == "image to image":
        pipe = getattr(diffusers, type(dit_pipe).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(
            dit_pipe
        )
        pipe.set_progress_bar_config(disable=True)
        options |= {"image": torch.rand(1, 3, 32, 32), "strength": 1.0}
    with attach(pipe, trained_joint_adapter(pipe.transformer)) as handle:
        plain = draw_dit(pipe, **options)
        handle.set_scene([RIDING])
        drawn = draw_dit(pipe, **options)
    assert len(drawn) == 2
    assert all(not close(a, b) for a, b in zip(drawn, plain, strict=True))


# --- what was replaced beneath an adapter ---


def test_another_denoiser_is_found_when_a_run_starts(pipe: Any) -> None:
    own = pipe.unet
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
        pipe.unet = copy.deepcopy(type(own).from_config(own.config))
        with pytest.raises(
            AdapterError, match="got another UNet2DConditionModel: attach to the pipeline again"
        ):
            draw(pipe)
        handle.clear()
        draw(pipe)
        pipe.unet = own
        handle.set_scene([RIDING])
        assert torch.equal(draw(pipe), expected)
    assert "progress_bar" not in vars(pipe)


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer"])
def test_another_text_encoder_is_found_when_a_run_starts(pipe: Any, name: str) -> None:
    """And a scene that is set again is encoded with it."""
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        other = copy.deepcopy(getattr(pipe, name))
        if name == "text_encoder":
            torch.nn.init.normal_(other.final_layer_norm.weight)
        setattr(pipe, name, other)
        with pytest.raises(
            AdapterError, match=f"expected the {name} that .* got another: set the scene again"
        ):
            draw(pipe)
        handle.set_scene([RIDING])
        drawn = draw(pipe)
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        assert torch.equal(draw(pipe), drawn)


def test_a_pipeline_s_own_progress_bar_stays(pipe: Any) -> None:
    own = pipe.progress_bar = lambda *_, **__: StableDiffusionPipeline.progress_bar(pipe, total=1)
    with attach(pipe, trained_adapter(pipe.unet)):
        draw(pipe)
    assert vars(pipe)["progress_bar"] is own


def test_another_scheduler_is_followed(pipe: Any) -> None:
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        draw(pipe)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        drawn = draw(pipe, num_inference_steps=6)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        assert torch.equal(draw(pipe, num_inference_steps=6), drawn)


# --- shares of a run ---


def acting(handle: Any, adapter: Any, run: Callable[[], Any]) -> int:
    """In how many denoiser calls fusers acted."""
    calls = Calls(next(iter(adapter.fusers.values())).ff)
    run()
    return calls.count


def test_a_share_of_a_few_steps_has_one(pipe: Any) -> None:
    """Also where image to image leaves one step of four."""
    enlarge = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    enlarge.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16)
    runs: list[tuple[float, Callable[[], Any]]] = [
        (0.9, lambda: draw(pipe, num_inference_steps=1)),
        (0.2, lambda: draw(pipe, num_inference_steps=4)),
        (
            0.9,
            lambda: enlarge(
                "a dog", image=picture, strength=0.3, num_inference_steps=4, output_type="latent"
            ),
        ),
    ]
    for share, run in runs:
        adapter = trained_adapter(pipe.unet)
        with attach(pipe, adapter) as handle:
            handle.set_scene([RIDING], schedule=share)
            assert acting(handle, adapter, run) == 1


@pytest.mark.parametrize(("share", "calls"), [(1.0, 4), (0.5, 2), (0.2, 1)])
def test_a_scene_set_in_the_middle_has_shares_of_the_steps_that_remain(
    pipe: Any, share: float, calls: int
) -> None:
    """Of 6 steps 4 remain: and the picture is what it is where only those steps were controlled."""
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:

        def set_at_the_second(_: Any, step: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                handle.set_scene([FEEDING], schedule=share)
            return state

        def steered(_: Any, step: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                handle.set_scene([FEEDING])
            if step == 1 + calls:
                handle.clear()
            return state

        options: dict[str, Any] = {"num_inference_steps": 6}
        run = lambda: draw(pipe, callback_on_step_end=set_at_the_second, **options)  # noqa: E731
        assert acting(handle, adapter, run) == calls
        handle.clear()
        drawn = run()
        handle.clear()
        assert torch.equal(draw(pipe, callback_on_step_end=steered, **options), drawn)
