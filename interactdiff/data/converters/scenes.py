"""Scene files, captions beside pictures, the studio's PNGs, shards, or a folder of rows in other boxes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from interactdiff.data.converters.base import Converted, Options
from interactdiff.data.reading import read_folder, splits
from interactdiff.data.records import CONTROL, format_of, own_file


def convert(source: str, options: Options, notes: Counter[str]) -> Iterator[Converted]:
    """Write whatever `read_folder` reads as rows with boxes in shares.

    Args:
        source: see `interactdiff.data.reading.open_source`.
        options: `split` and `form`.
        notes: counts what is left out: nothing.
    """
    for split in splits(source) if options.split is None else [options.split]:
        for record in read_folder(source, split, options.form):
            name = record.name
            if not Path(name).suffix:  # a key of a shard or a number of a table
                name = f"{Path(name).name}.{record.format}"
            row, references = record.to_row(), {}
            if (control := record.control) is not None:
                row[CONTROL] = f"{CONTROL}s/{name}.{format_of(control)}"
                references[row[CONTROL]] = own_file(control) or control.read()
            yield Converted(name, record.path or record.stored.read(), row, split, references)
