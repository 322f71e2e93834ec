"""SeeCoder: reference images instead of a text; its tokens are what cross-attention reads.

Xu et al. 2023 (Prompt-Free Diffusion, arXiv:2305.16223), section 3.2; shapes as in the released weights. A frozen Swin
backbone gives feature maps of three resolutions, the decoder mixes them, and the query transformer reads them level
by level into 4 global and 144 local tokens. The hint that `prepare` takes is the backbone's maps, finest first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from adapters.layers import FrozenEncoder, blank_tower
from ldm.control import Adapter, Control
from ldm.convert import files
from ldm.models.clip import ImageTower
from ldm.models.dropout import Dropout
from ldm.models.swin import Swin
from ldm.models.unet import UNet
from ldm.registry import ConfigError, register

ATTENTIONS: Final = ("per_image", "over_tokens")
GROUPS: Final = 32  # of the decoder's GroupNorms
FREQUENCIES: Final = 20
Maps = tuple[Tensor, ...]  # feature maps b m c h w of m references for each picture, finest first


@dataclass(frozen=True)
class SeeCoderOptions:
    """Shape of a SeeCoder; its tokens are as wide as the UNet's context, a multiple of `heads`.

    Attributes:
        encoder: the frozen backbone: kind "image", name "swin", with `weights` and `weights_prefix` as models have
            them. A released file holds backbone and adapter, and is named at both places.
        levels: how many of the backbone's last stages are read.
        global_queries: tokens that see the image only through the local ones.
        local_queries: tokens that read the feature maps.
        layers: of the query transformer; layer k reads level k mod `levels`, finest first.
        hidden: inner width of its feed-forward.
        decoder_layers: of the decoder.
        decoder_hidden: inner width of its feed-forward.
        decoder_attention: "per_image", what the released code computes for one image: there, tokens attend along the
            batch axis, so each sees itself alone. "over_tokens": every token sees all of its image, as the paper says.
        dropout: of the decoder, in training.
        heads: attention heads, of both.
        position: SeeCoder-PA: a position code on the keys of the feature maps, which starts at zero.
        unconditional: file with one tensor n d, the first n unconditional tokens (SeeCoder-Anime has 77); null: zeros.
    """

    encoder: Mapping[str, Any] = field(default_factory=dict)
    levels: int = 3
    global_queries: int = 4
    local_queries: int = 144
    layers: int = 9
    hidden: int = 2048
    decoder_layers: int = 6
    decoder_hidden: int = 1024
    decoder_attention: str = "per_image"
    dropout: float = 0.1
    heads: int = 8
    position: bool = False
    unconditional: str | None = None

    def __post_init__(self) -> None:
        for name in ("levels", "local_queries", "layers", "hidden", "decoder_hidden", "heads"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"seecoder.{name} is {value}, must be at least 1")
        for name in ("global_queries", "decoder_layers"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"seecoder.{name} is {value}, must be at least 0")
        if self.decoder_attention not in ATTENTIONS:
            raise ConfigError(
                f"seecoder.decoder_attention is {self.decoder_attention!r}; allowed: {', '.join(ATTENTIONS)}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"seecoder.dropout is {self.dropout}, must be in [0, 1)")
        if self.encoder.get("name") != "swin":
            raise ConfigError(
                f"seecoder.encoder is {dict(self.encoder)}, must be a Swin, whose stages it reads: set "
                "{name: swin, weights: ...}"
            )


class Attention(nn.Module):
    """Multi-head attention with biases; queries, keys and values of one width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # rows: queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries b n dim; keys and values b m dim -> b n dim."""
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (rearrange(F.linear(x, w, b), "b n (h d) -> b h n d", h=self.heads) for x, w, b in parts)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    def alone(self, x: Tensor) -> Tensor:
        """What attention gives where every token sees itself alone: its value. Tokens b n dim -> b n dim."""
        return self.out_proj(F.linear(x, self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]))


