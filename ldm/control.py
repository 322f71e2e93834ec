"""Control, ExtraKV, Adapter: the whole contract between the UNet and everything that steers it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

P = TypeVar("P")
KV = tuple[Tensor, Tensor]  # keys and values of one attention layer, split into heads: b heads n d


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtraKV:
    """Extra keys and values for every cross-attention layer, from one source (an image prompt).

    Each layer adds `scale * attention(q, k, v)` to its text attention (Ye et al. 2023, arXiv:2308.06721, Eq. 5).
    `k[i]`, `v[i]`: b n inner_dim of layer i, in the order of `UNetSpec.cross_attn`.
    `mask`: b 1 h w in [0, 1], where in the picture it counts, at any size; None is everywhere.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    scale: float = 1.0
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """All conditioning for one UNet call. An empty Control is the unconditional base model, bit for bit.

    Residual tuples are empty or exactly as long as `unet.spec` says.
    """

    context: Tensor | None = None  # b n d        tokens for cross-attention (text, SeeCoder, unCLIP)
    vector: Tensor | None = None  # b v           raw vector conditioning, embedded beside the timestep (SDXL, unCLIP)
    stages: tuple[Tensor, ...] = ()  # b c_s h w  one per resolution, added before that skip is stored (T2I-Adapter)
    downs: tuple[Tensor, ...] = ()  # b c_s h w   one per downsampling, added behind it, likewise (T2I-Adapter XL)
    skips: tuple[Tensor, ...] = ()  # b c_i h w   one per skip, added where the decoder reads it (ControlNet)
    mid: Tensor | None = None  # b c h w          added to the bottleneck (ControlNet, Asyrp)
    attn: tuple[ExtraKV, ...] = ()  #             one entry per source (IP-Adapter)
    kv: tuple[KV, ...] = ()  # b heads n d         keys and values of `context` per layer of the network it is for,
    #                                             made by `UNet.project`; empty: each forward makes them anew

    def __add__(self, other: Control) -> Control:
        """Compose: context tokens and attention sources concatenate, everything else adds.

        `kv` stays what it is, the keys and values of the whole context: it concatenates where every context has its
        own, and is dropped (made anew by the network) where one has not.
        """
        return Control(
            context=_join(self.context, other.context),
            vector=_sum(self.vector, other.vector),
            stages=_sum_all("stages", self.stages, other.stages),
            downs=_sum_all("downs", self.downs, other.downs),
            skips=_sum_all("skips", self.skips, other.skips),
            mid=_sum(self.mid, other.mid),
            attn=self.attn + other.attn,
            kv=_join_kv(self, other),
        )

    def scaled(self, s: float) -> Control:
        """Weight this Control's influence: residuals and ExtraKV scales times s; never context, kv or vector."""
        return dataclasses.replace(
            self,
            stages=tuple(s * x for x in self.stages),
            downs=tuple(s * x for x in self.downs),
            skips=tuple(s * x for x in self.skips),
            mid=None if self.mid is None else s * self.mid,
            attn=tuple(dataclasses.replace(e, scale=s * e.scale) for e in self.attn),
        )

    def masked(self, mask: Tensor) -> Control:
        """Limit this Control to a part of the picture: all but context, kv and vector.

        Args:
            mask: b 1 h w in [0, 1], 1 where the Control counts, at any size.
        """
        return dataclasses.replace(
            self,
            stages=tuple(_within(x, mask) for x in self.stages),
            downs=tuple(_within(x, mask) for x in self.downs),
            skips=tuple(_within(x, mask) for x in self.skips),
            mid=None if self.mid is None else _within(self.mid, mask),
            attn=tuple(dataclasses.replace(e, mask=mask) for e in self.attn),
        )

    @staticmethod
    def batch(uncond: Control, cond: Control) -> Control:
        """Stack two Controls on the batch axis, (uncond, cond), for classifier-free guidance in one forward.

        Context and vector must be on both sides or on neither; any other missing side is zeros. `kv` survives if both
        have it.

        Raises: ValueError if one side alone has context or vector, or both have attention sources that differ in count.
        """
        for field in ("context", "vector"):
            if (getattr(uncond, field) is None) != (getattr(cond, field) is None):
                raise ValueError(f"Control.batch: {field} is on one side only; give it to both or to neither")
        return Control(
            context=_stack(uncond.context, cond.context),
            vector=_stack(uncond.vector, cond.vector),
            stages=_stack_all(uncond.stages, cond.stages),
            downs=_stack_all(uncond.downs, cond.downs),
            skips=_stack_all(uncond.skips, cond.skips),
            mid=_stack(uncond.mid, cond.mid),
            attn=_stack_attn(uncond.attn, cond.attn),
            kv=_each(uncond.kv, cond.kv, dim=0) if uncond.kv and cond.kv else (),
        )


def _within(x: Tensor, mask: Tensor) -> Tensor:
    return x * F.adaptive_avg_pool2d(mask, (x.shape[-2], x.shape[-1])).to(x.dtype)


