"""What one request may ask of the server, and which models it may name."""

from dataclasses import dataclass
from pathlib import Path

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
    steps: int = 200
    pixels: int = 4 * 2**20
    images: int = 8
    queue: int = 16
    learn_steps: int = 0
    folders: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    hub: bool = False

    def check_scene(self, scene: Scene) -> None:
        """Refuse texts that are longer than anybody means.

        Raises:
            SceneError: in one sentence.
        """
        phrases = (text for item in scene.items for text in vars(item).values() if isinstance(text, str))
        for text in (scene.prompt, scene.negative_prompt, *phrases):
            if len(text) > self.letters:
                raise SceneError(f"prompt: expected at most {self.letters} letters, got {len(text)}")

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
