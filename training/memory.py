"""What a training step keeps for its backward pass, counted on modules without storage (the meta device)."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from interactdiff.errors import RecipeError
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import resolve
from interactdiff.training.frozen_bases import ENCODERS, FluxBase, FrozenBase, frozen_base
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.published_shapes import PUBLISHED
from interactdiff.training.quantization import quantized_layers


class BarePipeline(DiffusionPipeline):
    """A denoiser and its scheduler alone."""

    def __init__(self, scheduler: Any, unet: Any = None, transformer: Any = None):
        super().__init__()
        parts = {"scheduler": scheduler, "unet": unet, "transformer": transformer}
        self.register_modules(**{name: part for name, part in parts.items() if part is not None})


@dataclass
class Saved:
    """Counts what autograd keeps for a backward pass: each storage once, parameters not.

    Attributes:
        bytes: so far.
    """

    parameters: set[int]
    bytes: int = 0
    _seen: dict[int, Any] = field(default_factory=dict)

    def add(self, tensor: Any) -> None:
        """Count a tensor that is kept."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.parameters or storage._cdata in self._seen:
            return
        self._seen[storage._cdata] = tensor  # holds it, so that no other storage takes its place
        self.bytes += storage.nbytes()


@dataclass(frozen=True)
class Activations:
    """What the denoiser keeps for the backward pass of a batch, in bytes: all, or with checkpointing."""

    kept: int
    checkpointed: int


class _FusedAttention(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values, mask, result, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        of_each = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attn_mask, made, of_each)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("only what is kept is counted")


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Any:
    return _FusedAttention.apply(query, key, value, attn_mask)


