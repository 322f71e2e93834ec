"""CoAdapter: a small transformer in which the hints of jointly trained T2I-Adapters see each other.

Released with T2I-Adapter (Mou et al. 2023, arXiv:2302.08453; coadapter-fuser-sd15v1), in no paper. It only rescales:
channel c of a feature map is multiplied by 1 + (W x)_c, where x is the map's own token behind the transformer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.layers import EncoderBlock
from adapters.style_adapter import StyleAdapter, StyleTokens
from adapters.t2i_adapter import T2IAdapter
from ldm.control import Adapter, Fuser
from ldm.models.blocks import init_zero
from ldm.models.unet import UNet
from ldm.registry import ConfigError, register, suggest

TASKS: Final = ("sketch", "keypose", "seg", "depth", "canny", "style", "color", "openpose")  # the released table's
ROWS: Final = 16  # that table has spare ones


@dataclass(frozen=True)
class FuserOptions:
    """Shape of a fuser, and which adapter is which of its tasks; it is as wide as the UNet's text.

    Attributes:
        tasks: adapter -> one of TASKS, or null to leave it out. A T2I-Adapter that is not named here has the task of
            its own name, a style adapter the task style.
        depth: transformer blocks.
        heads: attention heads, a divisor of the text's width.
    """

    tasks: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 3
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("depth", "heads"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"fuser.{name} is {value}, must be at least 1")
        for adapter, task in self.tasks.items():
            if task is not None and task not in TASKS:
                known = ", ".join(TASKS)
                raise ConfigError(
                    f"fuser.tasks.{adapter} is {task!r}; allowed: {known}, or null to leave it out"
                    f"{suggest(str(task), TASKS)}"
                )


@register("fuser", "coadapter", options=FuserOptions)
class CoAdapterFuser(Fuser):
    """Each feature map is one token, each style token another; what comes out scales them, by 1 at the start.

    Tokens know their task and their level, not their place in the row: the order of adapters does not matter, and two
    may share a task. ControlNets, IP-Adapters and those left out pass through. As released, the embeddings start with
    a standard deviation of the width's square root, so at first tasks count and features hardly do.
    """

    def __init__(
        self, options: FuserOptions, *, unet: UNet, adapters: Mapping[str, Adapter[Any]] | None = None
    ) -> None:
        """Args: adapters: those of the run; None for the shape alone.

        Raises: ConfigError if a task is of no adapter that can be fused, or one that can be has none.
        """
        super().__init__()
        width, channels = unet.spec.context_dim, [tap.channels for tap in unet.spec.stages]
        if width % options.heads:
            raise ConfigError(f"fuser.heads is {options.heads}, must divide the text's width {width}; change either")
        tasks = {} if adapters is None else _tasks(options.tasks, adapters)
        self.tasks = dict(sorted(tasks.items(), key=lambda item: (item[1], item[0])))  # adapter -> row of the table
        maps = {name: a for name, a in (adapters or {}).items() if isinstance(a, T2IAdapter)}
        self.levels = {name: adapter.scales for name, adapter in maps.items()}  # of each of its features
        self.task = nn.Parameter(torch.randn(ROWS, width) * width**0.5)
        self.level = nn.Parameter(torch.randn(len(channels), width) * width**0.5)
        self.read = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderBlock(width, options.heads) for _ in range(options.depth))
        self.norm_out = nn.LayerNorm(width)
        self.write = nn.ModuleList(nn.Linear(width, c) for c in channels)
        for layer in self.write:
            init_zero(cast("nn.Linear", layer))
        self.write_tokens = nn.Parameter(torch.zeros(width, width))

    def forward(
        self, prepared: Mapping[str, Any], scales: Mapping[str, float], given: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """See Fuser. A dropped hint is not seen by the others, and its own features become zeros."""
        names = [name for name in self.tasks if name in prepared]
        if not names:
            return dict(prepared)
        rows = [self._tokens(name, prepared[name], scales.get(name, 1.0)) for name in names]
        heard = [self._heard(row, prepared[name], given.get(name)) for name, row in zip(names, rows, strict=True)]
        x, keys = self.norm_in(torch.cat(rows, dim=1)), torch.cat(heard, dim=1)  # b n d, b n
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # so that a row of dropped ones sees something
        for layer in self.layers:
            x = layer(x, keys[:, None] | own)
        parts = self.norm_out(x).split([row.shape[1] for row in rows], dim=1)
        fused = zip(names, parts, heard, strict=True)
        return dict(prepared) | {name: self._rescaled(name, prepared[name], part, h) for name, part, h in fused}

    def _tokens(self, name: str, ready: Any, scale: float) -> Tensor:
        """What the transformer reads of one adapter: b n d."""
        task = self.task[self.tasks[name]]
        if isinstance(ready, StyleTokens):
            return scale * ready.tokens + task
        pooled = [scale * x.mean(dim=(2, 3)) for x in ready]  # b c
        tokens = [self.read[k](F.silu(x)) + self.level[k] for k, x in zip(self.levels[name], pooled, strict=True)]
        return torch.stack(tokens, dim=1) + task

    def _heard(self, row: Tensor, ready: Any, given: Tensor | None) -> Tensor:
        """Which of its tokens there are: b n bool."""
        if isinstance(ready, StyleTokens):
            return ready.heard[..., 0]
        given = torch.ones(len(row), dtype=torch.bool, device=row.device) if given is None else given
        return given[:, None].expand(-1, row.shape[1])

    def _rescaled(self, name: str, ready: Any, x: Tensor, heard: Tensor) -> Any:
        """What the adapter prepared, times the factors of its tokens x: b n d."""
        if isinstance(ready, StyleTokens):
            return ready._replace(tokens=ready.tokens * (1 + x @ self.write_tokens).to(ready.tokens.dtype))
        out: list[Tensor] = []
        for i, (level, feature) in enumerate(zip(self.levels[name], ready, strict=True)):
            factor = torch.where(heard[:, i, None], 1 + self.write[level](x[:, i]), 0)  # b c
            out.append(feature * factor.to(feature.dtype)[..., None, None])
        return tuple(out)


def _tasks(named: Mapping[str, Any], adapters: Mapping[str, Adapter[Any]]) -> dict[str, int]:
    """Adapter -> row of the task table, of those that take part. Raises: ConfigError."""
    able = [name for name, adapter in adapters.items() if _fusable(adapter)]
    there = ", ".join(able) or "none"
    for name in named:
        if name not in able:
            what = f"a {type(adapters[name]).__name__}" if name in adapters else "no adapter of this run"
            raise ConfigError(
                f"fuser.tasks has {name!r}, {what}; allowed: T2I-Adapters (full, light) and style adapters, here "
                f"{there}{suggest(name, able)}"
            )
    tasks: dict[str, int] = {}
    for name in able:
        task = named.get(name, "style" if isinstance(adapters[name], StyleAdapter) else name)
        if task is None:
            continue
        if task not in TASKS:
            raise ConfigError(
                f"fuser.tasks does not say what adapter {name!r} is; allowed: {', '.join(TASKS)}, or null to leave it "
                f"out, e.g. tasks: {{{name}: sketch}}"
            )
        tasks[name] = TASKS.index(task)
    if not tasks:
        raise ConfigError(f"fuser has no adapter to fuse; adapters that can be: {there}; add one, or drop fuser")
    return tasks


def _fusable(adapter: Adapter[Any]) -> bool:
    """Whether a fuser of this UNet's levels can read it: SDXL's adapters have one feature more."""
    return isinstance(adapter, StyleAdapter) or (isinstance(adapter, T2IAdapter) and adapter.options.variant != "xl")
