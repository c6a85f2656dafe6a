"""InteractDiffusion's tokens: what happens where, as vectors that attention can read (paper section 3.2).

One interaction gives three tokens: subject, action, object. Each joins the feature of a phrase with the
Fourier features of a box; the action's box as published is the *between box*, the region the two boxes leave
for the interaction.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from torch import Tensor, nn

from interactdiff.scene import ActionRegion, Box, Entity, Interaction, SceneError

Item = Interaction | Entity  # what takes a slot

FREQUENCIES = 8
BOX_FEATURES = FREQUENCIES * 2 * 4  # sine and cosine of the four edges, at every frequency


def box_features(boxes: Tensor) -> Tensor:
    """Fourier features of boxes, in float32 whatever the boxes' dtype: in float16 they move by up to 0.023.

    Args:
        boxes: [B, N, 4], xyxy in [0, 1].

    Returns:
        [B, N, 64] float32: for each frequency 100^(k/8), k = 0..7, the sines of xyxy and then their cosines.
    """
    return get_fourier_embeds_from_boundingbox(FREQUENCIES, boxes.float())


def between_boxes(subject_boxes: Tensor, object_boxes: Tensor) -> Tensor:
    """The action's region: of the four edges on each axis, the middle two.

    Disjoint boxes give the gap between them, nested boxes the inner one, touching boxes one of zero area.

    Args:
        subject_boxes: [..., 4], xyxy.
        object_boxes: [..., 4], xyxy.

    Returns:
        [..., 4], xyxy.
    """
    corners = torch.stack([subject_boxes, object_boxes], dim=-2).unflatten(-1, (2, 2))
    edges = corners.flatten(-3, -2)  # [..., 4, 2]: four edges on each axis
    return edges.sort(dim=-2).values[..., 1:3, :].flatten(-2)


class EmbeddingTable(nn.Module):
    """A learned table. It sits one level deep because the published weights call it `<name>.emb.weight`."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.emb = nn.Embedding(rows, width)
        nn.init.normal_(self.emb.weight, std=0.02)


