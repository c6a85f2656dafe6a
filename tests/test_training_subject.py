"""The subject encoder and CLEAR's layers trained on a folder of pictures, on tiny pipelines."""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from PIL import Image
from recipes import CONFIGS
from safetensors.torch import load_file
from tiny_dit import draw
from tiny_subject import LAYERS, VISION, dog, half_mask, picture, trained_subject_adapter
from tiny_training import config_of
from transformers import CLIPVisionConfig, CLIPVisionModel

from interactdiff import SubjectAdapter, attach
from interactdiff.clear import ClearAdapter
from interactdiff.cli import main
from interactdiff.data import read_folder
from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run as convert
from interactdiff.errors import DataError, RecipeError, SceneError
from interactdiff.scene import Interaction
from interactdiff.sites import denoiser_of
from interactdiff.subject.config import CLIP_LARGE
from interactdiff.subject.foreground import foreground
from interactdiff.subject.items import Subject
from interactdiff.training.config import checked
from interactdiff.training.interaction_data import inside_boxes
from interactdiff.training.run import load_config, make_recipe
from interactdiff.training.subject import SubjectRecipe, SubjectVariation, changed, subjects_of
from interactdiff.training.subject_config import (
    ReferenceChanges,
    SubjectDropsConfig,
    SubjectTrainingConfig,
)

