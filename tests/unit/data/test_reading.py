from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data import DataError, reading
from ldm.data.reading import image_size, inside, read_image


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("RGB", "png", (255, 0, 0)),
        ("L", "png", (76, 76, 76)),
        ("P", "png", (255, 0, 0)),
        ("CMYK", "jpg", (254, 0, 0)),
        ("1", "png", None),
    ],
)
def test_known_modes_become_rgb(tmp_path, picture, mode, suffix, expected):
    image = read_image(picture(tmp_path / f"a.{suffix}", mode=mode, right=(255, 0, 0)))
    assert image.mode == "RGB"
    if expected:
        assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((3, 3)), expected, strict=True))


def test_transparent_is_white_in_images_and_black_in_hints(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(path)
    assert read_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(path, hint=True).getpixel((0, 0)) == (0, 0, 0)


def test_half_transparent_is_blended_over_white(tmp_path):
    path = tmp_path / "a.png"
    Image.new("LA", (20, 20), (0, 128)).save(path)
    assert abs(read_image(path).getpixel((0, 0))[0] - 127) <= 1


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    path = tmp_path / "a.png"
    image = Image.new("I;16", (20, 20), 0x8080)
    image.putpixel((0, 0), 65535)
    image.save(path)
    assert read_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(path).getpixel((5, 5)) == (128, 128, 128)


def test_float_grey_outside_zero_to_one_is_refused(tmp_path):
    Image.new("F", (20, 20), 0.5).save(tmp_path / "good.tif")
    assert read_image(tmp_path / "good.tif").getpixel((0, 0)) == (128, 128, 128)
    Image.new("F", (20, 20), -3.0).save(tmp_path / "bad.tif")
    with pytest.raises(DataError, match=r"bad.tif \(F\) has values in \[-3, -3\], must be in \[0, 1\]; rescale"):
        read_image(tmp_path / "bad.tif", hint=True)


def test_exif_rotation_is_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    path = picture(tmp_path / "a.png", size=(30, 20), exif=exif)
    image = read_image(path)
    assert image.size == image_size(path) == (20, 30)

    assert image.getpixel((10, 2)) == (255, 0, 0) and image.getpixel((10, 27)) == (0, 0, 255)


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_file_whose_name_has_signs_of_patterns_is_that_file(tmp_path, suffix):
    for name in ("a[1]", "a1", "b*"):
        (tmp_path / f"{name}{suffix}").touch()
    for name in ("a[1]", "b*"):
        assert reading.parts(str(tmp_path / f"{name}{suffix}"), suffix)[1] == [tmp_path / f"{name}{suffix}"]
    assert len(reading.parts(str(tmp_path / f"a*{suffix}"), suffix)[1]) == 2


def test_truncated_file_is_named(tmp_path, picture):
    path = picture(tmp_path / "a.png", size=(200, 200))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"a\.png cannot be decoded .* replace or remove it"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_other_content_is_not_an_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png (is not a readable image|cannot be decoded)"):
        read_image(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.png is missing"):
        image_size(tmp_path / "a.png")


def test_decompression_bomb_is_refused_before_decoding(tmp_path, picture, monkeypatch):
    path = picture(tmp_path / "a.png", size=(40, 30))
    monkeypatch.setattr(reading, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png is 40x30, more than 1000 pixels; shrink it"):
        image_size(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="has more than 1000 pixels"):
        read_image(path)


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/passwd", "C:\\a.png", "..\\a.png", "", None, 3, "a\0b"]
)
def test_paths_cannot_leave_the_root(name):
    with pytest.raises(DataError, match=r"metadata\.jsonl line 3: path"):
        inside(Path("data"), name, "metadata.jsonl line 3")


@given(st.text(max_size=20))
def test_accepted_paths_stay_inside(name):
    root = Path("/data/set")
    try:
        path = inside(root, name, "here")
    except DataError:
        return
    assert Path(str(path)).resolve().is_relative_to(root.resolve())
