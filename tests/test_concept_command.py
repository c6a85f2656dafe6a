"""interactdiff learn, masks, convert --fold and generate --adapter concept=...: as people type them."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_concept import PAIR, photo, trained_concept

from interactdiff import Entity, Scene
from interactdiff.bench.concept import BASES, bench_concept, capture_peaks, published_bytes
from interactdiff.cli import main
from interactdiff.commands import learn
from interactdiff.concept import ConceptAdapter, ConceptError, Learner, LearnOptions, Looking, MaskSettings
from interactdiff.concept.pictures import read_masks, read_photo
from interactdiff.picture import read_record

NAMED = ["--concept", "<hero>=cat", "--concept", "<blob>=dog"]


@pytest.fixture
def model(pipe: Any, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "model")
    photo(64, 48).save(tmp_path / "photo.png")
    for token, box in (("hero", (0, 0, 30, 48)), ("blob", (34, 10, 64, 48))):
        mask = Image.new("L", (64, 48))
        mask.paste(255, box)
        mask.save(tmp_path / f"{token}.png")
    return str(tmp_path / "model")


def arguments(folder: Path, *more: str) -> list[str]:
    given = [part for token in ("hero", "blob") for part in ("--mask", f"<{token}>={folder / token}.png")]
    learn = ["learn", str(folder / "photo.png"), *NAMED, *given, "--model", str(folder / "model")]
    return [*learn, "--out", str(folder / "my"), "--steps", "4", "--size", "32", *more]


def test_from_a_photo_to_a_picture(model: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("interactdiff.concept.learner.SAMPLE_STEPS", 1)
    assert main(arguments(tmp_path, "--sample-every", "4", "--set", "prefix=", "rank=2")) == 0
    assert {path.name for path in (tmp_path / "my").iterdir()} == {
        "adapter.safetensors", "config.json", "masks.png", "samples",
    }  # fmt: skip
    with Image.open(tmp_path / "my" / "masks.png") as picture:
        assert picture.width > 3 * 192
    with Image.open(tmp_path / "my" / "samples" / "000004.png") as picture:
        assert picture.width > 4 * 192
    said = capsys.readouterr()
    assert "masks.png: <hero> 50 %, <blob> 42 %" in said.out
    assert "4/4" in said.err
    adapter = ConceptAdapter.from_pretrained(tmp_path / "my")
    assert adapter.config.rank == 2
    drawn = ["generate", "<hero> on a <blob>", "--model", model, "--steps", "2", "--device", "cpu"]
    for out, chosen in (("one", []), ("two", ["--adapter", f"concept={tmp_path / 'my'}"])):
        assert main([*drawn, *chosen, "--out", str(tmp_path / f"{out}.png")]) == 0
    pixels = [Image.open(tmp_path / f"{out}.png").tobytes() for out in ("one", "two")]
    assert pixels[0] != pixels[1]
    assert read_record(tmp_path / "two.png").adapters == {"concept": str(tmp_path / "my")}
    assert main(["generate", "--from", str(tmp_path / "two.png"), "--out", str(tmp_path / "three.png")]) == 0
    assert Image.open(tmp_path / "three.png").tobytes() == pixels[1]


def test_two_files_at_once(pipe: Any, model: str, tmp_path: Path) -> None:
    for token, word in PAIR.items():
        trained_concept(pipe, {token: word}).save_pretrained(tmp_path / word)
    chosen = [f"concept:{word}={tmp_path / word}" for word in PAIR.values()]
    drawn = ["generate", "<hero> on <blob>", "--model", model, "--steps", "1", "--device", "cpu"]
    pixels = []
    for number, order in enumerate((chosen, chosen[::-1])):
        flags = [part for one in order for part in ("--adapter", one)]
        assert main([*drawn, *flags, "--out", str(tmp_path / f"{number}.png")]) == 0
        pixels.append(Image.open(tmp_path / f"{number}.png").tobytes())
    assert pixels[0] == pixels[1]


def test_interrupted_it_goes_on(model: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    step = Learner._train_step

    def interrupted(learner: Learner) -> Any:
        if learner.step == 2:
            raise KeyboardInterrupt
        return step(learner)

    monkeypatch.setattr(Learner, "_train_step", interrupted)
    assert main(arguments(tmp_path)) == 130
    assert "stopped after step 2: the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "my" / "adapter.safetensors").exists()
    with safe_open(tmp_path / "my" / "checkpoint.safetensors", "pt") as opened:
        assert '"step": 2' in opened.metadata()["state"]
    monkeypatch.undo()
    assert main(arguments(tmp_path)) == 0
    assert not list((tmp_path / "my").glob("checkpoint*"))
    assert main(arguments(tmp_path)) == 2
    assert "--out: expected a new folder" in capsys.readouterr().err


def test_masks_alone(model: str, tmp_path: Path, capsys: Any) -> None:
    command = ["masks", str(tmp_path / "photo.png"), "--concept", "c", "--concept", "d", "--model", model]
    command += ["--nearest", "--size", "32", "--prompt", "{0} on {1}", "--timesteps", "100"]
    command += [
        "--box",
        "c=0,0,0.5,1",
        "--mask",
        f"d={tmp_path / 'blob.png'}",
        "--out",
        str(tmp_path / "m.png"),
    ]
    assert main([*command, "--each"]) == 0
    said = capsys.readouterr().out
    assert "d: 41.7 % of the photo" in said
    with Image.open(tmp_path / "m.d.png") as white:
        assert white.size[0] > white.size[1]
        assert set(white.getdata()) == {0, 255}
    assert (tmp_path / "m.c.png").is_file()
    (tmp_path / "scene.json").write_text(Scene("", (), (Entity("C", (0.0, 0.0, 0.5, 1.0)),)).to_json())
    at = command.index("--box")
    in_scene = [*command[:at], "--scene", str(tmp_path / "scene.json"), *command[at + 2 : -1]]
    pixels = (tmp_path / "m.png").read_bytes()
    assert main([*in_scene, str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").read_bytes() == pixels
    given = [part for name, file in (("c/d", "hero"), ("c d", "blob"))
             for part in ("--concept", name, "--mask", f"{name}={tmp_path / file}.png")]  # fmt: skip
    command = [*command[:2], *given, "--each", "--size", "32", "--model", model, "--prompt", "{0} on {1}"]
    assert main([*command, "--out", str(tmp_path / "m.png")]) == 0
    assert {path.name for path in tmp_path.glob("m.c_*")} == {"m.c_d.png", "m.c_d-2.png"}


def test_flags_change_what_a_preset_says_of_looking(pipe: Any) -> None:
    parser = argparse.ArgumentParser()
    learn.add_to(parser.add_subparsers())

    def options(*flags: str) -> Any:
        args = parser.parse_args(["learn", "photo.png", *NAMED, "--out", "x", *flags])
        return learn._options(args, pipe, 32)

    ours = options()
    assert (ours.looking, ours.size) == (Looking(masks=MaskSettings(background="start")), 32)
    published, own = options("--preset", "published").looking, LearnOptions.published().looking
    assert published == own
    flags = ["--threshold", "0.3", "--timesteps", "10,20", "--background", "template", "--nearest",
             "--blocks", "1", "--exponent", "1.5", "--power", "2", "--seed", "7"]  # fmt: skip
    masks = MaskSettings(0.3, 1.5, 2, "template", "nearest")
    for preset, least in (("ours", 0.01), ("published", 0.0), ("custom-diffusion", 0.01)):
        changed = options("--preset", preset, *flags)
        assert changed.looking == Looking((10, 20), 7, (1,), replace(masks, minimum_area=least))
        assert changed.seed == 7
    assert options("--preset", "published", "--power", "2").looking.masks == replace(own.masks, power=2)


def test_photos_and_masks_are_read_as_they_are_shown(tmp_path: Path) -> None:
    """As the studio and the recipes read them: turned by EXIF, white behind transparency, 16 bits as 8."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 60), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = read_photo(str(tmp_path / "turned.jpg"))
    assert (turned.size, turned.mode) == ((40, 60), "RGB")
    assert read_photo(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((30, 20), 32768, dtype=np.uint16)).save(tmp_path / "half.png")
    Image.new("RGBA", (20, 30), (255, 255, 255, 0)).save(tmp_path / "seen.png")
    assert float(read_masks({"<hero>": str(tmp_path / "seen.png")}, turned)["<hero>"].max()) == 0
    masks = read_masks({"<hero>": str(tmp_path / "half.png")}, turned)
    assert masks["<hero>"].shape == (30, 20)
    assert float(masks["<hero>"][0, 0]) == pytest.approx(128 / 255)
    with pytest.raises(ConceptError, match=r"the photo's 60 x 40 pixels, or of its aspect, at .*, got 20 x"):
        read_masks({"<hero>": str(tmp_path / "half.png")}, Image.new("RGB", (60, 40)))


