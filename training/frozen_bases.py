"""Frozen bases as training calls them: states of prompts, and predictions of noisy latents.

One for each family: Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and 3.5, Flux.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from interactdiff.data.texts import EncodeTexts
from interactdiff.errors import RecipeError
from interactdiff.pipeline_calls import call_arguments
from interactdiff.sites import denoiser_of
from interactdiff.training.dit import image_ids, packed
from interactdiff.training.interaction_data import inside_boxes
from interactdiff.training.objectives import Diffusion, Flow, Objective, weighted_loss
from interactdiff.training.pictures_config import LossConfig

if TYPE_CHECKING:
    from interactdiff.training.control import FrozenControl

CLIP_TOKENS = 77
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
States = Mapping[str, Tensor]
"""Of a prompt or of a batch: "states" [..., L, D], and "pooled" [..., P] where the base takes it."""


class FrozenBase:
    """A pipeline whose parts are frozen.

    Args:
        pipe: the pipeline.
        loss: options of the loss.
        text_tokens: to which T5's captions are padded; None: as the pipeline draws.

    Attributes:
        denoiser: its U-Net or transformer.
        control: a ControlNet whose residuals the denoiser gets, or None.
        multiple: of what sides of pictures are multiples, in pixels.
    """

    multiple = 64
    flows = False  # times are shares of noise, not timesteps
    long_encoder: str | None = None  # the largest, which phrases are not encoded by
    control: "FrozenControl | None" = None

    def __init__(self, pipe: Any, loss: LossConfig, text_tokens: int | None):
        self.pipe, self.options, self.text_tokens = pipe, loss, text_tokens
        self.denoiser: Any = denoiser_of(pipe)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.register_modules(safety_checker=None)  # it would stay behind on the CPU
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.objective = self.make_objective()

    def make_objective(self) -> Objective:
        """What it has learnt to predict."""
        return Diffusion(self.pipe.scheduler.config, self.options)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders that are there, by name."""
        found = {name: getattr(self.pipe, name, None) for name in ENCODERS}
        return {name: part for name, part in found.items() if part is not None}

    def encoders_to(self, device: torch.device) -> None:
        """Move the text encoders."""
        for part in self.encoders.values():
            part.to(device)

    def drop(self, *names: str) -> None:
        """Let go of text encoders; states come from the cache."""
        self.pipe.register_modules(**{name: None for name in names if name in self.encoders})

    def encode(self, texts: list[str], device: torch.device) -> States:
        """States of prompts, as the pipeline draws by them."""
        states, _ = self.pipe.encode_prompt(texts, device, 1, False)
        return {"states": states}

    def states_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of a prompt's states, as `encode` makes them."""
        return {"states": (CLIP_TOKENS, self.denoiser.config.cross_attention_dim)}

    def encode_texts(self, device: torch.device) -> EncodeTexts:
        """`encode` as a text cache calls it."""

        def run(texts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
            made = self.encode(list(texts), device)
            return {text: {name: t[n] for name, t in made.items()} for n, text in enumerate(texts)}

        return run

    def predict(
        self,
        noisy: Tensor,
        times: Tensor,
        states: States,
        batch: Mapping[str, Any],
        denoiser: Any = None,
    ) -> Tensor:
        """What the denoiser, or another like it, makes of noisy latents.

        Args:
            noisy: [B, C, H, W].
            times: [B].
            states: of the captions.
            batch: with sizes and crops, and what `control` reads.
            denoiser: in the place of the base's own.

        Returns:
            [B, C, H, W].
        """
        arguments = self.arguments(noisy, times, states, batch)
        if self.control is not None:
            arguments |= self.control(arguments, batch)
        return self.unpacked((denoiser or self.denoiser)(**arguments).sample, noisy)

    def arguments(
        self, noisy: Tensor, times: Tensor, states: States, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the denoiser is called with, by name; a ControlNet of its family names them alike."""
        return {"sample": noisy, "timestep": times, "encoder_hidden_states": states["states"]}

    def unpacked(self, made: Tensor, noisy: Tensor) -> Tensor:
        """What the denoiser puts out, in the shape of the noisy latents."""
        return made

    def loss_of(self, batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The loss of a batch of `interaction_data`, whose noise comes with it.

        Args:
            batch: "latents", "noise", "times", "states", "items".
            device: where the denoiser is.
            dtype: that it computes in.
        """
        noisy, times, states = self.noisy(batch, device, dtype)
        return self.loss_between(self.predict(noisy, times, states, batch), batch)

    def noisy(
        self, batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, States]:
        """What the denoiser is called with: noisy latents, times and states."""
        latents, noise, times = (batch[name].to(device) for name in ("latents", "noise", "times"))
        states = {name: tensor.to(device, dtype) for name, tensor in batch["states"].items()}
        return self.objective.noisy(latents, noise, times).to(dtype), times, states

    def loss_between(self, predicted: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The weighted squared error of a prediction."""
        latents, noise, times = (batch[name].to(predicted.device) for name in ("latents", "noise", "times"))
        error = (predicted.float() - self.objective.target(latents, noise, times)).square()
        more = self.options.boxes
        inside = inside_boxes(batch["items"], *latents.shape[2:]).to(predicted.device) if more else None
        return weighted_loss(error, self.objective.weights(times), inside, more)

    def drawing_arguments(self, prompt: States, empty: States, guidance_scale: float | None) -> dict:
        """Arguments of the pipeline's call for one prompt, with the empty one for guidance."""
        named = {"prompt_embeds": prompt["states"], "negative_prompt_embeds": empty["states"]}
        if "pooled" in prompt:
            named |= {"pooled_prompt_embeds": prompt["pooled"]}
            named |= {"negative_pooled_prompt_embeds": empty["pooled"]}
        made: dict[str, Any] = {name: tensor[None] for name, tensor in named.items()}
        return made if guidance_scale is None else {**made, "guidance_scale": guidance_scale}

    def padded_length(self, default: int) -> int:
        """To how many tokens T5's captions are padded."""
        return self.text_tokens or call_arguments(self.pipe, "").get("max_sequence_length", default)


class XLBase(FrozenBase):
    """SDXL: two encoders' states, a pooled one, and six numbers of the picture's size and crop."""

    def encode(self, texts: list[str], device: torch.device) -> States:
        """Empty captions are zeros where the pipeline draws by zeros (`force_zeros_for_empty_prompt`)."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            there = torch.tensor([bool(text) for text in texts], device=states.device)
            states, pooled = states * there[:, None, None], pooled * there[:, None]
        return {"states": states, "pooled": pooled}

    def states_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `FrozenBase`."""
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().states_shapes(), "pooled": (pooled,)}

    def arguments(
        self, noisy: Tensor, times: Tensor, states: States, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Sizes and crops of the batch become the time ids."""
        sizes = zip(batch["original_size"], batch["crop"], batch["target_size"], strict=True)
        ids = torch.tensor([[*original, *crop, *target] for original, crop, target in sizes])
        added = {"text_embeds": states["pooled"], "time_ids": ids.to(noisy)}
        return {**super().arguments(noisy, times, states, batch), "added_cond_kwargs": added}


class SD3Base(FrozenBase):
    """Stable Diffusion 3 and 3.5: three encoders, of which T5 may be missing."""

    multiple = 16
    flows = True
    long_encoder = "text_encoder_3"

    def make_objective(self) -> Objective:
        """Rectified flow."""
        return Flow(self.pipe.scheduler.config, self.options, self.denoiser.config.patch_size)

    def encode(self, texts: list[str], device: torch.device) -> States:
        """CLIP's states and after them T5's, or zeros without it."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.padded_length(256),
        )
        return {"states": states, "pooled": pooled}

    def states_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `FrozenBase`."""
        return _transformer_shapes(self.denoiser.config, CLIP_TOKENS + (self.text_tokens or 256))

    def arguments(
        self, noisy: Tensor, times: Tensor, states: States, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Times are shares of noise; the transformer takes thousandths."""
        return {
            "hidden_states": noisy,
            "timestep": times * 1000,
            "encoder_hidden_states": states["states"],
            "pooled_projections": states["pooled"],
        }


class FluxBase(FrozenBase):
    """Flux: T5's states, CLIP's pooled one, latents packed two by two."""

    multiple = 16
    flows = True
    long_encoder = "text_encoder_2"
    places: torch.device | None = None  # where tokens' places are made; None: where the latents are

    def make_objective(self) -> Objective:
        """Rectified flow."""
        return Flow(self.pipe.scheduler.config, self.options)

    def encode(self, texts: list[str], device: torch.device) -> States:
        """T5's states and CLIP's pooled one."""
        states, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=device, max_sequence_length=self.padded_length(512)
        )
        return {"states": states, "pooled": pooled}

    def states_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `FrozenBase`."""
        return _transformer_shapes(self.denoiser.config, self.text_tokens or 512)

    def arguments(
        self, noisy: Tensor, times: Tensor, states: States, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Latents are packed."""
        places = self.places or noisy.device
        inputs: dict[str, Any] = {
            "hidden_states": packed(noisy),
            "timestep": times,
            "encoder_hidden_states": states["states"],
            "pooled_projections": states["pooled"],
            "img_ids": image_ids(noisy, places),
            "txt_ids": torch.zeros(states["states"].shape[1], 3, device=places),
        }
        if self.denoiser.config.guidance_embeds:
            inputs["guidance"] = torch.full_like(times, self.options.guidance)
        return inputs

    def unpacked(self, made: Tensor, noisy: Tensor) -> Tensor:
        """See `FrozenBase`."""
        return FluxPipeline._unpack_latents(made, *noisy.shape[2:], vae_scale_factor=1)

    def drawing_arguments(self, prompt: States, empty: States, guidance_scale: float | None) -> dict:
        """Guidance is an input of the transformer, or true guidance by the empty prompt."""
        if self.denoiser.config.guidance_embeds or guidance_scale is None:
            made = {"prompt_embeds": prompt["states"], "pooled_prompt_embeds": prompt["pooled"]}
            own = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
            return {name: tensor[None] for name, tensor in made.items()} | own
        return super().drawing_arguments(prompt, empty, None) | {"true_cfg_scale": guidance_scale}


def _transformer_shapes(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"states": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


FAMILIES: dict[str, type[FrozenBase]] = {
    "FluxTransformer2DModel": FluxBase,
    "SD3Transformer2DModel": SD3Base,
}


def frozen_base(pipe: Any, loss: LossConfig, text_tokens: int | None = None) -> FrozenBase:
    """The base that a pipeline is.

    Raises:
        RecipeError: there is none of its kind.
    """
    denoiser: Any = denoiser_of(pipe)
    if (kind := type(denoiser).__name__) in FAMILIES:
        return FAMILIES[kind](pipe, loss, text_tokens)
    if kind != "UNet2DConditionModel":
        raise RecipeError(f"expected a base with a U-Net, or of SD3 or Flux, got a {type(pipe).__name__}")
    xl = denoiser.config.addition_embed_type == "text_time"
    return (XLBase if xl else FrozenBase)(pipe, loss, text_tokens)
