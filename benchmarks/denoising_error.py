"""Where a base loses persons and objects: the error of the picture it predicts, by level of noise.

python benchmarks/denoising_error.py interactdiff/stickworld/models/stickworld-dit

Latents x of held-out renders get noise: a x + s n, with s / a from 0.1 to 3 (--trained takes scenes that
the recipes train on: what is less there was learned by heart). The table has the squared error
of the x that the denoiser predicts with the scene's caption, as a share of its variance: where persons and
objects are, and in the background, which shows through much more noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from interactdiff.commands.arguments import quiet_libraries
from interactdiff.concept.denoising import TRAIN_STEPS, Denoising, Prompt
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import Rendering, render
from interactdiff.stickworld.world import HELD_OUT

RATIOS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 3.0)  # s / a
BATCH = 20


def foreground(drawn: list[Rendering], side: int) -> Tensor:
    """[B, side, side] bool: cells of the latents' grid of which persons and objects cover more than half."""
    masks = [torch.from_numpy(sum(thing.mask for thing in one.things) > 0) for one in drawn]
    return F.adaptive_avg_pool2d(torch.stack(masks).float(), side) > 0.5


def nearest_times(denoising: Denoising) -> list[int]:
    """The timesteps whose s / a is nearest to each of `RATIOS`."""
    times = torch.arange(1, TRAIN_STEPS)
    ones, zeros = torch.ones(len(times), 1, 1, 1), torch.zeros(len(times), 1, 1, 1)
    ratio = (denoising.noisy(zeros, ones, times) / denoising.noisy(ones, zeros, times)).flatten()
    return [int(times[(ratio - one).abs().argmin()]) for one in RATIOS]


def squared_error(
    denoising: Denoising, latents: Tensor, noise: Tensor, times: Tensor, prompt: Prompt
) -> Tensor:
    """[B, C, H, W]: of the x that a prediction implies; of v and of a flow its error is s times theirs."""
    share = denoising.noisy(torch.zeros_like(latents), torch.ones_like(latents), times)
    predicted = denoising.predict(denoising.noisy(latents, noise, times), times, prompt)
    return (share * (predicted - denoising.target(latents, noise, times))).square()


@torch.no_grad()
def errors(denoising: Denoising, seeds: Sequence[int], size: int) -> dict[str, list[float]]:
    """Of persons and objects and of the background of scenes, for each of `RATIOS`."""
    times = nearest_times(denoising)
    regions = ("persons and objects", "background")
    squares = {region: torch.zeros(len(times)) for region in regions}
    cells: dict[str, list[Tensor]] = {region: [] for region in regions}  # [N, C] each
    for first in range(0, len(seeds), BATCH):
        scenes = [sample_scene(seed) for seed in seeds[first : first + BATCH]]
        drawn = [render(scene, size) for scene in scenes]
        latents = torch.cat([denoising.latents(Image.fromarray(one.image)) for one in drawn])
        prompt = denoising.encode([scene.caption for scene in scenes], (size, size))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(first))
        shown = foreground(drawn, latents.shape[-1])
        chosen = dict(zip(regions, (shown, ~shown), strict=True))
        for region, where in chosen.items():
            cells[region].append(latents.movedim(1, -1)[where])
        for n, time in enumerate(times):
            steps = torch.full((len(latents),), time)
            error = squared_error(denoising, latents, noise, steps, prompt)
            for region, where in chosen.items():
                squares[region][n] += error.movedim(1, -1)[where].sum()
    spread = {region: (whole := torch.cat(cells[region])).var(0).sum() * len(whole) for region in regions}
    return {region: (squares[region] / spread[region]).tolist() for region in regions}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="pipelines that predict v or a flow")
    parser.add_argument("--scenes", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--trained", action="store_true", help="scenes of training, not held-out ones")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    args = parser.parse_args()
    quiet_libraries()
    start = 0 if args.trained else HELD_OUT
    print(f"| error of x / variance at s / a of | {' | '.join(map(str, RATIOS))} |")
    print("|---|" + "---|" * len(RATIOS))
    for folder in args.folders:
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        kind = pipeline.scheduler.config.get("prediction_type", "flow_prediction")
        if kind not in ("v_prediction", "flow_prediction"):
            raise SystemExit(f"expected a pipeline that predicts v or a flow, got {kind} in {folder}")
        for region, missed in errors(
            Denoising.of(pipeline), range(start, start + args.scenes), args.size
        ).items():
            print(f"| {folder.name}, {region} | {' | '.join(f'{one:.3f}' for one in missed)} |")


if __name__ == "__main__":
    main()
