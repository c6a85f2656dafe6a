"""Draws layouts to files: resumable, shared out over processes, the same pictures however many there are.

A picture's noise is seeded by the run's seed and its file name. A process takes whole batches, so that what
is drawn together does not depend on how many processes there are: what a batch holds changes the last bits.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff.errors import DataError
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.sampling import Sampling, draw_batch
from interactdiff.files import write_aside
from interactdiff.fingerprints import weights_digest
from interactdiff.generation import ScenePipeline
from interactdiff.scene_items import Entity, Interaction
from interactdiff.stickworld.captions import article

RUN = "run.json"
PAPER_NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality"
)
PAPER_SEED, PAPER_STEPS, PAPER_GUIDANCE, PAPER_ITEMS, PAPER_QUALITY = 489, 50, 7.5, 30, 75


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        index: its number.
        count: how many there are.
        local: its number on this machine, and that of its GPU.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As `accelerate launch` or torchrun started it; alone without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # The slowest process may be hours behind the first one, which waits for it.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes, state.local_process_index)

    @property
    def main(self) -> bool:
        """Whether it is the one that scores and writes."""
        return self.index == 0

    def wait(self) -> None:
        """Wait for all of them."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


@dataclass(frozen=True)
class Drawing:
    """How layouts are drawn, and where to.

    Attributes:
        folder: for pictures, DIR/ROW/seed-N/NAME.
        how: steps, guidance and size.
        batch_size: pictures at a time.
        paper: as the paper's script does it: one picture at a time, noise that runs on from one to the next,
            a negative prompt, JPEG.
    """

    folder: Path
    how: Sampling
    batch_size: int
    paper: bool = False

    def picture_path(self, row: str, seed: int, layout: Layout) -> Path:
        """Where a layout's picture is."""
        return self.folder / row / f"seed-{seed}" / f"{layout.stem}{'.jpg' if self.paper else '.png'}"


def noise_seed(seed: int, file_name: str) -> int:
    """The seed of a picture's noise: a function of the run's seed and of the file name alone."""
    digest = hashlib.sha256(f"{seed} {file_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def row_prompt(row: str, layout: Layout) -> str:
    """What a picture of a row is prompted with: its caption, or for boxes alone one that names no action."""
    if row != "boxes_only":
        return layout.prompt
    clauses = [f"{article(one.subject)} and {article(one.object)}" for one in layout.interactions]
    return ", ".join([*clauses, *(article(one.phrase) for one in layout.entities)])


def row_items(row: str, layout: Layout, most: int) -> tuple[Interaction | Entity, ...]:
    """What a picture of a row is controlled by: nothing, boxes alone, or all; the first `most` of them."""
    if row == "base":
        return ()
    interactions = layout.interactions
    if row == "boxes_only":
        interactions = tuple(replace(one, action=None) for one in interactions)
    return (*interactions, *layout.entities)[:most]


def most_items(scene_pipeline: ScenePipeline, paper: bool = False) -> int:
    """How many interactions and entities a picture can have."""
    if scene_pipeline.handle is None or "interaction" not in scene_pipeline.adapters:
        return 0
    config: Any = scene_pipeline.handle["interaction"].adapter.config
    return min(config.max_interactions, PAPER_ITEMS) if paper else config.max_interactions


def weights_of(scene_pipeline: ScenePipeline) -> dict[str, str]:
    """Digests of what pictures are drawn by, "model" and each adapter, whatever their names or paths."""
    parts = scene_pipeline.pipeline.components
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    weights = sorted((name, weights_digest(module)) for name, module in modules.items())
    scheduler = sorted((k, v) for k, v in parts["scheduler"].config.items() if not k.startswith("_"))
    digests = {"model": hashlib.sha256(repr((weights, scheduler)).encode()).hexdigest()[:16]}
    if (handle := scene_pipeline.handle) is not None:
        digests |= {name: weights_digest(handle[name].adapter) for name in handle}
    return digests


def check_run(folder: Path, settings: dict[str, Any], ranks: Ranks) -> None:
    """Refuse a folder whose pictures were drawn otherwise; note how these are.

    Raises:
        DataError: they were, or the note is damaged.
        OSError: the folder cannot be written to.
    """
    note = folder / RUN
    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"expected JSON in {note}, got {error}") from None
        for name, value in settings.items():
            if not isinstance(before, dict) or before.get(name) != value:
                was = before.get(name) if isinstance(before, dict) else before
                raise DataError(
                    f"expected pictures drawn with {name} {value} in {folder}, got ones with {was}: give "
                    f"another --out"
                )
    elif ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2) + "\n"
        write_aside(note, lambda aside: aside.write_text(text, encoding="utf-8"))
    ranks.wait()


