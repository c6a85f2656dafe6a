"""From a scene to a picture: what the command line does, without its flags."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from interactdiff.adapter import Adapter
from interactdiff.adapter_loading import UNNAMED, AdapterChoice, GivenAdapters, chosen_adapters, load_adapters
from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.handle import Handle, attach
from interactdiff.method_specs import Cost
from interactdiff.models import MODEL, absolute_name, default_adapter, model_info, resolve
from interactdiff.picture import Record, save_picture
from interactdiff.pipeline_calls import call_arguments, denoiser_config, repeatable_call, text_limits
from interactdiff.pipeline_loading import checked_dtype, load_pipeline, usable_device
from interactdiff.preview import preview
from interactdiff.registry import (
    MethodSettings,
    adapter_method,
    checked_settings,
    method_of,
    methods,
    samplers,
    used_methods,
)
from interactdiff.scene import Scene
from interactdiff.sites import denoiser_of

OnStep = Callable[[int, Callable[[], Image.Image | None]], None]  # the step, from 0, and what makes a preview
DEFAULT_SAMPLE_SIZE = 128  # latents a side, of pipelines that say nothing of it (Z-Image): 1024 px
PATCH = 2  # latents, high and wide, that a diffusion transformer takes as one token


@dataclass(frozen=True)
class GeneratedImage:
    """A picture and how it was generated.

    Attributes:
        image: the picture.
        record: what it takes to generate it again.
    """

    image: Image.Image
    record: Record

    def save(self, path: str | PathLike[str]) -> None:
        """Write a PNG with the record inside.

        Raises:
            OSError: it cannot be written.
        """
        save_picture(self.image, Path(path), self.record)


def generate(
    scene: Scene,
    *,
    model: str = MODEL,
    adapters: GivenAdapters = None,
    methods: MethodSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> GeneratedImage:
    """Load a model with its adapters and generate a scene; for several scenes, keep a `ScenePipeline`.

    Args:
        scene: what to generate.
        model: as in `ScenePipeline.from_pretrained`.
        adapters: likewise.
        methods: methods and a sampler to be used, each with its settings, such as
            `{"high_resolution": {"scale": 2}}`.
        device: as in `ScenePipeline.from_pretrained`.
        dtype: likewise.

    Raises:
        InteractdiffError: something cannot be found, loaded or generated; the message is one sentence.
    """
    used = used_methods(scene, methods)
    pipeline = ScenePipeline.from_pretrained(model, adapters, device, dtype, methods=used)
    settings = pipeline.checked_settings(used)
    return GeneratedImage(pipeline.generate(scene, methods=used), pipeline.record(scene, settings))


@dataclass(frozen=True)
class ScenePipeline:
    """A diffusers pipeline with adapters attached, that generates scenes.

    Attributes:
        pipeline: any diffusers pipeline from text with a `UNet2DConditionModel`, or with a transformer such
            as Flux and Stable Diffusion 3 have.
        handle: of the attached adapters, or None if there are none.
        model: name, absolute folder or Hub id of the model.
        adapters: the same of the adapters, by their names, METHOD or METHOD:INSTANCE; None for one without
            weights, `UNNAMED` for one that was loaded already.
    """

    pipeline: Any
    handle: Handle | None
    model: str
    adapters: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        model: str = MODEL,
        adapters: GivenAdapters = None,
        device: str = "auto",
        dtype: str = "auto",
        *,
        methods: MethodSettings | None = None,
        variant: str | None = None,
    ) -> "ScenePipeline":
        """Load a model, and adapters onto it.

        Args:
            model: packaged name, folder or Hub id.
            adapters: by the name of their method: names, folders, files, Hub ids, or adapters that are loaded
                already. One string is of interactions. A packaged model has its packaged interaction adapter
                where none is given.
            device: a torch device, or "auto": cuda, else mps, else cpu.
            dtype: "float32", "float16", "bfloat16", or "auto": float16 on cuda, else float32.
            methods: that are going to be used; those without an adapter in `adapters` get the packaged one,
                or one that needs no weights.
            variant: of the model's weights, such as "fp16"; None takes those that are there.

        Raises:
            ModelError: there is no such model, variant or device, or the model is damaged.
            AdapterError: there is no such adapter, it is damaged, or it is made for another base.
            SceneError: there is no such method.
        """
        place = usable_device(device)
        precision = checked_dtype(dtype, place)
        pipeline_at = resolve("model", model)
        chosen = chosen_adapters(model, adapters, methods or {})
        loaded = load_adapters(chosen)  # first, since they are the quicker ones to refuse
        return cls.attached(load_pipeline(pipeline_at, place, precision, variant), model, chosen, loaded)

    @classmethod
    def attached(
        cls,
        pipeline: Any,
        model: str,
        chosen: Mapping[str, AdapterChoice],
        loaded: Mapping[str, Adapter] | None = None,
    ) -> "ScenePipeline":
        """Attach adapters to a pipeline that is loaded.

        Args:
            pipeline: a diffusers pipeline.
            model: where it was loaded from.
            chosen: as `chosen_adapters` returns them.
            loaded: as `load_adapters` returns them; None loads them.

        Raises:
            ModelError, AdapterError: as `from_pretrained` raises them; nothing is attached then.
        """
        loaded = dict(load_adapters(chosen) if loaded is None else loaded)
        for name in chosen:
            if name not in loaded:
                adapter_class = methods()[adapter_method(name)].load_adapter_class()
                loaded[name] = adapter_class.for_denoiser(denoiser_of(pipeline)).eval()
        handle = attach(pipeline, *loaded.values()) if loaded else None
        names = {
            name: absolute_name(at) if isinstance(at, str) else None if at is None else UNNAMED
            for name, at in chosen.items()
        }
        return cls(pipeline, handle, absolute_name(model), names)

    def detached(self) -> "ScenePipeline":
        """Take all adapters off; the pipeline is what it was before they were attached."""
        if self.handle is not None:
            self.handle.detach()
        return ScenePipeline(self.pipeline, None, self.model)

    @property
    def denoiser(self) -> Any:
        """The pipeline's U-Net or transformer."""
        return denoiser_of(self.pipeline)

    @property
    def adapter(self) -> str | None:
        """Name, absolute folder or Hub id of the interaction adapter, or None."""
        return self.adapters.get("interaction")

    @property
    def size(self) -> int:
        """Height and width in pixels of the pictures that the model generates by default."""
        if (own := model_info(self.model).size) is not None:
            return own
        latents = denoiser_config(self.pipeline).get("sample_size")
        latents = latents or getattr(self.pipeline, "default_sample_size", DEFAULT_SAMPLE_SIZE)
        return latents * self.pipeline.vae_scale_factor

    def unsupported(self, name: str) -> str | None:
        """Why a method or a sampler cannot be used here, in words; None if it can.

        Args:
            name: one of `registry.configurables`.
        """
        if name in samplers():
            return samplers()[name].load().unsupported(self.pipeline)
        if name in map(adapter_method, self.adapters) or default_adapter(self.model, name) is not None:
            return None
        if methods()[name].needs_weights:
            return f"expected weights for {name}, got none for {self.model}"
        try:
            methods()[name].load_adapter_class().for_denoiser(self.denoiser).check(self.denoiser)
        except InteractdiffError as error:
            return str(error)
        return None

    def checked_settings(self, used: MethodSettings) -> dict[str, dict[str, Any]]:
        """All settings of the methods and the sampler that are used.

        Raises:
            SceneError: there is no such method, sampler or setting, a value is out of range, a method has no
                adapter attached, there are two samplers, or the sampler is not for this pipeline.
        """
        settings = checked_settings(self.model, used)
        for name in settings:
            if name in samplers():
                if reason := samplers()[name].load().unsupported(self.pipeline):
                    raise SceneError(f"{name}: {reason}")
            elif name not in map(adapter_method, self.adapters):
                raise SceneError(f"{name}: expected an adapter attached for it, got none for {self.model}")
        return settings

    def set_scene(self, scene: Scene, used: MethodSettings | None = None) -> None:
        """Take a scene, or refuse it before any denoising; prompts are refused where they would be truncated.

        Args:
            scene: what is going to be generated.
            used: methods with their settings.

        Raises:
            SceneError: prompt or phrases are longer than a text encoder takes, the model cannot generate that
                size, an adapter cannot take its items, or no adapter takes some.
        """
        for name in ("prompt", "negative_prompt"):
            self._check_length(name, getattr(scene, name))
        for name in ("width", "height"):
            self.check_side(name, getattr(scene, name))
        self._check_items(scene)
        if self.handle is None:
            return
        for name in self.adapters:
            method = adapter_method(name)
            if methods()[method].settings:
                values = methods()[method].checked(self.model, (used or {}).get(method, {}))
                self.handle[name].configure(**values)
        self.handle.set_scene(scene)

    def generate(
        self, scene: Scene, on_step: OnStep | None = None, *, methods: MethodSettings | None = None
    ) -> Image.Image:
        """Generate a scene, with the pipeline's progress bar; the same scene gives the same picture.

        The noise is drawn on the CPU, so a seed means the same on every device.

        Args:
            scene: what to generate.
            on_step: called after each step; what it raises ends the sampling and comes through. Steps are
                counted over all that a sampler does.
            methods: methods and a sampler to be used, each with its settings.

        Raises:
            SceneError: as in `checked_settings` and `set_scene`.
        """
        settings = self.checked_settings(used_methods(replace(scene, extra_items=()), methods))
        self.set_scene(scene, settings)
        for name in settings:
            if name in samplers():
                return samplers()[name].load().generate(self, settings[name], scene, on_step)
        return self.call_pipeline(scene, on_step)

    def cost(self, scene: Scene, used: MethodSettings) -> Cost:
        """What generating a scene costs.

        Raises:
            SceneError: as in `checked_settings`.
        """
        settings = self.checked_settings(used)
        for name in settings:
            if name in samplers():
                return samplers()[name].load().cost(self, settings[name], scene)
        return Cost((scene.width or self.size) * (scene.height or self.size), scene.steps)

    def pipeline_kwargs(self, scene: Scene) -> dict[str, Any]:
        """Prompts and guidance of a scene, as arguments of the pipeline's call."""
        own = model_info(self.model).guidance_scale
        guidance = own if scene.guidance_scale is None else scene.guidance_scale
        return call_arguments(self.pipeline, scene.prompt, scene.negative_prompt, guidance)

    def check_side(self, name: str, pixels: int | None, *adapters: Adapter) -> None:
        """Refuse a side that a transformer has no whole number of tokens for; a pipeline would round it.

        Args:
            name: what the message calls it.
            pixels: a multiple of 8, which is enough for any U-Net, or None for the model's own.
            *adapters: that are going to be attached beside those that are; CLEAR's pooled keys need a number
                of tokens that their factor divides.

        Raises:
            SceneError: it is no such number.
        """
        pixels = pixels or self.size
        attached = [self.handle[name].adapter for name in self.adapters] if self.handle is not None else []
        factors = [getattr(getattr(one, "config", None), "down_factor", 1) for one in (*attached, *adapters)]
        multiple = self.pipeline.vae_scale_factor * PATCH * lcm(*factors)
        if pixels % multiple and not hasattr(self.pipeline, "unet"):
            raise SceneError(f"{name}: expected a multiple of {multiple} pixels, got {pixels}")

    def record(self, scene: Scene, settings: dict[str, dict[str, Any]] | None = None) -> Record:
        """What it takes to generate the scene again, with settings as `checked_settings` returns them."""
        denoiser = self.denoiser
        dtype = str(denoiser.dtype).removeprefix("torch.")
        adapters = dict(self.adapters)
        return Record(scene, self.model, adapters, denoiser.device.type, dtype, methods=settings or {})

    def call_pipeline(self, scene: Scene, on_step: OnStep | None = None) -> Image.Image:
        """Call the diffusers pipeline with a scene that `set_scene` has taken; samplers may.

        Args:
            scene: what to generate.
            on_step: as in `generate`.
        """
        # Given one of the two, diffusers puts its own size in the place of both.
        width, height = scene.width or self.size, scene.height or self.size

        def after_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert on_step is not None
            on_step(step, partial(preview, pipeline, tensors["latents"], height, width))
            return tensors

        try:
            output = repeatable_call(
                self.pipeline,
                **self.pipeline_kwargs(scene),
                num_inference_steps=scene.steps,
                width=width,
                height=height,
                callback_on_step_end=None if on_step is None else after_step,
                generator=torch.Generator("cpu").manual_seed(scene.seed),
            )
        except BaseException:
            self.pipeline.maybe_free_model_hooks()
            raise
        return output.images[0]

    def _check_items(self, scene: Scene) -> None:
        taken = {item.type for name in self.adapters for item in methods()[adapter_method(name)].items}
        left = Counter(method_of(type(item)) for item in scene.items if type(item) not in taken)
        if left:
            words = " and ".join(f"{count} {spec.key} ({name})" for (name, spec), count in left.items())
            raise SceneError(f"expected an adapter for {words}, got none for {self.model}")

    def _check_length(self, name: str, text: str) -> None:
        for tokenizer, limit in text_limits(self.pipeline):
            length = len(tokenizer(text).input_ids)
            if length > limit:
                raise SceneError(
                    f"{name}: expected at most {limit} tokens, which is what the text encoder takes, "
                    f"got {length}"
                )
