"""The laws of Control. Integer-valued tensors make float addition exact, so equality is equality of bits."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from ldm.control import Control, ExtraKV

B, SHAPES, INNER = 2, ((2, 4), (3, 2), (3, 1)), (4, 6)  # (channels, side) per skip; inner dims of two attention layers


def whole(draw: st.DrawFn, *shape: int) -> Tensor:
    seed = draw(st.integers(0, 2**16))
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def sources(draw: st.DrawFn) -> ExtraKV:
    n = draw(st.integers(1, 3))
    k, v = (tuple(whole(draw, B, n, d) for d in INNER) for _ in "kv")
    return ExtraKV(k=k, v=v, scale=draw(st.sampled_from([0.5, 1.0, 2.0])))


@st.composite
def controls(draw: st.DrawFn, conditioned: bool | None = None) -> Control:
    """Any Control; `conditioned` forces context and vector to be there (or not)."""

    def has() -> bool:
        return draw(st.booleans())

    def maps() -> tuple[Tensor, ...]:
        return tuple(whole(draw, B, c, s, s) for c, s in SHAPES) if has() else ()

    given_words = has() if conditioned is None else conditioned
    given_vector = has() if conditioned is None else conditioned
    n = draw(st.integers(1, 3)) if conditioned is None else 2
    keyed = given_words and has()
    return Control(
        context=whole(draw, B, n, 5) if given_words else None,
        vector=whole(draw, B, 7) if given_vector else None,
        stages=maps(),
        skips=maps(),
        mid=whole(draw, B, 3, 1, 1) if has() else None,
        attn=tuple(draw(st.lists(sources(), max_size=2))),
        kv=tuple((whole(draw, B, 2, n, 3), whole(draw, B, 2, n, 3)) for _ in INNER) if keyed else (),
    )


def same(a: Control, b: Control) -> bool:
    x, shape_x = pytree.tree_flatten(a)
    y, shape_y = pytree.tree_flatten(b)
    return shape_x == shape_y and all(
        torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(x, y, strict=True)
    )


def rows(control: Control, which: slice) -> Control:
    return pytree.tree_map_only(Tensor, lambda x: x[which], control)


def filled(control: Control, like: Control) -> Control:
    """`control` with zeros for what it lacks and `like` has."""
    zeros = pytree.tree_map_only(Tensor, torch.zeros_like, like)
    return Control(
        context=control.context,
        vector=control.vector,
        stages=control.stages or zeros.stages,
        skips=control.skips or zeros.skips,
        mid=zeros.mid if control.mid is None else control.mid,
        attn=control.attn or zeros.attn,
        kv=control.kv if like.kv else (),
    )


@given(controls())
def test_the_empty_control_is_the_identity(a: Control) -> None:
    assert same(a + Control(), a)
    assert same(Control() + a, a)


@given(controls(), controls())
def test_keys_are_those_of_the_whole_context_or_none(a: Control, b: Control) -> None:
    total = a + b
    for keys, values in total.kv:
        assert total.context is not None and keys.shape[2] == values.shape[2] == total.context.shape[1]
    told = [c for c in (a, b) if c.context is not None]
    assert bool(total.kv) == (bool(told) and all(c.kv for c in told))
    assert same(Control(kv=a.scaled(2.0).kv), Control(kv=a.kv))


@given(controls(), controls(), controls())
def test_addition_associates(a: Control, b: Control, c: Control) -> None:
    assert same((a + b) + c, a + (b + c))


@given(controls(conditioned=False), controls(conditioned=False))
def test_residuals_commute(a: Control, b: Control) -> None:
    left, right = a + b, b + a
    assert same(
        Control(stages=left.stages, skips=left.skips, mid=left.mid),
        Control(stages=right.stages, skips=right.skips, mid=right.mid),
    )


@given(controls(), controls(), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.25, 4.0]))
def test_scaling_is_linear(a: Control, b: Control, s: float, r: float) -> None:
    assert same((a + b).scaled(s), a.scaled(s) + b.scaled(s))
    assert same(a.scaled(s).scaled(r), a.scaled(s * r))
    assert same(a.scaled(1.0), a)


@given(st.booleans().flatmap(lambda c: st.tuples(controls(conditioned=c), controls(conditioned=c))))
def test_guidance_batch_splits_back(pair: tuple[Control, Control]) -> None:
    uncond, cond = pair
    if uncond.attn and cond.attn:  # two sides with sources must agree on their count, length and scale
        cond = Control(
            context=cond.context,
            vector=cond.vector,
            stages=cond.stages,
            skips=cond.skips,
            mid=cond.mid,
            attn=uncond.attn,
            kv=cond.kv,
        )
    both = Control.batch(uncond, cond)
    assert same(rows(both, slice(None, B)), filled(uncond, cond))
    assert same(rows(both, slice(B, None)), filled(cond, uncond))
