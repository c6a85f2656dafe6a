"""Pictures at training size: boxes follow every transform, and words follow the mirror."""

from pathlib import Path

import numpy as np
import pytest
from data_files import noise
from diffusers import training_utils
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from interactdiff.data.converters.base import PixelBoxes
from interactdiff.data.framing import Framing, aspect_buckets
from interactdiff.data.pictures import open_picture, picture_info
from interactdiff.data.words import names_side, speaks_of_lettering, swap_sides, triplet_caption
from interactdiff.errors import DataError
from interactdiff.scene_items import Entity, Interaction

REPEATABLE = settings(max_examples=60, deadline=None, derandomize=True)
COLOURS = ("#ff0000", "#0000ff")


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """First and last + 1 pixel that is nearer to the colour than to black."""
    near = (np.abs(np.asarray(image).astype(int) - np.array(colour)).max(-1)) < 128
    columns, rows = np.flatnonzero(near.any(0)), np.flatnonzero(near.any(1))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(columns) else None


@REPEATABLE
@given(
    width=st.integers(60, 220),
    height=st.integers(60, 220),
    corner=st.tuples(st.floats(0.0, 0.75), st.floats(0.0, 0.75)),
    sides=st.tuples(st.floats(0.15, 0.9), st.floats(0.15, 0.9)),
    orientation=st.integers(1, 8),
    square=st.booleans(),
    flipped=st.booleans(),
)
def test_a_painted_box_is_where_its_box_says(
    width: int,
    height: int,
    corner: tuple[float, float],
    sides: tuple[float, float],
    orientation: int,
    square: bool,
    flipped: bool,
) -> None:
    """Painted on the stored picture, turned by EXIF, cropped, resized, mirrored: to a pixel."""
    x0, y0 = round(corner[0] * width), round(corner[1] * height)
    x1, y1 = min(width, x0 + round(sides[0] * width)), min(height, y0 + round(sides[1] * height))
    assume(x1 - x0 > 8 and y1 - y0 > 8)
    stored = Image.new("RGB", (width, height))
    ImageDraw.Draw(stored).rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLOURS[0])
    exif = stored.getexif()
    exif[0x0112] = orientation
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        stored.save(path, exif=exif)
        info, shown = picture_info(path), open_picture(path)
        box = PixelBoxes(path, (width, height), "stored").shares(x0, y0, x1, y1)
    assert (info.width, info.height) == shown.size
    assert info.stored_size == (width, height)
    assert np.array_equal(np.asarray(shown), np.asarray(ImageOps.exif_transpose(stored)))
    item = Entity("box", box)  # type: ignore[arg-type]
    framing = Framing(resolution=96, multiple=16, square=square)
    placement = framing.place(*shown.size, [item], flipped)
    made = placement.apply(shown)
    assert made.size == placement.size[::-1] == framing.buckets[framing.bucket(*shown.size)][::-1]
    kept = framing.items(placement, [item])
    found = extent(made, (255, 0, 0))
    if not kept:
        assert square  # nothing is lost in a bucket unless the box is longer than it
        return
    assert found is not None
    expected = [edge * side for edge, side in zip(kept[0].box, (*made.size, *made.size), strict=True)]
    assert np.abs(np.subtract(found, expected)).max() <= 1


def test_a_bucket_keeps_what_a_square_crop_cuts_off() -> None:
    ride = Interaction("person", "riding", "bike", (0.0, 0.2, 0.2, 0.8), (0.05, 0.5, 0.3, 0.9))
    ball = Entity("ball", (0.4, 0.4, 0.6, 0.6))
    items = [ride, ball]
    square, buckets = (Framing(resolution=128, multiple=32, square=s) for s in (True, False))
    (kept,) = square.items(square.place(400, 150, items), items)
    assert kept.phrase == "ball"
    assert kept.box == pytest.approx((35 / 150, 0.4, 115 / 150, 0.6))
    placement = buckets.place(400, 150, items)
    assert placement.size == (96, 192)
    assert len(buckets.items(placement, items)) == 2
    assert placement.window == (0.0, 0.0, 300.0, 150.0)  # moved to the boxes, as far as the picture goes
    assert buckets.place(400, 150).window == (50.0, 0.0, 350.0, 150.0)
    said = triplet_caption(items)
    cropped = square.place(400, 150, items, flipped=True)
    assert said == "a person is riding a bike"
    assert cropped.prompt(said, items, square.items(cropped, items)) == ""
    assert cropped.prompt("the left one", items, square.items(cropped, items)) == "the right one"


