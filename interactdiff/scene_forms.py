"""Interactions in the forms in which earlier ports of the method take them."""

from collections.abc import Sequence

from interactdiff.scene import NULL_ACTION, Interaction, numbered
from interactdiff.scene_checks import SceneError, checked_text, shown


def interactions_from_lists(
    subject_phrases: Sequence[str],
    action_phrases: Sequence[str | None],
    object_phrases: Sequence[str],
    subject_boxes: Sequence[Sequence[float]],
    object_boxes: Sequence[Sequence[float]],
) -> tuple[Interaction, ...]:
    """Make interactions from five parallel lists, the form in which earlier ports of the method take them.

    Raises:
        SceneError: if the lists differ in length, or an entry is not what it should be.
    """
    lists = {
        "subject_phrases": subject_phrases,
        "action_phrases": action_phrases,
        "object_phrases": object_phrases,
        "subject_boxes": subject_boxes,
        "object_boxes": object_boxes,
    }
    for name, value in lists.items():
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise SceneError(f"{name}: expected a list, got {shown(value)}")
    if len({len(value) for value in lists.values()}) > 1:
        lengths = ", ".join(f"{len(value)} {name}" for name, value in lists.items())
        raise SceneError(f"expected lists of equal length, got {lengths}")
    rows = enumerate(zip(*lists.values(), strict=True), start=1)
    return tuple(numbered(Interaction, number, lambda row=row: Interaction(*row)) for number, row in rows)


def interactions_from_text(
    text: str, subject_boxes: Sequence[Sequence[float]], object_boxes: Sequence[Sequence[float]]
) -> tuple[Interaction, ...]:
    """Make interactions from the text form of the AUTOMATIC1111 extension, `subject=action=object;...`.

    Args:
        text: one triplet after the other; a semicolon at the end is allowed.
        subject_boxes: a box for each triplet, xyxy in [0, 1].
        object_boxes: likewise.

    Raises:
        SceneError: a triplet does not have three parts, or there are not as many boxes.
    """
    triplets = [part for part in checked_text("text", text).split(";") if part.strip()]
    parts = [[part.strip() for part in triplet.split("=")] for triplet in triplets]
    for number, (triplet, three) in enumerate(zip(triplets, parts, strict=True), start=1):
        if len(three) != 3:
            raise SceneError(f"interaction {number}: expected subject=action=object, got {shown(triplet)}")
    subjects, actions, things = ([three[i] for three in parts] for i in range(3))
    actions = [None if action == NULL_ACTION else action for action in actions]
    return interactions_from_lists(subjects, actions, things, subject_boxes, object_boxes)
