"""Tables of scores, as text and in markdown: a row for each way of drawing, a column for each score."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from interactdiff.errors import SceneError
from interactdiff.scene_checks import shown

Values = Mapping[str, Mapping[str, float]]  # by row and score

ROWS = {
    "real": "real renders",
    "base": "base, text only",
    "boxes_only": "adapter, boxes only",
    "adapter": "adapter",
    "adapter_fast": "adapter, fast",
    "adapter_clear": "adapter+clear",
}
SECONDS = "seconds"
SCORES = {"hoi_map": "HOI mAP", "box_acc": "boxes", "action_acc": "actions", "colour_acc": "colours"}
TEXT_SCORES = {
    "object_acc": "objects",
    "action_acc": "actions",
    "colour_acc": "colours",
    "appearance_acc": "appearance",
}


def chosen_rows(known: Iterable[str], given: Sequence[str]) -> list[str]:
    """The rows of a table that are wanted, in its order; all of them where none is given.

    Raises:
        SceneError: there is no such row.
    """
    rows = list(known)
    if wrong := [row for row in given if row not in rows]:
        raise SceneError(f"expected rows of {', '.join(rows)}, got {shown(wrong[0])}")
    return [row for row in rows if row in given] if given else rows


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:5.1f} [{100 * interval[0]:3.0f}, {100 * interval[1]:3.0f}]"


def text_block(
    values: Values,
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    rows: Mapping[str, str],
    columns: Mapping[str, str],
    corner: str = "%",
) -> list[str]:
    """Scores in percent, each with its interval where it has one.

    Args:
        values: by row and score.
        intervals: likewise, both ends.
        rows: titles; a row without one is called by its name.
        columns: titles of the scores that are shown, those that any row has; one that a row lacks is a dash.
        corner: what stands above the rows.
    """
    columns = {
        score: title for score, title in columns.items() if any(score in row for row in values.values())
    }
    lines = [f"{corner:20}" + "".join(f"{title:>19}" for title in columns.values())]
    for row, scores in values.items():
        ends = intervals.get(row, {})
        cells = [
            "-"
            if name not in scores
            else _cell(scores[name], ends[name])
            if name in ends
            else f"{100 * scores[name]:.1f}"
            for name in columns
        ]
        lines.append(f"{rows.get(row, row):20}" + "".join(f"{cell:>19}" for cell in cells))
    return lines


def markdown_block(
    values: Values,
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    rows: Mapping[str, str],
    columns: Mapping[str, str],
    corner: str,
    percent: bool = True,
    shares: Values | None = None,
) -> list[str]:
    """A table in markdown, with two decimals as papers have them.

    Args:
        values: by row and score; a score that a row lacks is a dash.
        intervals: likewise, both ends.
        rows: titles; a row without one is called by its name.
        columns: titles of the scores that are shown.
        corner: what stands above the rows.
        percent: whether values are shares, shown times 100.
        shares: of the ceiling, by row and score, shown in brackets.
    """
    times = 100 if percent else 1
    lines = [
        f"| {corner} | " + " | ".join(columns.values()) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row, scores in values.items():
        cells = []
        for name in columns:
            if name not in scores:
                cells.append("-")
                continue
            text = f"{times * scores[name]:.2f}"
            if name in intervals.get(row, {}):
                low, high = intervals[row][name]
                text += f" [{times * low:.2f}, {times * high:.2f}]"
            if shares is not None and name in shares.get(row, {}):
                text += f" ({shares[row][name]:.2f})"
            cells.append(text)
        lines.append(f"| {rows.get(row, row)} | " + " | ".join(cells) + " |")
    return lines


def format_scores(scores: Mapping[str, Any]) -> str:
    """What a method's `scores` return, as text.

    Args:
        scores: a number for each name; or {"rows": {row: {score: share}}, "intervals": likewise, both ends},
            beside which there may be further shares by their names, as "pairs" of subjects, and a number of
            seconds in each row.
    """
    if "rows" in scores:
        columns = {name: name for row in scores["rows"].values() for name in row if name != SECONDS}
        lines = text_block(scores["rows"], scores.get("intervals", {}), ROWS, columns) if columns else []
        others = {name: of for name, of in scores.items() if name not in ("rows", "intervals")}
        others = {name: of for name, of in others.items() if isinstance(of, Mapping)}
        for name, of in others.items():
            lines.append(f"{name}: " + ", ".join(f"{part} {100 * value:.1f}" for part, value in of.items()))
        took = {row: of[SECONDS] for row, of in scores["rows"].items() if SECONDS in of}
        if took:
            lines.append("seconds: " + ", ".join(f"{ROWS.get(row, row)} {n:.0f}" for row, n in took.items()))
        return "\n".join(lines)
    width = max(map(len, scores), default=0)
    return "\n".join(f"{name:{width}}  {value:.3f}" for name, value in scores.items())


def format_table(table: dict[str, Any]) -> str:
    """The scores of `evaluate_world` as text: percent, with 95% intervals."""
    rows, intervals = table["rows"], table["intervals"]
    lines = [
        *text_block(rows, intervals["rows"], ROWS, SCORES),
        "",
        *text_block(table["text"], intervals["text"], ROWS, TEXT_SCORES, "found anywhere, %"),
        "",
    ]
    ceiling = rows["real"]["hoi_map"]
    shares = [
        f"{ROWS[row]} {values['hoi_map'] / ceiling if ceiling else 0:.2f}"
        for row, values in rows.items()
        if row != "real"
    ]
    lines.append("HOI mAP as a share of the ceiling: " + ", ".join(shares))
    identities = [
        f"{ROWS[row]} {_cell(values['identity'], intervals['rows'][row]['identity'])}"
        for row, values in rows.items()
        if "identity" in values
    ]
    if identities:
        lines.append("attributes right at their boxes: " + ", ".join(identities))
    if (swapped := table["action_swap"]) is not None:
        ends = intervals["action_swap"]
        lines.append(
            f"action swap: adapter {_cell(swapped['adapter'], ends['adapter'])}, boxes only "
            f"{_cell(swapped['boxes_only'], ends['boxes_only'])}, chance {100 * swapped['chance']:.1f}"
        )
    if (words := table.get("word_iou")) is not None:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in words.items())
        lines.append(f"IoU of where a thing's words are looked for and the thing: {shown}")
    lines.append(
        f"{table['scenes']} held-out scenes of {table['size']} px, seed {table['seed']}, "
        f"{table['steps']} steps, guidance {table['guidance_scale']:g}, 95% intervals"
    )
    return "\n".join(lines)
