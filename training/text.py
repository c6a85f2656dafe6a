"""The embedded text encoders, which learn to read captions before anything is drawn.

What they make of a caption or a phrase has to tell what it says, and of whom. To read is learned in minutes
this way; pictures ask for verbs late and little.
"""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, T5Config, T5EncoderModel

from interactdiff.stickworld.world import (
    ACTIONS,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    OBJECTS,
    WorldScene,
    caption,
    sample_scene,
)
from interactdiff.training.recipe import Recipe
from interactdiff.training.tokenizer import make_t5_tokenizer, make_tokenizer

_SPECIAL = ("bos", "eos", "pad")
_OF_A_TRIPLET: dict[str, Sequence[str]] = {
    "subject": ("person",),
    "subject_colour": tuple(COLOURS),
    "action": ACTIONS,
    "object": tuple(OBJECTS),
    "object_colour": tuple(COLOURS),
}
QUESTIONS: dict[str, Sequence[str]] = {
    "background": BACKGROUNDS,
    **{f"{name} {n}": answers for n in (1, 2) for name, answers in _OF_A_TRIPLET.items()},
}
"""What a text can be asked, and the answers; it may also say nothing of it. Triplets are numbered as told."""


def told_caption(scene: WorldScene, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A caption in random wording, at times without verbs or colours, and what it says."""
    verbs, colours = rng.random() < 0.85, rng.random() < 0.9
    said = {"background": scene.background}
    for n, t in enumerate(scene.triplets, 1):
        said |= {f"subject {n}": "person", f"object {n}": t.object}
        if verbs:
            said[f"action {n}"] = t.action
        if colours:
            said |= {f"subject_colour {n}": t.subject_colour, f"object_colour {n}": t.object_colour}
    return caption(scene.background, scene.triplets, rng, verbs=verbs, colours=colours), said


def told_phrase(scene: WorldScene, rng: random.Random) -> tuple[str, dict[str, str]]:
    """One phrase of an interaction, and what it says."""
    t, colours = scene.triplets[0], rng.random() < 0.8
    asked = scene.interactions(colours)[0]
    match rng.choice(("subject", "action", "object")):
        case "subject":
            said = {"subject 1": "person"} | ({"subject_colour 1": t.subject_colour} if colours else {})
            return asked.subject, said
        case "object":
            said = {"object 1": t.object} | ({"object_colour 1": t.object_colour} if colours else {})
            return asked.object, said
        case _:
            return t.action, {"action 1": t.action}


class TextRecipe(Recipe):
    """Trains a `CLIPTextModel` to tell what captions and phrases say; it sees no picture.

    Extra configuration keys: `text_encoder` (arguments of its class), `phrases` (the share of phrases, the
    rest are captions), `export_to` (a folder that gets `tokenizer` and `text_encoder`).
    """

    def build(self) -> nn.Module:
        sizes = self.config["text_encoder"]
        self.tokenizer = make_tokenizer(sizes["max_position_embeddings"])
        special = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in _SPECIAL}
        config = CLIPTextConfig(vocab_size=len(self.tokenizer), **special, **sizes)
        answers = sum(1 + len(known) for known in QUESTIONS.values())
        reader = nn.Linear(sizes["hidden_size"], answers)
        return nn.ModuleDict({"text_encoder": CLIPTextModel(config), "reader": reader})

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config["seed"] * 1_000_003 + step)
        return self._examples(rng, 0, self.config["batch_size"])

    def _examples(self, rng: random.Random, first: int, count: int) -> dict[str, Any]:
        texts, answers = [], []
        for _ in range(count):
            scene = sample_scene(first + rng.randrange(HELD_OUT))
            tell = told_phrase if rng.random() < self.config["phrases"] else told_caption
            text, said = tell(scene, rng)
            texts.append(text)
            answers.append([1 + known.index(said[q]) if q in said else 0 for q, known in QUESTIONS.items()])
        tokens = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return {"tokens": tokens.to(self.device), "answers": torch.tensor(answers, device=self.device)}

    def _guesses(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """For each question [B, 1 + its answers]."""
        pooled = self.model["text_encoder"](tokens).pooler_output
        return self.model["reader"](pooled).split([1 + len(known) for known in QUESTIONS.values()], dim=1)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        guesses = zip(self._guesses(batch["tokens"]), batch["answers"].T, strict=True)
        return torch.stack([F.cross_entropy(guess.float(), answer) for guess, answer in guesses]).sum()

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """No picture: logs the share of held-out texts that are read without a mistake."""
        batch = self._examples(random.Random(0), HELD_OUT, 512)
        guessed = torch.stack([guess.argmax(dim=1) for guess in self._guesses(batch["tokens"])], dim=1)
        whole = (guessed == batch["answers"]).all(dim=1).float().mean().item()
        with (self.output / "read.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, "read_without_a_mistake": whole}) + "\n")
        return None

    def export(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save_text_encoder(copy.deepcopy(model["text_encoder"]).half(), Path(self.config["export_to"]))
        self.tokenizer.save_pretrained(Path(self.config["export_to"], "tokenizer"))


class AttentionReader(nn.Module):
    """Each question attends to the tokens' states and answers from what it gathers, as a denoiser reads text.

    Args:
        width: D, of the states.
        answers: how many answers each question has.
    """

    def __init__(self, width: int, answers: Sequence[int]):
        super().__init__()
        self.where = nn.Linear(width, len(answers))
        self.what = nn.ModuleList(nn.Linear(width, count) for count in answers)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """[B, L, D] states to the answers' logits, [B, answers] a question."""
        gathered = self.where(states).softmax(dim=1).transpose(1, 2) @ states
        return tuple(answer(gathered[:, n]) for n, answer in enumerate(self.what))


class T5Recipe(TextRecipe):
    """Trains a `T5EncoderModel` to tell the same, from the states of its tokens.

    Extra configuration keys: `text_encoder` (arguments of `T5Config`), `max_length` (tokens of a prompt),
    `phrases`, `export_to` (a folder that gets `tokenizer_2` and `text_encoder_2`).
    """

    def build(self) -> nn.Module:
        self.tokenizer = make_t5_tokenizer(self.config["max_length"])
        config = T5Config(
            vocab_size=len(self.tokenizer), pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
            **self.config["text_encoder"],
        )  # fmt: skip
        reader = AttentionReader(config.d_model, [1 + len(known) for known in QUESTIONS.values()])
        return nn.ModuleDict({"text_encoder": T5EncoderModel(config), "reader": reader})

    def _guesses(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.model["reader"](self.model["text_encoder"](tokens).last_hidden_state)

    def export(self) -> None:
        folder = Path(self.config["export_to"])
        model = self.accelerator.unwrap_model(self.model)
        save_text_encoder(copy.deepcopy(model["text_encoder"]).half(), folder, "text_encoder_2")
        self.tokenizer.save_pretrained(folder / "tokenizer_2")


def save_text_encoder(text_encoder: PreTrainedModel, folder: Path, name: str = "text_encoder") -> None:
    """Write it as a pipeline has it."""
    text_encoder.save_pretrained(folder / name, safe_serialization=True)
    # Without it transformers would load the text encoder in float16 beside a float32 denoiser.
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
