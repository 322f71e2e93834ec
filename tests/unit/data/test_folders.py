import json

import pytest
import torch
from PIL import Image

import adapters  # noqa: F401  registers the hint extractors
import ldm.data  # noqa: F401  registers the readers
from ldm.data import DataError
from ldm.registry import ConfigError, build

from .conftest import write_rows


def folder(root, **options):
    return build("data", {"name": "folder", "root": str(root), "size": 16, **options})


def test_folder_gives_image_text_hint_and_reference(folder_set):
    data = folder(folder_set(), hints={"lines": "edges"}, reference="file")
    sample = data[1]
    assert len(data) == 4 and sample.key == "images/1.png" and sample.text == "picture 1"
    assert sample.image[:, 5, 2].tolist() == [1, -1, -1] and sample.image[:, 5, 13].tolist() == [-1, -1, 1]
    assert sample.hints["lines"][:, 5, 2].tolist() == [1, 1, 1] and sample.hints["lines"].amin() == 0
    assert sample.reference is not None and torch.equal(sample.reference, sample.image)


def test_hints_may_be_made_of_the_picture_itself(folder_set):
    data = folder(folder_set(), hints={"lines": "edges", "palette": {"name": "color", "cell": 4}}, flip=True)
    for view in (data[0], data.load(0, torch.Generator().manual_seed(1))):
        image = view.image / 2 + 0.5
        assert list(view.hints) == ["lines", "palette"]
        torch.testing.assert_close(view.hints["palette"], build("hint", {"name": "color", "cell": 4})(image[None])[0])
    assert folder(folder_set(), hints={"x": {"name": "sketch"}})[0].hints["x"].shape == (3, 16, 16)


def test_huggingface_column_name_is_understood(tmp_path, picture):
    picture(tmp_path / "a.png")
    write_rows(tmp_path, [{"file_name": "a.png", "text": "a"}])
    assert folder(tmp_path)[0].key == "a.png"


@pytest.mark.parametrize(
    "where", [{"split": "heldout"}, {"split": ["heldout", "other"], "text": ["picture 1", "picture 3"]}]
)
def test_where_selects_rows(folder_set, where):
    data = folder(folder_set(), where=where)
    assert [data[i].text for i in range(len(data))] == ["picture 1", "picture 3"]


def test_rows_without_the_wanted_hint_are_left_out(tmp_path, picture):
    picture(tmp_path / "a.png")
    picture(tmp_path / "h.png")
    write_rows(tmp_path, [{"file": "a.png", "text": "a", "h": None}, {"file": "a.png", "text": "b", "h": "h.png"}])
    assert [len(folder(tmp_path)), len(folder(tmp_path, hints={"x": "h"}))] == [2, 1]


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (24, 33)])
@pytest.mark.parametrize("crop", ["random", "none", "center"])
@pytest.mark.parametrize("memory", [True, False])
def test_image_and_hint_get_the_same_crop_and_flip(tmp_path, size, crop, memory):
    noise = Image.effect_noise(size, 100).convert("RGB")
    noise.save(tmp_path / "a.png")
    noise.save(tmp_path / "h.png")
    write_rows(tmp_path, [{"file": "a.png", "text": "a", "h": "h.png"}])
    data = folder(tmp_path, hints={"x": "h"}, crop=crop, flip=True, memory=memory, size=min(size))  # no resampling
    generator = torch.Generator().manual_seed(0)
    views = [data.load(0, generator) for _ in range(12)]
    for view in views if crop != "none" else views[:0]:
        torch.testing.assert_close(view.hints["x"] * 2 - 1, view.image, atol=1e-5, rtol=0)
    assert len({view.image.numpy().tobytes() for view in views}) > 1
    assert torch.equal(data[0].image, data.load(0, None).image)


def test_the_same_generator_gives_the_same_view(folder_set):
    data = folder(folder_set(size=(40, 24)), crop="random", flip=True)
    views = [data.load(0, torch.Generator().manual_seed(7)).image for _ in range(2)]
    assert torch.equal(*views)


def test_fill50k_red_pixel_stays_red_and_ranges_hold(tmp_path, picture):
    rows = []
    for i in range(3):
        picture(tmp_path / f"target/{i}.png", left=(255, 0, 0), right=(0, 128, 255))
        picture(tmp_path / f"source/{i}.png", left=(255, 255, 255), right=(0, 0, 0))
        rows.append({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"circle {i}"})
    write_rows(tmp_path, rows, "prompt.json")
    node = {"name": "fill50k", "root": str(tmp_path), "size": 24, "hints": {"circle": "source"}}
    data = build("data", node)
    sample = data[2]
    assert len(data) == 3 and sample.text == "circle 2" and sample.key == "target/2.png"
    assert sample.image[:, 0, 0].tolist() == [1, -1, -1]
    torch.testing.assert_close(sample.image[:, 0, -1], torch.tensor([-1, 128 / 127.5 - 1, 1]), atol=1e-6, rtol=0)
    assert sample.hints["circle"].unique().tolist() == [0, 1]
    assert len(build("data", {**node, "where": {"split": ["train", "heldout"]}})) == 3


