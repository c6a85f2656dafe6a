"""The embedded text encoders, which learn to read captions before anything is drawn.

The states of a thing's own words have to tell what is said of that thing, and the pooled state what the whole
text says. To read is learned in minutes this way; pictures ask for verbs late and little. States that stay
with their own words let a denoiser's attention look where the words are (DAAM, arXiv 2210.04885).
"""

import copy
import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import model_validator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, T5Config, T5EncoderModel

from interactdiff.stickworld.appearance import COLOURS, OBJECT_ATTRIBUTES, PERSON_ATTRIBUTES
from interactdiff.stickworld.captions import (
    Caption,
    Described,
    caption,
    describe_object,
    describe_person,
    named_attributes,
)
from interactdiff.stickworld.layouts import MOST_INTERACTIONS, MOST_THINGS, sample_scene
from interactdiff.stickworld.world import ACTIONS, BACKGROUNDS, HELD_OUT, OBJECTS, WorldScene
from interactdiff.training.config import Count, Keys, RecipeConfig, Share, arguments_of, refusal
from interactdiff.training.recipe import Recipe
from interactdiff.training.tokenizer import make_portable, make_t5_tokenizer, make_tokenizer

_SPECIAL = ("bos", "eos", "pad")
_NAMES = ("person", *OBJECTS)
_PATTERNS = tuple(dict.fromkeys((*PERSON_ATTRIBUTES["pattern"], *OBJECT_ATTRIBUTES["pattern"])))
OF_A_THING: dict[str, tuple[str, ...]] = {
    "name": _NAMES,
    "colour": tuple(COLOURS),
    **PERSON_ATTRIBUTES,
    "pattern": _PATTERNS,
    "action": ACTIONS,
}
"""What the state of a thing's last word has to tell of it, and the answers; a text may say nothing of it."""
OF_A_TEXT: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    **{
        f"{name} {n}": _NAMES if name == "name" else tuple(COLOURS)
        for n in range(MOST_THINGS)
        for name in ("name", "colour")
    },
    **{f"action {n}": ACTIONS for n in range(MOST_INTERACTIONS)},
    **{
        f"{name} 0": values for name, values in OF_A_THING.items() if name not in ("name", "colour", "action")
    },
}
"""What the pooled state has to tell; things are numbered as in the scene."""
IGNORED = -100  # cross entropy's own


