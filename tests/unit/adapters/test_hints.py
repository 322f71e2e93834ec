"""Hint extractors: ranges, channels, polarity and their definitions worked by hand."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters  # noqa: F401  (registers them)
from adapters.hints import luma
from ldm import registry
from ldm.registry import ConfigError

ALL = registry.names("hint")


def extractor(name: str, **options: Any) -> Any:
    return registry.build("hint", {"name": name, **options})


def square() -> Tensor:
    """White on black, edges at 8 and 24 of 32."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., 8:24, 8:24] = 1
    return image


def test_every_hint_of_the_paper_is_registered() -> None:
    assert set(ALL) >= {"sketch", "canny", "depth", "segmentation", "keypose", "color"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["noise", "black", "white"])
def test_hints_have_the_declared_channels_and_lie_in_0_to_1(name: str, kind: str) -> None:
    if name == "canny":
        pytest.importorskip("cv2")
    size = (2, 3, 64, 128)
    image = {"noise": torch.rand(size), "black": torch.zeros(size), "white": torch.ones(size)}[kind]
    make = extractor(name)
    hint = make(image)
    assert hint.shape == (2, make.channels, 64, 128)
    assert hint.dtype == torch.float32
    assert hint.isfinite().all() and hint.min() >= 0 and hint.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_the_same_options_are_the_same_extractor(name: str) -> None:
    assert extractor(name) == extractor(name) and hash(extractor(name)) == hash(extractor(name))


@pytest.mark.parametrize("name", ["sketch", "depth", "color"])
def test_image_is_left_alone_and_its_neighbours_do_not_matter(name: str) -> None:
    images = torch.rand(2, 3, 64, 64)
    kept = images.clone()
    hints = extractor(name)(images)
    assert torch.equal(images, kept)
    torch.testing.assert_close(hints[1:], extractor(name)(images[1:]))


def test_sketch_is_white_where_brightness_changes() -> None:
    hint = extractor("sketch")(square())[0, 0]
    assert set(hint.unique().tolist()) == {0.0, 1.0}
    assert hint[16, 8] == 1 and hint[23, 16] == 1  # on the left and lower sides
    assert hint[16, 16] == 0 and hint[2, 2] == 0
    assert not extractor("sketch")(torch.full((1, 3, 8, 8), 0.4)).any()


def test_soft_sketch_of_a_step_is_the_sobel_gradient_over_its_maximum() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1
    hint = extractor("sketch", sigma=0, threshold=None)(image)[0, 0]
    assert hint[4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_luma_weighs_the_colours_as_bt601() -> None:
    colours = torch.eye(3).view(3, 3, 1, 1)
    assert luma(colours).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_color_cells_are_of_one_colour_and_folded_channels_equal() -> None:
    image = torch.rand(1, 3, 128, 192)
    hint = extractor("color")(image)
    cells = hint.unfold(2, 64, 64).unfold(3, 64, 64)  # b 3 2 3 64 64
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells))
    assert len(hint.flatten(2).unique(dim=2)[0, 0]) == 6
    folded = torch.nn.functional.pixel_unshuffle(hint, 8).unflatten(1, (3, 64))
    assert torch.equal(folded, folded[:, :, :1].expand_as(folded))


def test_color_of_a_plain_picture_is_that_picture() -> None:
    image = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(extractor("color", cell=8)(image), image)


def test_depth_is_spread_picture_by_picture_over_three_equal_channels() -> None:
    ramp = torch.linspace(0.2, 0.4, 16).view(1, 1, 1, 16).expand(1, 3, 4, 16)
    hint = extractor("depth")(torch.cat([ramp, ramp * 2]))
    assert hint.amin(dim=(1, 2, 3)).tolist() == [0, 0]
    torch.testing.assert_close(hint.amax(dim=(1, 2, 3)), torch.ones(2))
    assert torch.equal(hint[:, 0], hint[:, 1]) and torch.equal(hint[:, 0], hint[:, 2])
    torch.testing.assert_close(extractor("depth", invert=True)(ramp), 1 - hint[:1])


def test_finished_maps_pass_and_dark_lines_turn_white() -> None:
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(extractor("segmentation")(image), image)
    assert torch.equal(extractor("lineart", invert=True)(image), 1 - image)


def test_canny_is_opencvs_on_8_bits() -> None:
    cv2 = pytest.importorskip("cv2")
    image = torch.rand(2, 3, 32, 48).round(decimals=1)
    hint = extractor("canny", low=50, high=150)(image)
    for one, got in zip(image, hint, strict=True):
        wanted = cv2.Canny(one.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy(), 50, 150)
        assert torch.equal(got[0], torch.from_numpy(wanted) / 255)
    assert set(extractor("canny")(square()).unique().tolist()) == {0.0, 1.0}


def test_canny_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"canny needs OpenCV, which is not installed: pip install .*hints.*sketch"):
        extractor("canny")(square())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("canny", {"low": 200, "high": 100}, r"low is 200 and high 100; must satisfy"),
        ("sketch", {"sigma": -1}, r"sigma is -1 pixels"),
        ("sketch", {"threshold": 1.5}, r"threshold is 1.5, must be in \(0, 1\)"),
        ("color", {"cell": 0}, r"cell is 0 pixels"),
        ("sketsh", {}, r"hint.name is 'sketsh'; registered: .*did you mean 'sketch'"),
        ("depth", {"near": 1}, r"unknown keys \['near'\]"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extractor(name, **options)


def test_picture_smaller_than_a_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cell is 64 pixels, the picture 32x32 \(h w\)"):
        extractor("color")(square())
