"""Reader `parquet`: tables as Hugging Face datasets writes them, pictures inside; needs the `parquet` extra.

A picture is a struct {bytes, path} (the feature `Image` of datasets) or plain bytes. A row is had by reading its row
group, the smallest part that can be read alone: files of small groups (datasets takes 100 rows for pictures) are quick
to read in any order, files of one huge group are refused. Measured with JPEGs of 512 px and
190 kB: 7 ms of processor time to decode one, 14 ms to get at it in groups of 100 rows, 200 ms in groups of 1000.
"""

import logging
import re
import reprlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from ldm.data.entries import Entry, EntryData, PackedOptions
from ldm.data.errors import DataError
from ldm.data.reading import parts, stated_size
from ldm.data.records import Filter, split_by_hash
from ldm.registry import register, suggest

logger = logging.getLogger(__name__)
_PICTURE: Final = re.compile(r"(large_)?binary|struct<.*\bbytes: (large_)?binary.*>")
_WORDS: Final = re.compile(r"(large_)?string|dictionary<values=(large_)?string,.*>")
_ANY: Final = re.compile(r".*")
_MIB: Final = 2**20
_MOST: Final = 1024  # MiB of a row group
_SLOW: Final = 128
_BATCH: Final = 16  # rows that are decoded at a time
_KEPT: Final = 256 * _MIB  # bytes of row groups in memory, per process; the latest is kept at any size


@dataclass(frozen=True)
class ParquetOptions(PackedOptions):
    """Options of `parquet`; the others are those of folders.

    Attributes:
        image: column of pictures.
        caption: column of captions.
    """

    image: str = "image"
    caption: str = "text"


@register("data", "parquet", options=ParquetOptions)
def parquet(options: ParquetOptions) -> EntryData:
    """Parquet files with pictures inside, e.g. a data set cloned from the Hugging Face hub. Hints are columns too.

    `where` is about columns, and `split` ("heldout" for a fixed 2 % by hash of file and row) if there is none.

    Raises: DataError on unusable files, columns or options, or without pyarrow.
    """
    return EntryData(options, ParquetRows(options))


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture in a table."""

    rows: "ParquetRows" = field(compare=False, repr=False)
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.rows.place(self.row)}, {self.column}"

    @property
    def name(self) -> str:
        """The column."""
        return self.column

    def read_bytes(self) -> bytes:
        """The file's content. Raises: DataError when the table cannot be read or the cell has no bytes."""
        value = self.rows.value(self.row, self.column)
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            raise DataError(f"{self} is {reprlib.repr(value)}, must have bytes; write the set with its pictures inside")
        return data


