"""Coarse to fine: each stage against the stock pipelines called by hand, and everything left as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image
from tiny_dit import tiny_autoencoder, tiny_flux_pipeline, tiny_sd3_pipeline

from interactdiff.clear import high_resolution
from interactdiff.clear.high_resolution import HighResolution, HighResolutionOutput
from interactdiff.clear.pattern import ClearError
from interactdiff.clear.saved_run import STATE_FILE

IMAGE_CLASSES = {"flux": FluxImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}
SIZE = {"height": 24, "width": 32}
CALL = {**SIZE, "prompt": "a cat", "seed": 7, "base_steps": 2, "max_sequence_length": 10}
OPTIONS = {"scales": (1, 2, 3), "steps": 4, "strength": 0.7, "progress": False}
STEPS = [2, 3, 3]  # of the stages; 0.7 of 4 steps are 2.8, which diffusers rounds up


@pytest.fixture(params=["flux", "flux_image", "sd3", "sd3_image"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    family, _, image = request.param.partition("_")
    pipeline = request.getfixturevalue(f"{family}_pipe")
    if image:
        pipeline = IMAGE_CLASSES[family](**pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(one: HighResolutionOutput, other: HighResolutionOutput) -> bool:
    return [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]


def state_of(pipeline: Any) -> Any:
    """All that a call could leave behind."""
    vae, scheduler = pipeline.vae, pipeline.scheduler
    numbers = ("use_tiling", "use_slicing", "tile_sample_min_size", "tile_latent_min_size")
    return (
        {name: id(part) for name, part in pipeline.components.items()},
        {name: id(value) for name, value in vars(pipeline).items()},
        {
            name: copy.deepcopy(value)
            for name, value in vars(scheduler).items()
            if name not in ("timesteps", "sigmas")
        },
        (scheduler.timesteps.tolist(), scheduler.sigmas.tolist()),
        [
            getattr(vae, name)
            for name in (*numbers, *(["spatial_scale_factor"] if "Tiny" in type(vae).__name__ else []))
        ],
        dict(pipeline._progress_bar_config),
        {type(module).__name__: module.training for module in pipeline.transformer.modules()},
    )


class Counter:
    """Counts the denoiser's calls."""

    def __init__(self, pipeline: Any):
        self.calls = 0
        pipeline.transformer.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def stop_in(stage: int, error: type[BaseException]) -> Callable[..., Any]:
    """A callback that raises in the last step of a stage, counted from 0."""
    steps = 0

    def callback(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        if steps == sum(STEPS[: stage + 1]):
            raise error("stopped")
        return tensors

    return callback


def test_stages_have_the_sizes_grids_and_steps_that_are_drawn(flux_pipe: Any):
    helper = HighResolution(flux_pipe, **OPTIONS)
    stages = helper.stages(24, 32, base_steps=2)
    assert [(s.height, s.width) for s in stages] == [(24, 32), (48, 64), (72, 96)]
    assert [s.grid for s in stages] == [(6, 8), (12, 16), (18, 24)]
    assert [s.steps for s in stages] == STEPS
    lengths = []
    flux_pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["hidden_states"].shape[1]), with_kwargs=True
    )
    drawn = helper(**CALL)
    assert drawn.stages == stages
    assert [image.size for image in drawn.images] == [(s.width, s.height) for s in stages]
    assert lengths == [s.grid[0] * s.grid[1] for s in stages for _ in range(s.steps)]
    assert helper.stages(24, 32)[0].steps == 28, "the pipeline's default"


@pytest.mark.parametrize(("steps", "strength"), [(1, 1), (4, 0.25), (4, 0.7), (5, 0.8), (10, 0.3), (20, 0.7)])
def test_a_picture_is_drawn_over_and_not_lost(flux_pipe: Any, steps: int, strength: float):
    helper = HighResolution(flux_pipe, **OPTIONS | {"scales": (1, 2), "steps": steps, "strength": strength})
    taken = helper.stages(24, 32)[1].steps
    counter = Counter(flux_pipe)
    drawn = [helper._draw(*stage_from(helper, colour)) for colour in ("black", "white")]
    assert counter.calls == 2 * taken
    lost = cast(Any, drawn[0]).tobytes() == cast(Any, drawn[1]).tobytes()
    assert lost == (strength == 1)


