"""Pictures: the record of how each was generated, and a scene's boxes drawn over them."""

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.files import write_aside
from interactdiff.scene import Entity, Interaction, Scene
from interactdiff.scene_checks import Box

INTERACTION = "interaction"  # the method whose adapter has a key of its own in a record
METADATA_KEY = "interactdiff"  # of the PNG's text chunk
LEGIBLE_SIDE = 480  # pixels: smaller pictures are enlarged before anything is written on them
_PACKAGES = ("interactdiff", "torch", "diffusers", "transformers")
# white text is legible on each of them
_SUBJECT, _OBJECT, _ACTION, _ENTITY, _EXTRA = "#d6006c", "#0057d9", "#222222", "#00743a", "#8a4b00"
_GAP = 16  # pixels between pictures that stand side by side
_Rectangle = tuple[int, int, int, int]


class PictureError(InteractdiffError):
    """A file that is no picture of ours."""


def installed_versions() -> dict[str, str]:
    """The versions that decide what a picture looks like."""
    return {name: metadata.version(name) for name in _PACKAGES}


class NoRecordError(PictureError):
    """A file that is no PNG, or one without a record."""


@dataclass(frozen=True)
class Record:
    """Everything it takes to generate a picture again.

    Attributes:
        scene: prompt, items, seed, steps and size.
        model: packaged name, folder or Hub id of the base.
        adapters: the same of the adapters, by the name of their method; None for one without weights.
        device: where it was generated ("cpu", "cuda").
        dtype: in what precision ("float32").
        versions: of interactdiff and the libraries that it was generated with.
        methods: settings of the methods and the sampler that were used, by their names
            (`interactdiff.registry`).
    """

    scene: Scene
    model: str
    adapters: dict[str, str | None]
    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=installed_versions)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of ASCII JSON; the seed is also named at the top, for whoever reads it by eye."""
        others = {name: at for name, at in self.adapters.items() if name != INTERACTION}
        values = {
            "scene": self.scene.to_dict(),
            "model": self.model,
            "adapter": self.adapters.get(INTERACTION),  # under this name since the first version
            **({"adapters": others} if others else {}),
            "device": self.device,
            "dtype": self.dtype,
            "versions": self.versions,
            "methods": self.methods,
            "seed": self.scene.seed,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read it back.

        Raises:
            PictureError: it is not what `to_json` writes.
        """
        try:
            values = json.loads(text)
            scene = Scene.from_dict(values["scene"])
            model, interaction = values["model"], values["adapter"]
            record = cls(
                scene=scene,
                model=model,
                adapters=({} if interaction is None else {INTERACTION: interaction})
                | values.get("adapters", {}),  # which earlier records do not have
                **{name: values[name] for name in ("device", "dtype", "versions")},
                methods=values.get("methods", {}),  # which earlier records do not have
            )
        except SceneError as error:
            raise PictureError(f"scene: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PictureError(
                f"expected JSON with scene, model, adapter, device, dtype and versions, "
                f"got {type(error).__name__}: {error}"
            ) from None
        texts = (record.model, *(at or "" for at in record.adapters.values()), record.device, record.dtype)
        if not all(isinstance(text, str) for text in texts) or not isinstance(record.versions, dict):
            raise PictureError(f"expected names of model, adapters, device and dtype as text, got {texts}")
        methods = record.methods
        if not isinstance(methods, dict) or not all(isinstance(one, dict) for one in methods.values()):
            raise PictureError(f"expected settings by the name of their method, got {methods}")
        return record


def save_picture(image: Image.Image, path: str | Path, record: Record) -> None:
    """Write a PNG with its record inside, aside first and then renamed.

    Raises:
        OSError: it cannot be written.
    """
    info = PngInfo()
    info.add_text(METADATA_KEY, record.to_json())
    write_aside(Path(path), lambda aside: image.save(aside, format="PNG", pnginfo=info))


