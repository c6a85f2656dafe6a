"""`interactdiff data stats`: phrases, sizes of boxes, slots, and what cropping costs."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from interactdiff.data.boxes import area, box_fields
from interactdiff.data.framing import Framing, phrases_of_item
from interactdiff.data.reading import Records

_AREAS = (0.001, 0.01, 0.1, 0.5)  # limits of the classes of boxes, shares of the picture
_TOP = 20  # phrases that are listed


def statistics(records: Records, framing: Framing, slots: int = 30, top: int = _TOP) -> dict[str, Any]:
    """Numbers of a data set, as JSON values.

    Args:
        records: the data.
        framing: the sizes of training.
        slots: items that an adapter takes of one picture.
        top: most frequent phrases that are listed.

    Returns:
        `pictures`; `items` by kind; `phrases`: how many distinct ones, and the most frequent by field;
        `boxes`: how many by their share of the picture; `per_picture`: pictures by their number of items;
        `over_slots`; `lost`: items that buckets and a square crop leave out; `buckets`: pictures by size.
    """
    square = Framing(framing.resolution, framing.multiple, True, framing.min_box, framing.min_visible)
    items: Counter[str] = Counter()
    phrases: dict[str, Counter[str]] = {}
    boxes: Counter[str] = Counter({_class(limit / 2): 0 for limit in (*_AREAS, 2.0)})
    per_picture: Counter[int] = Counter()
    buckets: Counter[str] = Counter()
    lost = {"buckets": 0, "square": 0}
    for number in range(len(records)):
        record, sides = records[number], (int(records.widths[number]), int(records.heights[number]))
        per_picture[len(record.items)] += 1
        for item in record.items:
            items[type(item).__name__.lower()] += 1
            for field, phrase in phrases_of_item(item):
                phrases.setdefault(field, Counter())[phrase] += 1
            for field in box_fields(type(item)):
                if (box := getattr(item, field)) is not None:
                    boxes[_class(area(box))] += 1
        for name, one in (("buckets", framing), ("square", square)):
            placement = one.place(*sides, record.items)
            lost[name] += len(record.items) - len(one.items(placement, record.items))
            if name == "buckets":
                buckets["{1} x {0}".format(*placement.size)] += 1
    return {
        "pictures": len(records),
        "items": dict(items),
        "phrases": {
            field: {"distinct": len(counts), "most_frequent": dict(counts.most_common(top))}
            for field, counts in phrases.items()
        },
        "boxes": dict(boxes),
        "per_picture": {str(count): per_picture[count] for count in sorted(per_picture)},
        "over_slots": sum(pictures for count, pictures in per_picture.items() if count > slots),
        "lost": lost,
        "buckets": dict(buckets.most_common()),
    }


def lines(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers of `statistics` for people."""
    total = max(1, sum(numbers["items"].values()))
    kinds = ", ".join(f"{count:,} x {kind}" for kind, count in numbers["items"].items()) or "no items"
    made = [f"{numbers['pictures']:,} pictures, {kinds}"]
    for field, one in numbers["phrases"].items():
        listed = ", ".join(f"{phrase} {count:,}" for phrase, count in one["most_frequent"].items())
        made.append(f"{field} ({one['distinct']:,} distinct): {listed}")
    made.append("boxes by their share of the picture: " + _joined(numbers["boxes"]))
    made.append("pictures by their number of items: " + _joined(numbers["per_picture"]))
    made.append(f"pictures with more items than slots: {numbers['over_slots']:,}")
    lost = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in numbers["lost"].items())
    made.append(f"items left out by cropping: {lost}")
    made.append("pictures by their size in training: " + _joined(numbers["buckets"]))
    return made


def _joined(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def _class(share: float) -> str:
    """The class of a box: between which shares its area is."""
    for low, high in zip((0.0, *_AREAS), _AREAS, strict=False):
        if share < high:
            return f"under {high:.1%}" if not low else f"{low:.1%} to {high:.1%}"
    return f"from {_AREAS[-1]:.1%}"
