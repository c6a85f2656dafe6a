"""interactdiff evaluate --data and --compare: layouts of data sets, as papers score them."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.commands.arguments import UsageError, adapters_of, positive, whole
from interactdiff.files import why_unwritable, write_aside
from interactdiff.models import MODEL, default_adapter, model_info

if TYPE_CHECKING:
    from interactdiff.data.layouts import Layout
    from interactdiff.evaluation.layout_data import LayoutData
    from interactdiff.evaluation.layout_drawing import Ranks
    from interactdiff.evaluation.layout_run import Drawn

LAYOUT_STEPS = 50  # as published
ROWS = ("base", "boxes_only", "adapter")
FILE = "file:"


def add_layouts(parser: argparse.ArgumentParser, what: Any) -> None:
    """Add the flags.

    Args:
        parser: of `evaluate`.
        what: its group of which one is chosen.
    """
    what.add_argument("--data", metavar="DIR", help="on layouts of an image folder, or of HICO-DET (hico)")
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="two files of --json: which differences are chance",
    )
    layouts = parser.add_argument_group("layouts", "for --data; docs/evaluation.md")
    layouts.add_argument("--split", default="test", help="default: %(default)s")
    layouts.add_argument(
        "--classes", choices=("hico",), help="score an image folder by HICO-DET's 600 classes"
    )
    layouts.add_argument(
        "--pictures", nargs="+", type=Path, metavar="DIR", help="score pictures that something else drew"
    )
    layouts.add_argument("--rows", nargs="+", choices=ROWS, help="ways of drawing (default: all that can be)")
    layouts.add_argument(
        "--protocol",
        nargs="+",
        default=None,
        metavar="NAME",
        help="of mAP (default: exact fgahoi pvic qpic official)",
    )
    layouts.add_argument("--seeds", nargs="+", type=whole, metavar="N", help="of the noise (default: 1 2 3)")
    layouts.add_argument("--limit", type=positive, metavar="N", help="layouts, chosen to balance classes")
    layouts.add_argument("--paper", action="store_true", help="draw as InteractDiffusion's script does")
    layouts.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="pictures and detections (%(default)s)",
    )
    layouts.add_argument(
        "--sheet", type=Path, metavar="FILE", help="PNG of the best, median and worst pictures"
    )


def compare(args: argparse.Namespace) -> None:
    """Print which differences between two runs are larger than chance."""
    from interactdiff.evaluation.report import compare_reports, format_comparison

    print(format_comparison(compare_reports(*args.compare)))


def evaluate_data(args: argparse.Namespace) -> None:
    """Draw, detect, score, print and write."""
    from interactdiff.evaluation.hoi_protocols import DEFAULT_PROTOCOLS, chosen_protocols
    from interactdiff.evaluation.layout_data import drawn_pictures, open_data
    from interactdiff.evaluation.layout_drawing import PAPER_SEED, Ranks
    from interactdiff.evaluation.layout_run import LayoutRun, evaluate_layouts
    from interactdiff.evaluation.report import format_report, save_report

    _check_files(args)
    protocols = tuple(one.name for one in chosen_protocols(args.protocol or DEFAULT_PROTOCOLS))
    seeds = tuple(dict.fromkeys(args.seeds or ((PAPER_SEED,) if args.paper else (1, 2, 3))))
    data = open_data(args.data, args.split, args.classes)
    if args.limit is not None:
        data = data.limited(args.limit)
    ranks = Ranks.from_environment()
    drawn = _drawn(args, ranks) if args.model or args.adapter else None
    size = args.size or (drawn.pipeline.size if drawn is not None else None)
    folders: dict[str, Callable[[Layout], Path | None]] = {
        _row_name(folder): drawn_pictures(folder) for folder in args.pictures or []
    }
    if drawn is None and not folders and _is_file(args.detector):
        folders["detections"] = lambda layout: None
    detector, name, calibration = _detector(args, data, drawn, folders, seeds, size, ranks)
    run = LayoutRun(
        data=data,
        detector=detector,
        detector_name=name,
        protocols=protocols,
        out=args.out,
        size=size,
        seeds=seeds,
        batch_size=args.batch_size,
        paper=args.paper,
        limit=args.limit,
        calibration=calibration,
        progress=ranks.main,
    )
    evaluation = evaluate_layouts(run, ranks, drawn, folders)
    if evaluation is None:
        return
    print(format_report(evaluation.report))
    if args.json is not None:
        save_report(args.json, evaluation.report, evaluation.rows)
    if args.sheet is not None:
        from interactdiff.evaluation.sheet import evaluation_sheet

        sheet = evaluation_sheet(run, evaluation)
        write_aside(args.sheet, lambda aside: sheet.save(aside, format="PNG"))


def _check_files(args: argparse.Namespace) -> None:
    if args.sheet is not None:
        if args.sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet: expected a file name that ends in .png, got {str(args.sheet)!r}")
        if reason := why_unwritable(args.sheet):
            raise UsageError(f"--sheet: expected a file that can be written, got {args.sheet}: {reason}")
    if args.json is not None and args.json.suffix == ".safetensors":
        raise UsageError(f"--json: expected another ending than .safetensors, got {args.json}")
    if args.pictures and (args.model or args.adapter):
        raise UsageError("--pictures: expected no --model and no --adapter beside it, got one")


def _row_name(folder: Path) -> str:
    return folder.resolve().name


def _drawn(args: argparse.Namespace, ranks: "Ranks") -> "Drawn":
    """The model that draws, and the rows that it can draw."""
    from interactdiff.evaluation.layout_drawing import PAPER_GUIDANCE, PAPER_STEPS, Drawing
    from interactdiff.evaluation.layout_run import Drawn
    from interactdiff.evaluation.sampling import Sampling
    from interactdiff.generation import ScenePipeline
    from interactdiff.pipeline_loading import usable_device

    model = args.model or MODEL
    device = usable_device(args.device or "auto")
    name = f"{device.type}:{ranks.local}" if device.type == "cuda" and ranks.count > 1 else str(device)
    pipeline = ScenePipeline.from_pretrained(model, adapters_of(args) or default_adapter(model), name)
    pipeline.check_side("--size", args.size)
    guidance = args.guidance_scale if args.guidance_scale is not None else model_info(model).guidance_scale
    how = Sampling(args.steps, guidance, args.size)
    if args.paper:
        if ranks.count > 1:
            raise UsageError(
                f"--paper: expected one process, since noise runs on from one to the next, got {ranks.count}"
            )
        if not hasattr(pipeline.pipeline, "unet"):
            raise UsageError(f"--paper: expected a model with a U-Net, got {model}")
        from diffusers import PNDMScheduler

        pipeline.pipeline.scheduler = PNDMScheduler.from_config(
            pipeline.pipeline.scheduler.config, skip_prk_steps=True
        )
        how = Sampling(PAPER_STEPS, PAPER_GUIDANCE, args.size)
    can = ROWS if pipeline.adapter is not None else ROWS[:1]
    if missing := [row for row in args.rows or [] if row not in can]:
        raise UsageError(f"--rows: expected an adapter for {missing[0]}, got none for {model}")
    rows = tuple(row for row in can if args.rows is None or row in args.rows)
    return Drawn(pipeline, rows, Drawing(args.out, how, args.batch_size, args.paper))


def _is_file(detector: str | None) -> bool:
    return detector is not None and detector.startswith(FILE)


def _detector(
    args: argparse.Namespace,
    data: "LayoutData",
    drawn: "Drawn | None",
    folders: Mapping[str, Any],
    seeds: tuple[int, ...],
    size: int | None,
    ranks: "Ranks",
) -> tuple[Any, str, dict[str, Any] | None]:
    """The detector of each row and seed, its name, and how it does on real pictures."""
    if _is_file(args.detector):
        rows = list(drawn.rows) if drawn is not None else list(folders)
        return _file_detector(args.detector, rows, seeds if drawn is not None else (0,), size)
    from interactdiff.evaluation.world import load_detector, packaged_detector
    from interactdiff.evaluation.world_detector import StickworldDetector

    named = args.detector or "stickworld"
    if named == "stickworld":
        info = model_info(args.model or MODEL)
        detector = StickworldDetector(packaged_detector(info.detector))
    elif Path(named).is_dir():
        detector = StickworldDetector(load_detector(Path(named)), f"stickworld in {named}")
    else:
        raise UsageError(
            f"--detector: expected stickworld, a folder with a detector of stickworld, file:PATH or "
            f"two-stage:BOXES,VERBS, got {named!r}"
        )
    return (lambda row, seed: detector), detector.name, None


def _file_detector(
    named: str, rows: list[str], seeds: tuple[int, ...], size: int | None
) -> tuple[Any, str, None]:
    """Detections from files: one for each row and seed where the name has {row} and {seed}."""
    from interactdiff.evaluation.detection_files import DetectionFile, load_detections

    pattern = named.removeprefix(FILE)
    row = "adapter" if "adapter" in rows else rows[0]
    if "{row}" not in pattern and len(rows) > 1 and row != "adapter":
        raise UsageError(f"--detector: expected {{row}} in its name for {len(rows)} rows, got {pattern}")
    if "{seed}" not in pattern and len(seeds) > 1:
        raise UsageError(f"--detector: expected {{seed}} in its name for {len(seeds)} seeds, got {pattern}")
    loaded: dict[Path, DetectionFile] = {}

    def detector(of_row: str, seed: int) -> DetectionFile | None:
        if "{row}" not in pattern and of_row != row:
            return None
        path = Path(pattern.replace("{row}", of_row).replace("{seed}", str(seed)))
        if "{row}" in pattern and not path.exists():
            return None
        if path not in loaded:
            loaded[path] = load_detections(path, None if size is None else (size, size))
        return loaded[path]

    return detector, named, None
