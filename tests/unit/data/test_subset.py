"""The held-out part of a data set."""

import torch

from ldm.data.subset import held_out, spread
from ldm.data.synthetic import SyntheticData, SyntheticOptions


def test_spread_is_fixed_distinct_and_not_the_head() -> None:
    data = SyntheticData(SyntheticOptions(size=16, length=50))
    chosen = spread(data, 20).indices
    assert list(chosen) == list(spread(data, 20).indices)
    assert len(set(chosen)) == 20
    assert max(chosen) >= 25
    assert len(spread(data, 99)) == 50


def test_held_out_batches_are_no_larger_than_asked() -> None:
    data = SyntheticData(SyntheticOptions(size=16, length=5))
    assert [len(b.keys) for b in held_out(data, 9, 2, torch.device("cpu"))] == [2, 2, 1]
