import math

import pytest
import torch
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.registry import ConfigError
from ldm.training.optim import adamw, guarded_step, lr_at, store_frozen, table, trainable


def pair() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": nn.Linear(4, 3), "adapters": nn.ModuleDict({"canny": nn.Linear(3, 2)})})


def moments(optimizer: torch.optim.AdamW, p: nn.Parameter) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.state[p].items()}


def backward(net: nn.Linear, scale: float = 1.0) -> None:
    net.zero_grad()
    (scale * net(torch.ones(1, 2))).sum().backward()


def test_trainable_sets_exactly_what_matches() -> None:
    module = pair()
    module["adapters"].requires_grad_(False)
    chosen = trainable(module, ["adapters.*"])
    assert [id(p) for p in chosen] == [id(p) for p in module["adapters"].parameters()]
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        "adapters.canny.weight",
        "adapters.canny.bias",
    }


def test_trainable_takes_several_patterns() -> None:
    module = pair()
    chosen = trainable(module, ["*.bias", "unet.*"])
    assert sum(p.numel() for p in chosen) == 15 + 2


def test_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'adaptors\.\*' matches no parameter; groups: adapters, unet"):
        trainable(pair(), ["unet.*", "adaptors.*"])


def test_table_counts_by_group() -> None:
    module = pair()
    trainable(module, ["adapters.*"])
    rows = {line.split()[0]: line.split()[1:] for line in table(module).splitlines()}
    assert rows["unet"] == ["0", "15"]
    assert rows["adapters.canny"] == ["8", "0"]
    assert rows["total"] == ["8", "15"]


def test_learning_rate_warms_up_linearly_and_stays() -> None:
    config = TrainConfig(lr=1.0, warmup=4, steps=10)
    assert [lr_at(s, config) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [lr_at(s, TrainConfig(lr=0.1)) for s in (0, 10**6)] == [0.1, 0.1]


def test_learning_rate_follows_a_cosine_to_zero() -> None:
    config = TrainConfig(lr=2.0, warmup=2, decay="cosine", steps=10)
    got = [lr_at(s, config) for s in (0, 1, 2, 4, 6, 10, 99)]
    expected = [1.0, 2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 0.0, 0.0]
    assert got == pytest.approx(expected, abs=1e-12)


def test_step_decay_is_a_tenth_from_the_middle_on() -> None:
    config = TrainConfig(lr=1.0, warmup=2, decay="step", steps=10)
    assert [lr_at(s, config) for s in (0, 1, 4, 5, 9)] == [0.5, 1.0, 1.0, 0.1, 0.1]


def test_unknown_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.decay is 'linear'; allowed: constant, cosine, step"):
        lr_at(0, TrainConfig(decay="linear"))


def test_first_step_equals_adamw_by_hand() -> None:
    net = nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = adamw(net.parameters(), TrainConfig(lr=0.1, weight_decay=0.5))
    backward(net, 3.0)
    norm = guarded_step(optimizer, [net.weight], None)
    assert norm.item() == pytest.approx(3 * math.sqrt(2))
    expected = before * (1 - 0.1 * 0.5) - 0.1  # the first update is lr times the gradient's sign
    torch.testing.assert_close(net.weight.detach(), expected, atol=1e-6, rtol=0)


def test_only_matrices_and_kernels_decay() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv2d(2, 2, 1))
    net.register_parameter("temperature", nn.Parameter(torch.tensor(3.0)))
    optimizer = adamw(net.parameters(), TrainConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("before", [0, 3])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float, clip: float | None, before: int) -> None:
    net = nn.Linear(2, 3)
    parameters = list(net.parameters())
    optimizer = adamw(parameters, TrainConfig(lr=0.1))
    for _ in range(before):
        backward(net)
        guarded_step(optimizer, parameters, clip)
    weights = [p.detach().clone() for p in parameters]
    state = [moments(optimizer, p) for p in parameters if p in optimizer.state]
    backward(net)
    assert net.weight.grad is not None
    net.weight.grad[0, 0] = bad
    norm = guarded_step(optimizer, parameters, clip)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(parameters, weights, strict=True))
    for p, old in zip(parameters, state, strict=False):
        assert all(torch.equal(value, old[name]) for name, value in moments(optimizer, p).items())


def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been() -> None:
    nets = [nn.Linear(2, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for i, net in enumerate(nets):
        parameters = list(net.parameters())
        optimizer = adamw(parameters, TrainConfig(lr=0.1))
        for scale in (1.0, *([math.nan] if i else []), 2.0, 3.0):
            backward(net, scale)
            guarded_step(optimizer, parameters, 1.0)
        assert not hasattr(optimizer, "found_inf")
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_gradients_are_clipped_together() -> None:
    net = nn.Linear(2, 1)
    optimizer = adamw(net.parameters(), TrainConfig())
    backward(net, 10.0)  # all three gradients are 10
    norm = guarded_step(optimizer, list(net.parameters()), 0.5)
    assert norm.item() == pytest.approx(10 * math.sqrt(3))
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad, torch.full((1, 2), 0.5 / math.sqrt(3)), atol=1e-5, rtol=0)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = nn.Linear(2, 1), nn.Linear(2, 1)
    parameters = [*used.parameters(), *unused.parameters()]
    before = unused.weight.detach().clone()
    optimizer = adamw(parameters, TrainConfig(lr=0.1))
    backward(used)
    guarded_step(optimizer, parameters, 1.0)
    assert torch.equal(unused.weight, before)


def test_frozen_weights_in_the_autocast_dtype_give_the_same_bits() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 5))
    trainable(net, ["2.*"])
    x = torch.randn(2, 3, 4, 4)

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        return y, torch.autograd.grad(y.float().square().sum(), net.get_parameter("2.weight"))[0]

    before = run()
    store_frozen(net, torch.bfloat16, exported=[net[4]])
    dtypes = {name: p.dtype for name, p in net.named_parameters() if name.endswith("weight")}
    full, half = torch.float32, torch.bfloat16
    assert dtypes == {"0.weight": half, "1.weight": full, "2.weight": full, "4.weight": full}
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
