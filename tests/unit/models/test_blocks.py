import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.blocks import Downsample, Embed, ResBlock, Upsample, init_zero, timestep_embedding
from tests.small import waken


def test_timestep_embedding_has_the_published_values() -> None:
    row = timestep_embedding(torch.tensor([10]), 320)[0]
    expected = {0: -0.83907, 1: -0.99987, 2: -0.87164, 160: -0.54402, 161: -0.01583, 162: 0.49016, 319: 0.00105926}
    assert row.shape == (320,) and row.dtype == torch.float32
    for i, value in expected.items():
        assert row[i].item() == pytest.approx(value, abs=5e-6)


def test_timestep_embedding_takes_fractions_and_any_integer_type() -> None:
    whole = timestep_embedding(torch.tensor([3], dtype=torch.int32), 8)
    assert torch.equal(whole, timestep_embedding(torch.tensor([3.0], dtype=torch.float64), 8))
    between = timestep_embedding(torch.tensor([3.5]), 8)
    assert between[0, 0].item() == pytest.approx(-0.936457, abs=1e-6)  # cos 3.5


def test_embed_has_no_activation_at_the_end() -> None:
    net = Embed(4, 8)
    assert [type(m) for m in net] == [nn.Linear, nn.SiLU, nn.Linear]


def test_fresh_res_block_is_its_shortcut() -> None:
    x, emb = torch.randn(2, 8, 4, 6), torch.randn(2, 16)
    assert torch.equal(ResBlock(8, 8, 16, 4)(x, emb), x)
    wider = ResBlock(8, 12, 16, 4)
    assert torch.equal(wider(x, emb), wider.shortcut(x))


def test_res_block_formula() -> None:
    net = waken(ResBlock(8, 12, 16, 4))
    x, emb = torch.randn(2, 8, 4, 6), torch.randn(2, 16)
    h = net.conv1(F.silu(F.group_norm(x, 4, net.norm1.weight, net.norm1.bias, eps=1e-5)))
    h = h + net.emb(emb)[:, :, None, None]
    h = net.conv2(F.silu(F.group_norm(h, 4, net.norm2.weight, net.norm2.bias, eps=1e-5)))
    torch.testing.assert_close(net(x, emb), net.shortcut(x) + h, atol=1e-6, rtol=0)


def test_res_block_shortcut_is_a_1x1_convolution_only_where_channels_change() -> None:
    assert isinstance(ResBlock(8, 8, 16, 4).shortcut, nn.Identity)
    shortcut = ResBlock(8, 12, 16, 4).shortcut
    assert isinstance(shortcut, nn.Conv2d) and shortcut.kernel_size == (1, 1) and shortcut.bias is not None


def test_downsample_pads_all_sides() -> None:
    net = Downsample(1)
    nn.init.ones_(net.conv.weight)
    nn.init.zeros_(net.conv.bias)  # pyright: ignore[reportArgumentType]
    impulse = torch.zeros(1, 1, 4, 4)
    impulse[0, 0, 0, 0] = 1.0
    assert net(impulse)[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    impulse = impulse.roll((3, 3), dims=(2, 3))  # the last pixel is seen by the last window only
    assert net(impulse)[0, 0].tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_upsample_repeats_pixels() -> None:
    net = Upsample(1)
    init_zero(net.conv)
    net.conv.weight.data[0, 0, 1, 1] = 1.0  # identity
    assert net(torch.tensor([[[[1.0, 2.0]]]]))[0, 0].tolist() == [[1.0, 1.0, 2.0, 2.0]] * 2


def test_init_zero_takes_layers_without_bias() -> None:
    for layer in (nn.Linear(3, 3, bias=False), nn.Conv2d(3, 3, 1)):
        init_zero(layer)
        assert not any(p.any() for p in layer.parameters())
