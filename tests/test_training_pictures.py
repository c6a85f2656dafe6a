"""The adapter trained on a folder of pictures, on tiny pipelines of each base."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from ranks import run_ranks
from recipes import resume
from safetensors.torch import load_file
from tiny_training import config_of, exported_world

from interactdiff import Interaction, InteractionAdapter, attach
from interactdiff.cli import main
from interactdiff.data.reading import Records
from interactdiff.errors import DataError, RecipeError
from interactdiff.pipeline_calls import call_arguments
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.training.processes import Processes
from interactdiff.training.run import make_recipe
from interactdiff.training.run_folder import RunFolder, checkpoints

BASES = {"sd15": "pipe", "sd21": "pipe", "sdxl": "xl_pipe", "flux": "flux_pipe", "sd35": "sd3_pipe"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_world(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=BASES)
def base_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pipeline folder of tiny real classes."""
    pipe: Any = request.getfixturevalue(BASES[request.param])
    if request.param == "sd21":
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, prediction_type="v_prediction"
        )
    pipe.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_each_base_is_trained_saved_loaded_and_drawn(
    base_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe: Any = make_recipe(config_of(base_folder, pictures, tmp_path, gradient_checkpointing=True))
    frozen = {name: t.clone() for name, t in recipe.base.denoiser.state_dict().items()}
    losses = recipe.train()
    assert len(losses) == 4
    after = recipe.base.denoiser.state_dict()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert (tmp_path / "run/samples/000004.png").is_file()

    adapter = InteractionAdapter.from_pretrained(tmp_path / "adapter").float()
    untrained: Any = make_recipe(
        config_of(base_folder, pictures, tmp_path, output_dir=str(tmp_path / "other"))
    ).model
    changed = [
        name
        for name, t in adapter.state_dict().items()
        if not torch.equal(t, untrained.state_dict()[name].half().float())
    ]
    assert len(changed) > 0.9 * len(adapter.state_dict())

    pipe = load_pipeline(str(base_folder), torch.device("cpu"), torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(
            **call_arguments(pipe, "a person"), height=32, width=32, num_inference_steps=2,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    plain = draw()
    with attach(pipe, adapter) as handle:
        handle.set_scene(
            [Interaction("person", "riding", "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))]
        )
        assert not torch.equal(draw(), plain)


# --- several processes ---


def trained(file: Path, processes: int, *runs: Mapping[str, Any], killed_at: Path) -> str:
    """Run a recipe's file, or another, with each of some changes, on processes that torchrun starts once.

    One of them is killed as soon as a folder is there.

    Returns:
        What they said on stderr.
    """
    lines = []
    for run in runs:
        again = ["--resume_from_checkpoint", str(run["resume"]), "--overwrite"] if "resume" in run else []
        values = [f"{key}={value}" for key, value in run.items() if key not in ("resume", "file")]
        lines.append(["train", str(run.get("file", file)), *again, "--set", *values])
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(__file__).with_name("several_trainings.py")
    command = [sys.executable, "-m", *torchrun, str(script), json.dumps(lines), str(killed_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    return done.stderr


def checkpoint_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def logged(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_and_accumulation_are_one_process(
    pipe: Any, flux_pipe: Any, pictures: Path, tmp_path: Path
) -> None:
    """1 x 4, 2 x 2 and 2 x 1 in two parts; and a checkpoint of two processes goes on on one.

    So do weights that are sharded, and layers that stand in for the base's. Where a process is killed, the
    other one ends with a sentence, and what it saved goes on.
    """
    pipe.save_pretrained(tmp_path / "base")
    options = {"max_grad_norm": 0.1, "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 2, "steps": 4}
    options |= {"sample_every": 4, "validation": {"count": 1, "steps": 1}, "checkpoints_total_limit": 5}
    options |= {"warmup_steps": 5}  # accelerate would take a step of a schedule for each process
    config = config_of(tmp_path / "base", pictures, tmp_path, batch_size=4, **options)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    one = make_recipe(config).train()
    runs = {"two": (2, 1), "parts": (1, 2), "sharded": (1, 2), "left": (2, 1)}
    changes = [
        {"output_dir": tmp_path / name, "export_to": tmp_path / f"{name}-adapter", "processes": 2}
        | {"batch_size": batch_size, "accumulate": accumulate}
        for name, (batch_size, accumulate) in runs.items()
    ]
    changes[-2]["shard"] = "true"
    changes[-1]["steps"] = 10_000
    changes.insert(-1, changes[-2] | {"resume": tmp_path / "sharded/checkpoint-2"})
    flux_pipe.save_pretrained(tmp_path / "flux")
    layers = config_of(tmp_path / "flux", pictures, tmp_path / "layers", batch_size=4, log_every=1)
    del layers["adapter"]
    layers |= {"recipe": "distill_pictures", "clear": {"window": 1, "down_factor": 2}}
    (tmp_path / "layers.yaml").write_text(yaml.safe_dump(layers))
    distilled = make_recipe(layers).train()
    alike = {"file": tmp_path / "layers.yaml", "output_dir": tmp_path / "layers-two", "batch_size": 2}
    changes.insert(0, alike)
    said = trained(file, 2, *changes, killed_at=tmp_path / "left/checkpoint-4")
    assert "interactdiff: expected all 2 processes to go on, got one that ended" in said, said[-3000:]
    assert "parameters, sharded; base" in said
    assert logged(tmp_path / "layers-two") == pytest.approx(distilled, rel=1e-5)
    for name in ("two", "parts", "sharded"):
        again = one[2:] if name == "sharded" else []
        assert logged(tmp_path / name) == pytest.approx([*one, *again], rel=1e-5)
        assert (tmp_path / name / "samples/000004.png").is_file()
        mine, theirs = (checkpoint_of(tmp_path / run, 4) for run in ("run", name))
        for key, tensor in mine.items():
            assert torch.allclose(tensor, theirs[key], rtol=1e-4, atol=1e-5), key
        made, exported = (
            InteractionAdapter.from_pretrained(tmp_path / folder).state_dict()
            for folder in ("adapter", f"{name}-adapter")
        )
        for key, tensor in made.items():
            assert torch.allclose(tensor, exported[key], rtol=1e-3, atol=1e-4), key

    alone = make_recipe(config | {"output_dir": str(tmp_path / "sharded"), "shard": True, "stop_at": 3})
    resume(alone, str(tmp_path / "sharded/checkpoint-2"))
    assert alone.train(overwrite=True) == pytest.approx(one[2:3], rel=1e-5)
    wider = config | {"output_dir": str(tmp_path / "two"), "stop_at": 3}
    again = make_recipe(wider)
    resume(again, str(tmp_path / "two/checkpoint-2"))
    assert again.train(overwrite=True) == pytest.approx(one[2:3], rel=1e-5)

    left = make_recipe(config | {"output_dir": str(tmp_path / "left"), "steps": 10_000, "stop_at": 4})
    resume(left, str(tmp_path / "left/checkpoint-2"))
    assert left.train(overwrite=True) == pytest.approx(one[2:], rel=1e-5)

    narrow = make_recipe(config | {"output_dir": str(tmp_path / "narrow"), "batch_size": 2})
    with pytest.raises(RecipeError, match=r"expected global_batch to be 4 as in .*, got 2"):
        resume(narrow, str(tmp_path / "two/checkpoint-3"))


def test_what_the_main_process_refuses_every_process_refuses(tmp_path: Path) -> None:
    """Whatever error of the package it is: others would wait for a process that has ended."""

    def refuse() -> None:
        raise DataError("expected rows, got none")

    def work() -> int:
        processes = Processes(Accelerator(cpu=True))
        try:
            processes.on_main(refuse)
        except RecipeError as error:
            (tmp_path / str(processes.rank)).write_text(str(error))
        return 0

    assert run_ranks(2, work)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["expected rows, got none"] * 2


def test_processes_that_find_different_checkpoints_refuse_to_go_on(
    pipe: Any,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As on machines whose disks are their own; and processes wait for longer than NCCL's 10 minutes."""
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path, validation={"count": 0})
    recipe = make_recipe(config)
    for recipe.step in (1, 2):
        recipe.save_checkpoint()
    shutil.copytree(tmp_path / "run", tmp_path / "run-1")
    shutil.rmtree(tmp_path / "run-1/checkpoint-2")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    own_folder, own_start = RunFolder.__init__, torch.distributed.init_process_group

    def folder(self: RunFolder, path: str) -> None:
        own_folder(self, path + "-1" * (os.environ.get("RANK") == "1"))

    def start(*given: Any, **options: Any) -> None:
        print("timeout:", options["timeout"].total_seconds(), flush=True)
        own_start(*given, **options)

    monkeypatch.setattr(RunFolder, "__init__", folder)
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    command = ["train", str(tmp_path / "recipe.yaml"), "--resume_from_checkpoint", "latest"]
    assert not run_ranks(2, [*command, "--set", "batch_size=1", "steps=3"])
    said = capfd.readouterr()
    sentence = r"expected one checkpoint in an output_dir that all processes share, got "
    found = r"step 2 of run (\w+) and step 1 of run \1\n"
    assert re.search(f"interactdiff: {sentence}{found}", said.err), said.err
    assert f"timeout: {24 * 3600.0}" in said.out


def test_a_killed_run_goes_on_as_if_nothing_had_happened(pipe: Any, pictures: Path, tmp_path: Path) -> None:
    """Once here; benchmarks/training_kills.py does it many times, on two processes."""
    pipe.save_pretrained(tmp_path / "base")
    options = {"log_every": 1, "checkpoint_every": 2, "sample_every": 3, "ema_decay": 0.9}
    config = config_of(tmp_path / "base", pictures, tmp_path, **options, steps=10_000)
    recipe = make_recipe(config)
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a pool of threads does not outlive a fork
        try:
            recipe.train()
        finally:
            os._exit(1)
    while not (tmp_path / "run/checkpoint-4").exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = logged(tmp_path / "run")
    saved = checkpoints(tmp_path / "run")[-1]
    assert len(before) - int(saved.name.removeprefix("checkpoint-")) <= 2 + 1  # done twice, at most
    resumed = make_recipe(config | {"stop_at": len(before) + 2})
    resume(resumed)
    losses = resumed.train()
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    whole = make_recipe(config | {"output_dir": str(tmp_path / "whole"), "stop_at": len(before) + 2}).train()
    assert before == pytest.approx(whole[: len(before)], rel=1e-6)
    assert losses == pytest.approx(whole[-len(losses) :], rel=1e-6)


def test_a_second_start_reads_no_rows(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where latents, states and features are cached, but for the scenes that are drawn."""
    pipe.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base", pictures, tmp_path)
    losses = make_recipe(config | {"steps": 2}).train()
    read: list[int] = []
    own = Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda self, n: (read.append(n), own(self, n))[1])
    again = make_recipe(config | {"steps": 2, "output_dir": str(tmp_path / "again")})
    assert set(read) == {0}
    assert again.train() == pytest.approx(losses, rel=1e-6)
    for file in (tmp_path / "cache/phrases").iterdir():
        file.unlink()
    make_recipe(config | {"steps": 2, "output_dir": str(tmp_path / "third")})
    assert set(read) == set(range(12))


def test_a_step_that_does_not_fit_in_memory_is_one_sentence(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "base")
    recipe = make_recipe(config_of(tmp_path / "base", pictures, tmp_path))

    def loss(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recipe, "loss", loss)
    with pytest.raises(RecipeError, match=r"expected a step to fit in memory, .* --plan says what would"):
        recipe.train()


def test_readme_trains_on_pictures_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of README, with fewer pictures and steps."""
    root = Path(__file__).parent.parent
    section = (root / "README.md").read_text(encoding="utf-8").split("## Train your own")[1]
    lines = section.split("```")[1].strip().splitlines()
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    small = ["batch_size=1", "resolution=32", "validation={count: 1, steps: 1}"]
    for n, line in enumerate(lines):
        program, *words = shlex.split(line.replace("0:64", "0:3"), comments=True)
        assert program == "interactdiff"
        if words[0] == "train":
            words[1] = str(root / words[1])
            words += ["--set", f"steps={n - 2}", *small]
        elif words[0] == "generate":
            words += ["--steps", "2", "--device", "cpu"]
        assert main(words) == 0, line
    assert (tmp_path / "runs/smoke/checkpoint-2").is_dir()
    assert (tmp_path / "out.png").is_file()
