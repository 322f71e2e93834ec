import math

import pytest
import torch
from torch import Tensor

from ldm.evaluation.fidelity import edge_f1, psnr, ssim


def lines(*pixels: tuple[int, int], size: int = 8) -> Tensor:
    """One line map with these (row, column) pixels set."""
    image = torch.zeros(1, 1, size, size, dtype=torch.bool)
    for row, column in pixels:
        image[0, 0, row, column] = True
    return image


def test_psnr_by_hand() -> None:
    x = torch.zeros(3, 3, 4, 4)
    y = x.clone()
    y[0] += 0.1  # mse 0.01: 20 dB
    y[1, 0, 0, 0] = 0.5  # mse 0.25 / 48
    got = psnr(x, y).tolist()
    assert got == pytest.approx([20.0, -10 * math.log10(0.25 / 48), 100.0], abs=1e-4)


def test_psnr_is_symmetric_and_float32() -> None:
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(psnr(x, y), psnr(y, x))
    assert psnr(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_edge_f1_by_hand() -> None:
    hint = lines((1, 1), (1, 2), (1, 3), (6, 6))
    edges = lines((1, 1), (2, 2), (5, 1))  # two of three near the hint; three of four of the hint near them
    precision, recall = 2 / 3, 3 / 4
    assert edge_f1(edges, hint).item() == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(("tolerance", "expected"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)])
def test_edge_f1_tolerance_is_in_pixels(tolerance: int, expected: float) -> None:
    assert edge_f1(lines((3, 3)), lines((5, 4)), tolerance).item() == expected


def test_edge_f1_counts_diagonal_neighbours_as_one_pixel_away() -> None:
    assert edge_f1(lines((3, 3)), lines((4, 4)), tolerance=1).item() == 1.0


def test_edge_f1_works_at_the_border() -> None:
    assert edge_f1(lines((0, 0)), lines((0, 7))).item() == 0.0
    assert edge_f1(lines((7, 7)), lines((7, 6))).item() == 1.0


def test_edge_f1_of_empty_maps() -> None:
    empty, full = lines(), lines((2, 2))
    assert edge_f1(empty, empty).item() == 1.0
    assert edge_f1(empty, full).item() == edge_f1(full, empty).item() == 0.0


def test_edge_f1_is_per_image_and_symmetric() -> None:
    edges = torch.cat([lines((1, 1)), lines((1, 1)), lines()])
    hint = torch.cat([lines((1, 1)), lines((6, 6)), lines()])
    assert edge_f1(edges, hint).tolist() == edge_f1(hint, edges).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(3, 24, 17), (1, 11, 11)])
def test_ssim_is_scikit_images(shape: tuple[int, int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    y = (0.7 * x + 0.3 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0}
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    expected = [metrics.structural_similarity(a, b, **how) for a, b in pairs]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert 0.3 < expected[0] < 0.95


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match=r"ssim: picture is 10x40 \(h w\), sides must be at least 11"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))
