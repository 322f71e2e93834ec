from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16
from torchvision.models.feature_extraction import create_feature_extractor

from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import CHANNELS, LPIPS, TAPS
from ldm.registry import ConfigError


def test_published_size_and_patches() -> None:
    with torch.device("meta"):
        net = PatchDiscriminator()
        assert net(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in net.parameters()) == 2_765_633


def test_strides_and_biases() -> None:
    convs = [m for m in PatchDiscriminator(width=4).modules() if isinstance(m, nn.Conv2d)]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 1, 1]
    assert [c.out_channels for c in convs] == [4, 8, 16, 32, 1]
    assert [c.bias is not None for c in convs] == [True, False, False, False, True]


def test_initialisation() -> None:
    net = PatchDiscriminator(width=32)
    conv = next(m for m in net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 64)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    weights = torch.cat([m.weight for m in norms])
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)
    assert weights.std().item() == pytest.approx(0.02, rel=0.3)
    assert all((m.bias == 0).all() for m in norms)


def test_too_small_an_image_is_refused() -> None:
    net = PatchDiscriminator(width=4, layers=2)
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"image is 8x8 \(h w\), sides must be at least 16 with 2 layers"):
        net(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="layers is 0"):
        PatchDiscriminator(layers=0)


def test_group_norm_sees_each_picture_alone_and_batch_norm_all() -> None:
    x = torch.rand(4, 3, 16, 16)
    for norm, alone in (("group", True), ("batch", False)):
        net = PatchDiscriminator(width=4, layers=1, norm=norm)
        assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in PatchDiscriminator(4, 1).parameters())
        assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-6) == alone
    with pytest.raises(ValueError, match="norm is 'gruop'; allowed: batch, group; did you mean 'group'"):
        PatchDiscriminator(norm="gruop")


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = {}
    for name, empty in LPIPS().state_dict().items():
        scale = 0.1 if name.startswith("features") else 1.0
        state[name] = torch.empty(empty.shape).uniform_(-scale if name.startswith("features") else 0.0, scale)
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state, path)
    return path


def test_lpips_is_a_frozen_distance(lpips_file: Path) -> None:
    net = LPIPS.load(lpips_file)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    x, y = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    distance = net(x, y)
    assert distance.shape == (2,) and (distance > 0).all()
    torch.testing.assert_close(net(y, x), distance)
    torch.testing.assert_close(net(x, x), torch.zeros(2))
    x.requires_grad_()
    net(x, y).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_lpips_by_its_definition(lpips_file: Path) -> None:
    net, x, y = LPIPS.load(lpips_file), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.device("meta"):
        vgg = vgg16(weights=None).features[:30]
    vgg.load_state_dict(net.features.state_dict(), assign=True)
    nodes = create_feature_extractor(vgg, [str(i) for i in TAPS])
    # The shift and scale are ImageNet's mean and std for images in [-1, 1]; the published constants are rounded.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(net.shift.flatten(), 2 * mean - 1, atol=1e-3, rtol=0)
    torch.testing.assert_close(net.scale.flatten(), 2 * std, atol=1e-3, rtol=0)
    total = torch.zeros(1)
    pairs = zip(nodes((x - net.shift) / net.scale).values(), nodes((y - net.shift) / net.scale).values(), strict=True)
    for k, (a, b) in enumerate(pairs):
        a, b = (f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        assert a.shape[1] == CHANNELS[k]
        weight = net.heads[k].get_parameter("weight").view(1, -1, 1, 1)
        total += ((a - b).pow(2) * weight).sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(net(x, y), total)


@pytest.mark.parametrize("weights", [None, "nowhere.safetensors"])
def test_lpips_without_weights_is_one_clear_line(weights: str | None) -> None:
    with pytest.raises(
        ConfigError, match=r"LPIPS is unavailable: its weights file is .* set the LPIPS weight"
    ) as error:
        LPIPS.load(weights)
    assert "\n" not in str(error.value)


def test_lpips_with_other_weights_is_one_clear_line(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not a safetensors file")
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match="do not fit") as error:
            LPIPS.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
