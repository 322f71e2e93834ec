"""Readers of image folders: `folder` (metadata.jsonl), `sidecar` (image + .txt) and `fill50k` (prompt.json)."""

import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.data.entries import Entry, EntryData, EntryOptions
from ldm.data.errors import DataError
from ldm.data.reading import inside
from ldm.data.records import Record, pairs, read_records, select
from ldm.registry import register, suggest

logger = logging.getLogger(__name__)


@register("data", "folder", options=EntryOptions)
def folder(options: EntryOptions) -> EntryData:
    """A folder with metadata.jsonl. Rows whose wanted hint is null are left out.

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "folder")


@register("data", "sidecar", options=EntryOptions)
def sidecar(options: EntryOptions) -> EntryData:
    """Images with a .txt of the same name; hints are files of the same names in their own folders.

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "sidecar")


@register("data", "fill50k", options=EntryOptions)
def fill50k(options: EntryOptions) -> EntryData:
    """ControlNet's toy set: prompt.json, source/, target/. The hint's column is "source".

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "fill50k")


def _build(options: EntryOptions, layout: str) -> EntryData:
    root = Path(options.root)
    rows = read_records(root, layout, skip=tuple(options.columns.values()))
    if layout == "sidecar":
        rows = [_with_sibling_hints(row, options.columns, root) for row in rows]
    every, rows = rows, select(rows, options.where, root)
    wanted = [*options.columns.values(), *([options.reference] if isinstance(options.reference, str) else [])]
    columns = sorted({name for row in rows for name in row.columns})
    for column in wanted:
        if column not in columns:
            raise DataError(
                f"data.hints or data.reference names column {column!r}; {root} has {', '.join(columns)}"
                f"{suggest(column, columns)}"
            )
    usable = [row for row in rows if all(row.columns.get(column) is not None for column in wanted)]
    if not usable:
        raise DataError(f"none of the {len(rows)} selected images of {root} has all of {', '.join(wanted)}")
    if len(usable) < len(rows):
        logger.info("%s: %d of %d images have no %s", root, len(rows) - len(usable), len(rows), " or ".join(wanted))
    if (pairing := options.pairing) is None:
        column = str(options.reference)  # a name: mappings are pairings
        prompts = {row.file: (row.columns[column],) for row in usable} if options.reference else {}
    else:
        prompts = pairs(every, usable, options.where, pairing, root)
        usable = [row for row in usable if prompts[row.file]]
    return EntryData(options, [_entry(row, options, root, prompts.get(row.file, ())) for row in usable], check=True)


def _entry(row: Record, options: EntryOptions, root: Path, prompts: Sequence[str]) -> Entry:
    return Entry(
        key=row.file,
        image=inside(root, row.file, row.source),
        text=row.text or "",
        hints={name: inside(root, row.columns[column], row.source) for name, column in options.columns.items()},
        references=tuple(inside(root, file, row.source) for file in prompts),
    )


def _with_sibling_hints(row: Record, hints: Mapping[str, str], root: Path) -> Record:
    """Add a column per hint folder: the file there that has the image's name, with any image suffix."""
    for place in hints.values():
        exact = inside(root, f"{place}/{row.file}", "data.hints")
        match = (
            exact if exact.is_file() else next(iter(sorted(exact.parent.glob(f"{glob.escape(exact.stem)}.*"))), exact)
        )
        row = row.with_column(place, match.relative_to(root).as_posix())
    return row
