"""How each family's denoiser is run over a reference: its latents, noise, text, positions and arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from interactdiff.adapter import Host
from interactdiff.calls import Call
from interactdiff.errors import AdapterError
from interactdiff.families import Grid
from interactdiff.latent_encoding import picture_latents
from interactdiff.pipeline_calls import call_arguments
from interactdiff.sites import known_family

TRAIN_STEPS = 1000  # of all schedulers that are supported, as call timesteps have it
LEAST_ALPHA = 1e-8  # where a schedule ends in pure noise
SIZES = 6  # numbers of SDXL's time_ids: sizes before and after cropping, and where; a reference has its own
Texts = dict[str, Tensor]


class Positions(NamedTuple):
    """Where a reference's tokens lie: (r, c) at (row + scale r, column + scale c) of the picture's grid."""

    row: float
    column: float
    scale: float = 1.0


AS_THE_PICTURE = Positions(0.0, 0.0)


def passes_of(host: Host) -> Passes:
    """What runs references through a host's denoiser.

    Raises:
        AdapterError: the host has no pipeline to encode pictures and texts with.
    """
    kinds: dict[str, type[Passes]] = {"U-Net": UNetPasses, "Flux": FluxPasses, "SD3": SD3Passes}
    pipeline = host.pipeline
    if pipeline is None or getattr(pipeline, "vae", None) is None or not hasattr(pipeline, "encode_prompt"):
        got = "a bare denoiser" if pipeline is None else type(pipeline).__name__
        raise AdapterError(f"expected a pipeline with a VAE and text encoders for subjects, got {got}")
    return kinds[known_family(host.denoiser).name](host)


class Passes(ABC):
    """Runs references through a denoiser.

    Args:
        host: where subjects are attached, to a pipeline.
    """

    multiple = 1  # latents a side
    positioned = False
    """Whether a reference has positions of its own."""

    def __init__(self, host: Host):
        self.host, self.denoiser, self.pipeline = host, host.denoiser, host.pipeline

    # --- once a reference ---

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return self.pipeline._execution_device

    def size(self, width: int, height: int) -> tuple[int, int]:
        """In which size a picture is encoded: its own, up to the model's pixels, in whole tokens."""
        native = self._native_side() ** 2
        scale = min(1.0, (native / (width * height)) ** 0.5)
        multiple = self.pipeline.vae_scale_factor * self.multiple
        sides = (max(round(side * scale / multiple), 1) * multiple for side in (width, height))
        return next(sides), next(sides)

    def latents(self, picture: Image.Image) -> Tensor:
        """[1, c, h, w] in float32 on the CPU, of an RGB picture of a size that `size` has chosen."""
        return picture_latents(self.pipeline.vae, picture, self.device).cpu()

    @torch.no_grad()
    def text(self, prompt: str) -> Texts:
        """The text features of a prompt, by the names of the denoiser's arguments, one row each."""
        return self._encoded(prompt)

    def grid(self, latents: Tensor) -> Grid:
        """Rows and columns of the reference's tokens, or of a U-Net's latents."""
        return latents.shape[-2] // self.multiple, latents.shape[-1] // self.multiple

    @abstractmethod
    def _native_side(self) -> int:
        """Pixels a side of the square that the model was made for."""

    @abstractmethod
    def _encoded(self, prompt: str) -> Texts: ...

    # --- each time ---

    def noised(self, latents: Tensor, noise: Tensor, levels: Sequence[float], pipeline: Any) -> Tensor:
        """[N, C, h, w]: the reference at some noise levels, as the scheduler's pipeline feeds its denoiser.

        sqrt(a) r + sqrt(1 - a) noise of schedules with alphas, whatever the scheduler scales its own latents
        by; (1 - s) r + s noise of flow matching.

        Args:
            latents: r, [1, C, h, w].
            noise: likewise.
            levels: timesteps in [0, 1000].
            pipeline: that samples.

        Raises:
            AdapterError: the scheduler has another kind of schedule.
        """
        shares = torch.tensor([self.noise_shares(level, pipeline) for level in levels])
        signal, spread = shares.float().view(-1, 2, 1, 1, 1).unbind(1)
        return signal * latents + spread * noise

    def noise_shares(self, level: float, pipeline: Any) -> tuple[float, float]:
        """What the reference and the noise are multiplied by at a noise level.

        Raises:
            AdapterError: as in `noised`.
        """
        scheduler = pipeline.scheduler
        config = getattr(scheduler, "config", {})
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
            sigma = min(max(level / TRAIN_STEPS, 0.0), 1.0)
            return 1 - sigma, sigma
        if alphas is None or len(alphas) != TRAIN_STEPS:
            raise AdapterError(
                f"expected a scheduler of {TRAIN_STEPS} alphas_cumprod or of flow matching for subjects, got "
                f"{type(scheduler).__name__}"
            )
        level = min(max(level, 0.0), TRAIN_STEPS - 1)  # which has no entry beyond the last (defect d)
        low = int(level)
        high = min(low + 1, TRAIN_STEPS - 1)
        odds = [a / (1 - a) for a in (max(float(alphas[n]), LEAST_ALPHA) for n in (low, high))]
        if level == low:
            alpha = float(alphas[low])
        else:  # between two, linear in log sigma, as Euler's and Karras's timesteps are made
            odd = odds[0] ** (1 - (level - low)) * odds[1] ** (level - low)
            alpha = odd / (1 + odd)
        return alpha**0.5, (1 - alpha) ** 0.5

    def arguments(
        self,
        call: Call,
        latents: Tensor,
        noised: Tensor,
        text: Texts,
        times: Sequence[float],
        positions: Positions = AS_THE_PICTURE,
    ) -> dict[str, Any]:
        """Of the denoiser's call over a reference: the caller's, but for what the reference has of its own.

        What the sample alone has is left out: ControlNet's residuals, masks, the pictures of an IP-Adapter.

        Args:
            call: the call under way.
            latents: r, [1, C, h, w].
            noised: [N, C, h, w], from `noised`.
            text: of the reference's prompt.
            times: the timesteps that the denoiser is given, N.
            positions: of the reference's tokens.
        """
        device, dtype = call.device, self.denoiser.dtype
        count = len(noised)

        def rows(value: Tensor) -> Tensor:
            moved = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            return moved.expand(count, *moved.shape[1:])

        units = self.host.calls.kind.scheduler_units(1.0)
        timestep = torch.tensor(times, device=device, dtype=torch.float32) / units
        given = {name: rows(value) for name, value in text.items()}
        scale = (call.arguments.get(self.kwargs) or {}).get("scale")
        made = self._arguments(call, latents.to(device, dtype), noised.to(device, dtype), given, positions)
        made |= {"timestep": timestep, "return_dict": False}
        return made | ({} if scale is None else {self.kwargs: {"scale": scale}})

    kwargs = "joint_attention_kwargs"

    @abstractmethod
    def _arguments(
        self, call: Call, latents: Tensor, noised: Tensor, text: Texts, positions: Positions
    ) -> dict[str, Any]: ...

    def check_channels(self, own: int) -> None:
        """Refuse transformers that are given more than noised latents, such as those that fill in or edit."""
        if (got := self.denoiser.config.in_channels) != own:
            raise AdapterError(f"expected a transformer of {own} channels for subjects, got {got}")

    def call_key(self, call: Call) -> tuple[Any, ...]:
        """What of the caller's arguments acts on a reference, compared by equality."""
        scale = (call.arguments.get(self.kwargs) or {}).get("scale")
        guidance = call.arguments.get("guidance")
        return scale, None if guidance is None else float(guidance.flatten()[0])


