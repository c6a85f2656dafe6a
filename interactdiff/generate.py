"""From a scene to a picture: what the command line does, without its flags."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from interactdiff.attach import Handle, attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import (
    GUIDANCE_SCALES,
    MODEL,
    ModelError,
    check_model_folder,
    default_adapter,
    lasting,
    resolve,
)
from interactdiff.picture import Record
from interactdiff.scene import Scene, SceneError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Drawer:
    """A loaded pipeline with its adapter attached: draws scenes.

    Attributes:
        pipeline: any diffusers pipeline from text with a `UNet2DConditionModel`.
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

    def ask(self, scene: Scene) -> None:
        """Take a scene, or refuse it before any drawing; a prompt is refused where the pipeline would cut it.

        Raises:
            SceneError: prompt or phrases are longer than the text encoder takes, there are more interactions
                than the adapter takes, or there are some and no adapter.
        """
        for name in ("prompt", "negative_prompt"):
            self._check_length(name, getattr(scene, name))
        if self.handle is not None:
            self.handle.set_scene(scene.items, scene.strength, scene.schedule, fast=scene.fast)
        elif scene.items:
            raise SceneError(
                f"expected an adapter for {len(scene.interactions)} interactions and {len(scene.entities)} "
                f"entities, got none for {self.model}"
            )

    def draw(self, scene: Scene) -> Image.Image:
        """Draw a scene, with the pipeline's progress bar; the same scene gives the same picture.

        The noise is drawn on the CPU, so a seed means the same on every device.

        Raises:
            SceneError: as in `ask`.
        """
        self.ask(scene)
        # Given one of the two, diffusers puts its own size in the place of both.
        own = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        guidance = GUIDANCE_SCALES.get(self.model) if scene.guidance_scale is None else scene.guidance_scale
        guided = {} if guidance is None else {"guidance_scale": guidance}
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            drawn = self.pipeline(
                prompt=scene.prompt,
                negative_prompt=scene.negative_prompt,
                num_inference_steps=scene.steps,
                width=scene.width or own,
                height=scene.height or own,
                generator=torch.Generator("cpu").manual_seed(scene.seed),
                **guided,
            )
        return drawn.images[0]

    def record(self, scene: Scene) -> Record:
        """What it takes to draw the scene again."""
        unet = self.pipeline.unet
        dtype = str(unet.dtype).removeprefix("torch.")
        return Record(scene, self.model, self.adapter, unet.device.type, dtype)

    def _check_length(self, name: str, text: str) -> None:
        tokenizer = self.pipeline.tokenizer
        length, limit = len(tokenizer(text).input_ids), tokenizer.model_max_length
        if length > limit:
            raise SceneError(
                f"{name}: expected at most {limit} tokens, which is what the text encoder takes, got {length}"
            )


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
    for part in ("unet", "tokenizer", "text_encoder"):
        if getattr(pipeline, part, None) is None:
            kind = type(pipeline).__name__
            raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {kind} without a {part}")
    if "image" in inspect.signature(pipeline.__call__).parameters:
        raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {type(pipeline).__name__}")
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
