import math

import pytest
import torch
from torch import nn

from ldm.schedule import Schedule, ScheduleConfig
from ldm.training.losses import adaptive_weight, diffusion_loss, gradients_at, hinge_discriminator

SCHEDULE = Schedule(ScheduleConfig())


def test_diffusion_loss_is_the_mean_squared_error_of_each_sample() -> None:
    output, target = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    target[1] = 3.0
    loss = diffusion_loss(output, target, SCHEDULE, "eps", torch.tensor([0, 999]), None)
    assert loss.tolist() == [1.0, 9.0]


@pytest.mark.parametrize(
    ("objective", "t", "weight"),
    [("eps", 0, 5 / 1175.47), ("v", 0, 5 / 1176.47), ("eps", 999, 1.0), ("v", 999, 0.004660)],
)
def test_min_snr_weights_have_the_published_values(objective: str, t: int, weight: float) -> None:
    ones = torch.ones(1, 1, 1, 1)
    loss = diffusion_loss(2 * ones, ones, SCHEDULE, objective, torch.tensor([t]), 5.0)
    assert loss.item() == pytest.approx(weight, rel=1e-3)


def test_diffusion_loss_weighs_each_sample_by_its_own_time() -> None:
    output, target = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([10, 900])
    both = diffusion_loss(output, target, SCHEDULE, "eps", t, 5.0)
    apart = [diffusion_loss(output[[i]], target[[i]], SCHEDULE, "eps", t[[i]], 5.0) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(apart))


def test_diffusion_loss_is_float32_for_half_precision_output() -> None:
    output, target = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16), torch.zeros(1, 1, 1, 1)
    loss = diffusion_loss(output, target, SCHEDULE, "eps", torch.tensor([500]), None)
    assert loss.dtype == torch.float32 and loss.item() == 90_000.0  # beyond float16


def test_diffusion_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"output is \(2, 1, 2, 2\) .* target \(2, 4, 2, 2\); .*out_channels"):
        diffusion_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 4, 2, 2), SCHEDULE, "eps", torch.tensor([0, 1]), None)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (3 / 3 + 3 / 3))
    assert hinge_discriminator(torch.full((4,), 1.5), torch.full((4,), -1.5)).item() == 0.0


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    gradients = gradients_at(layer, (3 * layer).sum(), (2 * layer).sum())
    assert gradients.tolist() == [[3.0, 3.0], [2.0, 2.0]]
    weight = adaptive_weight(gradients)
    assert weight.item() == pytest.approx(3 * math.sqrt(2) / (2 * math.sqrt(2) + 1e-4))
    assert not weight.requires_grad


def test_adaptive_weight_is_bounded() -> None:
    assert adaptive_weight(torch.tensor([[1e6], [0.0]])).item() == 1e4
    assert adaptive_weight(torch.tensor([[0.0], [1.0]])).item() == 0.0


def test_gradients_at_a_layer_leave_the_graph_for_backward() -> None:
    layer = nn.Parameter(torch.tensor([1.0]))
    reconstruction, adversarial = (2 * layer).sum(), layer.sum()
    weight = adaptive_weight(gradients_at(layer, reconstruction, adversarial))
    (reconstruction + weight * adversarial).backward()
    assert layer.grad is not None and layer.grad.item() == pytest.approx(4.0, rel=1e-3)
