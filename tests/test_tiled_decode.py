"""The tiles that a VAE decodes large pictures in: no seams, and the VAE as it was."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
)
from test_high_resolution import CALL, OPTIONS, same
from tiny_dit import tiny_autoencoder, tiny_flux_pipeline

from interactdiff.clear import high_resolution
from interactdiff.clear.high_resolution import HighResolution

make_vae = cast(Any, AutoencoderKL)


def decoded(vae: Any, latents: torch.Tensor, tile: int | None) -> torch.Tensor:
    """As in the last step of a stage."""
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (side * pixels for side in latents.shape[2:])
    stage = high_resolution.Stage(0, height, width, (1, 1), 1)
    with torch.no_grad(), high_resolution._tiles(vae, tile, stage) as start_decoding:
        start_decoding()
        return vae.decode(latents).sample


VAES = {
    "kl": (4, lambda: make_tiny_kl()),
    "tiny, 2 px": (4, lambda: tiny_autoencoder(4, 2)),
    "tiny, 4 px, as stickworld's": (8, lambda: tiny_autoencoder(8, 3)),
    "tiny, 8 px, as Flux's": (16, lambda: tiny_autoencoder(16, 4)),
}


@pytest.mark.parametrize("name", VAES)
def test_seams_of_tiles_are_invisible(name: str):
    """A seam shows where neighbouring pixels differ more than neighbours do in the picture.

    Tiles that were cut and put side by side err by steps as large as the picture's own, on average over the
    seam's pixels. Blended ones may err by a quarter of that at most, anywhere.
    """
    channels, make = VAES[name]
    vae = make()
    pixels = high_resolution._pixels_per_latent(vae)
    torch.manual_seed(0)
    latents = torch.randn(1, channels, 16 if "tiny" in name else 64, 160)
    whole, tiled = decoded(vae, latents, None), decoded(vae, latents, 64 * pixels)
    with torch.no_grad():
        cut = torch.cat([vae.decode(part).sample for part in latents.split(64, dim=3)], dim=3)

    def steps(picture: torch.Tensor) -> torch.Tensor:
        return picture.diff(dim=3).abs().mean((0, 1, 2))

    assert steps(tiled - whole).max() < steps(whole).mean() / 4
    assert steps(cut - whole).max() > steps(whole).mean()
    error = (tiled - whole).square().mean().sqrt() / whole.std()
    if "tiny" in name:
        assert error < 0.01
        wrong = ((tiled - whole).abs().amax((0, 1, 2)) > 1e-5).nonzero().flatten() // pixels
        overlaps = {*range(56, 64), *range(112, 120)}  # in latents: an eighth of a tile
        assert set(wrong.tolist()) == overlaps, "elsewhere, convolutions see what they see of the whole"
    else:
        assert 0 < error < 0.1, "group norm takes each tile's own mean and variance"


def test_pictures_that_fit_into_a_tile_are_not_divided():
    for vae in (make_tiny_kl(), tiny_autoencoder(4, 4)):
        side = 64 if isinstance(vae, AutoencoderTiny) else 16
        tile = side * high_resolution._pixels_per_latent(vae)
        latents = torch.randn(1, 4, side, side)
        assert torch.equal(decoded(vae, latents, tile), decoded(vae, latents, None))
        if isinstance(vae, AutoencoderTiny):  # which divides them
            vae.enable_tiling()
            with torch.no_grad():
                assert not torch.equal(vae.decode(latents).sample, decoded(vae, latents, tile))


def test_auto_takes_the_size_in_which_tiles_fit_together():
    def auto(vae: Any) -> int | None:
        return high_resolution._tile_size(vae, "auto")

    assert auto(make_tiny_kl()) == 32
    assert auto(make_tiny_kl(sample_size=43)) == 40
    assert auto(make_tiny_kl(sample_size=(64, 48))) == 48
    assert auto(make_tiny_kl(sample_size=2)) == 8, "the smallest"
    assert auto(tiny_autoencoder(16, 4)) == 512
    assert auto(torch.nn.Identity()) is None


def test_a_pipeline_with_an_autoencoder_that_diffusers_cannot_tile(tokenizer: Any):
    pipe = tiny_flux_pipeline(tokenizer, in_channels=24)
    pipe.vae = vae = tiny_autoencoder(6, 3)
    pipe = type(pipe)(**pipe.components)
    call = {**CALL, "height": 48, "width": 64}
    seen: list[Any] = []
    for name in ("encoder", "decoder"):
        getattr(vae, name).register_forward_hook(
            lambda module, given, _: seen.append((type(module).__name__, tuple(given[0].shape[2:])))
        )
    tiled, whole = (
        HighResolution(pipe, **OPTIONS | {"scales": (1, 2)}, tile=tile)(**call) for tile in (64, None)
    )
    assert seen[0] == ("DecoderTiny", (12, 16)), "fits into a tile"
    assert seen[1] == ("EncoderTiny", (96, 128))
    assert [name for name, _ in seen[2:8]] == ["DecoderTiny"] * 6
    assert seen[2] == ("DecoderTiny", (16, 16))
    assert seen[-1] == ("DecoderTiny", (24, 32)), "tile None leaves tiling off"
    small, large = (
        np.abs(np.asarray(a, np.float32) - np.asarray(b)).mean()
        for a, b in zip(tiled.images, whole.images, strict=True)
    )
    assert small == 0
    assert 0 < large < 2, "of 255"
    pipe.vae.enable_tiling()
    with pytest.raises(RuntimeError, match="must match"):
        pipe.vae.encode(torch.zeros(1, 3, 64, 64))


def test_tile_none_leaves_the_vae_as_the_caller_set_it(flux_pipe: Any):
    flux_pipe.vae.enable_tiling()
    flux_pipe.vae.tile_sample_min_size, flux_pipe.vae.tile_latent_min_size = 16, 8
    helper = HighResolution(flux_pipe, **OPTIONS, tile=None)
    same_tiles = HighResolution(flux_pipe, **OPTIONS, tile=16)
    assert same(helper(**CALL), same_tiles(**CALL))
    flux_pipe.vae.disable_tiling()
    assert not same(helper(**CALL), same_tiles(**CALL))


def make_tiny_kl(**options: Any) -> Any:
    """As `tiny_dit.tiny_vae`."""
    torch.manual_seed(2)
    shape = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    common = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}
    return make_vae(**shape | common | options).eval()