class UNetPasses(Passes):
    """Of Stable Diffusion 1.x, 2.x and SDXL."""

    kwargs = "cross_attention_kwargs"

    def __init__(self, host: Host):
        super().__init__(host)
        self.multiple = 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def call_key(self, call: Call) -> tuple[Any, ...]:
        """As of the others, and the guidance of distilled models and sizes that are numbers."""
        condition = call.arguments.get("timestep_cond")
        ids = (call.arguments.get("added_cond_kwargs") or {}).get("time_ids")
        if ids is not None and ids.shape[1] == SIZES:
            ids = None
        others = (None if one is None else tuple(one[0].flatten().tolist()) for one in (condition, ids))
        return *super().call_key(call), *others

    def grid(self, latents: Tensor) -> Grid:
        """Rows and columns of the latents."""
        return latents.shape[-2], latents.shape[-1]

    def _native_side(self) -> int:
        sample = self.denoiser.config.sample_size or 64
        return (sample if isinstance(sample, int) else max(sample)) * self.pipeline.vae_scale_factor

    def _encoded(self, prompt: str) -> Texts:
        encoded = self.pipeline.encode_prompt(
            prompt=prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if len(encoded) == 4:
            return {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}
        return {"encoder_hidden_states": encoded[0]}

    def _arguments(
        self, call: Call, latents: Tensor, noised: Tensor, text: Texts, positions: Positions
    ) -> dict[str, Any]:
        channels, own = self.denoiser.config.in_channels, noised.shape[1]
        if channels == 2 * own + 1:  # inpainting: nothing of the reference is to be painted
            known = latents.expand(len(noised), -1, -1, -1)
            noised = torch.cat([noised, torch.zeros_like(noised[:, :1]), known], 1)
        elif channels != own:
            raise AdapterError(
                f"expected a U-Net of {own} or {2 * own + 1} channels for subjects, got {channels}"
            )
        made: dict[str, Any] = {"sample": noised, "encoder_hidden_states": text["encoder_hidden_states"]}
        condition = call.arguments.get("timestep_cond")
        if condition is not None:
            made["timestep_cond"] = condition[:1].expand(len(noised), -1)
        if (given := call.arguments.get("added_cond_kwargs")) is not None:
            made["added_cond_kwargs"] = self._added(given, noised, text)
        return made

    def _added(self, given: Mapping[str, Any], noised: Tensor, text: Texts) -> dict[str, Any]:
        count, added = len(noised), {}
        if "text_embeds" in text:
            added["text_embeds"] = text["text_embeds"]
        if (ids := given.get("time_ids")) is not None:
            own = ids[:1].clone()
            if own.shape[1] == SIZES:
                scale = self.pipeline.vae_scale_factor
                size = [noised.shape[-2] * scale, noised.shape[-1] * scale]
                own = torch.tensor([[*size, 0, 0, *size]]).to(own)
            added["time_ids"] = own.expand(count, -1)
        if (embeds := given.get("image_embeds")) is not None:  # an IP-Adapter's pictures are the sample's
            several = embeds if isinstance(embeds, list) else [embeds]
            empty = [torch.zeros_like(one[:1]).expand(count, *one.shape[1:]) for one in several]
            added["image_embeds"] = empty if isinstance(embeds, list) else empty[0]
        return added


class FluxPasses(Passes):
    """Of Flux: packed latents, and positions of their own."""

    multiple, positioned = 2, True

    def _native_side(self) -> int:
        return getattr(self.pipeline, "default_sample_size", 128) * self.pipeline.vae_scale_factor

    def _encoded(self, prompt: str) -> Texts:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, device=self.device, **_padded(self.pipeline, prompt)
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _arguments(
        self, call: Call, latents: Tensor, noised: Tensor, text: Texts, positions: Positions
    ) -> dict[str, Any]:
        rows, columns = self.grid(noised)
        packed = noised.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # [N, C, rows, 2, columns, 2]
        packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        self.check_channels(packed.shape[2])
        like = call.arguments["img_ids"]
        ids = torch.zeros(rows, columns, 3, device=like.device)  # 16 bits are too few for fractions
        ids[..., 1] += torch.arange(rows, device=like.device)[:, None] * positions.scale + positions.row
        ids[..., 2] += torch.arange(columns, device=like.device)[None] * positions.scale + positions.column
        made: dict[str, Any] = {"hidden_states": packed, **text, "img_ids": ids.flatten(0, 1)}
        made["txt_ids"] = torch.zeros(text["encoder_hidden_states"].shape[1], 3).to(like)
        if (guidance := call.arguments.get("guidance")) is not None:
            made["guidance"] = guidance[:1].expand(len(noised))
        return made


class SD3Passes(Passes):
    """Of Stable Diffusion 3 and 3.5."""

    multiple = 2

    def _native_side(self) -> int:
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def size(self, width: int, height: int) -> tuple[int, int]:
        """As of the others, within the table of positions."""
        largest = self.denoiser.config.pos_embed_max_size * self.multiple * self.pipeline.vae_scale_factor
        wide, high = super().size(width, height)
        return min(wide, largest), min(high, largest)

    def _encoded(self, prompt: str) -> Texts:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, prompt_3=None, device=self.device,
            do_classifier_free_guidance=False, **_padded(self.pipeline, prompt),
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _arguments(
        self, call: Call, latents: Tensor, noised: Tensor, text: Texts, positions: Positions
    ) -> dict[str, Any]:
        self.check_channels(noised.shape[1])
        return {"hidden_states": noised, **text}


def _padded(pipeline: Any, prompt: str) -> dict[str, int]:
    """To how many tokens the pipeline pads a prompt, as an argument of its `encode_prompt`."""
    name = "max_sequence_length"
    if name not in signature(pipeline.encode_prompt).parameters:
        return {}
    arguments = call_arguments(pipeline, prompt)
    return {name: arguments[name]} if name in arguments else {}
