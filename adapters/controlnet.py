"""ControlNet: a trainable copy of the UNet's encoder, joined to the locked UNet by zero convolutions.

Zhang, Rao, Agrawala 2023 (arXiv:2302.05543), section 3; layer shapes as in the released SD1.5 weights, derived from
`UNetSpec`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.layers import init_gaussian
from ldm.control import Adapter, Control
from ldm.models.blocks import init_zero
from ldm.models.unet import UNet, UNetEncoder
from ldm.registry import ConfigError, register

INITS: dict[str, Callable[[nn.Conv2d | nn.Linear], None]] = {
    "zero": init_zero,  # section 3.1
    "gaussian": init_gaussian,  # the ablation of section 4.4
}


@dataclass(frozen=True)
class ControlNetOptions:
    """Shape and start of a ControlNet.

    Attributes:
        hint_channels: channels of the hint image.
        hint_widths: channels of the hint encoder; every step halves the size, so 8x VAEs need four, 4x VAEs three.
        init: "copy" starts the trunk from the UNet's weights, "random" from scratch.
        zero_conv: "zero", or "gaussian" for the paper's ablation.
        middle_only: only the bottleneck residual.
    """

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    init: str = "copy"
    zero_conv: str = "zero"
    middle_only: bool = False

    def __post_init__(self) -> None:
        if self.init not in ("copy", "random"):
            raise ConfigError(f"controlnet.init is {self.init!r}; allowed: copy, random")
        if self.zero_conv not in INITS:
            raise ConfigError(f"controlnet.zero_conv is {self.zero_conv!r}; allowed: {', '.join(INITS)}")


class HintEncoder(nn.Module):
    """Hint image to features at latent size: 3x3 convolutions with SiLU between, stride 2 at each widening.

    The paper's text has four 4x4 convolutions; this is the released network. The last convolution starts at zero.
    """

    def __init__(self, hint_channels: int, widths: tuple[int, ...], channels: int, init: Callable[..., None]) -> None:
        super().__init__()
        shapes = [(hint_channels, widths[0], 1)]
        for narrow, wide in pairwise(widths):
            shapes += [(narrow, narrow, 1), (narrow, wide, 2)]
        shapes.append((widths[-1], channels, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in shapes)
        init(self.convs[-1])
        self.factor = 2 ** (len(widths) - 1)

    def forward(self, hint: Tensor) -> Tensor:
        """Hint, b hint_channels h w in [0, 1], to features, b channels h/factor w/factor.

        Raises: ValueError on another number of channels, or a size that is not a multiple of factor.
        """
        first = self.convs[0]
        _, c, height, width = hint.shape
        if c != first.in_channels:
            raise ValueError(f"hint has {c} channels; this ControlNet takes {first.in_channels}")
        if height % self.factor or width % self.factor:
            size = f"{height}x{width} (h w), must be a multiple of {self.factor}"
            raise ValueError(f"hint is {size}; resize the hint to the image's size")
        h = first(hint.to(first.weight.dtype))  # pyright: ignore
        for conv in self.convs[1:]:
            h = conv(F.silu(h))
        return h


def _zero_convs(channels: list[int], init: Callable[..., None]) -> nn.ModuleList:
    convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)
    for conv in convs:
        init(conv)
    return convs


def _check_size(features: Tensor, x_t: Tensor, factor: int) -> None:
    if features.shape[-2:] != x_t.shape[-2:]:
        h, w = (factor * s for s in features.shape[-2:])
        H, W = (factor * s for s in x_t.shape[-2:])
        raise ValueError(f"hint is {h}x{w} (h w), the image {H}x{W}; resize the hint to the image's size")


@register("adapter", "controlnet", options=ControlNetOptions)
class ControlNet(Adapter[Tensor]):
    """Residuals for every skip and the bottleneck, from a hint image of the picture's own size."""

    def __init__(self, options: ControlNetOptions, *, unet: UNet) -> None:
        super().__init__()
        spec, init = unet.spec, INITS[options.zero_conv]
        copied = options.init == "copy"
        self.encoder: UNetEncoder = copy.deepcopy(unet.encoder) if copied else UNet(unet.config).encoder
        self.encoder.requires_grad_(True)
        self.hint = HintEncoder(options.hint_channels, options.hint_widths, spec.skips[0].channels, init)
        self.zero_convs = _zero_convs([] if options.middle_only else [tap.channels for tap in spec.skips], init)
        self.zero_mid = _zero_convs([spec.mid.channels], init)[0]

    def prepare(self, hint: Tensor) -> Tensor:
        """Hint b c h w in [0, 1] (lines white on black) -> features at latent size."""
        return self.hint(hint)

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Tensor) -> Control:
        """One pass of the copy, on the UNet's own x_t, t and text. Raises: ValueError if the hint's size differs."""
        _check_size(prepared, x_t, self.hint.factor)
        x_t = x_t[:, : self.encoder.conv_in.in_channels]  # inpainting UNets append mask channels that it never saw
        enc = self.encoder.encode(self.encoder.conv_in(x_t) + prepared, t, base)
        skips = tuple(conv(skip) for conv, skip in zip(self.zero_convs, enc.skips, strict=False))
        return Control(skips=skips, mid=self.zero_mid(enc.mid))


@dataclass(frozen=True)
class ControlNetLiteOptions:
    """Shape of a ControlNet-lite; see ControlNetOptions."""

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    zero_conv: str = "zero"

    def __post_init__(self) -> None:
        if self.zero_conv not in INITS:
            raise ConfigError(f"controlnet_lite.zero_conv is {self.zero_conv!r}; allowed: {', '.join(INITS)}")


@register("adapter", "controlnet_lite", options=ControlNetLiteOptions)
class ControlNetLite(Adapter[Control]):
    """The paper's ablation (section 4.4): one convolution per block, not the copy; sees neither x_t, t nor text."""

    def __init__(self, options: ControlNetLiteOptions, *, unet: UNet) -> None:
        super().__init__()
        init, taps = INITS[options.zero_conv], unet.spec.skips
        self.hint = HintEncoder(options.hint_channels, options.hint_widths, taps[0].channels, init)
        self.convs = nn.ModuleList(
            nn.Conv2d(a.channels, b.channels, 3, stride=b.stride // a.stride, padding=1) for a, b in pairwise(taps)
        )
        self.zero_convs = _zero_convs([tap.channels for tap in taps], init)
        self.zero_mid = _zero_convs([unet.spec.mid.channels], init)[0]

    def prepare(self, hint: Tensor) -> Control:
        """Hint b c h w in [0, 1] -> the whole Control: nothing here depends on x_t or t."""
        h = self.hint(hint)
        features = [h]
        for conv in self.convs:
            h = F.silu(conv(h))
            features.append(h)
        skips = tuple(conv(f) for conv, f in zip(self.zero_convs, features, strict=True))
        return Control(skips=skips, mid=self.zero_mid(h))

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Control) -> Control:
        """The prepared Control. Raises: ValueError if the hint's size differs."""
        _check_size(prepared.skips[0], x_t, self.hint.factor)
        return prepared
