"""interactdiff evaluate --data from a layout to a table: drawn by one process and by two, resumed, scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import export_scenes
from diffusers import StableDiffusionPipeline
from PIL import Image
from ranks import run_ranks
from tiny import trained_adapter

from interactdiff.cli import main
from interactdiff.evaluation.detection import DetectedPair, Instance, PictureDetections, to_row
from interactdiff.evaluation.hoi_protocols import PROTOCOLS
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_drawing import (
    Ranks,
    batches,
    noise_seed,
    row_items,
    row_prompt,
    weights_of,
)
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.evaluation.sheet import chosen
from interactdiff.generation import ScenePipeline
from interactdiff.scene import Interaction
from interactdiff.stickworld.detector import Detector

LAYOUTS = 5
FIVE = ["exact", "fgahoi", "pvic", "qpic", "official"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of layouts with their renders, an untrained detector beside it."""
    folder = tmp_path_factory.mktemp("world")
    export_scenes(folder / "data/test", held_out_scenes(LAYOUTS, 0, n_interactions=1), 16)
    torch.manual_seed(0)
    detector = Detector((8, 8, 8, 8), 16, (8, 8, 8, 8))
    torch.nn.init.zeros_(detector.heat.bias)  # it finds something everywhere
    detector.save_pretrained(folder / "detector")
    return folder