ENCODER_ALONE = {"reference_weight": 0.0, "encoder_weight": 0.7}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, of which every second one has a dog, with its reference and a mask."""
    folder = tmp_path_factory.mktemp("subjects")
    (folder / "references").mkdir()
    rows = []
    for number in range(6):
        picture(number, (32, 32)).save(folder / f"{number}.png")
        row: dict[str, Any] = {"file_name": f"{number}.png", "prompt": f"a dog {'abcdef'[number]}"}
        if number % 2 == 0:
            picture(number + 50, (16, 16)).save(folder / f"references/{number}.png")
            half_mask().save(folder / f"references/{number}-mask.png")
            row["subjects"] = [
                {
                    "phrase": "dog",
                    "image": f"references/{number}.png",
                    "mask": f"references/{number}-mask.png",
                }
            ]
            row["subjects"][0] |= {"box": [0.1, 0.1, 0.9, 0.8]} if number else {}
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    torch.manual_seed(8)
    config: Any = CLIPVisionConfig
    cast(Any, CLIPVisionModel)(config(**VISION, hidden_act="gelu")).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def subject_config(pipe: Any, pictures: Path, tmp_path: Path, tower: Path, **changes: Any) -> dict[str, Any]:
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, **changes)
    del config["adapter"]
    config |= {"recipe": "subject", "image_encoder": str(tower), "token_dim": 8, "layers": list(LAYERS)}
    return config | {"drops": {"subject": 0, "caption": 0, "all": 0}} | changes


@pytest.mark.parametrize("fixture", ["pipe", "sd3_pipe"])
def test_the_encoder_is_trained_saved_loaded_and_drawn(
    fixture: str, request: pytest.FixtureRequest, pictures: Path, tmp_path: Path, tower: Path
) -> None:
    pipe: Any = request.getfixturevalue(fixture)
    config = subject_config(pipe, pictures, tmp_path, tower, gradient_checkpointing=True)
    recipe: Any = make_recipe(config)
    frozen = {name: t.clone() for name, t in recipe.base.denoiser.state_dict().items()}
    before = {name: t.clone() for name, t in recipe.model.state_dict().items()}
    assert len(recipe.train()) == 4
    assert all(torch.equal(t, frozen[name]) for name, t in recipe.base.denoiser.state_dict().items())
    moved = {name for name, t in recipe.model.state_dict().items() if not torch.equal(t, before[name])}
    assert not any(name.startswith("image_encoder") for name in moved)
    trained = {name for name in before if not name.startswith("image_encoder")}
    assert len(moved) > 0.9 * len(trained)
    assert (tmp_path / "run/samples/000004.png").is_file()

    adapter = SubjectAdapter.from_pretrained(tmp_path / "adapter").float()
    assert adapter.config is not None
    assert adapter.config.vision["hidden_act"] == "gelu"
    own, given = adapter.image_encoder.state_dict(), load_file(tower / "model.safetensors")
    for name, tensor in own.items():
        kept = given.get(name, given.get(f"vision_model.{name}"))
        assert kept is not None
        assert torch.allclose(tensor, kept, atol=1e-3)
    plain = draw(pipe)
    with attach(pipe, adapter) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        handle.set_scene([dog()])
        assert not torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("fixture", "name"), [("pipe", "stickworld_subject"), ("flux_pipe", "stickworld_dit_subject")]
)
def test_the_embedded_world_trains_an_encoder(
    fixture: str, name: str, request: pytest.FixtureRequest, tmp_path: Path, tower: Path
) -> None:
    """With its frozen tower, as the recipes say, and with a new one."""
    pipe: Any = request.getfixturevalue(fixture)
    convert("stickworld", "0:4", tmp_path / "world", Options(size=32, subjects=2))
    pipe.save_pretrained(tmp_path / "base")
    tiny = config_of(tmp_path / "base", tmp_path / "world", tmp_path, steps=2, learning_rate=0.1)
    config = load_config(CONFIGS / f"{name}.yaml", [])
    config |= {key: value for key, value in tiny.items() if key in config and key != "recipe"}
    with pytest.raises(RecipeError, match="train_image_encoder: expected true for a new image encoder"):
        checked(SubjectTrainingConfig, config | {"image_encoder": None, "vision": VISION})
    as_written: Any = make_recipe(config | {"image_encoder": str(tower), "workers": 0})
    assert as_written.model.config.layers == (-1,)
    assert (as_written.model.config.token_dim, as_written.model.config.close_up) == (64, True)
    assert not any(p.requires_grad for p in as_written.model.image_encoder.parameters())
    assert np.isfinite(as_written.loss(as_written.batch(0), as_written.generator(0)).item())
    new = {"image_encoder": None, "vision": VISION, "train_image_encoder": True}
    recipe: Any = make_recipe(config | new | {"layers": [1], "token_dim": 8, "workers": 0})
    tower = {name: t.clone() for name, t in recipe.model.image_encoder.state_dict().items()}
    for attention, _ in recipe.model.attentions.values():  # zero at the start, which stops all others
        torch.nn.init.normal_(attention.to_out[0].weight, std=0.1)
    assert len(recipe.train()) == 2
    kept = {n for n, t in recipe.model.image_encoder.state_dict().items() if torch.equal(t, tower[n])}
    unread = {name for name in tower if "layers.1." in name or "post_layernorm" in name}
    key_biases = {name for name in tower if name.endswith("k_proj.bias")}  # which a softmax does not see
    assert unread <= kept <= unread | key_biases
    adapter = SubjectAdapter.from_pretrained(tmp_path / "adapter")
    assert adapter.config is not None
    assert adapter.config.layers == (1,)
    assert not any(parameter.requires_grad for parameter in adapter.image_encoder.parameters())


@pytest.mark.parametrize(
    ("name", "base", "part", "kind"),
    [
        ("stickworld_subject", "stickworld_base", "unet", UNet2DConditionModel),
        ("stickworld_dit_subject", "stickworld_dit", "transformer", FluxTransformer2DModel),
    ],
)
def test_the_worlds_encoders_are_small(name: str, base: str, part: str, kind: Any) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [])
    vision = CLIP_LARGE | load_config(CONFIGS / "stickworld_image_tower.yaml", [])["vision"]
    with torch.device("meta"):
        denoiser = kind(**load_config(CONFIGS / f"{base}.yaml", [])[part])
        adapter = SubjectAdapter.for_denoiser(
            denoiser, vision=vision, token_dim=config["token_dim"], layers=config["layers"]
        )
    assert 1e6 < 2 * sum(parameter.numel() for parameter in adapter.parameters()) < 4e6, "bytes, as exported"


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
@pytest.mark.parametrize("box", [None, (0.0, 0.0, 0.5, 1.0)])
def test_given_tokens_act_as_the_scene_does(fixture: str, box: Any, request: pytest.FixtureRequest) -> None:
    """What training does is what drawing does."""
    pipe: Any = request.getfixturevalue(fixture)
    adapter = trained_subject_adapter(denoiser_of(pipe))
    plain = draw(pipe)
    with attach(pipe, adapter) as handle:
        binding = handle["subject"]
        binding.configure(**ENCODER_ALONE)
        handle.set_scene([dog(box=box)])
        wanted = draw(pipe)
        tokens = adapter([foreground(dog()).seen(close_up=True)])
        binding.set_tokens(tokens, [() if box is None else (box,)], [0.7])
        assert torch.allclose(draw(pipe), wanted, atol=1e-5)
        binding.set_tokens(tokens, [()], [0.0])
        assert torch.allclose(draw(pipe), plain, atol=1e-5)
        handle.clear()
        assert torch.equal(draw(pipe), plain)
        with pytest.raises(SceneError, match="expected boxes and weights for 1 rows, got 2 and 1"):
            binding.set_tokens(tokens, [(), ()])


def test_gradients_reach_every_weight(pipe: Any, pictures: Path, tmp_path: Path, tower: Path) -> None:
    recipe: Any = make_recipe(subject_config(pipe, pictures, tmp_path, tower, batch_size=6))
    for attention, _ in recipe.model.attentions.values():  # zero at the start, which stops all others
        torch.nn.init.normal_(attention.to_out[0].weight, std=0.1)
    batch = recipe.batch(0)
    assert batch["present"].sum() == 3
    recipe.loss(batch, recipe.generator(0)).backward()
    without = [n for n, p in recipe.model.named_parameters() if p.requires_grad and not p.grad.abs().sum()]
    assert without == []


def test_what_is_drawn_of_an_example() -> None:
    riding = Interaction("dog", "riding", "bike", (0.1, 0.1, 0.5, 0.5), (0.2, 0.4, 0.9, 0.9))
    (found,) = subjects_of([riding, dog()])
    assert found.box == riding.subject_box
    drops = SubjectDropsConfig(subject=0.2, caption=0.1, all=0.1)
    vary, rng = SubjectVariation(drops, ReferenceChanges(), 16, close_up=True), random.Random(0)
    drawn = [vary("a dog", [dog()], rng) for _ in range(2000)]
    shares = np.mean([[not items, not prompt] for prompt, items in drawn], 0)
    assert shares == pytest.approx([1 - 0.9 * 0.8, 1 - 0.9 * 0.9], abs=0.03)
    places = SubjectVariation(SubjectDropsConfig(subject=0, box=0.3), ReferenceChanges(), 16, True)
    placed = [bool(places.more([found], rng)["placed"]) for _ in range(300)]
    assert np.mean(placed) == pytest.approx(0.7, abs=0.08)
    assert vary.more([], rng)["present"] == vary.more([], rng)["placed"] == 0
    more = vary.more([dog()], rng)
    assert more["present"] == 1
    assert more["reference"].shape == (3, 16, 16)


def test_boxes_count_more_in_the_loss_even_where_a_subject_is_seen_everywhere(
    pipe: Any, pictures: Path, tmp_path: Path, tower: Path
) -> None:
    drops = {"subject": 0, "caption": 0, "all": 0, "box": 1}
    config = subject_config(pipe, pictures, tmp_path, tower, batch_size=6, drops=drops)
    losses = []
    for more in (0.0, 4.0, 4e6):
        recipe: Any = make_recipe(config | {"loss": {"boxes": more}, "output_dir": str(tmp_path / f"{more}")})
        batch = recipe.batch(0)
        assert not batch["placed"].any()
        assert sum(item.box is not None for items in batch["items"] for item in items) == 2
        losses.append(recipe.loss(batch, recipe.generator(0)).item())
    assert losses[1] != losses[0]
    # of pictures with a box next to nothing but what is in it counts; of others all of it
    batch = recipe.batch(0)
    inside = inside_boxes(batch["items"], *batch["latents"].shape[2:])
    assert inside.flatten(1).sum(1).count_nonzero() == 2
    y, x = inside[next(n for n in range(6) if inside[n].any()), 0].nonzero().unbind(1)
    side = inside.shape[-1]
    assert (y.min() / side, x.min() / side) == pytest.approx((0.1, 0.1), abs=1 / side)
    assert losses[2] == pytest.approx(by_hand(recipe, batch, inside), rel=1e-3)


@torch.no_grad()
def by_hand(recipe: Any, batch: dict[str, Any], inside: torch.Tensor) -> float:
    """The loss where boxes alone count, if there are any."""
    recipe.condition(batch)
    noisy, times, given = recipe.base.noisy(batch, recipe.device, recipe.dtype)
    predicted = recipe.base.predict(noisy, times, given, batch)
    target = recipe.base.objective.target(batch["latents"], batch["noise"], times)
    error = (predicted - target).square().mean(1, keepdim=True)
    rows = [one[where > 0] if where.any() else one for one, where in zip(error, inside, strict=True)]
    return torch.stack([row.mean() for row in rows]).mean().item()


def test_references_are_changed_and_stay_what_they_are() -> None:
    """Not where and how they lie, but their colours; white around them."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste((200, 30, 30), (10, 5, 30, 35))
    how, rng = ReferenceChanges(), random.Random(1)
    made = [changed(image, how, rng) for _ in range(20)]
    assert len({one.tobytes() for one in made}) == 20
    for one in made:
        pixels = np.asarray(one).astype(int)
        assert (pixels[[0, -1]] > 235).all()
        red = (pixels[..., 0] - pixels[..., 1]) > 60
        assert 300 < red.sum() < 1100, "of 600"
        assert pixels[red].mean(0) == pytest.approx([200, 30, 30], abs=40)
    still = ReferenceChanges(flip=0, rotation=0, scale=0, blur=0, elastic=0)
    assert changed(image, still, rng).tobytes() == image.tobytes()


