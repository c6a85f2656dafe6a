"""Runs keep their work: identities, checkpoints that are whole or refused, and what a resume must match."""

import os
import pickle
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import VAE, four_steps, names, resume
from safetensors.torch import load_file
from tiny_training import largest_file

from interactdiff.cli import main
from interactdiff.errors import DamagedCheckpointError, RecipeError
from interactdiff.training.checkpoints import MODEL, STATE, TRAINING, read_checkpoint
from interactdiff.training.run import load_config, make_recipe, recipes
from interactdiff.training.run_folder import checkpoints
from interactdiff.training.vae import VaeRecipe


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the renders of all tests are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> str:
    return four_steps(tmp_path, cache)


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert main(["train", *command]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("interactdiff: ")
    return last


# --- identity ---


def test_a_new_run_does_not_mix_with_an_older_one(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*.safetensors")}
    said = refused(capsys, file, "--set", "seed=7")
    assert (
        f"expected a new folder for a new run, got {tmp_path / 'r'} with checkpoint-4 of an older run" in said
    )
    assert {path: path.read_bytes() for path in before} == before

    # a configuration that is wrong removes nothing
    refused(capsys, file, "--overwrite", "--set", "init_from=nowhere", "steps=2")
    refused(capsys, file, "--overwrite", "--set", "steps=none")
    assert {path: path.read_bytes() for path in before} == before

    own = {"metadata.jsonl": "{}\n", "samples/me.png": "a picture", "samples/1.png": "another", "b.jsonl": ""}
    (tmp_path / "r/samples").mkdir(exist_ok=True)
    (tmp_path / "r/samples/000004.png").write_text("of the older run")
    for name, text in own.items():
        (tmp_path / "r" / name).write_text(text)
    assert main(["train", file, "--overwrite", "--set", "seed=7", "steps=2"]) == 0
    assert {name: (tmp_path / "r" / name).read_text() for name in own} == own
    assert not (tmp_path / "r/samples/000004.png").exists()
    assert names(tmp_path / "r") == ["checkpoint-2"]
    assert read_checkpoint(tmp_path / "r" / "checkpoint-2").state.config["seed"] == 7
    assert len((tmp_path / "r" / "log.jsonl").read_text().splitlines()) == 2


def test_in_a_folder_that_no_run_wrote_overwriting_removes_nothing(file: str, tmp_path: Path) -> None:
    own = [tmp_path / "r/log.jsonl", tmp_path / "r/samples/000100.png"]
    own[1].parent.mkdir(parents=True)
    for path in own:
        path.write_text("mine\n")
    assert main(["train", file, "--overwrite", "--set", "steps=2"]) == 0
    assert own[0].read_text().startswith("mine\n")
    assert own[1].read_text() == "mine\n"


def test_a_run_goes_on_only_as_what_it_was(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    first = read_checkpoint(tmp_path / "r" / "checkpoint-2").state.run
    resume = (file, "--resume_from_checkpoint", "latest")
    for typed, key, expected, got in (
        ("optimizer=muon", "optimizer", "'adamw'", "'muon'"),
        ("learning_rate=1e-2", "learning_rate", "0.002", "0.01"),
        ("seed=3", "seed", "0", "3"),
        ("renders=3", "renders", "2", "3"),
        (
            f"model={yaml.safe_dump(VAE | {'latent_channels': 3}, default_flow_style=True)}",
            "model.latent_",
            "4",
            "3",
        ),
    ):
        said = refused(capsys, *resume, "--set", typed)
        assert f"expected {key}" in said
        assert f"to be {expected} as in {tmp_path / 'r' / 'checkpoint-2'}, got {got}" in said
    assert names(tmp_path / "r") == ["checkpoint-2"]
    assert main(["train", *resume, "--set", "log_every=2", "stop_after=60", "sample_every=50"]) == 0
    assert names(tmp_path / "r") == ["checkpoint-2", "checkpoint-4"]
    assert read_checkpoint(tmp_path / "r" / "checkpoint-4").state.run == first


def test_a_checkpoint_of_another_recipe_is_refused(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    config = load_config(Path(__file__).parent.parent / "training/configs/stickworld_text.yaml", [])
    other = tmp_path / "text.yaml"
    other.write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / "r")}))
    said = refused(capsys, str(other), "--resume_from_checkpoint", "latest")
    assert "expected recipe to be 'vae' as in" in said
    assert said.endswith("got 'text'")


