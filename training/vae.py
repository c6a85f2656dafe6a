"""The autoencoder of an embedded world: pictures to a small grid of latents and back."""

import copy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image
from torch import Tensor, nn

from interactdiff.errors import RecipeError
from interactdiff.training.config import (
    Count,
    Flag,
    Location,
    OptionalCount,
    OptionalLocation,
    Rate,
    RecipeConfig,
    arguments_named,
    arguments_of,
)
from interactdiff.training.recipe import Recipe
from interactdiff.training.world_data import as_images, cached_renders, grid


class VaeConfig(RecipeConfig):
    """The keys of `VaeRecipe`.

    Attributes:
        batch_size: pictures of a step.
        cache_dir: where renders are kept, for every recipe.
        renders: how many.
        crop: height and width in pixels of the crop of each picture that a step sees, or null for all of it.
        model: arguments of `AutoencoderTiny`.
        init_from: folder of an autoencoder to go on from, or null.
        freeze_encoder: polish the decoder alone: latents, and whatever was trained on them, stay as they are.
        latent_noise: standard deviation of the noise that latents bear.
        edge_weight: of the error of pixels' differences.
        scale_weight: of the error of pictures that are decoded from latents of 1/2 and 1/4 of the size: what
            is coarse in a picture is then coarse in its latents (arXiv 2502.14831, section 4).
        roughness_weight: of the squared differences of neighbouring latents.
    """

    batch_size: Count
    cache_dir: Location
    renders: Count
    crop: OptionalCount = None
    model: Annotated[dict[str, Any], arguments_of(AutoencoderTiny, arguments_named(AutoencoderTiny))]
    init_from: OptionalLocation = None
    freeze_encoder: Flag = False
    latent_noise: Rate
    edge_weight: Rate
    scale_weight: Rate
    roughness_weight: Rate


class VaeRecipe(Recipe[VaeConfig]):
    """Trains an `AutoencoderTiny` on renders, with latents that are coarse to fine.

    They have mean 0 in each channel and variance 1 over all of them, bear some noise, and have little of
    their variance in high frequencies, where `scale_weight` and `roughness_weight` are above 0.
    """

    config_type = VaeConfig

    def build(self) -> nn.Module:
        self.renders = cached_renders(Path(self.config.cache_dir), self.config.renders)
        if self.config.init_from:
            model: Any = AutoencoderTiny.from_pretrained(self.config.init_from).float()
        else:
            model = AutoencoderTiny(**self.config.model)
            keep_variance(model)
        # pictures of a quarter of the size, which `scale_weight` decodes, have whole latents
        least = 4 * 2 ** (len(model.config.encoder_block_out_channels) - 1)
        most, crop = self.renders.shape[1], self.config.crop
        if crop is not None and (crop % least or crop > most):
            raise RecipeError(f"expected a crop of at most {most} pixels, a multiple of {least}, got {crop}")
        model.encoder.requires_grad_(not self.config.freeze_encoder)
        return model.to(memory_format=torch.channels_last)

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config.seed, step))
        chosen = np.sort(rng.integers(len(self.renders), size=self.config.batch_size))
        pixels = self.renders[chosen]
        if self.config.crop is not None:
            pixels = np.stack([busiest_crop(picture, self.config.crop, rng) for picture in pixels])
        images = as_images(pixels).to(self.device)
        return {"images": images.contiguous(memory_format=torch.channels_last)}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        config, images = self.config, batch["images"]
        latents = self.model.encode(images).latents.float()
        loss = config.roughness_weight * roughness(latents) + 0.1 * spread(latents)
        for scale, weight in ((1, 1.0), (2, config.scale_weight / 2), (4, config.scale_weight / 2)):
            if not weight:
                continue
            small = F.avg_pool2d(latents, scale)
            noise = torch.randn(small.shape, generator=generator, device=generator.device).to(small)
            drawn = self.model.decode(small + config.latent_noise * noise).sample.float()
            loss = loss + weight * reconstruction_loss(drawn, F.avg_pool2d(images, scale), config.edge_weight)
        return loss

    @torch.no_grad()
    def sample(self) -> Image.Image:
        images = as_images(self.renders[:8]).to(self.device)
        drawn = self.model.decode(self.model.encode(images).latents).sample
        return grid(torch.cat([images, drawn]).cpu(), 8)

    def export(self) -> None:
        model = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        model.to(torch.float16, memory_format=torch.contiguous_format)
        model.save_pretrained(self.config.export_to)


def busiest_crop(pixels: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Of 3 crops at random places the one whose values vary most: much of a picture is bare background.

    Args:
        pixels: [S, S, 3].
        side: of the crop.
        rng: of the places.

    Returns:
        [side, side, 3].
    """
    places = rng.integers(0, len(pixels) - side + 1, size=(3, 2))
    return max((pixels[y : y + side, x : x + side] for y, x in places), key=np.std)


def keep_variance(model: AutoencoderTiny) -> None:
    """Start convolutions so that signals neither fade nor grow on their way: the model has no norms.

    He initialisation (arXiv 1502.01852), with the last convolution of each residual branch scaled down.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, AutoencoderTinyBlock):
            with torch.no_grad():
                list(module.conv.children())[-1].get_parameter("weight").mul_(0.2)


def roughness(latents: Tensor) -> Tensor:
    """Mean squared difference of neighbours, along rows plus along columns, of [B, C, H, W] latents."""
    return latents.diff(dim=-1).square().mean() + latents.diff(dim=-2).square().mean()


def spread(latents: Tensor) -> Tensor:
    """How far [B, C, H, W] latents are from a mean of 0 in each channel and a variance of 1 over all of them.

    Channels may differ, up to a variance of 3: a variance of 1 in each of them drives detail into all, and
    latents to white noise; one that has most of it decides the picture at much more noise than the others.
    """
    mean, variances = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    uneven = F.relu(variances - 3).square().mean()
    return mean.square().mean() + (variances.mean() - 1).square() + 0.1 * uneven


def reconstruction_loss(drawn: Tensor, images: Tensor, edge_weight: float) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of their differences, which keeps edges sharp.

    Args:
        drawn: [B, 3, S, S].
        images: [B, 3, S, S].
        edge_weight: weight of the differences.
    """
    error = drawn - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return F.l1_loss(drawn, images) + F.mse_loss(drawn, images) + edge_weight * edges
