"""Runs several command lines one after the other, in processes that torchrun starts once."""

import json
import sys

from interactdiff.cli import main

if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        if code := main(words):
            sys.exit(code)
