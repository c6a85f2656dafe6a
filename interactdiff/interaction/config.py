"""What decides an InteractDiffusion adapter's shapes, and how its file says so."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from interactdiff.errors import AdapterError
from interactdiff.module_paths import checked_path
from interactdiff.scene import ACTION_REGIONS, ActionRegion
from interactdiff.sites import UNET, Base

METHOD, VERSION = "interaction", 1
PhraseFeatures = Literal["pooled", "mean"]


@dataclass(frozen=True)
class JointConfig:
    """What decides an adapter's shapes in a transformer's joint attentions, and what is read there.

    Attributes:
        token_dim: width of the interaction tokens.
        parts: of each token, each with keys of its own.
        structured: whether only the image tokens in a token's box attend to it.
        action_region: where an action is that does not say.

    The defaults are what trains best (docs/interaction.md has the ablation).
    """

    token_dim: int = 1024
    parts: int = 4
    structured: bool = True
    action_region: ActionRegion = "union"

    def __post_init__(self) -> None:
        for name in ("token_dim", "parts"):
            _size(getattr(self, name))
        if self.action_region not in ACTION_REGIONS:
            raise ValueError(f"action_region {self.action_region!r}")


@dataclass(frozen=True)
class InteractionConfig:
    """Everything that decides the adapter's shapes.

    Attributes:
        base: the denoiser it is made for.
        feature_dim: width of the phrase features.
        max_interactions: the most interactions that an image can have.
        hidden: width inside the tokenizer.
        grid_positions: whether fusers tell visual tokens where they are.
        structured: whether in a U-Net only the visual tokens in a token's box attend to it; off in what is
            published. A transformer's is in `joint`.
        joint: of a transformer; None of a U-Net.
        phrases: what a phrase's feature is: "pooled" by CLIP encoders, or the "mean" of the last hidden
            states of the only encoder over the phrase's tokens.
    """

    base: Base
    feature_dim: int
    max_interactions: int = 30
    hidden: int = 512
    grid_positions: bool = False
    structured: bool = False
    joint: JointConfig | None = None
    phrases: PhraseFeatures = "pooled"

    @property
    def token_dim(self) -> int:
        """Width of the interaction tokens."""
        return self.base.cross_attention_dim if self.joint is None else self.joint.token_dim

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        data: dict[str, Any] = {
            "method": METHOD,
            "version": VERSION,
            "base": {"cross_attention_dim": self.base.cross_attention_dim, "sites": self.base.sites},
            "feature_dim": self.feature_dim,
            "max_interactions": self.max_interactions,
            "hidden": self.hidden,
            "grid_positions": self.grid_positions,
        }
        if self.structured:
            data["structured"] = True
        if self.joint is not None:
            data["base"]["denoiser"] = self.base.denoiser
            data["joint"] = asdict(self.joint)
        if self.phrases != "pooled":
            data["phrases"] = self.phrases
        return data

    @classmethod
    def from_json(cls, data: Any) -> "InteractionConfig":
        """Read the contents of `config.json`.

        Raises:
            AdapterError: it is not the configuration of such an adapter.
        """
        got = (data.get("method"), data.get("version")) if isinstance(data, dict) else data
        if got != (METHOD, VERSION):
            raise AdapterError(f"expected an adapter of method and version {(METHOD, VERSION)}, got {got}")
        try:
            sites = {
                checked_path(path): (_size(dim), _size(heads))
                for path, (dim, heads) in data["base"]["sites"].items()
            }
            denoiser = str(data["base"].get("denoiser", UNET))
            joint, phrases = data.get("joint"), data.get("phrases", "pooled")
            if phrases not in get_args(PhraseFeatures):
                raise ValueError(f"phrases {phrases!r}")
            if (joint is None) != (denoiser == UNET):
                raise ValueError(f"{denoiser} with joint {joint}")
            return cls(
                base=Base(_size(data["base"]["cross_attention_dim"]), sites, denoiser),
                feature_dim=_size(data["feature_dim"]),
                max_interactions=_size(data["max_interactions"]),
                hidden=_size(data["hidden"]),
                grid_positions=bool(data["grid_positions"]),
                structured=bool(data.get("structured", False)),
                joint=None if joint is None else JointConfig(**joint),
                phrases=phrases,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"expected the sizes of an adapter in its configuration, got {type(error).__name__}: {error}"
            ) from None


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} where a size should be")
    return value
