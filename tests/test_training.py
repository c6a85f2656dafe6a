"""Six real steps of every recipe at tiny size, and the same losses after a resume."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from recipes import (
    CONFIGS,
    SIZES,
    TEXT,
    VAE,
    check_that_a_loss_counts_by_its_weight,
    check_that_a_resumed_run_is_the_unbroken_one,
    short,
    tiny_reader,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from interactdiff import InteractionAdapter
from interactdiff.errors import RecipeError
from interactdiff.interaction.tokens import scene_phrases, scene_tensors
from interactdiff.scene import Entity, Interaction
from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.captions import PLACES, caption
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.training.adapter import in_random_slots, varied_items
from interactdiff.training.base import PooledDropout, VelocityBatch
from interactdiff.training.config import RecipeConfig, checked
from interactdiff.training.muon import Muon
from interactdiff.training.optimizers import make_optimizers
from interactdiff.training.run import load_config, make_recipe, run
from interactdiff.training.run_folder import checkpoints
from interactdiff.training.text import (
    OF_A_TEXT,
    OF_A_THING,
    answers_of_text,
    answers_of_things,
    centre_pooled,
    phrase_example,
)
from interactdiff.training.tokenizer import make_tokenizer, world_words
from interactdiff.training.vae import VaeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module follow each other: autoencoder, base, adapter."""
    return tmp_path_factory.mktemp("runs")


