"""How much memory a training takes, by configuration and card, before anything is loaded; what would fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from interactdiff.errors import RecipeError
from interactdiff.training import quantization
from interactdiff.training.config import checked
from interactdiff.training.interaction_config import InteractionConfig
from interactdiff.training.launch import world_size
from interactdiff.training.memory import Counted, counted_on_meta

GB = 1e9
CARDS = (8.0, 12.0, 16.0, 24.0, 40.0, 48.0, 80.0)
"""GB of memory that common cards have."""
OVERHEAD = 1.0  # GB: the CUDA context, workspaces of cuBLAS and cuDNN
FRAGMENTATION = 1.15  # by how much the allocator's blocks exceed the activations in them
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4, "adamw8bit": 2, "prodigy": 16}
"""Of an optimizer's states for each parameter; Muon's vectors have AdamW's 8, which are few."""
LEAST_RESOLUTION = 256
BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Plan:
    """What a training takes on each card.

    Attributes:
        parts: what a step takes, and how many bytes.
        encoders: bytes of the text encoders, which are there before the first step alone.
        about: what was counted.
    """

    parts: dict[str, float]
    encoders: float
    about: str

    @property
    def total(self) -> float:
        """GB at the most."""
        return max(sum(self.parts.values()), self.encoders) / GB + OVERHEAD

    def __str__(self) -> str:
        """A table."""
        rows = {name: value / GB for name, value in self.parts.items()} | {"CUDA itself": OVERHEAD}
        lines = [f"  {name:48}{value:7.2f} GB" for name, value in rows.items()]
        step = sum(rows.values())
        before = f"  {'before that: text encoders, CUDA itself':48}{self.encoders / GB + OVERHEAD:7.2f} GB"
        return "\n".join([self.about, *lines, f"  {'in all':48}{step:7.2f} GB", before])


def plan_of(config: InteractionConfig) -> Plan:
    """Count a configuration.

    In a step the base's denoiser is on the card; its text encoders are there before, to fill the cache. Not
    in it: what its autoencoder takes for encoding pictures and drawing samples.

    Raises:
        RecipeError: the base's configuration files are not there.
    """
    mixed = config.mixed_precision != "no"
    dtype = torch.float32
    if mixed:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float16
    of_base = dtype if config.base_dtype == "auto" else getattr(torch, config.base_dtype)
    sizes = {} if config.init_from else config.adapter.model_dump(exclude_unset=True)
    options = tuple(sorted(sizes.items())), config.resolution, config.batch_size, dtype, config.text_tokens
    counted = _counted(config.base, *options)
    base, adapter, activations = counted.base, counted.adapter, counted.activations
    kind = config.base_quantization
    quantized = 0 if kind == "none" else counted.quantized
    weights = (base - quantized) * BYTES[of_base] + quantized * quantization.BYTES.get(kind, 0)
    word = _word(of_base) if kind == "none" else f"{_word(of_base)}, its blocks {kind}"
    kept = activations.checkpointed if config.gradient_checkpointing else activations.kept
    count = config.processes or world_size()
    share = 1 / count if config.shard else 1.0  # that stays; a step needs whole weights and gradients besides
    parts: dict[str, float] = {
        f"base, frozen, {word}": weights,
        "adapter, float32": adapter * 4 * (1 + share if share < 1 else 1),
        "its gradients": adapter * 4,
        f"states of {config.optimizer}": adapter * OPTIMIZER_BYTES[config.optimizer] * share,
    }
    if mixed:
        parts[f"its copy in {_word(dtype)} (autocast)"] = adapter * 2
    if config.ema_decay:
        parts["its average"] = adapter * 4 * share
    if count > 1:
        parts["gradients on their way to other processes"] = adapter * 4
    how = "checkpointed" if config.gradient_checkpointing else "all kept"
    parts[f"activations of {config.batch_size} x {config.resolution} px, {how}"] = FRAGMENTATION * kept
    about = f"{config.base}: {base / 1e6:,.0f} M parameters; adapter: {adapter / 1e6:,.1f} M"
    return Plan(parts, counted.encoders * BYTES[of_base], about)


@lru_cache(maxsize=32)
def _counted(
    base: str,
    sizes: tuple[tuple[str, Any], ...],
    side: int,
    batch: int,
    dtype: torch.dtype,
    tokens: int | None,
) -> Counted:
    return counted_on_meta(base, (side, side), batch, dtype, tokens, dict(sizes))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def smaller(config: InteractionConfig) -> Iterator[tuple[str, InteractionConfig]]:
    """What takes less and less memory: the changes so far as `--set` takes them, and the configuration.

    First what leaves the result as it is, then what does not: a base in 8 bits, no average of the weights,
    8-bit states, a base in 4 bits, fewer pixels. What the recipe refuses beside the rest is left out.
    """
    given, changes = config.model_dump(exclude_unset=True), dict[str, Any]()
    for more in _steps_down(config):
        try:
            other = checked(type(config), given | changes | more)
        except RecipeError:  # such as 8-bit states of an optimizer that is sharded
            continue
        changes |= more
        yield " ".join(f"{key}={str(value).lower()}" for key, value in changes.items()), other


def _steps_down(config: InteractionConfig) -> Iterator[dict[str, Any]]:
    """Changes one after the other, also those that do not go with what is set."""
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if not config.shard and (config.processes or world_size()) > 1:
        yield {"shard": True}
    batch, parts = config.batch_size, config.accumulate
    while batch > 1:
        factor = next(n for n in range(2, batch + 1) if batch % n == 0)
        batch, parts = batch // factor, parts * factor
        yield {"batch_size": batch, "accumulate": parts}
    if config.base_quantization == "none":
        yield {"base_quantization": "int8"}
    if config.ema_decay:
        yield {"ema_decay": 0}
    if OPTIMIZER_BYTES[config.optimizer] > OPTIMIZER_BYTES["adamw8bit"]:
        yield {"optimizer": "adamw8bit"}
    if config.base_quantization != "nf4":
        yield {"base_quantization": "nf4"}
    for resolution in (768, 512, LEAST_RESOLUTION):
        if resolution < config.resolution:
            yield {"resolution": resolution}


def advice(config: InteractionConfig, card: float) -> str:
    """Whether a configuration fits a card of so many GB, or the first change that would."""
    plan = plan_of(config)
    if plan.total <= card:
        return f"{card:g} GB: fits, {card - plan.total:.1f} GB to spare"
    for words, other in smaller(config):
        if (total := plan_of(other).total) <= card:
            return f"{card:g} GB: does not fit; {total:.1f} GB with --set {words}"
    return f"{card:g} GB: does not fit, whatever is set"


def described(config: InteractionConfig, card: float | None = None) -> str:
    """The plan of a configuration as text.

    Args:
        config: of the recipe.
        card: GB; None: this machine's card, or else those of `CARDS`.
    """
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory / GB
    cards = CARDS if card is None else (card,)
    return "\n".join([str(plan_of(config)), *(advice(config, one) for one in cards)])