def stage_from(helper: HighResolution, colour: str) -> Any:
    """What `_draw` takes to draw the second stage over a picture of one colour."""
    stage = helper.stages(24, 32)[1]
    arguments = helper._image_arguments(stage, Image.new("RGB", (32, 24), colour))
    arguments |= {"prompt": "a cat", "max_sequence_length": 10, "generator": torch.Generator().manual_seed(0)}
    return stage, arguments, None, lambda: None


def test_the_defaults_are_the_published_ones(flux_pipe: Any):
    helper = HighResolution(flux_pipe)
    assert [s.steps for s in helper.stages(1024, 1024, 28)] == [28, 14, 14]
    assert [s.height for s in helper.stages(1024, 1024, 28)] == [1024, 2048, 4096]
    scheduler = helper._stage_pipeline(helper.stages(32, 32)[1]).scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=0.5)
    assert scheduler.sigmas[6].item() == pytest.approx(10 * 0.7 / (1 + 9 * 0.7))


@pytest.mark.parametrize("family", ["flux", "flux_guided", "sd3"])
def test_each_stage_is_what_the_stock_pipeline_draws(family: str, tokenizer: Any):
    if family == "sd3":
        pipe, more = tiny_sd3_pipeline(tokenizer), {"negative_prompt": "dog"}
    else:
        pipe = tiny_flux_pipeline(tokenizer, guidance_embeds=family == "flux_guided")
        more = {"negative_prompt": "dog", "true_cfg_scale": 2.0}
    text = {"prompt": "a cat", "max_sequence_length": 10, **more}
    drawn = HighResolution(pipe, **OPTIONS)(**CALL, base_guidance_scale=3.0, **more)

    by_hand = [
        pipe(
            **text,
            **SIZE,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
        ).images[0]
    ]
    shifted = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, shift=10.0, use_dynamic_shifting=False
    )
    image_class = IMAGE_CLASSES[family.partition("_")[0]]
    image_pipe = image_class(**{**pipe.components, "scheduler": shifted})
    image_pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()
    for stage in (1, 2):
        size = {name: side * (stage + 1) for name, side in SIZE.items()}
        # the pipeline enlarges by itself here: the same filter
        drawn_by_hand = image_pipe(
            **text,
            **size,
            image=by_hand[-1],
            strength=0.7,
            num_inference_steps=4,
            guidance_scale=7.5,
            generator=high_resolution._generator(7, stage),
        )
        by_hand.append(drawn_by_hand.images[0])
    for mine, theirs in zip(drawn.images, by_hand, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_guidance_and_arguments_of_one_pipeline_reach_their_stages(
    flux_pipe: Any, sd3_pipe: Any, tokenizer: Any
):
    guided = tiny_flux_pipeline(tokenizer, guidance_embeds=True)
    for pipe in (guided, sd3_pipe):
        outputs = [
            HighResolution(pipe, **OPTIONS | {"scales": (1, 2)}, guidance_scale=guidance)(**CALL)
            for guidance in (2.0, 7.5)
        ]
        assert outputs[0].images[0].tobytes() == outputs[1].images[0].tobytes()
        assert outputs[0].images[1].tobytes() != outputs[1].images[1].tobytes()
    helper = HighResolution(sd3_pipe, **OPTIONS)
    plain, skipping = helper(**CALL), helper(**CALL, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    assert plain.images[0].tobytes() != skipping.images[0].tobytes(), "text to image alone takes these"


def test_embeddings_in_the_place_of_a_prompt(flux_pipe: Any, tmp_path: Path):
    helper = HighResolution(flux_pipe, **OPTIONS)
    with torch.no_grad():
        embeds, pooled, _ = flux_pipe.encode_prompt("a cat", None, max_sequence_length=10)
    call = {**CALL, "prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    pairs = zip(helper(**call, folder=tmp_path).images, helper(**CALL).images, strict=True)
    # another place in memory may round another way, once in many runs
    assert all(np.abs(np.subtract(*pair, dtype=int)).max() <= 1 for pair in pairs)
    with pytest.raises(ClearError, match="prompt_embeds: expected"):
        helper(**{**call, "prompt_embeds": embeds + 1}, folder=tmp_path)


def test_a_seed_repeats_a_run_and_stages_have_noise_of_their_own(flux_pipe: Any):
    helper = HighResolution(flux_pipe, **OPTIONS)
    torch.manual_seed(1)
    one = helper(**CALL)
    torch.manual_seed(2)
    assert same(one, helper(**CALL))
    other = helper(**{**CALL, "seed": 8})
    assert all(a.tobytes() != b.tobytes() for a, b in zip(one.images, other.images, strict=True))
    seeds = {high_resolution._generator(seed, index).initial_seed() for seed in (0, 1) for index in (0, 1, 2)}
    assert len(seeds) == 6


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_the_pipeline_is_left_as_it_was(any_pipe: Any, vae: str, error: Any):
    if vae == "tiny":
        any_pipe.vae = tiny_autoencoder(4)
    any_pipe.scheduler.set_shift(2.0)
    any_pipe.scheduler.set_timesteps(4)
    any_pipe.vae.use_slicing = True
    any_pipe.set_progress_bar_config(desc="mine")
    before = state_of(any_pipe)
    helper = HighResolution(any_pipe, **OPTIONS, tile=32)
    if error is None:
        helper(**CALL)
    else:
        with pytest.raises(error, match="stopped"):
            helper(**CALL, callback_on_step_end=stop_in(1, error))
    assert state_of(any_pipe) == before


def test_pictures_are_written_one_by_one_and_a_killed_run_goes_on(any_pipe: Any, tmp_path: Path):
    helper = HighResolution(any_pipe, **OPTIONS)
    whole = helper(**CALL, folder=tmp_path / "whole")
    assert same(whole, helper(**CALL)), "a folder changes nothing"
    for stage in range(3):
        folder = tmp_path / f"killed in {stage}"
        with pytest.raises(KeyboardInterrupt):
            helper(**CALL, folder=folder, callback_on_step_end=stop_in(stage, KeyboardInterrupt))
        assert len(list(folder.glob("*.png"))) == stage
        counter = Counter(any_pipe)
        assert same(helper(**CALL, folder=folder), whole)
        assert counter.calls == sum(STEPS[stage:])
        assert same(helper(**CALL, folder=folder), whole)
        assert counter.calls == sum(STEPS[stage:]), "all pictures were there"
    names = ["high_resolution.json", "stage_1_32x24.png", "stage_2_64x48.png", "stage_3_96x72.png"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == names
    for name, image in zip(names[1:], whole.images, strict=True):
        with Image.open(tmp_path / "whole" / name) as written:
            assert written.tobytes() == image.tobytes()


@pytest.mark.parametrize("damage", ["half", "empty", "missing", "another", "unrecorded"])
def test_a_damaged_picture_counts_as_not_drawn(flux_pipe: Any, tmp_path: Path, damage: str):
    helper = HighResolution(flux_pipe, **OPTIONS)
    whole = helper(**CALL, folder=tmp_path)
    path = tmp_path / "stage_2_64x48.png"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another":
        Image.new("RGB", (64, 48)).save(path)
    elif damage == "unrecorded":  # killed after the picture was renamed and before the state was
        state = tmp_path / STATE_FILE
        state.write_text(state.read_text().replace(path.name, "other.png"))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    counter = Counter(flux_pipe)
    assert same(helper(**CALL, folder=tmp_path), whole)
    assert counter.calls == sum(STEPS[1:])
    assert path.read_bytes() == data


def test_other_arguments_are_refused_and_nothing_is_overwritten(flux_pipe: Any, tmp_path: Path):
    folder = tmp_path / "run"
    HighResolution(flux_pipe, **OPTIONS)(**CALL, folder=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(message: str, pipeline: Any = flux_pipe, options: Any = {}, **call: Any) -> None:  # noqa: B006
        with pytest.raises(ClearError, match=message):
            HighResolution(pipeline, **OPTIONS | options)(**CALL | call, folder=folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    refused(r'^prompt: expected "a cat", as the run in .* has it, got "a dog"$', prompt="a dog")
    refused("seed: expected 7, as", seed=8)
    refused("height: expected 24", height=32)
    refused("base_steps: expected 2", base_steps=3)
    refused("true_cfg_scale: expected null, .* got 2.0$", true_cfg_scale=2.0)
    refused("enlarging: expected", options={"scales": (1, 2)})
    refused("tile: expected 32, .* got 40", options={"tile": 40})
    shifted = copy.copy(flux_pipe)
    shifted.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    refused("schedule: expected", pipeline=shifted)
    flux_pipe.scheduler.set_shift(2.0)  # which its config does not tell
    refused("schedule: expected")
    flux_pipe.scheduler.set_shift(3.0)
    same_run = HighResolution(flux_pipe, **OPTIONS | {"scales": (1.0, 2.0, 3.0), "progress": True})
    counter = Counter(flux_pipe)
    same_run(**CALL, folder=folder, callback_on_step_end=stop_in(0, ValueError))
    assert counter.calls == 0

    (folder / STATE_FILE).write_text("[]")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused("expected the state of a run in .*, got something else")
    (folder / STATE_FILE).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused("expected no pictures of anything else, got .*stage_1_32x24.png")
    before |= {"a file": b""}
    (folder / "a file").touch()
    with pytest.raises(ClearError, match=r"folder: expected one that can be written, got .*a file: "):
        HighResolution(flux_pipe, **OPTIONS)(**CALL, folder=folder / "a file")
    with pytest.raises(ClearError, match="expected arguments that a folder can remember, got a object"):
        HighResolution(flux_pipe, **OPTIONS)(
            **CALL, folder=tmp_path / "new", joint_attention_kwargs={"scale": object()}
        )


def test_callbacks_act_and_an_interrupted_picture_is_dropped(flux_pipe: Any, tmp_path: Path):
    helper = HighResolution(flux_pipe, **OPTIONS)
    seen: list[Any] = []

    def callback(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sorted(tensors)))
        pipeline._interrupt = len(seen) == 3
        return {"latents": tensors["latents"] * 0.5}

    watch = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    drawn = helper(**CALL, folder=tmp_path, **watch)
    assert seen == [(step, ["latents", "prompt_embeds"]) for step in (0, 1, 0)]
    assert len(drawn.images) == len(drawn.stages) == len(list(tmp_path.glob("*.png"))) == 1
    assert drawn.images[0].tobytes() != helper(**CALL).images[0].tobytes()


def test_before_stage_is_called_for_what_is_drawn(flux_pipe: Any, tmp_path: Path):
    helper = HighResolution(flux_pipe, **OPTIONS)
    seen: list[Any] = []
    helper(**CALL, folder=tmp_path, before_stage=seen.append)
    assert tuple(seen) == helper.stages(24, 32, 2)
    (tmp_path / "stage_3_96x72.png").unlink()
    seen.clear()
    helper(**CALL, folder=tmp_path, before_stage=seen.append)
    assert tuple(seen) == helper.stages(24, 32, 2)[2:]


def test_one_bar_over_the_steps_of_all_stages(flux_pipe: Any, tmp_path: Path, monkeypatch: Any):
    bars: list[Any] = []

    class Bar(high_resolution.tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options, file=open("/dev/null", "w"), mininterval=0)  # noqa: SIM115
            bars.append(self)
            self.said: list[str] = []

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            self.said.append(desc or "")

    monkeypatch.setattr(high_resolution, "tqdm", Bar)
    helper = HighResolution(flux_pipe, **OPTIONS | {"progress": True})
    helper(**CALL, folder=tmp_path)
    assert [(bar.total, bar.n) for bar in bars] == [(8, 8)]
    assert bars[0].said == [
        "stage 1 of 3, 32 x 24 px",
        "stage 2 of 3, 64 x 48 px",
        "stage 3 of 3, 96 x 72 px",
    ]
    (tmp_path / "stage_3_96x72.png").unlink()
    helper(**CALL, folder=tmp_path)
    assert [(bar.total, bar.initial, bar.n) for bar in bars[1:]] == [(8, 5, 8)]
    assert bars[1].said == ["stage 3 of 3, 96 x 72 px"]


def test_offloaded_modules_draw_the_same(flux_pipe: Any):
    expected = HighResolution(flux_pipe, **OPTIONS)(**CALL)
    for part in flux_pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"))
    freed: list[int] = []
    flux_pipe.maybe_free_model_hooks = lambda: freed.append(1)
    assert same(HighResolution(flux_pipe, **OPTIONS)(**CALL), expected)
    assert next(flux_pipe.transformer.parameters()).device.type == "meta"
    assert len(freed) == 3


def test_half_precision_stays_what_it_is(flux_pipe: Any):
    flux_pipe.to(torch.bfloat16)
    drawn = HighResolution(flux_pipe, **OPTIONS)(**CALL)
    assert flux_pipe.transformer.dtype == flux_pipe.vae.dtype == torch.bfloat16
    assert [image.size for image in drawn.images] == [(32, 24), (64, 48), (96, 72)]
