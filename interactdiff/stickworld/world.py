"""stickworld: a seeded world of pictograms in which people act on objects.

Its vocabulary and what a scene is. `layouts` draws scenes, `captions` words them, `render` paints them.
Actions come in groups that share one distribution of boxes, so that within a group only pose and contact
tell the actions apart.
"""

import random
from dataclasses import dataclass, replace

from interactdiff.scene import Box, Entity, Interaction
from interactdiff.stickworld.appearance import Appearance, PersonAppearance
from interactdiff.stickworld.captions import PLACES, Caption, caption, phrase

BACKGROUNDS: tuple[str, ...] = tuple(PLACES)
# Width over height of each object's box.
OBJECTS: dict[str, float] = {
    "ball": 1.0,
    "bike": 1.45,
    "boat": 1.2,
    "box": 1.1,
    "car": 1.6,
    "chair": 0.85,
    "dog": 1.3,
    "horse": 1.15,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "beside": ("kicking", "pushing", "pulling", "feeding"),
    "atop": ("riding", "standing on"),
    "overhead": ("lifting", "balancing"),
    "at hand": ("carrying", "hitting"),
}
ACTIONS: tuple[str, ...] = tuple(action for actions in GROUPS.values() for action in actions)
GROUP_OF: dict[str, str] = {action: group for group, actions in GROUPS.items() for action in actions}
HELD_OUT = 2**31  # scenes for scoring have seeds from here on; training draws below it


@dataclass(frozen=True)
class WorldEntity:
    """A person or an object by itself: `box` is xyxy in [0, 1], `facing` is "left" or "right".

    `name` is "person" or one of `OBJECTS`.
    """

    name: str
    appearance: Appearance
    box: Box
    facing: str


@dataclass(frozen=True)
class Triplet:
    """One interaction as planned: boxes are xyxy in [0, 1], `facing` is "left" or "right"."""

    action: str
    object: str
    subject_appearance: PersonAppearance
    object_appearance: Appearance
    subject_box: Box
    object_box: Box
    facing: str

    @property
    def group(self) -> str:
        """Name of the group of actions that share this triplet's box geometry."""
        return GROUP_OF[self.action]

    @property
    def subject_colour(self) -> str:
        """The colour of the person's shirt."""
        return self.subject_appearance.colour

    @property
    def object_colour(self) -> str:
        """The first colour of the object."""
        return self.object_appearance.colour

    @property
    def entities(self) -> tuple[WorldEntity, WorldEntity]:
        """Subject and object, each by itself."""
        return (
            WorldEntity("person", self.subject_appearance, self.subject_box, self.facing),
            WorldEntity(self.object, self.object_appearance, self.object_box, self.facing),
        )


@dataclass(frozen=True)
class WorldScene:
    """Interactions, and entities that do nothing to anything, in front of a background."""

    background: str
    triplets: tuple[Triplet, ...]
    seed: int
    entities: tuple[WorldEntity, ...] = ()

    @property
    def things(self) -> tuple[WorldEntity, ...]:
        """Every person and object: 2i and 2i + 1 are subject and object of triplet i, entities follow."""
        return (*(thing for t in self.triplets for thing in t.entities), *self.entities)

    @property
    def background_seed(self) -> str:
        """What draws small variations of the background: apart from what draws the rest."""
        return f"background {self.seed}"

    @property
    def described(self) -> Caption:
        """The scene's own caption; its wording goes by the seed, apart from what draws the scene."""
        return caption(self, wording(self.seed))

    @property
    def caption(self) -> str:
        """Text of the scene's own caption."""
        return self.described.text

    @property
    def caption_without_verb(self) -> str:
        """The same content with no action word: what the action swap prompts with."""
        return caption(self, wording(self.seed), verbs=False).text

    def interactions(self, colours: bool = True, action: bool = True) -> tuple[Interaction, ...]:
        """The scene's interactions as a user would write them.

        Args:
            colours: name the colours in the phrases ("person in blue", "red bike").
            action: name the action; False leaves it null (boxes only).
        """
        return tuple(
            Interaction(
                subject=phrase(*_pair(t.entities[0]), colours=colours),
                action=t.action if action else None,
                object=phrase(*_pair(t.entities[1]), colours=colours),
                subject_box=t.subject_box,
                object_box=t.object_box,
            )
            for t in self.triplets
        )

    def lone_entities(self, colours: bool = True) -> tuple[Entity, ...]:
        """The entities by themselves as a user would write them."""
        return tuple(Entity(phrase(*_pair(e), colours=colours), e.box) for e in self.entities)

    def with_appearances(self, appearances: tuple[Appearance | None, ...]) -> "WorldScene":
        """The same scene of other persons and objects.

        Args:
            appearances: in the order of `things`; None keeps one as it is.

        Raises:
            ValueError: there are more or fewer than things, or a person's is not a `PersonAppearance`.
        """
        things = self.things
        if len(appearances) != len(things):
            raise ValueError(f"expected {len(things)} appearances, got {len(appearances)}")
        looks = [
            thing.appearance if new is None else new for thing, new in zip(things, appearances, strict=True)
        ]
        for thing, look in zip(things, looks, strict=True):
            if isinstance(look, PersonAppearance) != (thing.name == "person"):
                raise ValueError(f"expected an appearance of a {thing.name}, got a {type(look).__name__}")
        triplets = tuple(
            replace(t, subject_appearance=looks[2 * n], object_appearance=looks[2 * n + 1])
            for n, t in enumerate(self.triplets)
        )
        lone = zip(self.entities, looks[2 * len(triplets) :], strict=True)
        entities = tuple(replace(entity, appearance=look) for entity, look in lone)
        return replace(self, triplets=triplets, entities=entities)


def _pair(thing: WorldEntity) -> tuple[str, Appearance]:
    return thing.name, thing.appearance


def wording(seed: int) -> random.Random:
    """What words a scene's caption: apart from what draws the scene, or the wording would tell the action."""
    return random.Random(f"wording {seed}")
