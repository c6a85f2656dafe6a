"""What the registry knows of interactions: InteractDiffusion (arXiv 2312.05849). No torch."""

from typing import Any

from interactdiff.method_specs import ItemSpec, MethodSpec
from interactdiff.scene_items import ACTION_REGIONS, MAX_STRENGTH, Entity, Interaction

PHRASE: dict[str, Any] = {"type": "string", "pattern": r"\S"}
BOX: dict[str, Any] = {
    "type": "array",
    "items": {"type": "number", "minimum": 0, "maximum": 1},
    "minItems": 4,
    "maxItems": 4,
    "description": "x0, y0, x1, y1 as shares of width and height, x0 < x1 and y0 < y1",
}
STRENGTH: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": MAX_STRENGTH, "default": 1.0}
INTERACTION: dict[str, Any] = {
    "type": "object",
    "properties": {
        "subject": PHRASE,
        "action": {**PHRASE, "type": ["string", "null"], "description": "null: boxes only"},
        "object": PHRASE,
        "subject_box": BOX,
        "object_box": BOX,
        "strength": STRENGTH,
        "action_region": {"enum": [None, *ACTION_REGIONS], "default": None},
    },
    "required": ["subject", "action", "object", "subject_box", "object_box"],
    "additionalProperties": False,
}
ENTITY: dict[str, Any] = {
    "type": "object",
    "properties": {"phrase": PHRASE, "box": BOX, "strength": STRENGTH},
    "required": ["phrase", "box"],
    "additionalProperties": False,
}

SPEC = MethodSpec(
    name="interaction",
    title="Interactions",
    description="Who does what to what, and where.",
    adapter="interactdiff.interaction.adapter:InteractionAdapter",
    items=(
        ItemSpec(
            Interaction,
            "interactions",
            "S|A|O|BOX|BOX",
            'who does what to what, and where: "person|riding|bike|0.30,0.20,0.62,0.80|0.28,0.55,0.70,0.92"; '
            "boxes are x0,y0,x1,y1 as shares of width and height, the subject's first; an action of - leaves "
            "the action open (boxes only); |strength=0.5 and |action_region=union may follow; may be "
            "repeated",
            INTERACTION,
        ),
        ItemSpec(
            Entity,
            "entities",
            "PHRASE|BOX",
            'what else is where: "red ball|0.70,0.60,0.90,0.80"; |strength=0.5 may follow; may be repeated',
            ENTITY,
        ),
    ),
    always_attached=True,
    recipes={
        "adapter": "interactdiff.training.adapter:AdapterRecipe",
        "interaction": "interactdiff.training.interaction:InteractionRecipe",
    },
    benches=("interactdiff.commands.bench_interaction", "interactdiff.commands.bench_joint"),
)
