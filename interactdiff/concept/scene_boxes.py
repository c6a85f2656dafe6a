"""Boxes of interactions as boxes of concepts: a scene that a photo is annotated with says where they are."""

from collections.abc import Mapping

from interactdiff.concept.words import ConceptError
from interactdiff.scene import Scene
from interactdiff.scene_checks import Box


def scene_boxes(scene: Scene, words: Mapping[str, str]) -> dict[str, Box]:
    """The boxes, outside which concepts are not, of the phrases of a scene that name them.

    A phrase names a concept if it is its word or its name, whatever the case; "tall person" does not
    name "person".
    Where several boxes have that phrase, as a person's who does two things, it is the box around them.

    Args:
        scene: with interactions and entities in the photo, as shares of its width and height.
        words: of the concepts, by their names: {"<hero>": "person"}; of `find_masks` the words themselves.

    Raises:
        ConceptError: no phrase of the scene names a concept.
    """
    named = [(ride.subject, ride.subject_box) for ride in scene.interactions]
    named += [(ride.object, ride.object_box) for ride in scene.interactions]
    named += [(entity.phrase, entity.box) for entity in scene.entities]
    boxes: dict[str, Box] = {}
    for name, word in words.items():
        wanted = {name.lower(), " ".join(word.lower().split())}
        found = [box for phrase, box in named if phrase.lower() in wanted]
        if found:
            lefts, tops, rights, bottoms = zip(*found, strict=True)
            boxes[name] = min(lefts), min(tops), max(rights), max(bottoms)
    if not boxes:
        got = ", ".join(dict.fromkeys(phrase for phrase, _ in named)) or "none"
        raise ConceptError(f"expected phrases of the scene of {', '.join(words.values())}, got {got}")
    return boxes
