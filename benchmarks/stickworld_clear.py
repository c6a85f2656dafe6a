"""What windows cost the stickworld DiT: trained for them or not, at its own size and at twice that.

    python benchmarks/stickworld_clear.py --scenes 100
    python benchmarks/stickworld_clear.py --scenes 100 --size 192 --sheet out/clear.png

docs/clear.md has the tables. Every row draws the same captions from the same noise; distances are to the
pictures of the teacher, which attends to everything. --layers names other layers than the packaged ones.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm.auto import tqdm

from interactdiff.clear import ClearAdapter, linearize
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.bootstrap import with_interval
from interactdiff.evaluation.captions import text_scores
from interactdiff.evaluation.images import feature_distance
from interactdiff.evaluation.sampling import PictureRequest, Sampling, draw_pictures, held_out_scenes
from interactdiff.evaluation.table import TEXT_SCORES
from interactdiff.evaluation.world import packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.models import model_info
from interactdiff.stickworld import model_path
from interactdiff.training.world_data import grid

MODEL = "stickworld-dit"
BATCH = 20


def pictures(
    scene_pipeline: ScenePipeline, requests: list[PictureRequest], seed: int, how: Sampling, title: str
) -> Tensor:
    """[N, 3, H, W] in [0, 1]."""
    firsts = tqdm(range(0, len(requests), BATCH), desc=title, unit="batch", leave=False)
    return torch.cat(
        [draw_pictures(requests[first : first + BATCH], scene_pipeline, seed, how) for first in firsts]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels; default: the model's own")
    parser.add_argument("--layers", type=Path, nargs="+", help="folders; default: the packaged ones")
    parser.add_argument("--sheet", type=Path, help="also write the first pictures of each row, a row each")
    args = parser.parse_args()
    quiet_libraries()
    scene_pipeline, detector = ScenePipeline.from_pretrained(MODEL, device="cpu"), packaged_detector()
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.scenes, args.seed)
    requests = [PictureRequest(n, scene.caption) for n, scene in enumerate(scenes)]
    size = args.size or scene_pipeline.size
    how = Sampling(args.steps, model_info(MODEL).guidance_scale, size)
    layers = [ClearAdapter.from_pretrained(f) for f in args.layers or [model_path(f"{MODEL}-clear")]]
    rows: dict[str, Any] = {"teacher": None, "window, untrained": ClearAdapter(layers[0].config).eval()}
    rows |= {f"distilled, {one.config}": one for one in layers}

    print(f"{args.scenes} scenes, {size} px, {args.steps} steps, {layers[0].config}")
    print(f"{'%':42}" + "".join(f"{name:>20}" for name in TEXT_SCORES.values()), end="")
    print(f"{'PSNR, dB':>10}{'distance':>10}")
    sheet, wanted = [], None
    for title, adapter in rows.items():
        attached = (
            nullcontext()
            if adapter is None
            else linearize(scene_pipeline.pipeline, weights=adapter, min_tokens=0)
        )
        with attached:
            drawn = pictures(scene_pipeline, requests, args.seed, how, title)
        small = F.interpolate(drawn, (detector.size, detector.size), mode="area")
        wanted = (drawn, small) if wanted is None else wanted
        sheet.append(drawn[:8])
        cells = []
        for score in text_scores(detector.detect(small), scenes).values():
            value, (low, high) = with_interval(score, len(scenes))
            cells.append(f"{100 * value:8.1f} [{100 * low:3.0f}, {100 * high:3.0f}]")
        print(f"{title:42}" + "".join(f"{cell:>20}" for cell in cells), end="")
        if adapter is None:
            print(f"{'':>10}{0:10.3f}", flush=True)
            continue
        psnr = peak_signal_noise_ratio(drawn, wanted[0], 1.0, reduction="elementwise_mean", dim=(1, 2, 3))
        distance = feature_distance(detector, small, wanted[1]).mean()
        print(f"{psnr:10.1f}{distance:10.3f}", flush=True)
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        grid(torch.cat(sheet) * 2 - 1, 8).save(args.sheet)


if __name__ == "__main__":
    main()
