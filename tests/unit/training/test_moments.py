"""AdamW with bfloat16 moments: the float32 one's path at half its memory, skipped and resumed like it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.training.draws import generator
from ldm.training.moments import MOMENTS, BFloat16AdamW, rounded
from ldm.training.optim import adamw, guarded_step


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))
    x = torch.randn(64, 8)
    return net, x, x[:, :4].sin() * x[:, 4:].cos()


def train(moments: str, steps: int, bad: int | None = None) -> tuple[list[float], nn.Module, Any]:
    net, x, y = problem()
    config = TrainConfig(lr=1e-2, moments=moments)
    optimizer = adamw(net.parameters(), config)
    losses: list[float] = []
    for step in range(steps):
        losses.append(advance(net, optimizer, x, y, step, math.nan if step == bad else 1.0))
    return losses, net, optimizer


def advance(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor, step: int, scale: float = 1.0) -> float:
    if isinstance(optimizer, BFloat16AdamW):
        optimizer.noise = generator(0, "rounding", step)
    optimizer.zero_grad()
    loss = (net(x) - y).square().mean()
    (scale * loss).backward()
    guarded_step(optimizer, list(net.parameters()), 1.0)
    return loss.item()


def size(optimizer: Any) -> int:
    return sum(state[name].nbytes for state in optimizer.state.values() for name in MOMENTS)


def test_it_trains_as_float32_moments_do_with_half_their_memory() -> None:
    (plain, _, whole), (losses, _, half) = train("fp32", 200), train("bf16", 200)
    assert losses[-1] < 0.2 * losses[0]
    assert losses[-1] == pytest.approx(plain[-1], rel=0.25)
    assert size(half) == size(whole) / 2 > 0


def test_the_first_step_is_that_of_adamw() -> None:
    (_, plain, _), (_, half, _) = train("fp32", 1), train("bf16", 1)
    for a, b in zip(plain.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_second_moment_that_decays_a_thousandth_a_step_decays() -> None:
    p = nn.Parameter(torch.zeros(2000))
    optimizer = BFloat16AdamW([p], betas=(0.9, 0.999), fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        optimizer.step()
    left = optimizer.state[p]["exp_avg_sq"].float().mean().item() / 1e-3
    assert left == pytest.approx(0.999**1000, rel=0.02)  # to the nearest it would stay at 1


def test_rounding_is_right_in_the_mean_and_exact_where_it_can_be() -> None:
    x = torch.tensor([1 + 1 / 512, -3.3e-9, 7.7e20]).repeat_interleave(20000)
    low_and_high = rounded(x, None).float().view(3, -1)
    torch.testing.assert_close(low_and_high.double().mean(1), x.view(3, -1)[:, 0].double(), rtol=1e-4, atol=0)
    assert [len(row.unique()) for row in low_and_high] == [2, 2, 2]
    exact = torch.tensor([0.0, 1.5, -2.0, math.inf, 2.0**-130])
    assert torch.equal(rounded(exact, None).float(), exact)


@pytest.mark.parametrize("bad", [0, 3])
def test_a_step_whose_gradient_is_not_finite_is_skipped(bad: int) -> None:
    _, net, optimizer = train("bf16", bad + 1, bad=bad)
    _, before, _ = train("bf16", bad)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    for state in optimizer.state.values():
        assert state["step"] == bad and all(state[name].isfinite().all() for name in MOMENTS)


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    _, whole, _ = train("bf16", 6)
    _, net, optimizer = train("bf16", 3)
    other = adamw(net.parameters(), TrainConfig(lr=1e-2, moments="bf16"))
    other.load_state_dict(optimizer.state_dict())
    assert all(state[name].dtype == torch.bfloat16 for state in other.state.values() for name in MOMENTS)
    _, x, y = problem()
    for step in range(3, 6):
        advance(net, other, x, y, step)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))
