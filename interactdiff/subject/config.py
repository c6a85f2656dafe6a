"""The shapes of a subject encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from interactdiff.errors import AdapterError
from interactdiff.scene_checks import shown
from interactdiff.sites import Base
from interactdiff.subject.encoder import LAYERS

METHOD, VERSION = "subject", 1
CLIP_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
"""openai/clip-vit-large-patch14, which the published weights have."""


@dataclass(frozen=True)
class SubjectConfig:
    """The shapes of a subject encoder.

    Attributes:
        base: the denoiser that it is made for.
        vision: of the image tower, what a `CLIPVisionConfig` takes.
        token_dim: width of the subject's tokens.
        layers: which of the tower's hidden states are read.
        close_up: whether the tower sees a close-up of the subject, or the subject where it is in its picture,
            as encoders of before and the published one do; on white both.
    """

    base: Base
    vision: Mapping[str, Any] = field(default_factory=lambda: dict(CLIP_LARGE))
    token_dim: int = 768
    layers: tuple[int, ...] = LAYERS
    close_up: bool = True

    def to_json(self) -> dict[str, Any]:
        """As `config.json` has it."""
        base = asdict(self.base) | {"sites": {path: list(size) for path, size in self.base.sites.items()}}
        values = {"base": base, "vision": dict(self.vision), "token_dim": self.token_dim}
        values |= {"layers": list(self.layers), "close_up": self.close_up}
        return {"method": METHOD, "version": VERSION, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SubjectConfig:
        """Read it back.

        Raises:
            AdapterError: it is not what `to_json` writes.
        """
        got = (values.get("method"), values.get("version"))
        if got != (METHOD, VERSION):
            raise AdapterError(f"expected an adapter of method and version {(METHOD, VERSION)}, got {got}")
        try:
            base = values["base"]
            sites = {path: (int(dim), int(heads)) for path, (dim, heads) in base["sites"].items()}
            made = Base(int(base["cross_attention_dim"]), sites, str(base["denoiser"]))
            layers = tuple(int(layer) for layer in values["layers"])
            close_up = bool(values.get("close_up", False))
            return cls(made, dict(values["vision"]), int(values["token_dim"]), layers, close_up)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"expected the configuration of a subject adapter, got {error!r}") from None

    def check(self) -> None:
        """Make sure that the image tower has the layers that are read.

        Raises:
            AdapterError: it has not.
        """
        depth = self.vision.get("num_hidden_layers", 12)
        if wrong := [layer for layer in self.layers if not -1 <= layer <= depth]:
            raise AdapterError(f"expected layers of an image tower of {depth}, got {shown(wrong)}")
