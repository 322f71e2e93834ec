"""Measures of maps on pictures whose scores are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters.hints  # noqa: F401  registers the extractors
import ldm.evaluation.maps  # noqa: F401  registers the measures
from ldm import registry
from ldm.data.synthetic import KINDS, SyntheticData, SyntheticOptions
from ldm.evaluation.fidelity import ssim
from ldm.evaluation.measures import Measure
from ldm.registry import ConfigError

COLOURS = [[0, 0, 0], [255, 0, 0], [0, 255, 0]]


def measure(name: str, **options: Any) -> Measure:
    return registry.build("measure", {"name": name, **options})


def scores(m: Measure, pictures: Tensor, hints: Tensor) -> Tensor:
    return m.score(m.picture(pictures), m.hint(hints))


def painted(labels: Tensor, colours: list[list[int]] = COLOURS) -> Tensor:
    """Labels b h w as a map b 3 h w in [0, 1]."""
    return (torch.tensor(colours) / 255)[labels].permute(0, 3, 1, 2)


def halves(size: int = 8) -> Tensor:
    labels = torch.zeros(1, size, size, dtype=torch.int64)
    labels[:, :, size // 2 :] = 1
    return labels


def test_regions_that_the_picture_shows_in_colours_of_its_own_are_found() -> None:
    hint, picture = painted(halves()), painted(halves(), [[9, 90, 9], [200, 180, 160]])
    assert scores(measure("region_iou"), picture, hint).item() == 1.0
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert scores(measure("region_iou"), flat, hint).item() == pytest.approx(0.25)  # all in one: IoU 1/2 and 0
    shifted = painted(halves(), [[9, 90, 9], [200, 180, 160]]).roll(1, dims=-1)  # columns 1 to 4, not 0 to 3
    assert scores(measure("region_iou"), shifted, hint).item() == pytest.approx(24 / 40)


def test_mixed_colours_of_a_border_are_no_regions() -> None:
    hint = painted(halves(16))
    hint[:, :, 0, 8] = 0.3  # one pixel of 256, below 1 %
    picture = painted(halves(16), [[9, 90, 9], [200, 180, 160]])
    assert scores(measure("region_iou"), picture, hint).item() == 1.0
    assert scores(measure("region_iou", least=0), picture, hint).item() < 1
    ramp = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no colour of the hint covers 0.01 of it"):
        measure("region_iou").hint(ramp)


def test_regions_of_procedural_scenes_stand_far_above_chance() -> None:
    data = SyntheticData(SyntheticOptions(size=32, length=12, hints=("segmentation",)))
    real = torch.stack([data[i].image for i in range(12)]) / 2 + 0.5
    hints = torch.stack([data[i].hints["segmentation"] for i in range(12)])
    m = measure("region_iou")
    assert scores(m, real, hints).mean() > 0.8 > 0.5 > scores(m, real.roll(1, 0), hints).mean()


def test_miou_counts_the_classes_that_are_there() -> None:
    m = measure("miou", palette=COLOURS)
    found = halves()
    found[:, 0, 0] = 2  # one of 32 pixels of class 0
    got = scores(m, painted(found), painted(halves()))
    assert got.item() == pytest.approx((31 / 32 + 1 + 0) / 3)
    assert scores(m, painted(halves()), painted(halves()) * 0.9 + 0.05).item() == 1.0  # decoded by the nearest colour


class Halves(nn.Module):
    """Scores of three classes: brightness of the red, green and blue channel, at half the size."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("program") / "halves.pt2"
    torch.export.save(torch.export.export(Halves(), (torch.rand(1, 3, 16, 16),)), file)
    return str(file)


def test_an_exported_network_predicts_the_classes(program: str) -> None:
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    m = measure("miou", palette=colours, predictor=program, side=16)
    labels = torch.stack([halves(32)[0], 2 - halves(32)[0]])
    assert scores(m, painted(labels, colours), painted(labels, colours)).tolist() == [1.0, 1.0]
    assert m.models[0][1] == {"weights": program}
    with pytest.raises(ValueError, match="miou: the predictor gives 3 planes, palette has 2"):
        measure("miou", palette=colours[:2], predictor=program, side=16).picture(torch.rand(1, 3, 32, 32))


