"""Set metrics beside torch-fidelity's on the same features, and by hand."""

import math

import pytest
import torch

from ldm.evaluation.distances import covered, frechet, gaussian, kid, mmd, radii, within

G = torch.Generator().manual_seed(0)
DRAWN = torch.randn(60, 12, generator=G) * torch.linspace(0.1, 2, 12) + 0.3
REAL = torch.randn(50, 12, generator=G)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (8, 50), (8, 7)])  # the last two with singular covariances
def test_frechet_is_torch_fidelitys(n: int, m: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = DRAWN[:n].double(), REAL[:m].double()
    statistics = [fid.fid_features_to_statistics(v) for v in (x, y)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet(gaussian(x), gaussian(y)) == pytest.approx(theirs, rel=1e-6)


def test_frechet_of_known_gaussians() -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # variance 2 along the first axis
    y = torch.tensor([[3.0, -2.0], [3.0, 2.0]])  # variance 8 along the second
    assert frechet(gaussian(x), gaussian(y)) == pytest.approx(9 + 2 + 8)  # the roots share nothing
    assert frechet(gaussian(x), gaussian(2 * x)) == pytest.approx((math.sqrt(2) - math.sqrt(8)) ** 2)
    assert frechet(gaussian(REAL), gaussian(REAL)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bad", [torch.full((3, 2), math.nan), torch.zeros(1, 2), torch.zeros(3)])
def test_features_that_have_no_distance_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="features are"):
        gaussian(bad)


def test_kid_of_a_subset_is_torch_fidelitys() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = DRAWN[:50].double(), REAL.double()
    options = {"kid_subsets": 1, "kid_subset_size": 50, "verbose": False, "rng_seed": 0}  # all of both, in any order
    options |= {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    expected = theirs.kid_features_to_metric(x, y, **options, kid_kernel_poly_coef0=1)[theirs.KEY_METRIC_KID_MEAN]
    assert kid(x, y, subset=50, subsets=1) == pytest.approx(expected, rel=1e-9)
    assert mmd(x, y, within(y)) == pytest.approx(expected, rel=1e-9)


def test_kid_is_unbiased_over_subsets_and_wants_them_small_enough() -> None:
    whole = mmd(DRAWN, REAL)
    assert kid(DRAWN, REAL, subset=20, subsets=300) == pytest.approx(whole, rel=0.05)
    assert kid(DRAWN, REAL, subset=20, subsets=3) == kid(DRAWN, REAL, subset=20, subsets=3)
    with pytest.raises(ValueError, match="kid subset is 51, must be 2 to 50"):
        kid(DRAWN, REAL, subset=51, subsets=1)


def test_mmd_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0], [0.0]])
    assert mmd(x, y) == pytest.approx((1 * 2 + 1) ** 3 + 1 - 2 * 1)  # different pairs only; kernels with 0 are 1


def test_precision_and_recall_of_a_known_case() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # distances to the nearest other: 1, 1, 1, 8
    drawn = torch.tensor([[0.5], [2.5], [30.0]])  # 2, 2, 27.5
    assert radii(real, 1).tolist() == [1, 1, 1, 8]
    assert radii(real, 2).tolist() == [2, 1, 2, 9]
    assert covered(drawn, real, radii(real, 1)) == pytest.approx(2 / 3)
    assert covered(real, drawn, radii(drawn, 1)) == pytest.approx(1.0)  # 10 lies in the ball of 30
    assert covered(real, drawn[:2], radii(drawn[:2], 1)) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="neighbours is 4, must be 1 to 3"):
        radii(real, 4)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    expected = prc.calculate_precision_recall_full(DRAWN.double(), REAL.double(), 3)
    ours = covered(DRAWN, REAL, radii(REAL, 3)), covered(REAL, DRAWN, radii(DRAWN, 3))
    assert ours == pytest.approx(expected) and min(ours) > 0 and max(ours) < 1
