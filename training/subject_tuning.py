"""A base tuned on one subject from one picture (DreamTuner, arXiv 2312.13691, section 3.3; stage 2).

L = L_reg + lambda L_sub: regular pictures are "a dog", the reference on white is "a dog <subject>", so that
the new token and the weights learn what tells the two apart. A subject encoder, if there is one, sees in each
row that row's own picture.
"""

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from interactdiff import attach
from interactdiff.data.order import mixed
from interactdiff.errors import RecipeError, SceneError
from interactdiff.latent_encoding import picture_latents
from interactdiff.models import resolve
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.encoder import squared
from interactdiff.subject.foreground import WHOLE, Foreground, foreground, load_segmenter
from interactdiff.subject.items import Subject
from interactdiff.training.frozen_bases import frozen_base
from interactdiff.training.optimizers import make_optimizers
from interactdiff.training.pictures import PRECISION_DTYPES
from interactdiff.training.recipe import Recipe
from interactdiff.training.regular_pictures import regular_pictures
from interactdiff.training.subject_tuning_config import SubjectTuningConfig
from interactdiff.training.tuned_parts import TunedParts, check_words

_ORDER, _FLIPS, _NOISE = 1, 2, 3  # what random numbers are for


class SubjectTuningRecipe(Recipe[SubjectTuningConfig]):
    """Tunes a base, whole or by LoRA, and the embedding of a new token.

    Attributes:
        pipe: the base.
        base: as training calls it.
        pictures: the regular pictures, and last the reference on white; square.
        latents: [2, N, C, H, W] of them, plain and mirrored.
        tokens: [2, N, M, token_dim] that the subject encoder makes of them; None without one.
    """

    config_type = SubjectTuningConfig

    def build(self) -> nn.Module:
        config = self.config
        subject, found = self._subject()
        self.dtype = torch.float32 if config.rank is None else PRECISION_DTYPES[config.mixed_precision]
        self.pipe: Any = load_pipeline(resolve("model", config.base), torch.device("cpu"), self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = frozen_base(self.pipe, config.loss, config.text_tokens)
        self.pipe.vae.float()  # SDXL's overflows in half precision
        in_unet = hasattr(self.pipe, "unet")
        if names := sorted(config.loss.misplaced(in_unet)):
            kind = "U-Net" if in_unet else "transformer"
            raise RecipeError(f"expected keys for the {kind} of {config.base}, got {', '.join(names)}")
        adapter = SubjectAdapter()
        if config.subject_encoder is not None:
            adapter = SubjectAdapter.from_pretrained(config.subject_encoder, dtype=torch.float32)
            if adapter.config is None:
                raise RecipeError(
                    f"expected a subject encoder at {config.subject_encoder}, got an adapter without"
                )
        adapter.requires_grad_(False).check(self.base.denoiser)
        check_words(self.pipe, config.token, config.class_word)
        self.pipe.to(self.device)
        adapter.to(self.device)
        with self.accelerator.autocast():
            regular = regular_pictures(self.pipe, adapter, subject, config)
        self.pictures = [*regular, squared(found.image, config.resolution)]
        pixels = b"".join(picture.tobytes() for picture in self.pictures)
        self.data_digest = hashlib.sha256(pixels).hexdigest()
        both = self.pictures, [ImageOps.mirror(picture) for picture in self.pictures]
        self.latents = torch.stack([torch.cat([self._latents(one) for one in many]) for many in both])
        self.tokens, self.handle = None, None
        if adapter.config is not None:
            with torch.no_grad():
                seen = [*regular, found.seen(adapter.close_up)]  # of regular pictures no foreground is known
                both = seen, [ImageOps.mirror(picture) for picture in seen]
                self.tokens = torch.stack(
                    [torch.cat([adapter([one]).cpu() for one in many]) for many in both]
                )
        clips = [name for name in self.base.encoders if name != self.base.long_encoder]
        tuned = ["unet" if in_unet else "transformer", *(clips if config.train_text_encoder else [])]
        parts = TunedParts(self.pipe, config.token, config.class_word, config.rank, tuned)
        if config.gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()
        if self.tokens is not None:
            self.handle = attach(self.pipe, adapter)
        count = sum(parameter.numel() for parameter in parts.parameters())
        if found.how == WHOLE:
            print(
                "interactdiff: the whole reference is taken, background and all: give a mask, "
                "a segmenter, or a picture with an alpha channel or a white background",
                file=sys.stderr,
            )
        print(
            f"interactdiff: the subject is found by {found.how}; {len(regular)} regular pictures; "
            f"{count / 1e6:.2f} M parameters in {', '.join(tuned)} and {config.token}; base {config.base} in "
            f"{str(self.dtype).removeprefix('torch.')}",
            file=sys.stderr,
        )
        return parts

    def _subject(self) -> tuple[Subject, Foreground]:
        """The subject with its mask, and its cut-out."""
        config = self.config
        try:
            mask = None if config.mask is None else Path(config.mask)
            given = Subject(config.class_word, Path(config.reference), mask, None, config.caption)
            segmenter = None if config.segmenter is None else load_segmenter(config.segmenter)
            found = foreground(given, segmenter)
            return Subject(given.phrase, given.image, found.mask, None, config.caption), found
        except SceneError as error:
            raise RecipeError(f"reference: {str(error).removeprefix('image: ')}") from None

    def _latents(self, picture: Image.Image) -> Tensor:
        return picture_latents(self.pipe.vae, picture).cpu()

    def optimizers_of(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """The token has a learning rate of its own, and no decay, which would draw it to zero."""
        config, vectors = self.config, list(self.model.vectors.values())
        others = [one for one in parameters if not any(one is vector for vector in vectors)]
        own = {"learning_rate": config.token_learning_rate, "weight_decay": 0.0, "optimizer": "adamw"}
        return [*make_optimizers(others, config), *make_optimizers(vectors, config.model_copy(update=own))]

    def batch(self, step: int) -> dict[str, Any]:
        """Pairs: regular pictures, each once before any comes again; then the reference as often."""
        config = self.config
        pairs, count = config.batch_size, len(self.pictures) - 1
        chosen = []
        for place in range(step * pairs, (step + 1) * pairs):
            epoch, number = divmod(place, count)
            order = random.Random(mixed(config.seed, epoch, _ORDER)).sample(range(count), count)
            chosen.append(order[number])
        chosen += [count] * pairs
        rng = random.Random(mixed(config.seed, step, _FLIPS))
        flips = [int(rng.random() < config.flip) for _ in chosen]
        latents = self.latents[flips, chosen]
        generator = torch.Generator().manual_seed(mixed(config.seed, step, _NOISE))
        drawn = [self.base.objective.draw(one, generator) for one in latents]
        size = [(config.resolution, config.resolution)] * len(chosen)
        return {
            "latents": latents,
            **{name: torch.stack([one[name] for one in drawn]) for name in drawn[0]},
            "tokens": None if self.tokens is None else self.tokens[flips, chosen],
            "original_size": size,
            "target_size": size,
            "crop": [(0, 0)] * len(chosen),
        }

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """L_reg + lambda L_sub. Noise comes with the batch."""
        config = self.config
        self._show(batch["tokens"])
        prompts = [config.class_prompt, config.subject_prompt]
        states = self.base.encode(prompts, self.device)
        pairs = config.batch_size
        rows = {name: tensor.repeat_interleave(pairs, 0) for name, tensor in states.items()}
        noisy, times, given = self.base.noisy({**batch, "states": rows}, self.device, self.dtype)
        predicted = self.base.predict(noisy, times, given, batch)
        regular, subject = (
            self.base.loss_between(
                predicted[part], {name: batch[name][part] for name in ("latents", "noise", "times")}
            )
            for part in (slice(pairs), slice(pairs, None))
        )
        return regular + config.subject_weight * subject

    def _show(self, tokens: Tensor | None) -> None:
        """Let each row see the subject encoder's tokens of it."""
        if self.handle is not None and tokens is not None:
            weights = [self.config.encoder_weight] * len(tokens)
            self.handle["subject"].set_tokens(tokens.to(self.device), [()] * len(tokens), weights)

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """The reference, and a picture for each prompt."""
        how, side = self.config.validation, self.config.resolution
        if not how.prompts:
            return None
        pictures = [self.pictures[-1]]
        with self.accelerator.autocast():
            for number, prompt in enumerate(how.prompts):
                self._show(None if self.tokens is None else self.tokens[0, -1:])
                pictures += repeatable_call(
                    self.pipe,
                    **call_arguments(self.pipe, prompt, guidance_scale=how.guidance_scale),
                    height=side,
                    width=side,
                    num_inference_steps=how.steps,
                    generator=torch.Generator().manual_seed(self.config.seed + number),
                ).images
        sheet = Image.new("RGB", (side * len(pictures), side), "white")
        for number, picture in enumerate(pictures):
            sheet.paste(picture, (side * number, 0))
        return sheet

    def export(self) -> None:
        """In diffusers' formats."""
        if self.handle is not None:
            self.handle.clear()
        self.accelerator.unwrap_model(self.model).export(Path(self.config.export_to))
