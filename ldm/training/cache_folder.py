"""An encoded data set on disk: safetensors parts, made by all ranks together, and a manifest that says of what.

    manifest.json               what it was made from (ldm.training.cache_key), whether it is complete, sizes of files
    images-00000.safetensors    rows 0 to PART - 1: mean, std, hints; keys, captions and sums of rows in the header
    texts-00000.safetensors     text conditions, each caption once
    prompts-00000.safetensors   features of image prompts, each picture once
    index.safetensors           image -> rows of its caption and references

Parts are mapped, not read: a row that is asked for comes from the disk, or from the system's memory of it. The first
time that a process asks for a row, it is compared with its sum.
"""

import contextlib
import json
import logging
import os
import time
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from ldm.convert import files
from ldm.registry import ConfigError
from ldm.training import cache_key, checkpoint, lock, signals
from ldm.training.distributed import Rank

log = logging.getLogger(__name__)
PART: Final = 256  # rows that are lost at most, per rank, when a build is killed
FORMAT: Final = "1"  # goes up when the same key would stand for other numbers
MANIFEST: Final = "manifest.json"
INDEX: Final = "index"
WORDS: Final = ("keys", "captions", "read")  # of rows, in a part's header
SUMS: Final = "crc32"  # of rows, beside them
_NEW: Final = ".new"  # ending of what is not whole yet


class Sums:
    """CRC-32 of a file's rows, tensors and all words: they find what a disk did to it, not what an attacker did."""

    def __init__(self, path: Path, said: Mapping[str, str]) -> None:
        """Args: said: the file's header. One without sums, as they were before, counts as sound."""
        self.path = path
        self._sums = array("L", json.loads(said.get(SUMS, "[]")))
        self._begun = _begun(said)
        self._trusted = bytearray(len(self._sums))

    def check(self, number: int, row: Mapping[str, Tensor]) -> None:
        """Compare a row with its sum, once. Raises: ConfigError if it is not what was written."""
        if not self._sums:
            return
        if number >= len(self._sums):
            raise _damaged(self.path, f"it has sums of {len(self._sums)} rows, none of row {number}")
        if not self._trusted[number]:
            if _sum(row, self._begun) != self._sums[number]:
                raise _damaged(self.path, f"row {number} is not what was written")
            self._trusted[number] = True


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Up to PART rows: tensors n ... by name, words of each row, and sums where it is a file."""

    tensors: dict[str, Tensor]
    words: dict[str, list[str]] = field(default_factory=dict)
    sums: Sums | None = None

    def row(self, number: int) -> dict[str, Tensor]:
        """A row's tensors, by name. Raises: as `Sums.check`."""
        found = {name: x[number] for name, x in self.tensors.items()}
        if self.sums is not None:
            self.sums.check(number, found)
        return found


pytree.register_dataclass(Part)
Make = Callable[[Sequence[range]], Generator[Part]]  # ranges of rows -> the part of each


def ranges(count: int) -> list[range]:
    """Rows 0 to count - 1 in parts."""
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


class Parts:
    """Parts in a folder, each mapped when it is first asked for; other processes map them themselves."""

    def __init__(self, folder: Path, name: str, words: Sequence[str]) -> None:
        """Args: words: which of the words to read, where a part has them."""
        self._where = folder, name, words
        self._mapped: dict[int, Part] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def __getitem__(self, number: int) -> Part:
        """Raises: ConfigError if it cannot be read."""
        if number not in self._mapped:
            folder, name, words = self._where
            self._mapped[number] = _read(_path(folder, name, number), words)
        return self._mapped[number]


