"""A recipe's keys and values as people type them: read, or refused in one sentence before any work."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import CONFIGS

from interactdiff.cli import main
from interactdiff.errors import RecipeError
from interactdiff.training.config import checked, computes_in_bfloat16
from interactdiff.training.run import load_config, recipe_class, recipes

FILES = sorted(CONFIGS.glob("*.yaml"))
VAE, INTERACTION, DIT, CLEAR, TEXT, T5, BASE, DETECTOR = (
    CONFIGS / f"{name}.yaml"
    for name in (
        "stickworld_vae",
        "stickworld_interaction",
        "stickworld_dit",
        "distill_clear_stickworld",
        "stickworld_text",
        "stickworld_t5",
        "stickworld_base",
        "stickworld_detector",
    )
)


@pytest.mark.parametrize(
    ("file", "newer", "other"),
    [(VAE, "freeze_encoder", True), (CONFIGS / "flux_interaction.yaml", "base_quantization", "int8")],
)
def test_a_checkpoint_from_before_a_key_goes_on_with_its_default(file: Path, newer: str, other: Any) -> None:
    values = load_config(file, [])
    config = checked(recipe_class(values).config_type, values)
    saved = json.loads(json.dumps(config.to_json()))
    old = {key: value for key, value in saved.items() if key != newer}
    if "loss" in saved:
        old["loss"] = {key: value for key, value in saved["loss"].items() if key != "weighting"}
    config.check_resumes(old, "a checkpoint")
    with pytest.raises(RecipeError, match=rf"expected {newer} to be .* as in a checkpoint, got {other!r}"):
        config.model_copy(update={newer: other}).check_resumes(old, "a checkpoint")
    with pytest.raises(RecipeError, match=r"expected gone to be 3 as in a checkpoint, got None"):
        config.check_resumes(old | {"gone": 3}, "a checkpoint")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_the_packaged_files_say_stays_as_it_is(file: Path) -> None:
    read = json.loads(json.dumps(load_config(file, [])))
    said = json.loads(json.dumps(yaml.safe_load(file.read_text())))
    if said["mixed_precision"] == "auto":
        said["mixed_precision"] = "bf16" if computes_in_bfloat16() else "no"
    assert read == said


def test_every_recipe_has_typed_keys() -> None:
    for name in recipes():
        fields = recipe_class({"recipe": name}).config_type.model_fields
        assert {"output_dir", "export_to", "steps", "learning_rate"} <= fields.keys()


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("learning_rate=3e-3", "learning_rate", 0.003),
        ("learning_rate=1E-4", "learning_rate", 0.0001),
        ("learning_rate=.5", "learning_rate", 0.5),
        ("weight_decay=0", "weight_decay", 0.0),
        ("steps=1_000", "steps", 1000),
        ("steps=1e4", "steps", 10_000),
        ("batch_size=4.0", "batch_size", 4),
        ("batch_size='8'", "batch_size", 8),
        ("stop_after=inf", "stop_after", math.inf),
        ("stop_after=.inf", "stop_after", math.inf),
        ("stop_at=Infinity", "stop_at", math.inf),
        ("stop_after=1.5", "stop_after", 1.5),
        ("stop_after=", "stop_after", math.inf),
        ("max_grad_norm=none", "max_grad_norm", math.inf),
        ("steps=1e3", "steps", 1000),
        ("batch_size=2.0", "batch_size", 2),
        ("mixed_precision=fp32", "mixed_precision", "no"),
        ("max_grad_norm=inf", "max_grad_norm", math.inf),
        ("mixed_precision=no", "mixed_precision", "no"),
        ("mixed_precision=off", "mixed_precision", "no"),
        ("mixed_precision=null", "mixed_precision", "no"),
        ("mixed_precision=None", "mixed_precision", "no"),
        ("mixed_precision=float32", "mixed_precision", "no"),
        ("mixed_precision=float16", "mixed_precision", "fp16"),
        ("mixed_precision=bfloat16", "mixed_precision", "bf16"),
        ("mixed_precision=BF16", "mixed_precision", "bf16"),
        ("mixed_precision=auto", "mixed_precision", "bf16" if computes_in_bfloat16() else "no"),
        ("lr_scheduler=Cosine", "lr_scheduler", "cosine"),
        ("optimizer=AdamW", "optimizer", "adamw"),
        ("init_from=None", "init_from", None),
        ("init_from=", "init_from", None),
        ("freeze_encoder=yes", "freeze_encoder", True),
        ("freeze_encoder=0", "freeze_encoder", False),
        ("output_dir=2024", "output_dir", "2024"),
        ("output_dir=runs//vae/", "output_dir", "runs/vae"),
        ("output_dir=~/vae", "output_dir", str(Path("~/vae").expanduser())),
    ],
)
def test_values_are_read_as_people_type_them(typed: str, key: str, value: Any) -> None:
    got = load_config(VAE, [typed])[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("file", "typed", "sentence"),
    [
        (VAE, "batch_size=two", "batch_size: expected a whole number from 1 up, got 'two'"),
        (VAE, "batch_size=2.5", "batch_size: expected a whole number from 1 up, got 2.5"),
        (VAE, "batch_size=yes", "batch_size: expected a whole number from 1 up, got True"),
        (VAE, "batch_size=[2]", "batch_size: expected a whole number from 1 up, got [2]"),
        (VAE, "steps=inf", "steps: expected a whole number from 1 up, got 'inf'"),
        (VAE, "steps=", "steps: expected a whole number from 1 up, got None"),
        (VAE, "learning_rate=3e", "learning_rate: expected a number from 0 up, got '3e'"),
        (VAE, "learning_rate=-1e-3", "learning_rate: expected a number from 0 up, got '-1e-3'"),
        (VAE, "learning_rate=nan", "learning_rate: expected a number from 0 up, got 'nan'"),
        (VAE, "seed=4294967296", "seed: expected a whole number from 0 to 4294967295, got 4294967296"),
        (VAE, "ema_decay=1.1", "ema_decay: expected a number from 0 to 1, got 1.1"),
        (VAE, "lr_scheduler=cosin", "got 'cosin': did you mean cosine?"),
        (VAE, "lr_scheduler=cosine_with_restart", "did you mean cosine_with_restarts?"),
        (VAE, "lr_scheduler=piecewise_constant", "lr_scheduler: expected linear, cosine, cosine_with_re"),
        (VAE, "lr_scheduler=cosine_by_time", "stop_after: expected minutes for lr_scheduler=cosine_by_time"),
        (VAE, "optimizer=adam", "adamw8bit or prodigy, got 'adam': did you mean adamw?"),
        (VAE, "optimizer=sgd", "optimizer: expected adamw, muon, adamw8bit or prodigy, got 'sgd'"),
        (
            VAE,
            "mixed_precision=fp61",
            "mixed_precision: expected no, fp16, bf16 or auto, got 'fp61': did you mean fp16",
        ),
        (VAE, "mixed_precision=yes", "mixed_precision: expected no, fp16, bf16 or auto, got True"),
        (VAE, "learning_rat=1", "got 'learning_rat': did you mean learning_rate?"),
        (VAE, "base=x", "expected a key of "),
        (VAE, "freeze_encoder=maybe", "freeze_encoder: expected true or false, got 'maybe'"),
        (VAE, "output_dir=yes", "output_dir: expected a path or a name, got True"),
        (VAE, "init_from=[a]", "init_from: expected a path or a name, got ['a']"),
        (VAE, "model=3", "model: expected a valid dictionary, got 3"),
        (
            VAE,
            "model={latent_chanels: 8}",
            "model: expected an argument of the model, got 'latent_chanels': did",
        ),
        (VAE, "model={latent_channels: two}", "model: expected arguments that fit together, got TypeError"),
        (VAE, "recipe=vea", "got 'vea': did you mean vae?"),
        (VAE, "recipe=[vae]", "got ['vae']"),
        (VAE, "recipe={a: 1}", "got {'a': 1}"),
        (VAE, "seed=-1", "seed: expected a whole number from 0 to 4294967295, got -1"),
        (VAE, "ema_decay=off", "ema_decay: expected a number from 0 to 1, got False"),
        (VAE, "save_every=5", "got 'save_every': did you mean sample_every?"),
        (VAE, "steps=2024-01-01", "steps: expected a whole number from 1 up, got datetime.date"),
        (VAE, "model={latent_channels: 1, latent_channels: 2}", "got latent_channels again at line 1"),
        (DIT, "sizes=128", "sizes: expected a valid dictionary, got 128"),
        (
            DIT,
            "sizes={a: {renders: 8, batch_size: 2, share: 1}}",
            "sizes.a: expected a whole number from 1 up",
        ),
        (INTERACTION, "adapter=", "adapter: expected a valid dictionary, got None"),
        (INTERACTION, "adapter.hidden=3", "expected a key of "),
        (INTERACTION, "adapter={hiden: 3}", "got 'adapter.hiden': did you mean hidden?"),
        (INTERACTION, "adapter={hidden: 0}", "adapter.hidden: expected a whole number from 1 up, got 0"),
        (
            INTERACTION,
            "adapter={init: opened}",
            "adapter.init: expected published or open, got 'opened': did you",
        ),
        (INTERACTION, "adapter=[hidden]", "adapter: expected "),
        (
            INTERACTION,
            "keep_caption=0.9",
            "expected keep_caption and strip_caption of at most 1 in all, got 1.2",
        ),
        (INTERACTION, "null_all=110%", "null_all: expected a number from 0 to 1, got '110%'"),
        (DIT, "logit_std=-1", "logit_std: expected a number from 0 up, got -1"),
        (
            DIT,
            "transformer={num_layers: 1, heads: 2}",
            "transformer: expected an argument of the model, got 'heads'",
        ),
        (DIT, "sizes={96: {renders: 8, batch_size: 2, shares: 1}}", "got 'sizes.96.shares'"),
        (
            DIT,
            "sizes={96: {renders: 8, batch_size: 2, share: 2}}",
            "sizes.96.share: expected a number from 0 to",
        ),
        (
            DIT,
            "sizes={96: {renders: 8, batch_size: 2, share: .5}}",
            "sizes: expected shares of the sizes that",
        ),
        (CLEAR, "logits=1.3", "logits: expected two numbers, a mean and a deviation, or null, got 1.3"),
        (CLEAR, "logits=[a, 1]", "logits.0: expected a number, got 'a'"),
        (CLEAR, "clear={window: 0}", "clear.window: expected a whole number from 1 up, got 0"),
        (
            CLEAR,
            "clear={shape: cirkle}",
            "clear.shape: expected circle or square, got 'cirkle': did you mean ci",
        ),
        (CLEAR, "data={folder: x}", "expected the key data.pictures in "),
        (TEXT, "text_encoder={hidden_size: 16}", "expected the key text_encoder.intermediate_size in "),
        (TEXT, "phrases=2", "phrases: expected a number from 0 to 1, got 2"),
        (
            T5,
            "text_encoder={d_modle: 8}",
            "text_encoder: expected an argument of the model, got 'd_modle': did",
        ),
        (BASE, "unet={block_out_channels: [8], down_block_types: []}", "unet: expected arguments that fit"),
        (BASE, "batch_size=3", "got 'batch_size': there are recipe, output_dir"),
        (BASE, "timestep_power=0", "timestep_power: expected a number above 0, got 0"),
        (DETECTOR, "model={widths: [8]}", "model: expected arguments that fit together, got ValueError"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(file: Path, typed: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_config(file, [typed])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["data=people", "output_dir=people"], "output_dir: expected a folder outside of the data people"),
        (["data=people", "output_dir=./people/run"], "output_dir: expected a folder outside of the data"),
        (["data=people", "export_to=people"], "export_to: expected a folder outside of the data people"),
        (
            ["validation={data: held_out}", "output_dir=held_out"],
            "outside of the data held_out, got held_out",
        ),
        (["data=runs/samples", "output_dir=runs"], "data: expected a folder that is not a run's samples"),
        (
            ["data=runs/checkpoint-5/x", "output_dir=runs"],
            "expected a folder that is not a run's checkpoint-5",
        ),
    ],
)
def test_a_run_does_not_write_among_its_pictures(typed: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_config(CONFIGS / "sd15_interaction.yaml", typed)
    assert sentence in str(refused.value)


def test_pictures_may_lie_beside_what_a_run_writes() -> None:
    config = load_config(
        CONFIGS / "sd15_interaction.yaml", ["data=people", "output_dir=.", "export_to=./made"]
    )
    assert config["output_dir"] == "."


def test_a_misspelt_key_is_named_rather_than_the_missing_one(tmp_path: Path) -> None:
    text = VAE.read_text().replace("learning_rate:", "learning-rate:")
    (tmp_path / "vae.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"got 'learning-rate': did you mean learning_rate\?"):
        load_config(tmp_path / "vae.yaml", [])


@pytest.mark.parametrize(
    ("added", "sentence"),
    [
        ("seed: 5", "expected each key once in .*, got seed again at line"),
        ("model: {}", "got model again"),
        ("5: 3", "expected a key of .*, got '5'"),
        ("twice: &a {b: *a}", "expected a key of .*, got 'twice'"),
        ("? [a]\n: 3", "to be YAML, got a mistake"),
    ],
)
def test_keys_that_no_recipe_can_have(tmp_path: Path, added: str, sentence: str) -> None:
    (tmp_path / "vae.yaml").write_text(f"{VAE.read_text()}\n{added}\n")
    with pytest.raises(RecipeError, match=sentence):
        load_config(tmp_path / "vae.yaml", [])


def test_fp16_without_a_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output_dir={tmp_path}", f"cache_dir={tmp_path}", "renders=2", "mixed_precision=float16"]
    assert main(["train", str(VAE), "--set", *overrides]) == 2
    assert (
        "mixed_precision: expected no or bf16 on a machine without a GPU, got 'fp16'\n"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*.npy"))  # before anything was made


def test_the_command_line_refuses_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"output_dir={tmp_path / 'run'}", "lr_scheduler=cosin"]
    assert main(["train", str(VAE), "--set", *overrides]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("interactdiff: lr_scheduler: expected linear, cosine, ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "run").exists()
