"""InteractDiffusion as one module: the tokenizer and a fuser for every transformer block of the base."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from interactdiff.checkpoint import AdapterError, check_tensors, load_adapter_files, save_adapter_files
from interactdiff.interaction.fuser import GatedSelfAttention, Init
from interactdiff.interaction.tokens import InteractionTokenizer
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
                _module_path(path): (_size(dim), _size(heads))
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


def _module_path(value: str) -> str:
    if not all(part.isidentifier() or part.isdecimal() for part in value.split(".")):
        raise ValueError(f"{value!r} where a module's path should be")
    return value


class InteractionAdapter(nn.Module):
    """InteractDiffusion's weights: `position_net`, and below each site's path a `fuser`.

    Module names follow the base's, so `state_dict` has the published names
    (`down_blocks.0.attentions.0.transformer_blocks.0.fuser.linear.weight`). `forward` makes the tokens; the
    fusers act once the adapter is attached.

    Args:
        config: the shapes.
        init: where training starts from, see `GatedSelfAttention`.
    """

    def __init__(self, config: InteractionConfig, init: Init = "published"):
        super().__init__()
        self.config = config
        self.position_net = InteractionTokenizer(
            config.feature_dim, config.base.cross_attention_dim, config.max_interactions, config.hidden
        )
        for path, (dim, heads) in config.base.sites.items():
            parent: nn.Module = self
            for name in path.split("."):
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(
                "fuser",
                GatedSelfAttention(dim, config.base.cross_attention_dim, heads, config.grid_positions, init),
            )

    @property
    def fusers(self) -> dict[str, GatedSelfAttention]:
        """The fuser of each site, by the site's path."""
        paths = self.config.base.sites
        return {path: cast(GatedSelfAttention, self.get_submodule(f"{path}.fuser")) for path in paths}

    def forward(self, **scene_tensors: Tensor) -> Tensor:
        """Make tokens, [B, 3N, token_dim], of what `interaction.tokens.scene_tensors` returns."""
        return self.position_net(**scene_tensors)

    @classmethod
    def for_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        max_interactions: int = 30,
        hidden: int = 512,
        grid_positions: bool = False,
        init: Init = "published",
        feature_dim: int | None = None,
    ) -> "InteractionAdapter":
        """An untrained adapter for a U-Net, in float32 and train mode; attaching it changes no picture.

        Args:
            unet: the base.
            max_interactions: the most interactions that an image can have.
            hidden: width inside the tokenizer.
            grid_positions: whether fusers tell visual tokens where they are.
            init: where training starts from, see `GatedSelfAttention`.
            feature_dim: width of the phrase features; the width of the text features if not given.
        """
        base = Base.of(unet)
        width = base.cross_attention_dim if feature_dim is None else feature_dim
        return cls(InteractionConfig(base, width, max_interactions, hidden, grid_positions), init)

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str]) -> "InteractionAdapter":
        """Load an adapter, in eval mode and in the dtype of its file.

        Args:
            path_or_id: a folder that `save_pretrained` made, or the id of one on the Hugging Face Hub.

        Raises:
            AdapterError: there is no adapter, or its files are damaged or disagree.
        """
        data, tensors = load_adapter_files(path_or_id)
        return cls.from_tensors(InteractionConfig.from_json(data), tensors).eval()

    @classmethod
    def from_published(
        cls, tensors: Mapping[str, Tensor], unet: UNet2DConditionModel
    ) -> "InteractionAdapter":
        """An adapter that holds published weights, in eval mode; every size is read off the tensors.

        Args:
            tensors: weights under diffusers' names; those that are not the adapter's are ignored.
            unet: the base that they are to act in.

        Raises:
            AdapterError: there is no adapter among the tensors, or it is made for another base.
        """
        prefix, fuser = "position_net.", ".fuser."
        tensors = {name: t for name, t in tensors.items() if name.startswith(prefix) or fuser in name}
        try:
            sizes = InteractionTokenizer.sizes_of(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            )
        except KeyError as missing:
            raise AdapterError(f"expected InteractDiffusion's weights, got none named {missing}") from None
        linear = f"{fuser}linear.weight"
        widths = {n.removesuffix(linear): t.shape[0] for n, t in tensors.items() if n.endswith(linear)}
        heads = {path: heads for path, (_, heads) in Base.of(unet).sites.items()}  # no tensor tells
        sites = {path: (width, heads.get(path, 1)) for path, width in widths.items()}
        base = Base(sizes["token_dim"], sites)
        base.check(unet)
        config = InteractionConfig(base, sizes["feature_dim"], sizes["max_interactions"], sizes["hidden"])
        return cls.from_tensors(config, tensors).eval()

    @classmethod
    def from_tensors(cls, config: InteractionConfig, tensors: Mapping[str, Tensor]) -> "InteractionAdapter":
        """An adapter that holds these tensors, under the names of `state_dict`.

        Raises:
            AdapterError: names or shapes are not those that the configuration asks for.
        """
        with torch.device("meta"):
            adapter = cls(config)
        check_tensors("the adapter", adapter.state_dict(), tensors)
        adapter.load_state_dict(dict(tensors), assign=True)
        return adapter

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder, in the dtype that the weights have.

        Raises:
            OSError: the folder cannot be written.
        """
        save_adapter_files(path, self.config.to_json(), self.state_dict())
