"""IP-Adapter: image prompts by cross-attention of their own, decoupled from the text's.

Ye et al. 2023 (arXiv:2308.06721), section 3.2; Plus and Full as in the released weights. The hint that `prepare` takes
is what a frozen image encoder made of the reference images (`encode`), so the encoder runs once per image and its
weights are in no adapter file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from adapters.layers import FrozenEncoder, Resampler, blank_tower
from ldm.control import Adapter, Control, ExtraKV
from ldm.models.attention import TransformerBlock
from ldm.models.clip import ImageTower
from ldm.models.unet import UNet
from ldm.registry import ConfigError, register

VARIANTS = ("base", "plus", "full")
INITS = ("copy", "random")
NO_IMAGE = ("zeros", "black")


@dataclass(frozen=True)
class IPAdapterOptions:
    """Shape and start of an IP-Adapter.

    Attributes:
        encoder: the frozen image tower: kind "image", with `weights` and `weights_prefix` as models have them.
        variant: "base" reads one vector per reference, "plus" a resampler over the encoder's tokens, "full" an MLP on
            each of them.
        tokens: image tokens per reference; null = 4 in "base", 16 in "plus" ("full" has as many as the encoder).
        init: "copy" starts keys and values from the UNet's for the text (section 3.2.2), "random" from scratch.
        width: of the resampler in "plus", a multiple of head_dim; null = width of the text (SD1.5: 768; SDXL: 1280).
        depth: layers of the resampler.
        head_dim: width of one of its attention heads.
        no_image: what stands for no image: "zeros", zero features, or "black", the features of a zero image; null is
            what was released: zeros in "base", else black.
    """

    encoder: Mapping[str, Any] = field(default_factory=dict)
    variant: str = "base"
    tokens: int | None = None
    init: str = "copy"
    width: int | None = None
    depth: int = 4
    head_dim: int = 64
    no_image: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("variant", VARIANTS), ("init", INITS), ("no_image", (None, *NO_IMAGE))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"ip_adapter.{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, known))}"
                )
        for name in ("tokens", "width", "depth", "head_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"ip_adapter.{name} is {value}, must be at least 1")
        if self.tokens is not None and self.variant == "full":
            raise ConfigError(
                f"ip_adapter.tokens is {self.tokens}; variant full has one per token of the encoder: drop it"
            )
        if not self.encoder:
            raise ConfigError(
                "ip_adapter.encoder is not set; name an image tower, e.g. {name: open_clip, weights: ...}"
            )


class GlobalTokens(nn.Module):
    """One vector per image to a few tokens: linear, LayerNorm (section 3.2.1)."""

    def __init__(self, in_dim: int, out_dim: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, tokens * out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B 1 in_dim -> b tokens out_dim."""
        return self.norm(rearrange(self.proj(x), "b 1 (n d) -> b n d", d=self.norm.normalized_shape[0]))


class PatchTokens(nn.Module):
    """Each token of the encoder to one of ours: linear, GELU, linear, LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, in_dim)
        self.fc2 = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B n in_dim -> b n out_dim."""
        return self.norm(self.fc2(F.gelu(self.fc1(x))))


