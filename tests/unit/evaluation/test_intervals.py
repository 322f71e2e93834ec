"""Bootstrap intervals: by hand where they are exact, against theory where they are not."""

import math

import pytest
import torch

from ldm.evaluation.intervals import Interval, bootstrap


def test_interval_of_normal_scores_is_two_standard_errors_wide() -> None:
    scores = torch.randn(400)
    got = bootstrap(scores, resamples=4000)
    error = 1.96 * scores.std().item() / math.sqrt(400)
    assert got.mean == scores.mean().item()
    assert got.low == pytest.approx(got.mean - error, abs=0.1 * error)
    assert got.high == pytest.approx(got.mean + error, abs=0.1 * error)


def test_bounds_are_quantiles_of_resampled_means() -> None:
    got = bootstrap(torch.tensor([0.0, 1.0]), resamples=1000)  # means 0, 0.5, 1 with shares 1/4, 1/2, 1/4
    assert got == Interval(0.5, 0.0, 1.0)


def test_equal_scores_have_no_width_and_one_seed_one_interval() -> None:
    assert bootstrap(torch.full((5,), 0.25)) == Interval(0.25, 0.25, 0.25)
    scores = torch.rand(30)
    assert bootstrap(scores) == bootstrap(scores)
    assert bootstrap(scores) != bootstrap(scores, seed=1)


def test_arms_of_the_same_items_are_resampled_together() -> None:
    scores = torch.rand(30)
    a, b = bootstrap(scores), bootstrap(scores + 1)
    assert (b.low - a.low, b.high - a.high) == pytest.approx((1, 1), abs=1e-6)


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.zeros(2, 2)])
def test_scores_are_one_per_item(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one per item"):
        bootstrap(scores)
