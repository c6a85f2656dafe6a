"""What a run reports: trackers, probed samples, the card, the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from tiny_training import config_of, exported_world

from interactdiff import Entity, Interaction
from interactdiff.errors import RecipeError
from interactdiff.evaluation.detection import Instance
from interactdiff.stickworld import model_path
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.training.config import checked
from interactdiff.training.interaction_config import InteractionConfig
from interactdiff.training.model_card import card
from interactdiff.training.probe import BoxProbe, Counts, load_probe, verdict
from interactdiff.training.run import make_recipe
from interactdiff.training.tracking import check_tracker

RIDING = Interaction("person", "riding", "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_world(tmp_path_factory.mktemp("pictures"))


# --- trackers ---


class Noted(tracking.GeneralTracker):
    """A tracker of one's own, as accelerate takes them."""

    name = "noted"
    requires_logging_directory = False
    rows: list[Any] = []  # noqa: RUF012 - of the class, which accelerate makes

    def __init__(self, run_name: str, **_: Any):
        super().__init__()
        self.rows.append(("run", run_name))

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.rows.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, {name: pictures.shape for name, pictures in values.items()}))

    def finish(self) -> None:
        self.rows.append(("end", None))


def test_a_run_reports_to_a_tracker_and_is_probed(
    pipe: Any,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses, scores, samples; then the card, whose upload fails without a network and stops nothing."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noted", Noted)
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, tracker="noted", steps=2, sample_every=2)
    config["validation"] |= {"detector": "stickworld", "count": 2}
    config["hub"] = {"id": "someone/riders", "license": "mit"}
    make_recipe(config).train()

    assert [first for first, _ in Noted.rows] == ["run", "config", 2, 2, 2, "end"]
    assert Noted.rows[0][1] == "run"
    assert Noted.rows[1][1]["validation.detector"] == "stickworld"
    loss, sheet, scores = (values for first, values in Noted.rows if first == 2)
    assert set(loss) == {"loss", "lr"}
    _, height, width, _ = sheet["samples"]
    assert 2 * width == 3 * height  # two scenes, three pictures of each
    assert {"control/found", "control/iou", "control/found_without", "control/actions"} <= set(scores)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert logged == [{"step": 2, **loss}, {"step": 2, **scores}]

    said = capsys.readouterr().err
    assert "boxes are followed in 0% (0% without the adapter): not converged" in said
    assert "not uploaded to someone/riders, it is in" in said
    card = ModelCard.load(tmp_path / "adapter/README.md")
    assert card.data.license == "mit"
    assert card.data.base_model is None  # a folder of ours means nothing to others
    assert "Steps: 2 of 2 examples" in card.text
    assert "| boxes with an IoU above 0.5 | 0.00 | 0.00 |" in card.text
    assert 'from_pretrained("someone/riders")' in card.text
    assert Image.open(tmp_path / "adapter/samples.png").size == (width, height)


def test_what_is_uploaded_is_the_exported_folder(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: asked.append((name, options)))

    def upload(self: HfApi, repo_id: str, folder_path: str) -> None:
        asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, steps=1)
    recipe = make_recipe(config | {"hub": {"id": "someone/riders", "private": False}})
    own = recipe.processes.on_main

    def on_main(work: Any) -> None:  # others would wait for the upload to end
        before = list(asked)
        own(work)
        assert asked == before

    monkeypatch.setattr(recipe.processes, "on_main", on_main)
    recipe.train()
    assert asked == [
        ("someone/riders", {"private": False, "exist_ok": True}),
        ("someone/riders", ["README.md", "adapter.safetensors", "config.json", "samples.png"]),
    ]


@pytest.mark.parametrize("hub", [None, "someone/riders"])
def test_the_cards_code_runs(tmp_path: Path, hub: str | None) -> None:
    """On a packaged base, which the Hub does not have, from where the adapter was exported to."""
    exported = tmp_path / "runs/adapter"
    shutil.copytree(model_path("stickworld-interaction"), exported)
    values = config_of(tmp_path, tmp_path / "world", tmp_path, export_to=str(exported))
    config = checked(InteractionConfig, values | {"base": "stickworld", "hub": {"id": hub}})
    code = card(config, {}, {}, False).split("```python")[1].split("```")[0]
    assert f'InteractionAdapter.from_pretrained("{hub or exported}")' in code
    *lines, draws = code.replace("someone/riders", str(exported)).strip().splitlines()
    assert draws.strip().startswith('pipe("a person is riding a bike")')
    exec("\n".join(lines), names := {})
    assert type(names["pipe"]).__name__ == "StableDiffusionPipeline"


def test_a_tracker_that_fails_stops_no_training(
    pipe: Any,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Noted, values: Any, step: int | None = None, **_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noted", Noted)
    monkeypatch.setattr(Noted, "log", fail)
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, tracker="noted", log_every=1)
    assert len(make_recipe(config).train()) == 4
    assert capsys.readouterr().err.count("noted reports no more: no route to host") == 1


def test_trackers_that_are_not_there_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"tracker: expected aim, .*, got 'tensorbord': did you mean"):
        check_tracker("tensorbord")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(RecipeError, match="expected the package of wandb, got none: pip install wandb"):
        check_tracker("wandb")


# --- probes ---


def test_the_worlds_probe_finds_what_a_render_shows() -> None:
    """And nothing in a picture that shows none of it."""
    probe = load_probe("stickworld", [], torch.device("cpu"))
    real, empty = Counts(), Counts()
    for seed in range(3):
        scene = sample_scene(seed, 1)
        items = (*scene.interactions(), *scene.lone_entities())
        probe.look(Image.fromarray(render(scene, 128).image), items, real)
        probe.look(Image.new("RGB", (128, 128)), items, empty)
    shares = real.shares()
    assert shares["control/found"] > 0.8
    assert shares["control/iou"] > 0.7
    assert shares["control/actions"] > 0.6
    assert set(empty.shares("_without").values()) == {0.0}


class Boxes:
    name = "boxes"

    def boxes(self, images: Any, names: tuple[str, ...]) -> list[list[Instance]]:
        assert names == ("person", "bike", "dog")
        found = [
            Instance("person", (10.0, 10.0, 60.0, 70.0), 0.9),
            Instance("bike", (20.0, 40.0, 90.0, 65.0), 0.9),
        ]
        return [found]


class Verbs:
    name = "verbs"

    def verbs(self, image: Any, candidates: Any, verbs_of: Any) -> list[dict[str, float]]:
        assert verbs_of == {"bike": ("riding", "pushing")}
        assert candidates[0].person == (10.0, 10.0, 60.0, 70.0)
        return [{"riding": 0.7, "pushing": 0.3}]


def test_boxes_and_verbs_are_counted_where_they_were_asked_for() -> None:
    items = (RIDING, Entity("dog", (0.0, 0.0, 0.2, 0.2)))
    picture, counts = Image.new("RGB", (100, 100)), Counts()
    BoxProbe(Boxes(), Verbs(), ("riding", "pushing")).look(picture, items, counts)
    assert counts == Counts(boxes=3, found=1, overlap=1.5, actions=1, right=0)  # half of the bike's box
    alone = Counts()
    BoxProbe(Boxes()).look(picture, items, alone)
    assert alone.shares() == {"control/found": 1 / 3, "control/iou": 0.5}
    assert verdict({"control/found": 0.9}) == "boxes are followed in 90% (0% without the adapter)"
