"""Six real steps of the diffusion transformer's recipes at tiny size, one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from recipes import (
    SIZES,
    TEXT,
    VAE,
    check_that_a_loss_counts_by_its_weight,
    check_that_a_resumed_run_is_the_unbroken_one,
    short,
    tiny_reader,
)
from safetensors.torch import load_file
from tiny_dit import tiny_flux

from interactdiff import InteractionAdapter, attach
from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.errors import RecipeError
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.training.distill import sharing_copy
from interactdiff.training.dit import FlowBatch, image_ids, packed
from interactdiff.training.run import make_recipe
from interactdiff.training.tokenizer import make_t5_tokenizer, world_words
from interactdiff.training.transfer import transferred
from interactdiff.training.world_data import cached_renders

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": [4, 6, 6],
}
NAMES = ["stickworld_t5", "stickworld_dit", "distill_clear_stickworld", "stickworld_dit_interaction"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs follow each other, with an autoencoder and CLIP's text encoder made before them."""
    made = tmp_path_factory.mktemp("runs")
    for name, part in (("stickworld_vae", {"model": VAE}), ("stickworld_text", {"text_encoder": TEXT})):
        where = made / "world" / ("vae" if name == "stickworld_vae" else "")
        make_recipe(short(made, name, **part, steps=1, export_to=str(where))).train()
    return made


def recipe_config(folder: Path, name: str) -> dict[str, Any]:
    """A recipe that reads what those before it wrote."""
    world = str(folder / "world")
    data = {"folder": str(folder / "drawn"), "pictures": 5, "prompts": None, "size": 96, "steps": 2}
    changes: dict[str, dict[str, Any]] = {
        "stickworld_t5": {"text_encoder": T5, "export_to": world},
        "stickworld_dit": {
            "text": world,
            "latent_reader": tiny_reader(folder),
            "transformer": TRANSFORMER,
            "sizes": SIZES,
            "export_to": world,
        },
        "distill_clear_stickworld": {
            "base": world,
            "clear": {"window": 2, "down_factor": 2},
            "data": data | {"guidance_scale": 2.0, "batch_size": 3},
            "export_to": str(folder / "clear"),
        },
        "stickworld_dit_interaction": {
            "base": world,
            "adapter": {"max_interactions": 6, "hidden": 16, "token_dim": 8, "init": "open"},
            "export_to": str(folder / "interaction"),
        },
    }
    return short(folder, name, **changes[name])


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_has_the_losses_of_the_unbroken_one(folder: Path, name: str) -> None:
    unbroken = check_that_a_resumed_run_is_the_unbroken_one(recipe_config(folder, name))
    shown = "read.jsonl" if name == "stickworld_t5" else "samples/000006.png"
    assert (unbroken.output / shown).is_file()


def test_what_the_recipes_write_is_loaded_by_stock_classes(folder: Path) -> None:
    pipe: Any = FluxPipeline.from_pretrained(folder / "world")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 1, "height": 96, "width": 96, "max_sequence_length": 77}
    assert pipe("a person", output_type="np", **how).images.shape == (1, 96, 96, 3)
    for config in (folder / "world").glob("*/config.json"):
        assert "_name_or_path" not in config.read_text(encoding="utf-8"), "a path of this machine"
    for weights in (folder / "world").rglob("*.safetensors"):
        assert {t.dtype for t in load_file(weights).values() if t.is_floating_point()} == {torch.float16}
    layers = ClearAdapter.from_pretrained(folder / "clear")
    assert layers.config == ClearConfig(2, 2)
    with attach(pipe, layers) as handle:
        handle["clear"].configure(min_tokens=0)
        pipe("a person", output_type="np", **how)
        assert handle["clear"].active


def test_an_interaction_adapter_trains_on_the_frozen_transformer(folder: Path) -> None:
    base = load_file(folder / "world" / "transformer" / "diffusion_pytorch_model.safetensors")
    recipe = make_recipe(
        recipe_config(folder, "stickworld_dit_interaction")
        | {"output_dir": str(folder / "frozen"), "steps": 2}
    )
    recipe.train()
    after = recipe.pipe.transformer.state_dict()
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in base.items())
    adapter = InteractionAdapter.from_pretrained(folder / "interaction")
    assert adapter.config.feature_dim == 16
    assert all(reader.to_v.weight.abs().sum() > 0 for reader in adapter.cross_attentions.values())


