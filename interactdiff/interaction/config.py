"""What decides an InteractDiffusion adapter's shapes, and how its file says so."""

from dataclasses import dataclass
from typing import Any

from interactdiff.checkpoint import AdapterError
from interactdiff.module_paths import checked_path
from interactdiff.sites import Base

METHOD, VERSION = "interaction", 1


@dataclass(frozen=True)
class InteractionConfig:
    """Everything that decides the adapter's shapes.

    Attributes:
        base: the U-Net it is made for.
        feature_dim: width of the phrase features.
        max_interactions: the most interactions that an image can have.
        hidden: width inside the tokenizer.
        grid_positions: whether fusers tell visual tokens where they are.
    """

    base: Base
    feature_dim: int
    max_interactions: int = 30
    hidden: int = 512
    grid_positions: bool = False

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {
            "method": METHOD,
            "version": VERSION,
            "base": {"cross_attention_dim": self.base.cross_attention_dim, "sites": self.base.sites},
            "feature_dim": self.feature_dim,
            "max_interactions": self.max_interactions,
            "hidden": self.hidden,
            "grid_positions": self.grid_positions,
        }

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
            return cls(
                base=Base(_size(data["base"]["cross_attention_dim"]), sites),
                feature_dim=_size(data["feature_dim"]),
                max_interactions=_size(data["max_interactions"]),
                hidden=_size(data["hidden"]),
                grid_positions=bool(data["grid_positions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"expected the sizes of an adapter in its configuration, got {type(error).__name__}: {error}"
            ) from None


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} where a size should be")
    return value
