"""What a perfect detector says of scenes of stickworld; shared by the tests."""

from interactdiff.stickworld.detector import Detections, Found, FoundTriplet
from interactdiff.stickworld.world import WorldEntity, WorldScene


def exact(thing: WorldEntity, action: str | None = None) -> Found:
    """What a perfect detector says of a thing."""
    others = {name: value for name, value in thing.appearance.attributes().items() if name != "colour"}
    return Found(thing.name, thing.box, thing.appearance.colour, 1.0, action, others)


def perfect(scene: WorldScene) -> Detections:
    pairs = [(exact(t.entities[0], t.action), exact(t.entities[1])) for t in scene.triplets]
    lone = [exact(entity) for entity in scene.entities]
    return Detections(
        (*(person for person, _ in pairs), *(one for one in lone if one.name == "person")),
        (*(thing for _, thing in pairs), *(one for one in lone if one.name != "person")),
        tuple(FoundTriplet(person, person.action or "", thing, 1.0) for person, thing in pairs),
    )
