"""A flow transformer as the teacher of the U-Net's recipe."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from recipes import SIZES, TEXT, VAE, short
from test_training import recipe_configs
from test_training_dit import T5, TRANSFORMER

from interactdiff.errors import RecipeError
from interactdiff.training.base import BaseRecipe, schedule
from interactdiff.training.dit import image_ids, packed
from interactdiff.training.flow_teacher import velocity_of_flow
from interactdiff.training.run import make_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Flux pipeline in `world`."""
    made = tmp_path_factory.mktemp("runs")
    world = str(made / "world")
    parts: dict[str, dict[str, Any]] = {
        "stickworld_vae": {"model": VAE, "export_to": f"{world}/vae"},
        "stickworld_text": {"text_encoder": TEXT, "export_to": world},
        "stickworld_t5": {"text_encoder": T5, "export_to": world},
        "stickworld_dit": {
            "text": world,
            "transformer": TRANSFORMER,
            "sizes": SIZES,
            "perceptual": 0.0,
            "export_to": world,
        },
    }
    for name, changes in parts.items():
        make_recipe(short(made, name, **changes, steps=2, learning_rate=0.1)).train()
    return made


def taught(folder: Path, teacher: Path) -> BaseRecipe:
    """The U-Net's recipe with a teacher."""
    config = recipe_configs(folder)["stickworld_base"] | {"output_dir": str(folder / "taught")}
    recipe = make_recipe(config | {"teacher": str(teacher), "word_attention": 0.0, "perceptual": 0.0})
    assert isinstance(recipe, BaseRecipe)
    return recipe


def test_the_true_flow_is_the_true_velocity() -> None:
    x, n = torch.randn(2, 5, 3, 4, 4)
    spread = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).view(-1, 1, 1, 1)
    signal = (1 - spread**2).sqrt()
    time = spread / (signal + spread)
    v = velocity_of_flow(n - x, (1 - time) * x + time * n, time, signal, spread)
    assert torch.allclose(v, signal * n - spread * x, atol=1e-6)


def test_the_loss_is_the_distance_to_what_the_teacher_predicts(folder: Path) -> None:
    recipe = taught(folder, folder / "world")
    seen: dict[str, Any] = {}
    recipe.model.register_forward_hook(
        lambda _, given, output: seen.update(noisy=given[0], timesteps=given[1], predicted=output.sample)
    )
    batch = recipe.batch(0)
    loss = recipe.loss(batch, torch.Generator().manual_seed(0))
    assert recipe.teacher is not None
    assert not any(p.requires_grad for p in recipe.teacher.transformer.parameters())

    pipe: Any = FluxPipeline.from_pretrained(folder / "world").to(torch.float32)
    length = recipe.teacher.text.length(recipe.teacher.text.tokens(batch["captions"])[1])
    errors = []
    for noisy, timestep, predicted, caption in zip(*seen.values(), batch["captions"], strict=True):
        kept = schedule().alphas_cumprod[timestep]
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        time, scaled = spread / (signal + spread), noisy[None] / (signal + spread)
        text, pooled, _ = pipe.encode_prompt([caption], max_sequence_length=77)
        with torch.no_grad():
            flow = pipe.transformer(
                packed(scaled),
                text[:, :length],
                pooled,
                time[None],
                image_ids(scaled),
                torch.zeros(length, 3),
            ).sample
        assert flow.abs().max() > 1e-3
        height, width = noisy.shape[1:]
        flow = flow.view(height // 2, width // 2, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(noisy.shape)
        x, n = scaled[0] - time * flow, scaled[0] + (1 - time) * flow
        errors.append((predicted - (signal * n - spread * x)).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)

    recipe.teacher = None
    assert recipe.loss(batch, torch.Generator().manual_seed(0)).item() != pytest.approx(loss.item(), rel=1e-2)


def test_a_teacher_of_other_latents_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "world", folder / "other")
    vae: Any = AutoencoderTiny.from_pretrained(folder / "world", subfolder="vae")
    vae.encoder.layers[0].weight.data += 1
    vae.save_pretrained(folder / "other" / "vae")
    with pytest.raises(RecipeError, match="expected a teacher with the encoder of the recipe's vae, got"):
        taught(folder, folder / "other")