def test_small_and_half_hidden_items_are_left_out() -> None:
    framing = Framing(resolution=64, multiple=64, square=True, min_box=0.01, min_visible=0.5)
    placement = framing.place(128, 64)  # the middle half
    boxes = [(0.1, 0.0, 0.39, 1.0), (0.1, 0.0, 0.41, 1.0), (0.4, 0.4, 0.44, 0.44), (0.0, 0.0, 0.2, 1.0)]
    kept = framing.items(placement, [Entity(str(n), box) for n, box in enumerate(boxes)])
    assert [one.phrase for one in kept] == ["1"]
    assert kept[0].box == pytest.approx((0.0, 0.0, 0.32, 1.0))


def test_buckets_are_those_of_diffusers() -> None:
    generate = getattr(training_utils, "generate_aspect_ratio_buckets", None)
    if generate is None:
        pytest.skip("this diffusers has no buckets")
    for resolution, multiple in ((512, 64), (512, 16), (768, 64), (1024, 32)):
        assert set(aspect_buckets(resolution, multiple)) == set(generate(resolution, multiple))
    framing = Framing(512, 64)
    sizes = sorted(aspect_buckets(512, 64))
    assert sizes == [(384, 704), (448, 576), (448, 640), (512, 512), (576, 448), (640, 448), (704, 384)]
    for width, height in ((640, 480), (480, 640), (800, 533), (612, 612), (1920, 1080)):
        nearest = training_utils.find_nearest_bucket(height, width, list(aspect_buckets(512, 64)))
        assert framing.buckets[framing.bucket(width, height)] == aspect_buckets(512, 64)[nearest]


@REPEATABLE
@given(st.integers(30, 3000), st.integers(30, 3000))
def test_pictures_are_not_enlarged_too_much(width: int, height: int) -> None:
    framing = Framing(512, 64)
    placement = framing.place(width, height)
    x0, y0, x1, y1 = placement.window
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    across, down = placement.size[1] / (x1 - x0), placement.size[0] / (y1 - y0)
    assert across == pytest.approx(down)
    if min(width, height) > 160 and max(width, height) < 2 * min(width, height):
        assert across <= 1.25 + 1e-9


def test_a_resolution_that_no_side_can_have_is_refused() -> None:
    with pytest.raises(DataError, match="expected a resolution that is a multiple of 64 pixels, got 500"):
        Framing(500, 64)


def test_the_mirror_swaps_sides_in_words() -> None:
    assert swap_sides("Left of the RIGHT door, leftover bright") == "Right of the LEFT door, leftover bright"
    assert names_side("to the Left")
    assert not names_side("leftover bright")
    assert speaks_of_lettering("a sign that says stop")
    assert not speaks_of_lettering("a texture")
    ride = Interaction("person on the left", "riding", "bike", (0.0, 0.1, 0.5, 1.0), (0.1, 0.5, 0.6, 1.0))
    mirrored = Framing(64, 64).place(64, 64, [ride], flipped=True).item(ride)
    assert mirrored.subject == "person on the right"
    assert mirrored.subject_box == (0.5, 0.1, 1.0, 1.0)


def test_pictures_of_every_kind_become_rgb(tmp_path: Path) -> None:
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    deep.save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "deep.png"))[..., 0].ravel(), np.arange(256))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    clear.quantize().save(tmp_path / "palette.gif", transparency=0)
    assert open_picture(tmp_path / "palette.gif").mode == "RGB"
    frames = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]
    frames[0].save(tmp_path / "two.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert open_picture(tmp_path / "two.webp").getpixel((4, 4)) == (255, 0, 0)
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="got one of floating-point numbers"):
        open_picture(tmp_path / "float.tif")
    with pytest.raises(DataError, match="expected a whole picture"):
        open_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # would call another program


def test_an_orientation_after_the_pixels_is_found_without_decoding() -> None:
    """PNGs may have it at their end."""
    import io

    file = io.BytesIO()
    image = noise(20, 10)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, format="PNG", exif=exif)
    data = file.getvalue()
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    assert moved.index(b"IDAT") < moved.index(b"eXIf")
    info = picture_info(moved)
    assert (info.width, info.height, info.orientation) == (10, 20, 6)
    assert open_picture(moved).size == (10, 20)
