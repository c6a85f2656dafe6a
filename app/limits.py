"""What one request may ask of the server, and which models it may name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from interactdiff.method_specs import Cost
from interactdiff.models import PACKAGED, ModelError, absolute_name, packaged_adapters
from interactdiff.picture_reading import UnreadablePicture, as_rgb, read_picture
from interactdiff.scene import Scene
from interactdiff.scene_checks import SceneError, shown

MAX_UPLOAD = 20 * 2**20  # bytes

LEARNING_OFF = (
    "Learning is off on this server, because it takes minutes for each photo: start `interactdiff app` on a "
    "machine of your own."
)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        letters: of a prompt or a phrase.
        items: of a scene.
        steps: denoising steps of a picture, those of enlargements included.
        pixels: of the largest picture.
        images: pictures at a time.
        queue: requests that wait; more are refused.
        learn_steps: training steps of concepts from a photo; 0: none are learned here.
        folders: where models and adapters may lie, beside the packaged ones.
        names: models and adapters that may be used wherever they are.
        hub: whether any repository of the Hugging Face Hub may be used.
    """

    letters: int = 2000
    items: int = 64
    steps: int = 200
    pixels: int = 4 * 2**20
    images: int = 8
    queue: int = 16
    learn_steps: int = 0
    folders: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    hub: bool = False

    def check_values(self, values: Any) -> None:
        """Refuse a scene as JSON values before anything of it is read or decoded.

        Raises:
            SceneError: in one sentence: too many items, texts longer than anybody means, or pictures that are
                larger in all than an upload may be.
        """
        if not isinstance(values, dict):
            return  # which no scene is
        pictures = 0
        for key, value in values.items():
            self._check_text(key, value)
            if not isinstance(value, list):
                continue
            self._check_count(key, len(value))
            for number, item in enumerate(value, start=1):
                for name, text in item.items() if isinstance(item, dict) else ():
                    if isinstance(text, str) and text.startswith("data:"):
                        pictures += len(text)
                    else:
                        self._check_text(f"{key} {number}, {name}", text)
        if (got := pictures * 3 // 4) > MAX_UPLOAD:  # three bytes are four letters
            raise SceneError(
                f"scene: expected pictures of at most {MAX_UPLOAD >> 20} MB in all, got {got / 2**20:.1f} MB"
            )

    def check_scene(self, scene: Scene) -> None:
        """Refuse more items than anybody means, and texts that are longer.

        Raises:
            SceneError: in one sentence.
        """
        self._check_text("prompt", scene.prompt)
        self._check_text("negative_prompt", scene.negative_prompt)
        self._check_count("scene", len(scene.items))
        for item in scene.items:
            for name, text in vars(item).items():
                self._check_text(f"{type(item).__name__.lower()}, {name}", text)

    def _check_text(self, name: str, text: Any) -> None:
        if isinstance(text, str) and len(text) > self.letters:
            raise SceneError(f"{name}: expected at most {self.letters} letters, got {len(text)}")

    def _check_count(self, name: str, count: int) -> None:
        if count > self.items:
            raise SceneError(f"{name}: expected at most {self.items} items on this server, got {count}")

    def check_cost(self, cost: Cost, images: int) -> None:
        """Refuse what takes too long.

        Raises:
            SceneError: in one sentence.
        """
        if cost.steps > self.steps:
            raise SceneError(f"steps: expected at most {self.steps} on this server, got {cost.steps}")
        if cost.pixels > self.pixels:
            raise SceneError(
                f"width: expected at most {self.pixels} pixels in all on this server, got {cost.pixels}"
            )
        if not 1 <= images <= self.images:
            raise SceneError(f"images: expected 1 to {self.images} on this server, got {images}")

    def check_learning(self, steps: int) -> None:
        """Refuse to learn where that is off, or for too long.

        Raises:
            SceneError: in one sentence.
        """
        if not self.learn_steps:
            raise SceneError(LEARNING_OFF)
        if not 0 <= steps <= self.learn_steps:
            raise SceneError(f"steps: expected 1 to {self.learn_steps} to learn in, got {steps}")

    def check_name(self, kind: str, name: str) -> None:
        """Refuse a model or adapter that this server does not open.

        Args:
            kind: "model" or "adapter".
            name: as a request has it.

        Raises:
            ModelError: in one sentence, which does not tell whether there is such a file.
        """
        try:
            if absolute_name(name) in (*PACKAGED, *packaged_adapters(), *map(absolute_name, self.names)):
                return
            path = Path(name).resolve()
            if path.exists():
                if any(path.is_relative_to(folder.resolve()) for folder in self.folders):
                    return
            elif self.hub and name.count("/") == 1 and not name.startswith((".", "~", "/")):
                return
        except (OSError, ValueError):  # too long for a path, or with what none has in it
            pass
        places = [str(folder) for folder in self.folders] + ["the Hugging Face Hub"] * self.hub
        where = f", or one from {' or '.join(places)}" if places else ""
        one = {"adapter": "an adapter"}.get(kind, f"a {kind}")
        raise ModelError(f"expected {one} that this server has{where}, got {shown(name)}")


def opened_picture(path: str | Path, alpha: bool = False) -> Image.Image:
    """An uploaded picture in RGB, as a browser shows it.

    Args:
        path: of the file.
        alpha: whether to leave it in the mode that it has, for its alpha channel.

    Raises:
        SceneError: in one sentence, if it is none of the formats that are taken, damaged, or too large.
    """
    try:
        picture = read_picture(path)
        return picture if alpha else as_rgb(picture)
    except UnreadablePicture as error:
        raise SceneError(f"picture: {error}") from None
