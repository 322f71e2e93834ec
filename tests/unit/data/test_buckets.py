import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import adapters  # noqa: F401  registers the hint extractors
import ldm.data  # noqa: F401  registers the readers
from ldm import build
from ldm.data import DataError, collate
from ldm.data.buckets import Buckets, Shelves
from ldm.data.preview import write_preview
from ldm.data.tar import Member
from ldm.registry import ConfigError

from .conftest import write_rows, write_tar

SIZES = {"sizes": [[16, 24], [16, 16], [24, 16]]}


def test_usual_sizes_are_those_that_novelai_and_sdxl_train_on() -> None:
    upright = [(h, w) for h, w in Buckets(ratio=2.0).shapes(1024) if h > w]
    assert upright == [(1344, 768), (1216, 832), (1152, 896), (1088, 960)]  # by hand: 1024 * 1024 // 768 // 64 * 64
    every = Buckets().shapes(512)
    assert every == ((1024, 256), (768, 320), (640, 384), (576, 448), (512, 512), *((w, h) for h, w in every[3::-1]))
    assert Buckets(step=16).shapes(16) == ((16, 16),)


def test_each_picture_goes_to_the_nearest_shape() -> None:
    shelves = Shelves(Buckets(**tuples(SIZES)).shapes(16), [(30, 20), (100, 90), (1, 9), None, (7, 5)])
    assert {name: list(group) for name, group in shelves.groups.items()} == {"16x24": [2], "16x16": [1], "24x16": [0, 4]}
    assert shelves.shape(0) == (16, 24) and list(shelves.alike(4)) == [4, 0]
    assert list(shelves.alike(3)) == [4, 0]  # unreadable: those of the next one's shelf


def tuples(node: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(map(tuple, value)) for key, value in node.items()}


def noise_set(root: Path, sizes: list[tuple[int, int]], turned: int = -1) -> Path:
    """Pictures of noise, each its own hint; one may be stored on its side."""
    rows = []
    for i, size in enumerate(sizes):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == turned else 1
        Image.effect_noise(size, 100).convert("RGB").save(root / f"{i}.png", exif=exif)
        rows.append({"file": f"{i}.png", "text": str(i), "h": f"{i}.png"})
    write_rows(root, rows)
    return root


def folder(root: Path, **options: Any) -> Any:
    return build.data({"name": "folder", "root": str(root), "size": 16, "buckets": SIZES, **options})


@pytest.mark.parametrize("crop", ["random", "center", "none"])
def test_image_hints_and_mask_are_cut_alike(tmp_path: Path, crop: str) -> None:
    noise_set(tmp_path, [(24, 16), (16, 24), (30, 16), (16, 16)])
    data = folder(tmp_path, hints={"x": "h", "mask": "h"}, crop=crop, flip=True, oversize=1.0)
    shapes = {tuple(data[i].image.shape[1:]) for i in range(4)}
    assert shapes == {(16, 24), (24, 16), (16, 16)} and data.groups().keys() == {"16x24", "16x16", "24x16"}
    views = [data.load(i, torch.Generator().manual_seed(seed)) for i in range(4) for seed in range(6)]
    for view in views if crop != "none" else views[:12]:  # those are resampled, and hints by another filter
        torch.testing.assert_close(view.hints["x"] * 2 - 1, view.image, atol=1e-5, rtol=0)
        assert torch.equal(view.hints["x"], view.hints["mask"])
    assert len({view.image.numpy().tobytes() for view in views if view.key == "2.png"}) > 1


def test_a_picture_stored_on_its_side_is_put_where_it_is_shown(tmp_path: Path) -> None:
    data = folder(noise_set(tmp_path, [(24, 16), (24, 16)], turned=1))
    assert [tuple(data[i].image.shape[1:]) for i in (0, 1)] == [(16, 24), (24, 16)]


def test_origin_says_size_of_the_file_and_where_it_was_cut(tmp_path: Path) -> None:
    noise_set(tmp_path, [(64, 32), (24, 16)])
    data = folder(tmp_path, flip=True, crop="random")
    assert data[0].origin == (32, 64, 0, 4) and data[1].origin == (16, 24, 0, 0)  # 64x32 becomes 32x16, of which 24
    whole = folder(tmp_path, buckets=None, size=16)[0]
    assert whole.origin == (32, 64, 0, 8)
    squeezed = folder(tmp_path, crop="none")[0]
    assert squeezed.origin == (32, 64, 0, 0)
    wide = Image.new("RGB", (64, 32))
    for x in range(64):
        wide.paste((4 * x, 0, 0), (x, 0, x + 1, 32))
    wide.save(tmp_path / "0.png")
    views = [folder(tmp_path, flip=True, crop="random").load(0, torch.Generator().manual_seed(s)) for s in range(12)]
    for view in views:  # what stands at the left edge of a mirrored picture is as far from its edge as `origin` says
        row = view.image[0, 8] if view.image[0, 8, 0] < view.image[0, 8, -1] else -view.image[0, 8]
        assert abs(float(row[0] * 127.5 + 127.5) / 8 - view.origin[3]) < 1.0
    assert len({bool(view.image[0, 8, 0] < view.image[0, 8, -1]) for view in views}) == 2
    origin = collate(views[:2]).to("cpu").origin
    assert origin is not None and origin.tolist() == [list(view.origin) for view in views[:2]]


