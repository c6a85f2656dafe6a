"""A frozen ControlNet beside a frozen base (arXiv 2302.05543): it gives the layout, an adapter the rest.

Its residuals enter the denoiser as in diffusers' pipelines with a ControlNet. Those sample the latents of
control images, which SD3's and Flux's read; here they are the mean, as the latents of pictures are.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, FluxControlNetModel, SD3ControlNetModel
from torch import Tensor

from interactdiff.data.examples import Latents, pixels_of
from interactdiff.data.framing import Placement
from interactdiff.data.mixture import MixedLatents, Mixture
from interactdiff.data.records import ImageRecord
from interactdiff.errors import RecipeError
from interactdiff.training.dit import packed
from interactdiff.training.frozen_bases import FluxBase, FrozenBase, SD3Base


@dataclass(frozen=True)
class ControlImages:
    """Adds the control image to an example, placed as its picture is.

    Attributes:
        latents: of control images; None: pixels.
        drop: probability that an example has none.
    """

    latents: Latents | None
    drop: float

    def __call__(
        self, example: Mapping[str, Any], record: ImageRecord, placement: Placement, rng: random.Random
    ) -> dict[str, Tensor]:
        """ "control": [3, H, W] in [-1, 1] or latents [C, h, w]; "controlled" []: 0 where there is none."""
        there = record.control is not None and rng.random() >= self.drop
        if self.latents is not None:
            index, flipped = example["index"], example["flipped"]
            made = self.latents.get(index, flipped) if there else torch.zeros_like(example["latents"])
        else:
            made = pixels_of(record, placement, control=True) if there else torch.zeros(3, *placement.size)
        return {"control": made, "controlled": torch.tensor(float(there))}


class FrozenControl:
    """A ControlNet of U-Nets, and what those of the other families share with it.

    Args:
        net: frozen, in the base's dtype.
        scale: of its residuals.
        drop: probability that an example is trained without its control image.
        guidance: for one that takes a guidance scale as input.

    Attributes:
        reads_pixels: whether it takes pixels and not latents.
        shifted: whether its latents are shifted as the VAE's configuration says; as in diffusers' pipeline,
            not those of an SD3's that reads no pooled captions.
    """

    kind: ClassVar[Any] = ControlNetModel
    fixed: ClassVar[dict[str, Any]] = {"conditioning_channels": 3}
    same: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "addition_embed_type",
    )
    """Fields of its configuration that are as the base's."""

    def __init__(self, net: Any, scale: float = 1.0, drop: float = 0.0, guidance: float = 1.0):
        self.net, self.scale, self.drop, self.guidance = net, scale, drop, guidance
        hint = getattr(net, "input_hint_block", None)  # some of Flux's
        self.reads_pixels = isinstance(net, ControlNetModel) or hint is not None
        self.shifted = not net.config.get("force_zeros_for_pooled_projection", False)

    def images(self, records: Mixture, latents: Sequence[Latents]) -> ControlImages:
        """What adds control images to examples; where it reads latents, from a cache for each data set."""
        return ControlImages(None if self.reads_pixels else MixedLatents(records, latents), self.drop)

    @torch.no_grad()
    def __call__(self, arguments: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Its residuals, as arguments of the denoiser: of no gradient, so no activation of its own is kept.

        Args:
            arguments: that it is called with.
            batch: with "control" [B, ...] and "controlled" [B].
        """
        like = {"device": self.net.device, "dtype": self.net.dtype}
        scales = (batch["controlled"] * self.scale).to(**like)
        return self.added(dict(arguments), batch["control"].to(**like), scales)

    def added(self, arguments: dict[str, Any], control: Tensor, scales: Tensor) -> dict[str, Any]:
        """As `__call__`, with control images and scales [B] on its device."""
        down, middle = self.net(
            **arguments,
            controlnet_cond=(control + 1) / 2,
            conditioning_scale=scales[:, None, None, None],
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class SD3Control(FrozenControl):
    """Of Stable Diffusion 3 and 3.5."""

    kind = SD3ControlNetModel
    fixed: ClassVar[dict[str, Any]] = {"extra_conditioning_channels": 0}
    same = ("in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "pooled_projection_dim")

    def added(self, arguments: dict[str, Any], control: Tensor, scales: Tensor) -> dict[str, Any]:
        """See `FrozenControl`; some read no captions, or no pooled ones."""
        if self.net.config.joint_attention_dim is None:
            del arguments["encoder_hidden_states"]
        if self.net.config.force_zeros_for_pooled_projection:
            arguments["pooled_projections"] = torch.zeros_like(arguments["pooled_projections"])
        (made,) = self.net(
            **arguments,
            controlnet_cond=control,
            conditioning_scale=scales[:, None, None],
            return_dict=False,
        )
        return {"block_controlnet_hidden_states": made}


class FluxControl(FrozenControl):
    """Of Flux; residuals of one with a hint block, which reads pixels, are repeated over all blocks."""

    kind = FluxControlNetModel
    fixed: ClassVar[dict[str, Any]] = {"num_mode": None}
    same = (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def added(self, arguments: dict[str, Any], control: Tensor, scales: Tensor) -> dict[str, Any]:
        """See `FrozenControl`."""
        arguments.pop("guidance", None)
        if self.net.config.guidance_embeds:
            arguments["guidance"] = torch.full_like(arguments["timestep"], self.guidance)
        joint, single = self.net(
            **arguments,
            controlnet_cond=control if self.reads_pixels else packed(control),
            conditioning_scale=scales[:, None, None],
            return_dict=False,
        )
        return {
            "controlnet_block_samples": joint,
            "controlnet_single_block_samples": single,
            "controlnet_blocks_repeat": self.reads_pixels,
        }


def load_control(
    name: str, base: FrozenBase, dtype: torch.dtype, scale: float = 1.0, drop: float = 0.0
) -> FrozenControl:
    """Load a ControlNet of a base's family from safetensors, and freeze it.

    Args:
        name: folder or Hub id.
        base: that it is for.
        dtype: that it computes in.
        scale: see `FrozenControl`.
        drop: likewise.

    Raises:
        RecipeError: there is none, or it is of another family or of other widths.
    """
    control = {SD3Base: SD3Control, FluxBase: FluxControl}.get(type(base), FrozenControl)
    expected = control.kind.__name__
    try:
        got = control.kind.load_config(name).get("_class_name")
        net = (
            control.kind.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
            if got == expected
            else None
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"controlnet: expected a {expected} at {name}, got {reason}") from None
    if net is None:
        raise RecipeError(f"controlnet: expected a {expected} for the base, got a {got} at {name}")
    config = base.denoiser.config
    for field, value in {**{field: config[field] for field in control.same}, **control.fixed}.items():
        if (got := _plain(net.config[field])) != _plain(value):
            raise RecipeError(f"controlnet: expected {field} {value} for the base, got {got} at {name}")
    if control is SD3Control and net.pos_embed is None:  # SD3.5 large's take the base's, as in the pipeline
        net.pos_embed = net._get_pos_embed_from_transformer(base.denoiser).to(dtype)
    return control(net.requires_grad_(False).eval(), scale, drop, base.options.guidance)


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
