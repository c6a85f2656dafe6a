"""The scores of a model as text."""

from collections.abc import Sequence
from typing import Any

ROWS = {
    "real": "real renders",
    "base": "base, text only",
    "boxes_only": "adapter, boxes only",
    "adapter": "adapter",
    "adapter_fast": "adapter, fast",
    "adapter_clear": "adapter+clear",
}
SCORES = {"hoi_map": "HOI mAP", "box_acc": "boxes", "action_acc": "actions", "colour_acc": "colours"}
TEXT_SCORES = {
    "object_acc": "objects",
    "action_acc": "actions",
    "colour_acc": "colours",
    "appearance_acc": "appearance",
}


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:5.1f} [{100 * interval[0]:3.0f}, {100 * interval[1]:3.0f}]"


def _block(table: dict[str, Any], kind: str, titles: dict[str, str], corner: str = "%") -> list[str]:
    """One part of the table, with a column for each score that its first row has."""
    there = next(iter(table[kind].values()))
    titles = {score: title for score, title in titles.items() if score in there}
    lines = [f"{corner:20}" + "".join(f"{title:>19}" for title in titles.values())]
    for row, values in table[kind].items():
        ends = table["intervals"][kind][row]
        lines.append(f"{ROWS[row]:20}" + "".join(f"{_cell(values[s], ends[s]):>19}" for s in titles))
    return lines


def format_table(table: dict[str, Any]) -> str:
    """The scores of `evaluate_world` as text: percent, with 95% intervals."""
    rows, intervals = table["rows"], table["intervals"]
    lines = [*_block(table, "rows", SCORES), "", *_block(table, "text", TEXT_SCORES, "found anywhere, %"), ""]
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
