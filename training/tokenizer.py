"""Tokenizers small enough to ship, in which every word of stickworld is one token."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import CLIPTokenizerFast, PreTrainedTokenizerBase, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from interactdiff.checkpoint import save_tensors
from interactdiff.files import write_aside
from interactdiff.stickworld.appearance import COLOURS, OBJECT_ATTRIBUTES, PERSON_ATTRIBUTES
from interactdiff.stickworld.captions import PLACES
from interactdiff.stickworld.world import ACTIONS, OBJECTS

_PLAIN = (
    "a an the person someone people in on at with wearing shirt trousers hair skin hat no and , of is are "
    "near next to his her striped dotted checked"
)
_END = "</w>"
_CONFIG = "tokenizer_config.json"
_CLIP = "text_model."  # transformers 5 writes the names without it and reads them with it; 4 wants it


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


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """[B, L] tokens of the prompts, padded to the encoder's length as diffusers' pipelines pad them."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_tokenizer(max_length: int) -> CLIPTokenizerFast:
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
        # under transformers 5 another name of CLIPTokenizer; under 4 the one that tells offsets
        return CLIPTokenizerFast(str(vocab), str(merge_list), model_max_length=max_length)


def make_t5_tokenizer(max_length: int) -> T5TokenizerFast:
    """Build the unigrams of T5; other words are spelled in letters.

    Args:
        max_length: tokens of a prompt, the end included.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    tokenizer = Tokenizer(Unigram([*special, *words, *letters], unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens([name for name, _ in special[:3]])
    space: dict[str, Any] = {"replacement": special[3][0], "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    # From files, which transformers 4 and 5 read alike: their constructors take other arguments.
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": max_length}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        Path(folder, _CONFIG).write_text(json.dumps(config))
        return T5TokenizerFast.from_pretrained(folder)


def make_portable(folder: Path) -> None:
    """Rewrite a saved pipeline's tokenizers and text encoder, so that transformers 4 reads them too.

    Transformers 4 wants `vocab.json` and `merges.txt` for CLIP, the name T5TokenizerFast for T5, and no list
    of extra tokens. Transformers 5 reads the same from either. Paths of this machine, from which parts were
    loaded, are removed from their configurations.

    Args:
        folder: with `tokenizer` or `tokenizer_2`, or both, and with `model_index.json` if it is a pipeline's.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            _write_json(file, config)
    for file in folder.glob(f"tokenizer*/{_CONFIG}"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config.get("extra_special_tokens"), list):
            del config["extra_special_tokens"]
        _write_json(file, config)
        model = json.loads((file.parent / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model["type"] == "BPE":
            _write_json(file.parent / "vocab.json", model["vocab"])
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            text = "\n".join(["#version: 0.2", *merges]) + "\n"
            write_aside(
                file.parent / "merges.txt", lambda aside, text=text: aside.write_text(text, encoding="utf-8")
            )
    encoder = folder / "text_encoder" / "model.safetensors"
    if encoder.is_file() and "CLIPTextModel" in (encoder.parent / "config.json").read_text(encoding="utf-8"):
        tensors = load_file(encoder)
        if not any(name.startswith(_CLIP) for name in tensors):
            named = {_CLIP + name: tensor for name, tensor in tensors.items()}
            write_aside(encoder, lambda aside: save_tensors(aside, named))
    if (index := folder / "model_index.json").is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))
        if "tokenizer_2" in parts and parts["tokenizer_2"][1] == "T5Tokenizer":
            parts["tokenizer_2"][1] = "T5TokenizerFast"
        _write_json(index, parts)


def _write_json(file: Path, content: object) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))
