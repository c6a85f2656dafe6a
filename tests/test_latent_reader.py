"""What the reader of latents is taught about each cell, and the perceptual loss by its features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SIZES, VAE, check_that_a_resumed_run_is_the_unbroken_one, short
from safetensors.torch import load_file

from interactdiff.errors import RecipeError
from interactdiff.stickworld.layouts import MOST_THINGS, sample_scene
from interactdiff.stickworld.render import render
from interactdiff.training.latent_reader import (
    HEADS,
    IGNORED,
    LatentReader,
    answers_of,
    cell_answers,
    reading_loss,
)
from interactdiff.training.perceptual import PerceptualConfig, PerceptualLoss, perceptual_loss_of
from interactdiff.training.run import make_recipe


def test_every_cell_has_the_answers_of_the_thing_in_it() -> None:
    """Against a slow look at each cell's pixels."""
    scene = sample_scene(11, n_interactions=2, n_entities=1)
    drawn = render(scene, 96)
    masks = torch.zeros(1, MOST_THINGS, 96, 96)
    for n, thing in enumerate(drawn.things):
        masks[0, n] = torch.from_numpy(thing.mask)
    cells = cell_answers(answers_of([scene]), masks, 16)[0]
    seen = set()
    for y in range(16):
        for x in range(16):
            shares = masks[0, :, 6 * y : 6 * y + 6, 6 * x : 6 * x + 6].mean((1, 2))
            inside = [n for n in range(MOST_THINGS) if shares[n] > 0.4]
            read = {
                name: None if answer == IGNORED else HEADS[name][answer]
                for name, answer in zip(HEADS, cells[:, y, x].tolist(), strict=True)
            }
            expected: dict[str, str | None] = dict.fromkeys(HEADS) | {"kind": "background"}
            if inside:
                thing = scene.things[inside[-1]]
                expected |= {"kind": thing.name, "action": "none", **thing.appearance.attributes()}
                if inside[-1] < 4:
                    expected["action"] = scene.triplets[inside[-1] // 2].action
                seen.add(inside[-1])
            assert read == expected
    assert seen == set(range(5))


def test_reading_counts_only_what_is_there() -> None:
    reader = LatentReader(4, (8, 8, 8))
    latents, cells = torch.randn(2, 4, 8, 8), torch.full((2, len(HEADS), 4, 4), IGNORED)
    cells[:, 0] = 0
    read = reader(latents)
    assert [tuple(one.shape) for one in read.values()] == [(2, len(HEADS[name]), 4, 4) for name in HEADS]
    background = torch.nn.functional.cross_entropy(read["kind"], cells[:, 0])
    assert reading_loss(read, cells).item() == pytest.approx(background.item())
    cells[1, 2, 3, 3] = 5
    one = -read["colour"][1, :, 3, 3].log_softmax(0)[5]
    assert reading_loss(read, cells).item() == pytest.approx((background + one).item(), rel=1e-5)


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    torch.manual_seed(0)
    return PerceptualLoss(LatentReader(4, (8, 8, 8)), torch.randn(8, 4, 16, 16))


def test_the_loss_is_that_of_its_formula(loss: PerceptualLoss) -> None:
    """Cell by cell; every second example, and none that was nearly all noise."""
    clean, estimate = torch.randn(2, 6, 4, 8, 8).unbind()
    noise = torch.tensor([0.3, 0.3, 0.95, 0.3, 0.91, 0.3])
    total = 0.0
    for n in (0, 4):
        levels = []
        pair = (loss.reader.features(one[n : n + 1]) for one in (clean, estimate))
        for (mean, deviation), a, b in zip(loss.scales, *pair, strict=True):
            a, b = ((one - mean) / deviation for one in (a, b))
            cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
            levels.append(1 - cosine.mean().item())
        total += sum(levels) / 4
    assert loss.loss(clean, estimate, noise).item() == pytest.approx(total / 3, rel=1e-4)


def test_the_loss_falls_towards_the_clean_latents(loss: PerceptualLoss) -> None:
    clean, noise = torch.randn(2, 4, 16, 16), torch.full((2,), 0.5)
    away = torch.randn(2, 4, 16, 16)
    losses = [loss.loss(clean, clean + far * away, noise).item() for far in (0.0, 0.2, 1.0)]
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses == sorted(losses)
    estimate = (clean + away).requires_grad_()
    loss.loss(clean, estimate, noise).backward()
    assert estimate.grad is not None
    assert estimate.grad[0].abs().sum() > 0
    assert estimate.grad[1].abs().sum() == 0
    assert all(parameter.grad is None for parameter in loss.reader.parameters())


def world(folder: Path) -> dict[str, str]:
    """A tiny autoencoder."""
    vae = str(folder / "vae")
    make_recipe(short(folder, "stickworld_vae", model=VAE, steps=1, export_to=vae)).train()
    return {"vae": vae}


def test_a_reader_is_trained_written_and_used(tmp_path: Path) -> None:
    config = short(
        tmp_path, "stickworld_latent_reader", **world(tmp_path), size=96, widths=[8, 8, 8], renders=12
    ) | {"export_to": str(tmp_path / "reader"), "sample_every": 3}
    recipe = check_that_a_resumed_run_is_the_unbroken_one(config)
    lines = [json.loads(line) for line in (recipe.output / "read.jsonl").read_text().splitlines()]
    assert set(lines[-1]) == {"step", *HEADS}
    assert all(0 <= lines[-1][name] <= 1 for name in HEADS)

    class Data:
        sizes, latents = SIZES, {96: torch.randn(4, 4, 12, 12).half()}

    data: Any = Data
    keys = {**config, "recipe": "dit", "perceptual": 0.5, "latent_reader": str(tmp_path / "reader")}
    shared = {name: keys[name] for name in PerceptualConfig.model_fields if name in keys}
    used = perceptual_loss_of(PerceptualConfig(**shared), data, torch.device("cpu"))
    assert used is not None
    saved = load_file(tmp_path / "reader" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert all(torch.equal(used.reader.state_dict()[name], tensor.float()) for name, tensor in saved.items())
    data.latents = {96: torch.randn(4, 8, 12, 12)}
    with pytest.raises(RecipeError, match="latent_reader: expected one of latents with 8 channels, got 4"):
        perceptual_loss_of(PerceptualConfig(**shared), data, torch.device("cpu"))
    nowhere = PerceptualConfig(**(shared | {"latent_reader": str(tmp_path / "nowhere")}))
    with pytest.raises(RecipeError, match=r"expected a folder that .* made, got .*nowhere"):
        perceptual_loss_of(nowhere, data, torch.device("cpu"))
    off = PerceptualConfig(**(shared | {"perceptual": 0.0, "latent_reader": None}))
    assert perceptual_loss_of(off, data, torch.device("cpu")) is None
    with pytest.raises(ValueError, match=r"latent_reader: expected a folder with perceptual 0\.5, got null"):
        PerceptualConfig(**(shared | {"latent_reader": None}))
