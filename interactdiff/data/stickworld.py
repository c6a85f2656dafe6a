"""Scenes of stickworld as an image folder with layouts."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from interactdiff.data.layouts import METADATA, Layout, write_layouts
from interactdiff.files import write_aside
from interactdiff.stickworld.render import SIZE, render
from interactdiff.stickworld.world import WorldScene


def layout_of(scene: WorldScene, file_name: str, colours: bool = True) -> Layout:
    """A scene's layout: its caption, its interactions, and its entities that do nothing.

    Args:
        scene: of stickworld.
        file_name: of its picture.
        colours: whether phrases name colours ("red bike"); without them a phrase is the name of a kind, as a
            detector says it.
    """
    return Layout(file_name, scene.caption, scene.interactions(colours), scene.lone_entities(colours))


def export_scenes(
    folder: Path, scenes: Iterable[WorldScene], size: int = SIZE, colours: bool = True
) -> list[Layout]:
    """Write renders of scenes and their layouts; run again, it writes the same bytes.

    Args:
        folder: where to, made if need be.
        scenes: that are rendered one after the other.
        size: height and width of the renders in pixels.
        colours: as in `layout_of`.

    Returns:
        The layouts, in the scenes' order.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layouts = []
    for number, scene in enumerate(scenes):
        layout = layout_of(scene, f"{number:06}.png", colours)
        image = Image.fromarray(render(scene, size).image)
        write_aside(folder / layout.file_name, lambda aside, image=image: image.save(aside, format="PNG"))
        layouts.append(layout)
    write_layouts(folder / METADATA, layouts)
    return layouts
