import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import ldm.data  # noqa: F401  registers the readers
from ldm.data import DataError, collate, parquet
from ldm.data.records import split_by_hash
from ldm.registry import ConfigError, build

from .conftest import keys, picture_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def packed(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    """A picture as the feature Image of datasets stores it."""
    return {"bytes": data, "path": path}


def table(path: Path, rows: int = 6, group: int = 2, **columns: list[Any]) -> Path:
    """A file of a data set as `Dataset.to_parquet` writes it, with a hint and a number."""
    made: dict[str, list[Any]] = {
        "image": [packed(picture_bytes((9 * i, 0, 0)), f"{i}.png") for i in range(rows)],
        "conditioning_image": [packed(picture_bytes((255, 255, 255), (0, 0, 0))) for _ in range(rows)],
        "text": [f"text {i}" for i in range(rows)],
        "width": [i % 3 for i in range(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**made, **columns}), path, row_group_size=group)
    return path


def reader(root: Path, **options: Any) -> Any:
    return build("data", {"name": "parquet", "root": str(root), "size": 16, **options})


def test_rows_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    table(tmp_path / "train-00000-of-00002.parquet", rows=3)
    table(tmp_path / "train-00001-of-00002.parquet", rows=4, caption=[f"other {i}" for i in range(4)])
    table(tmp_path / "test-00000-of-00001.parquet", rows=1)
    data = reader(tmp_path / "train-*.parquet", hints={"edge": "conditioning_image"}, reference="file")
    assert keys(data) == [
        *(f"train-00000-of-00002/{i}" for i in range(3)),
        *(f"train-00001-of-00002/{i}" for i in range(4)),
    ]
    sample = data[5]
    assert sample.text == "text 2" and torch.equal(sample.reference, sample.image)
    assert abs(float(sample.image[0, 5, 2]) - (18 / 127.5 - 1)) < 1e-6
    assert sample.hints["edge"][0, 5].tolist() == [1.0] * 8 + [0.0] * 8
    with pytest.raises(
        ConfigError, match=r"00000-of-00002\.parquet has 0 columns 'caption', must have one; it has image, .*text"
    ):
        reader(tmp_path / "train-*.parquet", caption="caption")


def test_plain_bytes_and_dictionaries_of_captions_are_read(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    table(tmp_path / "a.parquet", rows=3, jpg=[picture_bytes(kind="jpeg")] * 3, words=words)
    data = reader(tmp_path, image="jpg", caption="words")
    assert [data[i].text for i in range(3)] == ["a", "b", "a"] and float(data[0].image[0, 0, 0]) > 0.9


def test_workers_and_copies_give_the_same_samples(tmp_path: Path) -> None:
    data = reader(table(tmp_path / "a.parquet"), crop="random", flip=True)
    alone = [data[i] for i in range(6)]  # its row groups are in memory when the workers are forked
    copy = pickle.loads(pickle.dumps(data))
    loader = DataLoader(data, batch_size=1, num_workers=2, collate_fn=collate)
    for i, (one, batch) in enumerate(zip(alone, loader, strict=True)):
        assert [one.key] == batch.keys and torch.equal(one.image, batch.image[0]) and batch.text == [one.text]
        views = [which.load(i, torch.Generator().manual_seed(i)).image for which in (data, copy)]
        assert torch.equal(*views)


def test_a_few_row_groups_are_held_and_of_them_the_wanted_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "a.parquet")
    rows = parquet.ParquetRows(parquet.ParquetOptions(str(tmp_path), 16))
    rows[0].image.read_bytes()
    (first,) = rows._kept.values()
    assert first.num_rows == 2 and first.column_names == ["image", "text"]
    monkeypatch.setattr(parquet, "_KEPT", 2 * first.nbytes + 100)
    for index in (2, 1, 4):
        rows[index].image.read_bytes()
    assert list(rows._kept) == [0, 2]  # group 1 was not used for longest


def test_where_is_about_columns_and_the_split_is_by_hash(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", rows=60, group=7)
    assert keys(reader(tmp_path, where={"width": [1], "text": ["text 4", "text 7", "text 9"]})) == ["a/4", "a/7"]
    everything = keys(reader(tmp_path))
    train = keys(reader(tmp_path, where={"split": "train"}))
    assert train == [key for key in everything if split_by_hash(key) == "train"] and len(train) < 60
    table(tmp_path / "a.parquet", rows=2, split=["train", "test"])
    assert keys(reader(tmp_path, where={"split": "test"})) == ["a/1"]


def test_cells_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    good = packed(picture_bytes())
    images = [good, packed(None, "far/away.jpg"), None, packed(b"nothing"), good]
    table(tmp_path / "a.parquet", rows=5, image=images, text=["a", "b", "c", "d", None])
    data = reader(tmp_path, max_bad=1)
    assert set(keys(data)) == {"a/0"}
    path, none, other, text = data.bad.values()
    assert path == (
        "a/1, image is {'bytes': None, 'path': 'far/away.jpg'}, must have bytes; write the set with its pictures inside"
    )
    assert none.startswith("a/2, image is None") and other.startswith("a/3, image is not a readable image")
    assert text == "a/4: text is None, must be text"
    with pytest.raises(DataError, match=r"1 of 5 images cannot be read, data.max_bad is 0.01: a/1, image; last: "):
        reader(tmp_path)[1]


def test_damaged_and_deleted_files_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet")
    data = reader(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match=r"1 of 6 images .* last: .*a\.parquet cannot be read \(.*replace or remove"):
        data[0]
    path.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read \(.*replace or remove it") as caught:
        reader(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    data.bad.clear()
    with pytest.raises(DataError, match=r"last: .*a\.parquet is missing; restore it"):
        data[0]


def test_row_groups_that_are_too_large_are_refused(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", note=[f"{i}" * 10**6 for i in range(6)])
    monkeypatch.setattr(parquet, "_SLOW", 1)
    assert len(reader(path)) == 6
    assert "has a row group of 1 MiB, which is read whole for one row; it will be slow: write it anew" in caplog.text
    monkeypatch.setattr(parquet, "_MOST", 1)
    with pytest.raises(ConfigError, match=r"a row group of 1 MiB, .*; at most 1 MiB: .*row_group_size=100"):
        reader(path)


def test_row_groups_that_grow_when_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(
        tmp_path / "a.parquet", rows=64, group=64, image=[packed(bytes(40000))] * 64
    )  # 2.4 MiB, once in the file
    monkeypatch.setattr(parquet, "_MOST", 1)
    data = reader(path)
    with pytest.raises(DataError, match=r"row group 0 has more than 1 MiB; write it anew with row_group_size=100"):
        data[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "img"}, "has 0 columns 'img', must have one; it has image, conditioning_image, text, width"),
        ({"hints": {"x": "conditioning_imag"}}, "did you mean 'conditioning_image'"),
        ({"image": "text"}, "column 'text' is string, must hold pictures"),
        ({"caption": "width"}, "column 'width' is int64, must hold text"),
        ({"hints": {"x": "width"}}, "column 'width' is int64, must hold pictures"),
        ({"where": {"wide": 1}}, "has 0 columns 'wide'"),
        ({"where": {"width": 9}}, "matches none of the 6 images of .*; it has width: 0, 1, 2"),
        (
            {"reference": "conditioning_image"},
            "data.reference is 'conditioning_image'; of shards and tables it is file",
        ),
        ({"root": "/nowhere/*.parquet"}, r"data.root /nowhere/\*.parquet has no .parquet files"),
    ],
)
def test_bad_options_get_one_clear_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    table(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=message) as caught:
        reader(**{"root": tmp_path, **options})
    assert "\n" not in str(caught.value)


def test_files_without_rows_are_named(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(table(tmp_path / "a.parquet")).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no rows in 1 files"):
        reader(tmp_path)


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"parquet needs pyarrow, which is not installed: pip install .*\[parquet\]"):
        reader(tmp_path)