def test_references_without_masks_are_warned_of(
    pictures: Path, tmp_path: Path, pipe: Any, tower: Path, capsys: Any
) -> None:
    make_recipe(subject_config(pipe, pictures, tmp_path, tower))
    assert "taken whole" not in capsys.readouterr().err
    (tmp_path / "rows").mkdir()
    picture(0, (32, 32)).save(tmp_path / "rows/0.png")
    whole = {"file_name": "0.png", "prompt": "a dog", "subjects": [{"phrase": "dog", "image": "0.png"}]}
    (tmp_path / "rows/metadata.jsonl").write_text(json.dumps(whole) + "\n")
    mixed = [{"path": str(tmp_path / "rows")}, {"path": str(pictures)}]
    make_recipe(subject_config(pipe, pictures, tmp_path, tower, data=mixed))
    assert "1 of 4 references that were looked at are taken whole" in capsys.readouterr().err


def test_a_reference_with_nothing_of_its_subject_is_one_sentence(
    pictures: Path, tmp_path: Path, pipe: Any, tower: Path, capsys: Any, monkeypatch: Any
) -> None:
    """In `data check`, and in training where nobody has checked."""
    rows = []
    (tmp_path / "rows").mkdir()
    for number in range(2):
        picture(number, (32, 32)).save(tmp_path / f"rows/{number}.png")
        Image.new("RGB", (16, 16), "white").save(tmp_path / f"rows/white{number}.png")
        subject = {"phrase": "dog", "image": f"white{number}.png"}
        rows.append({"file_name": f"{number}.png", "prompt": "a dog", "subjects": [subject]})
    (tmp_path / "rows/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "rows")]) != 0
    said = "expected pixels of it in its picture, got none by its white background"
    assert said in capsys.readouterr().out
    with pytest.raises(SceneError, match=said):
        make_recipe(subject_config(pipe, tmp_path / "rows", tmp_path, tower))

    def empty(_: Subject) -> None:
        raise SceneError(said)

    recipe = make_recipe(subject_config(pipe, pictures, tmp_path, tower))
    monkeypatch.setattr("interactdiff.training.subject.foreground", empty)  # of a row that was not looked at
    with pytest.raises(DataError, match=said):
        recipe.train()


def test_bad_references_are_one_sentence(pictures: Path, tmp_path: Path, pipe: Any, tower: Path) -> None:
    (tmp_path / "rows").mkdir()
    picture(0, (32, 32)).save(tmp_path / "rows/0.png")

    def problem(**subject: Any) -> str:
        row = {"file_name": "0.png", "prompt": "a dog", "subjects": [{"phrase": "dog"} | subject]}
        (tmp_path / "rows/metadata.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError) as refused:
            list(read_folder(tmp_path / "rows"))
        return str(refused.value)

    assert "line 1, subject 1, image: expected a picture" in problem(image="missing.png")
    assert "line 1, subject 1, image: expected " in problem(image="/etc/passwd")
    assert "line 1, subject 1, image: expected " in problem(image="../0.png")
    (tmp_path / "rows/metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a dog"}\n')
    config = subject_config(pipe, tmp_path / "rows", tmp_path, tower)
    with pytest.raises(RecipeError, match=r"expected subjects with pictures in the rows of .*, got none in"):
        make_recipe(config)
    rows = [{"file_name": f"{number}.png", "prompt": "a dog"} for number in range(150)]
    for row in rows:
        picture(0, (32, 32)).save(tmp_path / "rows" / row["file_name"])
    (tmp_path / "rows/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = [{"path": str(tmp_path / "rows")}, {"path": str(pictures)}]
    assert isinstance(make_recipe(config | {"data": mixed}), SubjectRecipe)
    with pytest.raises(RecipeError, match="image_encoder: expected it, vision or init_from, got none"):
        checked(SubjectTrainingConfig, config | {"image_encoder": None})
    with pytest.raises(RecipeError, match="layers: expected whole numbers of the image tower's layers"):
        checked(SubjectTrainingConfig, config | {"layers": "all"})
    with pytest.raises(RecipeError, match="image_encoder: expected CLIP's image tower at"):
        make_recipe(config | {"data": str(pictures), "image_encoder": str(tmp_path)})


def test_clears_layers_are_distilled_on_pictures(
    flux_pipe: Any, pictures: Path, tmp_path: Path, pipe: Any
) -> None:
    flux_pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, gradient_checkpointing=True, batch_size=3)
    del config["adapter"]
    config |= {"recipe": "distill_pictures", "clear": {"window": 1, "down_factor": 2}}
    recipe: Any = make_recipe(config | {"steps": 6})
    frozen = {name: t.clone() for name, t in recipe.base.denoiser.state_dict().items()}
    first = recipe.loss(recipe.batch(0), recipe.generator(0)).item()
    recipe.train()
    assert recipe.loss(recipe.batch(0), recipe.generator(0)).item() < first
    assert all(torch.equal(t, frozen[name]) for name, t in recipe.base.denoiser.state_dict().items())
    assert (tmp_path / "run/samples/000004.png").is_file()
    layers = ClearAdapter.from_pretrained(tmp_path / "adapter")
    assert layers.config.down_factor == 2
    plain = draw(flux_pipe)
    with attach(flux_pipe, layers) as handle:
        handle["clear"].configure(min_tokens=0)
        assert not torch.equal(draw(flux_pipe), plain)
    pipe.save_pretrained(tmp_path / "unet")
    with pytest.raises(RecipeError, match="expected a Flux base to distill, got a UNet2DConditionModel"):
        make_recipe(config | {"base": str(tmp_path / "unet"), "output_dir": str(tmp_path / "other")})


def test_subjects_of_a_row_are_read_with_their_pictures(pictures: Path) -> None:
    records = list(read_folder(pictures))
    assert [len(one.items) for one in records] == [1, 0, 1, 0, 1, 0]
    (first,) = records[0].items
    assert isinstance(first, Subject)
    assert first.image.size == (16, 16)
    assert first.mask is not None
    assert first.box is None