class FeedForward(nn.Module):
    """Two linear maps with ReLU between."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens b n dim -> b n dim."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Self-attention and feed-forward, LayerNorm behind each sum."""

    def __init__(self, dim: int, o: SeeCoderOptions) -> None:
        super().__init__()
        self.apart = o.decoder_attention == "per_image"
        self.attn = Attention(dim, o.heads)
        self.norm1 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, o.decoder_hidden, o.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(o.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens b n dim -> b n dim."""
        x = self.norm1(x + self.dropout(self.attn.alone(x) if self.apart else self.attn(x, x, x)))
        return self.norm2(x + self.dropout(self.ff(x)))


class Projection(nn.Module):
    """A feature map to the common width: 1x1 convolution, GroupNorm."""

    def __init__(self, channels: int, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, 1, bias=bias)
        self.norm = nn.GroupNorm(math.gcd(GROUPS, dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map b channels h w -> b h*w dim."""
        return rearrange(self.norm(self.conv(x)), "b d h w -> b (h w) d")


class Decoder(nn.Module):
    """Feature maps to tokens of one width, mixed across levels, with the plain features added at the end."""

    def __init__(self, widths: Sequence[int], dim: int, o: SeeCoderOptions) -> None:
        """Args: widths: channels of the maps, finest first."""
        super().__init__()
        self.inputs = nn.ModuleList(Projection(width, dim, bias=True) for width in widths)
        self.laterals = nn.ModuleList(Projection(width, dim, bias=False) for width in widths)
        self.level_embed = nn.Parameter(torch.randn(len(widths), dim))  # coarsest first, as released
        self.layers = nn.ModuleList(DecoderLayer(dim, o) for _ in range(o.decoder_layers))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps b c h w, finest first -> tokens b h*w dim of each, in the same order."""
        levels = [project(x) + e for project, x, e in zip(self.inputs, maps, self.level_embed.flip(0), strict=True)]
        sizes = [level.shape[1] for level in levels]
        x = torch.cat(levels, dim=1)
        for layer in self.layers:
            x = layer(x)
        laterals = [project(level) for project, level in zip(self.laterals, maps, strict=True)]
        return [y + lateral for y, lateral in zip(x.split(sizes, dim=1), laterals, strict=True)]


class Position(nn.Module):
    """SeeCoder-PA: sine-cosine code of where a token lies, through an MLP that starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mlp[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Map size (h, w) -> codes 1 h*w dim. Each training step shifts the grid by up to half a cell."""
        weight: Tensor = self.mlp[0].weight  # pyright: ignore[reportAssignmentType]
        shortest = min(size)
        shift = torch.rand(2) - 0.5 if self.training else torch.zeros(2)
        y, x = (2 * math.pi / shortest * (torch.arange(n) + 0.5 - n / 2 + s) for n, s in zip(size, shift, strict=True))
        frequency = (shortest / 2) ** (torch.arange(FREQUENCIES) / (FREQUENCIES - 1))
        y, x = (torch.cat([a.sin(), a.cos()], dim=-1) for a in (y[:, None] * frequency, x[:, None] * frequency))
        code = torch.cat([y[:, None].expand(-1, len(x), -1), x[None].expand(len(y), -1, -1)], dim=-1)
        return self.mlp(rearrange(code, "h w d -> 1 (h w) d").to(weight))


class QueryLayer(nn.Module):
    """Local queries read one level; then all queries see each other; then a feed-forward. LayerNorm behind each sum."""

    def __init__(self, dim: int, o: SeeCoderOptions) -> None:
        super().__init__()
        self.split = (o.global_queries, o.local_queries)
        self.cross_attn, self.cross_norm = Attention(dim, o.heads), nn.LayerNorm(dim)
        self.self_attn, self.self_norm = Attention(dim, o.heads), nn.LayerNorm(dim)
        self.ff, self.ff_norm = FeedForward(dim, o.hidden), nn.LayerNorm(dim)

    def forward(self, z: Tensor, pos: Tensor, level: Tensor, keys: Tensor) -> Tensor:
        """Queries z b n dim, their position 1 n dim, level b m dim and the same with position (keys) -> b n dim."""
        whole, local = z.split(self.split, dim=1)
        q = local + pos.split(self.split, dim=1)[1]
        z = torch.cat([whole, self.cross_norm(local + self.cross_attn(q, keys, level))], dim=1)
        z = self.self_norm(z + self.self_attn(z + pos, z + pos, z))
        return self.ff_norm(z + self.ff(z))


class QueryTransformer(nn.Module):
    """Learned queries become the tokens that stand for the image."""

    def __init__(self, dim: int, o: SeeCoderOptions) -> None:
        super().__init__()
        n = o.global_queries + o.local_queries
        self.queries = nn.Parameter(torch.randn(n, dim))  # global ones first
        self.query_position = nn.Parameter(torch.randn(n, dim))
        self.level_embed = nn.Parameter(torch.randn(o.levels, dim))  # finest first
        self.layers = nn.ModuleList(QueryLayer(dim, o) for _ in range(o.layers))
        self.position = Position(dim) if o.position else None

    def forward(self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens b h*w dim of each level, finest first, and their (h, w) -> b n dim."""
        levels = [level + e for level, e in zip(levels, self.level_embed, strict=True)]
        keys = levels
        if self.position is not None:
            keys = [level + self.position(size) for level, size in zip(levels, sizes, strict=True)]
        z, pos = self.queries.expand(len(levels[0]), -1, -1), self.query_position[None]
        for k, layer in enumerate(self.layers):
            z = layer(z, pos, levels[k % len(levels)], keys[k % len(levels)])
        return z


@register("adapter", "seecoder", options=SeeCoderOptions)
class SeeCoder(Adapter[Control]):
    """Tokens of reference images in place of a text; zeros are the unconditional ones.

    Other adapters hear them as the context. Beside a text encoder they stand behind the text's tokens.
    """

    image_prompt = True
    gives_context = True
    weighable = frozenset()
    hint_range = (0.0, 1.0)
    silent_parts = ("query_transformer.position.",)

    def __init__(self, options: SeeCoderOptions, *, unet: UNet, tower: ImageTower | None = None) -> None:
        """Args: tower: the backbone with its weights; None makes one of the same shape."""
        super().__init__()
        dim = unet.spec.context_dim
        self.encoder = FrozenEncoder(tower or blank_tower(options.encoder), pooled=False)
        assert isinstance(self.encoder.tower, Swin)
        stages = self.encoder.tower.widths
        if dim % options.heads:
            raise ConfigError(
                f"seecoder.heads is {options.heads}, must divide {dim}: tokens are as wide as the UNet's context"
            )
        if options.levels > len(stages):
            raise ConfigError(
                f"seecoder.levels is {options.levels}, must be at most {len(stages)}: the backbone's stages"
            )
        self.levels = options.levels
        self._unconditional = options.unconditional
        self.image_decoder = Decoder(stages[-options.levels :], dim, options)
        self.query_transformer = QueryTransformer(dim, options)

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """The backbone."""
        return (self.encoder.tower,)

    @property
    def zero_layers(self) -> tuple[nn.Module, ...]:
        """The last one of the position code, where there is one."""
        position = self.query_transformer.position
        return () if position is None else (position.mlp[-1],)

    def encode(self, hint: Tensor) -> Maps:
        """Reference images b m 3 h w in [0, 1], m for each picture, of any size -> the backbone's maps b m c h w."""
        return self.encoder.stages(hint)[-self.levels :]

    def null(self, hint: Maps) -> Maps:
        """Maps of zeros, which no image has: they stand for zero tokens, and are of one pixel, for they broadcast."""
        return tuple(torch.zeros_like(x[..., :1, :1]) for x in hint)

    def prepare(self, hint: Maps) -> Control:
        """Maps of `encode` -> tokens b (m n) dim; several references are one longer row.

        Raises: ValueError on maps of another backbone.
        """
        widths = [project.conv.in_channels for project in self.image_decoder.inputs]  # pyright: ignore[reportAttributeAccessIssue]
        if [x.shape[2] for x in hint] != widths:
            raise ValueError(
                f"feature maps are {[tuple(x.shape) for x in hint]}, must be b m c h w with c of {widths}: encode the "
                "references with this adapter's backbone"
            )
        m, weight = hint[0].shape[1], self.query_transformer.queries
        maps = [rearrange(x, "b m c h w -> (b m) c h w").to(weight.dtype) for x in hint]
        tokens = self.query_transformer(self.image_decoder(maps), [(x.shape[-2], x.shape[-1]) for x in maps])
        present = maps[-1].flatten(1).any(dim=1)[:, None, None]
        tokens = tokens * present if self._unconditional is None else tokens.where(present, self._silence.to(tokens))
        return Control(context=rearrange(tokens, "(b m) n d -> b (m n) d", m=m))

    @cached_property
    def _silence(self) -> Tensor:
        """The unconditional tokens n d of the file, zeros behind them. Raises: ConfigError on other tensors."""
        queries, file = self.query_transformer.queries, Path(str(self._unconditional))
        found = [x.squeeze(0) for x in files.read(file).values()]
        shapes = [tuple(x.shape) for x in found]
        if len(found) != 1 or found[0].shape[1:] != queries.shape[1:] or len(found[0]) > len(queries):
            raise ConfigError(
                f"seecoder.unconditional: {file} has tensors of {shapes}, must be one of up to {tuple(queries.shape)}"
            )
        return F.pad(found[0].float(), (0, 0, 0, len(queries) - len(found[0])))

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Control) -> Control:
        """The prepared Control: nothing here depends on x_t or t."""
        return prepared