def read_record(path: str | Path) -> Record:
    """Read how a PNG was drawn.

    Raises:
        NoRecordError: there is no such file, it is no PNG, or it holds no record of ours.
        PictureError: the PNG or its record is damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(METADATA_KEY)
    except OSError as error:
        reason = error.strerror or "something else"
        raise NoRecordError(f"expected a PNG at {path}, got {reason}") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"expected a whole PNG at {path}, got {error}") from None
    if text is None:
        raise NoRecordError(f"expected a PNG drawn by interactdiff at {path}, got one without its record")
    try:
        return Record.from_json(text)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from None


def enlarged(image: Image.Image) -> Image.Image:
    """The picture in RGB, each pixel repeated until its longer side has at least `LEGIBLE_SIDE` pixels."""
    times = -(-LEGIBLE_SIDE // max(image.size))
    size = (image.width * times, image.height * times)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def overlay(
    image: Image.Image,
    interactions: tuple[Interaction, ...],
    entities: tuple[Entity, ...] = (),
    extra_items: tuple[Any, ...] = (),
) -> Image.Image:
    """Draw a scene's boxes and labels over a picture, enlarged if it is small.

    Subjects are pink, objects blue, entities green, actions dark in their region; where there are several
    interactions each label has its number. Boxes of other items are brown, labelled with the item's first
    text.
    """
    picture = enlarged(image)
    canvas = ImageDraw.Draw(picture)
    line = max(2, max(picture.size) // 200)
    labels: list[tuple[str, str, _Rectangle, bool]] = []

    def draw_box(label: str, box: Box, colour: str) -> None:
        rectangle = _in_pixels(box, picture.size)
        canvas.rectangle(_grown(rectangle, line // 2), outline="white", width=2 * line)
        canvas.rectangle(rectangle, outline=colour, width=line)
        labels.append((label, colour, rectangle, False))

    for number, one in enumerate(interactions, start=1):
        mark = f"{number} " if len(interactions) > 1 else ""
        draw_box(mark + one.subject, one.subject_box, _SUBJECT)
        draw_box(mark + one.object, one.object_box, _OBJECT)
        if one.action is not None:
            labels.append((mark + one.action, _ACTION, _in_pixels(one.action_box, picture.size), True))
    for entity in entities:
        draw_box(entity.phrase, entity.box, _ENTITY)
    for item in extra_items:
        label = next((value for value in vars(item).values() if isinstance(value, str)), type(item).__name__)
        for name, value in vars(item).items():
            if name.split("_")[-1] == "box" and value is not None:
                draw_box(label, value, _EXTRA)
    taken: list[_Rectangle] = []
    for text, colour, rectangle, centred in labels:
        _draw_label(canvas, picture.size, text, colour, rectangle, centred, taken)
    return picture


def side_by_side(*pictures: Image.Image) -> Image.Image:
    """Put pictures in a row on white, tops aligned."""
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + _GAP
    return row


def _in_pixels(box: Box, size: tuple[int, int]) -> _Rectangle:
    """The first and the last pixel, inclusive, of a box in a picture of this width and height."""
    x0, y0 = round(box[0] * size[0]), round(box[1] * size[1])
    x1, y1 = round(box[2] * size[0]) - 1, round(box[3] * size[1]) - 1
    return (min(x0, size[0] - 1), min(y0, size[1] - 1), max(x0, x1), max(y0, y1))


def _grown(rectangle: _Rectangle, by: int) -> _Rectangle:
    x0, y0, x1, y1 = rectangle
    return (x0 - by, y0 - by, x1 + by, y1 + by)


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    text: str,
    colour: str,
    rectangle: _Rectangle,
    centred: bool,
    taken: list[_Rectangle],
) -> None:
    """Write a label at its box, in the first of some places where it covers no earlier label."""
    font: Any = ImageFont.load_default(size=max(14, max(size) // 26))
    text = text if len(text) <= 200 else text[:200] + "…"
    pad = 4
    while len(text) > 2 and canvas.textlength(text, font) + 2 * pad > size[0]:
        text = text[:-2] + "…"
    left, _, right, _ = (round(edge) for edge in canvas.textbbox((0, 0), text, font))
    ascent, descent = font.getmetrics()
    width, height = right - left + 2 * pad, ascent + descent + pad
    x0, y0, x1, y1 = rectangle
    middle = ((x0 + x1 - width) // 2, (y0 + y1 - height) // 2)
    corners = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1), (x0, y0)]
    steps = [(middle[0], middle[1] + i * height) for i in (0, 1, -1, 2, -2, 3, -3)]
    places = steps if centred else corners + steps
    places = [_inside(place, (width, height), size) for place in places]
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    place = (free or places)[0]
    taken.append(place)
    canvas.rectangle(place, fill=colour)
    canvas.text((place[0] + pad - left, place[1] + pad // 2), text, fill="white", font=font)


def _inside(corner: tuple[int, int], label: tuple[int, int], size: tuple[int, int]) -> _Rectangle:
    """Where a label of this size lies whose corner is pushed into the picture."""
    x = max(0, min(corner[0], size[0] - label[0]))
    y = max(0, min(corner[1], size[1] - label[1]))
    return (x, y, x + label[0] - 1, y + label[1] - 1)


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
