import pytest
from PIL import Image

import ldm.data  # noqa: F401  registers the readers
from ldm.data import DataError
from ldm.data.preview import write_preview
from ldm.registry import build


def test_preview_shows_the_pixels_the_network_sees(tmp_path):
    data = build("data", {"name": "synthetic", "size": 16, "hints": ["edge"], "length": 3})
    assert write_preview(data, tmp_path / "new/p.png", count=12) == 3
    sheet = Image.open(tmp_path / "new/p.png")
    sample = data[0]
    for tile, picture in enumerate([sample.image / 2 + 0.5, sample.hints["edge"]]):
        for y, x in ((0, 0), (8, 8), (11, 4)):  # 16 px are shown 8 times as large, under a label of 12 px
            seen = sheet.getpixel((6 + tile * 134 + 8 * x + 3, 6 + 12 + 8 * y + 3))
            assert seen == tuple(int(v) for v in (picture[:, y, x] * 255).round())


def test_preview_is_the_same_twice_and_replaces_only_a_complete_one(tmp_path, folder_set):
    data = build("data", {"name": "folder", "root": str(folder_set()), "size": 16, "flip": True, "reference": "file"})
    write_preview(data, tmp_path / "a.png", seed=1)
    first = (tmp_path / "a.png").read_bytes()
    write_preview(data, tmp_path / "a.png", seed=1)
    assert (tmp_path / "a.png").read_bytes() == first and len(list(tmp_path.glob("*.png"))) == 1


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    data = build("data", {"name": "synthetic", "size": 16, "length": 1})
    with pytest.raises(DataError, match=r"cannot write .*p\.png.*give another --out"):
        write_preview(data, tmp_path / "file/p.png")
