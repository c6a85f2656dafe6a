"""From a scene to a picture: what the command line does, without its flags."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from interactdiff.attach import Handle, attach
from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import (
    GUIDANCE_SCALES,
    MODEL,
    SIZES,
    ModelError,
    check_model_folder,
    default_adapter,
    lasting,
    resolve,
)
from interactdiff.picture import Record
from interactdiff.preview import preview
from interactdiff.scene import Scene, SceneError
from interactdiff.sites import denoiser_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # the last one's text has the most to say
OnStep = Callable[[int, Callable[[], Image.Image | None]], None]  # the step, from 0, and how to look at it
PATCH = 2  # latents, high and wide, that a diffusion transformer takes as one token


@dataclass(frozen=True)
class Drawer:
    """A loaded pipeline with its adapter attached: draws scenes.

    Attributes:
        pipeline: any diffusers pipeline from text with a `UNet2DConditionModel`, or with a transformer such
            as Flux and Stable Diffusion 3 have.
        handle: of the attached adapter, or None if there is none.
        model: name, absolute folder or Hub id of the model.
        adapter: the same of the adapter, or None.
    """

    pipeline: Any
    handle: Handle | None
    model: str
    adapter: str | None

    @classmethod
    def load(
        cls, model: str = MODEL, adapter: str | None = None, device: str = "auto", dtype: str = "auto"
    ) -> "Drawer":
        """Load a model, and an adapter onto it.

        Args:
            model: packaged name, folder or Hub id.
            adapter: likewise; None takes the packaged adapter of a packaged model, and none with any other.
            device: a torch device, or "auto": cuda, else mps, else cpu.
            dtype: "float32", "float16", "bfloat16", or "auto": float16 on cuda, else float32.

        Raises:
            ModelError: there is no such model or device, or the model is damaged.
            AdapterError: there is no such adapter, it is damaged, or it is made for another base.
        """
        adapter = adapter or default_adapter(model)
        place = usable_device(device)
        precision = dtype if dtype != "auto" else "float16" if place.type == "cuda" else "float32"
        if precision not in DTYPES:
            raise ModelError(f"expected a dtype of {', '.join(DTYPES)} or auto, got {precision!r}")
        pipeline_at = resolve("model", model)
        handle = weights = None
        if adapter is not None:  # first, since it is the quicker one to refuse
            weights = InteractionAdapter.from_pretrained(resolve("adapter", adapter))
        pipeline = load_pipeline(pipeline_at, place, DTYPES[precision])
        if weights is not None:
            handle = attach(pipeline, weights)
        return cls(pipeline, handle, lasting(model), None if adapter is None else lasting(adapter))

    @property
    def denoiser(self) -> Any:
        """The pipeline's U-Net or transformer."""
        return denoiser_of(self.pipeline)

    @property
    def size(self) -> int:
        """Height and width in pixels of the pictures that the model draws where none is asked for."""
        if self.model in SIZES:
            return SIZES[self.model]
        latents = _config(self.pipeline).get("sample_size") or self.pipeline.default_sample_size
        return latents * self.pipeline.vae_scale_factor

    def ask(self, scene: Scene) -> None:
        """Take a scene, or refuse it before any drawing; a prompt is refused where the pipeline would cut it.

        Raises:
            SceneError: prompt or phrases are longer than a text encoder takes, the model cannot draw that
                size, there are more interactions than the adapter takes, or there are some and no adapter.
        """
        for name in ("prompt", "negative_prompt"):
            self._check_length(name, getattr(scene, name))
        for name in ("width", "height"):
            self.check_side(name, getattr(scene, name))
        if self.handle is not None:
            self.handle.set_scene(scene.items, scene.strength, scene.schedule, fast=scene.fast)
        elif scene.items:
            raise SceneError(
                f"expected an adapter for {len(scene.interactions)} interactions and {len(scene.entities)} "
                f"entities, got none for {self.model}"
            )

    def draw(self, scene: Scene, on_step: OnStep | None = None) -> Image.Image:
        """Draw a scene, with the pipeline's progress bar; the same scene gives the same picture.

        The noise is drawn on the CPU, so a seed means the same on every device.

        Args:
            scene: what to draw.
            on_step: called after each step; what it raises ends the drawing and comes through.

        Raises:
            SceneError: as in `ask`.
        """
        self.ask(scene)
        # Given one of the two, diffusers puts its own size in the place of both.
        width, height = scene.width or self.size, scene.height or self.size

        def after_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert on_step is not None
            on_step(step, partial(preview, pipeline, tensors["latents"], height, width))
            return tensors

        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
                drawn = self.pipeline(
                    **self.told(scene),
                    num_inference_steps=scene.steps,
                    width=width,
                    height=height,
                    callback_on_step_end=None if on_step is None else after_step,
                    generator=torch.Generator("cpu").manual_seed(scene.seed),
                )
        except BaseException:
            self.pipeline.maybe_free_model_hooks()
            raise
        return drawn.images[0]

    def told(self, scene: Scene) -> dict[str, Any]:
        """Prompts and guidance of a scene, as arguments of the pipeline's call."""
        guidance = GUIDANCE_SCALES.get(self.model) if scene.guidance_scale is None else scene.guidance_scale
        return call_arguments(self.pipeline, scene.prompt, scene.negative_prompt, guidance)

    def check_side(self, name: str, pixels: int | None) -> None:
        """Refuse a side that a transformer has no whole number of tokens for; a pipeline would round it.

        Args:
            name: what the message calls it.
            pixels: a multiple of 8, which is enough for any U-Net, or None for the model's own.

        Raises:
            SceneError: it is no such number.
        """
        multiple = self.pipeline.vae_scale_factor * PATCH
        if pixels is not None and pixels % multiple and not hasattr(self.pipeline, "unet"):
            raise SceneError(f"{name}: expected a multiple of {multiple} pixels, got {pixels}")

    def record(self, scene: Scene, methods: dict[str, dict[str, Any]] | None = None) -> Record:
        """What it takes to draw the scene again, with `methods` as `methods.checked_methods` returns them."""
        denoiser = self.denoiser
        dtype = str(denoiser.dtype).removeprefix("torch.")
        return Record(scene, self.model, self.adapter, denoiser.device.type, dtype, methods=methods or {})

    def _check_length(self, name: str, text: str) -> None:
        for tokenizer, limit in text_limits(self.pipeline):
            length = len(tokenizer(text).input_ids)
            if length > limit:
                raise SceneError(
                    f"{name}: expected at most {limit} tokens, which is what the text encoder takes, "
                    f"got {length}"
                )


