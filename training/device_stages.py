"""The models of the embedded world that `on_device` trains: settings of their recipes, and in which order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A model's training.

    Attributes:
        name: what `--again` calls it.
        config: the recipe's file, without its ending.
        made: the folder that it exports, in the folder of runs.
        share: of the minutes.
        settings: laid over the recipe's file; `{runs}` stands for the folder of runs.
        again: the same, to go on from what is there.
    """

    name: str
    config: str
    made: str
    share: float
    settings: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)


SIZES = {
    128: {"renders": 32000, "batch_size": 192, "share": 0.5},
    96: {"renders": 16000, "batch_size": 256, "share": 0.2, "most": 3},
    64: {"renders": 32000, "batch_size": 512, "share": 0.2, "most": 2},
    160: {"renders": 8000, "batch_size": 128, "share": 0.05},
    192: {"renders": 8000, "batch_size": 96, "share": 0.05},
}
TOY_SIZES = {128: {"renders": 24, "batch_size": 4, "share": 1.0}}
TOY: dict[str, dict[str, Any]] = {  # narrow models for a trial run
    "unet": {"block_out_channels": [16, 16]},
    "transformer": {"num_single_layers": 1, "num_attention_heads": 1},
    "adapter": {"hidden": 16},
}
PARTS = 8  # of the pictures with references: folders that are rendered side by side
_TEXT = Stage(
    "text", "stickworld_text", "parts/text_encoder", 0.05, {"export_to": "{runs}/parts", "batch_size": 256}
)
_T5 = Stage(
    "t5", "stickworld_t5", "parts/text_encoder_2", 0.05, {"export_to": "{runs}/parts", "batch_size": 256}
)
VAE = Stage(
    "vae",
    "stickworld_vae",
    "parts/vae",
    0.11,
    {"export_to": "{runs}/parts/vae", "batch_size": 64, "renders": 32000},
    {"init_from": "{runs}/parts/vae"},
)
_READER = Stage(
    "reader",
    "stickworld_latent_reader",
    "readers/vae",
    0.04,
    {
        "vae": "{runs}/parts/vae",
        "export_to": "{runs}/readers/vae",
        "batch_size": 128,
        "renders": 32000,
    },
)
_DETECTOR = Stage(
    "detector",
    "stickworld_detector",
    "detector",
    0.25,
    {
        "export_to": "{runs}/detector",
        "autoencoders": ["{runs}/parts/vae"],
        "renders": 32000,
        "batch_size": 96,
    },
)
_TOWER = Stage(
    "tower",
    "stickworld_image_tower",
    "readers/image-tower",
    0.10,
    {"export_to": "{runs}/readers/image-tower", "batch_size": 256, "portraits": 16000},
)


def _base(name: str, config: str, made: str, share: float, **more: str) -> Stage:
    return Stage(
        name,
        config,
        made,
        share,
        {
            "text": "{runs}/parts",
            "latent_reader": "{runs}/readers/vae",
            "export_to": f"{{runs}}/{made}",
            "sizes": SIZES,
            "compile": False,
            "warmup_steps": 100,
            **more,
        },
        {"init_from": f"{{runs}}/{made}", "learning_rate": 1.0e-3},
    )


def _adapter(name: str, base: str, share: float, kind: str, more: Mapping[str, Any], **again: Any) -> Stage:
    made = f"{base}-{kind}"
    return Stage(
        name,
        f"stickworld_{name}",
        made,
        share,
        {"base": f"{{runs}}/{base}", "export_to": f"{{runs}}/{made}", "batch_size": 64, **more},
        {"init_from": f"{{runs}}/{made}", "learning_rate": 1.0e-3, **again},
    )


def _interaction(name: str, base: str, share: float) -> Stage:
    return _adapter(name, base, share, "interaction", {"renders": 32000})


def _subject(name: str, base: str, share: float) -> Stage:
    settings = {
        "image_encoder": "{runs}/readers/image-tower",
        "data": [f"{{runs}}/subjects/{part}" for part in range(PARTS)],
        "cache": f"{{runs}}/cache/{name}",
        "learning_rate": 3.0e-3,
        "workers": 4,
    }
    return _adapter(name, base, share, "subject", settings, image_encoder=None)


_UNET = _base("base", "stickworld_base", "stickworld", 0.42, vae="{runs}/parts/vae")
_DIT = _base("dit", "stickworld_dit", "stickworld-dit", 0.36)
_INTERACTION = _interaction("interaction", "stickworld", 0.17)
_DIT_INTERACTION = _interaction("dit_interaction", "stickworld-dit", 0.11)
_SUBJECT = _subject("subject", "stickworld", 0.13)
_DIT_SUBJECT = _subject("dit_subject", "stickworld-dit", 0.13)
CLEAR = Stage(
    "clear",
    "distill_clear_stickworld",
    "stickworld-dit-clear",
    0.11,
    {"base": "{runs}/stickworld-dit", "export_to": "{runs}/stickworld-dit-clear", "batch_size": 48},
    {"init_from": "{runs}/stickworld-dit-clear", "learning_rate": 5.0e-4},
)
# What later stages read, made once for all: renders and captions, then latents; pictures with references.
RENDERS, LATENTS = Stage("renders", "", "", 0.0), Stage("latents", "", "", 0.0)
REFERENCES = Stage("references", "", "", 0.0)
NEEDED = (VAE, _READER, _TEXT)  # by both bases
# One list after the other; the lanes of a list side by side, the stages of a lane one after the other.
PLAN: tuple[tuple[tuple[Stage, ...], ...], ...] = (
    ((RENDERS, VAE, LATENTS, _READER), (_TEXT, _T5), (REFERENCES, _TOWER)),
    ((_UNET, _INTERACTION, _SUBJECT), (_DIT, _DIT_INTERACTION, CLEAR, _DIT_SUBJECT), (_DETECTOR,)),
)
