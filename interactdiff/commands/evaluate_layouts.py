"""interactdiff evaluate --data and --compare: layouts of data sets, as papers score them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.commands.arguments import (
    UsageError,
    adapters_of,
    add_boxes,
    add_columns,
    columns_of,
    positive,
    whole,
)
from interactdiff.files import why_unwritable, write_aside
from interactdiff.models import MODEL, default_adapter, model_info

if TYPE_CHECKING:
    from interactdiff.evaluation.layout import Layout
    from interactdiff.evaluation.layout_data import LayoutData
    from interactdiff.evaluation.layout_drawing import Ranks
    from interactdiff.evaluation.layout_run import Drawn

LAYOUT_STEPS = 50  # as published
ROWS = ("base", "boxes_only", "adapter")
FILE, TWO_STAGE = "file:", "two-stage:"
MEASURES = {"fid": None, "kid": None, "clip": "clip_model", "miou": "box_model", "ap50": "box_model"}
MEASURES |= {"relations": "vlm_model"}  # further scores, and the flag of the model that each needs


def add_layouts(parser: argparse.ArgumentParser, what: Any) -> None:
    """Add the flags.

    Args:
        parser: of `evaluate`.
        what: its group of which one is chosen.
    """
    what.add_argument(
        "--data",
        metavar="PATH",
        help="on layouts of any data that `data check` takes, or of HICO-DET (hico)",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="two files of --json: which differences are chance",
    )
    layouts = parser.add_argument_group("layouts", "for --data; docs/evaluation.md")
    layouts.add_argument("--split", help="default: test, or the only one")
    add_boxes(layouts)
    add_columns(layouts)
    layouts.add_argument("--classes", choices=("hico",), help="score other data by HICO-DET's 600 classes")
    layouts.add_argument(
        "--pictures", nargs="+", type=Path, metavar="DIR", help="score pictures that something else drew"
    )
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
        help="pictures and detections (default: evaluation)",
    )
    layouts.add_argument(
        "--vcoco",
        type=Path,
        metavar="DIR",
        help="role AP by these annotations, of data converted from V-COCO",
    )
    layouts.add_argument("--scores", nargs="+", choices=MEASURES, default=[], help="further scores")
    layouts.add_argument("--box-model", metavar="PATH_OR_ID", help="of transformers, for miou and ap50")
    layouts.add_argument("--clip-model", metavar="PATH_OR_ID", help="likewise, for clip")
    layouts.add_argument("--vlm-model", metavar="PATH_OR_ID", help="likewise, for relations")
    layouts.add_argument(
        "--sheet", type=Path, metavar="FILE", help="PNG of the best, median and worst pictures"
    )


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Print which differences between two runs are larger than chance.

    Returns:
        {"first", "second", "rows": {row: {score: {"difference", "interval", "larger_than_chance"}}}}.
    """
    from interactdiff.evaluation.report import compare_reports, format_comparison

    found = compare_reports(first, second)
    print(format_comparison(found))
    rows = {
        row: {
            score: {
                "difference": one.value,
                "interval": list(one.interval),
                "larger_than_chance": one.larger_than_chance,
            }
            for score, one in scores.items()
        }
        for row, scores in found.items()
    }
    return {"first": str(first), "second": str(second), "rows": rows}


