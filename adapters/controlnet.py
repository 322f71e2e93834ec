"""ControlNet: a trainable copy of the UNet's encoder, joined to the locked UNet by zero convolutions.

Zhang, Rao, Agrawala 2023 (arXiv:2302.05543), section 3; layer shapes as in the released SD1.5 weights, derived from
`UNetSpec`.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adapters.layers import check_size, fit_hint, init_gaussian
from ldm.control import KV, Adapter, Control
from ldm.models.blocks import init_zero
from ldm.models.unet import UNet, UNetEncoder
from ldm.registry import ConfigError, register

INITS: dict[str, Callable[[nn.Conv2d | nn.Linear], None]] = {
    "zero": init_zero,  # section 3.1
    "gaussian": init_gaussian,  # the ablation of section 4.4
}


def _check_hint(name: str, channels: int, widths: tuple[int, ...]) -> None:
    if channels < 1 or not widths or min(widths) < 1:
        raise ConfigError(
            f"{name}.hint_channels is {channels} and hint_widths {list(widths)}; must be at least 1 each, and at least "
            "one width: e.g. [16, 32, 96, 256] for a VAE that shrinks by 8"
        )


@dataclass(frozen=True)
class ControlNetOptions:
    """Shape and start of a ControlNet.

    Attributes:
        hint_channels: channels of the hint image.
        hint_widths: channels of the hint encoder; every step halves the size, so 8x VAEs need four, 4x VAEs three.
        init: "copy" starts the trunk from the UNet's weights, "random" from scratch.
        zero_conv: "zero", or "gaussian" for the paper's ablation.
        middle_only: only the bottleneck residual.
        in_channels: channels of x_t that the trunk reads, the first ones; null is all. 4 puts a published ControlNet on
            an inpainting UNet, whose x_t goes on with the mask and the masked picture.
    """

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    init: str = "copy"
    zero_conv: str = "zero"
    middle_only: bool = False
    in_channels: int | None = None

    def __post_init__(self) -> None:
        _check_hint("controlnet", self.hint_channels, self.hint_widths)
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
        first = cast("nn.Conv2d", self.convs[0])
        h = first(fit_hint(hint, first.in_channels, self.factor).to(first.weight.dtype))
        for conv in self.convs[1:]:
            h = conv(F.silu(h))
        return h


def _zero_convs(channels: list[int], init: Callable[..., None]) -> nn.ModuleList:
    convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)
    for conv in convs:
        init(conv)
    return convs


def _narrow(conv: nn.Conv2d, n: int) -> None:
    """Make a convolution read the first n of its channels, with the weights that it had for them."""
    if conv.in_channels != n:
        conv.in_channels, conv.weight = n, nn.Parameter(conv.weight.detach()[:, :n].clone())


@dataclass(frozen=True, slots=True)
class Prepared:
    """The same at every step: features of the hint, b c h w at latent size, and `Control.kv` of the copy."""

    features: Tensor
    kv: tuple[KV, ...] = ()


pytree.register_dataclass(Prepared)


@register("adapter", "controlnet", options=ControlNetOptions)
class ControlNet(Adapter[Prepared]):
    """Residuals for every skip and the bottleneck, from a hint image of the picture's own size."""

    hint_range = (0.0, 1.0)

    def __init__(self, options: ControlNetOptions, *, unet: UNet) -> None:
        super().__init__()
        spec, init = unet.spec, INITS[options.zero_conv]
        n = spec.in_channels if options.in_channels is None else options.in_channels
        if not 1 <= n <= spec.in_channels:
            raise ConfigError(f"controlnet.in_channels is {n}; allowed: 1..{spec.in_channels}, or null for all of x_t")
        self.encoder: UNetEncoder = (
            copy.deepcopy(unet.encoder)
            if options.init == "copy"
            else UNet(dataclasses.replace(unet.config, in_channels=n)).encoder
        )
        _narrow(self.encoder.conv_in, n)
        self.encoder.requires_grad_(True)
        self.hint = HintEncoder(options.hint_channels, options.hint_widths, spec.skips[0].channels, init)
        self.zero_convs = _zero_convs([] if options.middle_only else [tap.channels for tap in spec.skips], init)
        self.zero_mid = _zero_convs([spec.mid.channels], init)[0]

    @property
    def zero_layers(self) -> tuple[nn.Module, ...]:
        """The zero convolutions, that of the hint first."""
        return (self.hint.convs[-1], *self.zero_convs, self.zero_mid)

    def prepare(self, hint: Tensor) -> Prepared:
        """Hint b c h w in [0, 1] (lines white on black) -> features at latent size."""
        return Prepared(self.hint(hint))

    def settle(self, prepared: Prepared, base: Control) -> Prepared:
        """Keys and values of the text for the copy's own cross-attention."""
        return dataclasses.replace(prepared, kv=self.encoder.project(base).kv)

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Prepared) -> Control:
        """One pass of the copy, on the UNet's own x_t, t and text. Raises: ValueError if the hint's size differs."""
        check_size(prepared.features, x_t, 1, self.hint.factor)
        x_t = x_t[:, : self.encoder.conv_in.in_channels]
        base = dataclasses.replace(base, kv=prepared.kv)
        enc = self.encoder.encode(self.encoder.conv_in(x_t) + prepared.features, t, base)
        skips = tuple(conv(skip) for conv, skip in zip(self.zero_convs, enc.skips, strict=False))
        return Control(skips=skips, mid=self.zero_mid(enc.mid))


@dataclass(frozen=True)
class ControlNetLiteOptions:
    """Shape of a ControlNet-lite.

    Attributes:
        hint_channels: channels of the hint image.
        hint_widths: channels of the hint encoder, see ControlNetOptions.
        zero_conv: "zero", or "gaussian" for the paper's ablation.
    """

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    zero_conv: str = "zero"

    def __post_init__(self) -> None:
        _check_hint("controlnet_lite", self.hint_channels, self.hint_widths)
        if self.zero_conv not in INITS:
            raise ConfigError(f"controlnet_lite.zero_conv is {self.zero_conv!r}; allowed: {', '.join(INITS)}")


@register("adapter", "controlnet_lite", options=ControlNetLiteOptions)
class ControlNetLite(Adapter[Control]):
    """The paper's ablation (section 4.4): one convolution per block, not the copy; sees neither x_t, t nor text."""

    hint_range = (0.0, 1.0)

    def __init__(self, options: ControlNetLiteOptions, *, unet: UNet) -> None:
        super().__init__()
        init, taps = INITS[options.zero_conv], unet.spec.skips
        self.hint = HintEncoder(options.hint_channels, options.hint_widths, taps[0].channels, init)
        self.convs = nn.ModuleList(
            nn.Conv2d(a.channels, b.channels, 3, stride=b.stride // a.stride, padding=1) for a, b in pairwise(taps)
        )
        self.zero_convs = _zero_convs([tap.channels for tap in taps], init)
        self.zero_mid = _zero_convs([unet.spec.mid.channels], init)[0]

    @property
    def zero_layers(self) -> tuple[nn.Module, ...]:
        """The zero convolutions, that of the hint first."""
        return (self.hint.convs[-1], *self.zero_convs, self.zero_mid)

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
        check_size(prepared.skips[0], x_t, 1, self.hint.factor)
        return prepared
