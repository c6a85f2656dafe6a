"""One caption at high resolution, with full attention and within windows, side by side with their times.

    python benchmarks/high_resolution.py --out docs/high_resolution.png

Both begin with the same picture at 128 px, which is enlarged and drawn over three times, to 768 px.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from interactdiff import ClearAdapter, HighResolution, linearize
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.files import write_aside
from interactdiff.generation import ScenePipeline
from interactdiff.models import model_info
from interactdiff.pipeline_calls import call_arguments
from interactdiff.stickworld import model_path

MODEL = "stickworld-dit"
SIZE = 128  # pixels of the first picture
CAPTION = "a person in purple kicking a red ball on the beach"


def main() -> None:
    """Draw both and print their times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/high_resolution.png"))
    parser.add_argument("--caption", default=CAPTION)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=8, help="radius, with the base's own layers")
    parser.add_argument("--distilled", action="store_true", help="the packaged layers, of radius 3")
    parser.add_argument("--strength", type=float, default=0.25)
    parser.add_argument("--shift", type=float, default=1.0)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 2, 4, 6])
    args = parser.parse_args()
    quiet_libraries()
    pipe = ScenePipeline.from_pretrained(MODEL, device="cpu").pipeline
    arguments = call_arguments(pipe, args.caption, guidance_scale=model_info(MODEL).guidance_scale)
    enlarge = HighResolution(pipe, scales=args.scales, strength=args.strength, shift=args.shift, tile=None)
    pictures = []
    for title in ("full attention", "windows"):
        attached = nullcontext()
        if title == "windows":
            layers = ClearAdapter.from_pretrained(model_path(f"{MODEL}-clear")) if args.distilled else None
            window = layers.config.window if layers is not None else args.window
            attached = linearize(pipe, window, weights=layers)
        times: list[float] = []

        def begin(_: object, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        with attached:
            drawn = enlarge(height=SIZE, width=SIZE, seed=args.seed, before_stage=begin, **arguments)
        begin(None)
        took = zip(enlarge.stages(SIZE, SIZE), times[:-1], times[1:], strict=True)
        words = ", ".join(f"{stage.width} px {end - start:.1f} s" for stage, start, end in took)
        print(f"{title}: {words}", flush=True)
        pictures.append(drawn.images[-1])
    side = pictures[0].width
    sheet = Image.new("RGB", (2 * side + 16, side), "white")
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (n * (side + 16), 0))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, lambda aside: sheet.save(aside, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
