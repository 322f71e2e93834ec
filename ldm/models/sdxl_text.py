"""SDXL's text condition: one or two CLIP towers side by side, and a vector of pooled text and picture sizes.

Podell et al. 2023 (arXiv:2307.01952), sections 2.1 and 2.2; layout of the vector as in the released weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.models.blocks import timestep_embedding
from ldm.models.text import Text, TextConfig, TextEncoder
from ldm.registry import ConfigError, checked, register
from ldm.transfer import send

SIZE_DIM = 256  # width of one embedded number (released configs)
UNNORMED = {"layer": "penultimate", "final_norm": False}  # of every SDXL tower
BIG_G = {"width": 1280, "layers": 32, "heads": 20, "activation": "gelu", "pad": "zero", "projection": 1280}


@dataclass(frozen=True)
class SDXLTextConfig:
    """The towers; the defaults are SDXL base's.

    Attributes:
        clip: options of the first tower (`TextConfig`) over those of CLIP ViT-L/14; null leaves it out (refiner).
        open_clip: options of the second tower over those of OpenCLIP ViT-bigG/14; the pooled text is this one's.
        aesthetic: a score that takes the place of the target size (refiner: 6.0); null tells the target size.
        zero_empty: an empty prompt is zeros in place of the encoding of "", as SDXL base was trained to drop captions
            and is sampled by the authors and diffusers (refiner: false).
    """

    clip: Mapping[str, Any] | None = field(default_factory=dict[str, Any])
    open_clip: Mapping[str, Any] = field(default_factory=dict[str, Any])
    aesthetic: float | None = None
    zero_empty: bool = True

    @property
    def tower_configs(self) -> dict[str, TextConfig]:
        """Name -> checked config of each tower.

        Raises:
            ConfigError: on a wrong option, a tower without pooled output, or towers that split prompts differently.
        """
        nodes = {"clip": self.clip, "open_clip": {**BIG_G, **self.open_clip}}
        made = {
            name: checked(TextConfig, {**UNNORMED, **node}, f"text.{name}")
            for name, node in nodes.items()
            if node is not None
        }
        last = made["open_clip"]
        if last.projection is None:
            raise ConfigError("text.open_clip.projection is null, must be a width: the pooled text is that wide")
        for name, config in made.items():
            if (config.context_length, config.merges) != (last.context_length, last.merges):
                raise ConfigError(
                    f"text.{name} has context_length={config.context_length}, merges={config.merges}; must be those of "
                    f"text.open_clip, {last.context_length} and {last.merges}: both towers read the same tokens"
                )
        return made


@register("text", "sdxl", options=SDXLTextConfig)
class SDXLText(Text):
    """Tokens of both towers channel by channel, CLIP's first; parameters `clip.*` and `open_clip.*`.

    The second tower alone, with `text_proj`, is what files call the second text encoder.
    """

    def __init__(self, config: SDXLTextConfig) -> None:
        super().__init__()
        towers = config.tower_configs
        self.config = config
        self.zero_empty = config.zero_empty
        self.clip = TextEncoder(towers["clip"]) if "clip" in towers else None
        self.open_clip = TextEncoder(towers["open_clip"])

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        """See `Text`."""
        return (self.open_clip,) if self.clip is None else (self.clip, self.open_clip)

    def vector(self, pooled: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Pooled text and the embedded sizes: original (h, w), crop (top, left), target (h, w) or aesthetic score.

        The picture counts as drawn whole and uncropped, but see `placed`: original and target size are `size`, the
        crop is 0, 0. An aesthetic score is the same on both branches of guidance (the released demo lowers it on the
        negative one).

        Args:
            pooled: b p.
            size: (height, width) in pixels.

        Returns: b p + 256 n, n = 6 numbers (5 with an aesthetic score).
        """
        assert pooled is not None  # the config asks for a projection
        last = size if self.config.aesthetic is None else (self.config.aesthetic,)
        numbers = send(torch.tensor([*size, 0, 0, *last], dtype=torch.float32), pooled.device)
        embedded = timestep_embedding(numbers, SIZE_DIM).flatten().to(pooled.dtype)  # 256 n
        return torch.cat([pooled, embedded.expand(len(pooled), -1)], dim=1)

    def placed(self, vector: Tensor | None, origin: Tensor) -> Tensor:
        """See `Text`: original size and crop are told as they were; the target size stays that of the picture."""
        assert vector is not None
        start = self.open_clip.config.projection or 0  # behind the pooled text
        embedded = (
            timestep_embedding(origin.float().flatten(), SIZE_DIM).view(len(origin), -1).to(vector.dtype)
        )  # b 4*256
        return torch.cat([vector[:, :start], embedded, vector[:, start + embedded.shape[1] :]], dim=1)
