"""A base tuned on one subject: what changes, what is drawn once, and what unmodified diffusers loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from recipes import check_that_a_resumed_run_is_the_unbroken_one
from safetensors.torch import load_file
from tiny import close
from tiny_subject import half_mask, picture, trained_subject_adapter

from interactdiff import Subject, SubjectAdapter
from interactdiff.concept.encoders import extended
from interactdiff.errors import InteractdiffError, RecipeError
from interactdiff.sites import denoiser_of
from interactdiff.subject.foreground import foreground
from interactdiff.training.config import checked
from interactdiff.training.regular_pictures import regular_pictures
from interactdiff.training.run import make_recipe
from interactdiff.training.subject_tuning_config import SubjectTuningConfig

TOKEN, SIDE = "<subject>", 16


def tuning_config(pipe: Any, folder: Path, samples: bool = False, **changes: Any) -> dict[str, Any]:
    """Four tiny steps on a picture of a dog."""
    if not (folder / "base").is_dir():
        pipe.save_pretrained(folder / "base")
        picture(3, (24, 16)).save(folder / "dog.png")
        half_mask((24, 16)).save(folder / "mask.png")
    return {
        "recipe": "subject_tuning",
        "output_dir": str(folder / "run"),
        "export_to": str(folder / "made"),
        "base": str(folder / "base"),
        "reference": str(folder / "dog.png"),
        "mask": str(folder / "mask.png"),
        "caption": "a dog in blocks of colour",
        "class_word": "dog",
        "regular": {"count": 3, "steps": 1},
        "resolution": SIDE,
        "rank": 2,
        "validation": {"prompts": [f"a dog {TOKEN}"] if samples else [], "steps": 1},
        "seed": 0,
        "steps": 6,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "mixed_precision": "no",
        "ema_decay": 0.0,
        "log_every": 3,
        "checkpoint_every": 3,
        "checkpoints_total_limit": 2,
        "sample_every": 6,
        **changes,
    }


def parts_of(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights of its modules."""
    names = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
    modules = {name: getattr(pipe, name, None) for name in names}
    return {
        f"{name}.{path}": tensor.clone()
        for name, module in modules.items()
        if module is not None
        for path, tensor in module.state_dict().items()
    }


def with_old_ends(pipe: Any) -> Any:
    """As many published CLIPs are: the highest id ends a text."""
    for name in ("text_encoder", "text_encoder_2"):
        if type(encoder := getattr(pipe, name)).__name__.startswith("CLIP"):
            encoder.config.eos_token_id = 2
    return pipe


