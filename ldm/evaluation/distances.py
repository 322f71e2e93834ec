"""How far apart two sets of features are: Fréchet distance, KID, precision and recall. Everything is in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DEGREE = 3  # of KID's polynomial kernel (x y / d + 1) ** 3


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Mean d and a root r d of the covariance of a set of features: covariance = root^T root, r = min(n, d)."""

    mean: Tensor
    root: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """The Gaussian with the mean and the covariance (divisor n - 1) of features n d.

    Raises: ValueError below two items, or with values that are not finite.
    """
    x = _checked(features)
    mean = x.mean(dim=0)
    centred = (x - mean) / math.sqrt(len(x) - 1)
    return Gaussian(mean, torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred)


def frechet(p: Gaussian, q: Gaussian) -> float:
    """Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500, Eq. 6), at least 0.

    With covariances A^T A and B^T B the trace of the root of their product is the sum of the singular values of A B^T:
    no root of a matrix is taken that rounding has made indefinite, and fewer items than features are no special case.
    """
    shared = torch.linalg.svdvals(p.root @ q.root.T).sum()
    squares = (p.mean - q.mean).square().sum() + p.root.square().sum() + q.root.square().sum()
    return max((squares - 2 * shared).item(), 0.0)


def within(x: Tensor) -> float:
    """Mean kernel of all pairs of different items of n d."""
    x = _checked(x)
    kernel = _kernel(x, x)
    return ((kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))).item()


def mmd(x: Tensor, y: Tensor, y_within: float | None = None) -> float:
    """Unbiased squared MMD with the cubic kernel (Binkowski et al. 2018, arXiv:1801.01401, section 4); may be negative.

    Args:
        x: n d, n at least 2.
        y: m d, m at least 2.
        y_within: `within(y)` where it is known.
    """
    between = _kernel(_checked(x), _checked(y)).mean().item()
    return within(x) + (within(y) if y_within is None else y_within) - 2 * between


def kid(x: Tensor, y: Tensor, subset: int, subsets: int, seed: int = 0) -> float:
    """Kernel distance as it is reported: the mean of `mmd` over random subsets of equal size.

    Args:
        x: n d.
        y: m d.
        subset: items per subset, drawn without replacement; at most n and m.
        subsets: how many.
        seed: of the draws.

    Raises: ValueError on a subset that is larger than a set, or below 2.
    """
    if not 2 <= subset <= min(len(x), len(y)):
        raise ValueError(f"kid subset is {subset}, must be 2 to {min(len(x), len(y))}, the items of the smaller set")
    g = torch.Generator().manual_seed(seed)
    parts = ((torch.randperm(len(s), generator=g)[:subset].to(s.device) for s in (x, y)) for _ in range(subsets))
    return sum(mmd(x[i], y[j]) for i, j in parts) / subsets


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance n of each item of n d to its `neighbours`-th nearest other one. Raises: ValueError on too few items."""
    x = _checked(x)
    if not 1 <= neighbours < len(x):
        raise ValueError(f"neighbours is {neighbours}, must be 1 to {len(x) - 1} in a set of {len(x)}")
    parts = [torch.cdist(part, x).kthvalue(neighbours + 1, dim=1).values for part in x.split(1024)]  # itself is one
    return torch.cat(parts)


def covered(x: Tensor, y: Tensor, y_radii: Tensor) -> float:
    """Share of the items of x, n d, that lie in one of the balls around the items of y, m d.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991), Eq. 1 and 2: with x drawn and y real it is precision, the other way
    round recall.
    """
    x, y = _checked(x), _checked(y)
    inside = [(torch.cdist(part, y) <= y_radii).any(dim=1) for part in x.split(1024)]
    return torch.cat(inside).double().mean().item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** DEGREE


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are {tuple(features.shape)}, must be n d with at least 2 items")
    x = features.double()
    if not torch.isfinite(x).all():
        raise ValueError("features are not finite: the pictures or the extractor's weights are damaged")
    return x
