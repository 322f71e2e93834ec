"""KL-regularised autoencoder: images to a small latent grid and back.

Kingma & Welling 2014 (arXiv:1312.6114) for the posterior; Rombach et al. 2022 (arXiv:2112.10752), appendix G, for
the convolutional first stage of latent diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils import _pytree

from ldm.models.blocks import GroupNorm, silu
from ldm.registry import ConfigError, register

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a KL-VAE; the defaults are Stable Diffusion's f=8 autoencoder.

    Attributes:
        in_channels: image channels.
        channels: width per level, first level at full resolution; one halving between two levels.
        blocks: residual blocks per encoder level; the decoder has one more.
        latent_channels: channels of the latent.
        groups: GroupNorm groups; divides every width.
        scale_factor: diffusion latent = scale_factor * sample, about unit std (0.18215 for SD1/SD2, 0.13025 for SDXL).
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    scale_factor: float = 0.18215

    def __post_init__(self) -> None:
        """Check the numbers against each other.

        Raises:
            ConfigError: on empty `channels`, a count below 1, a width that `groups` does not divide, a scale <= 0.
        """
        if not self.channels:
            raise ConfigError("vae.channels is empty; give one width per level, e.g. [128, 256, 512, 512]")
        for name in ("in_channels", "blocks", "latent_channels", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"vae.{name} is {getattr(self, name)}, must be at least 1")
        if bad := [c for c in self.channels if c < 1 or c % self.groups]:
            raise ConfigError(f"vae.channels has {bad}, must be multiples of vae.groups={self.groups}; change either")
        if self.scale_factor <= 0:
            raise ConfigError(f"vae.scale_factor is {self.scale_factor}, must be positive (1 / std of the latents)")


@dataclass(frozen=True, slots=True)
class Posterior:
    """Diagonal Gaussian q(z | x): `mean` and `logvar`, both b c h w, float32 or wider."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def from_moments(moments: Tensor) -> Posterior:
        """Split the encoder's output (b 2c h w: means, then log-variances); log-variances are clamped to [-30, 20]."""
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))  # exp() of the log-variance needs it
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, b c h w."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """Reparametrised draw mean + std * noise; `noise` is standard normal, b c h w."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean, b c h w."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) per image, b: a sum over channels and pixels (arXiv:1312.6114, appendix B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


_pytree.register_dataclass(Posterior, field_names=["mean", "logvar"])


def _norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=NORM_EPS)


def _conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, groups)
        self.conv1 = _conv3x3(c_in, c_out)
        self.norm2 = _norm(c_out, groups)
        self.conv2 = _conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map b c_in h w -> b c_out h w."""
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c h w."""
        height = x.shape[2]
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))  # b 1 n c
        return x + rearrange(self.to_out(h), "b 1 (h w) c -> b c h w", h=height)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.res1 = ResBlock(channels, channels, groups)
        self.attn = Attention(channels, groups)
        self.res2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c h w."""
        return self.res2(self.attn(self.res1(x)))


class Downsample(nn.Module):
    """Halve the resolution: stride-2 convolution, padded right and bottom only, as the released weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c h/2 w/2."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b c 2h 2w."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class EncoderLevel(nn.Module):
    """The residual blocks of one resolution and, except at the last level, a downsampling."""

    def __init__(self, c_in: int, c_out: int, *, blocks: int, groups: int, down: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(blocks)))
        self.down = Downsample(c_out) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map b c_in h w -> b c_out h/2 w/2 (same size at the last level)."""
        return self.down(self.blocks(x))


class DecoderLevel(nn.Module):
    """The residual blocks of one resolution and, except at the last level, an upsampling."""

    def __init__(self, c_in: int, c_out: int, *, blocks: int, groups: int, up: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(blocks)))
        self.up = Upsample(c_out) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map b c_in h w -> b c_out 2h 2w (same size at the last level)."""
        return self.up(self.blocks(x))


