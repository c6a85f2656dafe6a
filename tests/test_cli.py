"""The command line, run in this process on a tiny random model saved to a folder."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tiny import trained_adapter

import interactdiff.commands.demo
import interactdiff.stickworld
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import MODEL
from interactdiff.picture import enlarged, read_record, save_picture
from interactdiff.scene import Interaction, Scene
from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.world import ACTIONS, OBJECTS

RIDING = "person|riding|bike|0.30,0.20,0.62,0.80|0.28,0.55,0.70,0.92"
SENTENCE_START = "interactdiff: "


@pytest.fixture
def models(pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model/ and adapter/; commands run in an empty folder beside it."""
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    trained_adapter(pipe.unet).save_pretrained(tmp_path / "adapter")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def generate(models: Path, *flags: str) -> int:
    """Draw two steps with the tiny model."""
    chosen = ["--model", str(models / "model"), "--adapter", str(models / "adapter"), "--device", "cpu"]
    return main(["generate", *chosen, "--steps", "2", *flags])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(SENTENCE_START)
    return lines[0].removeprefix(SENTENCE_START)


def test_generate_writes_a_picture_that_says_how_it_was_drawn(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(models, "a person", "--interaction", RIDING, "--seed", "7", "--overlay") == 0
    assert capsys.readouterr().out.split() == ["out.png", "out.overlay.png"]
    record = read_record("out.png")
    assert record.scene == Scene("a person", (Interaction.parse(RIDING),), seed=7, steps=2)
    assert record.model == str(models / "model")
    assert record.adapters == {"interaction": str(models / "adapter")}
    assert Image.open("out.png").size == (16, 16)
    assert max(Image.open("out.overlay.png").size) >= 480
    assert sorted(path.name for path in Path().iterdir()) == ["out.overlay.png", "out.png"]


def test_a_picture_is_drawn_again_bit_for_bit(models: Path) -> None:
    flags = ["--interaction", RIDING, "--seed", "3", "--strength", "0.7", "--schedule", "0.5"]
    assert generate(models, "a person", *flags) == 0
    assert main(["generate", "--from", "out.png"]) == 0
    assert Path("out.again.png").read_bytes() == Path("out.png").read_bytes()
    assert main(["generate", "--from", "out.png", "--seed", "4", "--out", "other.png"]) == 0
    assert read_record("other.png").scene.seed == 4
    assert Image.open("other.png").tobytes() != Image.open("out.png").tobytes()


def test_the_interaction_reaches_the_picture(models: Path) -> None:
    for name, strength in (("on.png", "1"), ("off.png", "0")):
        flags = ["--interaction", RIDING, "--strength", strength, "--out", name]
        assert generate(models, "a person", *flags) == 0
    assert generate(models, "a person", "--out", "none.png") == 0
    on, off, none = (Image.open(name) for name in ("on.png", "off.png", "none.png"))
    assert ImageChops.difference(on, off).getbbox() is not None
    assert off.tobytes() == none.tobytes()


def test_flags_override_the_scene_file(models: Path) -> None:
    scene = Scene("a person", (Interaction.parse(RIDING),), seed=5, steps=9, schedule=0.25)
    Path("scene.json").write_text(scene.to_json(), encoding="utf-8")
    assert generate(models, "--scene", "scene.json", "--seed", "6") == 0
    drawn = read_record("out.png").scene
    assert (drawn.seed, drawn.steps, drawn.schedule) == (6, 2, 0.25)
    assert drawn.interactions == scene.interactions


def test_one_side_alone_keeps_the_models_own_other_side(models: Path) -> None:
    assert generate(models, "a person", "--width", "24") == 0
    assert Image.open("out.png").size == (24, 16)


def test_a_phrase_of_two_lines_is_one_phrase(models: Path) -> None:
    flags = ["--interaction", RIDING.replace("person", "a\nperson", 1), "--overlay"]
    assert generate(models, "a person", *flags) == 0
    assert read_record("out.overlay.png").scene.interactions[0].subject == "a person"


@pytest.fixture
def packaged(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model and adapter in the place of the packaged ones."""
    folders = {MODEL: models / "model", f"{MODEL}-interaction": models / "adapter"}
    monkeypatch.setattr(interactdiff.stickworld, "model_path", folders.__getitem__, raising=False)
    return models


def test_the_demo_shows_the_picture_beside_what_was_asked(
    packaged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        interactdiff.commands.demo, "DEMO", Scene("a person", (Interaction.parse(RIDING),), steps=2)
    )
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "out/demo.png\n"
    with Image.open("out/demo.png") as image:
        left, right = image.crop((0, 0, 512, 512)), image.crop((528, 0, 1040, 512))
        assert image.size == (1040, 512)
    assert ImageChops.difference(left, right).getbbox() is not None
    assert main(["generate", "--from", "out/demo.png", "--out", "alone.png"]) == 0
    assert enlarged(Image.open("alone.png")).tobytes() == left.tobytes()


def test_the_bundled_scene_uses_words_of_stickworld() -> None:
    words = {*ACTIONS, *OBJECTS, *COLOURS}
    one = interactdiff.commands.demo.DEMO.interactions[0]
    assert one.action in words
    assert set(one.object.split()) <= words


def test_packaged_names_last_and_take_their_adapter(packaged: Path) -> None:
    assert main(["generate", "a", "--interaction", RIDING, "--steps", "2"]) == 0
    record = read_record("out.png")
    assert (record.model, record.adapters) == (MODEL, {"interaction": f"{MODEL}-interaction"})


def test_an_incomplete_install_is_named(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packaged / "model").rename(packaged / "gone")
    assert main(["generate", "a"]) == 2
    assert f"expected the packaged model {MODEL}" in refusal(capsys)


def boxes(subject: str, thing: str = "0.28,0.55,0.70,0.92") -> list[str]:
    """Flags that ask for these boxes."""
    return ["a person", "--interaction", f"person|riding|bike|{subject}|{thing}"]


BAD_FLAGS = {
    "outside": (
        boxes("0.3,0.2,1.62,0.8"),
        "interaction 1: subject_box: expected x1 to be a number in [0, 1]",
    ),
    "negative": (boxes("0.3,0.2,0.6,0.8", "-0.1,0,1,1"), "object_box: expected x0"),
    "inverted": (boxes("0.6,0.2,0.3,0.8"), "expected x0 < x1, got x0 = 0.6 and x1 = 0.3"),
    "zero area": (boxes("0.3,0.2,0.6,0.2"), "expected y0 < y1"),
    "nan": (boxes("0.3,nan,0.6,0.8"), "got nan"),
    "infinite": (boxes("0.3,0.2,inf,0.8"), "got inf"),
    "three numbers": (boxes("0.3,0.2,0.6"), "expected four numbers x0,y0,x1,y1, got 3"),
    "no numbers": (boxes("a,b,c,d"), "expected four numbers"),
    "four parts": (["a", "--interaction", "person|riding|0,0,1,1|0,0,1,1"], "expected five parts"),
    "empty action": (["a", "--interaction", RIDING.replace("riding", " ")], "action: expected a phrase"),
    "empty subject": (["a", "--interaction", RIDING.replace("person", "")], "subject: expected a phrase"),
    "no prompt": ([], "expected a prompt"),
    "seed": (["a", "--seed", "-1"], "seed: expected a whole number from 0"),
    "seed text": (["a", "--seed", "x"], "argument --seed: expected a whole number, got 'x'"),
    "steps": (["a", "--steps", "0"], "steps: expected a whole number from 1"),
    "strength": (["a", "--strength", "2.5"], "strength: expected a number from 0 to 2"),
    "schedule": (["a", "--schedule", "nan"], "schedule: expected a share in [0, 1]"),
    "width": (["a", "--width", "30"], "width: expected a multiple of 8"),
    "flag": (["a", "--colour", "red"], "unrecognized arguments: --colour"),
    "both sources": (["--scene", "a.json", "--from", "a.png"], "not allowed with"),
    "no scene": (["--scene", "missing.json"], "expected a scene file"),
    "no picture": (["--from", "missing.png"], "expected a PNG at missing.png"),
    "no png": (["a", "--out", "out.jpg"], "ends in .png"),
    "no folder": (["a", "--out", "missing/out.png"], "--out: expected a file that can be written"),
    "folder": (["a", "--out", "folder.png"], "a folder"),
    "overlay of no name": (["a", "--out", ".", "--overlay"], "ends in .png"),
    "no model": (
        ["a", "--model", "sd-1.5"],
        "as model a packaged one (stickworld, stickworld-dit), a folder",
    ),
    "no adapter": (["a", "--adapter", "./missing"], "expected as adapter a packaged one"),
    "no device": (["a", "--device", "toaster"], "expected a device of this machine"),
    "device without storage": (["a", "--device", "meta"], "expected a device of this machine"),
    "long phrase": (["a", "--interaction", RIDING.replace("bike", "b" * 30)], "at most 24 tokens"),
    "long prompt": (["b" * 30], "prompt: expected at most 24 tokens"),
    "too many": (["a"] + ["--interaction", RIDING] * 4, "expected at most 3 interactions"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags_get_one_sentence(
    flags: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.png").mkdir()
    assert generate(models, *flags) == 2
    assert message in refusal(capsys)
    assert [path.name for path in Path().iterdir()] == ["folder.png"]


BAD_SCENES = {
    "malformed": (
        '{\n  "prompt": "a",\n  "seed" 3\n}',
        "scene.json, line 3, column 10: expected JSON, got '3'",
    ),
    "cut off": ('{"prompt": "a"', "line 1, column 15"),
    "no object": ("[1]", "expected an object with prompt, got [1]"),
    "unknown key": ('{"prompt": "a", "sed": 1}', "got 'sed'"),
    "same key twice": ('{"prompt": "a", "seed": 1, "seed": 2}', "got 'seed' twice"),
    "nan": ('{"prompt": "a", "strength": NaN}', "strength: expected a number from 0 to 2, got nan"),
    "lists of boxes": (
        '{"prompt": "a", "interactions": [{"subject": "a", "action": "b", "object": "c", '
        '"subject_box": [0, 0, 1], "object_box": [0, 0, 1, 1]}]}',
        "interaction 1: subject_box: expected four numbers",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_SCENES.values(), ids=BAD_SCENES.keys())
def test_bad_scene_files_get_one_sentence(
    text: str, message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("scene.json").write_text(text, encoding="utf-8")
    assert generate(models, "--scene", "scene.json") == 2
    assert message in refusal(capsys)
    assert [path.name for path in Path().iterdir()] == ["scene.json"]


def drop_a_tensor(file: Path) -> None:
    """Leave a whole file without its first tensor."""
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    """Keep the first two thirds."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: truncate(at / "model/unet/diffusion_pytorch_model.safetensors"), "whole safetensors"),
        (
            lambda at: (at / "model/vae/diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            "whole safetensors",
        ),
        (
            lambda at: drop_a_tensor(at / "model/unet/diffusion_pytorch_model.safetensors"),
            "a diffusers model",
        ),
        (lambda at: drop_a_tensor(at / "adapter/adapter.safetensors"), "fuser.alpha_attn"),
        (lambda at: truncate(at / "adapter/adapter.safetensors"), "whole safetensors"),
        (lambda at: (at / "adapter/config.json").write_text("{"), "expected JSON"),
        (lambda at: (at / "adapter/config.json").unlink(), "config.json"),
        (lambda at: (at / "model/model_index.json").unlink(), "without model_index.json"),
        (lambda at: (at / "model/model_index.json").write_text("{"), "expected JSON in"),
        (lambda at: (at / "model/unet/config.json").write_text("{}"), "expected"),
        (
            lambda at: (at / "model/unet/diffusion_pytorch_model.safetensors").unlink(),
            "expected a diffusers model",
        ),
    ],
)
def test_damaged_files_get_one_sentence(
    damage, message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(models)
    assert generate(models, "a person", "--interaction", RIDING) == 2
    assert message in refusal(capsys)
    assert list(Path().iterdir()) == []


def test_an_adapter_for_another_base_names_both(
    models: Path, pipe: StableDiffusionPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**pipe.unet.config, "block_out_channels": (16, 48)}
    other = type(pipe.unet).from_config(config)
    InteractionAdapter.for_unet(other, hidden=16).save_pretrained(models / "adapter")
    assert generate(models, "a person", "--interaction", RIDING) == 2
    message = refusal(capsys)
    assert "widths 16, 48" in message or "width 16, 48" in message
    assert "width 16, 32" in message


def test_interactions_without_an_adapter_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a", "--interaction", RIDING, "--model", str(models / "model")]) == 2
    assert "expected an adapter for 1 interactions" in refusal(capsys)


def test_other_versions_are_named_when_drawing_again(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(models, "a person") == 0
    record = read_record("out.png")
    record.versions["torch"] = "0.1"
    save_picture(Image.open("out.png"), "old.png", record)
    capsys.readouterr()
    assert main(["generate", "--from", "old.png"]) == 0
    assert "drawn with torch 0.1, now" in capsys.readouterr().err


def test_an_unknown_dtype_in_a_picture_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(models, "a person") == 0
    save_picture(Image.open("out.png"), "odd.png", replace(read_record("out.png"), dtype="float64"))
    capsys.readouterr()
    assert main(["generate", "--from", "odd.png"]) == 2
    assert "expected a dtype of float32, float16, bfloat16 or auto, got 'float64'" in refusal(capsys)


def test_a_model_that_does_not_draw_from_text_is_refused(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = models / "model/model_index.json"
    saved = json.loads(index.read_text())
    parts = {name: saved[name] for name in ("_diffusers_version", "unet", "scheduler")}
    index.write_text(json.dumps(parts | {"_class_name": "DDPMPipeline"}))
    assert generate(models, "a person") == 2
    assert "without a tokenizer" in refusal(capsys)
    index.write_text(json.dumps(saved | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    assert generate(models, "a person") == 2
    assert "expected a pipeline from text" in refusal(capsys)


def test_help_needs_no_torch() -> None:
    code = "import sys\nfrom interactdiff.cli import build_parser\nbuild_parser().format_help()\n"
    code += "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_is_quiet(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScenePipeline, "generate", interrupted)
    assert generate(models, "a person") == 130
    assert capsys.readouterr() == ("", "")
    assert list(Path().iterdir()) == []


def test_a_full_disk_is_one_sentence(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert generate(models, "a person") == 2
    assert capsys.readouterr().err.endswith("got [Errno 28] No space left on device\n")
    assert list(Path().iterdir()) == []


def test_evaluate_and_train_refuse_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["evaluate"]) == 2
    assert "--world" in refusal(capsys)
    assert main(["evaluate", "--world", "--json", str(tmp_path / "no" / "table.json")]) == 2
    assert "--json: expected a file that can be written" in refusal(capsys)
    assert main(["evaluate", "--world", "--scenes", "0"]) == 2
    assert "--scenes: expected a whole number from 1 up" in refusal(capsys)
    assert main(["evaluate", "--world", "--size", "100"]) == 2
    assert refusal(capsys) == "--size: expected a multiple of 8 pixels, got 100"
    assert main(["evaluate", "--world", "--fast", "--model", "owner/name"]) == 2
    assert refusal(capsys) == "--fast: expected --adapter for the model owner/name, got none"
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "expected a YAML file" in refusal(capsys)
    recipe = tmp_path / "cake.yaml"
    recipe.write_text("recipe: cake")
    assert main(["train", str(recipe)]) == 2
    assert "'cake'" in refusal(capsys)


def test_the_record_is_json_with_scene_seed_and_models(models: Path) -> None:
    assert generate(models, "a person", "--seed", "11") == 0
    with Image.open("out.png") as image:
        values = json.loads(image.info["interactdiff"])
    assert values["seed"] == values["scene"]["seed"] == 11
    assert set(values["versions"]) == {"interactdiff", "torch", "diffusers", "transformers"}
