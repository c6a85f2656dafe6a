"""Several processes: as many as were asked for, and what only the main one does."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from interactdiff.errors import RecipeError

_FLAGS = ("--num_processes", "--num-processes")


def world_size() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world_size(asked: int | None) -> None:
    """Make sure that as many processes run as were asked for.

    `accelerate launch --cpu --num_processes 2` (1.15) starts one process and says nothing.

    Args:
        asked: of the configuration, or None.

    Raises:
        RecipeError: there are more or fewer.
    """
    started = world_size()
    launcher = _of_launcher(_parent_command())
    for wanted, of in ((asked, "the recipe"), (launcher, "accelerate launch")):
        if wanted is not None and wanted != started:
            raise RecipeError(
                f"expected {wanted} processes, which {of} asks for, got {started}: torchrun "
                f"--nproc_per_node {wanted} -m interactdiff train ... starts them, on CPUs too"
            )


def _parent_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _of_launcher(command: list[str]) -> int | None:
    """How many processes a command line of `accelerate launch` asks for."""
    if "launch" not in command or not any(Path(word).name.startswith("accelerate") for word in command):
        return None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            number = value or following
            return int(number) if number.isdecimal() else None
    return None


class Processes:
    """What the processes of a run do together.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process work while the others wait.

        Raises:
            RecipeError: the work raised one; then every process raises it.
        """
        refused: list[str | None] = [None]
        if self.is_main:
            try:
                work()
            except RecipeError as error:
                if self.count == 1:
                    raise
                refused = [str(error)]
        if self.count > 1 and (said := broadcast_object_list(refused)[0]) is not None:
            raise RecipeError(said)

    def greatest(self, number: int) -> int:
        """The greatest of the processes' numbers."""
        if self.count == 1:
            return number
        mine = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())  # pyright: ignore[reportAttributeAccessIssue]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of the processes' tensors."""
        return tensor if self.count == 1 else self.accelerator.reduce(tensor, "mean")  # type: ignore[return-value]

    def same(self, text: str) -> str:
        """The main process's text."""
        return text if self.count == 1 else broadcast_object_list([text])[0]
