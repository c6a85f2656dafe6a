"""Which models there are: packaged ones by name, folders, and ids on the Hugging Face Hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from interactdiff.errors import ModelError

MODEL = "stickworld-dit"  # where none is named: the packaged one that draws better


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model by its name; of one that is not packaged, nothing.

    Attributes:
        name: packaged name, folder or Hub id.
        adapters: its packaged adapters, by the name of their method.
        guidance_scale: that suits it; None is its pipeline's default.
        size: of its pictures in pixels, where its pipeline would draw another size; None is the pipeline's.
        settings: of methods and samplers, by their names: values that suit it better than the defaults.
        masks: of `concept.MaskSettings`, likewise.
        learning: of `concept.LearnOptions`, likewise.
    """

    name: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    guidance_scale: float | None = None
    size: int | None = None
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    masks: Mapping[str, int | float] = field(default_factory=dict)
    learning: Mapping[str, int | float | str] = field(default_factory=dict)


PACKAGED = {
    one.name: one
    for one in (
        ModelInfo(
            "stickworld",
            {"interaction": "stickworld-interaction", "subject": "stickworld-subject"},
            guidance_scale=4.0,
            settings={"subject": {"encoder_weight": 1.5, "encoder_guidance": 0.3, "reference_weight": 0.0}},
            masks={"power": 0},
            learning={"max_timestep": 600, "prefix": "a "},
        ),
        ModelInfo(
            "stickworld-dit",
            {
                "interaction": "stickworld-dit-interaction",
                "clear": "stickworld-dit-clear",
                "subject": "stickworld-dit-subject",
            },
            guidance_scale=4.0,
            size=128,
            settings={
                "high_resolution": {"strength": 0.25, "shift": 1.0},
                "subject": {"encoder_weight": 1.5, "attention_without_box": 0},
            },
            masks={"power": 2, "exponent": 1.0, "threshold": 0.05},
            learning={
                "learning_rate": 5e-4,
                "token_learning_rate": 3e-3,
                "max_timestep": 700,
                "prefix": "a ",
            },
        ),
    )
}


def model_info(name: str) -> ModelInfo:
    """What is known of a model: an empty record for one that is not packaged."""
    return PACKAGED.get(name, ModelInfo(name))


def info_at(folder: str) -> ModelInfo:
    """What is known of the model in a folder: an empty record for one that is not packaged."""
    from interactdiff.stickworld import model_path

    folders = {model_path(name).resolve(): info for name, info in PACKAGED.items()}
    return folders.get(Path(folder).resolve(), ModelInfo(folder))


def packaged_adapters() -> tuple[str, ...]:
    """The names of all packaged adapters, of all methods."""
    return tuple(name for info in PACKAGED.values() for name in info.adapters.values())


def default_adapter(model: str, method: str = "interaction") -> str | None:
    """A packaged model's packaged adapter of a method; None if it has none, and for any other model."""
    return model_info(model).adapters.get(method)


def resolve(kind: str, name: str) -> str:
    """Find a model or an adapter.

    Args:
        kind: "model" or "adapter".
        name: a packaged name, a folder, for an adapter also a file, or a Hub id of the form owner/name.

    Returns:
        A folder's or an adapter file's path, or the Hub id as it came.

    Raises:
        ModelError: it is none of them.
    """
    packaged = tuple(PACKAGED) if kind == "model" else packaged_adapters()
    if name in packaged:
        from interactdiff.stickworld import model_path

        folder = model_path(name)
        if not folder.is_dir():
            raise ModelError(f"expected the packaged {kind} {name} in {folder}, got an incomplete install")
        return str(folder)
    if Path(name).is_dir() or (kind == "adapter" and Path(name).is_file()):
        return name
    if Path(name).exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise ModelError(
            f"expected as {kind} a packaged one ({', '.join(packaged)}), a folder, or a Hugging Face Hub id "
            f"like owner/name, got {name!r}"
        )
    return name


def absolute_name(name: str) -> str:
    """A name that means the same from another working directory: paths become absolute."""
    known = name in PACKAGED or name in packaged_adapters()
    return str(Path(name).resolve()) if not known and Path(name).exists() else name


def check_model_folder(folder: Path) -> None:
    """Refuse a damaged model before a loader stumbles over it: reads the index and the weights' headers.

    Raises:
        ModelError: there is no `model_index.json`, or a file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"expected a diffusers model in {folder}, got a folder without {index.name}")
    try:
        json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"expected JSON in {index}, got {error}") from None
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"expected a whole safetensors file at {file}, got {error}") from None
