import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import adapters  # noqa: F401  registers the hint extractors
import ldm.data  # noqa: F401  registers the readers
from ldm.data import DataError, collate, reading
from ldm.data.entries import Entry, EntryData, EntryOptions
from ldm.data.records import split_by_hash
from ldm.registry import ConfigError, build

from .conftest import keys, picture_bytes, write_rows, write_tar

Files = list[tuple[str, bytes]]


def record(number: int, **fields: Any) -> Files:
    """A sample as img2dataset writes it, with an edge map."""
    key = f"{number:09d}"
    fields = {"caption": f"json {number}", "key": key, "status": "success", "width": 24, **fields}
    return [
        (f"{key}.jpg", picture_bytes((9 * number, 0, 0), kind="jpeg")),
        (f"{key}.txt", f"text {number}\n".encode()),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.canny.png", picture_bytes((255, 255, 255), (0, 0, 0))),
    ]


def shards(root: Path, shards: int = 2, samples: int = 3) -> Path:
    for shard in range(shards):
        numbers = range(10000 * shard, 10000 * shard + samples)
        write_tar(root / f"{shard:05d}.tar", [file for n in numbers for file in record(n % 10, shard=shard, n=n)])
    return root


def webdataset(root: Path, **options: Any) -> Any:
    return build("data", {"name": "webdataset", "root": str(root), "size": 16, **options})


def test_samples_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    data = webdataset(shards(tmp_path), hints={"edge": "canny.png"})
    assert keys(data) == [f"{shard:05d}/{n:09d}" for shard in range(2) for n in range(3)]
    sample = data[1]
    assert sample.text == "text 1" and sample.reference is None and data[4].key == "00001/000000001"
    assert sample.hints["edge"][0, 5].tolist() == [1.0] * 8 + [0.0] * 8
    assert abs(float(sample.image[0, 5, 2]) - (9 / 127.5 - 1)) < 0.02
    with pytest.raises(IndexError, match="index is 6; the set has 6 samples"):
        data[6]


class Many:
    """A packed set of 100 whose first sample has a reference that is gone; notes which are asked for."""

    files = ()

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[int]()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Entry:
        self.asked.append(index)
        image = self.root / "a.png"
        return Entry(str(index), image, "", {}, (image if index else self.root / "gone.png",))


def test_a_bad_reference_does_not_list_a_packed_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture_bytes((9, 0, 0)))
    entries = Many(tmp_path)
    assert EntryData(EntryOptions(str(tmp_path), 16, reference="file"), entries)[0].key == "1"
    assert entries.asked == [0, 1]


def test_every_view_is_bit_equal_to_that_of_a_folder_with_the_same_files(tmp_path: Path) -> None:
    shards(tmp_path / "tars")
    rows = []
    for n in range(3):
        for name, data in record(n):
            (tmp_path / name).write_bytes(data)
        rows.append({"file": f"{n:09d}.jpg", "text": f"text {n}", "edge": f"{n:09d}.canny.png"})
    write_rows(tmp_path, rows)
    shared = {"size": 12, "crop": "random", "oversize": 1.5, "flip": True}
    shared["reference"] = {"same": "file", "itself": True, "flip": True, "crop": 0.5, "size": 8}
    folder = build("data", {"name": "folder", "root": str(tmp_path), "hints": {"x": "edge"}, **shared})
    packed = webdataset(tmp_path / "tars", hints={"x": "canny.png"}, **shared)
    for n in range(3):
        a, b = (data.load(n, torch.Generator().manual_seed(n)) for data in (folder, packed))
        assert a.text == b.text and torch.equal(a.image, b.image) and torch.equal(a.hints["x"], b.hints["x"])
        assert b.reference.shape == (3, 8, 8)
    name = packed.references("00000/000000001")[0]
    assert torch.equal(packed.reference(name), folder.reference(folder.references("000000001.jpg")[0]))


