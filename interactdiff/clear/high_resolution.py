"""Coarse to fine: a picture is drawn small, then enlarged and drawn over, as CLEAR does (arXiv 2412.16112)."""

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
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
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.clear.pattern import ClearError
from interactdiff.files import why_unwritable, write_aside

FAMILIES = ((FluxPipeline, FluxImg2ImgPipeline), (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline))
STATE_FILE = "high_resolution.json"
TILE_SETTINGS = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "spatial_scale_factor")
OWN_ARGUMENTS = frozenset(  # each stage has its own of these
    "image generator strength num_inference_steps guidance_scale latents output_type return_dict sigmas "
    "num_images_per_prompt".split()
)
CALLBACKS = ("callback_on_step_end", "callback_on_step_end_tensor_inputs")  # watch a run, do not decide it


@dataclass(frozen=True)
class Stage:
    """One picture of a run.

    Attributes:
        index: 0 is drawn from text, each other one from the picture before it.
        height: in pixels.
        width: in pixels.
        grid: rows and columns of image tokens that the transformer attends over.
        steps: denoising steps that are taken.
    """

    index: int
    height: int
    width: int
    grid: tuple[int, int]
    steps: int

    @property
    def tokens(self) -> int:
        """Image tokens: 4 times as many at twice the size, which full attention takes 16 times as long for."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class HighResolutionOutput:
    """What a run drew.

    Attributes:
        images: one picture a stage, from small to large; fewer if a callback interrupted the run.
        stages: what they are.
    """

    images: list[Image.Image]
    stages: tuple[Stage, ...]


class HighResolution:
    """Draws large pictures with any Flux or SD3 pipeline, by SDEdit (arXiv 2108.01073) from smaller ones.

    The first picture is drawn from text with the pipeline's own schedule. Each next one begins as the one
    before it, enlarged and noised, and is denoised by image to image. All stages share the pipeline's modules,
    so whatever is attached to its transformer acts in all of them; the pipeline itself, its scheduler and its
    settings are as they were after a call, and after an exception in one.

    Args:
        pipeline: from text or from a picture; the other one is made of its components.
        scales: sizes of the pictures in base sizes, rising, from 1 up.
        strength: share of the steps that a picture is drawn over with, in (0, 1].
        steps: of a full run of the stages after the first; `ceil(steps * strength)` of them are taken.
        shift: of their times t towards noise, shift * t / (1 + (shift - 1) * t), from above 0. With 10, a
            strength of 0.7 starts from 0.96 noise.
        guidance_scale: of the stages after the first. A Flux that knows no guidance disregards it; there,
            `true_cfg_scale` and `negative_prompt` in the call guide all stages.
        tile: side in pixels of the tiles that the VAE works in, "auto" for its own size (1024 for Flux and SD3),
            None to leave it as it is set. Smaller tiles take less memory and stray farther from the whole.
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
        if int(steps * strength) < 1:  # diffusers would take one step, from pure noise
            raise ClearError(
                f"steps: expected at least {math.ceil(1 / strength)} for strength {strength}, got {steps}"
            )
        if not 0 < shift < math.inf:
            raise ClearError(f"shift: expected a number above 0, got {shift}")
        _tile_size(pipeline.vae, tile)

    def stages(self, height: int, width: int, base_steps: int | None = None) -> tuple[Stage, ...]:
        """What a call with these arguments would draw; nothing is computed.

        Raises:
            ClearError: in one sentence, for a size that cannot be drawn at every scale.
        """
        text_class = self._classes[0]
        if base_steps is None:
            base_steps = inspect.signature(text_class.__call__).parameters["num_inference_steps"].default
        for name, value in (("height", height), ("width", width), ("base_steps", base_steps)):
            _check_whole(name, value, 1)
        token = self.pipeline.vae_scale_factor * 2  # both families make a token of 2 x 2 latents
        largest = getattr(self.pipeline.transformer.config, "pos_embed_max_size", None) or math.inf
        begun = int(max(self.steps - min(self.steps * self.strength, self.steps), 0))  # as diffusers rounds
        stages = []
        for index, scale in enumerate(self.scales):
            sides = {"height": height * scale, "width": width * scale}
            for name, side in sides.items():
                if side % token:
                    raise ClearError(
                        f"{name}: expected a multiple of {token} px at every scale, got {side} at scale {scale}"
                    )
                if side > largest * token:
                    raise ClearError(
                        f"{name}: expected at most {largest * token} px, where the transformer's positions end, "
                        f"got {side} at scale {scale}"
                    )
            rows, columns = (int(side // token) for side in sides.values())
            taken = base_steps if index == 0 else self.steps - begun
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

        Noise is drawn on the CPU from seed and stage, so a seed means the same on every device, and the first
        picture is the one that the pipeline alone draws with it.

        Args:
            prompt: one; None if `call_arguments` has its embeddings.
            height: base size in pixels, a multiple of a token's side (16 px for Flux and SD3).
            width: likewise.
            seed: from 0 up.
            base_steps: denoising steps of the first stage; the pipeline's default if not given.
            base_guidance_scale: its guidance, likewise.
            folder: where each picture is written as soon as it is drawn. A run that was killed goes on after the
                last whole picture in it, with the same pictures as one that was not. The folder knows the
                arguments, not the weights nor what is attached to them: those are the caller's to keep equal.
            before_stage: called with each stage before it is drawn, to set what is attached by its grid.
            call_arguments: given to the pipelines, in each stage to the one that takes them.

        Raises:
            ClearError: in one sentence, for arguments that no run has, or others than the folder's run has.
            OSError: the folder cannot be written.
        """
        stages = self.stages(height, width, base_steps)
        _check_whole("seed", seed, 0, 2**64 - 1)
        self._check_call(prompt, call_arguments)
        tile = _tile_size(self.pipeline.vae, self.tile)
        saved, images = None, []
        if folder is not None:
            settings = ("scales", "strength", "steps", "shift", "guidance_scale")
            given = {"prompt": prompt, "height": height, "width": width, "seed": seed, "tile": tile}
            given |= {"base_steps": stages[0].steps, "base_guidance_scale": base_guidance_scale}
            given |= {name: getattr(self, name) for name in settings} | call_arguments
            given = {name: value for name, value in given.items() if name not in CALLBACKS}
            saved = _SavedRun(Path(folder), _model(self.pipeline, self._classes) | _written(given))
            images = saved.pictures(stages)
        base = {} if base_guidance_scale is None else {"guidance_scale": base_guidance_scale}
        total, done = (sum(stage.steps for stage in some) for some in (stages, stages[: len(images)]))
        with (
            tqdm(total=total, initial=done, disable=not self.progress, unit="step") as bar,
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            for stage in stages[len(images) :]:
                bar.set_description(
                    f"stage {stage.index + 1} of {len(stages)}, {stage.width} x {stage.height} px"
                )
                if before_stage is not None:
                    before_stage(stage)
                own = base if stage.index == 0 else self._image_arguments(stage, images[-1])
                own |= {"prompt": prompt, "generator": _generator(seed, stage.index)}
                image = self._draw(stage, call_arguments | own, tile, bar)
                if image is None:
                    break
                images.append(image)
                if saved is not None:
                    saved.add(stage, image)
        return HighResolutionOutput(images, stages[: len(images)])

    def _image_arguments(self, stage: Stage, image: Image.Image) -> dict[str, Any]:
        # Enlarged here, since a pipeline's own image processor may be set to another filter or to none: Lanczos
        # is the sharpest of PIL's, and what SDEdit is given of a picture's detail it keeps.
        large = image.resize((stage.width, stage.height), Image.Resampling.LANCZOS)
        return {"image": large, "strength": self.strength, "guidance_scale": self.guidance_scale}

    def _draw(
        self, stage: Stage, arguments: dict[str, Any], tile: int | None, bar: Any
    ) -> Image.Image | None:
        """One stage's picture, or None if a callback interrupted it."""
        pipeline = self._stage_pipeline(stage)
        watch = arguments.pop("callback_on_step_end", None)
        taken = inspect.signature(type(pipeline).__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in taken}
        try:
            with _tiles(pipeline.vae, tile, stage) as start_decoding:

                def after_step(
                    pipeline: Any, step: int, time: Any, tensors: dict[str, Any]
                ) -> dict[str, Any]:
                    bar.update()
                    if step == stage.steps - 1:
                        start_decoding()
                    return tensors if watch is None else watch(pipeline, step, time, tensors)

                drawn = pipeline(
                    height=stage.height,
                    width=stage.width,
                    num_inference_steps=stage.steps if stage.index == 0 else self.steps,
                    callback_on_step_end=after_step,
                    **arguments,
                )
        finally:
            self.pipeline.maybe_free_model_hooks()  # offloading is the caller's pipeline's, not the stage's
        return None if pipeline.interrupt else drawn.images[0]

    def _stage_pipeline(self, stage: Stage) -> Any:
        """A pipeline of the same modules with a scheduler and settings of its own.

        Not by `from_pipe`, which casts the shared modules to float32 unless told their dtype.
        """
        scheduler = self.pipeline.scheduler
        if stage.index == 0:
            scheduler = copy.deepcopy(scheduler)  # from_config would lose what set_shift has set
        else:
            options = {"shift": self.shift, "use_dynamic_shifting": False}
            scheduler = type(scheduler).from_config(scheduler.config, **options)
        made = self._classes[min(stage.index, 1)]
        components = {**self.pipeline.components, "scheduler": scheduler}
        parts = inspect.signature(made.__init__).parameters
        pipeline = made(**{name: part for name, part in components.items() if name in parts})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _check_call(self, prompt: object, call_arguments: Mapping[str, Any]) -> None:
        for name, value in {"prompt": prompt, **call_arguments}.items():
            if "prompt" in name and isinstance(value, (list, tuple)):
                raise ClearError(f"{name}: expected one text, got a {type(value).__name__} of {len(value)}")
            if name.endswith("prompt_embeds") and isinstance(value, Tensor) and len(value) != 1:
                raise ClearError(f"{name}: expected those of one prompt, got a batch of {len(value)}")
        known = {name for made in self._classes for name in inspect.signature(made.__call__).parameters}
        for name in call_arguments:
            if name in OWN_ARGUMENTS or name not in known:
                kind = self._classes[0].__name__
                raise ClearError(f"expected arguments of {kind} that all stages share, got {name}")


def _classes_of(pipeline: Any) -> tuple[Any, Any]:
    """The classes that draw from text and from a picture; the caller's own where that is a subclass."""
    for family in FAMILIES:
        if isinstance(pipeline, family):
            text, image = (type(pipeline) if isinstance(pipeline, made) else made for made in family)
            break
    else:
        names = ", ".join(made.__name__ for family in FAMILIES for made in family)
        raise ClearError(f"pipeline: expected one of {names}, got {type(pipeline).__name__}")
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        got = type(pipeline.scheduler).__name__
        raise ClearError(f"scheduler: expected FlowMatchEulerDiscreteScheduler, got {got}")
    return text, image


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        upper = "up" if most == math.inf else f"to {most}"
        raise ClearError(f"{name}: expected a whole number from {least} {upper}, got {value!r}")


def _generator(seed: int, index: int) -> torch.Generator:
    """Of one stage alone, so that a stage's noise does not depend on whether those before it were drawn."""
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
        own = vae.tile_sample_min_size  # a config's sample_size, which may be height and width
        return max((min(own) if isinstance(own, (list, tuple)) else own) // unit, 1) * unit
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < unit or tile % unit:
        raise ClearError(f"tile: expected None, auto or a multiple of {unit} px, got {tile!r}")
    return tile


def _pixels_per_latent(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def _tiles(vae: Any, tile: int | None, stage: Stage) -> Iterator[Callable[[], None]]:
    """Let the VAE work in tiles, and set it back afterwards.

    AutoencoderKL encodes and decodes in tiles. AutoencoderTiny only decodes: its encoding in tiles is written
    for 4 latent channels, Flux and SD3 have 16. Both of its ways take for granted that a latent is 8 px wide,
    and divide pictures that fit into one tile.

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


def _model(pipeline: Any, classes: tuple[Any, Any]) -> dict[str, Any]:
    """What a folder remembers of the pipeline."""
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {
        "pipeline": classes[0].__name__,
        "model": transformer.config.get("_name_or_path"),
        "dtype": str(transformer.dtype),
        "scheduler": _written(config | {"shift": scheduler.shift}),
    }


def _written(value: Any) -> Any:
    """An argument as JSON has it; tensors and pictures by the digest of what they hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _written(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(one) for one in value]
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {list(value.shape)} {_digest(held.tobytes())}"
    if isinstance(value, (Image.Image, np.ndarray)):
        array = np.asarray(value)
        return f"{array.dtype} {list(array.shape)} {_digest(array.tobytes())}"
    raise ClearError(f"expected arguments that a folder can remember, got a {type(value).__name__}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _SavedRun:
    """The finished pictures of a run, in a folder that knows the run's arguments and their digests."""

    def __init__(self, folder: Path, arguments: dict[str, Any]):
        self._folder, self._state = folder, {"arguments": arguments, "pictures": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClearError(
                f"folder: expected one that can be made, got {folder}: {error.strerror}"
            ) from None
        if reason := why_unwritable(folder / STATE_FILE):
            raise ClearError(f"folder: expected one that can be written, got {folder}: {reason}")
        if (folder / STATE_FILE).exists():
            self._resume(arguments)
        elif strays := sorted(folder.glob("stage_*.png")):
            raise ClearError(f"folder: expected no pictures of another run, got {strays[0]}")
        else:
            self._save_state()

    def pictures(self, stages: Sequence[Stage]) -> list[Image.Image]:
        """Those of the first stages, up to the first that is missing or damaged."""
        images = []
        for stage in stages:
            path = self._path(stage)
            data = path.read_bytes() if path.is_file() else b""
            if _digest(data) != self._state["pictures"].get(path.name):
                break
            images.append(PngImageFile(BytesIO(data)).convert("RGB"))  # Image.open refuses very large ones
        return images

    def add(self, stage: Stage, image: Image.Image) -> None:
        """Write a picture, then that it is finished."""
        path = self._path(stage)
        write_aside(path, lambda aside: image.save(aside, format="PNG"))
        self._state["pictures"][path.name] = _digest(path.read_bytes())
        self._save_state()

    def _path(self, stage: Stage) -> Path:
        return self._folder / f"stage_{stage.index + 1}_{stage.width}x{stage.height}.png"

    def _save_state(self) -> None:
        text = json.dumps(self._state, indent=1)
        write_aside(self._folder / STATE_FILE, lambda aside: aside.write_text(text))

    def _resume(self, arguments: dict[str, Any]) -> None:
        path = self._folder / STATE_FILE
        try:
            state = json.loads(path.read_text())
            begun, _ = dict(state["arguments"]), dict(state["pictures"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ClearError(f"folder: expected the state of a run in {path}, got something else") from None
        now = json.loads(json.dumps(arguments))
        for name in now | begun:
            if name not in now or name not in begun or begun[name] != now[name]:
                had, has = (_shown(name, some) for some in (begun, now))
                raise ClearError(
                    f"folder: expected the arguments of the run in {self._folder}, {had}, got {has}"
                )
        self._state = state


def _shown(name: str, arguments: Mapping[str, Any]) -> str:
    value = json.dumps(arguments[name]) if name in arguments else "not given"
    return f"{name} {shorten(value, 80, placeholder=' ...')}"