def call_arguments(
    pipeline: Any,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """How to tell a pipeline, whatever its kind, what to draw and how strongly that guides.

    Flux is guided in two ways. A model that was distilled from guided pictures is told the scale
    (`guidance_embeds` in its configuration) and has no use for a negative prompt. Any other is guided as
    Stable Diffusion is, which its pipelines call true CFG and do only where there is a negative prompt too.

    Args:
        pipeline: from text, with a U-Net or a transformer.
        prompt: one, or one for each picture.
        negative_prompt: likewise; None is an empty one.
        guidance_scale: up to 1 is off; None is the pipeline's default.

    Returns:
        Some of the arguments of the pipeline's call: those with what was given in them, and, where its text
        encoder takes fewer tokens than it would pad prompts to, `max_sequence_length`.
    """
    arguments: dict[str, Any] = {"prompt": prompt}
    if negative_prompt is not None:
        arguments["negative_prompt"] = negative_prompt
    parameters = signature(pipeline.__call__).parameters
    if guidance_scale is not None:
        distilled = _config(pipeline).get("guidance_embeds")
        true_cfg = "true_cfg_scale" in parameters and not distilled
        arguments["true_cfg_scale" if true_cfg else "guidance_scale"] = guidance_scale
        if true_cfg and negative_prompt is None:
            arguments["negative_prompt"] = "" if isinstance(prompt, str) else [""] * len(prompt)
    if (padded := _padded_length(pipeline)) is not None:
        arguments["max_sequence_length"] = padded
    return arguments


def text_limits(pipeline: Any) -> list[tuple[Any, int]]:
    """The tokenizers that have to take a whole prompt, and how many tokens of it the pipeline lets through.

    Beside T5, CLIP reads the beginning alone, as is usual with Flux and SD3: there only T5 counts.
    """
    if (padded := _padded_length(pipeline)) is not None:
        return [(_tokenizers(pipeline)[-1], padded)]
    return [(one, one.model_max_length) for one in _tokenizers(pipeline) if one is not None]


def _config(pipeline: Any) -> dict[str, Any]:
    """Of the pipeline's denoiser."""
    return cast(Any, denoiser_of(pipeline)).config


def _padded_length(pipeline: Any) -> int | None:
    """To how many tokens the last text encoder's prompts are padded or cut, where the call decides it."""
    argument = signature(pipeline.__call__).parameters.get("max_sequence_length")
    last = _tokenizers(pipeline)[-1]
    return None if argument is None or last is None else min(argument.default, last.model_max_length)


def _tokenizers(pipeline: Any) -> list[Any]:
    """Those that the pipeline's class has; None for one that was not loaded."""
    return [getattr(pipeline, name) for name in TOKENIZERS if hasattr(pipeline, name)]


def load_pipeline(path_or_id: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a diffusers pipeline from a folder or the Hub; from safetensors only, so that no pickle is run.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        check_model_folder(folder)
    try:
        pipeline = DiffusionPipeline.from_pretrained(path_or_id, use_safetensors=True).to(device, dtype)
    except Exception as error:  # loaders of a dozen kinds of files raise as many kinds of errors
        reason = shorten(str(error), 160, placeholder=" ...")
        raise ModelError(
            f"expected a diffusers model at {path_or_id}, got {type(error).__name__}: {reason}"
        ) from error
    kind = type(pipeline).__name__
    for part in ("tokenizer", "text_encoder"):
        if getattr(pipeline, part, None) is None:
            raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {kind} without a {part}")
    if "image" in signature(pipeline.__call__).parameters:
        raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {kind}")
    try:
        denoiser_of(pipeline)
    except AdapterError as error:
        raise ModelError(f"{path_or_id}: {error}") from None
    return pipeline


def usable_device(name: str) -> torch.device:
    """The torch device of a name, or for "auto" the best there is: cuda, mps, cpu.

    Raises:
        ModelError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, absent, without storage
        raise ModelError(f"expected a device of this machine such as cpu or cuda, got {name!r}") from None
    return device