class _Fused(TorchFunctionMode):
    """Attention as cards compute it; on meta, torch would lay out every score."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def count_activations(base: FrozenBase, adapter: InteractionAdapter, latents: Tensor) -> Activations:
    """Run a step forward, and count.

    Args:
        base: frozen.
        adapter: attached to nothing yet.
        latents: [B, C, H, W], in the dtype that is computed in.

    Returns:
        Of the whole denoiser. With checkpointing: the inputs of the checkpointed blocks, what lies outside
        of them, and the largest block, which is computed again by itself.
    """
    denoiser, device, count = base.denoiser, latents.device, len(latents)
    parameters = {
        tensor.untyped_storage()._cdata for part in (denoiser, adapter) for tensor in part.parameters()
    }
    everything, outside, largest = Saved(parameters), Saved(parameters), 0

    def block(module: Any, *args: Any) -> Any:
        nonlocal largest
        for one in args:
            outside.add(one)
        inside = Saved(parameters)

        def pack(tensor: Tensor) -> Tensor:
            inside.add(tensor)
            everything.add(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            made = module(*args)
        largest = max(largest, inside.bytes)
        return made

    def pack(tensor: Tensor) -> Tensor:
        everything.add(tensor)
        outside.add(tensor)
        return tensor

    states = {
        name: torch.zeros(count, *shape, device=device, dtype=latents.dtype)
        for name, shape in base.states_shapes().items()
    }
    sides = [(int(latents.shape[2]) * 8, int(latents.shape[3]) * 8)] * count
    batch = {"original_size": sides, "crop": [(0, 0)] * count, "target_size": sides}
    features = {"": torch.zeros(adapter.config.feature_dim, device=device)}
    times = torch.zeros(count, device=device, dtype=latents.dtype if base.flows else torch.long)
    if isinstance(base, FluxBase) and device.type == "meta":
        base.places = torch.device("cpu")  # they are looked at
        denoiser.pos_embed.register_forward_pre_hook(lambda _, places: (places[0].to(device),))
    denoiser.enable_gradient_checkpointing(block)
    try:
        with attach(denoiser, adapter, phrase_encoder=lambda _: features) as handle:
            scene = {
                name: tensor.to(device)
                for name, tensor in adapter.scene_tensors([()] * count, features).items()
            }
            with _Fused(), saved_tensors_hooks(pack, lambda tensor: tensor):
                handle["interaction"].set_tokens(adapter(**{n: _as(t, latents) for n, t in scene.items()}))
                base.predict(latents, times, states, batch)
    finally:
        denoiser.disable_gradient_checkpointing()
    return Activations(everything.bytes, outside.bytes + largest)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype) if tensor.is_floating_point() else tensor


class BareBase(NamedTuple):
    """A base without storage.

    Attributes:
        pipe: its denoiser and scheduler.
        channels: of its latents.
        pixels: that a latent's side stands for.
        encoders: parameters of its text encoders.
    """

    pipe: BarePipeline
    channels: int
    pixels: int
    encoders: int


def bare_pipeline(base: str) -> BareBase:
    """A base from its parts' configurations alone.

    Args:
        base: packaged name, pipeline folder or Hub id, of which only small JSON files are read.

    Raises:
        RecipeError: there are no such files.
    """
    if (known := PUBLISHED.get(base)) is not None:
        with torch.device("meta"):
            denoiser = known.denoiser(**known.options)
        name = "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"
        bare = BarePipeline(known.scheduler(), **{name: denoiser})
        return BareBase(bare, known.channels, 8, known.encoders)
    where = resolve("model", base)
    try:
        index: Any = DiffusionPipeline.load_config(where)
        name = "unet" if "unet" in index else "transformer"
        kinds = {part: getattr(diffusers, index[part][1]) for part in (name, "scheduler", "vae")}
        configs = {part: kind.load_config(where, subfolder=part) for part, kind in kinds.items()}
        with torch.device("meta"):
            denoiser = kinds[name].from_config(configs[name])
            encoders = [_encoder(where, index[part][1], part) for part in ENCODERS if index.get(part, [0])[0]]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"expected the configuration files of a pipeline at {base}, got {reason}") from None
    scheduler = kinds["scheduler"].from_config(configs["scheduler"])
    vae: dict[str, Any] = dict(configs["vae"])
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return BareBase(
        BarePipeline(scheduler, **{name: denoiser}),
        vae["latent_channels"],
        2 ** (len(blocks) - 1),
        sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters()),
    )


def _encoder(where: str, kind: str, part: str) -> nn.Module:
    encoder: Any = getattr(transformers, kind)
    return encoder(encoder.config_class.from_pretrained(where, subfolder=part))


class Counted(NamedTuple):
    """Parameters, and what a batch keeps.

    Attributes:
        base: parameters of the base's denoiser.
        quantized: those of them that a quantisation takes.
        encoders: of the base's text encoders.
        adapter: of the adapter.
        activations: of a batch.
    """

    base: int
    quantized: int
    encoders: int
    adapter: int
    activations: Activations


def counted_on_meta(
    base: str, sides: tuple[int, int], batch_size: int, dtype: torch.dtype, text_tokens: int | None,
    sizes: dict[str, Any],
) -> Counted:  # fmt: skip
    """Count a base, an adapter for it, and what a batch keeps.

    Args:
        base: see `bare_pipeline`.
        sides: height and width in pixels.
        batch_size: pictures.
        dtype: that is computed in.
        text_tokens: of T5's captions.
        sizes: of the adapter.
    """
    pipe, channels, pixels, encoders = bare_pipeline(base)
    frozen = frozen_base(pipe, LossConfig(), text_tokens)
    frozen.denoiser.requires_grad_(False)
    with torch.device("meta"):
        adapter = InteractionAdapter.for_denoiser(frozen.denoiser, **sizes).train()
        latents = torch.zeros(batch_size, channels, *(side // pixels for side in sides), dtype=dtype)
    counts = [sum(p.numel() for p in part.parameters()) for part in (frozen.denoiser, adapter)]
    quantized = sum(layer.weight.numel() for _, _, layer in quantized_layers(frozen.denoiser))
    for part in (frozen.denoiser, adapter):
        part.to(dtype)
    return Counted(counts[0], quantized, encoders, counts[1], count_activations(frozen, adapter, latents))