class Encoder(nn.Module):
    """Image to the un-projected moments of the posterior."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        self.conv_in = _conv3x3(config.in_channels, widths[0])
        self.levels = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], width, blocks=config.blocks, groups=groups, down=i + 1 < len(widths))
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = _conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w -> b 2z h/f w/f."""
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent to image; `levels` are in processing order, the lowest resolution first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.channels[::-1], config.groups
        self.conv_in = _conv3x3(config.latent_channels, widths[0])
        self.mid = Middle(widths[0], groups)
        self.levels = nn.ModuleList(
            DecoderLevel(widths[max(i - 1, 0)], width, blocks=config.blocks + 1, groups=groups, up=i + 1 < len(widths))
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = _conv3x3(widths[-1], config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Map b z h w -> b c h*f w*f."""
        h = self.mid(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))


@register("vae", "kl", options=VAEConfig)
class VAE(nn.Module):
    """KL autoencoder. Images are b c h w in [-1, 1]; sides are multiples of `factor`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.config.channels) - 1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, at which the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Reconstruct `x`: the training pass.

        Args:
            x: b c h w in [-1, 1].
            noise: standard normal, b z h/f w/f; None decodes the mode.

        Returns: the reconstruction, b c h w (not clamped), and the posterior.
        """
        posterior = self.encode(x)
        return self.decode(posterior.mode() if noise is None else posterior.sample(noise)), posterior

    def encode(self, x: Tensor) -> Posterior:
        """Posterior of the unscaled latent for images b c h w in [-1, 1].

        Raises: ValueError if the channels or the size do not fit the network.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"vae: image is {tuple(x.shape)} (b c h w), must have {self.config.in_channels} channels and "
                f"sides that are multiples of {self.factor}; resize or crop it"
            )
        return Posterior.from_moments(self.quant(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent b z h w -> image b c h*f w*f, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant(z.to(self.post_quant.weight.dtype)))

    def to_latent(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Images b c h w in [-1, 1] -> diffusion latents b z h/f w/f of about unit std.

        Args:
            x: images.
            noise: standard normal, b z h/f w/f, for a posterior sample (as SD trains); None takes the mode.
        """
        posterior = self.encode(x)
        return self.config.scale_factor * (posterior.mode() if noise is None else posterior.sample(noise))

    def from_latent(self, z: Tensor, tile: int | None = None, *, one_by_one: bool = False) -> Tensor:
        """Diffusion latents b z h w -> images b c h*f w*f, about [-1, 1], not clamped.

        Args:
            z: latents of about unit std.
            tile: side of a square tile in latent pixels: larger latents are decoded tile by tile with a quarter
                overlap, blended linearly; bounds memory, changes the result slightly at the seams.
            one_by_one: decode one image at a time; same result, less memory.

        Raises: ValueError if `tile` is below 4.
        """
        z = z / self.config.scale_factor
        if one_by_one:
            return torch.cat([self._decode(row, tile) for row in z.split(1)])
        return self._decode(z, tile)

    def _decode(self, z: Tensor, tile: int | None) -> Tensor:
        if tile is None or max(z.shape[2:]) <= tile:
            return self.decode(z)
        return self._decode_tiled(z, tile)

    def _decode_tiled(self, z: Tensor, tile: int) -> Tensor:
        if tile < 4:
            raise ValueError(f"vae: tile is {tile} latent pixels, must be at least 4; try 32 or more")
        f, (height, width) = self.factor, z.shape[2:]
        total = z.new_zeros(z.shape[0], self.config.in_channels, height * f, width * f)
        weight = z.new_zeros(1, 1, height * f, width * f)
        for top in _tile_starts(height, tile):
            for left in _tile_starts(width, tile):
                piece = self.decode(z[:, :, top : top + tile, left : left + tile])  # b c th tw
                rows, columns = (slice(k * f, k * f + n) for k, n in zip((top, left), piece.shape[2:], strict=True))
                down, across = (_ramp(n, tile * f // 4, z) for n in piece.shape[2:])
                total[:, :, rows, columns] += piece * down[:, None] * across
                weight[:, :, rows, columns] += down[:, None] * across
        return total / weight


def _tile_starts(size: int, tile: int) -> tuple[int, ...]:
    """First positions of tiles that cover `size` with at least a quarter overlap; the last one ends at the border."""
    if size <= tile:
        return (0,)
    stride = tile - tile // 4
    return (*range(0, size - tile, stride), size - tile)


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    """Blend weights along one side: rising over `overlap` pixels, flat, falling; all positive."""
    distance = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap) / overlap
