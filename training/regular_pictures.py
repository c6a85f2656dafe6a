"""The regular pictures of a subject, of its class and much like it (arXiv 2312.13691, section 3.3).

The base draws them itself, by the reference's caption, while it sees the reference. What the tuned base is to
learn is what is left between them and the reference.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from interactdiff import attach
from interactdiff.errors import RecipeError
from interactdiff.files import remove_stale_asides, write_aside
from interactdiff.fingerprints import weights_digest
from interactdiff.picture_reading import UnreadablePicture, read_picture
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject
from interactdiff.training.subject_tuning_config import SubjectTuningConfig


def regular_pictures(
    pipe: Any, adapter: SubjectAdapter, subject: Subject, config: SubjectTuningConfig
) -> list[Image.Image]:
    """The regular pictures; those that are in the output folder are not drawn again.

    They lie in a folder whose name changes with all that decides what they show.

    Args:
        pipe: the base, as it was.
        adapter: with an encoder or without.
        subject: with its mask.
        config: of the run.

    Raises:
        RecipeError: one of them cannot be read any more.
    """
    folder = Path(config.output_dir) / f"regular-{_digest(pipe, adapter, subject, config)}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(config.regular.count)]
    if missing := [number for number, path in enumerate(paths) if not path.exists()]:
        print(f"interactdiff: drawing {len(missing)} regular pictures into {folder}", file=sys.stderr)
        remove_stale_asides(folder)
        _draw(pipe, adapter, subject, config, {number: paths[number] for number in missing})
    return [_read(path, config.resolution) for path in paths]


def _digest(pipe: Any, adapter: SubjectAdapter, subject: Subject, config: SubjectTuningConfig) -> str:
    """Of all that decides what a picture shows but its number; the whole count does not."""
    drawn_by = config.regular.model_dump(exclude={"count"}) | {
        name: getattr(config, name) for name in ("caption", "encoder_weight", "resolution", "seed")
    }
    if adapter.close_up:
        drawn_by["close_up"] = True
    weights = [weights_digest(part) for part in (denoiser_of(pipe), pipe.vae, adapter)]
    made_of = hashlib.sha256(json.dumps([drawn_by, weights], sort_keys=True).encode())
    for picture in (subject.image, subject.mask):
        made_of.update(f"{picture.mode} {picture.size}".encode() + picture.data)
    return made_of.hexdigest()[:8]


@torch.no_grad()
def _draw(
    pipe: Any,
    adapter: SubjectAdapter,
    subject: Subject,
    config: SubjectTuningConfig,
    paths: dict[int, Path],
) -> None:
    """Draw pictures by their numbers."""
    how = config.regular
    arguments = call_arguments(pipe, config.caption, guidance_scale=how.guidance_scale)
    with attach(pipe, adapter) as handle:
        handle["subject"].configure(
            masked=False,
            guidance=0.0,
            reference_weight=how.reference_weight,
            encoder_weight=config.encoder_weight,
        )
        handle.set_scene([subject])
        for number, path in paths.items():
            image: Image.Image = repeatable_call(
                pipe,
                **arguments,
                height=config.resolution,
                width=config.resolution,
                num_inference_steps=how.steps,
                generator=torch.Generator().manual_seed(config.seed * 100_003 + number),
            ).images[0]
            write_aside(path, image.save)


def _read(path: Path, side: int) -> Image.Image:
    try:
        picture = read_picture(path).convert("RGB")
    except UnreadablePicture as error:
        raise RecipeError(f"{path}: {error}: delete it, and it is drawn again") from None
    if picture.size != (side, side):
        size = " x ".join(map(str, picture.size))
        raise RecipeError(f"{path}: expected {side} x {side} pixels, got {size}: delete it")
    return picture