def batches(count: int, size: int, ranks: Ranks) -> Iterator[tuple[int, range]]:
    """This process's batches: the number of each, and the numbers of what is in it."""
    for number, first in enumerate(range(0, count, size)):
        if number % ranks.count == ranks.index:
            yield number, range(first, min(first + size, count))


def draw_layouts(
    layouts: Sequence[Layout],
    row: str,
    seed: int,
    scene_pipeline: ScenePipeline,
    drawing: Drawing,
    ranks: Ranks,
    progress: bool = False,
) -> None:
    """Draw this process's share of the pictures of a row, but for those that are there.

    Args:
        layouts: all of them.
        row: "base", "boxes_only" or "adapter".
        seed: of the noise.
        scene_pipeline: with adapters or without.
        drawing: how and where to.
        ranks: this process among the others.
        progress: show a progress bar.
    """
    if drawing.paper:
        _draw_as_the_paper(layouts, row, seed, scene_pipeline, drawing, progress)
        return
    most = most_items(scene_pipeline)
    todo = list(batches(len(layouts), drawing.batch_size, ranks))
    scene_pipeline.pipeline.set_progress_bar_config(disable=True)
    for _, numbers in tqdm(todo, unit="batch", desc=f"{row}, seed {seed}", disable=not progress):
        batch = [layouts[number] for number in numbers]
        paths = [drawing.picture_path(row, seed, layout) for layout in batch]
        if all(path.exists() for path in paths):
            continue
        seeds = [noise_seed(seed, layout.file_name) for layout in batch]
        images = draw_batch(
            scene_pipeline,
            [row_prompt(row, layout) for layout in batch],
            [row_items(row, layout, most) for layout in batch],
            drawing.how,
            generator=[torch.Generator("cpu").manual_seed(one) for one in seeds],
        )
        for path, image in zip(paths, images, strict=True):
            if not path.exists():
                _save(image, path)


def _draw_as_the_paper(
    layouts: Sequence[Layout],
    row: str,
    seed: int,
    scene_pipeline: ScenePipeline,
    drawing: Drawing,
    progress: bool,
) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    pipeline = scene_pipeline.pipeline
    unet, side = scene_pipeline.denoiser, drawing.how.size or scene_pipeline.size
    shape = (1, unet.config.in_channels, *(2 * (side // pipeline.vae_scale_factor,)))
    generator = torch.Generator("cpu").manual_seed(seed)  # once: a picture's noise depends on those before it
    pipeline.set_progress_bar_config(disable=True)
    for layout in tqdm(layouts, unit="picture", desc=f"{row}, seed {seed}", disable=not progress):
        latents = randn_tensor(shape, generator=generator, device=unet.device, dtype=unet.dtype)
        path = drawing.picture_path(row, seed, layout)
        if not path.exists():
            image = draw_batch(
                scene_pipeline,
                [row_prompt(row, layout)],
                [row_items(row, layout, most_items(scene_pipeline, paper=True))],
                drawing.how,
                negative_prompt=PAPER_NEGATIVE_PROMPT,
                latents=latents,
            )
            _save(image[0], path)


def _save(image: Tensor, path: Path) -> None:
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"format": "PNG"}
    if path.suffix == ".jpg":
        options = {"format": "JPEG", "quality": PAPER_QUALITY}
    write_aside(path, lambda aside: Image.fromarray(pixels).save(aside, **options))