def _join_kv(a: Control, b: Control) -> tuple[KV, ...]:
    """Keys and values of both contexts; none if a context comes without its own."""
    parts = [control for control in (a, b) if control.context is not None]
    if not parts or not all(control.kv for control in parts):
        return ()
    return parts[0].kv if len(parts) == 1 else _each(a.kv, b.kv, dim=2)


def _each(a: tuple[KV, ...], b: tuple[KV, ...], dim: int) -> tuple[KV, ...]:
    return tuple((torch.cat([x, u], dim), torch.cat([y, v], dim)) for (x, y), (u, v) in zip(a, b, strict=True))


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
    if u and c and [(e.scale, e.mask is None) for e in u] != [(e.scale, e.mask is None) for e in c]:
        raise ValueError(
            "Control.batch: attention sources of the two sides differ in count or scale, or in having a mask"
        )
    sides = zip(u or (None,) * len(c), c or (None,) * len(u), strict=True)
    stacked: list[ExtraKV] = []
    for a, b in sides:
        some = a or b
        assert some is not None
        k = _stack_all(a.k if a else (), b.k if b else ())
        v = _stack_all(a.v if a else (), b.v if b else ())
        masks = [None if e is None else e.mask for e in (a, b)]
        stacked.append(ExtraKV(k=k, v=v, scale=some.scale, mask=_stack(*masks)))
    return tuple(stacked)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What the UNet's encoder hands to its decoder."""

    mid: Tensor  # b c h w
    skips: tuple[Tensor, ...]  # b c_i h_i w_i, in encoder order
    emb: Tensor  # b e, embedded timestep (plus vector conditioning), through SiLU: what every block projects


for _cls in (ExtraKV, Control, Encoded):
    pytree.register_dataclass(_cls)


class Adapter(nn.Module, ABC, Generic[P]):
    """Turns one hint into a Control. Holds its own weights, never the UNet's.

    Attributes:
        hint_range: lowest and highest value of a hint, which sampling checks; None if any will do.
        image_prompt: the hint is a picture to take content from, of any size, not a map of the picture to draw.
        weighable: which keys of its use weaken it; those that cannot are refused. Control's scale, mask and blocks
            reach all but `context`.
        gives_context: it stands for the text: the other adapters hear its context as part of `base` (SeeCoder).
        silent_parts: prefixes of tensors that start as no-ops: training may begin from weights without them.
    """

    hint_range: tuple[float, float] | None = None
    image_prompt: ClassVar[bool] = False
    weighable: ClassVar[frozenset[str]] = frozenset({"scale", "mask", "blocks"})
    gives_context: ClassVar[bool] = False
    silent_parts: ClassVar[tuple[str, ...]] = ()

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """Frozen networks that `encode` runs, which the adapter does not own: they are no part of its state."""
        return ()

    @property
    def zero_layers(self) -> tuple[nn.Module, ...]:
        """Layers that join it to the rest and start at zero: training logs the norm of their weights."""
        return ()

    def encode(self, hint: Tensor) -> Any:
        """The hint as people give it -> as `prepare` takes it: what a frozen network makes of it, once per image.

        A tensor b ..., or a tuple of such. Training may keep the result. Image prompts: b m 3 h w in [0, 1], m
        references for each picture -> b m n d, or maps b m c h w.
        """
        return hint

    @abstractmethod
    def prepare(self, hint: Any) -> P:
        """Once per image: all that does not depend on x_t or t. `hint`: as `encode` gives it."""

    def null(self, hint: Any) -> Any:
        """The hint of the unconditional branch, like `hint`; None means both branches hear the same hint (ControlNet).

        It may be of one pixel where it is the same everywhere. Training with `drop_hint` puts it (zeros for None) in
        place of dropped hints.
        """
        del hint
        return None

    def settle(self, prepared: P, base: Control) -> P:
        """Once per image, where `base` is the same at every step: the work that needs `base` but not x_t or t.

        Optional: `control` must give the same with and without it. Skipped in training.
        """
        del base
        return prepared

    @abstractmethod
    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: P) -> Control:
        """Once per step. `base` carries context and vector only: adapters never see each other."""

    def scaled(self, control: Control, s: float, prepared: P) -> Control:
        """What `control` gave for `prepared`, at weight s. 0 is silence, bit for bit."""
        del prepared
        return control.scaled(s)


class Fuser(nn.Module, ABC):
    """Lets the prepared hints of several adapters see each other, once per image, before any of them speaks."""

    @abstractmethod
    def forward(
        self, prepared: Mapping[str, Any], scales: Mapping[str, float], given: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Change what some of the adapters prepared; what it does not know stays as it is.

        Args:
            prepared: adapter name -> what its `prepare` gave for b pictures.
            scales: adapter name -> weight that its Control gets later, 1 where missing. It counts in what is read, and
                is not applied to what is returned.
            given: adapter name -> b bool, False where the hint was dropped in training; True where missing.

        Returns: as `prepared`.
        """