def says(pipe: Any, prompt: str) -> torch.Tensor:
    """A picture by a prompt."""
    with torch.no_grad():
        made = pipe(
            prompt,
            num_inference_steps=1,
            height=SIDE,
            width=SIDE,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
    return made.images


@pytest.mark.parametrize("fixture", ["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def test_lora_and_a_token_are_trained_and_loaded_by_a_stock_pipeline(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipe: Any = request.getfixturevalue(fixture)
    if fixture == "flux_pipe":
        with_old_ends(pipe)
    changes = {"train_text_encoder": True, "gradient_checkpointing": True, "steps": 2}
    config = tuning_config(pipe, tmp_path, samples=True, **changes)
    before = parts_of(pipe)
    recipe: Any = make_recipe(config)
    vectors = {name: vector.detach().clone() for name, vector in recipe.model.vectors.items()}
    assert len(recipe.train()) == 2
    after = parts_of(recipe.pipe)
    kept = [name for name in before if name.replace(".base_layer", "") in after]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept), "LoRA leaves the base as it is"
    for name, vector in recipe.model.vectors.items():
        assert not torch.equal(vector, vectors[name])
    (sample,) = (tmp_path / "run/samples").iterdir()
    assert Image.open(sample).size == (2 * SIDE, SIDE)

    missing = {"text_encoder_3": None, "tokenizer_3": None} if fixture == "sd3_pipe" else {}
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "base", **missing)
    stock.set_progress_bar_config(disable=True)
    plain = says(stock, "a dog")
    stock.load_lora_weights(tmp_path / "made")
    tuned = says(stock, "a dog")
    assert not torch.equal(tuned, plain)
    for n, name in enumerate(recipe.model.vectors):
        file = tmp_path / "made" / f"learned_embeds{name.removeprefix('text_encoder')}.safetensors"
        encoder, tokenizer = getattr(stock, name), getattr(stock, f"tokenizer{'_2' * (n > 0)}")
        assert {key: tuple(one.shape) for key, one in load_file(file).items()} == {
            TOKEN: (1, encoder.get_input_embeddings().weight.shape[1])
        }
        if fixture != "sd3_pipe":
            stock.load_textual_inversion(str(file), text_encoder=encoder, tokenizer=tokenizer)
            for module in encoder.modules():  # docs/subject.md
                if getattr(module, "eos_token_id", None) == 2:
                    module.eos_token_id = tokenizer.eos_token_id
            continue
        tokenizer.add_tokens(TOKEN)  # diffusers has no loader of textual inversion for SD3
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[-1] = load_file(file)[TOKEN][0]
    with torch.no_grad():
        ours = says(recipe.pipe, f"a dog {TOKEN}")
    assert torch.allclose(says(stock, f"a dog {TOKEN}"), ours, atol=1e-4)
    assert not torch.allclose(ours, tuned, atol=1e-4)


def test_the_whole_base_is_tuned_and_of_its_words_only_the_new_one(xl_pipe: Any, tmp_path: Path) -> None:
    changes = {"rank": None, "train_text_encoder": True, "learning_rate": 1e-3, "steps": 2}
    recipe: Any = make_recipe(tuning_config(with_old_ends(xl_pipe), tmp_path, **changes))
    before = parts_of(recipe.pipe)
    recipe.train()
    after = parts_of(recipe.pipe)
    still = {name for name in before if torch.equal(before[name], after[name])}
    tables = [name for name in before if name.endswith("token_embedding.weight")]
    assert len(tables) == 2
    assert {*tables} <= still
    moved = {name for name in before if not name.startswith("vae.")} - still
    assert len(moved) > 0.8 * len([name for name in before if not name.startswith("vae.")])
    assert any(name.startswith("text_encoder_2.") for name in moved)
    made: Any = DiffusionPipeline.from_pretrained(tmp_path / "made")
    made.set_progress_bar_config(disable=True)
    for table, (name, vector) in zip(sorted(tables), recipe.model.vectors.items(), strict=True):
        number = made.tokenizer.convert_tokens_to_ids(TOKEN)
        rows = getattr(made, name).get_input_embeddings().weight
        assert number == len(rows) - 1 == len(before[table])
        assert torch.equal(rows[:number], before[table])
        assert torch.equal(rows[number], vector[0])
    assert torch.allclose(says(made, f"a dog {TOKEN}"), says(recipe.pipe, f"a dog {TOKEN}"), atol=1e-4)


def saved_encoder(pipe: Any, folder: Path) -> str:
    trained_subject_adapter(denoiser_of(pipe)).save_pretrained(folder / "encoder")
    return str(folder / "encoder")


def test_a_run_that_was_cut_off_goes_on_with_the_same_pictures(
    flux_pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = saved_encoder(flux_pipe, tmp_path)
    config = tuning_config(flux_pipe, tmp_path, subject_encoder=encoder, encoder_weight=0.7)
    check_that_a_resumed_run_is_the_unbroken_one(config)
    assert capsys.readouterr().err.count("drawing 3 regular pictures") == 1
    assert len([*tmp_path.glob("run/regular-*/*.png")]) == 3


def test_regular_pictures_are_drawn_once(pipe: Any, tmp_path: Path) -> None:
    values = tuning_config(pipe, tmp_path)
    subject = Subject("dog", tmp_path / "dog.png", tmp_path / "mask.png")

    def drawn(**changes: Any) -> list[Image.Image]:
        return regular_pictures(
            pipe, SubjectAdapter(), subject, checked(SubjectTuningConfig, values | changes)
        )

    first = drawn()
    assert len({image.tobytes() for image in first}) == 3
    paths = sorted(tmp_path.glob("run/regular-*/*.png"))
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    stamps = [path.stat().st_mtime_ns for path in paths[1:]]
    paths[0].unlink()  # killed before it was written
    again = drawn(regular={"count": 4, "steps": 1})
    assert [image.tobytes() for image in again[:3]] == [image.tobytes() for image in first]
    assert [path.stat().st_mtime_ns for path in paths[1:]] == stamps
    unlike = drawn(regular={"count": 3, "steps": 1, "reference_weight": 0})
    assert unlike[0].tobytes() != first[0].tobytes(), "they are drawn with the reference"
    assert len([*tmp_path.glob("run/regular-*")]) == 2
    paths[1].write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"001.png: expected .*: delete it, and it is drawn again"):
        drawn()


def test_each_row_is_seen_by_the_encoder_with_its_own_picture(pipe: Any, tmp_path: Path) -> None:
    encoder = saved_encoder(pipe, tmp_path)
    config = tuning_config(pipe, tmp_path, subject_encoder=encoder, encoder_weight=0.7, batch_size=2)
    recipe: Any = make_recipe(config | {"flip": 1.0})
    assert len({index for step in range(3) for index in _chosen(recipe, step)[:2]}) == 3
    batch = recipe.batch(0)
    assert _chosen(recipe, 0)[2:] == [3, 3]
    assert torch.equal(batch["tokens"][2], recipe.tokens[1, 3])
    assert torch.equal(batch["latents"][2], recipe.latents[1, 3])
    assert not torch.equal(recipe.tokens[0, 3], recipe.tokens[1, 3]), "of the mirrored picture"
    found = foreground(Subject("dog", config["reference"], config.get("mask")))
    adapter = SubjectAdapter.from_pretrained(encoder, dtype=torch.float32)
    assert close(recipe.tokens[0, 3], adapter([found.seen(close_up=True)])[0]), "as it sees it when drawing"
    loss = recipe.loss(batch, recipe.generator(0))
    swapped = recipe.loss(batch | {"tokens": batch["tokens"].flip(0)}, recipe.generator(0))
    assert loss.item() != pytest.approx(swapped.item(), rel=1e-5)
    white = np.asarray(recipe.pictures[-1])
    assert (white[:, SIDE // 2 + 1 :] == 255).all(), "the reference's background is white"
    assert (white[SIDE // 2, : SIDE // 2] < 255).any()


def _chosen(recipe: Any, step: int) -> list[int]:
    """Which pictures a step's rows are of."""
    batch = recipe.batch(step)
    return [
        next(n for n in range(4) if any(torch.equal(recipe.latents[side, n], row) for side in (0, 1)))
        for row in batch["latents"]
    ]


def test_the_loss_is_that_of_regular_pictures_and_lambda_times_the_references(
    flux_pipe: Any, tmp_path: Path
) -> None:
    losses, gradients = [], []
    for weight in (0.0, 1.0, 3.0):
        recipe: Any = make_recipe(tuning_config(flux_pipe, tmp_path, subject_weight=weight))
        loss = recipe.loss(recipe.batch(0), recipe.generator(0))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: one.grad.abs().sum().item() for name, one in recipe.model.vectors.items()})
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] > losses[0] > 0
    assert set(gradients[0]) == {"text_encoder", "text_encoder_2"}
    assert not any(gradients[0].values()), "regular pictures do not name the token"
    assert all(gradients[1].values())


def test_what_cannot_be_tuned_is_one_sentence(pipe: Any, tmp_path: Path) -> None:
    pipe.tokenizer = extended(pipe.tokenizer, ["<known>"])
    config = tuning_config(pipe, tmp_path)
    for changes, sentence in (
        ({"token": "subject"}, "token: expected a token such as <subject>"),
        ({"token": "<Subject>"}, "token: expected a token in lower case"),
        ({"class_word": " "}, "class_word: expected text, got ' '"),
        ({"resolution": 20}, "resolution: expected a multiple of 16, got 20"),
        ({"loss": {"boxes": 1}}, "loss.boxes: expected 0"),
        ({"caption": f"a dog {TOKEN}"}, "caption: expected words that are known"),
        ({"validation": {"prompts": "a dog"}}, "validation.prompts: expected a list of captions"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            checked(SubjectTuningConfig, config | changes)
    Image.new("L", (24, 16)).save(tmp_path / "empty.png")
    for changes, sentence in (
        ({"reference": str(tmp_path / "none.png")}, "reference: expected a picture at .*, got no file"),
        (
            {"mask": str(tmp_path / "empty.png")},
            "reference: mask: expected light pixels .* got an empty mask",
        ),
        ({"token": "<known>"}, "expected a new token, got <known>, which the pipeline's tokenizer has"),
        ({"loss": {"density": "uniform"}}, "expected keys for the U-Net of .*, got loss.density"),
        ({"subject_encoder": str(tmp_path / "base")}, "expected a subject adapter in .*, got none in"),
    ):
        with pytest.raises(InteractdiffError, match=sentence):
            make_recipe(config | changes)
    assert not (tmp_path / "made").exists()
    assert not [*tmp_path.glob("run/*")], "nothing is drawn before"