@pytest.fixture
def models(pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    trained_adapter(pipe.unet).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--device", "cpu"]


def evaluate(world: Path, *flags: str | Path) -> int:
    return main(["evaluate", "--data", str(world / "data"), *map(str, flags)])


def made(folder: Path, ending: str = ".png") -> dict[str, bytes]:
    """Files by name, but for the hidden ones that a killed process leaves."""
    paths = [path for path in folder.rglob(f"*{ending}") if not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def perfect(layout: Layout, size: tuple[int, int] = (16, 16)) -> PictureDetections:
    """What a perfect detector says of a layout."""

    def instance(name: str, box: tuple[float, ...]) -> Instance:
        x0, y0, x1, y1 = (edge * side for edge, side in zip(box, size * 2, strict=True))
        return Instance(name, (x0, y0, x1 - 1, y1 - 1), 1.0)

    ones = layout.interactions
    return PictureDetections(
        size,
        tuple(instance("person", one.subject_box) for one in ones),
        tuple(instance(one.object, one.object_box) for one in ones),
        tuple(DetectedPair(n, n, one.action or "", 0.9) for n, one in enumerate(ones)),
        inclusive=True,
    )


def layouts_of(world: Path) -> list[Layout]:
    from interactdiff.evaluation.layout_data import open_data

    return list(open_data(str(world / "data")).layouts)


def write_detections(world: Path, file: Path, wrong: tuple[int, ...] = ()) -> None:
    rows = [
        to_row(layout.file_name, PictureDetections((16, 16)) if n in wrong else perfect(layout))
        for n, layout in enumerate(layouts_of(world))
    ]
    file.write_text("\n".join(rows) + "\n")


def test_two_processes_that_were_killed_give_what_one_gives(
    world: Path, models: list[str], tmp_path: Path
) -> None:
    flags = [*models, "--detector", str(world / "detector"), "--seeds", "1", "2", "--steps", "2"]
    flags += ["--batch-size", "2", "--rows", "base", "adapter"]
    two = ["evaluate", "--data", str(world / "data"), *flags, "--out", "two", "--json", "two.json"]
    assert evaluate(world, *flags, "--out", "one", "--json", "one.json", "--sheet", "sheet.png") == 0
    assert not run_ranks(2, two, kill_when=lambda: len(made(Path("two"))) >= 3)
    run_ranks(2, two, kill_when=lambda: len(made(Path("two"), ".jsonl")) >= 3)
    assert run_ranks(2, two)
    drawn = made(Path("one"))
    assert len(drawn) == 2 * 2 * LAYOUTS
    assert drawn == made(Path("two"))
    found = made(Path("one"), ".jsonl")
    assert found == made(Path("two"), ".jsonl")
    assert all(any(json.loads(row)["pairs"] for row in rows.splitlines()) for rows in found.values())
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()
    table = json.loads(Path("one.json").read_text())
    assert list(table["rows"]) == ["real", "base", "adapter"]
    assert table["protocols"] == FIVE
    assert [len(table["by_seed"][row]["exact.default.full"]) for row in table["rows"]] == [1, 2, 2]
    assert (table["pictures"], table["seeds"], table["size"], table["steps"]) == (LAYOUTS, [1, 2], 16, 2)
    assert set(table["versions"]) == {"interactdiff", "torch", "diffusers", "transformers"}
    assert Image.open("sheet.png").width > 2 * 256
    # drawn again is nothing: what is missing comes back as it was, and other settings are refused
    (tmp_path / "one/adapter/seed-2/000003.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.png")}
    assert evaluate(world, *flags, "--out", "one", "--json", "again.json") == 0
    assert made(Path("one")) == drawn
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert Path("again.json").read_bytes() == Path("one.json").read_bytes()
    assert evaluate(world, *flags, "--out", "one", "--guidance-scale", "3") == 2


def test_other_settings_are_refused_in_words(
    world: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*models, "--detector", str(world / "detector"), "--seeds", "1", "--rows", "base", "--limit", "2"]
    assert evaluate(world, *flags, "--steps", "1") == 0
    assert "limited to 2 layouts of 5, chosen to balance classes" in capsys.readouterr().out
    assert evaluate(world, *flags, "--steps", "2") == 2
    said = capsys.readouterr().err
    assert "expected pictures drawn with steps 2 in evaluation, got ones with 1: give another --out" in said


def test_a_mean_over_seeds_is_of_all_of_them(
    world: Path, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*models, "--rows", "base", "--steps", "1", "--seeds", "1", "2", "--limit", "1"]
    flags += ["--detector", "file:{row}-{seed}.jsonl"]
    for name in ("real-0", "base-1"):
        write_detections(world, tmp_path / f"{name}.jsonl")
    assert evaluate(world, *flags) == 2
    said = "expected detections of every seed, got base-1.jsonl but no base-2.jsonl"
    assert said in capsys.readouterr().err
    assert len(made(Path("evaluation/base"))) == 2  # drawn all the same, so that they can be looked at
    write_detections(world, tmp_path / "base-2.jsonl")
    assert evaluate(world, *flags) == 0


def test_weights_that_changed_under_their_name_are_noticed(
    world: Path, models: list[str], pipe: StableDiffusionPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*models, "--detector", "detector", "--seeds", "1", "--rows", "base", "--limit", "1"]
    flags += ["--steps", "1"]
    for name in ("one", "two"):
        Detector((8, 8, 8, 8), 16, (8, 8, 8, 8)).save_pretrained(Path("detector"))
        assert evaluate(world, *flags, "--json", f"{name}.json") == 0
    assert len({path.parts[2] for path in Path("evaluation/detections").rglob("*.jsonl")}) == 2
    assert main(["evaluate", "--compare", "one.json", "two.json"]) == 2
    assert "expected the same detector_digest in one.json and two.json" in capsys.readouterr().err
    adapter = trained_adapter(pipe.unet)
    next(adapter.parameters()).data += 1e-3
    adapter.save_pretrained("adapter")
    assert evaluate(world, *flags) == 2
    assert "expected pictures drawn with weights of interaction " in capsys.readouterr().err
    drawing = ScenePipeline(pipe, None, "model")
    before = weights_of(drawing)
    next(pipe.vae.parameters()).data += 1e-3
    assert weights_of(drawing) != before


def test_the_papers_way_runs_on_from_picture_to_picture_and_resumes(
    world: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interactdiff.evaluation.layout_drawing.PAPER_STEPS", 2)
    flags = [*models, "--detector", str(world / "detector"), "--paper", "--rows", "adapter", "--limit", "3"]
    assert evaluate(world, *flags, "--json", "table.json") == 0
    drawn = sorted(Path("evaluation/adapter/seed-489").glob("*.jpg"))
    before = [path.read_bytes() for path in drawn]
    assert len(set(before)) == len(drawn) == 3
    table = json.loads(Path("table.json").read_text())
    assert (table["seeds"], table["guidance_scale"], table["paper"]) == ([489], 7.5, True)
    drawn[1].unlink()
    assert evaluate(world, *flags) == 0
    assert [path.read_bytes() for path in drawn] == before


def test_detections_of_a_file_by_every_protocol(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_detections(world, tmp_path / "right.jsonl")
    write_detections(world, tmp_path / "worse.jsonl", wrong=(1, 3))
    names = [*PROTOCOLS]
    for name in ("right", "worse"):
        file = f"file:{name}.jsonl"
        assert evaluate(world, "--detector", file, "--protocol", *names, "--json", f"{name}.json") == 0
        shown = capsys.readouterr().out
    assert "no ceiling" in shown
    right, worse = (json.loads(Path(f"{name}.json").read_text()) for name in ("right", "worse"))
    for name in names:
        for setting in ("default", "known_object"):
            score = f"{name}.{setting}.full"
            assert right["rows"]["detections"][score] == pytest.approx(1)
            assert worse["rows"]["detections"][score] < 1
            low, high = worse["intervals"]["detections"][score]
            assert low <= worse["rows"]["detections"][score] <= high
    # another detector's file is not comparable, the same one's with itself is equal
    assert main(["evaluate", "--compare", "right.json", "worse.json"]) == 2
    assert "expected the same detector in right.json and worse.json" in capsys.readouterr().err
    for table in (right, worse):
        table["detector"] = "one"
    Path("right.json").write_text(json.dumps(right))
    Path("worse.json").write_text(json.dumps(worse))
    assert main(["evaluate", "--compare", "right.json", "right.json"]) == 0
    assert "yes" not in capsys.readouterr().out
    assert main(["evaluate", "--compare", "right.json", "worse.json", "--json", "difference.json"]) == 0
    assert "| detections | mAP, exact, Default Full | -40.00 [" in capsys.readouterr().out
    written = json.loads(Path("difference.json").read_text())
    assert written["second"] == "worse.json"
    assert written["rows"]["detections"]["exact.default.full"]["difference"] == pytest.approx(-0.4)
    assert main(["evaluate", "--compare", "right.json", "worse.json", "--json", "right.json"]) == 2
    assert "--json: expected another file than the two to compare" in capsys.readouterr().err


def test_a_report_beside_weights_of_its_name_leaves_them_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_detections(world, tmp_path / "found.jsonl")
    Path("adapter.safetensors").write_bytes(b"weights")
    flags = ["--detector", "file:found.jsonl", "--json", "adapter.json"]
    assert evaluate(world, *flags) == 0
    assert Path("adapter.safetensors").read_bytes() == b"weights"
    assert main(["evaluate", "--compare", "adapter.json", "adapter.json"]) == 0
    Path("adapter.outcomes.safetensors").unlink()
    Path("adapter.outcomes.safetensors").mkdir()
    Path("found.jsonl").unlink()  # refused before detections are read
    capsys.readouterr()
    assert evaluate(world, *flags) == 2
    said = "--json: expected that adapter.outcomes.safetensors can be written too, got a folder"
    assert said in capsys.readouterr().err


def test_pictures_that_something_else_drew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("drawn").mkdir()
    for layout in layouts_of(world):
        render = Image.open(world / "data/test" / layout.file_name)
        render.resize((32, 32)).save(Path("drawn", layout.file_name).with_suffix(".webp"), lossless=True)
    Path("found").mkdir()
    write_detections(world, tmp_path / "found/drawn.jsonl", wrong=(0,))
    write_detections(world, tmp_path / "found/real.jsonl")
    flags = ["--pictures", "drawn", "--size", "16", "--json", "table.json", "--sheet", "sheet.png"]
    assert evaluate(world, *flags, "--detector", "file:found/{row}.jsonl") == 0
    table = json.loads(Path("table.json").read_text())
    assert list(table["rows"]) == ["real", "drawn"]
    value = table["rows"]["drawn"]["exact.default.full"]
    assert value == table["share_of_ceiling"]["drawn"]["exact.default.full"] < 1
    assert f"({value:.2f})" in capsys.readouterr().out
    # with a detector that looks, a picture that is missing is named, and one that changed is looked at again
    looks = [*flags, "--detector", str(world / "detector")]
    assert evaluate(world, *looks) == 0
    first = json.loads(Path("table.json").read_text())
    assert evaluate(world, *looks) == 0
    assert json.loads(Path("table.json").read_text()) == first
    kept = next(Path("evaluation/detections").glob("*/drawn/seed-0/000000.jsonl"))
    before = kept.read_text()
    Image.new("RGB", (32, 32), "red").save("drawn/000000.webp", lossless=True)
    assert evaluate(world, *looks) == 0
    assert kept.read_text() != before
    Path("drawn/000004.webp").unlink()
    assert evaluate(world, *looks) == 2
    assert "expected a picture at drawn/000004.png, got no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "voc"], "--protocol: expected one of exact, fgahoi"),
        (
            ["--detector", "yolo"],
            "--detector: expected stickworld, a folder with a detector of stickworld, file:PATH",
        ),
        (["--detector", "two-stage:x"], "--detector: expected two-stage:BOXES,VERBS, got 'two-stage:x'"),
        (["--detector", "file:none.jsonl"], "expected detections at none.jsonl, got no such file"),
        (
            ["--detector", "file:x-{row}.jsonl"],
            "expected pictures or detections to score, got none by file:x-{row}",
        ),
        (["--pictures", "none"], "expected a folder of pictures at none, got none"),
        (["--pictures", "none", "--model", "stickworld"], "--pictures: expected no --model and no --adapter"),
        (["--pictures", "a/x", "b/x"], "--pictures: expected folders of different names, got a/x and b/x"),
        (["--pictures", "a/real"], "--pictures: expected folders of different names, got the row of real"),
        (["--column", "prompt"], "--column: expected key=column, got 'prompt'"),
        (["--word-iou", "4"], "--word-iou: expected --world beside it, got --data"),
        (["--sheet", "a.jpg"], "--sheet: expected a file name that ends in .png, got 'a.jpg'"),
        (["--json", "a.safetensors"], "--json: expected another ending than .safetensors"),
        (["--scores", "clip"], "--scores clip: expected --clip-model beside it, got none"),
        (["--box-model", "x"], "--box-model: expected --scores miou or ap50 beside it, got none"),
        (["--seed", "7"], "--seed: expected --world, --concept or --subject beside it, got --data"),
        (["--rows", "adapter"], "--rows: expected --model or --adapter beside it, got none"),
        (["--model", "m", "--paper", "--steps", "20"], "--steps: expected none beside --paper, which has"),
    ],
)
def test_refusals_are_one_sentence(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(world, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"interactdiff: {message}")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_that_are_no_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    for text, message in (("{", "expected the JSON of evaluate --data"), ("{}", "got something else")):
        file.write_text(text)
        assert main(["evaluate", "--compare", str(file), str(file)]) == 2
        assert message in capsys.readouterr().err


def test_noise_is_of_the_seed_and_the_name_alone() -> None:
    assert noise_seed(1, "a.png") == noise_seed(1, "a.png")
    assert len({noise_seed(seed, name) for seed in (1, 2) for name in ("a.png", "b.png")}) == 4
    assert all(0 <= noise_seed(seed, "x") < 2**63 for seed in range(50))


def test_processes_share_out_whole_batches() -> None:
    shares = [dict(batches(11, 3, Ranks(index, 2))) for index in (0, 1)]
    assert shares[0] == {0: range(0, 3), 2: range(6, 9)}
    assert shares[1] == {1: range(3, 6), 3: range(9, 11)}


def test_what_a_row_is_drawn_from() -> None:
    ride = Interaction("person", "riding", "orange bike", (0, 0, 1, 1), (0, 0, 1, 1))
    layout = Layout("a.png", "a person rides", (ride, ride))
    assert row_items("base", layout, 4) == ()
    assert row_items("adapter", layout, 4) == (ride, ride)
    assert row_items("adapter", layout, 1) == (ride,)
    assert [one.action for one in row_items("boxes_only", layout, 4)] == [None, None]
    assert row_prompt("adapter", layout) == "a person rides"
    assert row_prompt("boxes_only", layout) == "a person and an orange bike, a person and an orange bike"


def test_the_sheet_has_the_best_the_median_and_the_worst() -> None:
    scores = np.array([0.5, np.nan, *np.linspace(0, 1, 30)])
    rows: dict[str, Any] = {kind: scores[numbers].tolist() for kind, numbers in chosen(scores).items()}
    assert rows["best"][0] == 1
    assert rows["worst"][-1] == 0
    assert 0.5 in rows["median"]
    assert all(len(of_kind) == 8 and of_kind == sorted(of_kind, reverse=True) for of_kind in rows.values())
    for count in range(24):  # each picture once
        few = [number for numbers in chosen(np.linspace(1, 0, count)).values() for number in numbers]
        assert few == list(range(count))
