"""The folder of a run: which run it belongs to, its checkpoints, and who may write there."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from interactdiff.errors import DamagedCheckpointError, RecipeError
from interactdiff.files import write_aside
from interactdiff.training.checkpoints import (
    Checkpoint,
    Collected,
    TrainingState,
    read_checkpoint,
    read_state,
)
from interactdiff.training.config import RecipeConfig

CHECKPOINT, RUN, LOG, SAMPLES = "checkpoint-", "run.json", "log.jsonl", "samples"
_SAMPLE = re.compile(r"\d{6,}\.png")


def sample_name(step: int) -> str:
    """The file of the samples that were drawn after a step."""
    return f"{step:06d}.png"


def step_of(checkpoint: Path) -> int:
    """How many steps were taken before a checkpoint was written."""
    return int(checkpoint.name[len(CHECKPOINT) :])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    found = [p for p in folder.glob(f"{CHECKPOINT}*") if p.name[len(CHECKPOINT) :].isdigit() and p.is_dir()]
    return sorted(found, key=step_of)


def run_of(checkpoint: Path) -> str | None:
    """The identity of the run that wrote a checkpoint; None if it is damaged."""
    try:
        return read_state(checkpoint).run
    except DamagedCheckpointError:
        return None


class RunFolder:
    """The folder that a run writes its checkpoints, samples and log to.

    Args:
        path: it need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check_unused(self) -> None:
        """Make sure that a new run may begin here.

        Raises:
            RecipeError: there are checkpoints of an older run, or the path is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"expected a folder as output_dir, got the file {self.path}")
        if found := checkpoints(self.path):
            raise RecipeError(
                f"expected a new folder for a new run, got {self.path} with {found[-1].name} of an older "
                "run: --resume_from_checkpoint latest goes on with it, --overwrite starts over"
            )

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return (self.path / f"{CHECKPOINT}{step}").is_dir()

    def find(self, which: str, config: RecipeConfig) -> Checkpoint | None:
        """Read the checkpoint that a run is to go on from.

        Args:
            which: "latest", or the path of a checkpoint. If the latest is damaged, the one before it is
                taken, with a line on stderr.
            config: under which the run goes on.

        Returns:
            None if there is no latest one.

        Raises:
            RecipeError: there is no such checkpoint, all are damaged, or it was made under a configuration
                that differs in more than may change.
        """
        if which != "latest":
            folder = Path(which)
            if not folder.is_dir() or folder not in checkpoints(folder.parent):
                raise RecipeError(f"expected a folder {CHECKPOINT}N to resume from, got {which!r}")
            return _fitting(read_checkpoint(folder), config)
        damaged: list[Path] = []
        reasons: list[str] = []
        for folder in reversed(checkpoints(self.path)):
            try:
                found = _fitting(read_checkpoint(folder), config)
            except DamagedCheckpointError as error:
                damaged.append(folder)
                reasons.append(str(error))
                continue
            if reasons:
                print(f"interactdiff: {reasons[0]}: going on from {folder.name}", file=sys.stderr)
            return replace(found, replaces=tuple(damaged))
        if reasons:
            raise RecipeError(f"expected a whole checkpoint in {self.path}, got none: {reasons[0]}")
        return None

    @contextmanager
    def held(
        self, run: str, config: RecipeConfig, step: int, replaces: tuple[Path, ...], overwrite: bool
    ) -> Iterator[None]:
        """Hold the folder while a run trains: no other process may.

        Args:
            run: its identity.
            config: its configuration, which is written down.
            step: at which it begins or goes on.
            replaces: damaged checkpoints that it will write anew.
            overwrite: whether to remove what is of another run (checkpoints; where this one begins anew also
                the log and the samples), or later than `step`.

        Raises:
            RecipeError: another process trains here, or checkpoints would have to be removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._clear(run, step, replaces, overwrite)
                text = json.dumps({"run": run, "config": config.to_json()}, indent=2) + "\n"
                write_aside(self.path / RUN, lambda file: file.write_text(text, encoding="utf-8"))
                yield
        except Timeout:
            raise RecipeError(f"expected a folder in which no other run trains, got {self.path}") from None

    def _clear(self, run: str, step: int, replaces: tuple[Path, ...], overwrite: bool) -> None:
        others = [
            found
            for found in checkpoints(self.path)
            if found not in replaces and not (step_of(found) <= step and run_of(found) in (run, None))
        ]
        if others and not overwrite:
            if not step:
                self.check_unused()
            raise RecipeError(
                f"expected step {step} to be the last of {self.path}, got {others[-1].name} of this run or "
                "another: --overwrite removes what came after"
            )
        for aside in self.path.glob(f".{CHECKPOINT}*"):
            shutil.rmtree(aside)
        for folder in others:
            shutil.rmtree(folder)
        if overwrite and not step and (self.path / RUN).is_file():  # else no run wrote what is here
            self._remove_reports()

    def _remove_reports(self) -> None:
        """Remove the log and the samples of the run that was here; other files stay."""
        (self.path / LOG).unlink(missing_ok=True)
        samples = self.path / SAMPLES
        for file in samples.glob("*.png"):
            if _SAMPLE.fullmatch(file.name):
                file.unlink()
        if samples.is_dir() and not any(samples.iterdir()):
            samples.rmdir()

    def save(
        self,
        state: TrainingState,
        run: str,
        step: int,
        config: RecipeConfig,
        collected: Collected | None = None,
    ) -> Path:
        """Write a checkpoint: aside, then renamed; older ones beyond the limit are removed.

        Raises:
            RecipeError: it could not be written; those that are there stay as they are.
        """
        folder = self.path / f"{CHECKPOINT}{step}"
        aside = self.path / f".{folder.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            state.save(aside, run, step, config.to_json(), collected)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        except OSError as error:
            raise RecipeError(
                f"expected disk space for a checkpoint in {self.path}, got {error.strerror or error}: "
                "the checkpoints before it are as they were"
            ) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        found = checkpoints(self.path)
        later = [one for one in found if step_of(one) > step]  # damaged: this run goes on from an earlier one
        for old in (*later, *[one for one in found if one not in later][: -config.checkpoints_total_limit]):
            shutil.rmtree(old)
        return folder


def _fitting(checkpoint: Checkpoint, config: RecipeConfig) -> Checkpoint:
    if checkpoint.state.step != step_of(checkpoint.folder):
        raise DamagedCheckpointError(
            f"expected step {step_of(checkpoint.folder)} in {checkpoint.folder}, got {checkpoint.state.step}"
        )
    config.check_resumes(checkpoint.state.config, checkpoint.folder)
    return checkpoint
