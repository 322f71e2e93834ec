import pytest

import ldm.data  # noqa: F401  registers the readers
from ldm.data import DataError
from ldm.data.check import check

from .conftest import picture_bytes, write_rows, write_tar


def found(root):
    return {name: len(lines) for name, lines in check(root).problems.items() if lines}


def test_a_sound_set_passes(folder_set):
    report = check(folder_set())
    assert report.ok and report.images == 4
    assert report.lines() == ["folder layout, 4 images: 0 missing, 0 corrupt, 0 mismatched, 0 odd-sized"]


def test_every_kind_of_problem_is_reported(folder_set, picture):
    root = folder_set(20)
    (root / "images/0.png").unlink()
    (root / "images/1.png").write_bytes((root / "images/1.png").read_bytes()[:-30])
    picture(root / "hints/2.png", size=(12, 24))
    picture(root / "images/3.png", size=(32, 32))
    picture(root / "hints/3.png", size=(32, 32))
    (root / "hints/4.png").unlink()
    assert found(root) == {"missing": 2, "corrupt": 1, "mismatched": 1, "odd-sized": 1}
    text = "\n".join(check(root).lines())
    assert "mismatched: hints/2.png is 12x24, its image images/2.png is 24x24" in text
    assert "odd-sized: images/3.png is 32x32, 17 of 18 images are 24x24" in text
    assert "missing: images/0.png (metadata.jsonl line 1)" in text


def test_long_reports_are_cut(folder_set):
    root = folder_set(8)
    for i in range(8):
        (root / f"images/{i}.png").unlink()
    assert check(root).lines(most=3)[-1] == "missing: ... and 5 more"


def test_photos_of_many_sizes_are_not_odd_unless_tiny(tmp_path, picture):
    for i, size in enumerate([(20, 30), (40, 30), (64, 64), (15, 40)]):
        picture(tmp_path / f"{i}.png", size=size)
    write_rows(tmp_path, [{"file": f"{i}.png", "text": "a"} for i in range(4)])
    assert check(tmp_path).problems["odd-sized"] == ["3.png is 15x40, shorter than 16 pixels"]


def test_escaping_paths_are_reported(tmp_path):
    write_rows(tmp_path, [{"file": "../a.png", "text": "a"}])
    assert "leaves the data folder" in check(tmp_path).problems["corrupt"][0]


def test_fill50k(tmp_path, picture):
    picture(tmp_path / "target/0.png")
    picture(tmp_path / "source/0.png", size=(24, 12))
    write_rows(tmp_path, [{"source": "source/0.png", "target": "target/0.png", "prompt": "a"}], "prompt.json")
    assert check(tmp_path).layout == "fill50k" and found(tmp_path) == {"mismatched": 1}


def test_sidecar(tmp_path, picture):
    for name in ("a.png", "b.png", "hints/a.png", "c.png"):
        picture(tmp_path / name, size=(24, 12) if name == "hints/a.png" else (24, 24))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    report = check(tmp_path)
    assert report.images == 2
    assert report.problems["missing"] == ["c.txt, the caption of c.png"]
    assert report.problems["mismatched"] == ["hints/a.png is 24x12, its image a.png is 24x24"]


def test_a_config_is_checked_as_its_reader_reads(tmp_path):
    whole, other = picture_bytes(), picture_bytes(size=(20, 24))
    files = [(f"{n}.{end}", data) for n in range(4) for end, data in (("png", whole), ("txt", b"a"), ("e.png", whole))]
    files[3], files[8] = ("1.png", whole[:-30]), ("2.e.png", other)
    write_tar(tmp_path / "a.tar", files)
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {{name: webdataset, root: {tmp_path}, size: 16, hints: {{edge: e.png}}}}")
    report = check(file)
    assert {name: len(lines) for name, lines in report.problems.items() if lines} == {"corrupt": 1, "mismatched": 1}
    assert report.lines()[0].startswith("webdataset layout, 4 images: 0 missing, 1 corrupt")
    assert "a.tar:1.png cannot be decoded" in report.problems["corrupt"][0]
    file.write_text("data: {name: synthetic, size: 16}")
    with pytest.raises(DataError, match="config.yaml has no data node that reads files"):
        check(file)


def test_no_data_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no images; a data set has metadata\.jsonl, prompt\.json, or images"):
        check(tmp_path)
