"""Runs a command of interactdiff in several processes that share its work, in torchrun's environment.

Processes are forked, so that none of them has to import torch and its relatives anew, which takes longer
than all else.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import torch
import tqdm.auto
from accelerate.state import AcceleratorState

from interactdiff.cli import main

LONGEST = 150  # seconds


Command = Sequence[str] | Callable[[], int]


def run_ranks(count: int, command: Command, kill_when: Callable[[], bool] = lambda: False) -> bool:
    """Run a command in several processes.

    Args:
        count: of processes.
        command: arguments of interactdiff; or what to call, which returns an exit status.
        kill_when: all processes are killed as soon as this is true.

    Returns:
        Whether all of them ended well; False if they were killed, took over `LONGEST`, or one failed.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    latest = time.monotonic() + LONGEST
    left = {_forked(rank, count, port, command) for rank in range(count)}
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        left.discard(process)
        if status or kill_when() or time.monotonic() > latest:
            for other in left:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return False
        time.sleep(0.01)
    return True


def own_lock_of_progress_bars() -> None:
    """Give tqdm a lock of this process alone; its own is shared with forks, and a killed one keeps it."""
    lock = threading.RLock()
    for kind in (tqdm.tqdm, tqdm.auto.tqdm):  # the second may have one of its own
        kind.set_lock(lock)


def _forked(rank: int, count: int, port: int, command: Command) -> int:
    """The id of a new process; the new one does not return."""
    if process := os.fork():
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # threads of OpenMP do not outlive a fork
        own_lock_of_progress_bars()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        code = command() if callable(command) else main(list(command))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
