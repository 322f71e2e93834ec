"""Thin binary edges of colour images: Sobel gradient, non-maximum suppression, one threshold (after Canny 1986)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1))  # (dy, dx) of gradient angles 0, 45, 90, 135 degrees


def edge_map(images: Tensor, threshold: float = 0.05) -> Tensor:
    """Edges one pixel wide, from the colour channel with the strongest gradient at each pixel.

    Args:
        images: b c h w in [0, 1].
        threshold: least gradient, in brightness steps of [0, 1] between neighbouring pixels.

    Returns: b 1 h w, bool.
    """
    b, c, h, w = images.shape
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    kernels = torch.stack([slope, slope.T])[:, None]
    planes = F.pad(images.float().reshape(b * c, 1, h, w), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(planes, kernels).reshape(b, c, 2, h, w)
    strength, strongest = gradient.pow(2).sum(dim=2).sqrt().max(dim=1, keepdim=True)  # b 1 h w
    dx, dy = (gradient[:, :, i].gather(1, strongest) for i in (0, 1))
    direction = torch.round(torch.atan2(dy, dx) / (math.pi / 4)).long() % 4
    around = F.pad(strength, (1, 1, 1, 1))
    peak = torch.zeros_like(strength, dtype=torch.bool)
    for i, (y, x) in enumerate(DIRECTIONS):
        ahead = around[:, :, 1 + y : 1 + y + h, 1 + x : 1 + x + w]
        behind = around[:, :, 1 - y : 1 - y + h, 1 - x : 1 - x + w]
        peak |= (direction == i) & (strength >= ahead) & (strength > behind)
    return peak & (strength > threshold)