def test_depth_is_compared_up_to_scale_and_shift(program: str) -> None:
    m = measure("depth_rmse")
    hint = torch.rand(2, 1, 8, 8).expand(2, 3, 8, 8)
    assert scores(m, hint * 0.2 + 0.7, hint).tolist() == pytest.approx([0, 0], abs=1e-6)
    flat = torch.full_like(hint, 0.3)
    assert scores(m, flat, hint).tolist() == pytest.approx(hint[:, 0].flatten(1).std(dim=1, correction=0).tolist())
    plain = measure("depth_rmse", align=False)
    assert scores(plain, hint + 0.25, hint).tolist() == pytest.approx([0.25, 0.25])
    predicted = measure("depth_rmse", predictor=program, side=16).picture(torch.rand(2, 3, 32, 24))
    assert predicted.shape == (2, 32, 24)


def test_pck_is_the_share_of_near_points() -> None:
    colours = [[255, 60, 60], [60, 255, 60]]
    hint, picture = torch.zeros(2, 1, 3, 20, 20)
    red, green = (torch.tensor(c).view(3, 1, 1) / 255 for c in colours)
    hint[0, :, 4:6, 4:6], hint[0, :, 15:16, 15:16] = red, green
    picture[0, :, 5:7, 5:7], picture[0, :, 2:3, 15:16] = red, green  # off by 1.4 pixels and by 13
    m = measure("pck", palette=colours)  # within 2 of 20 pixels
    assert scores(m, picture, hint).item() == 0.5
    assert scores(m, hint, hint).item() == 1.0
    assert scores(m, torch.zeros_like(hint), hint).item() == 0.0
    assert scores(m, picture, torch.zeros_like(hint)).item() == 1.0  # nothing was asked
    assert scores(measure("pck", palette=colours, alpha=0.05), picture, hint).item() == 0.0


def test_pck_finds_the_peaks_of_heat_maps(program: str) -> None:
    palette = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    picture = torch.zeros(1, 3, 32, 32)
    for channel, (row, column) in enumerate([(4, 6), (20, 24), (30, 2)]):
        picture[0, channel, row : row + 2, column : column + 2] = 1
    m = measure("pck", palette=palette, predictor=program, side=16)
    found = m.picture(picture)
    places = torch.tensor([[5.5, 5.5], [25.5, 21.5], [1.5, 29.5]])  # centres of cells of 4 pixels
    torch.testing.assert_close(found[0, :, :2] * 32, places, atol=1e-4, rtol=0)
    assert scores(m, picture, picture).item() == 1.0


def test_procedural_key_points_are_read_by_the_colours_of_their_kinds() -> None:
    data = SyntheticData(SyntheticOptions(size=64, length=4, hints=("keypoint",)))
    m = measure("pck", palette=[list(colour) for colour in KINDS.values()])
    hints = torch.stack([data[i].hints["keypoint"] for i in range(4)])
    kinds = [sum(kind in data[i].text for kind in KINDS) for i in range(4)]
    assert m.hint(hints)[..., 2].sum(dim=1).tolist() == pytest.approx(kinds)
    assert scores(m, hints, hints).tolist() == [1.0] * 4


def test_hint_ssim_extracts_the_hint_anew() -> None:
    m = measure("hint_ssim", extractor="sketch")
    pictures = torch.rand(2, 3, 16, 16)
    hints = registry.build("hint", {"name": "sketch"})(pictures).expand(2, 3, 16, 16)
    assert scores(m, pictures, hints).tolist() == pytest.approx([1, 1])
    flipped = hints.flip(-1)
    torch.testing.assert_close(scores(m, pictures, flipped), ssim(hints[:, :1], flipped[:, :1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("miou", {"palette": COLOURS, "predictor": "none.pt2"}, "predictor none.pt2 does not exist"),
        ("miou", {"palette": COLOURS[:1]}, "must be at least 2 colours"),
        ("pck", {"palette": [[0, 0, 256]]}, "from 0 to 255"),
        ("pck", {"palette": COLOURS, "alpha": 0.0}, r"alpha is 0.0, must be in \(0, 1\)"),
        ("region_iou", {"least": 1.0}, r"least is 1.0, must be in \[0, 1\)"),
        ("hint_ssim", {"extractor": "skecth"}, "did you mean 'sketch'"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(name, **options)
