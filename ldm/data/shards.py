"""Reader `webdataset`: tar shards as img2dataset writes them, KEY.jpg with KEY.txt, KEY.json and hints KEY.canny.png.

The webdataset library streams shards in their order and mixes them in a buffer; resume and ranks here rest on
samples that can be had by number, so the tars are indexed instead and members read in place. Shards are not dealt out:
any number of ranks and workers reads any number of shards.
"""

import json
import logging
import reprlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ldm.data.entries import Entry, EntryData, PackedOptions
from ldm.data.errors import DataError
from ldm.data.reading import SUFFIXES, Source, check_share, parts, stated_size
from ldm.data.records import Filter, split_by_hash
from ldm.data.tar import Member, walk
from ldm.registry import register, suggest

logger = logging.getLogger(__name__)
_FIELD: Final = "json."
_MAX_TEXT: Final = 2**20  # bytes of a caption or json
_SHOWN: Final = 12  # endings that a message lists, and lines about members
_HEAD: Final = 5  # numbers of a row before its members: shard, end of its key, picture ending, its width and height


@dataclass(frozen=True)
class ShardOptions(PackedOptions):
    """Options of `webdataset`; the others are those of folders.

    Attributes:
        caption: ending of the member with the caption, or json.FIELD for a field of KEY.json, e.g. json.caption.
    """

    caption: str = "txt"


@register("data", "webdataset", options=ShardOptions)
def webdataset(options: ShardOptions) -> EntryData:
    """Tar shards, whose headers are read now. Samples without the picture, caption or a wanted hint are left out.

    `where` is about fields of KEY.json, and `split` ("heldout" for a fixed 2 % by hash of the key) if it has none.

    Raises: DataError on unusable shards or options.
    """
    return EntryData(options, ShardIndex(options))


class ShardIndex:
    """Where the samples of all shards are. Numbers and keys lie in two flat blocks, which worker processes share."""

    def __init__(self, options: ShardOptions) -> None:
        self._options = options
        base, self.files = parts(options.root, ".tar")
        self._stems = [shard.relative_to(base).as_posix().removesuffix(".tar") for shard in self.files]
        self._field = options.caption.removeprefix(_FIELD) if options.caption.startswith(_FIELD) else ""
        self._endings = ["json" if self._field else options.caption, *options.columns.values()]
        self._width = _HEAD + 2 * (1 + len(self._endings))
        self._rows = array("q")
        self._keys = bytearray()
        self._bad: dict[Source, str] = {}
        keep, seen, count, lacking = Filter(options.where), set[str](), 0, 0
        for number, shard in enumerate(self.files):
            for key, members in self._samples(shard).items():
                seen |= members.keys()
                count += 1
                lacking += not self._add(number, f"{self._stems[number]}/{key}", members, keep)
        self._check(keep, seen, count, lacking)

    def __len__(self) -> int:
        return len(self._rows) // self._width

    def __getitem__(self, index: int) -> Entry:
        number, end, picture, width, height, *spots = self._rows[index * self._width : (index + 1) * self._width]
        start = self._rows[(index - 1) * self._width + 1] if index else 0
        key = self._keys[start:end].decode()
        stem = key.removeprefix(f"{self._stems[number]}/")
        endings = [SUFFIXES[picture][1:], *self._endings]
        image, caption, *hints = (
            Member(self.files[number], f"{stem}.{ending}", spots[2 * i], spots[2 * i + 1])
            for i, ending in enumerate(endings)
        )
        return Entry(
            key=key,
            image=image,
            text=lambda: self._text(caption),
            hints=dict(zip(self._options.columns, hints, strict=True)),
            references=(image,) if self._options.reference else (),
            size=(width, height) if width else None,
        )

    def _samples(self, shard: Path) -> dict[str, dict[str, Member]]:
        """Key -> ending -> member, in the order of the tar; the key ends at the first dot of the file name."""
        found: dict[str, dict[str, Member]] = {}
        for member, problem in walk(shard):
            folder, _, file = member.name.removeprefix("./").rpartition("/")
            stem, _, ending = file.partition(".")
            key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
            text = ending in ("json", self._endings[0])
            if not problem and ending in found.get(key, ()):
                problem = f"{member} is in its tar twice; the first is read"
            elif not problem and text and member.size > _MAX_TEXT:
                problem = f"{member} is {member.size} bytes, at most {_MAX_TEXT} are read as text; shrink it"
            if problem:
                self._bad[member] = problem
            elif stem and ending:
                found.setdefault(key, {})[ending] = member
        return found

    def _add(self, number: int, key: str, members: dict[str, Member], keep: Filter) -> bool:
        """Take a sample into the index if it is wanted. Returns whether it has all that it needs."""
        pictures = [i for i, s in enumerate(SUFFIXES) if s[1:] in members and s[1:] not in self._endings]
        if not pictures or not all(ending in members for ending in self._endings):
            return False
        first = members[SUFFIXES[pictures[0]][1:]]
        try:
            if len(pictures) > 1:
                endings = " and ".join(SUFFIXES[i] for i in pictures)
                raise DataError(f"{first} has other pictures of its key ({endings}); name a hint in data.hints")
            told = bool(self._options.where or self._options.buckets is not None) and "json" in members
            columns = _fields(members["json"]) if told else {}
            if self._options.where and not keep({"split": split_by_hash(key), **columns}):
                return True
        except DataError as error:
            self._bad[first] = str(error)
            return True
        self._keys += key.encode()
        self._rows.extend((number, len(self._keys), pictures[0], *stated_size(columns)))
        for member in (first, *(members[ending] for ending in self._endings)):
            self._rows.extend((member.offset, member.size))
        return True

    def _check(self, keep: Filter, seen: set[str], count: int, lacking: int) -> None:
        """Say what was left out of `count` samples. Raises: DataError if it is too much, or nothing is left."""
        o, wanted = self._options, ", ".join(["a picture", *self._endings])
        for problem in list(self._bad.values())[:_SHOWN]:
            logger.warning("left out: %s", problem)
        check_share(self._bad, count + len(self._bad), o.max_bad)
        for ending in self._endings:
            if seen and ending not in seen:
                listed = f"{', '.join(sorted(seen)[:_SHOWN])}{suggest(ending, seen)}"
                raise DataError(
                    f"data.caption or data.hints names {ending!r}; members in {o.root} end in {listed}; "
                    f"{_FIELD}FIELD is a field of the json"
                )
        if o.where and keep.rows:
            keep.check(o.root)
        if not len(self):
            first = f"; first: {next(iter(self._bad.values()))}" if self._bad else ""
            raise DataError(f"none of the {count} samples in {o.root} has all of {wanted}{first}")
        counts = f"{lacking} lack one of {wanted}; {len(self._bad)} members left out"
        logger.info("%s: %d of %d samples in %d shards; %s", o.root, len(self), count, len(self.files), counts)

    def _text(self, member: Member) -> str:
        if not self._field:
            return member.read_text().strip()
        text = _fields(member).get(self._field)
        if not isinstance(text, str):
            raise DataError(f"{member}: {self._field} is {reprlib.repr(text)}, must be text; see data.caption")
        return text


def _fields(member: Member) -> dict[str, Any]:
    """The object of a json member. Raises: DataError when it is none."""
    try:
        fields = json.loads(member.read_text())
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{member} is not JSON ({error}); replace or remove it") from error
    if not isinstance(fields, dict):
        raise DataError(f"{member} is a {type(fields).__name__}, must be an object")
    return fields
