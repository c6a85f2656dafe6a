"""What is tuned of a pipeline: its denoiser and CLIP's text encoders, whole or by LoRA, and a new token.

Exported in the formats that diffusers loads: a file of LoRA and files of textual inversion, or a pipeline
folder whose tokenizers know the token.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from interactdiff.checkpoint import save_tensors
from interactdiff.concept.encoders import (
    NewTokens,
    TextEncoder,
    check_new,
    extended,
    text_encoders,
    token_tables,
)

DENOISER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_TARGETS = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of text in transformers
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
EMBEDDING = "learned_embeds{}.safetensors"  # of each text encoder, as diffusers' own script names them
LEGACY_END = 2  # for which CLIP takes the highest id for the end of a text, which a new token's would be


def check_words(pipe: Any, token: str, word: str) -> None:
    """Make sure that a pipeline's text encoders can learn a new word.

    Args:
        pipe: the pipeline.
        token: the new word.
        word: whose embeddings it is to begin with.

    Raises:
        AdapterError: a tokenizer has the token already.
        ConceptError: a tokenizer has no tokens for the word.
    """
    for one in text_encoders(pipe):
        check_new(pipe, one, [token])
        one.word_vectors(pipe, word, 1)


class TunedParts(nn.Module):
    """The parameters that are trained, which are those of the pipeline's modules; and the new token.

    Args:
        pipe: frozen, in float32 where it is tuned whole.
        token: the new word.
        word: whose embeddings it begins with.
        rank: of LoRA's matrices; None tunes the modules themselves.
        names: the pipeline's modules that are tuned, the denoiser first.

    Attributes:
        vectors: the token's embedding [1, width] in each text encoder, by the encoder's name.
    """

    def __init__(self, pipe: Any, token: str, word: str, rank: int | None, names: Sequence[str]):
        super().__init__()
        self.pipe, self.token, self.rank, self.names = pipe, token, rank, tuple(names)
        self.encoders = text_encoders(pipe)
        vectors = {one.name: nn.Parameter(one.word_vectors(pipe, word, 1)) for one in self.encoders}
        self.vectors = nn.ParameterDict(vectors)
        for name in names:
            module = getattr(pipe, name)
            if rank is None:
                module.requires_grad_(True)
            else:
                module.add_adapter(_lora(rank, name))
            if name.startswith("text_encoder"):
                for table in token_tables(module):
                    table.requires_grad_(False)
            cast_training_params(module)
            for path, parameter in module.named_parameters():
                if parameter.requires_grad:
                    self.register_parameter(f"{name}.{path}".replace(".", "/"), parameter)
        self._tokens = [
            NewTokens(pipe, one, [token], lambda name=one.name: self.vectors[name]) for one in self.encoders
        ]
        self._install()

    def _install(self) -> None:
        for one in self._tokens:
            one.install()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write what was tuned; files are written aside and renamed.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".aside-", dir=folder) as name:
            aside = Path(name)
            if self.rank is None:
                self._save_pipeline(aside)
            else:
                self._save_lora(aside)
            for file in sorted(path for path in aside.rglob("*") if path.is_file()):
                target = folder / file.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)

    def _save_lora(self, folder: Path) -> None:
        layers = {}
        for name in self.names:
            weights: dict[str, Tensor] = get_peft_model_state_dict(getattr(self.pipe, name))
            if name.startswith("text_encoder"):
                weights = convert_state_dict_to_diffusers(weights)
            layers[f"{name}_lora_layers"] = weights
        self.pipe.save_lora_weights(folder, **layers)
        for one in self.encoders:
            file = EMBEDDING.format(one.name.removeprefix("text_encoder"))
            save_tensors(folder / file, {self.token: self.vectors[one.name].float().cpu()})

    def _save_pipeline(self, folder: Path) -> None:
        for one in self._tokens:
            one.uninstall()
        try:
            with ExitStack() as stack:
                for one in self.encoders:
                    stack.enter_context(_with_token(self.pipe, one, self.token, self.vectors[one.name][0]))
                self.pipe.save_pretrained(folder)
        finally:
            self._install()


@contextmanager
def _with_token(pipe: Any, encoder: TextEncoder, token: str, vector: Tensor) -> Iterator[None]:
    """Inside the block a tokenizer and a text encoder have a token as their own."""
    plain, module = encoder.tokenizer(pipe), encoder.module(pipe)
    tokenizer = extended(plain, [token])
    number, table, end = tokenizer.convert_tokens_to_ids(token), module.get_input_embeddings(), None
    rows = table.num_embeddings  # T5's are more than its tokens
    row = table.weight[min(number, rows - 1)].clone()
    if number >= rows:
        module.resize_token_embeddings(number + 1, mean_resizing=False)
    module.get_input_embeddings().weight[number] = vector
    if getattr(module.config, "eos_token_id", None) == LEGACY_END:
        end, module.config.eos_token_id = LEGACY_END, tokenizer.eos_token_id
    setattr(pipe, encoder.tokenizer_name, tokenizer)
    try:
        yield
    finally:
        setattr(pipe, encoder.tokenizer_name, plain)
        if number >= rows:
            module.resize_token_embeddings(rows, mean_resizing=False)
        else:
            table.weight[number] = row
        if end is not None:
            module.config.eos_token_id = end


def _lora(rank: int, name: str) -> LoraConfig:
    targets = DENOISER_TARGETS + JOINT_TARGETS * (name == "transformer")
    if name.startswith("text_encoder"):
        targets = TEXT_TARGETS
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
