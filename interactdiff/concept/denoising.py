"""Calling a pipeline's denoiser at a noise level, for training and for masks; a class for each family."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from math import inf, lcm
from typing import Any

import torch
from diffusers import DDPMScheduler, FluxPipeline
from PIL import Image
from torch import Tensor

from interactdiff.concept.words import ConceptError
from interactdiff.errors import AdapterError
from interactdiff.latent_encoding import picture_latents
from interactdiff.pipeline_calls import call_arguments
from interactdiff.scene import Box
from interactdiff.sites import denoiser_of, known_family

TRAIN_STEPS = 1000  # timesteps are in [0, 1000) for every family


@dataclass(frozen=True)
class Prompt:
    """Prompts as a denoiser reads them.

    Attributes:
        arguments: of its call, for each prompt a row.
    """

    arguments: dict[str, Any]

    def repeated(self, times: int) -> "Prompt":
        """The same for a batch of so many times the prompts, each in a row."""

        def repeat(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: repeat(one) for name, one in value.items()}
            return value.repeat_interleave(times, 0)

        return Prompt(repeat(self.arguments))


@dataclass(frozen=True)
class Crop:
    """The part of a photo that is seen; boxes and masks that are given for the photo are cropped with it.

    Attributes:
        resized: width and height of the photo before it is cropped, in pixels.
        left: of the part, in pixels of the resized photo.
        top: likewise.
        width: likewise.
        height: likewise.
    """

    resized: tuple[int, int]
    left: int
    top: int
    width: int
    height: int

    @property
    def kept(self) -> Box:
        """The part, xyxy in shares of the photo's sides."""
        wide, high = self.resized
        right, bottom = self.left + self.width, self.top + self.height
        return self.left / wide, self.top / high, right / wide, bottom / high

    def box(self, box: Box) -> Box:
        """A box, xyxy in [0, 1] of the photo, as xyxy in [0, 1] of the part."""
        x0, y0, x1, y1 = self.kept
        (left, right), (top, bottom) = (
            ((low - start) / (end - start), (high - start) / (end - start))
            for low, high, start, end in ((box[0], box[2], x0, x1), (box[1], box[3], y0, y1))
        )
        return max(0.0, left), max(0.0, top), min(1.0, right), min(1.0, bottom)

    def mask(self, mask: Tensor) -> Tensor:
        """A mask [h, w] of the photo, cut to the part, to whole pixels of the mask."""
        rows, columns = mask.shape
        x0, y0, x1, y1 = self.kept
        return mask[round(y0 * rows) : round(y1 * rows), round(x0 * columns) : round(x1 * columns)]

    def restored(self, mask: Image.Image, size: tuple[int, int]) -> Image.Image:
        """A mask of the part as one of the photo of a size (width, height), black outside the part."""
        whole = Image.new(mask.mode, self.resized)
        whole.paste(mask.resize((self.width, self.height), Image.Resampling.NEAREST), (self.left, self.top))
        return whole.resize(size, Image.Resampling.NEAREST)


