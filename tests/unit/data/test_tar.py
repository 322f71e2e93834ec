import io
import random
import tarfile
from pathlib import Path

import pytest

from ldm.data import DataError, tar
from ldm.data.tar import Member, walk

from .conftest import write_tar

LONG = f"{'folder/' * 40}{'n' * 120}.jpg"


def whole(path: Path) -> list[tuple[str, bytes]]:
    return [(member.name, member.read_bytes()) for member, problem in walk(path) if not problem]


def problems(path: Path) -> list[str]:
    return [problem.removeprefix(f"{path}") for _, problem in walk(path) if problem]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(tmp_path: Path, layout: int) -> None:
    names = ["a.jpg", "./b.txt", "ü/猫.json", f"{'d' * 90}/{'f' * 90}.png", "empty.txt"]
    names += [] if layout == tarfile.USTAR_FORMAT else [LONG]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode() * 40) for name in names], layout)
    with tarfile.open(path, "a", format=layout) as file:
        file.add(tmp_path, "folder", recursive=False)
        file.addfile(tarfile.TarInfo("last.txt"))
    with tarfile.open(path) as file:
        expected = [(m.name, file.extractfile(m).read()) for m in file if m.isreg()]  # type: ignore[union-attr]
    assert whole(path) == expected and len(expected) == len(names) + 1 and problems(path) == []


def special(name: str, kind: bytes, size: int = 0) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info, io.BytesIO(bytes(size))


@pytest.mark.parametrize(
    ("name", "kind", "size", "message"),
    [
        ("a.jpg", tarfile.SYMTYPE, 0, "a.jpg is a link, device or other special file (type b'2')"),
        ("a.jpg", tarfile.LNKTYPE, 0, "a.jpg is a link, device"),
        ("a.jpg", tarfile.CHRTYPE, 0, "a.jpg is a link, device"),
        ("a.jpg", tarfile.FIFOTYPE, 0, "a.jpg is a link, device"),
        ("/etc/a.jpg", tarfile.REGTYPE, 600, "/etc/a.jpg has a path that leaves the tar"),
        ("x/../../a.jpg", tarfile.REGTYPE, 600, "a.jpg has a path that leaves the tar"),
        ("a\nb.jpg", tarfile.REGTYPE, 600, r"'a\nb.jpg' has a name that cannot be printed"),
        ("a.jpg", tarfile.REGTYPE, 1001, "a.jpg is 1001 bytes, at most 1000 are read"),
        (LONG, tarfile.REGTYPE, 1, "is a header of 405 bytes, at most 400 are read"),
    ],
)
def test_hostile_member_is_named_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: bytes, size: int, message: str
) -> None:
    monkeypatch.setattr(tar, "MAX_BYTES", 1000)
    monkeypatch.setattr(tar, "_MAX_NAME", 400)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(*special(name, kind, size))
        file.addfile(*special("next.txt", tarfile.REGTYPE, 3))
    (problem,) = problems(path)
    assert message in problem and "\n" not in problem
    assert whole(path)[-1] == ("next.txt", bytes(3))


def stated(size: bytes) -> bytes:
    """A header that states this size, with a sound sum."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (256 + sum(header) - sum(header[148:156]))
    return bytes(header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (stated(b"\x80" + (10**15).to_bytes(11, "big")), "a.jpg states 1000000000000000 bytes, the tar has 512 more"),
        (stated(b"77777777777\0"), "a.jpg states 8589934591 bytes"),
        (stated(b"\xff" * 11 + b"\x00"), "is damaged at byte 1024"),  # negative: back to the start, for ever
        (stated(b"-0000001000\0"), "is damaged at byte 1024"),
        (stated(b"00000000001\0")[:-1] + b"x", "is damaged at byte 1024"),  # a sum that is wrong
    ],
)
def test_size_that_cannot_be_ends_the_walk_with_a_line(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    first = write_tar(path, [("first.txt", b"1")], tarfile.GNU_FORMAT).read_bytes()[:1024]
    path.write_bytes(first + header + bytes(512))
    (problem,) = problems(path)
    assert message in problem and "what follows is left out; replace" in problem
    assert whole(path) == [("first.txt", b"1")]


def test_tar_cut_off_anywhere_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    files = [(f"{i}.jpg", bytes([i + 1]) * 700) for i in range(3)]
    path = write_tar(tmp_path / "a.tar", files, tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    for cut in (0, 1, 511, 512, 513, 1100, 1535, 1536, 1600, 2100, 3 * 1536, 3 * 1536 + 512):
        path.write_bytes(data[:cut])
        complete, rest = min(cut // 1536, 3), cut % 1536  # a member has 512 bytes of header, 700 and padding
        within = 0 < rest < 1212 and complete < 3
        assert whole(path) == files[: complete + (rest >= 1212)]
        assert len(problems(path)) == within


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08" + b"z" * 2000, b"plain text"])
def test_other_file_is_no_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert problems(tmp_path / "a.tar") == [
        " is no tar, or a compressed one, at byte 0: what follows is left out; replace it"
    ]


def test_no_change_of_the_bytes_leads_the_walk_astray(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), (LONG, b"2")])
    good, draw = path.read_bytes(), random.Random(0)
    for _ in range(200):
        changed = bytearray(good)
        for _ in range(draw.randrange(1, 9)):
            changed[draw.randrange(5120)] = draw.randrange(256)
        path.write_bytes(changed)
        members = list(walk(path))
        assert [m.offset for m, _ in members] == sorted(m.offset for m, _ in members)
        assert all(problem or 0 <= m.size <= len(good) - m.offset for m, problem in members)


def test_tar_that_is_gone_or_has_shrunk_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1" * 600)])
    ((member, _),) = walk(path)
    path.write_bytes(path.read_bytes()[: member.offset + 100])
    with pytest.raises(DataError, match=r"a\.tar:a\.txt cannot be read as UTF-8 text \(the tar has become shorter"):
        member.read_text()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.tar:a\.txt is missing; restore a\.tar"):
        member.read_text()
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        list(walk(path))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"\xff\xfe")])
    ((member, _),) = walk(tmp_path / "a.tar")
    assert isinstance(member, Member)
    with pytest.raises(DataError, match=r"a\.tar:a\.txt cannot be read as UTF-8 text"):
        member.read_text()
