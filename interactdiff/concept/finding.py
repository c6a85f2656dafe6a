"""Finds concepts in a photo: noises it a little, and reads where a denoiser attends to their words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.binding import ConceptBinding
from interactdiff.concept.capture import AttentionCapture, Layers
from interactdiff.concept.denoising import TRAIN_STEPS, Denoising
from interactdiff.concept.masks import ConceptMasks, MaskSettings, make_masks, refined, with_background
from interactdiff.concept.pictures import as_shown
from interactdiff.concept.prompts import prompt_rows, segments
from interactdiff.concept.scene_boxes import scene_boxes
from interactdiff.concept.words import (
    MAX_SEED,
    PREFIX,
    ConceptError,
    check_distinct,
    check_range,
    joint_prompt,
)
from interactdiff.handle import attach
from interactdiff.models import ModelInfo, info_at
from interactdiff.pipeline_calls import denoiser_config
from interactdiff.scene import Scene
from interactdiff.scene_checks import Box

TIMESTEPS = (50, 100, 150, 200)
CELLS_EACH = 16  # cells of the maps' grid that a picture has at least for each concept


@dataclass(frozen=True)
class Looking:
    """How a photo is looked at.

    Attributes:
        timesteps: noise levels in [0, 1000), each with a noise of its own; maps are averaged over them.
        seed: of the noise.
        blocks: of a transformer, which attentions over text and image; None for all.
        masks: how masks are made of maps; None for what suits the base's text encoder.
    """

    timesteps: tuple[int, ...] = TIMESTEPS
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    masks: MaskSettings | None = None

    def __post_init__(self) -> None:
        if not self.timesteps or not all(0 <= t < TRAIN_STEPS for t in self.timesteps):
            raise ConceptError(f"expected timesteps of 0 to {TRAIN_STEPS - 1}, got {list(self.timesteps)}")
        check_range("seed", self.seed, 0, MAX_SEED, whole=True)
        if self.blocks is not None and not self.blocks:
            raise ConceptError("expected some of a transformer's blocks, got none")


def find_masks(
    pipeline: Any,
    photo: Image.Image,
    words: Sequence[str],
    *,
    size: int | None = None,
    prompt: str | None = None,
    looking: Looking | None = None,
    boxes: Mapping[str, Box] | None = None,
    given: Mapping[str, Tensor] | None = None,
    scene: Scene | None = None,
) -> ConceptMasks:
    """Masks of words in a photo, without learning anything.

    Args:
        pipeline: from text, with a U-Net, Flux or SD3.
        photo: of any size and mode; its aspect is kept, its orientation (EXIF) applied.
        words: one for each concept, such as "dog".
        size: side in pixels at which it is looked at; None for the model's own.
        prompt: with slots, "{0} beside {1}"; None is "a photo of {0} and {1}".
        looking: noise levels, layers, thresholds.
        boxes: for some words a box, xyxy in [0, 1], outside which they are not.
        given: for some words a mask [h, w] in [0, 1], in the place of what would be found.
        scene: what the photo shows; boxes of phrases that are a word are its, where `boxes` has none of it.

    Raises:
        ConceptError: a word that is not found, or what a photo of this size cannot hold.
        AdapterError: the pipeline is of no such family.
    """
    check_distinct(list(words))
    if scene is not None:
        boxes = {**scene_boxes(scene, dict(zip(words, words, strict=True))), **(boxes or {})}
    denoising = Denoising.of(pipeline)
    side, photo = size or default_size(pipeline), as_shown(photo)
    sized, crop = denoising.sized(photo, side), denoising.crop(photo.size, side)
    adapter = ConceptAdapter.for_pipeline(pipeline).named("masks")
    with attach(pipeline, adapter) as handle:
        finder = Finder(denoising, handle["concept:masks"], sized, list(words), prompt, looking)
        settings = finder.settings
        boxes = {word: crop.box(box) for word, box in (boxes or {}).items()}
        given = {word: crop.mask(mask) for word, mask in (given or {}).items()}
        masks = make_masks(words, finder.scores(), settings, boxes, given)
    masks.check(settings.minimum_area, given)
    return masks


class Finder:
    """Looks at one photo again and again, as concepts are learned.

    Attributes:
        latents: of the photo, [1, C, H, W].
        prompt: that names all concepts.
        settings: how masks are made.
        layers: which attentions are read.

    Args:
        denoising: of the pipeline.
        binding: of a concept adapter that is attached to it; observes.
        photo: sized.
        names: of the concepts, in the prompt: words or tokens.
        template: of the prompt, see `joint_prompt`.
        looking: noise levels, layers, thresholds.
        prefix: of the prompt where there is no template.
    """

    def __init__(
        self,
        denoising: Denoising,
        binding: ConceptBinding,
        photo: Image.Image,
        names: Sequence[str],
        template: str | None = None,
        looking: Looking | None = None,
        prefix: str = PREFIX,
    ):
        self.denoising, self.binding, self.photo, self.names = denoising, binding, photo, list(names)
        self.looking = looking or Looking()
        self.settings = self.looking.masks or default_settings(denoising.pipeline)
        if self.settings.background is None:
            own = default_settings(denoising.pipeline).background
            self.settings = replace(self.settings, background=own)
        self.layers = Layers.of(denoising.denoiser, self.looking.blocks)
        self.prompt = joint_prompt(template, self.names, prefix)
        self.latents = denoising.latents(photo)
        height, width = self.latents.shape[2:]
        if len(self.names) * CELLS_EACH > (cells := height * width // 4):
            raise ConceptError(
                f"expected at most {cells // CELLS_EACH} concepts in a photo of {photo.width} x "
                f"{photo.height} pixels, got {len(self.names)}"
            )
        self.rows = prompt_rows(denoising.pipeline, self.prompt)

    def scores(self, timesteps: Sequence[int] | None = None, seed: int | None = None) -> Tensor:
        """R [K + 1, h, w] on the CPU, the mean over noise levels, in one pass of the denoiser.

        Args:
            timesteps: noise levels; None for those of `looking`.
            seed: of the noise; None for that of `looking`.
        """
        capture, columns = self.look(timesteps, seed)
        return with_background(refined(capture, columns, self.settings).mean(0), self.settings).cpu()

    @torch.no_grad()
    def look(
        self, timesteps: Sequence[int] | None = None, seed: int | None = None
    ) -> tuple[AttentionCapture, Tensor]:
        """Pass the photo through the denoiser, at each noise level a row.

        Args:
            timesteps: as of `scores`.
            seed: likewise.

        Returns:
            What `layers` have shown, and of that the columns of the classes, [T, K or K + 1, h', w'].
        """
        timesteps = self.looking.timesteps if timesteps is None else timesteps
        seed = self.looking.seed if seed is None else seed
        device, count = self.denoising.device, len(timesteps)
        generator = torch.Generator().manual_seed(seed)
        latents = self.latents.expand(count, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        times = torch.tensor(list(timesteps), device=device)
        size = (self.photo.height, self.photo.width)
        prompt = self.denoising.encode([self.prompt.text], size).repeated(count)
        capture = AttentionCapture(self.denoising.denoiser, self.layers)
        with self.binding.capturing(capture):
            self.denoising.predict(self.denoising.noisy(latents, noise, times), times, prompt)
        return capture, capture.columns(self.rows.classes(self.settings.background))


def default_settings(pipeline: Any) -> MaskSettings:
    """What suits a pipeline: that of a packaged model by measurement.

    The text's first token stands for the background where it means nothing, as CLIP's does.
    """
    tokenizer, _, _ = segments(pipeline)[0]
    has_start = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    own: Any = known_info(pipeline).masks
    return MaskSettings(background="start" if has_start else "complement", **own)


def known_info(pipeline: Any) -> ModelInfo:
    """What is known of a pipeline: nothing, unless it is a packaged model."""
    return info_at(getattr(pipeline, "name_or_path", None) or "")


def default_size(pipeline: Any) -> int:
    """Side in pixels of the pictures that a pipeline draws."""
    known = known_info(pipeline).size
    latents = denoiser_config(pipeline).get("sample_size") or getattr(pipeline, "default_sample_size", 128)
    return known or latents * pipeline.vae_scale_factor
