"""What the registry knows of CLEAR (arXiv 2412.16112): windows, and high resolution with them. No torch."""

from interactdiff.method_specs import MethodSpec, SamplerSpec, Setting

SCALES = (2, 4, 8)

HIGH_RESOLUTION = SamplerSpec(
    name="high_resolution",
    title="High resolution (CLEAR)",
    description="Generates the picture small, then enlarges it and denoises it again, within windows of "
    "attention where those save time.",
    settings=(
        Setting("scale", "Scale", 2, 2, 8, "Each side, over that of the first picture.", SCALES),
        Setting("strength", "Denoising strength", 0.7, 0.05, 1.0, "Share of a stage's steps that are taken."),
        Setting("steps", "Steps per stage", 20, 1, 200, "Of which that share is taken."),
        Setting("shift", "Timestep shift", 10.0, 0.1, 100.0, "1: none; with 10, strength 0.7 is 96 % noise."),
        Setting("window", "Window radius", 8, 0, 128, "In tokens; 0: full attention."),
    ),
    sampler="interactdiff.clear.sampler:SAMPLER",
)

SPEC = MethodSpec(
    name="clear",
    title="Windows of attention (CLEAR)",
    description="Image tokens attend within a radius, which is faster from some thousand tokens on.",
    adapter="interactdiff.clear.adapter:ClearAdapter",
    settings=(
        Setting("min_tokens", "Least image tokens", 0, 0, 2**20, "Pictures with fewer have full attention."),
    ),
    needs_weights=False,
    sampler=HIGH_RESOLUTION,
    recipes={
        "distill": "interactdiff.training.distill:DistillRecipe",
        "distill_pictures": "interactdiff.training.distill_pictures:DistillPicturesRecipe",
    },
    benches=("interactdiff.commands.bench_clear",),
)