def test_an_untrained_transformer_predicts_nothing_yet(folder: Path) -> None:
    recipe = make_recipe(recipe_config(folder, "stickworld_dit") | {"output_dir": str(folder / "untrained")})
    text, pooled = recipe.text.states(*recipe.text.tokens(["a person"]))
    flow = FlowBatch(torch.randn(1, 4, 4, 6), text, pooled, torch.Generator().manual_seed(0))
    assert recipe.model(**flow.inputs).sample.abs().max() == 0


def test_a_transformer_goes_over_to_other_encoders(folder: Path) -> None:
    """To an autoencoder with its channels in another order, and to text encoders with negative states."""
    config = recipe_config(folder, "stickworld_dit") | {"output_dir": str(folder / "over")}
    recipe = make_recipe(config)
    order = [2, 0, 3, 1]
    last = recipe.vae.encoder.layers[-1]
    last.weight.data, last.bias.data = last.weight[order], last.bias[order]
    latents, texts = torch.randn(1, 4, 4, 6), ["a person kicking a ball"]
    flows = []
    for changed in (False, True):
        if changed:
            recipe.text.text_encoder_2.encoder.final_layer_norm.weight.neg_()
            norm = recipe.text.text_encoder.final_layer_norm
            norm.weight.neg_()
            norm.bias.neg_()
        text, pooled = recipe.text.states(*recipe.text.tokens(texts))
        flows.append(FlowBatch(latents, text, pooled, torch.Generator().manual_seed(0)))
    old, new = (flow.inputs for flow in flows)
    new["hidden_states"] = new["hidden_states"].unflatten(-1, (4, 4))[..., order, :].flatten(-2)

    before: Any = FluxTransformer2DModel.from_pretrained(folder / "world", subfolder="transformer")
    before = before.float()
    pictures = cached_renders(Path(config["cache_dir"]), 4, 96)
    captions = [sample_scene(seed).caption for seed in range(400)]
    after = transferred(folder / "world", recipe.vae, recipe.text, pictures, captions)
    expected = before(**old).sample.unflatten(-1, (4, 4))[..., order, :].flatten(-2)

    def error(model: Any) -> float:
        return ((model(**new).sample - expected).norm() / expected.norm()).item()

    assert error(after) < 0.05
    assert error(before) > 0.3  # what was there reads them wrongly


def test_a_run_that_is_transferred_starts_from_there(folder: Path) -> None:
    config = recipe_config(folder, "stickworld_dit") | {"output_dir": str(folder / "transferred")}
    source = str(folder / "world")
    assert make_recipe(config | {"transfer_from": source}).model.proj_out.weight.abs().sum() > 0
    with pytest.raises(RecipeError, match="transfer_from: expected none beside init_from"):
        make_recipe(config | {"transfer_from": source, "init_from": source})


def test_texts_are_cut_to_the_longest(folder: Path) -> None:
    made = recipe_config(folder, "stickworld_dit") | {"output_dir": str(folder / "cut"), "whole_text": 0.0}
    recipe = make_recipe(made)
    whole = recipe.text.tokens(["a person"])[1].shape[1]
    assert recipe.text.length(recipe.text.tokens(["", "a person"])[1]) == 16 < whole
    assert recipe.text.length(recipe.text.tokens(["a person " * 99])[1]) == whole
    seen, forward = [], recipe.model.forward
    recipe.model.forward = lambda **inputs: seen.append(inputs) or forward(**inputs)
    batch = recipe.batch(0)
    recipe.loss(batch, recipe.generator(0))
    assert batch["length"] == seen[0]["encoder_hidden_states"].shape[1] == len(seen[0]["txt_ids"])
    recipe.config = recipe.config.model_copy(update={"whole_text": 1.0})
    assert recipe.batch(0)["length"] == whole


@pytest.mark.parametrize("key", ["word_attention", "perceptual"])
def test_losses_beside_that_of_denoising_count_while_training(folder: Path, key: str) -> None:
    check_that_a_loss_counts_by_its_weight(recipe_config(folder, "stickworld_dit"), folder, key)


