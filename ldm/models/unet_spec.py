"""The shape of a UNet: its options, and the channels, strides and attention layers that follow from them."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Shape of a UNet. Per-level tuples go from full to lowest resolution."""

    in_channels: int = 4  # of x_t; 9 for inpainting: mask and masked picture go beside it
    out_channels: int = 4  # of the prediction
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level
    blocks: int | tuple[int, ...] = 2  # residual blocks per level in the encoder; the decoder has one more
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks behind each residual block; 0 = no attention
    mid_depth: int = 1  # transformer blocks of the middle
    context_dim: int = 768  # width of the tokens that cross-attention reads (SD2: 1024, SDXL: 2048)
    num_heads: int | None = 8  # heads everywhere; null where head_dim is set
    head_dim: int | None = None  # width of one head everywhere; null where num_heads is set
    linear_proj: bool = False  # Linear instead of 1x1 conv around transformers (SD2, SDXL)
    vector_dim: int | None = None  # width of Control.vector (SDXL: 2816)
    groups: int = 32  # of GroupNorm; divides every width

    def __post_init__(self) -> None:
        self._check_counts()
        levels = len(self.channels)
        if len(self.depth) != levels:
            raise ValueError(f"depth has {len(self.depth)} entries, channels {levels}; give one depth per level")
        if isinstance(self.blocks, tuple) and len(self.blocks) != levels:
            raise ValueError(f"blocks has {len(self.blocks)} entries, channels {levels}; one number, or one a level")
        if (self.num_heads is None) == (self.head_dim is None):
            raise ValueError(f"num_heads is {self.num_heads} and head_dim {self.head_dim}; set one, null the other")
        if (self.num_heads or self.head_dim or 0) < 1:
            raise ValueError(f"num_heads is {self.num_heads} and head_dim {self.head_dim}; must be positive")
        if bad := [c for c in self.channels if c % self.groups]:
            raise ValueError(f"channels {bad} are not multiples of groups={self.groups}; change channels or groups")

    def _check_counts(self) -> None:
        """Raise ValueError on an empty `channels`, or a number that no layer can have."""
        for name in ("in_channels", "out_channels", "channels", "blocks", "context_dim", "vector_dim", "groups"):
            value = getattr(self, name)
            if value == () or any(v < 1 for v in _numbers(value)):
                raise ValueError(f"{name} is {value}, must be at least 1 everywhere; give positive numbers")
        for name in ("depth", "mid_depth"):
            if any(v < 0 for v in _numbers(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0; 0 is no attention")

    def heads(self, dim: int) -> int:
        """Number of attention heads at width `dim`."""
        if self.head_dim is None:
            return self.num_heads or 1
        if dim % self.head_dim:
            raise ValueError(f"channels {dim} are not a multiple of head_dim={self.head_dim}; change either")
        return dim // self.head_dim

    def blocks_at(self, level: int) -> int:
        """Residual blocks of one encoder level."""
        return self.blocks if isinstance(self.blocks, int) else self.blocks[level]


def _numbers(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True, slots=True)
class Tap:
    """One feature map of the encoder: b channels h/stride w/stride of the latent."""

    channels: int
    stride: int


@dataclass(frozen=True, slots=True)
class CrossAttn:
    """One cross-attention layer."""

    inner_dim: int
    heads: int
    part: str  # "down" | "mid" | "up"
    name: str = dataclasses.field(default="", compare=False)  # down.<level>.<block> | mid | up.<level>.<block>


@dataclass(frozen=True, slots=True)
class UNetSpec:
    """What adapters size themselves from."""

    in_channels: int
    emb_dim: int
    context_dim: int
    vector_dim: int | None
    skips: tuple[Tap, ...]  # in encoder order; SD1.5 has 12
    stages: tuple[Tap, ...]  # one per resolution: the last skip before each downsample (SD1.5 entries 2, 5, 8, 11)
    mid: Tap
    cross_attn: tuple[CrossAttn, ...]  # in execution order: down, mid, up

    @property
    def multiple(self) -> int:
        """Latent height and width must be multiples of this."""
        return self.mid.stride


def skip_taps(config: UNetConfig) -> tuple[Tap, ...]:
    """Feature maps that the decoder reads back, in encoder order: conv_in, each block, each downsampling."""
    taps = [Tap(config.channels[0], 1)]
    for level, c in enumerate(config.channels):
        taps += [Tap(c, 2**level)] * config.blocks_at(level)
        if level < len(config.channels) - 1:
            taps.append(Tap(c, 2 ** (level + 1)))
    return tuple(taps)
