import pytest
import torch
from torch import nn

from ldm.training.ema import EMA


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    return net


def step(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def test_only_trainable_parameters_are_averaged() -> None:
    assert set(EMA(model()).weights) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_warm_up_decay_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net)
    nn.init.ones_(net.weight)
    ema.update()  # decay 2/11
    assert ema.weights["weight"].item() == pytest.approx(9 / 11)
    ema.update()  # decay 3/12
    assert ema.weights["weight"].item() == pytest.approx(0.25 * 9 / 11 + 0.75)


def test_decay_is_reached_after_the_warm_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, decay=0.5)  # (1 + n) / (10 + n) passes 0.5 at n = 8
    ema.updates = 1000
    nn.init.ones_(net.weight)
    ema.update()
    assert ema.weights["weight"].item() == pytest.approx(0.5)


def test_swapped_shows_the_averages_and_puts_the_weights_back() -> None:
    net = model()
    ema = EMA(net)
    step(net)
    ema.update()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    identities = [id(p) for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        for name, average in ema.weights.items():
            assert torch.equal(net.get_parameter(name), average)
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [id(p) for p in net.parameters()] == identities


def test_bf16_weights_are_averaged_in_float32() -> None:
    net = nn.Linear(4, 4).bfloat16()
    ema = EMA(net)
    ema.updates = 10**6
    start = ema.weights["weight"].clone()
    step(net)
    ema.update()  # decay 0.9999: a bf16 average would not move
    moved = ema.weights["weight"] - start
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, 1e-4 * (net.weight.float() - start), rtol=2e-2, atol=1e-7)
    with ema.swapped():
        assert net.weight.dtype == torch.bfloat16


def test_a_resumed_average_continues_bit_for_bit() -> None:
    net = model()
    ema = EMA(net)
    step(net)
    ema.update()
    saved = {"updates": ema.state_dict()["updates"], "weights": {k: v.clone() for k, v in ema.weights.items()}}
    resumed = EMA(net)
    resumed.load_state_dict(saved)
    step(net)
    ema.update()
    resumed.update()
    assert resumed.updates == 2
    assert all(torch.equal(resumed.weights[name], average) for name, average in ema.weights.items())


def test_a_state_of_another_model_is_refused() -> None:
    ema, other = EMA(nn.Linear(2, 2)), EMA(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"missing \['bias', 'weight'\] \(2\), unexpected \['0.bias', '0.weight'\]"):
        ema.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"other shape \['bias', 'weight'\] \(2\)"):
        ema.load_state_dict(EMA(nn.Linear(2, 3)).state_dict())


def test_a_module_without_trainable_parameters_is_fine() -> None:
    net = nn.Linear(2, 2).requires_grad_(False)
    ema = EMA(net)
    ema.update()
    with ema.swapped():
        pass
    assert ema.state_dict() == {"updates": 1, "weights": {}}


def test_decay_is_checked() -> None:
    with pytest.raises(ValueError, match="EMA decay is 1; allowed: 0 <= decay < 1"):
        EMA(nn.Linear(1, 1), decay=1)
