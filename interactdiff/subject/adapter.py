"""DreamTuner as one module: a subject encoder, or nothing: self-subject attention needs no weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from interactdiff.adapter import Adapter, Binding, Host
from interactdiff.checkpoint import check_tensors, save_adapter_files
from interactdiff.errors import AdapterError
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.module_paths import submodule_at
from interactdiff.sites import UNET, Base, Denoiser, known_family
from interactdiff.subject.config import METHOD, VERSION, SubjectConfig
from interactdiff.subject.encoder import (
    LAYERS,
    Mapper,
    SubjectAttention,
    image_tower,
    tower_pixels,
)
from interactdiff.subject.items import Subject
from interactdiff.subject.loading import name_in_file, open_subject_adapter

FAMILIES = ("U-Net", "Flux", "SD3")
"""In which subjects can act."""


class SubjectAdapter(Adapter):
    """Subjects from pictures.

    Without a configuration it has no weights: self-subject attention and reference guidance alone, on any
    base of `FAMILIES`. With one it has the subject encoder too: `image_encoder`, which is frozen unless
    `train_tower` is called, `mapper`,
    and below each site's path `se_norm` and `se_attn`, the published names.

    Args:
        config: the encoder's shapes; None has none.
    """

    name = METHOD
    items = (Subject,)
    order = 20

    def __init__(self, config: SubjectConfig | None = None):
        super().__init__()
        self.config = config
        if config is None:
            return
        config.check()
        self.image_encoder = image_tower(dict(config.vision))
        width = self.image_encoder.config.hidden_size
        self.mapper = Mapper(width, config.token_dim, len(config.layers))
        for path, (dim, heads) in config.base.sites.items():
            below, own_queries = submodule_at(self, path), config.base.denoiser == UNET
            if own_queries:
                below.add_module("se_norm", nn.LayerNorm(dim))
            below.add_module("se_attn", SubjectAttention(dim, config.token_dim, heads, own_queries))

    @property
    def attentions(self) -> dict[str, tuple[SubjectAttention, nn.LayerNorm | None]]:
        """What acts at each site, by its path: the attention, and in a U-Net the norm before it."""
        found = {}
        for path in {} if self.config is None else self.config.base.sites:
            below = self.get_submodule(path)
            found[path] = cast(SubjectAttention, below.se_attn), getattr(below, "se_norm", None)
        return found

    def train(self, mode: bool = True) -> SubjectAdapter:
        """As any module's; the image tower computes as when it is used."""
        super().train(mode)
        if self.config is not None:
            self.image_encoder.eval()
        return self

    def train_tower(self) -> None:
        """Train the image tower too, as far as the layers that are read need it."""
        config = cast(SubjectConfig, self.config)
        tower: Any = getattr(self.image_encoder, "vision_model", self.image_encoder)  # transformers 4 has one
        tower.requires_grad_(True)
        tower.post_layernorm.requires_grad_(False)
        depth = len(tower.encoder.layers)
        last = max(depth if layer < 0 else layer for layer in config.layers)
        tower.encoder.layers[last:].requires_grad_(False)

    @property
    def _tower_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.image_encoder.parameters())

    @property
    def side(self) -> int:
        """Pixels of a side of what the image tower takes."""
        return cast(int, self.image_encoder.config.image_size)

    @property
    def close_up(self) -> bool:
        """Whether the image tower sees close-ups, as `Foreground.seen` makes them."""
        return self.config is not None and self.config.close_up

    def states(self, pictures: Sequence[Any] | Tensor) -> Tensor:
        """[B, layers, T, width] of the image tower.

        Args:
            pictures: white where the subject is not; or what `tower_pixels` made of them.
        """
        config = cast(SubjectConfig, self.config)
        pixels = pictures if isinstance(pictures, Tensor) else tower_pixels(pictures, self.side)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_is_trained):
            states = self.image_encoder(
                pixels.to(self.image_encoder.device, self.image_encoder.dtype), output_hidden_states=True
            ).hidden_states
        return torch.stack([states[layer] for layer in config.layers], 1)

    def forward(self, pictures: Sequence[Any] | Tensor) -> Tensor:
        """SE(r): [B, M, token_dim] tokens of pictures, as in `states`."""
        return self.mapper(self.states(pictures))

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that subjects can act in a denoiser, and that it is the encoder's base.

        Raises:
            AdapterError: it is of another family, or another base.
        """
        family = known_family(denoiser)
        if family.name not in FAMILIES:
            raise AdapterError(
                f"expected a denoiser of {', '.join(FAMILIES)} for subjects, got {family.name}"
            )
        if self.config is not None:
            self.config.base.check(denoiser)

    def bind(self, host: Host) -> Binding:
        """What one attachment needs."""
        from interactdiff.subject.binding import SubjectBinding

        return SubjectBinding(self, host)

    @classmethod
    def for_denoiser(
        cls,
        denoiser: Denoiser,
        *,
        vision: Mapping[str, Any] | None = None,
        token_dim: int | None = None,
        layers: tuple[int, ...] = LAYERS,
    ) -> SubjectAdapter:
        """An adapter for a denoiser: without weights; or with an untrained encoder, which changes no picture.

        Args:
            denoiser: the base.
            vision: of the encoder's image tower, what a `CLIPVisionConfig` takes; None has no encoder.
            token_dim: width of the subject's tokens; the width of the base's text features if not given.
            layers: which of the tower's hidden states are read.

        Raises:
            AdapterError: the tower has no such layers, or the denoiser is of no known family.
        """
        if vision is None:
            return cls()
        base = Base.of(denoiser)
        return cls(SubjectConfig(base, dict(vision), token_dim or base.cross_attention_dim, layers))

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> SubjectAdapter:
        """Load an adapter, ours or in the layout of `subject-encoder-sd15`, in eval mode.

        Args:
            path_or_id: a folder, or the id of a repository on the Hugging Face Hub.
            dtype: of the weights; that of their file if not given.

        Raises:
            AdapterError: there is none, or its files are damaged.
        """
        config, tensors = open_subject_adapter(path_or_id)
        return cls() if config is None else cls.from_lazy(config, tensors, dtype).eval()

    @classmethod
    def from_lazy(
        cls, config: SubjectConfig, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None = None
    ) -> SubjectAdapter:
        """An adapter that holds these tensors, read once their names and shapes are sure to be right.

        Raises:
            AdapterError: names or shapes are not those that the configuration asks for.
        """
        adapter = cls(config)
        own = {name_in_file(name): name for name in adapter.state_dict()}
        tensors = {own.get(name_in_file(name), name): tensor for name, tensor in tensors.items()}
        check_tensors("the subject adapter", adapter.state_dict(), tensors)
        adapter.load_state_dict({name: tensor.read(dtype) for name, tensor in tensors.items()}, assign=True)
        adapter.image_encoder.requires_grad_(False)
        return adapter

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder, in the dtype that the weights have.

        Raises:
            OSError: the folder cannot be written.
        """
        config = {"method": METHOD, "version": VERSION} if self.config is None else self.config.to_json()
        state = {name_in_file(name): tensor for name, tensor in self.exact_state().items()}
        save_adapter_files(path, config, state)
