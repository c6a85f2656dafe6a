"""A CLIP tokenizer small enough to ship: byte pairs in which every word of stickworld is one token."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from interactdiff.stickworld.world import ACTIONS, COLOURS, OBJECTS, PLACES

_PLAIN = "a an the person someone people in on at with wearing shirt and , of is are near next to his her"
_END = "</w>"


def world_words() -> list[str]:
    """Every word that captions and phrases of stickworld use, and some small words around them."""
    texts = [_PLAIN, *ACTIONS, *COLOURS, *OBJECTS, *PLACES, *(p for place in PLACES.values() for p in place)]
    return sorted({word for text in texts for word in text.split()})


def make_tokenizer(max_length: int) -> CLIPTokenizer:
    """Build the tokenizer; other words are spelled in pieces.

    Args:
        max_length: tokens of a prompt, start and end included.
    """
    pair_encoding = Tokenizer(models.BPE(end_of_word_suffix=_END))
    pair_encoding.normalizer = normalizers.Lowercase()
    pair_encoding.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix=_END, show_progress=False)
    pair_encoding.train_from_iterator(world_words(), trainer)
    merges = [tuple(pair) for pair in json.loads(pair_encoding.to_str())["model"]["merges"]]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}{_END}" for letter in letters)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge_list = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merge_list.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        return CLIPTokenizer(str(vocab), str(merge_list), model_max_length=max_length)