def test_a_damaged_picture_is_replaced_by_one_of_its_bucket(tmp_path: Path) -> None:
    noise_set(tmp_path, [(24, 16), (16, 16), (24, 16), (16, 16)])
    damaged = tmp_path / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    data = folder(tmp_path, max_bad=0.5)
    assert [data[i].key for i in range(4)] == ["2.png", "1.png", "2.png", "3.png"]
    other = tmp_path / "2.png"
    other.write_bytes(other.read_bytes()[:-40])
    with pytest.raises(DataError, match="none of the bucket of image 0 in .* can be decoded"):
        folder(tmp_path, max_bad=0.5)[0]


def test_image_prompts_stay_squares_and_the_preview_shows_all(tmp_path: Path) -> None:
    data = folder(noise_set(tmp_path, [(24, 16), (16, 24)]), reference="file")
    assert data[0].image.shape == (3, 16, 24) and data[0].reference.shape == (3, 16, 16)
    square = folder(tmp_path, reference="file", buckets=None)
    assert torch.equal(data[0].reference, square[0].reference)
    assert write_preview(data, tmp_path / "preview.png") == 2


def jpeg(size: tuple[int, int], profile: int = 0) -> bytes:
    """A JPEG whose header is longer than `profile` bytes."""
    Image.new("RGB", size).save(file := io.BytesIO(), "jpeg", icc_profile=b"x" * profile)
    return file.getvalue()


def test_shards_are_sorted_by_their_json_or_by_headers_alone(tmp_path: Path, monkeypatch: Any) -> None:
    files = []
    for n, (size, said) in enumerate([((24, 16), None), ((16, 24), {}), ((16, 16), {"width": 30, "height": 20})]):
        files += [(f"{n}.jpg", jpeg(size, 0 if n else 40_000)), (f"{n}.txt", b"a")]
        files += [(f"{n}.json", json.dumps(said).encode())] if said is not None else []
    files += [("3.jpg", b"no picture"), ("3.txt", b"a")]
    write_tar(tmp_path / "a.tar", files)
    read: list[str] = []
    whole = Member.read_bytes
    monkeypatch.setattr(Member, "read_bytes", lambda m: (read.append(f"{m.name} {m.size > 2**15}"), whole(m))[1])
    data: Any = build.data({"name": "webdataset", "root": str(tmp_path), "size": 16, "buckets": SIZES, "max_bad": 0.5})
    groups = {name: list(indices) for name, indices in data.groups().items()}
    assert groups == {"24x16": [0, 2], "16x24": [1]} and len(data.bad) == 1
    assert [name for name in read if "jpg" in name][:3] == ["0.jpg False", "0.jpg True", "1.jpg False"]
    assert "2.jpg False" not in read  # its json says it
    assert [tuple(data[i].image.shape[1:]) for i in range(3)] == [(16, 24), (24, 16), (16, 24)]


@pytest.mark.parametrize("columns", [True, False])
def test_tables_are_sorted_by_their_columns_or_by_headers(tmp_path: Path, columns: bool) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sizes = [(24, 16), (16, 24), (24, 16)]
    made = {"image": [jpeg(size) for size in sizes], "text": ["a"] * 3}
    stated = {"width": [24, 24, None], "height": [16, 16, 16]} if columns else {}  # the second is not as said
    pq.write_table(pa.table(made | stated), tmp_path / "a.parquet", row_group_size=2)
    data = build.data({"name": "parquet", "root": str(tmp_path), "size": 16, "buckets": SIZES})
    groups = {name: list(indices) for name, indices in data.groups().items()}
    assert groups == ({"24x16": [0, 1, 2]} if columns else {"24x16": [0, 2], "16x24": [1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": {}}, r"data\.size is 16, must be a multiple of data\.buckets\.step \(64\)"),
        ({"buckets": {"step": 4}}, r"data\.buckets\.step is 4, must be at least 8"),
        ({"buckets": {"ratio": 0.5}}, r"data\.buckets\.ratio is 0\.5, must be at least 1"),
        ({"buckets": {"sizes": [[16, 4]]}}, "has 16x4; both sides must be at least 8"),
        ({"buckets": {"sizes": [[16, 24], [32, 48]]}}, "has 16x24 and 32x48, of one shape; drop one"),
        ({"buckets": {"sizes": [[16, 24, 1]]}}, r"data\.buckets: sizes is"),
        ({"buckets": {"stpe": 64}}, "did you mean 'step'"),
    ],
)
def test_bad_buckets_get_one_clear_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder(noise_set(tmp_path, [(16, 16)]), **options)


def test_what_is_held_out_has_one_size(tmp_path: Path) -> None:
    node = {"name": "folder", "root": str(noise_set(tmp_path, [(24, 16), (16, 16)])), "size": 16, "buckets": SIZES}
    with pytest.raises(ConfigError, match=r"validation\.data\.buckets is set; what is held out is of one size"):
        build.data(node, "validation.data")
