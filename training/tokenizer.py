"""Tokenizers small enough to ship, in which every word of stickworld is one token."""

import json
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from interactdiff.stickworld.appearance import COLOURS, OBJECT_ATTRIBUTES, PERSON_ATTRIBUTES
from interactdiff.stickworld.captions import PLACES
from interactdiff.stickworld.world import ACTIONS, OBJECTS

_PLAIN = (
    "a an the person someone people in on at with wearing shirt trousers hair skin hat no and , of is are "
    "near next to his her striped dotted checked"
)
_END = "</w>"


def world_words() -> list[str]:
    """Every word that captions and phrases of stickworld use, and some small words around them."""
    texts = [_PLAIN, *ACTIONS, *COLOURS, *OBJECTS, *PLACES, *(p for place in PLACES.values() for p in place)]
    for values in (*PERSON_ATTRIBUTES.values(), *OBJECT_ATTRIBUTES.values()):
        texts += values
    return sorted({word for text in texts for word in text.split()})


def merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte pairs, in order of rank, by which every one of these words becomes one token.

    A trainer of byte pairs breaks ties at random, so that a run that is resumed would read another language.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + _END]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    return list(ranks)


def make_tokenizer(max_length: int) -> CLIPTokenizer:
    """Build the byte pairs of CLIP; other words are spelled in pieces.

    Args:
        max_length: tokens of a prompt, start and end included.
    """
    merges = merges_for(world_words())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}{_END}" for letter in letters)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge_list = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merge_list.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        return CLIPTokenizer(str(vocab), str(merge_list), model_max_length=max_length)


def make_t5_tokenizer(max_length: int) -> T5Tokenizer:
    """Build the unigrams of T5; other words are spelled in letters.

    Args:
        max_length: tokens of a prompt, the end included.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=max_length)