def test_an_earlier_checkpoint_does_not_lose_the_later_ones_unasked(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file]) == 0
    back = (file, "--resume_from_checkpoint", str(tmp_path / "r" / "checkpoint-2"))
    said = refused(capsys, *back)
    assert f"expected step 2 to be the last of {tmp_path / 'r'}, got checkpoint-4" in said
    assert names(tmp_path / "r") == ["checkpoint-2", "checkpoint-4"]
    assert main(["train", *back, "--overwrite", "--set", "steps=3"]) == 0
    assert names(tmp_path / "r") == ["checkpoint-2", "checkpoint-3"]


def test_two_processes_do_not_train_in_one_folder(file: str, tmp_path: Path) -> None:
    config = load_config(file, [])
    one, other = make_recipe(config), make_recipe(config)
    with (
        one.folder.held(one.run, one.config, 0, (), False),
        pytest.raises(RecipeError, match="expected a folder in which no other run trains"),
    ):
        other.train()
    assert not names(tmp_path / "r")


@pytest.mark.parametrize("key", ["output_dir", "export_to", "cache_dir"])
@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_file_in_the_place_of_a_folder_is_refused(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, below: str
) -> None:
    """Before any work: of what was trained nothing would be written."""
    (tmp_path / "taken").write_text("")
    said = refused(capsys, file, "--set", f"{key}={tmp_path / 'taken' / below}")
    assert said.endswith(f"expected a folder as {key}, got the file {tmp_path / 'taken'}")
    assert not (tmp_path / "r").exists()


def test_a_file_named_as_a_checkpoint_is_none(file: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "checkpoint-9").write_text("")
    assert main(["train", file, "--resume_from_checkpoint", "latest", "--set", "steps=2"]) == 0
    assert names(tmp_path / "r") == ["checkpoint-2"]


def test_latest_of_no_checkpoints_starts_anew(file: str, tmp_path: Path) -> None:
    assert main(["train", file, "--resume_from_checkpoint", "latest", "--set", "steps=2"]) == 0
    assert names(tmp_path / "r") == ["checkpoint-2"]