def recipe_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes, each reading what those before it wrote."""
    base = load_config(CONFIGS / "stickworld_base.yaml", [])
    unet = base["unet"] | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16}
    unet |= {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2}
    unet |= {"sample_size": 16, "layers_per_block": 1}
    adapter = {"max_interactions": 6, "hidden": 16, "grid_positions": True, "init": "open"}
    world, made = folder / "world", folder / "adapter"
    return {
        "stickworld_vae": short(folder, "stickworld_vae", model=VAE, export_to=str(world / "vae")),
        "stickworld_text": short(folder, "stickworld_text", text_encoder=TEXT, export_to=str(world)),
        "stickworld_base": short(
            folder,
            "stickworld_base",
            unet=unet,
            sizes=SIZES,
            vae=str(world / "vae"),
            text=str(world),
            latent_reader=tiny_reader(folder),
            export_to=str(world),
        ),
        "stickworld_interaction": short(
            folder, "stickworld_interaction", base=str(world), adapter=adapter, export_to=str(made)
        ),
    }


@pytest.mark.parametrize(
    "name", ["stickworld_vae", "stickworld_text", "stickworld_base", "stickworld_interaction"]
)
def test_resumed_run_has_the_losses_of_the_unbroken_one(folder: Path, name: str) -> None:
    unbroken = check_that_a_resumed_run_is_the_unbroken_one(recipe_configs(folder)[name])
    shown = "read.jsonl" if name == "stickworld_text" else "samples/000006.png"
    assert (unbroken.output / shown).is_file()
    logged = [json.loads(line) for line in (unbroken.output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [3, 6, 3, 6]


def test_what_the_recipes_write_is_loaded_by_stock_classes(folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder / "world")
    assert pipe("a person", num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)
    for weights in (folder / "world").rglob("*.safetensors"):
        assert {t.dtype for t in load_file(weights).values() if t.is_floating_point()} == {torch.float16}
    adapter = InteractionAdapter.from_pretrained(folder / "adapter")
    assert adapter.position_net.max_interactions == 6
    assert all(f.attn.to_out[0].weight.abs().sum() > 0 for f in adapter.fusers.values())


def test_base_stays_frozen_while_the_adapter_trains(folder: Path) -> None:
    elsewhere = {"steps": 2, "output_dir": str(folder / "frozen")}
    recipe = make_recipe(recipe_configs(folder)["stickworld_interaction"] | elsewhere)
    before = {k: v.clone() for k, v in recipe.pipe.unet.state_dict().items()}
    recipe.train()
    after = recipe.pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_only_so_many_checkpoints_are_kept(folder: Path) -> None:
    config = recipe_configs(folder)["stickworld_vae"]
    config |= {"checkpoint_every": 1, "steps": 4, "output_dir": str(folder / "many")}
    recipe = make_recipe(config | {"export_to": str(folder / "many-out")})
    recipe.train()
    assert [p.name for p in checkpoints(recipe.output)] == ["checkpoint-3", "checkpoint-4"]


def test_a_frozen_encoder_stays_while_the_decoder_is_polished(folder: Path) -> None:
    config = recipe_configs(folder)["stickworld_vae"] | {"freeze_encoder": True, "stop_at": 2}
    config |= {"init_from": str(folder / "world" / "vae"), "output_dir": str(folder / "polish")}
    recipe = make_recipe(config | {"export_to": str(folder / "polished")})
    assert len(recipe.train()) == 2
    before, after = (
        load_file(made / "diffusion_pytorch_model.safetensors")
        for made in (folder / "world" / "vae", folder / "polished")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_interactions_move_to_random_slots_whole() -> None:
    asked = sample_scene(3, 2).interactions()
    features = {phrase: torch.full((2,), float(n)) for n, phrase in enumerate(scene_phrases([asked]))}
    scene = scene_tensors([asked] * 64, features, 4)
    moved = in_random_slots(scene, torch.Generator().manual_seed(0))
    assert moved["masks"].sum(0).min() > 0  # every slot is used
    for row in range(64):
        slots = moved["masks"][row].bool()
        first = scene["subject_boxes"][row][scene["masks"][row].bool()]
        assert {*map(tuple, moved["subject_boxes"][row][slots].tolist())} == {*map(tuple, first.tolist())}
        for slot in slots.nonzero().flatten():
            same = (scene["subject_boxes"][row] == moved["subject_boxes"][row, slot]).all(-1).nonzero()[0]
            for name, tensor in moved.items():
                assert torch.equal(tensor[row, slot], scene[name][row, same[0]])


def test_what_a_text_says_is_in_it() -> None:
    """And nothing that is not: what is left out is no answer."""
    rng, words = random.Random(0), {"stripes": "strip", "dots": "dot", "checks": "check", "none": "no hat"}
    for seed in range(200):
        described = caption(sample_scene(seed), rng, verbs=seed % 3 > 0, colours=seed % 2 > 0)
        for thing, said in zip(described.things, answers_of_things(described), strict=True):
            own = described.text[slice(*thing.span)]
            assert said.keys() <= OF_A_THING.keys()
            for name, value in said.items():
                assert value in OF_A_THING[name]
                shown = described.text if name == "action" else own
                assert value == "person" or words.get(value, value) in shown, (own, said)
            colours = [word for word in own.replace(",", "").split() if word in COLOURS]
            values = [
                v for k, v in said.items() if k.endswith("colour") and v in COLOURS and k != "hair_colour"
            ]
            assert sorted(colours) == sorted(values), (own, said)
        whole = answers_of_text(described)
        assert whole.keys() <= OF_A_TEXT.keys()
        assert ("action 0" in whole) == (seed % 3 > 0 and bool(described.actions))
        assert any(place in described.text for place in PLACES[whole["background"]])


def test_phrases_are_things_without_an_article_or_actions() -> None:
    rng, kinds = random.Random(0), Counter()
    for seed in range(200):
        example = phrase_example(sample_scene(seed), rng)
        assert not example.text.startswith(("a ", "an "))
        kinds[len(example.things), len(example.actions)] += 1
    assert kinds.keys() == {(1, 0), (0, 1)}
    assert min(kinds.values()) > 30


def test_items_are_the_scene_with_some_slack() -> None:
    scene, rng = sample_scene(5, 2, 1), random.Random(0)
    true = {t.action: t for t in scene.triplets}
    seen = Counter()
    for _ in range(100):
        items = varied_items(scene, rng, 0.2, 0.03)
        assert 1 <= len(items) <= 3
        for item in items:
            seen[type(item)] += 1
            if isinstance(item, Interaction) and item.action is not None and len(true) == 2:
                wanted = true[item.action].subject_box
                assert item.subject_box != wanted
                assert max(abs(a - b) for a, b in zip(item.subject_box, wanted, strict=True)) < 0.15
            seen["no action"] += isinstance(item, Interaction) and item.action is None
    assert seen[Interaction] > seen[Entity] > 60
    assert 15 < seen["no action"] < 65


def test_the_pooled_caption_is_left_out_of_a_share_of_the_examples(folder: Path) -> None:
    unet = make_recipe(recipe_configs(folder)["stickworld_base"] | {"output_dir": str(folder / "drop")}).model
    text, pooled = torch.randn(64, 77, 16), PooledDropout(unet, 0.5)
    pooled.draw(64, torch.Generator().manual_seed(0))
    given = unet.train().add_embedding(text)
    assert 15 < (given.abs().sum(1) == 0).sum() < 49
    assert (unet.eval().add_embedding(text).abs().sum(1) > 0).all()
    unet.add_embedding = None
    with pytest.raises(RecipeError, match="expected a U-Net with addition_embed_type text, got"):
        PooledDropout(unet, 0.5)


@pytest.mark.parametrize("key", ["word_attention", "perceptual"])
def test_losses_beside_that_of_denoising_count_while_training(folder: Path, key: str) -> None:
    check_that_a_loss_counts_by_its_weight(recipe_configs(folder)["stickworld_base"], folder, key)


def test_velocity_loss_is_zero_for_the_true_velocity() -> None:
    latents, text = torch.randn(3, 4, 2, 2), torch.zeros(3, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    kept = torch.cos(torch.arange(1, 1001) / 1000 * torch.pi / 2)  # the cosine schedule's signal, near enough

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> Any:
            a = kept[timestep].view(-1, 1, 1, 1)
            s = (1 - a**2).sqrt()
            assert torch.allclose(x, a * latents + s * noise, atol=0.05)
            return type("Output", (), {"sample": a * noise - s * latents})

    noised = VelocityBatch(latents, torch.Generator().manual_seed(5), 0.7)
    predicted = noised.predict(Oracle(), text)
    assert noised.loss(predicted).item() < 1e-3
    assert torch.allclose(noised.estimate(predicted), latents, atol=0.05)
    assert torch.allclose(noised.signal, kept[noised.timesteps] ** 2, atol=0.01)


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = make_tokenizer(77)
    for word in world_words():
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.decode(tokenizer("quizzical").input_ids, skip_special_tokens=True) == "quizzical"


def test_every_tokenizer_is_the_same() -> None:
    """A resumed run makes its own."""
    assert make_tokenizer(77).get_vocab() == make_tokenizer(77).get_vocab()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("recipe: [", [], "line 1, column"),
        ("recipe: cake", [], "cake"),
        ("- a", [], "list"),
        ("recipe: vae", ["stepz=3"], "stepz"),
        ("recipe: vae", ["recipe=["], "the value of recipe"),
        ("recipe: vae", [], "the key output_dir"),
    ],
)
def test_a_wrong_configuration_is_refused(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        run(path, overrides, None)


def muon_config() -> RecipeConfig:
    values = load_config(CONFIGS / "stickworld_vae.yaml", ["learning_rate=0.1", "weight_decay=0"])
    return checked(VaeConfig, values)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    config = muon_config()
    layer = torch.nn.Linear(3, 4)
    muon, adamw = make_optimizers(list(layer.parameters()), config)
    layer.weight.grad, layer.bias.grad = torch.randn(4, 3), torch.randn(4)
    before = layer.weight.detach().clone()
    muon.step()
    singular = torch.linalg.svdvals(before - layer.weight) / (0.1 * 0.2 * 4**0.5)
    assert 0.5 < singular.min() <= singular.max() < 1.5  # near the orthogonal matrix, whatever the gradient
    assert [p.shape for group in adamw.param_groups for p in group["params"]] == [(4,)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_kernels_as_matrices(layout: torch.memory_format) -> None:
    config = muon_config()
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Linear(27, 4, bias=False)
    linear.weight.data = conv.weight.detach().flatten(1).clone()
    conv.to(memory_format=layout)
    gradient = torch.randn(4, 27)
    conv.weight.grad, linear.weight.grad = gradient.view(4, 3, 3, 3).clone(), gradient.clone()
    (kernels,), (matrices,) = (make_optimizers(list(one.parameters()), config) for one in (conv, linear))
    kernels.step()
    matrices.step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_muon_steps_as_that_of_torch() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (12, 5), (5, 12), (12, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 0.1, "weight_decay": 0.1}
    pair = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    before = [parameter.detach().clone() for parameter in ours]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for first, one, other in zip(before, ours, theirs, strict=True):
        moved = (other - first).norm()
        assert moved > 0.1
        assert (one - other).norm() / moved < 0.02  # torch's computes in bfloat16


def test_the_pooled_state_has_a_mean_of_zero() -> None:
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=50, eos_token_id=49, **TEXT)).eval()
    tokens = torch.randint(0, 49, (64, 9))
    tokens[:, -1] = 49
    with torch.no_grad():
        before = encoder(tokens)
        centre_pooled(encoder, tokens)
        after = encoder(tokens)
    assert before.pooler_output.mean(0).abs().max() > 1e-2
    assert after.pooler_output.mean(0).abs().max() < 1e-5
    moved = before.last_hidden_state - after.last_hidden_state
    assert torch.allclose(moved, before.pooler_output.mean(0).expand_as(moved), atol=1e-5)
