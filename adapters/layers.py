"""Pieces that two or more adapters share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.clip import ImageTower
from ldm.models.swin import Swin
from ldm.registry import build


def init_gaussian(module: nn.Conv2d | nn.Linear) -> None:
    """Gaussian weights of variance 1 / fan_in, zero bias: the ablation of zero convolutions (section 4.4)."""
    nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def fit_hint(hint: Tensor, channels: int, factor: int) -> Tensor:
    """A hint image with as many channels as an adapter takes.

    Files are RGB: an adapter of one channel reads the mean of three (lines and depth have three equal ones), an adapter
    of three gets one channel repeated.

    Args:
        hint: b c h w in [0, 1].
        channels: what the adapter takes.
        factor: what height and width must be multiples of.

    Raises: ValueError on another number of channels, or another size.
    """
    _, c, height, width = hint.shape
    if height % factor or width % factor:
        size = f"{height}x{width} (h w), must be a multiple of {factor}"
        raise ValueError(f"hint is {size}; resize the hint to the image's size")
    if (c, channels) == (3, 1):
        return hint.mean(dim=1, keepdim=True)
    if (c, channels) == (1, 3):
        return hint.expand(-1, 3, -1, -1)
    if c != channels:
        raise ValueError(f"hint has {c} channels; this adapter takes {channels}")
    return hint


def check_size(features: Tensor, x_t: Tensor, stride: int, factor: int) -> None:
    """Compare the sizes of hint and picture.

    Args:
        features: b c h w, made of the hint, 1/stride of the latent's size.
        x_t: b c h w.
        stride: see `features`.
        factor: pixels per latent pixel, for the message.

    Raises: ValueError if they differ.
    """
    if any(side * stride != other for side, other in zip(features.shape[-2:], x_t.shape[-2:], strict=True)):
        h, w = (factor * stride * side for side in features.shape[-2:])
        H, W = (factor * side for side in x_t.shape[-2:])
        raise ValueError(
            f"hint is {h}x{w} (h w), the image {H}x{W} if the VAE shrinks by {factor}, as this adapter supposes; "
            "resize the hint, or build the adapter for this VAE (ControlNet: one more of hint_widths than halvings)"
        )


def blank_tower(node: Mapping[str, Any]) -> ImageTower:
    """The image tower that an adapter's `encoder:` describes, frozen, without its weights."""
    tower: ImageTower = build("image", {k: v for k, v in node.items() if k not in ("weights", "weights_prefix")})
    return tower.requires_grad_(False).eval()


def _flat(references: Tensor) -> Tensor:
    """References of all pictures in one row, b m 3 h w -> (b m) 3 h w. Raises: ValueError on another shape."""
    if references.ndim != 5 or references.shape[2] != 3:
        raise ValueError(f"references are {tuple(references.shape)}, must be b m 3 h w (m references for each picture)")
    return rearrange(references, "b m c h w -> (b m) c h w")


