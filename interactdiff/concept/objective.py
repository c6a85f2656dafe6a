"""What a training step is scored by: errors within masks, attention, pictures of the base."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.concept.capture import AttentionCapture
from interactdiff.concept.denoising import TRAIN_STEPS
from interactdiff.concept.finding import Finder, known_info
from interactdiff.concept.losses import (
    attention_loss,
    masked_error,
    published_attention_loss,
    published_masked_error,
)
from interactdiff.concept.masks import ConceptMasks, enlarged, to_grid
from interactdiff.concept.options import LearnOptions
from interactdiff.concept.prompts import prompt_rows
from interactdiff.concept.words import ConceptPrompt
from interactdiff.pipeline_calls import call_arguments

SAMPLE_STEPS = 25  # of pictures that are drawn in training


class Objective:
    """The losses of one photo.

    Args:
        finder: of the photo.
        options: how it is learned.
    """

    def __init__(self, finder: Finder, options: LearnOptions):
        self.finder, self.options, self._denoising = finder, options, finder.denoising
        self._size = (finder.photo.height, finder.photo.width)

    def take(self, masks: ConceptMasks, given: Mapping[str, Tensor]) -> None:
        """Score by these masks from here on.

        Args:
            masks: on the maps' grid.
            given: for some concepts a mask [h, w] in [0, 1], finer than that.
        """
        device, latents = self._denoising.device, self.finder.latents
        self._masks = masks.masks.float().to(device)
        finest = [given.get(name, mask) for name, mask in zip(masks.names, masks.masks, strict=False)]
        grid = (latents.shape[2], latents.shape[3])
        self._weights = torch.stack([to_grid(mask, grid) for mask in finest]).to(device)

    def denoise(
        self, prompt: ConceptPrompt, chosen: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One pass over the noised photo.

        Args:
            prompt: that names concepts.
            chosen: their numbers, in the order of its names.
            generator: of the noise and its level.

        Returns:
            The denoising error; the attention to the classes [B, n, h, w], the background's last where rows
            of the text stand for it, or None if no loss reads it; and their masks.
        """
        options, device, count = self.options, self._denoising.device, self.options.batch_size
        latents = self.finder.latents.expand(count, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        assert options.max_timestep is not None
        levels = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        times = (levels * options.max_timestep).to(device)
        encoded = self._denoising.encode([prompt.text], self._size).repeated(count)
        capture = AttentionCapture(self._denoising.denoiser, self.finder.layers, own=False)
        wanted = self.options.attention_loss != "none"
        noisy = self._denoising.noisy(latents, noise, times)
        if wanted:
            with self.finder.binding.capturing(capture):
                predicted = self._denoising.predict(noisy, times, encoded)
        else:
            predicted = self._denoising.predict(noisy, times, encoded)
        target = self._denoising.target(latents, noise, times).float()
        masks, weights = self._masks[list(chosen)], self._weights[list(chosen)]
        if options.published_error:
            error = published_masked_error(predicted, target, masks, options.full_image_weight)
        else:
            error = masked_error(predicted, target, weights, options.full_image_weight)
        if not wanted:
            return error, None, masks
        rows = prompt_rows(self._denoising.pipeline, prompt)
        classes = list(rows.concepts)
        if background := rows.of_background(self.finder.settings.background):
            classes.append(background)
            masks = torch.cat([masks, self._masks[-1:]])
        columns = enlarged(capture.columns(classes), (masks.shape[1], masks.shape[2]))
        return error, columns, masks

    def attention(self, columns: Tensor | None, masks: Tensor) -> Tensor:
        """The attention loss of each class, of what `denoise` returns."""
        if columns is None:
            return torch.zeros(len(masks), device=masks.device)
        if self.options.attention_loss == "published":
            return published_attention_loss(columns, masks).mean(0)
        return attention_loss(columns.clamp(min=0), masks).mean(0)

    def prior_error(self, step: int, generator: torch.Generator) -> Tensor:
        """The denoising error of a picture by the base itself."""
        latents = self._prior[step % len(self._prior)][None]
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        times = (torch.rand(1, generator=generator) * TRAIN_STEPS).to(latents.device)
        encoded = self._denoising.encode([self.options.prior_prompt], self._size)
        predicted = self._denoising.predict(self._denoising.noisy(latents, noise, times), times, encoded)
        return F.mse_loss(predicted, self._denoising.target(latents, noise, times).float())

    @cached_property
    def _prior(self) -> Tensor:
        """Latents of pictures by the base itself."""
        made = []
        guidance = known_info(self._denoising.pipeline).guidance_scale
        width, height = self.finder.photo.size
        for number in tqdm(range(self.options.prior_pictures), desc="prior", unit="picture"):
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
            with torch.no_grad(), self.finder.binding.idle():
                drawn = self._denoising.pipeline(
                    **call_arguments(self._denoising.pipeline, self.options.prior_prompt, None, guidance),
                    width=width,
                    height=height,
                    num_inference_steps=SAMPLE_STEPS,
                    generator=generator,
                ).images[0]
            made.append(self._denoising.latents(drawn))
        return torch.cat(made)