@pytest.mark.parametrize("memory", [True, False])
def test_more_workers_than_shards_give_the_same_samples(tmp_path: Path, memory: bool) -> None:
    data = webdataset(shards(tmp_path, shards=1), reference="file", memory=memory)
    alone = [data[i] for i in range(3)]
    loader = DataLoader(data, batch_size=1, num_workers=2, collate_fn=collate)
    copy = pickle.loads(pickle.dumps(data))  # what a spawned worker gets
    for one, batch, other in zip(alone, loader, (copy[i] for i in range(3)), strict=True):
        assert (
            [one.key] == batch.keys and torch.equal(one.image, batch.image[0]) and torch.equal(one.image, other.image)
        )
        assert torch.equal(one.reference, batch.reference[0]) and one.text == other.text


def test_caption_may_be_a_field_of_the_json(tmp_path: Path) -> None:
    files = [*record(0), *record(1, caption=None), *record(2, caption=["a"]), *record(3, caption="\ud800")]
    write_tar(tmp_path / "a.tar", [file for file in files if not file[0].endswith("txt")])
    data = webdataset(tmp_path, caption="json.caption", max_bad=1)
    assert {data[i].text for i in range(4)} == {"json 0"} and len(data.bad) == 3
    assert [what.partition(": ")[2].partition(" is ")[0] for what in data.bad.values()][:2] == ["caption", "caption"]


def test_where_is_about_the_json_and_the_split_is_by_hash(tmp_path: Path) -> None:
    root = shards(tmp_path, samples=9)
    data = webdataset(root, where={"shard": 1, "n": [10001, 10005, 3]})
    assert keys(data) == ["00001/000000001", "00001/000000005"]
    train = keys(webdataset(root, where={"split": "train"}))
    assert train == [key for key in keys(webdataset(root)) if split_by_hash(key) == "train"]
    write_tar(root / "00000.tar", [*record(0, split="test"), *record(1)])
    assert keys(webdataset(root / "00000.tar", where={"split": "test"})) == ["00000/000000000"]


def test_roots_are_folders_files_or_patterns(tmp_path: Path) -> None:
    shards(tmp_path / "a[1]", shards=3, samples=1)
    shards(tmp_path / "b", shards=1, samples=1)
    (tmp_path / "b/notes.txt").write_text("no shard")
    assert keys(webdataset(tmp_path / "a[1]")) == [f"0000{n}/000000000" for n in range(3)]
    assert keys(webdataset(tmp_path / "b/00000.tar")) == ["00000/000000000"]
    assert keys(webdataset(tmp_path / "**/00000.tar")) == ["a[1]/00000/000000000", "b/00000/000000000"]
    assert len(webdataset(tmp_path / "*/0000[01].tar")) == 3


def test_samples_that_lack_a_file_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = [*record(0)[:3], *record(1)[1:], *[record(2)[i] for i in (0, 2, 3)], *record(3)]
    write_tar(tmp_path / "a.tar", [("._0.jpg", b""), ("readme", b""), *files])
    assert keys(webdataset(tmp_path, hints={"x": "canny.png"}, max_bad=0)) == ["a/000000003"]
    assert "1 of 4 samples in 1 shards; 3 lack one of a picture, txt, canny.png; 0 members left out" in caplog.text


def test_a_second_picture_is_a_hint_or_a_mistake(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*record(0), ("000000000.png", picture_bytes())])
    assert list(webdataset(tmp_path, hints={"x": "png"})[0].hints) == ["x"]
    with pytest.raises(
        ConfigError, match=r"000000000\.png has other pictures of its key \(\.png and \.jpg\); name a hint"
    ):
        webdataset(tmp_path)


