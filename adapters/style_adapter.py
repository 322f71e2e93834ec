"""T2I-Adapter's style adapter: a picture's CLIP tokens become a few tokens behind the text's.

Mou et al. 2023 (arXiv:2302.08453), as in the released weights (t2iadapter_style_sd14v1, coadapter-style-sd15v1). The
hint that `prepare` takes is what a frozen image tower made of the references: its last block's tokens, class token
first, without the final LayerNorm or the projection.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from adapters.layers import EncoderBlock, FrozenEncoder, blank_tower
from ldm.control import Adapter, Control
from ldm.models.clip import ImageTower
from ldm.models.unet import UNet
from ldm.registry import ConfigError, register


@dataclass(frozen=True)
class StyleAdapterOptions:
    """Shape of a style adapter; it is as wide as its encoder.

    Attributes:
        encoder: the frozen image tower: kind "image", with `weights` and `weights_prefix` as models have them. The
            released adapters read OpenAI's ViT-L/14.
        tokens: made of each reference.
        depth: transformer blocks.
        heads: attention heads, a divisor of the encoder's width.
    """

    encoder: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 8
    depth: int = 3
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("tokens", "depth", "heads"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"t2i_style.{name} is {value}, must be at least 1")
        if not self.encoder:
            raise ConfigError("t2i_style.encoder is not set; name an image tower, e.g. {name: open_clip, weights: ...}")


class StyleTokens(NamedTuple):
    """What a style adapter prepared.

    Attributes:
        tokens: b k context_dim, of all references in one row.
        heard: b k 1 bool, False where the reference is the null one.
    """

    tokens: Tensor
    heard: Tensor


@register("adapter", "t2i_style", options=StyleAdapterOptions)
class StyleAdapter(Adapter[StyleTokens]):
    """Learned queries read the picture's tokens in a small transformer; they stand behind the text, in its attention.

    `scale` multiplies the tokens, as in the released code. The null reference is features of zeros, which no picture
    has: in its place stands a copy of the text's own last tokens, so the unconditional branch is as long as the other
    and hears no style at any scale.
    """

    image_prompt = True
    weighable = frozenset({"scale"})
    hint_range = (0.0, 1.0)

    def __init__(self, options: StyleAdapterOptions, *, unet: UNet, tower: ImageTower | None = None) -> None:
        """Args: tower: the encoder with its weights; None makes one of the same shape."""
        super().__init__()
        self.encoder = FrozenEncoder(tower or blank_tower(options.encoder), pooled=False, last=True)
        width = self.encoder.width
        if width % options.heads:
            raise ConfigError(
                f"t2i_style.heads is {options.heads}, must divide the encoder's width {width}; change either"
            )
        self.queries = nn.Parameter(torch.randn(1, options.tokens, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderBlock(width, options.heads) for _ in range(options.depth))
        self.norm_out = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, unet.spec.context_dim) * width**-0.5)

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """The image tower."""
        return (self.encoder.tower,)

    def encode(self, hint: Tensor) -> Tensor:
        """Reference images b m 3 h w in [0, 1], m for each picture -> their tokens b m n d."""
        return self.encoder(hint)

    def null(self, hint: Tensor) -> Tensor:
        """Zeros like the features b m n d: see the class."""
        return torch.zeros_like(hint)

    def prepare(self, hint: Tensor) -> StyleTokens:
        """Features b m n d -> tokens; several references are one longer row.

        Raises: ValueError on features of another encoder.
        """
        x = self.encoder.rows(hint).to(self.queries.dtype)
        b, m, k = *hint.shape[:2], self.queries.shape[1]
        x = self.norm_in(torch.cat([x, self.queries.expand(b * m, -1, -1)], dim=1))
        for layer in self.layers:
            x = layer(x)
        tokens = self.norm_out(x[:, -k:]) @ self.proj
        heard = hint.flatten(2).any(dim=2).repeat_interleave(k, dim=1)  # b (m k)
        return StyleTokens(rearrange(tokens, "(b m) k d -> b (m k) d", m=m), heard[..., None])

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: StyleTokens) -> Control:
        """The prepared tokens as context. Raises: ValueError if the text has fewer tokens than this makes of one."""
        text, k = base.context, self.queries.shape[1]
        if text is None or text.shape[1] < k:
            found = 0 if text is None else text.shape[1]
            raise ValueError(f"the text has {found} tokens; a style adapter of {k} needs at least as many: use fewer")
        own = text[:, -k:].repeat(1, prepared.tokens.shape[1] // k, 1)
        return Control(context=torch.where(prepared.heard, prepared.tokens.to(own.dtype), own))

    def scaled(self, control: Control, s: float, prepared: StyleTokens) -> Control:
        """Tokens of references times s; those of the null stay. 0 is no token at all."""
        if s == 0 or control.context is None:
            return Control()
        context = torch.where(prepared.heard, s * control.context, control.context)
        return dataclasses.replace(control, context=context)
