"""What one request may ask of the server, and which models it may name."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from interactdiff.methods import Work
from interactdiff.models import ADAPTERS, MODELS, ModelError
from interactdiff.scene_checks import SceneError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_UPLOAD = 20 * 2**20  # bytes
MAX_UPLOAD_PIXELS = 40_000_000


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        steps: denoising steps of a picture, those of enlargements included.
        pixels: of the largest picture.
        images: pictures at a time.
        queue: requests that wait; more are refused.
        folders: where models and adapters may lie, beside the packaged ones.
        names: models and adapters that may be used wherever they are.
        hub: whether any repository of the Hugging Face Hub may be used.
    """

    steps: int = 200
    pixels: int = 4 * 2**20
    images: int = 8
    queue: int = 16
    folders: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    hub: bool = False

    def check_work(self, work: Work, images: int) -> None:
        """Refuse what takes too long.

        Raises:
            SceneError: in one sentence.
        """
        if work.steps > self.steps:
            raise SceneError(f"steps: expected at most {self.steps} on this server, got {work.steps}")
        if work.pixels > self.pixels:
            raise SceneError(
                f"width: expected at most {self.pixels} pixels in all on this server, got {work.pixels}"
            )
        if not 1 <= images <= self.images:
            raise SceneError(f"images: expected 1 to {self.images} on this server, got {images}")

    def check_name(self, kind: str, name: str) -> None:
        """Refuse a model or adapter that this server does not open.

        Args:
            kind: "model" or "adapter".
            name: as a request has it.

        Raises:
            ModelError: in one sentence, which does not tell whether there is such a file.
        """
        if name in (*MODELS, *ADAPTERS.values(), *self.names):
            return
        is_id = name.count("/") == 1 and not name.startswith((".", "~", "/")) and "\\" not in name
        if is_id and self.hub and not Path(name).exists():
            return
        path = Path(name).resolve()
        inside = any(path.is_relative_to(folder.resolve()) for folder in self.folders)
        if inside and path.exists():  # a name that is no path here could be a Hub id
            return
        places = [str(folder) for folder in self.folders] + ["the Hugging Face Hub"] * self.hub
        where = f", or one from {' or '.join(places)}" if places else ""
        raise ModelError(f"expected a {kind} that this server has{where}, got {name!r}")


def opened_picture(path: str | Path) -> Image.Image:
    """An uploaded picture in RGB.

    Raises:
        SceneError: in one sentence, if it is none of the formats that are taken, damaged, or too large.
    """
    formats = ", ".join(PICTURE_FORMATS)
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_UPLOAD_PIXELS:
                size = f"{image.width} x {image.height}"
                raise SceneError(f"picture: expected at most {MAX_UPLOAD_PIXELS} pixels, got {size}")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, SceneError):
            raise
        raise SceneError(f"picture: expected a whole {formats}, got something else") from None
