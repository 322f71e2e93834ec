"""Closeness of images, and obedience of images to their hints."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, for b c h w images in [0, 1]; clamped at 100 dB."""
    mse = (x.float() - y.float()).pow(2).mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(mse.clamp_min(1e-10))


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