def test_flow_is_between_noise_and_latents() -> None:
    latents, text, pooled = torch.randn(64, 4, 4, 6), torch.zeros(64, 3, 5), torch.zeros(64, 2)
    for logits, middle in ((None, 0.5), ((1.3, 1.2), 0.73)):
        flow = FlowBatch(latents, text, pooled, torch.Generator().manual_seed(0), logits)
        share = flow.inputs["timestep"][:, None, None]
        x = flow.inputs["hidden_states"]
        assert torch.allclose(x - share * flow.target, packed(latents), atol=1e-5)
        assert torch.allclose(flow.estimate(flow.target), latents, atol=1e-5)
        assert flow.inputs["timestep"].mean().item() == pytest.approx(middle, abs=0.08)
        assert flow.loss(flow.target) == 0
    assert image_ids(latents)[:, 1:].tolist() == [[float(y), float(x)] for y in range(2) for x in range(3)]


def test_teacher_and_student_share_all_but_attention() -> None:
    teacher = tiny_flux().requires_grad_(False)
    student = sharing_copy(teacher)
    layers = ClearAdapter.for_denoiser(student, ClearConfig(2)).train()
    handle = attach(student, layers)
    handle["clear"].configure(min_tokens=0)
    latents = torch.randn(1, 4, 8, 8)
    flow = FlowBatch(latents, torch.randn(1, 3, 12), torch.randn(1, 16), torch.Generator().manual_seed(0))
    before = teacher(**flow.inputs).sample
    own, apart = {id(p) for p in teacher.parameters()}, set()

    def look(*_: object) -> None:
        apart.update(name for name, p in student.named_parameters() if id(p) not in own)

    hook = student.norm_out.register_forward_hook(look)
    F.mse_loss(student(**flow.inputs).sample, before).backward()
    hook.remove()
    assert apart == layers.state_dict().keys()
    assert {id(p) for p in student.parameters()} == own, "layers stay in the student between calls"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layers.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(teacher(**flow.inputs).sample, before)


def test_pictures_of_the_base_are_drawn_once(folder: Path) -> None:
    config = recipe_config(folder, "distill_clear_stickworld") | {"output_dir": str(folder / "again")}
    first = make_recipe(config)
    files = {file: file.stat().st_mtime_ns for file in (folder / "drawn").rglob("*.safetensors")}
    assert len(files) == 2  # parts of three and of two
    min(files).unlink()  # as if a run had been cut off
    again = make_recipe(config)
    assert {f.stat().st_mtime_ns == files[f] for f in files if f != min(files)} == {True}
    assert all(torch.equal(again.data[name], tensor) for name, tensor in first.data.items())
    other = make_recipe(config | {"data": config["data"] | {"guidance_scale": 3.0}})
    assert not torch.equal(other.data["latents"], first.data["latents"])


def test_prompts_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a person\n\na bike\n")
    config = recipe_config(folder, "distill_clear_stickworld") | {"output_dir": str(folder / "prompts")}
    asked = config["data"] | {"prompts": str(tmp_path / "prompts.txt")}
    text = make_recipe(config | {"data": asked}).data["text"]
    assert torch.equal(text[0], text[2])
    assert not torch.equal(text[0], text[1])
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(RecipeError, match="one a line, got none"):
        make_recipe(config | {"data": asked})


def test_heads_of_t5_start_by_looking_near(folder: Path) -> None:
    recipe = make_recipe(recipe_config(folder, "stickworld_t5") | {"output_dir": str(folder / "near")})
    attention = recipe.model["text_encoder"].encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(9, 9)[0]  # [heads, queries, keys]
    assert not bias[0].any()
    assert bias[1, 4].argmax() == 4
    assert bias[1, 4].tolist() == bias[1, 4].flip(0).tolist()
    assert (bias[1, 4].diff()[:4] > 0).all()


def test_every_word_of_the_world_is_one_token_of_t5() -> None:
    tokenizer = make_t5_tokenizer(77)
    for word in world_words():
        assert len(tokenizer(word).input_ids) == 2, word
    assert tokenizer.decode(tokenizer("quiz").input_ids, skip_special_tokens=True) == "quiz"
    assert tokenizer.get_vocab() == make_t5_tokenizer(77).get_vocab()
