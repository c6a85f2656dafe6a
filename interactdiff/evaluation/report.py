"""The scores of layouts: as a dictionary for JSON, in markdown, and kept so that runs can be compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from interactdiff.errors import DataError
from interactdiff.evaluation.bootstrap import (
    Difference,
    NamedScores,
    Scores,
    Share,
    differences,
    intervals,
    once,
    resampled,
)
from interactdiff.evaluation.hoi_matching import Outcomes
from interactdiff.evaluation.hoi_precision import SETTINGS, HoiPrecisions
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.table import markdown_block
from interactdiff.evaluation.vcoco import SCENARIOS, RolePrecisions
from interactdiff.files import write_aside

CEILING = "real"
ROWS = {
    CEILING: "real pictures",
    "base": "base, text only",
    "boxes_only": "adapter, boxes only",
    "adapter": "adapter",
}
SUBSETS = {"full": "Full", "rare": "Rare", "non_rare": "Non-rare"}
SETTING_TITLES = {"default": "Default", "known_object": "Known Object"}
ROLE_SCORES = {f"vcoco.scenario_{number}": f"V-COCO, scenario {number}" for number in (1, 2)}
SHARES = {
    "clip": "CLIP",
    "clip_local": "CLIP, local",
    "miou": "mean IoU",
    "miou_50": "IoU over 0.5",
    "relations": "relations (SR_R)",
}
PLAIN = {"fid": "FID", "kid": "KID x 1000", "ap50": "AP50, %"}
RESAMPLES = (100, 1000)  # least and most
RESAMPLING_WORK = 200_000_000  # detections times resamplings, about a minute on one core
_FORMAT = "interactdiff evaluation 1"


@dataclass
class RowScores:
    """What a row of the table is scored by.

    Attributes:
        outcomes: of each seed.
        shares: scores that are counts by picture.
        plain: scores of all pictures together, which have no interval.
        roles: as `outcomes`, of V-COCO's roles; none elsewhere.
    """

    outcomes: tuple[Outcomes, ...]
    shares: dict[str, Share] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    roles: tuple[Outcomes, ...] = ()

    def groups(self, protocols: Sequence[str], rare: tuple[int, ...] | None) -> list[Scores]:
        """Everything that can be resampled."""
        groups: list[Scores] = [*self.precisions(protocols, rare)]
        return [*groups, NamedScores(self.shares)] if self.shares else groups

    def precisions(
        self, protocols: Sequence[str], rare: tuple[int, ...] | None
    ) -> list[HoiPrecisions | RolePrecisions]:
        """Those that each seed has its own values of."""
        found: list[HoiPrecisions | RolePrecisions] = [HoiPrecisions(self.outcomes, tuple(protocols), rare)]
        return [*found, RolePrecisions(self.roles)] if self.roles else found


def layouts_digest(layouts: Sequence[Layout]) -> str:
    """A digest of which layouts there are, in which order."""
    rows = [
        (one.file_name, one.prompt, [*map(asdict, one.interactions)], [*map(asdict, one.entities)])
        for one in layouts
    ]
    text = json.dumps(rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resamples_for(detections: int) -> int:
    """How often pictures are drawn again: fewer times where there are many detections."""
    return int(np.clip(RESAMPLING_WORK // max(detections, 1), *RESAMPLES))


def build_report(
    rows: Mapping[str, RowScores],
    protocols: Sequence[str],
    rare: tuple[int, ...] | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """All scores with 95% intervals and shares of the ceiling.

    Args:
        rows: by name; that of real pictures is the ceiling.
        protocols: by which mAP is computed.
        rare: numbers of the rare classes, where it is known which are.
        about: what was evaluated, and how.

    Returns:
        {**about, "resamples", "rows": {row: {score: value}}, "intervals": {row: {score: [low, high]}},
        "by_seed": {row: {score: [value of each seed]}}, "share_of_ceiling": {row: {score: share}}}.
    """
    pictures = next(iter(rows.values())).outcomes[0].pictures
    resamples = resamples_for(max(len(o.cls) for row in rows.values() for o in row.outcomes))
    counts = resampled(pictures, resamples)
    report: dict[str, Any] = {**about, "resamples": resamples}
    report |= {"rows": {}, "intervals": {}, "by_seed": {}, "share_of_ceiling": {}}
    for name, row in rows.items():
        groups = row.groups(protocols, rare)
        report["rows"][name] = once(groups, pictures) | row.plain
        report["intervals"][name] = intervals(groups, counts)
        report["by_seed"][name] = {
            score: values[:, 0].tolist()
            for group in row.precisions(protocols, rare)
            for score, values in group.by_seed(np.ones((1, pictures))).items()
        }
    ceiling = report["rows"].get(CEILING)
    if ceiling is not None:
        for name, values in report["rows"].items():
            if name != CEILING:
                report["share_of_ceiling"][name] = {
                    score: value / ceiling[score]
                    for score, value in values.items()
                    if ceiling.get(score) and score not in ("fid", "kid")
                }
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """The scores in markdown: a table for each protocol, as papers have them, and what they are of."""
    rows, spread = report["rows"], report["intervals"]
    lines: list[str] = []
    for protocol in report["protocols"]:
        there = next(iter(rows.values()))
        columns = {
            name: f"{SETTING_TITLES[setting]} {title}"
            for setting in SETTINGS
            for subset, title in SUBSETS.items()
            if (name := f"{protocol}.{setting}.{subset}") in there
        }
        corner = f"mAP, {protocol}, %"
        lines += [*markdown_block(rows, spread, ROWS, columns, corner, shares=report["share_of_ceiling"]), ""]
    for titles, corner, percent in (
        (ROLE_SCORES, "role AP, %", True),
        (SHARES, "%", True),
        (PLAIN, "", False),
    ):
        columns = {n: title for n, title in titles.items() if any(n in row for row in rows.values())}
        if columns:
            of_ceiling = report["share_of_ceiling"] if titles is ROLE_SCORES else None
            lines += [*markdown_block(rows, spread, ROWS, columns, corner, percent, of_ceiling), ""]
    return "\n".join([*lines, *_described(report)])


def _described(report: Mapping[str, Any]) -> list[str]:
    seeds = f"seeds {', '.join(map(str, report['seeds']))}; " if report["seeds"] else ""
    lines = [
        f"{report['pictures']} layouts of {report['data']} ({report['split']}), {report['classes']}; "
        f"detector {report['detector']}; {seeds}95% intervals by {report['resamples']} resamplings "
        f"of pictures"
    ]
    if report["limit"] is not None:
        lines.append(f"limited to {report['limit']} layouts of {report['of']}, chosen to balance classes")
    if report.get("model") is not None:
        adapters = ", ".join(str(at) for at in report["adapters"].values()) or "no adapter"
        scale = report["guidance_scale"]
        guidance = "the pipeline's own guidance" if scale is None else f"guidance {scale:g}"
        lines.append(
            f"{report['model']} with {adapters}, {report['size']} px, {report['steps']} steps, "
            f"{guidance}, {report['dtype']} on {report['device']}"
            + (", drawn as the paper's script does" if report["paper"] else "")
        )
    if report.get("items_left_out"):
        lines.append(f"{report['items_left_out']} interactions and entities are more than the adapter takes")
    if CEILING not in report["rows"]:
        lines.append("no ceiling: there are no real pictures, or no detections in them")
    elif len(report["rows"]) > 1:
        lines.append("in round brackets: the share of what real pictures of the same size score, the ceiling")
    if (calibration := report.get("calibration")) is not None:
        lines.append(
            f"verbs at the true boxes of {calibration['pairs']} pairs in real pictures: right among the "
            f"verbs of the object in {100 * calibration['accuracy']:.1f}%, above a wrong one in "
            f"{100 * calibration['auc']:.1f}%"
        )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return [*lines, versions]


def outcomes_file(report_file: Path) -> Path:
    """What is kept beside a report, by a name that no weights have."""
    return report_file.with_name(f"{report_file.name.removesuffix('.json')}.outcomes.safetensors")


def save_report(file: Path, report: Mapping[str, Any], rows: Mapping[str, RowScores]) -> None:
    """Write a report as JSON, and beside it what became of each detection, by which runs are compared.

    Raises:
        OSError: they cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, row in rows.items():
        for kind, of_seeds in (("outcomes", row.outcomes), ("roles", row.roles)):
            for number, one in enumerate(of_seeds):
                for array in Outcomes.ARRAYS:
                    tensors[f"{name}/{kind}/{number}/{array}"] = np.ascontiguousarray(getattr(one, array))
        for score, share in row.shares.items():
            for part in ("hits", "total"):
                tensors[f"{name}/shares/{score}/{part}"] = np.asarray(getattr(share, part), dtype=float)
    metadata = {"format": _FORMAT}
    write_aside(outcomes_file(file), lambda aside: save_file(tensors, aside, metadata))
    text = json.dumps(report, indent=2) + "\n"
    write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def load_report(file: Path) -> tuple[dict[str, Any], dict[str, RowScores]]:
    """Read a report and what is kept beside it.

    Raises:
        DataError: one of them is missing, damaged, or something else.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"expected the JSON of evaluate --data at {file}, got {reason}") from None
    keys = ("rows", "pictures", "layouts_digest", "protocols", "detector", "rare", "roles")
    if not isinstance(report, dict) or any(key not in report for key in keys):
        raise DataError(f"expected the JSON of evaluate --data at {file}, got something else")
    beside, pictures = outcomes_file(file), report["pictures"]
    rows: dict[str, RowScores] = {}
    try:
        with safe_open(beside, "np") as opened:
            names = list(opened.keys())
            for name in report["rows"]:
                outcomes = _outcomes(
                    opened, f"{name}/outcomes/", pictures, report["matched_by"], report["class_count"]
                )
                scenarios = [one.name for one in SCENARIOS.values()]
                roles = _outcomes(opened, f"{name}/roles/", pictures, scenarios, len(report["roles"]))
                scores = {key.split("/")[2] for key in names if key.startswith(f"{name}/shares/")}
                shares = {
                    score: Share(
                        opened.get_tensor(f"{name}/shares/{score}/hits"),
                        opened.get_tensor(f"{name}/shares/{score}/total"),
                    )
                    for score in sorted(scores)
                }
                rows[name] = RowScores(outcomes, shares, roles=roles)
    except FileNotFoundError:
        raise DataError(f"expected {beside.name} beside {file}, got none") from None
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"expected a whole {beside.name} beside {file}, got {error}") from None
    return report, rows


def _outcomes(
    opened: Any, prefix: str, pictures: int, protocols: Sequence[str], classes: int
) -> tuple[Outcomes, ...]:
    """Those of each seed that a file has under a prefix."""
    keys = list(opened.keys())
    count = len({key.split("/")[2] for key in keys if key.startswith(prefix)})
    return tuple(
        Outcomes(
            tuple(protocols),
            pictures,
            classes,
            **{array: opened.get_tensor(f"{prefix}{number}/{array}") for array in Outcomes.ARRAYS},
        )
        for number in range(count)
    )


def compare_reports(first: Path, second: Path) -> dict[str, dict[str, Difference]]:
    """Differences of all scores that two runs have, by row: the second's minus the first's.

    Raises:
        DataError: they are not of the same pictures and detector, or have no row in common.
    """
    (a, rows_a), (b, rows_b) = load_report(first), load_report(second)
    if a["layouts_digest"] != b["layouts_digest"]:
        of = [f"{one['pictures']} of {one['data']} ({one['layouts_digest']})" for one in (a, b)]
        raise DataError(f"expected the same layouts in {first} and {second}, got {of[0]} and {of[1]}")
    for what in ("detector", "detector_digest", "classes"):
        if a.get(what) != b.get(what):
            got = f"{a.get(what)} and {b.get(what)}"
            raise DataError(f"expected the same {what} in {first} and {second}, got {got}")
    protocols = [name for name in a["protocols"] if name in b["protocols"]]
    common = [name for name in rows_a if name in rows_b]
    if not protocols or not common:
        what = "protocol" if common else "row"
        raise DataError(f"expected a {what} that both {first} and {second} have, got none")
    most = max(len(o.cls) for rows in (rows_a, rows_b) for row in rows.values() for o in row.outcomes)
    counts = resampled(a["pictures"], resamples_for(most))
    rare = None if a["rare"] is None else tuple(a["rare"])
    return {
        name: differences(
            rows_a[name].groups(protocols, rare), rows_b[name].groups(protocols, rare), a["pictures"], counts
        )
        for name in common
    }


def format_comparison(found: Mapping[str, Mapping[str, Difference]]) -> str:
    """Differences in markdown, those that are larger than chance marked.

    The row of real pictures is there if it differs, as where their size does, or if it is the only one.
    """
    lines = ["| row | score | difference, % | larger than chance |", "|---|---|---|---|"]
    for row, scores in found.items():
        if row == CEILING and len(found) > 1 and not any(one.value for one in scores.values()):
            continue
        for score, one in scores.items():
            low, high = (100 * end for end in one.interval)
            shown = f"{100 * one.value:+.2f} [{low:+.2f}, {high:+.2f}]"
            larger = "yes" if one.larger_than_chance else "no"
            lines.append(f"| {ROWS.get(row, row)} | {_title(score)} | {shown} | {larger} |")
    return "\n".join(lines)


def _title(score: str) -> str:
    """What tables call a score."""
    protocol, _, rest = score.partition(".")
    setting, _, subset = rest.partition(".")
    if subset not in SUBSETS:
        return (ROLE_SCORES | SHARES).get(score, score)
    return f"mAP, {protocol}, {SETTING_TITLES[setting]} {SUBSETS[subset]}"