def projection(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """The three-layer network that turns a phrase feature and a box into a token."""
    return nn.Sequential(
        nn.Linear(width_in, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, width_out),
    )


class InteractionTokenizer(nn.Module):
    """Turns boxes and phrase features into interaction tokens (`position_net` in the published weights).

    Args:
        feature_dim: width of the phrase features.
        token_dim: width of the tokens.
        max_interactions: N, the rows of the table that tells one interaction's tokens from another's.
        hidden: width inside the projections.
    """

    def __init__(self, feature_dim: int, token_dim: int, max_interactions: int = 30, hidden: int = 512):
        super().__init__()
        self.linears = projection(feature_dim + BOX_FEATURES, hidden, token_dim)
        self.linear_action = projection(feature_dim + BOX_FEATURES, hidden, token_dim)
        self.null_positive_feature = nn.Parameter(torch.zeros(feature_dim))
        self.null_action_feature = nn.Parameter(torch.zeros(feature_dim))
        self.null_position_feature = nn.Parameter(torch.zeros(BOX_FEATURES))
        self.interaction_embedding = EmbeddingTable(max_interactions, token_dim)
        self.position_embedding = EmbeddingTable(3, token_dim)

    @staticmethod
    def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The arguments that make a tokenizer for these weights, by the names of its `state_dict`.

        Raises:
            KeyError: a tensor is missing.
        """
        rows, token_dim = tensors["interaction_embedding.emb.weight"].shape
        return {
            "feature_dim": tensors["null_positive_feature"].shape[0],
            "token_dim": token_dim,
            "max_interactions": rows,
            "hidden": tensors["linears.0.weight"].shape[0],
        }

    @property
    def max_interactions(self) -> int:
        """N: how many interactions an image can have."""
        return self.interaction_embedding.emb.num_embeddings

    def forward(
        self,
        subject_boxes: Tensor,
        object_boxes: Tensor,
        masks: Tensor,
        subject_embeddings: Tensor,
        object_embeddings: Tensor,
        action_embeddings: Tensor,
        action_masks: Tensor | None = None,
        action_boxes: Tensor | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """Make the tokens of a batch.

        Args:
            subject_boxes: [B, N, 4], xyxy in [0, 1].
            object_boxes: [B, N, 4], xyxy in [0, 1].
            masks: [B, N], 1 for an interaction, 0 for an empty slot.
            subject_embeddings: [B, N, feature_dim].
            object_embeddings: [B, N, feature_dim].
            action_embeddings: [B, N, feature_dim].
            action_masks: [B, N], 0 makes only the action's token null ("boxes only"); `masks` if not given.
            action_boxes: [B, N, 4] regions of the actions; the between boxes if not given.
            strengths: [B, N], how far each slot's tokens go from those of an empty slot (0) to those that it
                would have (1), and on in that direction; 1 if not given.

        Returns:
            [B, 3N, token_dim]: all subjects, then all actions, then all objects. Empty slots have tokens too,
            made of the null features.
        """
        if action_boxes is None:
            action_boxes = between_boxes(subject_boxes, object_boxes)
        action_masks = masks if action_masks is None else masks * action_masks
        null_thing, null_action = self.null_positive_feature, self.null_action_feature
        parts = [
            self.linears(self._masked(subject_embeddings, subject_boxes, masks, null_thing)),
            self.linear_action(self._masked(action_embeddings, action_boxes, action_masks, null_action)),
            self.linears(self._masked(object_embeddings, object_boxes, masks, null_thing)),
        ]
        if strengths is not None:
            thing = self.linears(torch.cat([null_thing, self.null_position_feature]))
            action = self.linear_action(torch.cat([null_action, self.null_position_feature]))
            share = strengths.unsqueeze(-1).to(thing.dtype)
            parts = [
                torch.lerp(null.expand_as(part), part, share)
                for null, part in zip((thing, action, thing), parts, strict=True)
            ]
        slots = self.interaction_embedding.emb.weight[: masks.shape[1]]
        subject_role, object_role, action_role = self.position_embedding.emb.weight
        roles = (subject_role, action_role, object_role)
        return torch.cat([part + slots + role for part, role in zip(parts, roles, strict=True)], dim=1)

    def _masked(self, features: Tensor, boxes: Tensor, masks: Tensor, null_feature: Tensor) -> Tensor:
        """[B, N, feature_dim + 64]: features and box where the mask is 1, the learned nulls where it is 0."""
        masks = masks.unsqueeze(-1).to(null_feature.dtype)
        positions = box_features(boxes).to(null_feature.dtype)
        features = masks * features.to(null_feature.dtype) + (1 - masks) * null_feature
        positions = masks * positions + (1 - masks) * self.null_position_feature
        return torch.cat([features, positions], dim=-1)


def scene_phrases(scenes: Sequence[Sequence[Item]]) -> list[str]:
    """Every phrase of some scenes, each once, in order of appearance."""
    phrases = (p for scene in scenes for item in scene for p in _phrases_of(item))
    return list(dict.fromkeys(p for p in phrases if p is not None))


def _phrases_of(item: Item) -> tuple[str | None, ...]:
    return (item.phrase,) if isinstance(item, Entity) else (item.subject, item.action, item.object)


def check_count(scenes: Sequence[Sequence[Item]], max_interactions: int) -> None:
    """Make sure that each scene's interactions and entities find a slot.

    Raises:
        SceneError: a scene has more than there are slots.
    """
    for scene in scenes:
        if len(scene) > max_interactions:
            named = "interactions" + " and entities" * any(isinstance(item, Entity) for item in scene)
            raise SceneError(f"expected at most {max_interactions} {named} an image, got {len(scene)}")


def scene_tensors(
    scenes: Sequence[Sequence[Item]],
    features: Mapping[str, Tensor],
    max_interactions: int,
    region: ActionRegion = "between",
) -> dict[str, Tensor]:
    """Lay out scenes as the keyword arguments of `InteractionTokenizer.forward`.

    An entity has a slot of its own, in which it is subject and object of no action: no adapter was trained on
    entities, and this is what it follows best (docs/interaction.md).

    Args:
        scenes: B scenes of at most `max_interactions` interactions and entities each.
        features: a [feature_dim] vector for every phrase in the scenes, all on one device.
        max_interactions: N, the slots of an image; unused ones are zero and masked.
        region: of the actions that do not say.

    Returns:
        Boxes [B, N, 4], masks and strengths [B, N] in float32, features [B, N, feature_dim] in the features'
        dtype. Strengths are left out where all of them are 1.

    Raises:
        SceneError: a scene has more than N interactions and entities.
    """
    check_count(scenes, max_interactions)
    some_feature = next(iter(features.values()), torch.zeros(0))
    slots = (len(scenes), max_interactions)
    roles = ("subject", "object", "action")
    boxes = {role: torch.zeros(*slots, 4) for role in roles}
    masks = {role: torch.zeros(slots) for role in roles}
    embeddings = {role: some_feature.new_zeros(*slots, some_feature.shape[-1]) for role in roles}
    strengths = torch.ones(slots)
    for row, scene in enumerate(scenes):
        for slot, item in enumerate(scene):
            strengths[row, slot] = item.strength
            for role, phrase, box in _placed(item, region):
                masks[role][row, slot] = 1
                embeddings[role][row, slot] = features[phrase]
                boxes[role][row, slot] = torch.tensor(box)
    device = some_feature.device
    tensors = {f"{role}_boxes": boxes[role].to(device) for role in roles}
    tensors |= {f"{role}_embeddings": embeddings[role] for role in roles}
    tensors |= {"masks": masks["subject"].to(device), "action_masks": masks["action"].to(device)}
    return tensors if strengths.eq(1).all() else tensors | {"strengths": strengths.to(device)}


class SceneTokens(NamedTuple):
    """Interaction tokens of S scenes, and which image tokens they are for.

    Attributes:
        tokens: [S, M, token_dim].
        weights: [S, M] from 0 on; 0: there is no such token. A transformer multiplies what is read of a token
            by its weight; in a U-Net it counts as that many tokens in the softmax.
        boxes: [S, M, 4] regions, xyxy in [0, 1].
    """

    tokens: Tensor
    weights: Tensor
    boxes: Tensor

    def attn_mask(self, grid: tuple[int, int], structured: bool) -> Tensor | None:
        """Which tokens each cell of a grid may attend to: those that there are, whose box touches the cell.

        Args:
            grid: H rows and W columns.
            structured: whether boxes count; else all that there are.

        Returns:
            [S, 1, H * W or 1, M + 1] bool, the last one for the key of zeros; None where all attend to all.
        """
        there = self.weights[:, None, None] != 0
        if structured:
            there = there & cells_in(self.boxes, grid)[:, None]
        elif there.all():
            return None
        return F.pad(there, (0, 1), value=True)


def cells_in(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[S, H * W, M] bool: which cells of a grid of H rows and W columns each box touches.

    Args:
        boxes: [S, M, 4], xyxy in [0, 1]; [0, 0, 0, 0] touches none.
        grid: H and W.
    """
    rows, columns = (torch.arange(n, device=boxes.device) for n in grid)
    top, left = torch.stack([rows, rows + 1]) / grid[0], torch.stack([columns, columns + 1]) / grid[1]
    x0, y0, x1, y1 = boxes[:, None, :].unbind(-1)
    across = (left[0][None, :, None] < x1) & (left[1][None, :, None] > x0)
    down = (top[0][None, :, None] < y1) & (top[1][None, :, None] > y0)
    return (down[:, :, None] & across[:, None]).flatten(1, 2)


def token_table(tokens: Tensor, used: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each different token once: an empty slot's are those of the unconditional half, in every scene.

    Keys and values of this table are what a site keeps for a run: without it, twice as many.

    Args:
        tokens: [S + 1, 3N, token_dim], of S scenes and last of the unconditional half, all slots empty.
        used: for each scene how many slots, from the first, are not empty.

    Returns:
        [U, token_dim], and the [S + 1, 3N] rows of it that make `tokens`.
    """
    count = tokens.shape[1]
    index = torch.arange(count, device=tokens.device).repeat(len(tokens), 1)
    parts = [tokens[-1]]
    for scene, slots in enumerate(used):
        places = torch.arange(count, device=tokens.device).view(3, -1)[:, :slots].flatten()
        start = sum(len(part) for part in parts)
        index[scene, places] = torch.arange(start, start + len(places), device=tokens.device)
        parts.append(tokens[scene, places])
    return torch.cat(parts), index


def _placed(item: Item, region: ActionRegion) -> Iterator[tuple[str, str, Box]]:
    """Role, phrase and box of each token that an item has."""
    if isinstance(item, Entity):
        yield "subject", item.phrase, item.box
        yield "object", item.phrase, item.box
        return
    yield "subject", item.subject, item.subject_box
    yield "object", item.object, item.object_box
    if item.action is not None:
        yield "action", item.action, item.action_box_in(region)
