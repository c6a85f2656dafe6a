"""InteractDiffusion as one module: the tokenizer, and what acts at every site of the base.

In a U-Net that is a fuser for every transformer block, as published; in a transformer, cross-attention beside
every joint attention.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from interactdiff.adapter import Adapter, Binding, Host
from interactdiff.checkpoint import check_tensors, save_adapter_files
from interactdiff.interaction.config import METHOD, InteractionConfig, JointConfig
from interactdiff.interaction.fuser import GatedSelfAttention, Init
from interactdiff.interaction.joint import JointCrossAttention, TokenParts
from interactdiff.interaction.loading import open_adapter, published_config
from interactdiff.interaction.published import find_adapter
from interactdiff.interaction.tokens import InteractionTokenizer, Item, SceneTokens, scene_tensors
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.module_paths import submodule_at
from interactdiff.scene import ActionRegion, Entity, Interaction
from interactdiff.sites import Base, Denoiser, known_family


class InteractionAdapter(Adapter):
    """InteractDiffusion's weights: `position_net`, and below each site's path what acts there.

    Module names follow the base's, so `state_dict` has the published names
    (`down_blocks.0.attentions.0.transformer_blocks.0.fuser.linear.weight`). `forward` makes the tokens; the
    rest acts once the adapter is attached.

    Args:
        config: the shapes.
        init: where training starts from, see `GatedSelfAttention` and `JointCrossAttention`.
    """

    name = METHOD
    items = (Interaction, Entity)
    order = 10

    def __init__(self, config: InteractionConfig, init: Init = "published"):
        super().__init__()
        self.config = config
        width = config.token_dim
        self.position_net = InteractionTokenizer(
            config.feature_dim, width, config.max_interactions, config.hidden
        )
        self.token_parts = None
        if config.joint is not None:
            self.token_parts = TokenParts(width, config.joint.parts, config.hidden)
        for path, (dim, heads) in config.base.sites.items():
            if config.joint is None:
                fuser = GatedSelfAttention(dim, width, heads, config.grid_positions, init)
                submodule_at(self, path).add_module("fuser", fuser)
            else:
                attention = JointCrossAttention(dim, width, heads, init)
                submodule_at(self, path).add_module("cross_attention", attention)

    @property
    def fusers(self) -> dict[str, GatedSelfAttention]:
        """The fuser of each site of a U-Net, by the site's path."""
        paths = self.config.base.sites
        return {path: cast(GatedSelfAttention, self.get_submodule(f"{path}.fuser")) for path in paths}

    @property
    def cross_attentions(self) -> dict[str, JointCrossAttention]:
        """The cross-attention of each site of a transformer, by the site's path."""
        paths = self.config.base.sites
        return {
            path: cast(JointCrossAttention, self.get_submodule(f"{path}.cross_attention")) for path in paths
        }

    def scene_tensors(
        self, scenes: Sequence[Sequence[Item]], features: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `forward` takes, of scenes and the features of their phrases, see `tokens.scene_tensors`."""
        joint = self.config.joint
        region: ActionRegion = "union" if self.config.structured else "between"
        region = region if joint is None else joint.action_region
        return scene_tensors(scenes, features, self.config.max_interactions, region)

    def forward(self, **tensors: Tensor) -> Tensor | SceneTokens:
        """Tokens of what `scene_tensors` returns: [B, 3N, token_dim]; with regions, `SceneTokens`.

        There are regions for a transformer, and for a U-Net whose fusers are `structured`.
        """
        if self.token_parts is None and not self.config.structured:
            return self.position_net(**tensors)
        masks = tensors["masks"]
        weights = (masks * tensors.pop("strengths", masks)).repeat(1, 3)
        boxes = torch.cat([tensors[f"{role}_boxes"] for role in ("subject", "action", "object")], 1)
        tokens = self.position_net(**tensors)
        if self.token_parts is None:
            return SceneTokens(tokens, weights, boxes)
        tokens, each = self.token_parts(tokens), self.token_parts.parts
        weights, boxes = (t.repeat_interleave(each, 1) for t in (weights, boxes))
        return SceneTokens(tokens.flatten(1, 2), weights, boxes)

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that a denoiser is the base that the adapter is made for.

        Raises:
            AdapterError: it is another.
        """
        self.config.base.check(denoiser)

    def bind(self, host: Host) -> Binding:
        """What one attachment needs.

        Raises:
            AdapterError: the pipeline's text encoders give features of another width.
        """
        from interactdiff.interaction.binding import InteractionBinding

        return InteractionBinding(self, host)

    @classmethod
    def for_denoiser(cls, denoiser: Denoiser, **options: Any) -> "InteractionAdapter":
        """An untrained adapter for a U-Net or a transformer; the options are those of the two below."""
        make = cls.for_unet if isinstance(denoiser, UNet2DConditionModel) else cls.for_transformer
        return make(denoiser, **options)

    @classmethod
    def for_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        max_interactions: int = 30,
        hidden: int = 512,
        grid_positions: bool = False,
        structured: bool = False,
        init: Init = "published",
        feature_dim: int | None = None,
    ) -> "InteractionAdapter":
        """An untrained adapter for a U-Net, in float32 and train mode; attaching it changes no picture.

        Args:
            unet: the base.
            max_interactions: the most interactions that an image can have.
            hidden: width inside the tokenizer.
            grid_positions: whether fusers tell visual tokens where they are.
            structured: whether only the visual tokens in a token's box attend to it.
            init: where training starts from, see `GatedSelfAttention`.
            feature_dim: width of the phrase features; the width of the text features if not given.
        """
        base = Base.of(unet)
        width = base.cross_attention_dim if feature_dim is None else feature_dim
        config = InteractionConfig(base, width, max_interactions, hidden, grid_positions, structured)
        return cls(config, init)

    @classmethod
    def for_transformer(
        cls,
        transformer: Denoiser,
        *,
        max_interactions: int = 30,
        hidden: int = 512,
        init: Init = "published",
        feature_dim: int | None = None,
        **joint: Any,
    ) -> "InteractionAdapter":
        """An untrained adapter for a transformer, in float32 and train mode; attaching it changes no picture.

        Phrase features are what the family's text encoders make of them, see `phrases`.

        Args:
            transformer: the base, of a family in `interactdiff.families`.
            max_interactions: the most interactions that an image can have.
            hidden: width inside the tokenizer.
            init: where training starts from, see `JointCrossAttention`.
            feature_dim: width of the phrase features; the family's if not given.
            **joint: fields of `JointConfig`.
        """
        base, family = Base.of(transformer), known_family(transformer)
        width = family.feature_width(transformer.config) if feature_dim is None else feature_dim
        config = InteractionConfig(
            base, width, max_interactions, hidden, joint=JointConfig(**joint), phrases=family.phrases
        )
        return cls(config, init)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        unet: UNet2DConditionModel | None = None,
        dtype: torch.dtype | None = None,
    ) -> "InteractionAdapter":
        """Load an adapter, ours or a published one, in eval mode. Only its own tensors are read.

        Published weights are known by their names: InteractDiffusion's for SD 1.x (LDM's `.pth`, whole or
        adapter only) and for SDXL, in folders as diffusers lays them out, sharded or not; and GLIGEN's, which
        become a start for training.

        Args:
            path_or_id: a file, a folder, or the id of a repository on the Hugging Face Hub, of which only the
                files that are needed are downloaded.
            weight_name: which file of the folder or repository, where several could be meant.
            unet: the base, if what is published does not tell how many attention heads it has.
            dtype: of the weights; that of their file if not given.

        Raises:
            AdapterError: there is no adapter, it is made for another base than `unet`, or its files are
                damaged, disagree, or try more than to hold weights.
        """
        opened = open_adapter(path_or_id, weight_name=weight_name, unet=unet, dtype=dtype)
        return cls.from_lazy(opened.config, opened.tensors, dtype).eval()

    @classmethod
    def from_published(
        cls, tensors: Mapping[str, Tensor], unet: UNet2DConditionModel
    ) -> "InteractionAdapter":
        """An adapter that holds published weights, in eval mode; every size is read off the tensors.

        Args:
            tensors: published weights; those that are not the adapter's are ignored.
            unet: the base that they are to act in.

        Raises:
            AdapterError: there is no adapter among the tensors, or it is made for another base.
        """
        found = find_adapter({name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
        return cls.from_lazy(published_config(found.tensors, unet), found.tensors).eval()

    @classmethod
    def from_tensors(cls, config: InteractionConfig, tensors: Mapping[str, Tensor]) -> "InteractionAdapter":
        """An adapter that holds these tensors, under the names of `state_dict`.

        Raises:
            AdapterError: names or shapes are not those that the configuration asks for.
        """
        return cls.from_lazy(config, {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})

    @classmethod
    def from_lazy(
        cls, config: InteractionConfig, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None = None
    ) -> "InteractionAdapter":
        """An adapter that holds these tensors, read once their names and shapes are sure to be right.

        Args:
            config: the shapes.
            tensors: under the names of `state_dict`.
            dtype: of the weights; what they are stored in if not given.

        Raises:
            AdapterError: names or shapes are not those that the configuration asks for.
        """
        with torch.device("meta"):
            adapter = cls(config)
        check_tensors("the adapter", adapter.state_dict(), tensors)
        read = {name: tensor.read(dtype) for name, tensor in tensors.items()}
        adapter.load_state_dict(read, assign=True)
        return adapter

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder, in the dtype that the weights have.

        Raises:
            OSError: the folder cannot be written.
        """
        save_adapter_files(path, self.config.to_json(), self.exact_state())
