"""How a run was launched: as many processes as were asked for, or a refusal. No torch: quick to import."""

import os
from pathlib import Path

import psutil
import yaml

from interactdiff.errors import RecipeError

_FLAGS = ("--num_processes", "--num-processes")
_FILES = ("--config_file", "--config-file")
_SHARDING = {
    "ACCELERATE_USE_FSDP": ("FSDP", "lacks the adapter's weights where they act, inside the base"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "takes no weights that are single numbers, as gates are"),
}


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
    launcher = launched_processes(_parent_command())
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


def launched_processes(command: list[str]) -> int | None:
    """How many processes `accelerate launch` was asked for, by a flag or a configuration file."""
    if "launch" not in command or not any(Path(word).name.startswith("accelerate") for word in command):
        return None
    given: dict[str, str] = {}
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        given.setdefault(flag, value or following)
    number = next((given[flag] for flag in _FLAGS if flag in given), None)
    if number is None and (file := next((given[flag] for flag in _FILES if flag in given), None)):
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            number = str(values.get("num_processes"))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return None
    return int(number) if number is not None and number.isdecimal() else None


def check_strategy() -> None:
    """Make sure that processes are to share gradients as DDP does.

    Raises:
        RecipeError: accelerate was asked to shard weights.
    """
    for variable, (name, why) in _SHARDING.items():
        if os.environ.get(variable, "").lower() == "true":
            raise RecipeError(
                f"expected DDP (distributed_type: MULTI_GPU), got {name}, which {why}: shard=true spares "
                "what ZeRO-2 spares"
            )
