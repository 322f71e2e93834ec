"""The denoising UNet, split in two public halves so that adapters can hook the skips between them.

Ho et al. 2020 (arXiv:2006.11239), Rombach et al. 2022 (arXiv:2112.10752), Podell et al. 2023 (arXiv:2307.01952).
SD1.x, SD2.x, SDXL and small models are one class at different `UNetConfig`s.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.control import KV, Control, Encoded
from ldm.models.attention import SpatialTransformer, TransformerBlock
from ldm.models.blocks import Downsample, Embed, ResBlock, Upsample, init_zero, silu, timestep_embedding
from ldm.models.unet_spec import CrossAttn, Tap, UNetConfig, UNetSpec, skip_taps
from ldm.registry import register

__all__ = ["CrossAttn", "Tap", "UNet", "UNetConfig", "UNetDecoder", "UNetEncoder", "UNetSpec", "num_parameters"]


class UNetBlock(nn.Module):
    """A residual block, then a transformer where the level has attention."""

    def __init__(self, config: UNetConfig, in_channels: int, channels: int, depth: int) -> None:
        super().__init__()
        self.res = ResBlock(in_channels, channels, 4 * config.channels[0], config.groups)
        self.attn = _transformer(config, channels, depth) if depth else None

    def forward(self, h: Tensor, emb: Tensor, control: Control) -> Tensor:
        """h: b in_channels h w, emb: b e -> b channels h w."""
        h = self.res(h, emb)
        return h if self.attn is None else self.attn(h, control)


def _transformer(config: UNetConfig, dim: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(
        dim, config.heads(dim), config.context_dim, depth=depth, linear=config.linear_proj, groups=config.groups
    )


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c, emb_dim = config.channels[-1], 4 * config.channels[0]
        self.res1 = ResBlock(c, c, emb_dim, config.groups)
        self.attn = _transformer(config, c, config.mid_depth) if config.mid_depth else None
        self.res2 = ResBlock(c, c, emb_dim, config.groups)

    def forward(self, h: Tensor, emb: Tensor, control: Control) -> Tensor:
        """h: b c h w -> b c h w."""
        h = self.res1(h, emb)
        h = h if self.attn is None else self.attn(h, control)
        return self.res2(h, emb)


class EncoderLevel(nn.Module):
    """Blocks of one resolution and the downsampling behind them (none on the last level)."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        c = config.channels[level]
        widths = [in_channels] + [c] * config.blocks_at(level)
        self.blocks = nn.ModuleList(UNetBlock(config, a, b, config.depth[level]) for a, b in pairwise(widths))
        self.down = Downsample(c) if level < len(config.channels) - 1 else None


