"""T2I-Adapter: a small network that runs once per image and adds to the frozen UNet's encoder at every scale.

Mou et al. 2023 (arXiv:2302.08453), section 3.3; layer shapes as in the released SD1.x, light and SDXL weights, with
widths from `UNetSpec`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, cast

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.layers import check_size, fit_hint
from ldm.control import Adapter, Control
from ldm.models.blocks import Embed, init_zero, timestep_embedding
from ldm.models.unet import Tap, UNet, UNetSpec
from ldm.registry import ConfigError, register, suggest

VARIANTS: Final = ("full", "light", "xl")
GUIDES: Final = ("encoder", "decoder", "both")


@dataclass(frozen=True)
class T2IAdapterOptions:
    """Shape of a T2I-Adapter.

    Attributes:
        variant: "full" (77 M parameters at SD1.5's widths), "light" (inside each level the channels are divided by
            `divisor`), or "xl" (the released SDXL adapters: half the resolution, see `places`).
        hint_channels: 1 or 3.
        vae_factor: pixels per latent pixel. The hint's pixels are folded into channels by this factor, by twice as
            much in "xl".
        depth: residual blocks per level; null is what was released: 2, and 4 in "light".
        divisor: of "light": 4 is the paper's small adapter and the released colour adapter, 8 its tiny one.
        scales: which features are used, counted from the largest resolution; null = all (ablation of section 4.3).
        guide: "encoder", "decoder" or "both" (same ablation; the decoder gets them with the skip of that scale).
        time: features also depend on the timestep (section 3.4; the paper drops it for speed and samples cubically).
    """

    variant: str = "full"
    hint_channels: int = 3
    vae_factor: int = 8
    depth: int | None = None
    divisor: int = 4
    scales: tuple[int, ...] | None = None
    guide: str = "encoder"
    time: bool = False

    def __post_init__(self) -> None:
        for name, known in (("variant", VARIANTS), ("guide", GUIDES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"t2i_adapter.{name} is {value!r}; allowed: {', '.join(known)}{suggest(value, known)}"
                )
        if self.hint_channels not in (1, 3):
            raise ConfigError(
                f"t2i_adapter.hint_channels is {self.hint_channels}; allowed: 1 (lines, depth), 3 (colour)"
            )
        for name in ("vae_factor", "depth", "divisor"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"t2i_adapter.{name} is {value}, must be at least 1")
        if self.variant == "xl" and self.guide != "encoder":
            raise ConfigError(
                f"t2i_adapter.guide is {self.guide!r}; variant xl allows encoder only: one of its features "
                "goes to the middle block, which is no skip; choose variant full"
            )


def places(spec: UNetSpec, variant: str) -> tuple[Tap, ...]:
    """Where the features of a whole adapter go, from the largest resolution down.

    "full" and "light": the last block of each resolution (SD1.5: entries 2, 5, 8, 11 of the encoder). "xl": behind the
    first downsampling, the last block of each further resolution, the middle block (SDXL: entries 3, 5, 8, middle).

    Raises: ConfigError if the UNet has no downsampling for "xl".
    """
    if variant != "xl":
        return spec.stages
    if len(spec.stages) < 2:
        raise ConfigError("t2i_adapter.variant is 'xl', which needs a UNet that halves its input; choose full or light")
    return (Tap(spec.stages[0].channels, spec.stages[1].stride), *spec.stages[1:], spec.mid)


class Residual(nn.Module):
    """x + conv(ReLU(conv3x3(x))), without normalisation. The second convolution is 1x1, or 3x3 in "light"."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Level(nn.Module):
    """One resolution: average pooling where it halves, then residual blocks.

    Pooling rounds up, as the UNet's strided convolutions do (the first released code rounds down, which fits sizes that
    divide by 64 only).
    """

    def __init__(self, channels: tuple[int, int], *, halve: bool, blocks: int, divisor: int | None) -> None:
        super().__init__()
        before, after = channels
        width = after if divisor is None else after // divisor
        self.halve = halve
        self.in_conv = nn.Conv2d(before, width, 1) if divisor or before != after else None
        self.blocks = nn.Sequential(*(Residual(width, 3 if divisor else 1) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(width, after, 1) if divisor else None

    def forward(self, x: Tensor) -> Tensor:
        """Map b before h w to b after h w, or half that size, rounded up."""
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halve else x
        x = x if self.in_conv is None else self.in_conv(x)
        x = self.blocks(x)
        return x if self.out_conv is None else self.out_conv(x)


class TimeScale(nn.Module):
    """Features times (1 + scale(t)) plus shift(t), per channel; zero at the start.

    The paper feeds the embedding to the whole adapter, which then has to run at every step. Here it acts on the
    features, so the convolutions still run once per image.
    """

    def __init__(self, channels: tuple[int, ...], emb_dim: int) -> None:
        super().__init__()
        self.dim = emb_dim // 4
        self.embed = Embed(self.dim, emb_dim)
        self.heads = nn.ModuleList(nn.Linear(emb_dim, 2 * c) for c in channels)
        for head in self.heads:
            init_zero(cast("nn.Linear", head))

    def forward(self, features: tuple[Tensor, ...], t: Tensor) -> tuple[Tensor, ...]:
        """Features b c h w each, t: b."""
        emb = F.silu(self.embed(timestep_embedding(t, self.dim).to(features[0].dtype)))
        scale_shift = [head(emb)[..., None, None].chunk(2, dim=1) for head in self.heads]
        return tuple(x * (1 + scale) + shift for x, (scale, shift) in zip(features, scale_shift, strict=True))


@register("adapter", "t2i_adapter", options=T2IAdapterOptions)
class T2IAdapter(Adapter[tuple[Tensor, ...]]):
    """Features of a hint image of the picture's own size, added at the UNet's scales.

    Nothing starts at zero: as released, a fresh adapter already changes what the UNet draws.
    """

    hint_range = (0.0, 1.0)

    def __init__(self, options: T2IAdapterOptions, *, unet: UNet) -> None:
        super().__init__()
        self.options, self.spec = options, unet.spec
        taps = places(unet.spec, options.variant)
        self.scales = _scales(options.scales, len(taps))
        taps = taps[: max(self.scales) + 1]
        light = options.variant == "light"
        self.factor = options.vae_factor * taps[0].stride
        folded = options.hint_channels * self.factor**2
        if light and options.divisor > (least := min(tap.channels for tap in taps)):
            raise ConfigError(
                f"t2i_adapter.divisor is {options.divisor}, must be at most {least}, the UNet's least width"
            )
        blocks = options.depth or (4 if light else 2)
        divisor = options.divisor if light else None
        self.conv_in = None if light else nn.Conv2d(folded, taps[0].channels, 3, padding=1)
        first = Tap(folded if light else taps[0].channels, taps[0].stride)
        self.levels = nn.ModuleList(
            Level((a.channels, b.channels), halve=b.stride > a.stride, blocks=blocks, divisor=divisor)
            for a, b in pairwise((first, *taps))
        )
        channels = tuple(taps[i].channels for i in self.scales)
        self.time = TimeScale(channels, unet.spec.emb_dim) if options.time else None

    @property
    def zero_layers(self) -> tuple[nn.Module, ...]:
        """Those of the time embedding, where there is one."""
        return () if self.time is None else tuple(self.time.heads)

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Hint b c h w in [0, 1] (lines white on black) -> one feature map b c h w per used scale.

        Raises: ValueError on another number of channels, or a size that is not a multiple of the folding factor.
        """
        hint = fit_hint(hint, self.options.hint_channels, self.factor)
        weight = next(self.parameters())
        x = F.pixel_unshuffle(hint.to(weight.dtype), self.factor)
        x = x if self.conv_in is None else self.conv_in(x)
        features: list[Tensor] = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return tuple(features[i] for i in self.scales)

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: tuple[Tensor, ...]) -> Control:
        """The prepared features at their places. Raises: ValueError if the hint's size differs."""
        features = prepared if self.time is None else self.time(prepared, t)
        stride = places(self.spec, self.options.variant)[self.scales[0]].stride
        check_size(features[0], x_t, stride, self.options.vae_factor)
        by_scale = dict(zip(self.scales, features, strict=True))
        return self._xl(x_t, by_scale) if self.options.variant == "xl" else self._stages(x_t, by_scale)

    def _stages(self, x_t: Tensor, features: dict[int, Tensor]) -> Control:
        stages = tuple(features.get(i, _silence(x_t, tap)) for i, tap in enumerate(self.spec.stages))
        if self.options.guide == "encoder":
            return Control(stages=stages)
        skips = [_silence(x_t, tap) for tap in self.spec.skips]
        for stage, extra in zip(self.spec.stages, stages, strict=True):
            skips[max(i for i, tap in enumerate(self.spec.skips) if tap.stride == stage.stride)] = extra
        return Control(stages=stages if self.options.guide == "both" else (), skips=tuple(skips))

    def _xl(self, x_t: Tensor, features: dict[int, Tensor]) -> Control:
        stages, last = self.spec.stages, len(self.spec.stages)
        behind = [_silence(x_t, Tap(a.channels, b.stride)) for a, b in pairwise(stages)]
        behind[0] = features.get(0, behind[0])
        inner = tuple(features.get(i, _silence(x_t, tap)) for i, tap in enumerate(stages[1:], start=1))
        return Control(downs=tuple(behind), stages=(_silence(x_t, stages[0]), *inner), mid=features.get(last))


def _silence(x_t: Tensor, tap: Tap) -> Tensor:
    """Zeros for a place that gets no feature."""
    b, _, h, w = x_t.shape
    return x_t.new_zeros(1, 1, 1, 1).expand(b, tap.channels, h // tap.stride, w // tap.stride)


def _scales(wanted: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Indices of the used features, ascending. Raises: ConfigError if there are none, doubles, or unknown ones."""
    scales = tuple(range(count)) if wanted is None else tuple(sorted(wanted))
    if not scales or len(set(scales)) < len(scales) or not set(scales) <= set(range(count)):
        raise ConfigError(f"t2i_adapter.scales is {wanted}; this UNet has 0..{count - 1}: name each wanted one once")
    return scales