class Denoising(ABC):
    """What differs between families.

    Attributes:
        pipeline: from text.
        denoiser: its U-Net or transformer.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)

    @staticmethod
    def of(pipeline: Any) -> "Denoising":
        """The class for a pipeline.

        Raises:
            AdapterError: there is none.
        """
        family = known_family(denoiser_of(pipeline)).name
        if family not in BY_FAMILY:
            raise AdapterError(f"expected a base of {', '.join(BY_FAMILY)} for concepts, got {family}")
        return BY_FAMILY[family](pipeline)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes, which is not where it is while it is offloaded."""
        return self.pipeline._execution_device

    @property
    def multiple(self) -> int:
        """Of pixels, that both sides of a photo have to be; pipelines draw no others."""
        return lcm(self.pipeline.vae_scale_factor * 2, 8)

    @property
    def largest(self) -> float:
        """Of pixels, that a side of a photo may have."""
        return inf

    def sized(self, photo: Image.Image, side: int) -> Image.Image:
        """A photo with its aspect kept, of about `side` x `side` pixels, cropped to a multiple of `multiple`.

        Raises:
            ConceptError: it is too small.
        """
        least = side // 4
        if min(photo.size) < least:
            raise ConceptError(
                f"expected a photo of at least {least} pixels a side, got {photo.width} x {photo.height}"
            )
        crop = self.crop(photo.size, side)
        if max(crop.width, crop.height) > self.largest:
            raise ConceptError(
                f"expected a photo that is at most {self.largest} pixels a side at a size of {side}, got one "
                f"of {crop.width} x {crop.height}: crop it, or take a smaller size"
            )
        resized = photo.resize(crop.resized, Image.Resampling.LANCZOS)
        return resized.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))

    def crop(self, size: tuple[int, int], side: int) -> "Crop":
        """How `sized` resizes and crops a photo of a size (width, height in pixels)."""
        scale = side / (size[0] * size[1]) ** 0.5
        width, height = (max(self.multiple, round(n * scale / self.multiple) * self.multiple) for n in size)
        fit = max(width / size[0], height / size[1])
        wide, high = max(width, round(size[0] * fit)), max(height, round(size[1] * fit))
        return Crop((wide, high), (wide - width) // 2, (high - height) // 2, width, height)

    def latents(self, photo: Image.Image) -> Tensor:
        """[1, C, H, W] float32 latents of a photo: what its distribution is centred on, without noise."""
        return picture_latents(self.pipeline.vae, photo, self.device)

    @abstractmethod
    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> Prompt:
        """Prompts for pictures of a size (height, width in pixels); with gradients to new tokens."""

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, H, W] with noise, at timesteps [B] in [0, 1000)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, [B, C, H, W]."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        """What it predicts, [B, C, H, W] float32."""


class UNetDenoising(Denoising):
    """SD 1.x, 2.x and SDXL, with any prediction type of their schedulers."""

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._is_xl = self.denoiser.config.addition_embed_type == "text_time"

    @property
    def multiple(self) -> int:
        levels = len(self.denoiser.config.block_out_channels)
        return lcm(self.pipeline.vae_scale_factor * 2 ** (levels - 1), 8)

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> Prompt:
        pipe, texts = self.pipeline, list(prompts)
        if not self._is_xl:
            text, _ = pipe.encode_prompt(texts, self.device, 1, False)
            return Prompt({"encoder_hidden_states": text})
        text, _, pooled, _ = pipe.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
        width = pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(size, (0, 0), size, text.dtype, text_encoder_projection_dim=width)
        added = {"text_embeds": pooled, "time_ids": ids.to(self.device).repeat(len(texts), 1)}
        return Prompt({"encoder_hidden_states": text, "added_cond_kwargs": added})

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._schedule.add_noise(latents, noise, timesteps.long())  # type: ignore[arg-type]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self._schedule.config.prediction_type  # type: ignore[attr-defined]
        if kind == "v_prediction":
            return self._schedule.get_velocity(latents, noise, timesteps.long())  # type: ignore[arg-type]
        return latents if kind == "sample" else noise

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        out = self.denoiser(noisy.to(self.denoiser.dtype), timesteps.long(), **prompt.arguments).sample
        return out.float()


class FlowDenoising(Denoising):
    """What transformers of rectified flow share: x_s = (1 - s) x + s n, of which they predict n - x."""

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        share = (timesteps.float() / TRAIN_STEPS)[:, None, None, None]
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def _encoded(self, prompts: Sequence[str]) -> tuple[Any, ...]:
        """Of `encode_prompt`, with every prompt in each of the text encoders."""
        texts = list(prompts)
        given = call_arguments(self.pipeline, texts)
        names = signature(self.pipeline.encode_prompt).parameters
        arguments = {name: texts for name in ("prompt", "prompt_2", "prompt_3") if name in names}
        if "max_sequence_length" in given:
            arguments["max_sequence_length"] = given["max_sequence_length"]
        if "do_classifier_free_guidance" in names:
            arguments["do_classifier_free_guidance"] = False  # type: ignore[assignment]
        return self.pipeline.encode_prompt(**arguments, device=self.device)


class FluxDenoising(FlowDenoising):
    """Flux: latents as tokens of 2 x 2."""

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> Prompt:
        text, pooled, _ = self._encoded(prompts)
        return Prompt({"encoder_hidden_states": text, "pooled_projections": pooled})

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        batch, channels, height, width = noisy.shape
        dtype = self.denoiser.dtype
        tokens = FluxPipeline._pack_latents(noisy, batch, channels, height, width).to(dtype)
        ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, noisy.device, dtype)
        text_ids = torch.zeros(prompt.arguments["encoder_hidden_states"].shape[1], 3).to(ids)
        guidance = {}
        if self.denoiser.config.guidance_embeds:
            guidance = {"guidance": torch.ones(batch, device=noisy.device)}
        predicted = self.denoiser(
            hidden_states=tokens,
            timestep=(timesteps.float() / TRAIN_STEPS).to(dtype),
            img_ids=ids,
            txt_ids=text_ids,
            **prompt.arguments,
            **guidance,
        ).sample.float()
        grid = predicted.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class SD3Denoising(FlowDenoising):
    """Stable Diffusion 3 and 3.5."""

    @property
    def largest(self) -> float:
        """What the table of positions holds."""
        config = self.denoiser.config
        return config.pos_embed_max_size * config.patch_size * self.pipeline.vae_scale_factor

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> Prompt:
        text, _, pooled, _ = self._encoded(prompts)
        return Prompt({"encoder_hidden_states": text, "pooled_projections": pooled})

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
        dtype = self.denoiser.dtype
        arguments = {**prompt.arguments, "timestep": timesteps.to(dtype)}
        return self.denoiser(hidden_states=noisy.to(dtype), **arguments).sample.float()


BY_FAMILY: dict[str, type[Denoising]] = {"U-Net": UNetDenoising, "Flux": FluxDenoising, "SD3": SD3Denoising}