class DecoderLevel(nn.Module):
    """Blocks of one resolution, each reading one skip, and the upsampling behind them (none on the last level)."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, skips: list[int]) -> None:
        super().__init__()
        c = config.channels[level]
        widths = [in_channels] + [c] * (len(skips) - 1)
        self.blocks = nn.ModuleList(
            UNetBlock(config, w + s, c, config.depth[level]) for w, s in zip(widths, skips, strict=True)
        )
        self.up = Upsample(c) if level > 0 else None


class _Half(nn.Module):
    checkpointing = False

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute block activations in backward instead of keeping them (less memory, about a third more time)."""
        self.checkpointing = on

    def project(self, control: Control) -> Control:
        """The Control with `kv`: keys and values of its context for this half's own layers, in execution order.

        For a context that stays the same over many calls; pure, with gradients if the context has them.
        """
        context = control.context
        return control if context is None else dataclasses.replace(control, kv=tuple(_project(self, context)))

    def _run(self, block: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(*args)


def _entries(field: str, given: tuple[Tensor, ...], n: int, places: str) -> tuple[Tensor | None, ...]:
    """What a Control adds at n places, None where it says nothing. Raises: ValueError on another number."""
    if given and len(given) != n:
        raise ValueError(f"Control.{field} has {len(given)} entries; this UNet has {n} {places}")
    return given or (None,) * n


class UNetEncoder(_Half):
    """conv_in, the levels on the way down, and the middle block. `copy.deepcopy` of it is ControlNet's trunk."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c0, emb_dim = config.channels[0], 4 * config.channels[0]
        self.time_embed = Embed(c0, emb_dim)
        self.vector_embed = Embed(config.vector_dim, emb_dim) if config.vector_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)
        inputs = (c0, *config.channels[:-1])
        self.levels = nn.ModuleList(EncoderLevel(config, i, c) for i, c in enumerate(inputs))
        self.mid = MidBlock(config)

    def forward(self, x_t: Tensor, t: Tensor, control: Control) -> Encoded:
        """x_t: b c h w, t: b -> mid, skips and embedding. Reads control.context, kv, vector, stages, downs, attn."""
        return self.encode(self.conv_in(x_t), t, control)

    def encode(self, h: Tensor, t: Tensor, control: Control) -> Encoded:
        """The same from the output of `conv_in` on, for adapters that add to it (ControlNet's hint).

        Raises: ValueError if control.stages or downs do not fit, or vector or context is missing or of the wrong width.
        """
        act = F.silu(self._embed(t, control, h.dtype))  # once, not in each block
        skips = [h]
        stages = _entries("stages", control.stages, len(self.levels), "resolutions")
        downs = (*_entries("downs", control.downs, len(self.levels) - 1, "downsamplings"), None)
        for level, extra, behind in zip(cast("list[EncoderLevel]", self.levels), stages, downs, strict=True):
            for i, block in enumerate(level.blocks):
                h = self._run(block, h, act, control)
                if extra is not None and i == len(level.blocks) - 1:
                    h = h + extra
                skips.append(h)
            if level.down is not None:
                h = level.down(h)
                h = h if behind is None else h + behind
                skips.append(h)
        return Encoded(mid=self._run(self.mid, h, act, control), skips=tuple(skips), emb=act)

    def _embed(self, t: Tensor, control: Control, dtype: torch.dtype) -> Tensor:
        weight = self.conv_in.weight
        emb = self.time_embed(timestep_embedding(t, weight.shape[0]).to(weight.dtype))
        if (self.vector_embed is None) != (control.vector is None):
            want = "no vector" if self.vector_embed is None else "a vector (SDXL: pooled text and six sizes)"
            raise ValueError(f"this UNet takes {want}, the Control has {'none' if control.vector is None else 'one'}")
        if self.vector_embed is not None and control.vector is not None:
            emb = emb + self.vector_embed(control.vector.to(weight.dtype))
        return emb.to(dtype)


class UNetDecoder(_Half):
    """The levels on the way up, and the output convolution (which starts at zero)."""

    def __init__(self, config: UNetConfig, skips: tuple[Tap, ...]) -> None:
        super().__init__()
        left = [tap.channels for tap in skips]
        self.levels = nn.ModuleList()
        width = config.channels[-1]
        for level in reversed(range(len(config.channels))):
            taken = [left.pop() for _ in range(config.blocks_at(level) + 1)]
            self.levels.append(DecoderLevel(config, level, width, taken))
            width = config.channels[level]
        self.norm_out = nn.GroupNorm(config.groups, width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        init_zero(self.conv_out)

    def forward(self, enc: Encoded, control: Control) -> Tensor:
        """Prediction b c h w of the UNet's objective. Reads control.context, kv, mid, skips and attn.

        Raises: ValueError if control.skips is neither empty nor as long as the skips.
        """
        h = enc.mid if control.mid is None else enc.mid + control.mid
        extra = _entries("skips", control.skips, len(enc.skips), "skips")
        pairs = reversed(list(zip(enc.skips, extra, strict=True)))
        for level in cast("list[DecoderLevel]", self.levels):
            for block in level.blocks:
                skip, residual = next(pairs)
                skip = skip if residual is None else skip + residual
                h = self._run(block, torch.cat([h, skip], dim=1), enc.emb, control)
            h = h if level.up is None else level.up(h)
        return self.conv_out(silu(self.norm_out(h)))


@register("unet", "unet", options=UNetConfig)
class UNet(nn.Module):
    """The whole denoiser. `forward` has three arguments, forever."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = UNetEncoder(config)
        self.decoder = UNetDecoder(config, skip_taps(config))
        self.spec = self._spec()

    def forward(self, x_t: Tensor, t: Tensor, control: Control) -> Tensor:
        """Predict.

        Args:
            x_t: b in_channels h w, noisy latent; h and w multiples of `spec.multiple`.
            t: b, timesteps in 0..T-1 (fractions allowed).
            control: conditioning; needs `context` where the UNet has cross-attention.

        Returns: b out_channels h w.
        Raises: ValueError on a size or a Control that does not fit.
        """
        self._check(x_t, control)
        return self.decoder(self.encoder(x_t, t, control), control)

    def project(self, control: Control) -> Control:
        """The Control with `kv`: keys and values of its context for every cross-attention layer.

        Once per image, for a context that is the same at every step. Adapters with attention of their own make
        theirs (`Adapter.settle`).
        """
        context = control.context
        return control if context is None else dataclasses.replace(control, kv=tuple(_project(self, context)))

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute block activations in backward instead of keeping them (less memory, about a third more time)."""
        self.encoder.checkpoint_activations(on)
        self.decoder.checkpoint_activations(on)

    def _check(self, x_t: Tensor, control: Control) -> None:
        b, c, h, w = x_t.shape
        m = self.spec.multiple
        if c != self.spec.in_channels:
            raise ValueError(f"x_t has {c} channels; this UNet takes {self.spec.in_channels}")
        if h % m or w % m:
            raise ValueError(f"latent is {h}x{w} (h w); both must be multiples of {m}: resize or pad the image")
        context = control.context
        if context is None and self.spec.cross_attn:
            raise ValueError("Control.context is None; this UNet has cross-attention: give it text or image tokens")
        if context is not None and (context.shape[0] != b or context.shape[-1] != self.spec.context_dim):
            raise ValueError(
                f"Control.context is {tuple(context.shape)} (b n d); this call needs b={b}, d={self.spec.context_dim}"
            )
        if control.kv and len(control.kv) != len(self.spec.cross_attn):
            raise ValueError(
                f"Control.kv has {len(control.kv)} layers; this UNet has {len(self.spec.cross_attn)}: "
                "let its project() make them"
            )

    def _transformers(self) -> Iterator[tuple[str, SpatialTransformer]]:
        """In execution order, named as `CrossAttn` says; decoder levels count from the lowest resolution."""
        halves = (("down", self.encoder.levels), ("up", self.decoder.levels))
        levels = [(f"{part}.{i}", level.blocks) for part, half in halves for i, level in enumerate(cast("Any", half))]
        blocks = [(f"{level}.{j}", block) for level, each in levels for j, block in enumerate(each)]
        down = sum(name.startswith("down") for name, _ in blocks)
        for name, block in (*blocks[:down], ("mid", self.encoder.mid), *blocks[down:]):
            if block.attn is not None:
                yield name, block.attn

    def _spec(self) -> UNetSpec:
        cross: list[CrossAttn] = []
        for name, module in self._transformers():
            module.first_layer = len(cross)
            attn2 = [block.attn2 for block in cast("list[TransformerBlock]", module.blocks)]
            cross += [CrossAttn(a.to_q.out_features, a.heads, name.partition(".")[0], name) for a in attn2]
        config = self.config
        strides = [2**i for i in range(len(config.channels))]
        return UNetSpec(
            in_channels=config.in_channels,
            emb_dim=4 * config.channels[0],
            context_dim=config.context_dim,
            vector_dim=config.vector_dim,
            skips=skip_taps(config),
            stages=tuple(Tap(c, s) for c, s in zip(config.channels, strides, strict=True)),
            mid=Tap(config.channels[-1], strides[-1]),
            cross_attn=tuple(cross),
        )


def _project(network: nn.Module, context: Tensor) -> Iterator[KV]:
    """Keys and values of every cross-attention layer, in the order of the modules, which is that of execution."""
    for module in network.modules():
        if isinstance(module, TransformerBlock):
            k, v = module.attn2.project(context)
            yield k.contiguous(), v.contiguous()  # read at every step: laid out for it once


def num_parameters(module: nn.Module) -> int:
    """Number of parameters, each shared one counted once."""
    return sum(math.prod(p.shape) for p in module.parameters())