class ImagePrompt(nn.Module):
    """Reference images to tokens as wide as the text's: the part that every kind of IP-Adapter has."""

    def __init__(self, options: IPAdapterOptions, context_dim: int, tower: ImageTower | None) -> None:
        super().__init__()
        self.encoder = FrozenEncoder(tower or blank_tower(options.encoder), pooled=options.variant == "base")
        self.pooled = options.variant == "base"
        self.zeros = (options.no_image or ("zeros" if self.pooled else "black")) == "zeros"
        width = self.encoder.width
        if options.variant == "base":
            self.proj: nn.Module = GlobalTokens(width, context_dim, options.tokens or 4)
        elif options.variant == "plus":
            dim, tokens = options.width or context_dim, options.tokens or 16
            self.proj = Resampler(
                width, dim, context_dim, tokens=tokens, depth=options.depth, head_dim=options.head_dim
            )
        else:
            self.proj = PatchTokens(width, context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features b m n d of m references each -> tokens b k context_dim, those of all references in one row.

        Raises: ValueError on features of another encoder.
        """
        tokens = self.proj(self.encoder.rows(features).to(next(self.proj.parameters()).dtype))
        return rearrange(tokens, "(b m) n d -> b (m n) d", m=features.shape[1])

    def null(self, features: Tensor) -> Tensor:
        """What stands for no image, like `features`: see `IPAdapterOptions.no_image`."""
        return torch.zeros_like(features) if self.zeros else self.encoder.zero().expand_as(features).to(features.dtype)


class _Prompted(Adapter[Control]):
    """What decoupled and simple adapter share: a tower that is heard, features of references, of no image."""

    image_prompt = True
    hint_range = (0.0, 1.0)

    def __init__(self, options: IPAdapterOptions, context_dim: int, tower: ImageTower | None) -> None:
        super().__init__()
        self.image = ImagePrompt(options, context_dim, tower)

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """The image tower."""
        return (self.image.encoder.tower,)

    def encode(self, hint: Tensor) -> Tensor:
        """Reference images b m 3 h w in [0, 1], m for each picture -> their features b m n d."""
        return self.image.encoder(hint)

    def null(self, hint: Tensor) -> Tensor:
        """Features b m n d of no image: see `ImagePrompt.null`."""
        return self.image.null(hint)

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Control) -> Control:
        """The prepared Control: nothing here depends on x_t or t."""
        return prepared


@register("adapter", "ip_adapter", options=IPAdapterOptions)
class IPAdapter(_Prompted):
    """Image tokens with keys and values of their own in every cross-attention layer (Eq. 5)."""

    def __init__(self, options: IPAdapterOptions, *, unet: UNet, tower: ImageTower | None = None) -> None:
        """Args: tower: the encoder with its weights; None makes one of the same shape."""
        dim, layers = unet.spec.context_dim, unet.spec.cross_attn
        super().__init__(options, dim, tower)
        self.to_k = nn.ModuleList(nn.Linear(dim, layer.inner_dim, bias=False) for layer in layers)
        self.to_v = nn.ModuleList(nn.Linear(dim, layer.inner_dim, bias=False) for layer in layers)
        if options.init == "copy":
            self._copy(unet)

    @torch.no_grad()
    def _copy(self, unet: UNet) -> None:
        text = [module.attn2 for module in unet.modules() if isinstance(module, TransformerBlock)]
        for own, theirs in ((self.to_k, [a.to_k for a in text]), (self.to_v, [a.to_v for a in text])):
            for layer, source in zip(own, theirs, strict=True):
                layer.weight.copy_(source.weight)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def prepare(self, hint: Tensor) -> Control:
        """Features b m n d -> keys and values of every layer; several references are one longer row of tokens."""
        tokens = self.image(hint)
        k, v = (tuple(layer(tokens) for layer in layers) for layers in (self.to_k, self.to_v))
        return Control(attn=(ExtraKV(k=k, v=v),))


@register("adapter", "ip_adapter_simple", options=IPAdapterOptions)
class SimpleIPAdapter(_Prompted):
    """The paper's "simple adapter" (section 4.4.1): image tokens stand behind the text's, in the text's own attention.

    Its weight is on or off: a scale between would have to change the text's attention too.
    """

    weighable = frozenset()

    def __init__(self, options: IPAdapterOptions, *, unet: UNet, tower: ImageTower | None = None) -> None:
        """Args: see IPAdapter."""
        super().__init__(options, unet.spec.context_dim, tower)

    def prepare(self, hint: Tensor) -> Control:
        """Features b m n d -> tokens for the context."""
        return Control(context=self.image(hint))
