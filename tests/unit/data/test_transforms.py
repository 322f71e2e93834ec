from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data import DataError
from ldm.data.transforms import Window, draw_window, resize, to_hint, to_image, to_pixels


def test_ranges_of_images_and_hints():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_image(pixels), torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_hint(pixels), torch.tensor([0.0, 0.2, 1.0]), atol=1e-6, rtol=0)


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_image(pixels)), pixels)
    assert torch.equal(to_pixels(2 * to_hint(pixels) - 1), pixels)


def test_flipped_window_is_the_mirror_image_of_the_cut():
    x = torch.arange(24.0).view(1, 4, 6)
    assert torch.equal(Window(1, 2, 3, 4, True).cut(x), x[:, 1:4, 2:6].flip(-1))


@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31), st.sampled_from(["center", "random", "none"]))
def test_window_lies_inside_the_image(height, width, seed, crop):
    generator = torch.Generator().manual_seed(seed)
    window = draw_window(height, width, (8, 5), crop=crop, flip=True, generator=generator)
    assert window.cut(torch.zeros(1, height, width)).shape == (1, 8, 5)


def test_without_a_generator_nothing_is_random():
    assert draw_window(9, 12, (8, 8), crop="random", flip=True, generator=None) == Window(0, 2, 8, 8, False)


def test_random_windows_reach_both_ends_and_both_orientations():
    generator = torch.Generator().manual_seed(0)
    windows = {draw_window(9, 8, (8, 8), crop="random", flip=True, generator=generator) for _ in range(64)}
    assert {(w.top, w.flip) for w in windows} == {(0, False), (0, True), (1, False), (1, True)}


def test_shorter_side_becomes_the_size():
    assert resize(Image.new("RGB", (40, 20)), 10, crop="center", hint=False).shape == (3, 10, 20)
    assert resize(Image.new("RGB", (40, 20)), 10, crop="none", hint=False).shape == (3, 10, 10)
    assert resize(Image.new("RGB", (5, 7)), 16, crop="center", hint=True).shape[1:] == (22, 16)


@pytest.mark.parametrize(
    ("file", "crop", "expected"),
    [((40, 20), "center", (12, 24)), ((20, 40), "random", (32, 16)), ((20, 40), "none", (12, 16))],
)
def test_a_picture_becomes_as_small_as_covers_a_size_that_is_no_square(file, crop, expected):
    assert resize(Image.new("RGB", file), (12, 16), crop=crop, hint=False).shape[1:] == expected


def test_a_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(DataError, match="image of 100000x1 would become 6400000x64; crop it"):
        resize(Image.new("L", (100_000, 1)), 64, crop="center", hint=False)
    with pytest.raises(DataError, match=r"^a/b\.png of 100000x1 would"):
        resize(Image.new("L", (100_000, 1)), 64, crop="center", hint=False, source=Path("a/b.png"))


def test_hints_shrink_by_area_and_images_are_antialiased():
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 1, 16))  # a line one pixel wide, 1/4 of the first cell
    hint = resize(image, 4, crop="center", hint=True)
    assert hint[0, 0].tolist() == [64, 0, 0, 0]
    picture = resize(image, 4, crop="center", hint=False)
    assert 30 < picture[0, 0, 0] < 110  # neither lost nor full, as sampling without a filter would have it


@pytest.mark.parametrize("hint", [True, False])
def test_channels_keep_their_order(hint):
    pixels = resize(Image.new("RGB", (9, 9), (10, 20, 30)), 4, crop="center", hint=hint)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
