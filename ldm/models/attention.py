"""Attention layers of the UNet: attention, GEGLU feed-forward, SpatialTransformer.

Vaswani et al. 2017 (arXiv:1706.03762); Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E.2.1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.control import KV, Control, ExtraKV
from ldm.models.blocks import init_zero

UNFUSED_KEYS = 1024  # up to here two products on the bf16 units beat the fused kernel on CPUs; beyond, it wins
_UNREAD = torch.zeros(1, dtype=torch.bfloat16)  # baddbmm's first argument, which beta 0 leaves out
Source = tuple[Tensor, Tensor, float | Tensor]  # keys b n inner, values b n inner, scale (or b 1 queries 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for b heads n d tensors.

    torch's fused kernel, except for short sequences in bf16 on a CPU: there two matrix products run on the bf16 units,
    which the fused kernel leaves idle (its backward above all).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= UNFUSED_KEYS:
        return _unfused(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, _, d = q.shape
    if q.shape == k.shape:  # batched products need dense heads: one copy for all three
        q, k, v = torch.stack([q, k, v]).flatten(1, 2)  # (b heads) n d
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(_UNREAD, q, k.transpose(1, 2), beta=0, alpha=d**-0.5)  # (b heads) n m
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (b, heads))


class Attention(nn.Module):
    """Multi-head attention; self-attention when no context is given.

    q, k, v have no bias, the output projection has one. Scale is head_dim ** -0.5.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention width {dim} is not a multiple of {heads} heads; change channels or heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def project(self, source: Tensor) -> KV:
        """Keys and values of b m context_dim, split into heads: b heads m d each."""
        return self._split(self.to_k(source)), self._split(self.to_v(source))

    def forward(
        self, x: Tensor, context: Tensor | None = None, extra: Sequence[Source] = (), kv: KV | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: b n dim, queries.
            context: b m context_dim, keys and values; `x` itself when None.
            kv: what `project` made of the context; then `context` is not read.
            extra: further keys and values that share the queries; each result is added times its scale
                (decoupled cross-attention, arXiv:2308.06721 Eq. 5).

        Returns: b n dim.
        """
        q = self._split(self.to_q(x))  # b heads n d
        out = attend(q, *(kv or self.project(x if context is None else context)))
        for k, v, scale in extra:
            more = attend(q, self._split(k).to(q.dtype), self._split(v).to(q.dtype))
            out = out + scale * more if isinstance(scale, Tensor) else torch.add(out, more, alpha=scale)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class GEGLU(nn.Module):
    """Feed-forward with a gated linear unit: value * gelu(gate), exact GELU, inner width 4 * dim.

    Shazeer 2020 (arXiv:2002.05202). First half of `proj` is the value, second half the gate.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens b n dim -> b n dim."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        gelu = F.gelu(gate)
        return self.out(value * gelu if gelu.requires_grad else gelu.mul_(value))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; pre-LayerNorm, residual around each."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim)

    def forward(self, x: Tensor, context: Tensor, extra: Sequence[Source], kv: KV | None = None) -> Tensor:
        """x: b n dim, context: b m context_dim (not read where `kv` is given) -> b n dim."""
        x = self.attn1(self.norm1(x)).add_(x)  # no layer keeps its output for backward, so sums go in place
        x = self.attn2(self.norm2(x), context, extra, kv).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, with text (and image prompts) by cross-attention.

    Args:
        dim: channels of the map.
        heads: attention heads.
        context_dim: width of the context tokens.
        depth: number of transformer blocks.
        linear: Linear projections (SD2, SDXL) instead of 1x1 convolutions (SD1).
        groups: groups of the entry GroupNorm, whose eps is 1e-6 (unlike the residual blocks' 1e-5).
    """

    def __init__(self, dim: int, heads: int, context_dim: int, *, depth: int, linear: bool, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        init_zero(self.proj_out)
        self.linear = linear
        self.first_layer = 0  # index of blocks[0] in UNetSpec.cross_attn; set once by UNet

    def forward(self, x: Tensor, control: Control) -> Tensor:
        """x: b dim h w -> b dim h w. Reads control.attn, context and kv. Raises: ValueError if there is no context."""
        if control.context is None:
            raise ValueError("Control.context is None; cross-attention needs tokens: give it text or image tokens")
        h, w = x.shape[-2:]
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        y = rearrange(y, "b c h w -> b (h w) c")
        y = self.proj_in(y) if self.linear else y
        scales = [_scale(e, h, w, y.dtype) for e in control.attn]
        for i, block in enumerate(self.blocks, start=self.first_layer):
            extra = [(e.k[i], e.v[i], scale) for e, scale in zip(control.attn, scales, strict=True)]
            y = block(y, control.context, extra, control.kv[i] if control.kv else None)
        y = self.proj_out(y) if self.linear else y
        y = rearrange(y, "b (h w) c -> b c h w", h=h, w=w)
        return x + (y if self.linear else self.proj_out(y))  # in the memory format of x


def _scale(source: ExtraKV, h: int, w: int, dtype: torch.dtype) -> float | Tensor:
    """Its scale, or with a mask its scale at each of the h w queries: b 1 n 1.

    A query counts by the share of its area that is inside the mask, so weights stay in [0, 1]. diffusers shrinks masks
    with bicubic interpolation, which differs at edges and overshoots.
    """
    if source.mask is None:
        return source.scale
    return source.scale * rearrange(F.adaptive_avg_pool2d(source.mask, (h, w)), "b 1 h w -> b 1 (h w) 1").to(dtype)