class Folder:
    """Such a folder, complete or being made. All ranks call everything, in the same order."""

    def __init__(self, path: Path, key: Callable[[], Mapping[str, str]], rank: Rank) -> None:
        """Look at it, and begin it if there is none; an interrupted build goes on.

        Args:
            path: the folder, which all ranks see.
            key: what the cache has to be made from; asked on rank 0.
            rank: this process.

        Raises: ConfigError, on all ranks, if it was made from something else, is no cache, is being made by another
            run, or cannot be written.
        """
        self.path, self.rank = path, rank
        self._manifest: dict[str, Any] = {}
        self._lock: Any = None
        found, refused = False, ""
        if rank.main:
            try:
                found = self._opened(key)
            except (ValueError, OSError) as error:
                refused = str(error)
        self.complete, refused = rank.told((found, refused))
        if refused:
            raise ConfigError(refused)

    def section(self, name: str, count: int, make: Make) -> Parts:
        """The parts of `count` rows; ranks share out those that are missing.

        Each is written under another name, flushed and renamed, so one that has its name is whole.

        Raises: ConfigError if the disk is full; signals.Stopped, behind a part, if a rank was asked to stop.
        """
        every = ranges(count)
        there = [i for i in range(len(every)) if _path(self.path, name, i).exists()] if self.rank.main else []
        refused = self.rank.told(self._refused(name, {i: len(every[i]) for i in there}))
        if refused:
            self._release()
            raise ConfigError(refused)
        missing = sorted({*range(len(every))} - {*self.rank.told(there)})
        mine = missing[self.rank.index :: self.rank.world]
        if there and missing:
            log.info("%s: %d of %d parts of %s are there already", self.path, len(there), len(every), name)
        kept = f"while encoding; stage.cache_dir {self.path} keeps what is done"
        with contextlib.ExitStack() as failing, contextlib.closing(make([every[i] for i in mine])) as made:
            failing.callback(self._release)  # at once, not when this object goes, which a traceback may hold
            # Its end waits for the others; unlike a barrier of NCCL for half an hour and more.
            for i, part in signals.heeding(zip(mine, made, strict=True), self.rank, kept):
                room = sum(x.nbytes for x in part.tensors.values()) * len(missing) if i == missing[0] else 0
                words = {word: json.dumps(rows, ensure_ascii=False) for word, rows in part.words.items()}
                sums = [_sum(part.row(row), _begun(words)) for row in range(len(every[i]))]
                self._write(_path(self.path, name, i), part.tensors, words | {SUMS: json.dumps(sums)}, room)
            failing.pop_all()
        return Parts(self.path, name, WORDS)

    def _refused(self, name: str, counts: Mapping[int, int]) -> str:
        """Why a part that is there already cannot be built upon; its rows are read for it. `counts`: part -> rows."""
        try:
            for number, count in counts.items():
                path = _path(self.path, name, number)
                part = _read(path, WORDS)
                if (seen := {len(x) for x in part.tensors.values()}) != {count}:
                    raise _damaged(path, f"it has {', '.join(map(str, sorted(seen)))} rows, not {count}")
                for row in range(count):
                    part.row(row)
        except ConfigError as error:
            return str(error)
        return ""

    def parts(self, name: str) -> Parts:
        """Those of a complete cache, with the keys of their samples."""
        return Parts(self.path, name, ("keys",))

    def finish(self, index: Mapping[str, Tensor]) -> None:
        """Write the index, and mark the cache complete. Raises: as `section`."""
        if self.rank.main:
            sums = [_sum(index, _begun({}))]  # one row
            self._write(self.path / f"{INDEX}.safetensors", index, {SUMS: json.dumps(sums)}, 0)
            sizes = {path.name: path.stat().st_size for path in sorted(self.path.glob("*.safetensors"))}
            self._say({**self._manifest, "complete": True, "bytes": sizes})
            self._lock.close()
            log.info("%s: complete, %.1f MB", self.path, sum(sizes.values()) / 1e6)
        self.complete = True
        self.rank.any(False)

    def index(self) -> dict[str, Tensor]:
        """What `finish` was given. Raises: ConfigError if it cannot be read, or is not what was written."""
        part = _read(self.path / f"{INDEX}.safetensors", ())
        assert part.sums is not None
        part.sums.check(0, part.tensors)
        return part.tensors

    def _opened(self, key: Callable[[], Mapping[str, str]]) -> bool:
        """Whether the cache is complete; if not, it is begun. Raises: ConfigError, or OSError of the data's files."""
        saved = self._saved()
        started = time.perf_counter()
        ours = {"format": FORMAT, **key()}
        log.info("%s: what goes into it was summed up in %.1f s", self.path, time.perf_counter() - started)
        if saved is not None and (other := cache_key.differences(saved["key"], ours)):
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise ConfigError(
                f"stage.cache_dir {self.path} was made with other {', '.join(other[:3])}{more}; remove that folder, or "
                "choose another stage.cache_dir"
            )
        bad: list[Path] = []
        if saved is not None and saved["complete"]:
            bad = [path for name, size in saved["bytes"].items() if _size(path := self.path / name) != size]
            if not bad:
                return True
            log.warning("%s: %s is not what was written; such files are made again", self.path, bad[0].name)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            busy = f"stage.cache_dir {self.path} is being made by another run; start again when that is done"
            self._lock = lock.take(self.path, lambda _: busy)
            if self._saved() != saved:  # another run was quicker
                raise ConfigError(f"stage.cache_dir {self.path} was changed by another run just now; start again")
            for path in (*bad, *self.path.glob(f"*{_NEW}*")):
                path.unlink(missing_ok=True)
            self._say({"complete": False, "key": ours})
        return False

    def _saved(self) -> dict[str, Any] | None:
        """The manifest, None if nothing is there. Raises: ConfigError on a folder that is no cache."""
        try:
            saved = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            return {"complete": saved["complete"], "key": dict(saved["key"]), "bytes": dict(saved.get("bytes", {}))}
        except (FileNotFoundError, NotADirectoryError):
            there = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            if not [name for name in there if name != lock.NAME and not name.startswith(MANIFEST)]:
                return None
            problem = f"has files but no {MANIFEST}, so it is no cache"
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = f"has a {MANIFEST} that is damaged"
        raise ConfigError(f"stage.cache_dir {self.path} {problem}; choose a new folder")

    def _say(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        path = self.path / MANIFEST
        with self._writing():
            new = path.with_name(path.name + _NEW)
            new.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _put(new, path)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str], room: int) -> None:
        with self._writing():
            checkpoint.check_room(self.path, room)
            new = path.with_name(path.name + _NEW)
            files.write(new, tensors, words)
            _put(new, path)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"stage.cache_dir {self.path} could not be written ({checkpoint.reason(error)}); what is done is kept: "
                "make room, or choose a folder that you may write, and start again"
            ) from error


def _read(path: Path, words: Sequence[str]) -> Part:
    """What a file holds, mapped. Raises: ConfigError if its header is damaged."""
    try:
        said = checkpoint.read_metadata(path)
        found = {word: json.loads(said[word]) for word in words if word in said}
        return Part(files.read(path), found, Sums(path, said))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} of stage.cache_dir is damaged ({reason}); remove that file and start again: it is made anew"
    )


def _begun(words: Mapping[str, str]) -> int:
    """Sum of the words of a part, as its header says them, with which that of each row begins."""
    return zlib.crc32("\n".join(words.get(word, "") for word in WORDS).encode())


def _sum(row: Mapping[str, Tensor], begun: int) -> int:
    """Sum of tensors and their names."""
    for name, x in sorted(row.items()):
        begun = zlib.crc32(x.contiguous().view(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), begun))
    return begun


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.safetensors"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _put(new: Path, path: Path) -> None:
    """Give a file its name once it is on the disk."""
    checkpoint.flush(new)
    os.replace(new, path)
    checkpoint.flush(path.parent)
