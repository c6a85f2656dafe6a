"""Several processes of a run: what they do together, and what only the main one does."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from interactdiff.errors import InteractdiffError, RecipeError

TIMEOUT = timedelta(days=1)
"""For which processes wait for the main one, which scans data or draws alone; of NCCL it is 10 minutes."""


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error of torch's says that another process is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    said = str(error)
    return "gloo" in said or "closed by peer" in said or "reset by peer" in said  # gloo raises plain ones


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
            InteractdiffError: the work raised one; then every process raises it, of several a `RecipeError`.
        """
        refused: list[str | None] = [None]
        if self.is_main:
            try:
                work()
            except InteractdiffError as error:
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

    def check_same(self, text: str, expected: str) -> None:
        """Make sure that all processes have one text.

        Args:
            text: this process's.
            expected: what an error says that it is to be.

        Raises:
            RecipeError: they have several.
        """
        if self.count > 1 and len(found := dict.fromkeys(gather_object([text]))) > 1:
            raise RecipeError(f"expected {expected}, got {' and '.join(found)}")

    def same(self, text: str) -> str:
        """The main process's text."""
        return text if self.count == 1 else broadcast_object_list([text])[0]