class FrozenEncoder(nn.Module):
    """An image tower that an adapter listens to but does not own.

    It has no parameters and no state, so files of the adapter do not hold the tower and optimizers do not see it;
    several adapters may share one. It follows its adapter to other devices and types.
    """

    def __init__(self, tower: ImageTower, *, pooled: bool, last: bool = False) -> None:
        """Listen to a tower.

        Args:
            tower: in eval mode, frozen.
            pooled: read one vector per image (`ImageTower.forward`), else its tokens.
            last: which tokens, see `ImageTower.tokens`.
        """
        super().__init__()
        self._tower = (tower,)  # in a tuple, where torch does not look for modules
        self._pooled, self._last = pooled, last
        self._zero: Tensor | None = None

    @property
    def tower(self) -> ImageTower:
        """The tower itself."""
        return self._tower[0]

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.tower.pooled_width if self._pooled else self.tower.width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenEncoder":
        self.tower._apply(fn, recurse)
        self._zero = None
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        """Features of reference images.

        Args:
            images: b m 3 h w in [0, 1], m for each picture; resized to the tower's size, squeezed if not square.

        Returns: b m n d, n = 1 where they are pooled.
        Raises: ValueError on another shape.
        """
        flat = _flat(images)
        side = self.tower.image_size
        if flat.shape[-2:] != (side, side):
            flat = F.interpolate(flat.float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        features = self._encode(flat.to(images.dtype) * 2 - 1)
        return rearrange(features, "(b m) n d -> b m n d", m=images.shape[1])

    def rows(self, features: Tensor) -> Tensor:
        """Features b m n d of m references each, those of all pictures in one row: (b m) n d.

        Raises: ValueError on features of another encoder.
        """
        if features.ndim != 4 or features.shape[-1] != self.width:
            raise ValueError(
                f"image features are {tuple(features.shape)}, must be b m n {self.width} (m references, n tokens): "
                "encode the references with this adapter's encoder"
            )
        return rearrange(features, "b m n d -> (b m) n d")

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps b m c h w of a Swin, finest first, of references b m 3 h w in [0, 1] of any size.

        Raises: ValueError on another shape.
        """
        assert isinstance(self.tower, Swin)
        maps = self.tower.stages(_flat(images) * 2 - 1)
        return tuple(rearrange(x, "(b m) c h w -> b m c h w", m=images.shape[1]) for x in maps)

    def zero(self) -> Tensor:
        """Features of the image that is zero behind the tower's own normalisation, 1 1 n d; computed once."""
        if self._zero is None:
            weight, side = next(self.tower.parameters()), self.tower.image_size
            colour = torch.tensor(self.tower.zero_colour, dtype=weight.dtype, device=weight.device)
            self._zero = self._encode(colour.view(1, 3, 1, 1).expand(1, 3, side, side))[:, None]
        return self._zero

    def _encode(self, x: Tensor) -> Tensor:
        return self.tower(x)[:, None] if self._pooled else self.tower.tokens(x, last=self._last)


class Resampler(nn.Module):
    """Perceiver resampler: learned queries read any number of tokens and become a fixed number.

    Alayrac et al. 2022 (arXiv:2204.14198), section 3.1.1, as in the released IP-Adapter Plus: the queries see the image
    tokens and themselves, the image tokens stay as they are, and there is no position embedding.

    Args:
        in_dim: width of the tokens read.
        dim: inner width, a multiple of head_dim.
        out_dim: width of the tokens made.
        tokens: how many are made.
        depth: layers.
        head_dim: width of one attention head.
    """

    def __init__(self, in_dim: int, dim: int, out_dim: int, *, tokens: int, depth: int = 4, head_dim: int = 64) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"resampler width {dim} is not a multiple of head_dim {head_dim}; change either")
        self.latents = nn.Parameter(torch.randn(1, tokens, dim) * dim**-0.5)
        self.proj_in = nn.Linear(in_dim, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, head_dim) for _ in range(depth))
        self.proj_out = nn.Linear(dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens b n in_dim -> b tokens out_dim."""
        x = self.proj_in(x)
        z = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            z = layer(z, x)
        return self.norm_out(self.proj_out(z))


class ResamplerLayer(nn.Module):
    """Queries read tokens and themselves, then a feed-forward of four times the width; residual around each."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm_x = nn.LayerNorm(dim)
        self.norm_z = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)  # rows: keys, then values
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, 4 * dim, bias=False)
        self.ff_out = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Queries z: b m dim, tokens x: b n dim -> b m dim."""
        own = self.norm_z(z)
        k, v = self.to_kv(torch.cat([self.norm_x(x), own], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", d=self.head_dim) for y in (self.to_q(own), k, v))
        z = z + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return z + self.ff_out(F.gelu(self.ff_in(self.ff_norm(z))))


class EncoderBlock(nn.Module):
    """CLIP's transformer block: self-attention, then a feed-forward with QuickGELU; LayerNorm ahead of each."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, heard: Tensor | None = None) -> Tensor:
        """Tokens b n dim -> b n dim. `heard`: b n n bool, which keys each query sees; None: all."""
        q, k, v = rearrange(self.to_qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mask = None if heard is None else heard[:, None]
        x = x + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)"))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))
