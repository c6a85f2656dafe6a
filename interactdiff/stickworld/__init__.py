"""The embedded world: a seeded renderer with exact ground truth, and the small models trained on it."""

from pathlib import Path


def model_path(name: str) -> Path:
    """Where a packaged model lies.

    Args:
        name: "stickworld" or "stickworld-dit" (diffusers folders), "stickworld-interaction" or
            "stickworld-dit-interaction" (their adapters), "stickworld-dit-clear" (layers for CLEAR),
            "stickworld-subject" or "stickworld-dit-subject" (their subject encoders),
            "detector" (which scores their pictures).
    """
    return Path(__file__).parent / "models" / name
