"""What the registry knows of concepts: AttenCraft (arXiv 2405.17965). No torch."""

from interactdiff.method_specs import ExportSpec, MethodSpec

SPEC = MethodSpec(
    name="concept",
    title="Concepts (AttenCraft)",
    description="New words for the things of one photo, which keep apart.",
    adapter="interactdiff.concept.adapter:ConceptAdapter",
    scores="interactdiff.evaluation.concepts:evaluate_concepts",
    scores_need_adapter=False,
    scores_take_changes=True,
    benches=("interactdiff.commands.bench_concept",),
    commands=("interactdiff.commands.learn", "interactdiff.commands.masks"),
    exports=(
        ExportSpec(
            "concept",
            "AttenCraft's and Custom Diffusion's files in our format",
            "interactdiff.concept.published:export_concept",
        ),
        ExportSpec(
            "custom-diffusion",
            "a concept as diffusers and AttenCraft read it",
            "interactdiff.concept.published:export_custom_diffusion",
        ),
        ExportSpec(
            "fold",
            "a concept and the model it is for as one pipeline",
            "interactdiff.concept.folding:export_folded",
        ),
    ),
)