class ParquetRows:
    """Rows of many files as entries. Of their content only a few row groups are in memory at any time."""

    def __init__(self, options: ParquetOptions) -> None:
        self._options = options
        base, self.files = parts(options.root, ".parquet")
        self._stems = [path.relative_to(base).as_posix().removesuffix(".parquet") for path in self.files]
        self._files_at, self._groups_at = array("q"), array("q")  # rows at which files and row groups begin
        self._groups: list[tuple[int, int]] = []  # file, number in it
        self._sizes = array("q")  # width and height of each row's picture as far as columns say it, for buckets
        self._kept: OrderedDict[int, Any] = OrderedDict()
        keep, chosen, self._total = Filter(options.where), array("q"), 0
        for path in self.files:
            with _opened(path) as file:
                self._check(path, file)
                self._add(path, file)
                if options.buckets is not None:
                    self._sizes.extend(_stated_sizes(file))
                if options.where:
                    first = self._files_at[-1]
                    chosen.extend(first + i for i, row in enumerate(self._rows(file)) if keep(row))
        if not self._total:
            raise DataError(f"{options.root} has no rows in {len(self.files)} files; check data.root")
        if options.where:
            keep.check(options.root)
        self._chosen: Sequence[int] = chosen if options.where else range(self._total)
        logger.info("%s: %d of %d rows in %d files", options.root, len(self), self._total, len(self.files))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}  # other processes read their own

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Entry:
        row = self._chosen[index]
        image = Cell(self, row, self._options.image)
        return Entry(
            key=self.place(row),
            image=image,
            text=lambda: self._text(row),
            hints={name: Cell(self, row, column) for name, column in self._options.columns.items()},
            references=(image,) if self._options.reference else (),
            size=(self._sizes[2 * row], self._sizes[2 * row + 1]) if any(self._sizes[2 * row : 2 * row + 2]) else None,
        )

    def place(self, row: int) -> str:
        """File and row in it, e.g. "train-00000-of-00002/17"."""
        number = bisect_right(self._files_at, row) - 1
        return f"{self._stems[number]}/{row - self._files_at[number]}"

    def value(self, row: int, column: str) -> Any:
        """What a cell holds. Raises: DataError when its row group cannot be read."""
        number = bisect_right(self._groups_at, row) - 1
        return self._group(number).column(column)[row - self._groups_at[number]].as_py()

    def _group(self, number: int) -> Any:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        file, group = self._groups[number]
        with _opened(self.files[file]) as opened:
            table = _table(opened, group, [self._options.image, self._options.caption, *self._options.columns.values()])
        self._kept[number] = table
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT:
            self._kept.popitem(last=False)
        return table

    def _text(self, row: int) -> str:
        text = self.value(row, self._options.caption)
        if not isinstance(text, str):
            raise DataError(f"{self.place(row)}: {self._options.caption} is {reprlib.repr(text)}, must be text")
        return text

    def _check(self, path: Path, file: Any) -> None:
        """Raises: DataError on a missing column, or one of another type."""
        o, known = self._options, {f.name: str(f.type) for f in file.schema_arrow}
        wanted = [(o.image, _PICTURE, "pictures"), (o.caption, _WORDS, "text")]
        wanted += [(column, _PICTURE, "pictures") for column in o.columns.values()]
        wanted += [(column, _ANY, "") for column in o.where if column != "split"]
        for column, pattern, what in wanted:
            if (count := file.schema_arrow.names.count(column)) != 1:
                listed = f"{', '.join(known)}{suggest(column, known)}"
                raise DataError(
                    f"{path} has {count} columns {column!r}, must have one; it has {listed}; see data.image, caption"
                )
            if not pattern.fullmatch(known[column]):
                raise DataError(f"{path}: column {column!r} is {known[column]}, must hold {what}; name another column")

    def _add(self, path: Path, file: Any) -> None:
        """Note where the row groups of an open file begin. Raises: DataError when one is too large."""
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0) // _MIB
        if largest >= _SLOW:
            size = f"{path} has a row group of {largest} MiB, which is read whole for one row"
            advice = "write it anew with row_group_size=100"
            if largest >= _MOST:
                raise DataError(f"{size}; at most {_MOST} MiB: {advice}")
            logger.warning("%s; it will be slow: %s", size, advice)
        self._files_at.append(self._total)
        for number, group in enumerate(groups):
            self._groups_at.append(self._total)
            self._groups.append((len(self._files_at) - 1, number))
            self._total += group.num_rows

    def _rows(self, file: Any) -> Iterator[dict[str, Any]]:
        """What `where` asks about, row by row."""
        names = [column for column in self._options.where if column in file.schema_arrow.names]
        batches = file.iter_batches(columns=names, use_threads=False) if names else ()
        rows = (row for batch in batches for row in batch.to_pylist()) if names else repeat({}, file.metadata.num_rows)
        for i, row in enumerate(rows, start=self._files_at[-1]):
            yield {"split": split_by_hash(self.place(i)), **row}


def _stated_sizes(file: Any) -> Iterator[int]:
    """Width and height of each row from columns of these names, as img2dataset writes them; zeros without."""
    both = {"width", "height"} <= set(file.schema_arrow.names)
    batches = file.iter_batches(columns=["width", "height"], use_threads=False) if both else ()
    rows = (row for batch in batches for row in batch.to_pylist()) if both else repeat({}, file.metadata.num_rows)
    return (side for row in rows for side in stated_size(row))


def _table(file: Any, group: int, columns: list[str]) -> Any:
    """A row group in memory, within _MOST: what its header says of its size leaves repeated values out.

    Raises: OSError when it is larger, or has fewer rows than stated.
    """
    from pyarrow import Table  # pyright: ignore[reportMissingImports]

    batches, size = [], 0
    for batch in file.iter_batches(_BATCH, [group], columns, use_threads=False):
        batches.append(batch)
        size += batch.nbytes
        if size > _MOST * _MIB:
            raise OSError(f"row group {group} has more than {_MOST} MiB; write it anew with row_group_size=100")
    stated = file.metadata.row_group(group).num_rows
    if sum(batch.num_rows for batch in batches) != stated:
        raise OSError(f"row group {group} has fewer rows than the {stated} that the file states")
    return Table.from_batches(batches)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises: DataError without pyarrow, or when the file cannot be read, now or in the body."""
    try:
        from pyarrow import ArrowException  # pyright: ignore[reportMissingImports]
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            'data parquet needs pyarrow, which is not installed: pip install "ldm-adapters[parquet]"'
        ) from None
    try:
        with ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it") from None
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read ({reason}); replace or remove it") from error
