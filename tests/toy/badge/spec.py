"""What the registry knows of badges."""

from interactdiff.badge.items import Badge  # type: ignore[import-not-found]
from interactdiff.method_specs import ItemSpec, MethodSpec, SamplerSpec, Setting

SPEC = MethodSpec(
    name="badge",
    title="Badges",
    description="Raises every token in a box.",
    settings=(Setting("gain", "Gain", 1.0, 0.0, 10.0, "How much is added."),),
    adapter="interactdiff.badge.adapter:BadgeAdapter",
    items=(
        ItemSpec(
            Badge, "badges", "LABEL|BOX", 'a badge: "new|0.1,0.1,0.3,0.2"', {"type": "object"}, from_box=Badge
        ),
    ),
    needs_weights=False,
    sampler=SamplerSpec(
        "inverted", "Inverted", "Inverts colours.", sampler="interactdiff.badge.sampling:INVERTED"
    ),
    scores="interactdiff.badge.sampling:scores",
    recipes={"badge": "interactdiff.badge.sampling:BadgeRecipe"},
    benches=("interactdiff.badge.bench",),
)
