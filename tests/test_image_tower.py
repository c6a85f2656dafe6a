"""The image tower of stickworld's subject encoders: its close-ups, its training and what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import check_that_a_resumed_run_is_the_unbroken_one, short
from transformers import CLIPVisionModel

from interactdiff.stickworld.appearance import COLOURS, PersonAppearance
from interactdiff.training.image_tower import HEADS, LooksReader, augmented, close_ups, looks, portrait
from interactdiff.training.latent_reader import IGNORED
from interactdiff.training.world_data import as_images

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def test_close_ups_show_what_is_to_be_read_of_them() -> None:
    """The answers are the appearance's, its colour is seen, and nothing else than white is around it."""
    seeds = range(12)
    for picture, answers, seed in zip(close_ups(seeds, 64), looks(seeds), seeds, strict=True):
        thing = portrait(seed).things[0]
        shown = {"kind": thing.name, **thing.appearance.attributes()}
        for (name, known), answer in zip(HEADS.items(), answers.tolist(), strict=True):
            assert shown.get(name) == (None if answer == IGNORED else known[answer])
        far = np.abs(picture.astype(int) - COLOURS[thing.appearance.colour]).sum(-1)
        assert (far < 60).mean() > 0.01
        assert (picture[[0, -1]] == 255).all()
        assert (picture != 255).any(-1).any(0).mean() > 0.4 or (picture != 255).any(-1).any(1).mean() > 0.8
    kinds = [portrait(seed).things[0] for seed in range(60)]
    assert 20 < sum(isinstance(one.appearance, PersonAppearance) for one in kinds) < 55


def test_pictures_are_augmented_and_white_around() -> None:
    images = as_images(close_ups(range(8), 32))
    still = augmented(images, 0.0, 0.0, torch.Generator().manual_seed(0))
    mirrored = torch.tensor([not torch.allclose(a, b, atol=1e-4) for a, b in zip(still, images, strict=True)])
    assert 0 < mirrored.sum() < 8
    assert torch.allclose(still[mirrored], images[mirrored].flip(-1), atol=1e-4)
    dark = -torch.ones(64, 3, 32, 32)
    turned = augmented(dark, 45.0, 0.0, torch.Generator().manual_seed(1))
    assert torch.allclose(turned[:, :, 16, 16], torch.tensor(-1.0))
    assert turned[:, :, 0, 0].max() == 1
    smaller = augmented(dark, 0.0, 0.5, torch.Generator().manual_seed(2))
    sides = (smaller[:, 0, 16] < 0).sum(-1)
    assert sides.min() in (16, 17, 18)
    assert sides.max() in (30, 31, 32)


def test_looks_are_read_off_the_mean_of_the_tokens() -> None:
    torch.manual_seed(0)
    reader = LooksReader(VISION).eval()
    images = as_images(close_ups(range(2), 32))
    read = reader(images)
    assert {name: tuple(logits.shape) for name, logits in read.items()} == {
        name: (2, len(answers)) for name, answers in HEADS.items()
    }
    assert sum(map(len, HEADS.values())) == reader.out.out_features
    (read["hair"] * torch.randn(2, len(HEADS["hair"]))).sum().backward()
    # all but the norm after the last layer, which the encoder does not read, and biases that a softmax drops
    without = {n for n, p in reader.tower.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert {name for name in without if "k_proj.bias" not in name} == {
        name for name, _ in reader.tower.named_parameters() if "post_layernorm" in name
    }


def test_a_tower_is_trained_and_transformers_loads_it(tmp_path: Path) -> None:
    config = short(tmp_path, "stickworld_image_tower", portraits=9, held_out=4, vision=VISION)
    config |= {"export_to": str(tmp_path / "tower"), "sample_every": 3}
    recipe: Any = check_that_a_resumed_run_is_the_unbroken_one(config)
    lines = [json.loads(line) for line in (recipe.output / "log.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "kind" in line]
    assert [line["step"] for line in scored][-1] == 6
    assert {"step", "kind", "colour", "pattern"} <= scored[-1].keys() <= {"step", *HEADS}
    assert all(0 <= line[name] <= 1 for line in scored for name in line.keys() & HEADS.keys())
    tower: Any = CLIPVisionModel.from_pretrained(tmp_path / "tower")
    assert tower.dtype == torch.float16
    trained = dict(recipe.model.tower.named_parameters())
    assert {name for name, _ in tower.named_parameters()} == set(trained)
    assert not list((tmp_path / "tower").glob("*.bin"))
