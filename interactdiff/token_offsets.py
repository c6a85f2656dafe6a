"""Which characters of a text a token is of: fast tokenizers say so, slow ones do not."""

from typing import Any
from weakref import WeakKeyDictionary

_made: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def with_offsets(tokenizer: Any) -> Any:
    """A tokenizer that takes `return_offsets_mapping`.

    Args:
        tokenizer: of transformers; version 4 loads CLIP's as a slow one.

    Returns:
        The tokenizer, or a fast one with the same tokens and ids if it is a slow one.
    """
    if tokenizer.is_fast:
        return tokenizer
    size, made = _made.get(tokenizer, (0, None))
    if size != len(tokenizer):
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        made = PreTrainedTokenizerFast(tokenizer_object=convert_slow_tokenizer(tokenizer), **special)
        for _, token in sorted(tokenizer.added_tokens_decoder.items()):
            made.add_tokens([token])
        _made[tokenizer] = len(tokenizer), made
    return made
