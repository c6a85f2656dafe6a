"""Which models there are: packaged ones by name, folders, and ids on the Hugging Face Hub."""

import json
from pathlib import Path

MODEL = "stickworld"
MODELS = ("stickworld", "stickworld-dit")  # the packaged ones
# the packaged adapter of a packaged model, if it has one
ADAPTERS = {"stickworld": "stickworld-interaction", "stickworld-dit": "stickworld-dit-interaction"}
CLEAR_LAYERS = {"stickworld-dit": "stickworld-dit-clear"}  # a packaged model's layers for windows
# What suits a packaged model; any other has its pipeline's default.
GUIDANCE_SCALES = {"stickworld": 2.0, "stickworld-dit": 3.0}
SIZES = {"stickworld-dit": 96}  # pixels, where the pipeline itself would draw another size


class ModelError(ValueError):
    """A model or a device that cannot be used; the message is one sentence with expected and got."""


def default_adapter(model: str) -> str | None:
    """The packaged adapter of a packaged model; None if it has none, and for any other model."""
    return ADAPTERS.get(model)


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
    packaged = MODELS if kind == "model" else tuple(ADAPTERS.values())
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


def lasting(name: str) -> str:
    """A name that means the same from another working directory: paths become absolute."""
    known = name in MODELS or name in ADAPTERS.values()
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
