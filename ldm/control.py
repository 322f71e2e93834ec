"""Control, ExtraKV, Adapter: the whole contract between the UNet and everything that steers it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

P = TypeVar("P")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtraKV:
    """Extra keys and values for every cross-attention layer, from one source (an image prompt).

    Each layer adds `scale * attention(q, k, v)` to its text attention (Ye et al. 2023, arXiv:2308.06721, Eq. 5).
    `k[i]`, `v[i]`: b n inner_dim of layer i, in the order of `UNetSpec.cross_attn`.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """All conditioning for one UNet call. An empty Control is the unconditional base model, bit for bit.

    Residual tuples are empty or exactly as long as `unet.spec` says.
    """

    context: Tensor | None = None  # b n d        tokens for cross-attention (text, SeeCoder, unCLIP)
    vector: Tensor | None = None  # b v           raw vector conditioning, embedded beside the timestep (SDXL, unCLIP)
    stages: tuple[Tensor, ...] = ()  # b c_s h w  one per resolution, added before that skip is stored (T2I-Adapter)
    skips: tuple[Tensor, ...] = ()  # b c_i h w   one per skip, added where the decoder reads it (ControlNet)
    mid: Tensor | None = None  # b c h w          added to the bottleneck (ControlNet, Asyrp)
    attn: tuple[ExtraKV, ...] = ()  #             one entry per source (IP-Adapter)

    def __add__(self, other: Control) -> Control:
        """Compose: context tokens and attention sources concatenate, everything else adds."""
        return Control(
            context=_join(self.context, other.context),
            vector=_sum(self.vector, other.vector),
            stages=_sum_all("stages", self.stages, other.stages),
            skips=_sum_all("skips", self.skips, other.skips),
            mid=_sum(self.mid, other.mid),
            attn=self.attn + other.attn,
        )

    def scaled(self, s: float) -> Control:
        """Weight this Control's influence: every residual and every ExtraKV scale times s; never context or vector."""
        return dataclasses.replace(
            self,
            stages=tuple(s * x for x in self.stages),
            skips=tuple(s * x for x in self.skips),
            mid=None if self.mid is None else s * self.mid,
            attn=tuple(dataclasses.replace(e, scale=s * e.scale) for e in self.attn),
        )

    @staticmethod
    def batch(uncond: Control, cond: Control) -> Control:
        """Stack two Controls on the batch axis, (uncond, cond), for classifier-free guidance in one forward.

        Context and vector must be on both sides or on neither; any other missing side is zeros.

        Raises: ValueError if one side alone has context or vector, or both have attention sources that differ in count.
        """
        for field in ("context", "vector"):
            if (getattr(uncond, field) is None) != (getattr(cond, field) is None):
                raise ValueError(f"Control.batch: {field} is on one side only; give it to both or to neither")
        return Control(
            context=_stack(uncond.context, cond.context),
            vector=_stack(uncond.vector, cond.vector),
            stages=_stack_all(uncond.stages, cond.stages),
            skips=_stack_all(uncond.skips, cond.skips),
            mid=_stack(uncond.mid, cond.mid),
            attn=_stack_attn(uncond.attn, cond.attn),
        )


def _join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return torch.cat([a, b], dim=1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _sum_all(field: str, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not a or not b:
        return a or b
    if len(a) != len(b):
        raise ValueError(f"Control.{field} has {len(a)} and {len(b)} entries; both must be as long as unet.spec says")
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _stack(u: Tensor | None, c: Tensor | None) -> Tensor | None:
    if u is None and c is None:
        return None
    u = torch.zeros_like(c) if u is None else u  # pyright: ignore[reportArgumentType]
    c = torch.zeros_like(u) if c is None else c
    return torch.cat([u, c])


def _stack_all(u: tuple[Tensor, ...], c: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    n = max(len(u), len(c))
    pairs = zip(u or (None,) * n, c or (None,) * n, strict=True)
    return tuple(x for x in (_stack(a, b) for a, b in pairs) if x is not None)


def _stack_attn(u: tuple[ExtraKV, ...], c: tuple[ExtraKV, ...]) -> tuple[ExtraKV, ...]:
    if u and c and [e.scale for e in u] != [e.scale for e in c]:
        raise ValueError("Control.batch: attention sources of the two sides differ in count or scale")
    sides = zip(u or (None,) * len(c), c or (None,) * len(u), strict=True)
    stacked: list[ExtraKV] = []
    for a, b in sides:
        some = a or b
        assert some is not None
        k = _stack_all(a.k if a else (), b.k if b else ())
        v = _stack_all(a.v if a else (), b.v if b else ())
        stacked.append(ExtraKV(k=k, v=v, scale=some.scale))
    return tuple(stacked)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What the UNet's encoder hands to its decoder."""

    mid: Tensor  # b c h w
    skips: tuple[Tensor, ...]  # b c_i h_i w_i, in encoder order
    emb: Tensor  # b e, embedded timestep (plus vector conditioning)


for _cls in (ExtraKV, Control, Encoded):
    pytree.register_dataclass(_cls)


class Adapter(nn.Module, ABC, Generic[P]):
    """Turns one hint into a Control. Holds its own weights, never the UNet's."""

    @abstractmethod
    def prepare(self, hint: Tensor) -> P:
        """Once per image: all that does not depend on x_t or t. `hint`: b ..., range as the adapter documents."""

    def null(self, hint: Tensor) -> Tensor | None:
        """The hint of the unconditional branch, like `hint`; None means both branches hear the same hint (ControlNet).

        Training with `drop_hint` puts it (zeros for None) in place of dropped hints.
        """
        del hint
        return None

    @abstractmethod
    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: P) -> Control:
        """Once per step. `base` carries context and vector only: adapters never see each other."""