# --- damage ---


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MODEL, "cut"),
        (TRAINING, "cut"),
        (STATE, "cut"),
        (TRAINING, "flipped"),
        (MODEL, "gone"),
        (STATE, "empty"),
        (STATE, "edited"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    recipe = make_recipe(load_config(file, ["sample_every=1000"]))
    recipe.sample = lambda: None  # quick
    recipe.train()
    hurt = tmp_path / "r" / "checkpoint-4" / name
    content = bytearray(hurt.read_bytes())
    content[-9] ^= 1
    edited = hurt.read_bytes().replace(b'"base_lrs"', b'"base_lr"')
    damaged = {"cut": content[: len(content) // 2], "flipped": content, "edited": edited}
    hurt.write_bytes(damaged.get(damage, b""))
    if damage == "gone":
        hurt.unlink()
    with pytest.raises(DamagedCheckpointError, match=name):
        read_checkpoint(hurt.parent)
    again = make_recipe(load_config(file, []))
    capsys.readouterr()
    resume(again)
    assert again.step == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert name in err
    assert err.endswith("going on from checkpoint-2\n")
    again.sample = lambda: None
    assert len(again.train()) == 2  # and the damaged one is written anew
    assert read_checkpoint(hurt.parent).state.step == 4
    for found in checkpoints(tmp_path / "r"):
        (found / name).write_bytes(b"")
    said = refused(capsys, file, "--resume_from_checkpoint", "latest")
    assert f"expected a whole checkpoint in {tmp_path / 'r'}, got none: expected " in said
    assert name in refused(capsys, file, "--resume_from_checkpoint", str(hurt.parent))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_no_pickle_in_a_checkpoint_is_executed(file: str, tmp_path: Path) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    folder, marker = tmp_path / "r" / "checkpoint-2", tmp_path / "executed"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(pickle.dumps(Hostile(marker)))
    assert main(["train", file, "--resume_from_checkpoint", "latest"]) == 0
    assert not marker.exists()


# --- a full disk ---


def check_that_only_the_first_is_there(folder: Path, before: dict[str, bytes]) -> None:
    assert names(folder) == ["checkpoint-2"]
    assert not list(folder.glob(".checkpoint-*"))
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()} == before
    assert read_checkpoint(folder / "checkpoint-2").state.step == 2


@pytest.mark.parametrize("fits", [None, MODEL])
def test_a_full_disk_leaves_the_checkpoints_before_it(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fits: str | None
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    folder = tmp_path / "r"
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    sizes = {name: len(content) for name, content in before.items()}
    size = 4000 if fits is None else sizes[fits]
    with largest_file(size):
        said = refused(capsys, file, "--resume_from_checkpoint", "latest")
    assert f"expected disk space for a checkpoint in {folder}, got " in said
    assert "File too large" in said
    check_that_only_the_first_is_there(folder, before)
    assert main(["train", file, "--resume_from_checkpoint", "latest"]) == 0


def test_a_disk_without_room_is_one_sentence(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    pages = {path: -(-path.stat().st_size // 4096) for path in (tmp_path / "r").rglob("*") if path.is_file()}
    checkpoint = sum(n for path, n in pages.items() if path.parent.name == "checkpoint-2")
    small = tmp_path / "small"
    small.mkdir()
    room = f"size={4096 * (sum(pages.values()) + len(pages) + checkpoint // 2)}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", room, "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        where = ("--set", f"output_dir={small / 'r'}")
        assert main(["train", file, *where, "steps=2", "sample_every=100"]) == 0
        before = {path.name: path.read_bytes() for path in (small / "r" / "checkpoint-2").iterdir()}
        said = refused(capsys, file, "--resume_from_checkpoint", "latest", *where)
        assert f"expected disk space for a checkpoint in {small / 'r'}, got " in said
        assert "No space left on device" in said
        check_that_only_the_first_is_there(small / "r", before)
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_was_trained_does_not_fit(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    made = tmp_path / "made" / "diffusion_pytorch_model.safetensors"
    assert load_file(made)
    with largest_file(made.stat().st_size - 1):
        said = refused(capsys, file, "--resume_from_checkpoint", "latest", "--set", "steps=2")
    assert f"expected disk space for what was trained in {tmp_path / 'made'}, got " in said


# --- signals ---


class Signalled(VaeRecipe):
    """Gets a signal in its second step."""

    number = signal.SIGTERM

    def batch(self, step: int) -> dict[str, Any]:
        if step == 2:
            os.kill(os.getpid(), self.number)
        return super().batch(step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_first(
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    monkeypatch.setattr(Signalled, "number", number)
    made = recipes() | {"vae": f"{__name__}:Signalled"}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as own:
        own.setattr("interactdiff.training.run.recipes", lambda: made)
        try:
            got = main(["train", file, "--set", "checkpoint_every=100", "steps=9"])
        except SystemExit as left:
            got = left.code
    assert got == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    (saved,) = checkpoints(tmp_path / "r")
    step = read_checkpoint(saved).state.step
    assert 1 <= step <= 3
    said = f"interactdiff: stopped at step {step} of 9: --resume_from_checkpoint latest goes on\n"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert main(["train", file, "--resume_from_checkpoint", "latest"]) == 0
    assert names(tmp_path / "r")[-1] == "checkpoint-4"
