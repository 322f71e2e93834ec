"""Colours of pictures: means of a coarse grid, CIE Lab, in which distance follows the eye, and sets of colours."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# IEC 61966-2-1 (sRGB): linear RGB to XYZ of the 2 degree observer, and the white that it was made for, D65
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)


def cell_means(images: Tensor, cells: int) -> Tensor:
    """Mean colours of `cells` by `cells` parts of each picture.

    Args:
        images: b 3 h w.
        cells: parts per side.

    Returns: b n 3, n = cells squared, float32.
    Raises: ValueError if the picture has no three channels, or fewer pixels than parts.
    """
    if images.shape[1] != 3 or min(images.shape[2:]) < cells:
        raise ValueError(f"picture is {tuple(images.shape)}, must be b 3 h w and at least {cells}x{cells}")
    return F.adaptive_avg_pool2d(images.float(), cells).flatten(2).mT


def lab(rgb: Tensor) -> Tensor:
    """CIE 1976 L*a*b* of sRGB colours (CIE 15:2018, D65).

    Args:
        rgb: ... 3, gamma-encoded, in [0, 1].

    Returns: ... 3: L in [0, 100], a and b in about [-108, 98].
    """
    linear = ((rgb.clamp_min(0.04045) + 0.055) / 1.055).pow(2.4).where(rgb > 0.04045, rgb / 12.92)
    xyz = (linear[..., None, :] * rgb.new_tensor(TO_XYZ)).sum(dim=-1) / rgb.new_tensor(WHITE)
    knee = 6 / 29
    f = xyz.clamp_min(knee**3).pow(1 / 3).where(xyz > knee**3, xyz / (3 * knee**2) + 4 / 29)
    x, y, z = f.unbind(dim=-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def projections(colours: Tensor, directions: int = 32) -> Tensor:
    """Sorted coordinates of a set of colours along directions spread evenly over the half sphere.

    The mean absolute difference of two such is the sliced Wasserstein-1 distance of the sets (Bonneel et al. 2015,
    section 2.2); of sets shifted by d it is d / 2, the mean of |cos| over the sphere.

    Args:
        colours: b n 3, float.
        directions: how many, of a Fibonacci spiral.

    Returns: b directions n, ascending.
    """
    i = torch.arange(directions, device=colours.device)
    z = (i + 0.5) / directions
    turn = i * (math.pi * (3 - math.sqrt(5)))
    radius = (1 - z**2).sqrt()
    axes = torch.stack([radius * turn.cos(), radius * turn.sin(), z])
    return (colours @ axes.to(colours.dtype)).mT.sort(dim=-1).values