def test_convert(pipe: Any, model: str, tmp_path: Path, capsys: Any) -> None:
    trained_concept(pipe).save_pretrained(tmp_path / "my")
    export = ["convert", str(tmp_path / "my")]
    assert main([*export, str(tmp_path / "cd"), "--export", "custom-diffusion", "--model", model]) == 0
    assert main(["convert", str(tmp_path / "cd"), str(tmp_path / "back"), "--export", "concept"]) == 0
    assert ConceptAdapter.from_pretrained(tmp_path / "back").tokens == ("<blob>", "<hero>")
    assert main([*export, str(tmp_path / "folded"), "--fold", "--model", model]) == 0
    assert "it was learned for its own tokens and now changes all words" in capsys.readouterr().out
    drawn = ["generate", "<hero> on", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "f.png")]
    assert main([*drawn, "--model", str(tmp_path / "folded")]) == 0
    assert main([*export, str(tmp_path / "folded"), "--fold", "--model", model]) == 2
    assert main([*export, str(tmp_path / "x"), "--model", model]) == 2
    assert main([*export, str(tmp_path / "x"), "--export", "concept", "--dtype", "bfloat16"]) == 2
    (tmp_path / "cd" / "<other>.bin").write_bytes(b"")
    assert main([*export, str(tmp_path / "cd"), "--export", "custom-diffusion", "--model", model]) == 2
    said = capsys.readouterr().err
    assert "--dtype: expected it without --export or --fold, got it beside them" in said
    assert "expected a folder for Custom Diffusion's files that is empty, got one with <other>.bin" in said
    assert "expected a new or an empty folder for the folded model" in said
    assert "--model: expected it with --export, got it alone" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--concept", "hero=cat"], "in angle brackets"),
        (["--concept", "<x>"], "expected TOKEN=WORD"),
        (["--concept", "<hero>=dog"], "expected each concept once"),
        (["--concept", "<x>="], "expected a word for <x>, such as <x>=person, got ''"),
        (["--concept", "<x>=cow", "--threshold", "0.99"], "expected <x> in the photo, got a mask of"),
        (["--mask", "<blob>=hero.png"], "expected a mask of its own for each concept, got the same for"),
        (["--prompt", "{0} alone"], "expected a prompt with each of"),
        (["--mask", "<hero>=nowhere.png"], "expected a picture file, got no file nowhere.png"),
        (["--box", "<hero>=1,2"], "--box: "),
        (["--scene", "nowhere.json"], "expected a scene file, got 'nowhere.json'"),
        (["--set", "nothing=1"], "expected an option of"),
        (["--threshold", "2"], "expected a threshold of 0 up to 1"),
        (["--set", "learning_rate=-1"], "expected learning_rate to be a number from 0 up, got -1.0"),
        (["--set", "vectors=4"], "expected --vectors for vectors"),
        (["--seed", "99999999999999999999"], "expected seed to be a whole number from 0 to 4294967295"),
        (["--adapter", "concept=x"], "--adapter: expected none"),
        (["--size", "512"], "expected a photo of at least 128 pixels a side, got 64 x 48"),
    ],
)
def test_refusals_write_nothing(model: str, tmp_path: Path, capsys: Any, more: list[str], words: str) -> None:
    more = [part.replace("hero.png", str(tmp_path / "hero.png")) for part in more]
    assert main(arguments(tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert [line for line in said.splitlines() if words in line][-1] == said.splitlines()[-1]
    assert not (tmp_path / "my").exists()


def test_the_bench(capsys: Any) -> None:
    """The published capture by counting: 3.94 GB a copy for SD 2.1; ours in a step, of a tiny U-Net."""
    assert published_bytes(BASES["sd21"]) == pytest.approx(3.94e9, rel=1e-3)
    row = bench_concept(BASES["tiny"], torch.float32, 1, torch.device("cpu"))
    assert row["attention_mb"] - row["plain_mb"] < 1
    assert row["ratio"] == pytest.approx(row["attention_s"] / row["plain_s"])  # of one round
    for name in ("sd21", "sdxl"):
        peaks = capture_peaks(BASES[name], torch.device("cpu"))
        assert max(peaks["columns_mb"], peaks["masks_mb"]) <= 60 < peaks["matrices_mb"]
    with pytest.raises(SystemExit):
        main(["bench", "concept", "--help"])
    assert "--rounds" in capsys.readouterr().out
