"""What the registry knows of DreamTuner's subjects (arXiv 2312.13691). No torch."""

from typing import Any

from interactdiff.method_specs import ItemSpec, MethodSpec, Setting
from interactdiff.scene_items import MAX_STRENGTH
from interactdiff.subject.items import MAX_SUBJECTS, Subject

PHRASE: dict[str, Any] = {"type": "string", "pattern": r"\S"}
PICTURE: dict[str, Any] = {
    "type": "string",
    "description": "a file, relative to the scene file; or a data URI, data:image/png;base64,...",
}
SUBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "phrase": PHRASE,
        "image": PICTURE,
        "mask": {**PICTURE, "type": ["string", "null"], "default": None},
        "box": {
            "type": ["array", "null"],
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 4,
            "maxItems": 4,
            "default": None,
            "description": "x0, y0, x1, y1 as shares of width and height, x0 < x1 and y0 < y1",
        },
        "reference_prompt": {**PHRASE, "type": ["string", "null"], "default": None},
        "strength": {"type": "number", "minimum": 0, "maximum": MAX_STRENGTH, "default": 1.0},
    },
    "required": ["phrase", "image"],
    "additionalProperties": False,
}

REFERENCE_WEIGHT = Setting(
    "reference_weight", "Reference weight", 3.0, 0.0, 100.0,
    "How often each key of the reference counts; 0: no self-subject attention.",
)  # fmt: skip
SETTINGS = (
    Setting("encoder_weight", "Encoder weight", 0.2, 0.0, 2.0, "Factor of what the subject encoder adds."),
    Setting(
        "encoder_guidance", "Encoder guidance", 0.0, 0.0, 1.0,
        "Share of the encoder that the negative prompt is without, so that guidance scales it.",
    ),
    REFERENCE_WEIGHT,
    Setting(
        "attention_without_box", "Attention without a box", 1, 0, 1,
        "0: only subjects with a box or an interaction use self-subject attention.", (0, 1),
    ),
    Setting(
        "guidance", "Reference guidance", 0.0, 0.0, 30.0,
        "Scale of guidance by the reference; 0: guidance by the prompt alone.",
    ),
    Setting(
        "guidance_share", "Share of reference guidance", 0.9, 0.0, 1.0,
        "Share of the steps that the reference guides; the prompt guides the others.",
    ),
    Setting(
        "time_gap", "Time gap", 1, 0, 100,
        "With reference guidance: by how many of 1000 timesteps the reference's noise differs.",
    ),
    Setting(
        "layers", "Share of layers", 1.0, 0.0, 1.0,
        "Share of the attention layers that see the reference, widest first.",
    ),
    Setting("schedule", "Schedule", 1.0, 0.0, 1.0, "Share of the steps, from the first, to act in."),
    Setting(
        "extra_row", "Extra row for reference guidance", 0, 0, 1,
        "1: add a row to steps that have one alone (guidance off, distilled models), as it needs.",
        (0, 1),
    ),
    Setting(
        "fresh_noise", "Fresh noise", 0, 0, 1,
        "1: new noise on the reference at each step, which is then run at each step.", (0, 1),
    ),
    Setting(
        "position_shift", "Position shift", 0.0, -8.0, 8.0,
        "In Flux: by how many of its widths the reference's positions lie beside the picture's.",
    ),
    Setting(
        "position_scale", "Position scale", 0.5, 0.0, 1.0,
        "In Flux: scales the reference's positions; 0: as they are, 1: a subject is as high as its box.",
    ),
)  # fmt: skip
MASKS = Setting("masks", "Masks", 1, 0, 1, "0: references come without their masks.", (0, 1))

SPEC = MethodSpec(
    name="subject",
    title="Subjects (DreamTuner)",
    description="This very person or object, from one picture.",
    settings=SETTINGS,
    adapter="interactdiff.subject.adapter:SubjectAdapter",
    items=(
        ItemSpec(
            Subject,
            "subjects",
            "PHRASE|PICTURE",
            'this very subject, from its picture: "person|ref.png"; |box=0.1,0.1,0.5,0.9 (where it shall '
            "be), |mask=m.png (its pixels), |reference_prompt=TEXT and |strength=0.5 may follow; may be "
            "repeated",
            SUBJECT,
            from_picture=Subject,
            preview="interactdiff.subject.foreground:preview",
            most=MAX_SUBJECTS,
        ),
    ),
    needs_weights=False,
    recipes={
        "subject": "interactdiff.training.subject:SubjectRecipe",
        "subject_tuning": "interactdiff.training.subject_tuning:SubjectTuningRecipe",
    },
    scores="interactdiff.evaluation.subjects:evaluate_subjects",
    score_settings=(*SETTINGS, MASKS),
    benches=("interactdiff.commands.bench_subject",),
)
