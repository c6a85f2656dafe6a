"""What is checked when a training on pictures starts or goes on, before anything is computed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import resume
from tiny_training import config_of, exported_world

from interactdiff.errors import DataError, RecipeError
from interactdiff.training.checkpoints import read_state
from interactdiff.training.config import checked
from interactdiff.training.interaction_config import InteractionConfig
from interactdiff.training.launch import check_world_size, launched_processes
from interactdiff.training.run import make_recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_world(tmp_path_factory.mktemp("pictures"))


def test_data_are_opened_before_the_base_is_loaded(tmp_path: Path) -> None:
    config = config_of(tmp_path / "no-base", tmp_path / "no-pictures", tmp_path)
    with pytest.raises(DataError, match=r"expected a folder of pictures, .* no such folder"):
        make_recipe(config)


def test_a_misspelt_detector_is_refused_before_the_first_step(
    pipe: Any, pictures: Path, tmp_path: Path
) -> None:
    """If it would look at anything."""
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path)
    config["validation"] = {"detector": str(tmp_path / "stikworld"), "count": 1}
    with pytest.raises(RecipeError, match=r"^validation.detector: expected .*stikworld"):
        make_recipe(config)
    assert not (tmp_path / "cache/latents").exists()
    config["validation"]["count"] = 0
    assert make_recipe(config).step == 0


def test_the_first_whole_pictures_are_drawn(
    pipe: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "base")
    held_out = tmp_path / "held-out"
    shutil.copytree(pictures, held_out)
    names = [json.loads(line)["file_name"] for line in (held_out / "metadata.jsonl").open()]
    (held_out / names[0]).write_bytes((held_out / names[0]).read_bytes()[:-400])  # its header stays whole
    config = config_of(tmp_path / "base", pictures, tmp_path, steps=1)
    config["validation"] = {"data": str(held_out), "count": 2, "steps": 1}
    recipe: Any = make_recipe(config)
    recipe.save_sample()
    assert (tmp_path / "run/samples/000000.png").is_file()
    assert f"interactdiff: {names[0]}: not drawn: expected a whole picture" in capsys.readouterr().err
    assert [shown.record.name for shown in recipe.shown] == names[1:3]


def test_a_run_does_not_go_on_with_other_data_unasked(pipe: Any, pictures: Path, tmp_path: Path) -> None:
    """A row more changes the order of all examples; checkpoints from before this was kept go on."""
    pipe.save_pretrained(tmp_path / "base")
    shutil.copytree(pictures, tmp_path / "world")
    config = config_of(tmp_path / "base", tmp_path / "world", tmp_path, validation={"count": 0})
    recipe = make_recipe(config)
    recipe.step = 2
    recipe.save_checkpoint()
    resume(recipe)
    rows = tmp_path / "world/metadata.jsonl"
    rows.write_text(rows.read_text().rstrip("\n").rpartition("\n")[0] + "\n")
    changed = make_recipe(config)
    with pytest.raises(
        RecipeError, match=r"expected the data of .*/checkpoint-2, got rows that were changed"
    ):
        resume(changed)
    assert changed.step == 0

    folder = tmp_path / "run/checkpoint-2"
    state = read_state(folder)
    state.data = None
    state.own_checksum = state.checksum()
    whole = (folder / "state.json").read_bytes()
    (folder / "state.json").write_text(json.dumps(state.model_dump(exclude={"data"})))
    resume(changed)
    assert changed.step == 2

    (folder / "state.json").write_bytes(whole)
    changed.config.allow_changed_data = True
    resume(changed)
    changed.save_checkpoint()
    changed.config.allow_changed_data = False
    resume(changed)


# --- number of processes ---


def test_as_many_processes_as_were_asked_for(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="expected 2 processes, which the recipe asks for, got 1: torchrun"):
        check_world_size(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    config = config_of(tmp_path, pictures, tmp_path, batch_size=3, accumulate=2)
    assert checked(InteractionConfig, config).to_json()["global_batch"] == 12


def test_a_schedule_by_the_clock_is_for_one_process(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, pictures, tmp_path, lr_scheduler="cosine_by_time", stop_after=1.0)
    assert checked(InteractionConfig, config).stop_after == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="lr_scheduler: expected one that goes by steps with several"):
        checked(InteractionConfig, config)


def test_what_accelerate_launch_was_asked_for_is_compared(tmp_path: Path) -> None:
    """accelerate 1.15 starts one process for `--cpu --num_processes 2` without a word."""
    script = tmp_path / "script.py"
    script.write_text(
        "from interactdiff.training.launch import check_world_size\n"
        "from interactdiff.errors import RecipeError\n"
        "try:\n    check_world_size(None)\nexcept RecipeError as error:\n    print(error)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    launch += ["--num_processes", "2", str(script)]
    said = subprocess.run(launch, capture_output=True, text=True, timeout=300).stdout
    assert "expected 2 processes, which accelerate launch asks for, got 1" in said


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["python", "accelerate", "launch", "--num_processes", "2", "script.py"], 2),
        (["accelerate", "launch", "--num-processes=1", "--config_file", "8-gpu.yaml", "script.py"], 1),
        (["accelerate", "launch", "--config_file", "8-gpu.yaml", "script.py"], 8),
        (["accelerate", "launch", "--config_file", "missing.yaml", "script.py"], None),
        (["accelerate", "launch", "script.py"], None),
        (["torchrun", "--nproc_per_node", "2", "script.py"], None),
    ],
)
def test_launch_commands_say_how_many_processes(words: list[str], count: int | None) -> None:
    files = Path(__file__).parent.parent / "training/accelerate"
    assert (
        launched_processes([str(files / word) if word.endswith("gpu.yaml") else word for word in words])
        == count
    )


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP, which lacks the adapter's weights"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed, which takes no weights that are single numbers"),
    ],
)
def test_sharded_weights_are_refused(
    variable: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RecipeError, match=rf"expected DDP \(distributed_type: MULTI_GPU\), got {reason}"):
        make_recipe(config_of(tmp_path, tmp_path / "pictures", tmp_path))