def answers_of_things(described: Caption) -> list[dict[str, str]]:
    """What a caption says of each thing; of an object also what is done to it."""
    answers = []
    for n, thing in enumerate(described.things):
        said = {"name": thing.name, **thing.attributes}
        if n % 2 and n < 2 * len(described.actions) and (action := described.actions[n // 2]):
            said["action"] = action
        answers.append(said)
    return answers


def answers_of_text(described: Caption) -> dict[str, str]:
    """What a whole caption says."""
    said = {f"action {n}": action for n, action in enumerate(described.actions) if action}
    if described.background:
        said["background"] = described.background
    for n, thing in enumerate(answers_of_things(described)):
        kept = thing if n == 0 else {k: v for k, v in thing.items() if k in ("name", "colour")}
        said |= {f"{name} {n}": value for name, value in kept.items() if name != "action"}
    return said


def phrase_example(scene: WorldScene, rng: random.Random) -> Caption:
    """One phrase of an interaction, as grounding tokens get it: a thing without its article, or an action."""
    thing = rng.choice(scene.things)
    if scene.triplets and rng.random() < 0.3:
        action = rng.choice(scene.triplets).action
        return Caption(action, (), (action,), None)
    colours = rng.random() < 0.8
    named = named_attributes(thing.appearance, rng, colours)
    if rng.random() < 0.5:  # as the short phrases of scenes have it
        named = {name: value for name, value in named.items() if name == "colour"}
    is_person = thing.name == "person"
    text = describe_person(named, rng) if is_person else describe_object(thing.name, named, rng)
    text = text.removeprefix("a ").removeprefix("an ")
    return Caption(text, (Described(thing.name, named, (0, len(text))),), (), None)


def _numbers(said: dict[str, str], questions: dict[str, tuple[str, ...]]) -> list[int]:
    """The number of each answer, from 1 on; 0 where nothing is said."""
    return [1 + known.index(said[name]) if name in said else 0 for name, known in questions.items()]


class Reader(nn.Module):
    """Linear answers to questions: of a thing from the state of its last token, of the text from one state.

    Args:
        width: D, of the states.
    """

    def __init__(self, width: int):
        super().__init__()
        self.thing = nn.Linear(width, sum(1 + len(known) for known in OF_A_THING.values()))
        self.text = nn.Linear(width, sum(1 + len(known) for known in OF_A_TEXT.values()))

    def forward(self, states: Tensor, pooled: Tensor, ends: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Answer.

        Args:
            states: [B, L, D].
            pooled: [B, D].
            ends: [B, T] the last token of each thing.

        Returns:
            Logits of the questions of things, [B, T, answers] each, and of the text, [B, answers] each.
        """
        there = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
        things = self.thing(there).split([1 + len(known) for known in OF_A_THING.values()], -1)
        text = self.text(pooled).split([1 + len(known) for known in OF_A_TEXT.values()], -1)
        return list(things), list(text)


T5_SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")


def _t5_encoder(vocab_size: int = 8, **sizes: Any) -> T5EncoderModel:
    """With weights drawn at random, and no dropout."""
    config = T5Config(vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, dropout_rate=0.0, **sizes)
    return T5EncoderModel(config)


class ClipSizes(Keys):
    """Sizes of a `CLIPTextConfig`."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count

    @model_validator(mode="after")
    def _whole_heads(self) -> "ClipSizes":
        if self.hidden_size % self.num_attention_heads:
            raise refusal(f"a hidden_size of {self.num_attention_heads} whole heads", self.hidden_size)
        return self


class TextConfig(RecipeConfig):
    """The keys of `TextRecipe`, whose `export_to` gets `tokenizer` and `text_encoder`.

    Attributes:
        batch_size: texts of a step.
        text_encoder: its sizes.
        phrases: the share of phrases; the rest are captions.
    """

    batch_size: Count
    text_encoder: ClipSizes
    phrases: Share


class T5RecipeConfig(RecipeConfig):
    """The keys of `T5Recipe`, whose `export_to` gets `tokenizer_2` and `text_encoder_2`.

    Attributes:
        batch_size: texts of a step.
        text_encoder: arguments of `T5Config`.
        max_length: tokens of a prompt.
        phrases: the share of phrases; the rest are captions.
    """

    batch_size: Count
    text_encoder: Annotated[dict[str, Any], arguments_of(_t5_encoder, T5_SIZES)]
    max_length: Count
    phrases: Share


class TextRecipe(Recipe[Any]):
    """Trains a `CLIPTextModel` to tell what captions and phrases say; it sees no picture."""

    config_type: type[RecipeConfig] = TextConfig

    def build(self) -> nn.Module:
        sizes = self.config.text_encoder.model_dump()
        self.tokenizer: Any = make_tokenizer(sizes["max_position_embeddings"])
        special = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in _SPECIAL}
        config = CLIPTextConfig(vocab_size=len(self.tokenizer), **special, **sizes)
        return nn.ModuleDict({"text_encoder": CLIPTextModel(config), "reader": Reader(sizes["hidden_size"])})

    def batch(self, step: int) -> dict[str, Any]:
        rng = random.Random(self.config.seed * 1_000_003 + step)
        return self._examples(rng, 0, self.config.batch_size)

    def _examples(self, rng: random.Random, first: int, count: int) -> dict[str, Any]:
        described = []
        for _ in range(count):
            scene = sample_scene(first + rng.randrange(HELD_OUT))
            if rng.random() < self.config.phrases:
                described.append(phrase_example(scene, rng))
            else:
                verbs, colours = rng.random() < 0.85, rng.random() < 0.9
                described.append(caption(scene, rng, verbs=verbs, colours=colours))
        texts = [one.text for one in described]
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt", return_offsets_mapping=True
        )
        tokens, offsets = encoded.input_ids, encoded.offset_mapping
        ends = torch.zeros(count, MOST_THINGS, dtype=torch.long)
        of_things = torch.full((count, MOST_THINGS, len(OF_A_THING)), IGNORED)
        of_text = torch.zeros(count, len(OF_A_TEXT), dtype=torch.long)
        for row, one in enumerate(described):
            of_text[row] = torch.tensor(_numbers(answers_of_text(one), OF_A_TEXT))
            for n, (thing, said) in enumerate(zip(one.things, answers_of_things(one), strict=True)):
                inside = (offsets[row, :, 1] == thing.span[1]).nonzero()
                if len(inside):  # else it was cut off
                    ends[row, n] = inside[0, 0]
                    of_things[row, n] = torch.tensor(_numbers(said, OF_A_THING))
        batch = {"tokens": tokens, "ends": ends, "of_things": of_things, "of_text": of_text}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] states and the [B, D] pooled one."""
        output = self.model["text_encoder"](tokens)
        return output.last_hidden_state, output.pooler_output

    def _guesses(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        return self.model["reader"](*self._states(batch["tokens"]), batch["ends"])

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        things, text = self._guesses(batch)
        losses = [
            F.cross_entropy(
                guess.float().flatten(0, 1), batch["of_things"][..., n].flatten(), ignore_index=IGNORED
            )
            for n, guess in enumerate(things)
        ]
        losses += [F.cross_entropy(guess.float(), batch["of_text"][:, n]) for n, guess in enumerate(text)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """No picture: logs the share of held-out things and texts that are read without a mistake."""
        batch = self._examples(random.Random(0), HELD_OUT, 512)
        things, text = self._guesses(batch)
        right = torch.stack([guess.argmax(-1) for guess in things], -1) == batch["of_things"]
        present = batch["of_things"][..., 0] != IGNORED
        of_text = torch.stack([guess.argmax(-1) for guess in text], -1) == batch["of_text"]
        row = {
            "step": self.step,
            "things_read_without_a_mistake": right.all(-1)[present].float().mean().item(),
            "texts_read_without_a_mistake": of_text.all(-1).float().mean().item(),
        }
        with (self.output / "read.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        return None

    def export(self) -> None:
        encoder = copy.deepcopy(self.accelerator.unwrap_model(self.model)["text_encoder"])
        centre_pooled(encoder, self._examples(random.Random(0), 0, 512)["tokens"])
        save_text_encoder(encoder.half(), Path(self.config.export_to))
        self.tokenizer.save_pretrained(Path(self.config.export_to, "tokenizer"))
        make_portable(Path(self.config.export_to))


@torch.no_grad()
def centre_pooled(encoder: CLIPTextModel, tokens: Tensor) -> None:
    """Shift all states so that the pooled state of texts [B, L] has a mean of zero.

    Muon steps along a gradient's main direction, which for a layer after a state is the state's mean: it
    drove what a transformer makes of the pooled state, a linear layer and SiLU, to where SiLU is zero.
    """
    norm: Any = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.bias -= encoder(tokens).pooler_output.mean(0)


class T5Recipe(TextRecipe):
    """Trains a `T5EncoderModel` to tell the same; what the whole text says it tells from the mean state."""

    config_type = T5RecipeConfig

    def build(self) -> nn.Module:
        self.tokenizer = make_t5_tokenizer(self.config.max_length)
        encoder = _t5_encoder(len(self.tokenizer), **self.config.text_encoder)
        start_near(encoder)
        return nn.ModuleDict({"text_encoder": encoder, "reader": Reader(encoder.config.d_model)})

    def _states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = self.model["text_encoder"](tokens).last_hidden_state
        return states, states.mean(1)

    def export(self) -> None:
        folder = Path(self.config.export_to)
        model = self.accelerator.unwrap_model(self.model)
        save_text_encoder(copy.deepcopy(model["text_encoder"]).half(), folder, "text_encoder_2")
        self.tokenizer.save_pretrained(folder / "tokenizer_2")
        make_portable(folder)


@torch.no_grad()
def start_near(encoder: T5EncoderModel) -> None:
    """Start with heads that attend to near tokens, each less far than the one before it (ALiBi, 2108.12409).

    T5 knows positions by learned biases alone, and those take long to grow from next to nothing.
    """
    blocks: Any = encoder.encoder.block
    attention = blocks[0].layer[0].SelfAttention
    weight = attention.relative_attention_bias.weight  # [buckets, heads]
    near = torch.arange(len(weight)) % (len(weight) // 2)  # each direction has half of the buckets
    slopes = torch.arange(weight.shape[1]) / max(1, weight.shape[1] - 1)
    weight.copy_(-near[:, None] * slopes)


def save_text_encoder(text_encoder: PreTrainedModel, folder: Path, name: str = "text_encoder") -> None:
    """Write it as a pipeline has it."""
    text_encoder.save_pretrained(folder / name, safe_serialization=True)
    # Without it transformers would load the text encoder in float16 beside a float32 denoiser.
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
