"""Closeness of images, and obedience of images to their hints."""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, for b c h w images in [0, 1]; clamped at 100 dB."""
    mse = (x.float() - y.float()).pow(2).mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(mse.clamp_min(1e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per image: Wang et al. 2004, Gaussian window 11 x 11 of sigma 1.5, in [-1, 1].

    K1 = 0.01, K2 = 0.03, population covariance, mean over channels and all places where the whole window fits, as
    scikit-image has it with `gaussian_weights=True, use_sample_covariance=False`.

    Args:
        x: b c h w in [0, 1], sides of at least 11.
        y: the same.

    Returns: b, float32.
    Raises: ValueError below 11 pixels.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: picture is {x.shape[-2]}x{x.shape[-1]} (h w), sides must be at least {SSIM_WINDOW}")
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    bell = (-0.5 * (offset / 1.5).square()).exp()
    bell = bell / bell.sum()

    def blurred(image: Tensor) -> Tensor:
        planes = image.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1)).view(*image.shape[:2], -1)

    a, b = x.double(), y.double()
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a.square(), blurred(b * b) - mean_b.square()
    shared = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return (top / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean(dim=(1, 2)).float()


def edge_f1(edges: Tensor, hint: Tensor, tolerance: int = 1) -> Tensor:
    """F1 of two binary line maps, matched within `tolerance` pixels (Chebyshev distance).

    Precision is the share of `edges` pixels with a `hint` pixel nearby, recall the share of `hint` pixels with an
    `edges` pixel nearby. Two empty maps agree (1); one empty map does not (0).

    Args:
        edges: b 1 h w, bool.
        hint: b 1 h w, bool.
        tolerance: pixels.

    Returns: b, in [0, 1].
    """
    a, b = edges.float(), hint.float()
    kernel = 2 * tolerance + 1
    near_a = F.max_pool2d(a, kernel, stride=1, padding=tolerance)
    near_b = F.max_pool2d(b, kernel, stride=1, padding=tolerance)
    n_a, n_b = a.sum(dim=(1, 2, 3)), b.sum(dim=(1, 2, 3))
    precision = (a * near_b).sum(dim=(1, 2, 3)) / n_a.clamp_min(1)
    recall = (b * near_a).sum(dim=(1, 2, 3)) / n_b.clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return torch.where((n_a == 0) & (n_b == 0), torch.ones_like(f1), f1)
