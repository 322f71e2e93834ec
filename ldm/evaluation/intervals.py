"""How sure a mean is: bootstrap over the items it is a mean of (Efron 1979)."""

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(scores: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of the scores, and the 2.5 % and 97.5 % quantiles of the means of resampled items.

    The same seed draws the same items whatever the scores are, so arms drawn for the same items stay paired.

    Args:
        scores: n, one per item.
        resamples: how many times n items are drawn with replacement.
        seed: of the draws.

    Raises: ValueError without scores.
    """
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores are {tuple(scores.shape)}, must be n, one per item, at least one")
    mean, scores = scores.mean().item(), scores.double().cpu()
    drawn = torch.randint(len(scores), (resamples, len(scores)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(scores[drawn].mean(dim=1), scores.new_tensor([0.025, 0.975])).tolist()
    return Interval(mean, low, high)