def test_hostile_members_are_counted_and_nothing_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [("../../evil.jpg", b"1"), ("/evil.jpg", b"1"), ("000000000.jpg", b"again"), ("000000005.txt", b"1" * 2**21)]
    write_tar(tmp_path / "set/00000.tar", [*record(0), *record(1), *bad])
    data = webdataset(tmp_path / "set", max_bad=0.7)
    assert keys(data) == ["00000/000000000", "00000/000000001"] and float(data[0].image[0, 0, 0]) < -0.95
    for words in (
        "path that leaves the tar",
        "is in its tar twice; the first is read",
        "at most 1048576 are read as text",
    ):
        assert words in caplog.text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000.tar", "set"]
    with pytest.raises(
        ConfigError, match=r"4 of 6 images cannot be read, data.max_bad is 0.5: .*00000\.tar:"
    ) as caught:
        webdataset(tmp_path / "set", max_bad=0.5)
    assert "\n" not in str(caught.value)


def test_bombs_and_damaged_pictures_are_skipped_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_PIXELS", 24 * 24)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # Pillow would start Ghostscript
    pictures = [picture_bytes(), picture_bytes(size=(40, 30)), picture_bytes()[:60], eps]
    files = [file for n, picture in enumerate(pictures) for file in ((f"{n}.jpg", picture), (f"{n}.txt", b"x"))]
    write_tar(tmp_path / "a.tar", files)
    data = webdataset(tmp_path, max_bad=1)
    assert {data[i].key for i in range(4)} == {"a/0"}
    bomb, cut, other = data.bad.values()
    assert bomb.endswith("a.tar:1.jpg is 40x30, more than 576 pixels; shrink it first")
    assert "a.tar:2.jpg" in cut and other.endswith(
        "3.jpg is not a readable image (unknown format); replace or remove it"
    )
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read, data.max_bad is 0.2: .*a\.tar:1\.jpg"):
        webdataset(tmp_path, max_bad=0.2)[1]


def test_shard_cut_off_gives_its_complete_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shards(tmp_path, shards=1) / "00000.tar"
    path.write_bytes(path.read_bytes()[:-12000])
    data = webdataset(tmp_path, max_bad=0.4)
    assert 0 < len(data) < 3 and keys(data) == [f"00000/{n:09d}" for n in range(len(data))]
    assert "what follows is left out; replace" in caplog.text


def test_shard_deleted_during_training_stops_with_its_name(tmp_path: Path) -> None:
    data = webdataset(shards(tmp_path), max_bad=0.4)
    (tmp_path / "00001.tar").unlink()
    assert data[0].key == "00000/000000000"
    with pytest.raises(DataError, match=r"3 of 6 images cannot be read, .*00001\.tar:000000000\.jpg"):
        data[3]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, "none of the 0 samples in .* has all of a picture, txt"),
        (record(0), {"caption": "caption"}, "names 'caption'; members in .* end in .*json.FIELD is a field"),
        (record(0), {"hints": {"x": "cany.png"}}, "names 'cany.png'; members in .*did you mean 'canny.png'"),
        (record(0), {"where": {"widht": 24}}, "data.where has column 'widht'; .*did you mean 'width'"),
        (record(0), {"where": {"width": 25}}, "matches none of the 1 images of .*; it has width: 24"),
        ([*record(0)[:2], ("000000000.json", b"[" * 9999)], {"where": {"n": 1}}, "000000000.json is not JSON"),
        ([*record(0)[:2], ("000000000.json", b"[]")], {"where": {"n": 1}}, "json is a list, must be an object"),
        (record(0), {"reference": "canny.png"}, "data.reference is 'canny.png'; of shards and tables it is file"),
        (record(0), {"reference": {"same": "width"}}, "data.reference is .*same.*; of shards and tables it is file"),
        (record(0), {"root": "/nowhere"}, "data.root /nowhere has no .tar files"),
        (record(0), {"captions": "txt"}, "unknown keys.*did you mean 'caption'"),
        (record(0), {"size": 4}, "data.size is 4; must be a whole number of at least 8"),
    ],
)
def test_bad_sets_and_options_get_one_clear_line(
    tmp_path: Path, files: Files, options: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ConfigError, match=message) as caught:
        webdataset(**{"root": tmp_path, **options})
    assert "\n" not in str(caught.value)