def evaluate_data(args: argparse.Namespace) -> None:
    """Draw, detect, score, print and write."""
    from interactdiff.evaluation.hoi_protocols import DEFAULT_PROTOCOLS, chosen_protocols
    from interactdiff.evaluation.layout_data import drawn_pictures, open_data
    from interactdiff.evaluation.layout_drawing import PAPER_SEED, Ranks
    from interactdiff.evaluation.layout_run import LayoutRun, evaluate_layouts
    from interactdiff.evaluation.report import format_report, save_report
    from interactdiff.evaluation.vcoco import RoleTruth

    _check_files(args)
    protocols = tuple(one.name for one in chosen_protocols(args.protocol or DEFAULT_PROTOCOLS))
    seeds = tuple(dict.fromkeys(args.seeds or ((PAPER_SEED,) if args.paper else (1, 2, 3))))
    data = open_data(args.data, args.split, args.classes, args.boxes, columns_of(args))
    if args.limit is not None:
        data = data.limited(args.limit)
    roles = None
    if args.vcoco is not None:
        roles = RoleTruth.read(args.vcoco, data.split)
        roles.check(data.layouts)
    ranks = Ranks.from_environment()
    drawn = _drawn(args, ranks) if args.model or args.adapter else None
    size = args.size or (drawn.pipeline.size if drawn is not None else None)
    folders: dict[str, Callable[[Layout], Path | None]] = {
        name: drawn_pictures(folder) for name, folder in _named(args.pictures or []).items()
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
        measures=_measures(args, data, size, ranks),
        roles=roles,
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
    from interactdiff.evaluation.report import outcomes_file

    if args.sheet is not None:
        if args.sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet: expected a file name that ends in .png, got {str(args.sheet)!r}")
        if reason := why_unwritable(args.sheet):
            raise UsageError(f"--sheet: expected a file that can be written, got {args.sheet}: {reason}")
    if args.json is not None:
        if args.json.suffix == ".safetensors":
            raise UsageError(f"--json: expected another ending than .safetensors, got {args.json}")
        if reason := why_unwritable(beside := outcomes_file(args.json)):
            raise UsageError(f"--json: expected that {beside} can be written too, got {reason}")
    for name in args.scores:
        needed = MEASURES[name]
        if needed is not None and getattr(args, needed) is None:
            raise UsageError(f"--scores {name}: expected --{needed.replace('_', '-')} beside it, got none")
    for needed in filter(None, MEASURES.values()):
        scores = [name for name in MEASURES if MEASURES[name] == needed]
        if getattr(args, needed) is not None and not set(scores) & set(args.scores):
            flag, wanted = needed.replace("_", "-"), " or ".join(scores)
            raise UsageError(f"--{flag}: expected --scores {wanted} beside it, got none")
    if args.pictures and (args.model or args.adapter):
        raise UsageError("--pictures: expected no --model and no --adapter beside it, got one")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders of pictures by the names of their rows."""
    from interactdiff.evaluation.report import CEILING

    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name == CEILING or name in named:
            got = f"{named.get(name, 'the row of real pictures')} and {folder}"
            raise UsageError(f"--pictures: expected folders of different names, got {got}")
        named[name] = folder
    return named


def _drawn(args: argparse.Namespace, ranks: "Ranks") -> "Drawn":
    """The model that draws, and the rows that it can draw."""
    from interactdiff.evaluation.layout_drawing import PAPER_GUIDANCE, PAPER_STEPS, Drawing
    from interactdiff.evaluation.layout_run import Drawn
    from interactdiff.evaluation.sampling import Sampling
    from interactdiff.evaluation.table import chosen_rows
    from interactdiff.generation import ScenePipeline

    model = args.model or MODEL
    given = adapters_of(args) or default_adapter(model)
    pipeline = ScenePipeline.from_pretrained(model, given, str(_device(args, ranks)))
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
    wanted = chosen_rows(ROWS, args.rows or ())
    if missing := [row for row in wanted if row not in can and args.rows]:
        raise UsageError(f"--rows: expected an adapter for {missing[0]}, got none for {model}")
    rows = tuple(row for row in can if row in wanted)
    return Drawn(pipeline, rows, Drawing(args.out, how, args.batch_size, args.paper))


def _device(args: argparse.Namespace, ranks: "Ranks") -> Any:
    """The torch device of this process."""
    from interactdiff.pipeline_loading import usable_device

    device = usable_device(args.device or "auto")
    return usable_device(f"cuda:{ranks.local}") if device.type == "cuda" and ranks.count > 1 else device


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
        found = packaged_detector()
    elif Path(named).is_dir():
        found = load_detector(Path(named))
    elif named.startswith(TWO_STAGE):
        return _two_stage(args, named, data, size, ranks)
    else:
        raise UsageError(
            f"--detector: expected stickworld, a folder with a detector of stickworld, file:PATH or "
            f"two-stage:BOXES,VERBS, got {named!r}"
        )
    name = named if named == "stickworld" else f"stickworld in {named}"
    detector = StickworldDetector(found.to(_device(args, ranks)), name)
    return (lambda row, seed: detector), name, None


def _two_stage(
    args: argparse.Namespace, named: str, data: "LayoutData", size: int | None, ranks: "Ranks"
) -> tuple[Any, str, dict[str, Any]]:
    """Boxes and verbs by models of transformers, calibrated on real pictures."""
    from interactdiff.evaluation.calibration import calibrate
    from interactdiff.evaluation.model_loading import load_box_detector, load_verb_scorer
    from interactdiff.evaluation.two_stage import TwoStageDetector

    boxes, comma, verbs = named.removeprefix(TWO_STAGE).partition(",")
    if not (boxes and comma and verbs):
        raise UsageError(f"--detector: expected two-stage:BOXES,VERBS, got {named!r}")
    device = _device(args, ranks)
    box_detector, verb_scorer = load_box_detector(boxes, device), load_verb_scorer(verbs, device)
    calibration = calibrate(verb_scorer, data, size)
    detector = TwoStageDetector(
        box_detector, verb_scorer, data.table, scale=(calibration["scale"][0], calibration["scale"][1])
    )
    return (lambda row, seed: detector), detector.name, calibration


def _measures(
    args: argparse.Namespace, data: "LayoutData", size: int | None, ranks: "Ranks"
) -> tuple[Any, ...]:
    """Further scores, with the models that they need."""
    from interactdiff.evaluation import measures
    from interactdiff.evaluation import model_loading as models

    if not args.scores or not ranks.main:
        return ()
    device, made = _device(args, ranks), []
    if wanted := {name for name in args.scores if name in ("fid", "kid")}:
        from interactdiff.evaluation.quality import inception_features

        made.append(measures.distances(wanted, data, size, inception_features(device)))
    if "clip" in args.scores:
        made.append(measures.clip(models.load_contrastive(args.clip_model, device)))
    if wanted := {name for name in args.scores if name in ("miou", "ap50")}:
        made.append(measures.boxes(wanted, models.load_box_detector(args.box_model, device)))
    if "relations" in args.scores:
        made.append(measures.relations(models.load_vision_language(args.vlm_model, device).answer))
    return tuple(made)


def _file_detector(
    named: str, rows: list[str], seeds: tuple[int, ...], size: int | None
) -> tuple[Any, str, None]:
    """Detections from files: one for each row and seed where the name has {row} and {seed}."""
    from interactdiff.errors import DataError
    from interactdiff.evaluation.detection_files import DetectionFile, load_detections

    pattern = named.removeprefix(FILE)
    row = "adapter" if "adapter" in rows else rows[0]
    if "{row}" not in pattern and len(rows) > 1 and row != "adapter":
        raise UsageError(f"--detector: expected {{row}} in its name for {len(rows)} rows, got {pattern}")
    if "{seed}" not in pattern and len(seeds) > 1:
        raise UsageError(f"--detector: expected {{seed}} in its name for {len(seeds)} seeds, got {pattern}")
    loaded: dict[Path, DetectionFile] = {}

    def path_of(of_row: str, seed: int) -> Path:
        return Path(pattern.replace("{row}", of_row).replace("{seed}", str(seed)))

    def detector(of_row: str, seed: int) -> DetectionFile | None:
        if "{row}" not in pattern and of_row != row:
            return None
        path = path_of(of_row, seed)
        if "{row}" in pattern and not path.exists():
            others = (path_of(of_row, one) for one in seeds if of_row in rows)
            if (other := next((one for one in others if one.exists()), None)) is not None:
                raise DataError(f"expected detections of every seed, got {other} but no {path}")
            return None
        if path not in loaded:
            loaded[path] = load_detections(path, None if size is None else (size, size))
        return loaded[path]

    return detector, named, None