def test_sidecar_reads_captions_and_hints_of_the_same_name(tmp_path, picture):
    picture(tmp_path / "b/2.jpg")
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b/2.txt").write_text("second")
    picture(tmp_path / "lines/a.png", left=(255, 255, 255), right=(0, 0, 0))
    picture(tmp_path / "lines/b/2.png", left=(0, 0, 0), right=(255, 255, 255))
    data = build("data", {"name": "sidecar", "root": str(tmp_path), "size": 24, "hints": {"edge": "lines"}})
    assert [(data[i].key, data[i].text) for i in range(len(data))] == [("a.png", "first"), ("b/2.jpg", "second")]
    assert data[0].hints["edge"][0, 0, 0] == 1 and data[1].hints["edge"][0, 0, 0] == 0


def test_sidecar_image_without_caption_is_named(tmp_path, picture):
    picture(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png has no caption; write one to a\.txt"):
        build("data", {"name": "sidecar", "root": str(tmp_path), "size": 24})


def damage(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_unreadable_images_are_skipped_and_counted(folder_set, caplog):
    root = folder_set(10)
    (root / "images/3.png").write_bytes(b"nothing")  # seen in the header, when the set is built
    damage(root / "images/5.png")  # seen when the pixels are decoded
    data = folder(root, max_bad=0.2)
    assert len(data) == 9
    assert [data[i].key for i in range(9)].count("images/6.png") == 2  # stands in for number 5
    assert sorted(path.name for path in data.bad) == ["3.png", "5.png"]
    assert "skipped (2 of 10)" in caplog.text


def test_too_many_unreadable_images_stop_with_their_names(folder_set):
    root = folder_set(10)
    (root / "images/3.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 10 images cannot be read, data.max_bad is 0.05: .*images/3\.png"):
        folder(root, max_bad=0.05)
    damage(root / "images/4.png")
    data = folder(root, max_bad=0.1)
    with pytest.raises(DataError, match=r"2 of 10 images cannot be read, data.max_bad is 0.1: .*3\.png, .*4\.png"):
        data[3]


def test_a_damaged_hint_skips_its_image(folder_set):
    root = folder_set(4)
    damage(root / "hints/0.png")
    assert folder(root, hints={"x": "edges"}, max_bad=0.5)[0].key == "images/1.png"


def test_hint_of_another_size_is_an_error(folder_set, picture):
    root = folder_set(4)
    picture(root / "hints/2.png", size=(24, 20))
    with pytest.raises(ConfigError, match=r"hint 'x' .*2\.png is 24x20, its image 2.png is 24x24 \(w x h\)"):
        folder(root, hints={"x": "edges"})


def test_hint_lying_on_its_side_is_an_error_when_read(folder_set, picture):
    root = folder_set(4, size=(24, 20))
    picture(root / "hints/2.png", size=(20, 24))
    with pytest.raises(DataError, match=r"hint 'x' .*2\.png is 20x24, its image 2.png is 24x20"):
        folder(root, hints={"x": "edges"}, max_bad=1.0)[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"spilt": "train"}}, "data.where has column 'spilt'.*did you mean 'split'"),
        ({"where": {"class": 1}}, "column 'class'; .* text; give its entries that column, or drop it from data.where$"),
        ({"where": {"split": "test"}}, "matches none of the 4 images of .*; it has split: heldout, train"),
        ({"hints": {"x": "edge"}}, "names column 'edge'.*did you mean 'edges'"),
        ({"hints": {"x": {"name": "colour"}}}, "hint.name is 'colour'; registered: .*did you mean 'color'"),
        ({"hints": ["edges"]}, r"hints is \('edges',\), must be a mapping"),
        ({"size": 4}, "data.size is 4; must be a whole number of at least 8"),
        ({"size": "64"}, "size is '64', must be int"),
        ({"crop": "centre"}, "data.crop is 'centre'; allowed: center, random, none; did you mean 'center'"),
        ({"max_bad": 2}, r"data.max_bad is 2; must be a share in \[0, 1\]"),
        ({"root": "/nowhere"}, "data root /nowhere is not a folder"),
        ({"flips": True}, "unknown keys.*did you mean 'flip'"),
    ],
)
def test_bad_options_get_one_clear_line(folder_set, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        folder(**{"root": folder_set(), **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "a.png", "text": "a"}\n{"file"', "metadata.jsonl line 2 is not JSON"),
        ("[1]", "metadata.jsonl line 1 is a list, must be an object"),
        ('{"text": "a"}', "metadata.jsonl line 1 has file_name = None, must be text"),
        ('{"file": "a.png", "text": null}', "metadata.jsonl line 1 has text = None, must be text"),
        ('{"file": "../a.png", "text": "a"}', "metadata.jsonl line 1: path '../a.png' leaves the data folder"),
        ("\n", "has no images for the folder layout"),
        ("\udcff", "cannot be read as UTF-8"),
    ],
)
def test_bad_metadata_is_named_by_line(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        folder(tmp_path)


def test_caption_may_hold_unicode_line_separators(tmp_path, picture):
    picture(tmp_path / "a.png")
    text = "one\u2028two\u0085three"
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file": "a.png", "text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert folder(tmp_path)[0].text == text


def test_missing_metadata_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is missing"):
        folder(tmp_path)


def test_index_past_the_end_is_an_index_error(folder_set):
    with pytest.raises(IndexError, match="index is 4; the set has 4 samples"):
        folder(folder_set())[4]
