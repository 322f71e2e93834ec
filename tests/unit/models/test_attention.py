import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.control import Control, ExtraKV
from ldm.models.attention import GEGLU, Attention, SpatialTransformer, TransformerBlock, attend
from tests.small import waken


def by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention head by head, b n d in and out."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append((a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])).softmax(dim=-1) @ c)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("context_dim", [None, 5])
def test_attention_equals_the_formula(context_dim: int | None) -> None:
    net = Attention(8, 2, context_dim)
    x = torch.randn(2, 6, 8)
    context = None if context_dim is None else torch.randn(2, 3, context_dim)
    source = x if context is None else context
    expected = net.to_out(by_hand(net.to_q(x), net.to_k(source), net.to_v(source), heads=2))
    torch.testing.assert_close(net(x, context), expected, atol=1e-6, rtol=0)


def test_only_the_output_projection_has_a_bias() -> None:
    net = Attention(8, 2)
    assert [linear.bias is not None for linear in (net.to_q, net.to_k, net.to_v, net.to_out)] == [False] * 3 + [True]


def test_extra_keys_and_values_add_their_own_attention() -> None:
    net = Attention(8, 2, 5)
    x, context = torch.randn(2, 6, 8), torch.randn(2, 3, 5)
    k, v = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    text = by_hand(net.to_q(x), net.to_k(context), net.to_v(context), heads=2)
    image = by_hand(net.to_q(x), k, v, heads=2)
    got = net(x, context, [(k, v, 0.7), (k, v, 0.1)])
    torch.testing.assert_close(got, net.to_out(text + 0.8 * image), atol=1e-6, rtol=0)
    assert torch.equal(net(x, context, [(k, v, 0.0)]), net(x, context))


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="attention width 10 is not a multiple of 4 heads"):
        Attention(10, 4)


def test_attend_gives_the_same_in_bf16_on_either_path() -> None:
    q, k, v = (torch.randn(2, 2, 16, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), expected)
    short = attend(*(x.bfloat16() for x in (q, k, v)))
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), expected, atol=0.02, rtol=0)


def test_geglu_gates_with_the_second_half_and_the_exact_gelu() -> None:
    net = GEGLU(4)
    x = torch.randn(2, 3, 4)
    value, gate = net.proj(x)[..., :16], net.proj(x)[..., 16:]
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(net(x), net.out(value * gelu), atol=1e-6, rtol=0)


def test_transformer_block_adds_self_attention_cross_attention_and_feed_forward() -> None:
    net = TransformerBlock(8, 2, 5)
    x, context = torch.randn(2, 6, 8), torch.randn(2, 3, 5)
    y = x + net.attn1(net.norm1(x))
    y = y + net.attn2(net.norm2(y), context)
    torch.testing.assert_close(net(x, context, ()), y + net.ff(net.norm3(y)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("linear", [True, False])
def test_fresh_spatial_transformer_is_the_identity(linear: bool) -> None:
    net = SpatialTransformer(8, 2, 5, depth=2, linear=linear, groups=4)
    x = torch.randn(2, 8, 2, 3)
    assert torch.equal(net(x, Control(context=torch.randn(2, 4, 5))), x)
    assert type(net.proj_in) is type(net.proj_out) is (nn.Linear if linear else nn.Conv2d)
    assert net.norm.eps == 1e-6


def test_linear_and_conv_projections_agree_on_the_same_weights() -> None:
    conv = waken(SpatialTransformer(8, 2, 5, depth=1, linear=False, groups=4))
    linear = SpatialTransformer(8, 2, 5, depth=1, linear=True, groups=4)
    linear.load_state_dict({k: v.squeeze() if v.ndim == 4 else v for k, v in conv.state_dict().items()})
    x, control = torch.randn(2, 8, 2, 3), Control(context=torch.randn(2, 4, 5))
    torch.testing.assert_close(conv(x, control), linear(x, control), atol=1e-5, rtol=0)


def test_each_block_reads_its_own_extra_keys() -> None:
    net = waken(SpatialTransformer(8, 2, 5, depth=2, linear=True, groups=4))
    net.first_layer = 1
    x, context = torch.randn(2, 8, 2, 3), torch.randn(2, 4, 5)

    def output(used: int) -> Tensor:
        """Output when only layer `used` of four has values that are not zero."""
        k = tuple(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))
        v = tuple(k[i] if i == used else torch.zeros(2, 3, 8) for i in range(4))
        return net(x, Control(context=context, attn=(ExtraKV(k=k, v=v),)))

    plain = net(x, Control(context=context))
    assert [torch.equal(output(i), plain) for i in range(4)] == [True, False, False, True]


def test_spatial_transformer_without_context_is_refused() -> None:
    net = SpatialTransformer(8, 2, 5, depth=1, linear=True, groups=4)
    with pytest.raises(ValueError, match=r"Control\.context is None"):
        net(torch.randn(2, 8, 2, 3), Control())
