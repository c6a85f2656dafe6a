"""Runs several command lines one after the other, in processes that torchrun starts once.

python several_trainings.py COMMANDS [FOLDER]: process 1 kills itself as soon as the folder is there.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from interactdiff.cli import main


def killed_when(folder: Path) -> None:
    while not folder.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if len(sys.argv) > 2 and os.environ["RANK"] == "1":
        threading.Thread(target=killed_when, args=[Path(sys.argv[2])], daemon=True).start()
    for words in json.loads(sys.argv[1]):
        if code := main(words):
            sys.exit(code)
