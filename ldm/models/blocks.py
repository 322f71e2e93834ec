"""Convolutional blocks and the timestep embedding of the UNet (Rombach et al. 2022, arXiv:2112.10752, appendix E)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosine half first.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, with frequencies exp(-ln(10000) i / (dim/2)).

    Args:
        t: b, integer or fractional timesteps.
        dim: even width.

    Returns: b dim, float32.
    """
    half = dim // 2
    freq = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def silu(x: Tensor) -> Tensor:
    """SiLU of a map that nobody else holds: in place, unless backward needs the input."""
    return F.silu(x, inplace=not x.requires_grad)


def init_zero(module: nn.Conv2d | nn.Linear) -> None:
    """Weights and bias to zero: the layer adds nothing until it has been trained."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


LARGE = 64 * 64  # pixels of a map


class GroupNorm(nn.GroupNorm):
    """GroupNorm that stays exact on large float32 maps: mean and variance in two passes, each a pairwise sum.

    torch's kernel for channels-last maps on a CPU adds all numbers of a group one by one: off by 1e-5 for the VAE's
    512 x 512 maps, where this is off by 1e-7, in twice the time. Up to 64 x 64, and where backward
    follows, torch's runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map b c h w -> b c h w."""
        large = input.device.type == "cpu" and input.dtype == torch.float32 and input[0, 0].numel() > LARGE
        if not large or input.requires_grad or not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        width = self.num_channels // self.num_groups
        x = input.permute(0, 2, 3, 1)  # b h w c, as it lies in memory
        per_group = x.mean((1, 2)).unflatten(1, (self.num_groups, width)).mean(2)
        x = x - per_group.repeat_interleave(width, 1)[:, None, None]
        variance = x.square().mean((1, 2)).unflatten(1, (self.num_groups, width)).mean(2)
        scale = (variance + self.eps).rsqrt().repeat_interleave(width, 1) * self.weight
        return torch.addcmul(self.bias, x, scale[:, None, None], out=x).permute(0, 3, 1, 2)


class Embed(nn.Sequential):
    """Two-layer SiLU MLP: b in_dim -> b dim. No activation at the end: residual blocks apply their own."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, embedding added between, identity or 1x1 shortcut. The last conv starts at zero."""

    def __init__(self, in_channels: int, channels: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        init_zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: b in_channels h w, emb: b emb_dim, through SiLU already (the same for all blocks) -> b channels h w."""
        h = self.conv1(silu(self.norm1(x)))
        h = h.add_(self.emb(emb)[:, :, None, None])  # convolutions do not keep their output: sums go in place
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.shortcut(x))


class Downsample(nn.Module):
    """3x3 convolution, stride 2, symmetric padding 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c h/2 w/2."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c 2h 2w."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
