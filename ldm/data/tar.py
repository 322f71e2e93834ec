"""Members of a tar by offset: headers are walked once, nothing is extracted.

Formats: ustar, GNU (long names, base-256 sizes) and pax (POSIX.1-2001), which are what Python, webdataset and GNU tar
write. Python's own `tarfile` takes several times as long, reads a header of any stated size into memory, and unless it
is recent can be led in circles by a negative size (CVE-2025-8194).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from ldm.data.errors import DataError
from ldm.data.reading import MAX_PIXELS

MAX_BYTES: Final = 4 * MAX_PIXELS  # of a member: the largest picture that may be decoded, stored with 4 bytes a pixel
_BLOCK: Final = 512
_HEAD: Final = 2**15  # bytes; JPEGs with a thumbnail or a colour profile may have longer headers
_MAX_NAME: Final = 2**16  # bytes of a long name or pax header
_OLD_FILE: Final = b"\0"  # of the time before POSIX, when a folder was a file with / at its end
_FILES: Final = (b"0", _OLD_FILE, b"7")
_FOLDER: Final = b"5"
_NO_DATA: Final = (b"1", b"2", b"3", b"4", _FOLDER, b"6")  # links, devices, pipes: no data follows, whatever they state
_SPARSE: Final = b"S"
_PAX: Final = b"x"
_LONG_NAME: Final = b"L"
_ABOUT_NEXT: Final = (_PAX, _LONG_NAME, b"K", b"g")  # headers with data of their own; K and g say nothing of use


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar.

    Attributes:
        shard: the tar.
        name: its path in there, as printable text.
        offset: of its first byte in the tar.
        size: in bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    @property
    def head(self) -> "Member":
        """Its first bytes, see `reading.Headed`."""
        return replace(self, size=min(self.size, _HEAD))

    def read_bytes(self) -> bytes:
        """Its content. Raises: OSError when the tar is missing or has become shorter."""
        with self.shard.open("rb", buffering=0) as file:
            return _exactly(file.fileno(), self.size, self.offset)

    def read_text(self) -> str:
        """Its content as text. Raises: DataError when it cannot be read or is not UTF-8."""
        try:
            return self.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"{self} is missing; restore {self.shard.name}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self} cannot be read as UTF-8 text ({error})") from error


def walk(shard: Path) -> Iterator[tuple[Member, str]]:
    """Every file of a tar in order, with what is wrong with it, or "". Folders are passed over.

    Where the tar is damaged, or cut off, the walk ends with a member that says so; there is no way to find the next.

    Raises: DataError when the tar cannot be opened.
    """
    try:
        with shard.open("rb", buffering=0) as file:
            yield from _walk(shard, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error}); replace or remove it") from error


def _walk(shard: Path, file: int, end: int) -> Iterator[tuple[Member, str]]:
    at, long_name, long_size = 0, "", None  # what a header of its own said of the next member
    while at < end and any(header := os.pread(file, _BLOCK, at)):
        if (size := _stated_size(header)) is None:
            what = "is damaged" if at else "is no tar, or a compressed one,"
            yield Member(shard, "", at, 0), f"{shard} {what} at byte {at}: what follows is left out; replace it"
            return
        kind, name, start = header[156:157], _name(header), at + _BLOCK
        if kind not in _ABOUT_NEXT:
            name = long_name or name
            kind = _FOLDER if kind == _OLD_FILE and name.endswith("/") else kind
            size = 0 if kind in _NO_DATA else size if long_size is None else long_size
            long_name, long_size = "", None
        member = Member(shard, name if name.isprintable() else ascii(name), start, size)
        if size > end - start or kind == _SPARSE:
            what = "is a sparse file" if kind == _SPARSE else f"states {size} bytes, the tar has {end - start} more"
            yield member, f"{member} {what}: what follows is left out; replace {shard.name}"
            return
        if kind in _ABOUT_NEXT and size > _MAX_NAME:
            yield member, f"{member} is a header of {size} bytes, at most {_MAX_NAME} are read; write the tar anew"
        elif kind == _LONG_NAME:
            long_name = _text(os.pread(file, size, start))
        elif kind == _PAX:
            pax_name, long_size = _pax(os.pread(file, size, start))
            long_name = pax_name or long_name
        elif kind not in _ABOUT_NEXT and kind != _FOLDER:
            yield member, _problem(member, name, kind)
        at = start + -(-size // _BLOCK) * _BLOCK


def _problem(member: Member, name: str, kind: bytes) -> str:
    if kind not in _FILES:
        return f"{member} is a link, device or other special file (type {kind!r}); only files are read"
    if not name.isprintable():
        return f"{member} has a name that cannot be printed; name it with letters and digits"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return f"{member} has a path that leaves the tar; name it without a leading / and without '..'"
    if member.size > MAX_BYTES:
        return f"{member} is {member.size} bytes, at most {MAX_BYTES} are read; shrink it"
    return ""


def _stated_size(header: bytes) -> int | None:
    """Size of the member whose header this is; None unless its sum is right and the size a number."""
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")  # the sum is made with blanks in its own place
    if len(header) < _BLOCK or _number(header[148:156]) != total:
        return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256 behind a byte 0x80; None for anything else, negative numbers too."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> tuple[str, int | None]:
    """Path and size among pax records, each "LENGTH KEY=VALUE" and a line feed; "" and None where they are not."""
    name, size = "", None
    while (digits := data.split(b" ", 1)[0]).isdigit() and len(digits) < 8 and int(digits) > len(digits):
        record, data = data[: int(digits)], data[int(digits) :]
        key, _, value = record[len(digits) + 1 :].removesuffix(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
    return name, size


def _exactly(file: int, size: int, offset: int) -> bytes:
    """Bytes at an offset; `pread` may give fewer than asked for. Raises: OSError at the end of the file."""
    data = os.pread(file, size, offset)
    while len(data) < size:
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            raise OSError("the tar has become shorter since it was indexed")
        data += more
    return data
