"""The autoencoder's latents: their spread and roughness, and that they can be made coarse to fine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import VAE, short

from interactdiff.errors import RecipeError
from interactdiff.training.run import make_recipe
from interactdiff.training.vae import busiest_crop, roughness, spread


def test_roughness_and_spread_are_those_of_their_formulas() -> None:
    latents = 1.5 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.2
    grid = latents.numpy().astype(np.float64)
    along = [(grid[b, c, i, j] - grid[b, c, i, j + 1]) ** 2 for b, c, i, j in np.ndindex(2, 3, 4, 4)]
    across = [(grid[b, c, i, j] - grid[b, c, i + 1, j]) ** 2 for b, c, i, j in np.ndindex(2, 3, 3, 5)]
    assert roughness(latents).item() == pytest.approx(np.mean(along) + np.mean(across), rel=1e-5)
    channels = [grid[:, c].ravel() for c in range(3)]
    variance = np.mean([one.var(ddof=1) for one in channels])
    mean = np.mean([one.mean() ** 2 for one in channels])
    assert spread(latents).item() == pytest.approx(mean + (variance - 1) ** 2, rel=1e-5)
    unequal = torch.stack([torch.tensor([[-1.0, 1.0]]) * scale for scale in (1.3, 0.0)])[None]
    assert spread(unequal * (2 / 3.38) ** 0.5).item() == pytest.approx(0, abs=1e-6)
    one_of_four = torch.zeros(1, 4, 1, 2)
    one_of_four[0, 0, 0] = torch.tensor([-1.0, 1.0]) * 2**0.5  # a variance of 4, 1 over all
    assert spread(one_of_four).item() == pytest.approx(0.1 / 4, rel=1e-5)


def test_what_is_coarse_in_pictures_becomes_coarse_in_latents(tmp_path: Path) -> None:
    """The same batches with and without the two weights: smoother latents, whose halves decode better."""

    def trained(name: str, **weights: float) -> tuple[float, float]:
        changes: dict[str, Any] = {
            "steps": 40,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "sample_every": 99,
        }
        changes |= {
            "export_to": str(tmp_path / "made" / name),
            "checkpoint_every": 99,
            "batch_size": 4,
        } | weights
        config = short(tmp_path, "stickworld_vae", model=VAE, **changes) | {
            "output_dir": str(tmp_path / name)
        }
        recipe = make_recipe(config)
        recipe.train()
        with torch.no_grad():
            images = recipe.batch(1000)["images"]
            latents = recipe.model.eval().encode(images).latents
            small = recipe.model.decode(torch.nn.functional.avg_pool2d(latents, 2)).sample
        error = (small - torch.nn.functional.avg_pool2d(images, 2)).abs().mean()
        return float(roughness(latents) / latents.var()), float(error)

    plain = trained("plain", scale_weight=0.0, roughness_weight=0.0)
    coarse = trained("coarse", scale_weight=0.5, roughness_weight=0.1)
    assert coarse[0] < 0.9 * plain[0]
    assert coarse[1] < plain[1]


def test_a_step_sees_the_most_varied_of_the_crops(tmp_path: Path) -> None:
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[8:, 8:] = np.random.default_rng(0).integers(256, size=(4, 4, 3))
    crops = [busiest_crop(pixels, 6, np.random.default_rng(seed)) for seed in range(60)]
    assert all(crop.shape == (6, 6, 3) for crop in crops)
    places = [np.random.default_rng(seed).integers(0, 7, size=(3, 2)) for seed in range(60)]
    varied = [max(float(pixels[y : y + 6, x : x + 6].std()) for y, x in three) for three in places]
    assert [float(crop.std()) for crop in crops] == varied
    assert any(varied)

    config = short(tmp_path, "stickworld_vae", model=VAE, export_to=str(tmp_path / "made"))
    recipe = make_recipe(config | {"crop": 32})
    seen = recipe.batch(0)["images"]
    assert seen.shape[-2:] == (32, 32)
    assert torch.equal(seen, recipe.batch(0)["images"])
    assert len(recipe.train()) == config["steps"]


@pytest.mark.parametrize("crop", [48, 160])
def test_a_crop_that_does_not_fit_is_refused(crop: int, tmp_path: Path) -> None:
    config = short(tmp_path, "stickworld_vae", model=VAE, export_to=str(tmp_path / "made"))
    with pytest.raises(RecipeError, match=f"a crop of at most 128 pixels, a multiple of 32, got {crop}"):
        make_recipe(config | {"crop": crop})
    assert not (tmp_path / "made").exists()
