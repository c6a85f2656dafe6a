"""Coarse to fine: a picture is drawn small, then enlarged and drawn over (CLEAR, arXiv 2412.16112)."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from PIL.Image import Image, Resampling
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.clear.saved_run import SavedRun
from interactdiff.clear.stage import Stage
from interactdiff.errors import ClearError
from interactdiff.pipeline_calls import repeatable_call

FAMILIES = ((FluxPipeline, FluxImg2ImgPipeline), (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline))
TILE_SETTINGS = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "spatial_scale_factor")
CALLBACKS = ("callback_on_step_end", "callback_on_step_end_tensor_inputs")  # they watch a run
OF_A_STAGE = ("image", "generator", "strength", "num_inference_steps", "guidance_scale", "latents", "sigmas")
OF_ONE_PICTURE = ("output_type", "return_dict", "num_images_per_prompt")


@dataclass(frozen=True)
class HighResolutionOutput:
    """What a run drew: one picture a stage, from small to large; fewer if a callback interrupted it."""

    images: list[Image]
    stages: tuple[Stage, ...]


class HighResolution:
    """Draws large pictures with any Flux or SD3 pipeline, by SDEdit (arXiv 2108.01073) from smaller ones.

    The first picture is drawn from text with the pipeline's own schedule. Each next one begins as the one
    before it, enlarged and noised, and is denoised by image to image. All stages share the pipeline's
    modules, so whatever is attached to its transformer acts in all of them. The pipeline, its scheduler and
    its settings are as they were after a call, and after an exception in one.

    Args:
        pipeline: from text or from a picture; the other one is made of its components.
        scales: sizes of the pictures in base sizes, rising, from 1 up.
        strength: share of its steps that a picture is drawn over with, in (0, 1].
        steps: of the stages after the first; `ceil(steps * strength)` of them are taken.
        shift: moves their times t towards noise, to shift * t / (1 + (shift - 1) * t); above 0. With 10, a
            strength of 0.7 begins at 96 % noise.
        guidance_scale: of the stages after the first. A Flux that takes no guidance disregards it; all stages
            are then guided by `true_cfg_scale` and `negative_prompt` of the call.
        tile: side in pixels of the tiles that the VAE works in; "auto" is its own size (1024 for Flux and
            SD3), None leaves it as it is set. Smaller ones take less memory and stray farther from the whole.
        progress: whether to show one bar over the steps of all stages.

    Raises:
        ClearError: in one sentence, for another kind of pipeline or scheduler, or a value out of range.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        scales: Sequence[float] = (1, 2, 4),
        strength: float = 0.7,
        steps: int = 20,
        shift: float = 10.0,
        guidance_scale: float = 7.5,
        tile: int | str | None = "auto",
        progress: bool = True,
    ):
        self.pipeline, self._classes = pipeline, _classes_of(pipeline)
        self.scales, self.strength, self.steps, self.shift = tuple(scales), strength, steps, shift
        self.guidance_scale, self.tile, self.progress = guidance_scale, tile, progress
        rising = all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False))
        if not self.scales or not rising or not 1 <= self.scales[0] <= self.scales[-1] < math.inf:
            raise ClearError(f"scales: expected rising numbers from 1 up, got {self.scales}")
        if not 0 < strength <= 1:
            raise ClearError(f"strength: expected a number above 0 and up to 1, got {strength}")
        _check_whole("steps", steps, 1)
        # diffusers rounds the steps that are taken up: all of them begin from pure noise, without the picture
        if int(steps * strength) < 1 or (self._skipped_steps() == 0 and strength < 1):
            least = math.ceil(round(1 / min(strength, 1 - strength or 1), 9))
            raise ClearError(f"steps: expected at least {least} for strength {strength}, got {steps}")
        if not 0 < shift < math.inf:
            raise ClearError(f"shift: expected a number above 0, got {shift}")
        _tile_size(pipeline.vae, tile)

    def stages(self, height: int, width: int, base_steps: int | None = None) -> tuple[Stage, ...]:
        """What a call with these arguments would draw; nothing is computed.

        Raises:
            ClearError: in one sentence, for a size that cannot be drawn at every scale.
        """
        default: int = signature(self._classes[0].__call__).parameters["num_inference_steps"].default
        first = default if base_steps is None else base_steps
        for name, value in (("height", height), ("width", width), ("base_steps", first)):
            _check_whole(name, value, 1)
        token = self.pipeline.vae_scale_factor * 2  # both families make a token of 2 x 2 latents
        largest = token * (getattr(self.pipeline.transformer.config, "pos_embed_max_size", None) or math.inf)
        stages = []
        for index, scale in enumerate(self.scales):
            sides = height * scale, width * scale
            got = f"got {sides[1]:g} x {sides[0]:g} at scale {scale}"
            if any(side % token for side in sides):
                raise ClearError(f"size: expected multiples of {token} px at every scale, {got}")
            if max(sides) > largest:
                raise ClearError(f"size: expected at most {largest} px, which SD3 has positions for, {got}")
            rows, columns = (int(side // token) for side in sides)
            taken = first if index == 0 else self.steps - self._skipped_steps()
            stages.append(Stage(index, rows * token, columns * token, (rows, columns), taken))
        return tuple(stages)

    def __call__(
        self,
        prompt: str | None = None,
        *,
        height: int,
        width: int,
        seed: int = 0,
        base_steps: int | None = None,
        base_guidance_scale: float | None = None,
        folder: str | Path | None = None,
        before_stage: Callable[[Stage], object] | None = None,
        **call_arguments: Any,
    ) -> HighResolutionOutput:
        """Draw a picture at all scales.

        Noise is drawn on the CPU from seed and stage, so a seed means the same on every device. The first
        picture is the one that the pipeline alone draws with it.

        Args:
            prompt: one; None if `call_arguments` has its embeddings.
            height: base size in pixels, a multiple of a token's side (16 px for Flux and SD3).
            width: likewise.
            seed: from 0 up.
            base_steps: denoising steps of the first stage; the pipeline's default if not given.
            base_guidance_scale: its guidance, likewise.
            folder: where each picture is written once it is drawn. A run that was killed goes on after the
                last whole picture there, and draws what it would have drawn. The folder knows the arguments,
                not the weights nor what is attached to them: those are the caller's to keep equal.
            before_stage: called with each stage before it is drawn, to set what is attached by its grid.
            call_arguments: given to the pipelines, in each stage to the one that takes them.

        Raises:
            ClearError: in one sentence, for arguments that no run has, or others than the folder's run has.
            OSError: a picture cannot be written.
        """
        stages = self.stages(height, width, base_steps)
        _check_whole("seed", seed, 0, 2**64 - 1)
        self._check_call({"prompt": prompt, **call_arguments})
        tile = _tile_size(self.pipeline.vae, self.tile)
        saved, images = None, []
        if folder is not None:
            given = {name: value for name, value in call_arguments.items() if name not in CALLBACKS}
            given |= {"prompt": prompt, "height": height, "width": width, "seed": seed, "tile": tile}
            given |= {"base_steps": stages[0].steps, "base_guidance_scale": base_guidance_scale}
            saved = SavedRun(Path(folder), self._remembered() | given)
            images = saved.pictures(stages)
        base = {} if base_guidance_scale is None else {"guidance_scale": base_guidance_scale}
        total, done = (sum(stage.steps for stage in some) for some in (stages, stages[: len(images)]))
        with tqdm(total=total, initial=done, disable=not self.progress, unit="step") as bar:
            for stage in stages[len(images) :]:
                number = f"stage {stage.index + 1} of {len(stages)}"
                bar.set_description(f"{number}, {stage.width} x {stage.height} px")
                if before_stage is not None:
                    before_stage(stage)
                shared = call_arguments | {"prompt": prompt, "generator": _generator(seed, stage.index)}
                own = self._image_arguments(stage, images[-1]) if images else base
                image = self._draw(stage, shared | own, tile, bar.update)
                if image is None:
                    break
                images.append(image)
                if saved is not None:
                    saved.add(stage, image)
        return HighResolutionOutput(images, stages[: len(images)])

    def _skipped_steps(self) -> int:
        """Of the stages after the first, as diffusers rounds."""
        return int(max(self.steps - min(self.steps * self.strength, self.steps), 0))

    def _image_arguments(self, stage: Stage, image: Image) -> dict[str, Any]:
        # Enlarged here, by what diffusers has as its default, since a pipeline's image processor may be set
        # to another filter or to none.
        large = image.resize((stage.width, stage.height), Resampling.LANCZOS)
        return {"image": large, "strength": self.strength, "guidance_scale": self.guidance_scale}

    def _draw(
        self, stage: Stage, arguments: dict[str, Any], tile: int | None, advance: Callable[[], object]
    ) -> Image | None:
        """One stage's picture, or None if a callback interrupted it."""
        pipeline = self._stage_pipeline(stage)
        watch = arguments.pop("callback_on_step_end", None)
        taken = signature(pipeline.__call__).parameters
        with _tiles(pipeline.vae, tile, stage) as start_decoding:

            def after_step(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                advance()
                if step == stage.steps - 1:
                    start_decoding()
                return tensors if watch is None else watch(pipeline, step, time, tensors)

            try:
                drawn = repeatable_call(
                    pipeline,
                    height=stage.height,
                    width=stage.width,
                    num_inference_steps=stage.steps if stage.index == 0 else self.steps,
                    callback_on_step_end=after_step,
                    **{name: value for name, value in arguments.items() if name in taken},
                )
            finally:
                self.pipeline.maybe_free_model_hooks()  # what is offloaded is the caller's pipeline's to free
        return None if pipeline.interrupt else drawn.images[0]

    def _stage_pipeline(self, stage: Stage) -> Any:
        """A pipeline of the same modules with a scheduler and settings of its own.

        Not by `from_pipe`, which casts the shared modules to float32 unless given their dtype.
        """
        scheduler = self.pipeline.scheduler
        if stage.index == 0:
            scheduler = copy.deepcopy(scheduler)  # from_config would lose what set_shift has set
        else:
            options = {"shift": self.shift, "use_dynamic_shifting": False}
            scheduler = type(scheduler).from_config(scheduler.config, **options)
        components = {**self.pipeline.components, "scheduler": scheduler}
        pipeline = self._classes[min(stage.index, 1)](**components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _check_call(self, arguments: Mapping[str, Any]) -> None:
        known = {name for made in self._classes for name in signature(made.__call__).parameters}
        for name, value in arguments.items():
            if name not in known or name in OF_A_STAGE + OF_ONE_PICTURE:
                kind = self._classes[0].__name__
                raise ClearError(f"expected arguments of {kind} that all stages share, got {name}")
            batch = isinstance(value, Tensor) and name.endswith("prompt_embeds") and len(value) != 1
            if batch or (isinstance(value, (list, tuple)) and "prompt" in name):
                raise ClearError(f"{name}: expected one prompt, got a {type(value).__name__} of {len(value)}")

    def _remembered(self) -> dict[str, Any]:
        """What a folder remembers of the pipeline and of how its pictures are enlarged."""
        scheduler, transformer = self.pipeline.scheduler, self.pipeline.transformer
        schedule = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return {
            "pipeline": self._classes[0].__name__,
            "model": transformer.config.get("_name_or_path"),
            "dtype": str(transformer.dtype),
            "schedule": schedule | {"shift": scheduler.shift},
            "enlarging": [self.scales, self.strength, self.steps, self.shift, self.guidance_scale],
        }


def _classes_of(pipeline: Any) -> tuple[Any, Any]:
    """The classes that draw from text and from a picture; the caller's own where that is a subclass."""
    scheduler = getattr(pipeline, "scheduler", None)
    for family in FAMILIES:
        if isinstance(pipeline, family):
            if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
                kind = type(scheduler).__name__
                raise ClearError(f"scheduler: expected FlowMatchEulerDiscreteScheduler, got {kind}")
            text, image = (type(pipeline) if isinstance(pipeline, made) else made for made in family)
            return text, image
    names = ", ".join(made.__name__ for family in FAMILIES for made in family)
    raise ClearError(f"pipeline: expected one of {names}, got {type(pipeline).__name__}")


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        upper = "up" if most == math.inf else f"to {most}"
        raise ClearError(f"{name}: expected a whole number from {least} {upper}, got {value!r}")


def _generator(seed: int, index: int) -> torch.Generator:
    """Of one stage alone, so that its noise does not depend on whether those before it were drawn."""
    if index > 0:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big")
    return torch.Generator("cpu").manual_seed(seed)


def _tile_size(vae: Any, tile: int | str | None) -> int | None:
    """Side in pixels of the tiles, or None where the VAE is to stay as it is."""
    if tile is None:
        return None
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        if tile == "auto":
            return None
        raise ClearError(f"tile: expected None or auto for {type(vae).__name__}, got {tile!r}")
    # Tiles overlap by a share of their side, which has to be whole latents or they do not fit together.
    unit = _pixels_per_latent(vae) * round(1 / vae.tile_overlap_factor)
    if tile == "auto":
        own = vae.tile_sample_min_size  # of AutoencoderKL its config's sample_size: one number or two
        return max((own if isinstance(own, int) else min(own)) // unit, 1) * unit
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < unit or tile % unit:
        raise ClearError(f"tile: expected None, auto or a multiple of {unit} px, got {tile!r}")
    return tile


def _pixels_per_latent(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def _tiles(vae: Any, tile: int | None, stage: Stage) -> Iterator[Callable[[], None]]:
    """Let the VAE work in tiles, and set it back afterwards.

    AutoencoderKL encodes and decodes in tiles, AutoencoderTiny only decodes: it can encode 4 channels in
    tiles, where Flux and SD3 have 16. It also divides pictures that fit into one tile, and takes a latent to
    be 8 px wide whatever its config says.

    Yields:
        What has to be called before the picture is decoded.
    """
    before = {name: getattr(vae, name) for name in TILE_SETTINGS if hasattr(vae, name)}

    def start_decoding() -> None:
        if tile is not None and max(stage.height, stage.width) > tile:
            vae.enable_tiling()

    try:
        if tile is not None:
            vae.disable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // _pixels_per_latent(vae)
            if isinstance(vae, AutoencoderKL):
                start_decoding()
            else:
                vae.spatial_scale_factor = _pixels_per_latent(vae)
        yield start_decoding
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
