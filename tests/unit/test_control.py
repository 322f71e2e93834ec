import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldm.control import Adapter, Control, Encoded, ExtraKV


def kv(value: float, n: int = 2, scale: float = 1.0) -> ExtraKV:
    full = torch.full((1, n, 3), value)
    return ExtraKV(k=(full, full + 1), v=(full + 2, full + 3), scale=scale)


def full_control(value: float) -> Control:
    return Control(
        context=torch.full((1, 4, 3), value),
        vector=torch.full((1, 5), value),
        stages=(torch.full((1, 2, 4, 4), value),),
        skips=(torch.full((1, 2, 4, 4), value), torch.full((1, 3, 2, 2), value)),
        mid=torch.full((1, 3, 2, 2), value),
        attn=(kv(value),),
    )


def leaves(control: Control) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(control) if isinstance(leaf, Tensor)]


def test_addition_by_hand() -> None:
    total = full_control(1.0) + full_control(2.0)
    assert total.context is not None and total.context.shape == (1, 8, 3)
    assert total.context[0, :, 0].tolist() == [1.0] * 4 + [2.0] * 4
    assert total.vector is not None and total.mid is not None
    for tensor in (total.vector, total.mid, *total.stages, *total.skips):
        assert torch.equal(tensor, torch.full_like(tensor, 3.0))
    assert [e.v[0][0, 0, 0].item() for e in total.attn] == [3.0, 4.0]


def test_addition_does_not_change_its_operands() -> None:
    a, b = full_control(1.0), full_control(2.0)
    before = [leaf.clone() for leaf in leaves(a) + leaves(b)]
    _ = a + b
    assert all(torch.equal(x, y) for x, y in zip(before, leaves(a) + leaves(b), strict=True))


def test_sum_of_controls_of_different_length_is_refused() -> None:
    one = Control(skips=(torch.zeros(1, 1, 1, 1),))
    two = Control(skips=(torch.zeros(1, 1, 1, 1),) * 2)
    with pytest.raises(ValueError, match=r"Control\.skips has 1 and 2 entries"):
        _ = one + two


def test_scaling_weights_residuals_and_attention_but_neither_context_nor_vector() -> None:
    control = full_control(2.0)
    half = control.scaled(0.5)
    assert half.context is control.context and half.vector is control.vector
    assert half.mid is not None
    assert {t.unique().item() for t in (half.mid, *half.stages, *half.skips)} == {1.0}
    assert [e.scale for e in half.attn] == [0.5]
    assert half.attn[0].k is control.attn[0].k and half.attn[0].v is control.attn[0].v
    assert [e.scale for e in half.scaled(3.0).attn] == [1.5]


def test_a_mask_limits_residuals_to_its_part_by_area() -> None:
    maps = {side: torch.full((1, 2, side, side), 3.0) for side in (8, 4, 2)}
    tokens = torch.ones(1, 4, 3)
    control = Control(
        context=tokens, vector=tokens[0], stages=(maps[8],), downs=(maps[4],), skips=(maps[8], maps[4]), mid=maps[2]
    )
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    mask[..., :4, :8] = 0.5
    said = control.masked(mask)
    assert said.context is tokens and said.vector is control.vector and said.mid is not None
    for part in (*said.stages, *said.downs, *said.skips, said.mid):
        half = part.shape[-1] // 2
        assert not part[..., half:].any() and (part[..., half:, :half] == 3).all()
    assert said.stages[0][0, 0, :, 0].tolist() == [1.5, 1.5, 3, 3, 3, 3, 3, 3]
    assert said.mid[0, 0, :, 0].tolist() == [2.25, 3]  # half of its area at one half


def test_batch_stacks_uncond_before_cond() -> None:
    both = Control.batch(full_control(1.0), full_control(2.0))
    for tensor in leaves(both):
        assert tensor.shape[0] == 2
        assert (tensor[1] - tensor[0]).unique().item() == 1.0


def test_batch_fills_the_side_without_residuals_with_zeros() -> None:
    plain = Control(context=torch.zeros(1, 4, 3), vector=torch.zeros(1, 5))
    both = Control.batch(plain, full_control(2.0))
    assert both.mid is not None
    for tensor in (both.mid, *both.stages, *both.skips, *both.attn[0].k, *both.attn[0].v):
        assert not tensor[0].any() and tensor[1].all()
    other_way = Control.batch(full_control(2.0), plain)
    assert other_way.mid is not None and other_way.mid[0].all() and not other_way.mid[1].any()


def test_batch_keeps_the_scale_of_a_one_sided_attention_source() -> None:
    both = Control.batch(Control(), Control(attn=(kv(1.0, scale=0.25),)))
    assert [e.scale for e in both.attn] == [0.25]


@pytest.mark.parametrize("field", ["context", "vector"])
def test_batch_refuses_one_sided_conditioning(field: str) -> None:
    control = full_control(1.0)
    with pytest.raises(ValueError, match=rf"{field} is on one side only"):
        Control.batch(dataclasses.replace(control, **{field: None}), control)


def test_batch_refuses_attention_sources_that_differ() -> None:
    with pytest.raises(ValueError, match="differ in count or scale"):
        Control.batch(Control(attn=(kv(1.0),)), Control(attn=(kv(1.0), kv(2.0))))
    with pytest.raises(ValueError, match="differ in count or scale"):
        Control.batch(Control(attn=(kv(1.0),)), Control(attn=(kv(1.0, scale=2.0),)))


@pytest.mark.parametrize("cls", [Control, ExtraKV, Encoded])
def test_contract_is_frozen_keyword_only_and_slotted(cls: type) -> None:
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert {"__setattr__", "__slots__"} <= vars(cls).keys()


def test_control_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Control().mid = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]


def test_control_is_a_pytree_of_its_tensors() -> None:
    control = full_control(1.0)
    tensors = leaves(control)
    assert len(tensors) == 2 + 1 + 2 + 1 + 4
    doubled = pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]), control)
    assert isinstance(doubled, Control) and isinstance(doubled.attn[0], ExtraKV)
    assert all(x.shape[0] == 2 for x in leaves(doubled))
    assert doubled.attn[0].scale == 1.0


def test_encoded_is_a_pytree_of_its_tensors() -> None:
    x = torch.ones(1)
    moved = pytree.tree_map(lambda v: v + 1, Encoded(mid=x, skips=(x, x), emb=x))
    assert isinstance(moved, Encoded)
    assert [leaf.item() for leaf in pytree.tree_leaves(moved)] == [2.0] * 4


def test_adapter_is_an_abstract_module_with_two_methods() -> None:
    assert issubclass(Adapter, nn.Module)
    assert Adapter.__abstractmethods__ == {"prepare", "control"}
    with pytest.raises(TypeError, match="abstract"):
        Adapter()  # pyright: ignore[reportAbstractUsage]
