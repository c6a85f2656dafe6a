"""A perceptual loss of a denoiser's estimate of the clean latents, beside the error of its prediction.

The squared error counts every latent alike, and at much noise it is least for a blur. A network that reads
latents compares the estimate with the clean latents by its features, as LPIPS compares pictures (arXiv
1801.03924). Lin and Yang trained diffusion models with a perceptual loss by features of the denoiser itself
(arXiv 2401.00110).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from interactdiff.errors import RecipeError
from interactdiff.training.config import OptionalLocation, Rate, RecipeConfig
from interactdiff.training.latent_reader import LatentReader
from interactdiff.training.world_data import CaptionedLatents

_NOISIEST = 0.92  # share of noise from which on the estimate is too coarse to be compared
_EVERY = 2  # of so many examples one is compared, which saves time
_SEEN = 64  # latents by which features are scaled


class PerceptualConfig(RecipeConfig):
    """The keys of a recipe with a `PerceptualLoss`.

    Attributes:
        perceptual: its weight; 0 leaves it out.
        latent_reader: folder of the `LatentReader` by which it is computed.
    """

    perceptual: Rate = 0.0
    latent_reader: OptionalLocation = None

    @model_validator(mode="after")
    def _has_reader(self) -> "PerceptualConfig":
        if self.perceptual and self.latent_reader is None:
            raise ValueError(f"latent_reader: expected a folder with perceptual {self.perceptual}, got null")
        return self


class PerceptualLoss:
    """How far a `LatentReader`'s features of estimated latents are from those of the clean ones.

    Args:
        reader: frozen here.
        latents: [N, C, H, W], by which each channel of the features is brought to mean 0 and deviation 1.
    """

    def __init__(self, reader: LatentReader, latents: Tensor):
        self.reader = reader.eval().requires_grad_(False)
        with torch.no_grad():
            seen = [one.float() for one in reader.features(latents)]
        self.scales = [
            (one.mean((0, 2, 3), keepdim=True), one.std((0, 2, 3), keepdim=True).clamp(min=1e-3))
            for one in seen
        ]

    def loss(self, clean: Tensor, estimate: Tensor, noise: Tensor) -> Tensor:
        """1 less the cosine of both features: the mean over cells, levels and every second example.

        Args:
            clean: latents, [B, C, H, W]; H and W multiples of 4.
            estimate: the denoiser's estimate of them, of the same shape.
            noise: [B] in [0, 1], scale of the noise in what the denoiser saw, over the sum of the scales of
                noise and latents; at 0.92 and above an example counts as 0.
        """
        clean, estimate, noise = clean[::_EVERY], estimate[::_EVERY], noise[::_EVERY]
        with torch.no_grad():
            wanted = self._scaled(clean)
        pairs = zip(wanted, self._scaled(estimate), strict=True)
        distances = [(1 - F.cosine_similarity(one, other, dim=1)).mean((1, 2)) for one, other in pairs]
        return (torch.stack(distances).mean(0) * (noise < _NOISIEST)).mean()

    def _scaled(self, latents: Tensor) -> list[Tensor]:
        features = self.reader.features(latents)
        return [(f.float() - mean) / dev for f, (mean, dev) in zip(features, self.scales, strict=True)]


def perceptual_loss_of(
    config: PerceptualConfig, data: CaptionedLatents, device: torch.device
) -> PerceptualLoss | None:
    """The loss of a recipe's configuration, scaled by its largest pictures; None with weight 0.

    Raises:
        RecipeError: there is no reader in the folder, or one of latents with another number of channels.
    """
    if not config.perceptual or config.latent_reader is None:
        return None
    if not Path(config.latent_reader, LatentReader.config_name).is_file():
        raise RecipeError(
            "latent_reader: expected a folder that stickworld_latent_reader.yaml made, "
            f"got {config.latent_reader}"
        )
    reader: Any = LatentReader.from_pretrained(config.latent_reader).float()
    latents = data.latents[max(data.sizes)][:_SEEN].float()
    if (channels := reader.config["channels"]) != latents.shape[1]:
        raise RecipeError(
            f"latent_reader: expected one of latents with {latents.shape[1]} channels, got {channels}"
        )
    return PerceptualLoss(reader.to(device), latents.to(device))
