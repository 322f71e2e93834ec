import math

import pytest
import torch
from torch import Tensor

from ldm.registry import ConfigError, build
from ldm.samplers import DDPM, Prediction
from ldm.samplers.ddpm import posterior_mean, posterior_variance
from ldm.schedule import Schedule

SCHEDULE = Schedule()
A = SCHEDULE.a_bar.tolist()


def test_posterior_variance_of_stable_diffusion() -> None:
    assert posterior_variance(A[1], A[0], "fixed_small") == pytest.approx(4.26349e-4, rel=1e-5)
    assert posterior_variance(A[500], A[499], "fixed_small") == pytest.approx(4.80603e-3, rel=1e-5)
    assert posterior_variance(A[500], A[499], "fixed_large") == pytest.approx(0.004814953, rel=1e-6)


def test_posterior_mean_by_hand() -> None:
    # alpha = 0.4 / 0.8 = 0.5: sqrt(0.8) * 0.5 / 0.6 * x0 + sqrt(0.5) * 0.2 / 0.6 * x_t
    mean = posterior_mean(torch.tensor(3.0), torch.tensor(2.0), 0.4, 0.8)
    assert mean.item() == pytest.approx(math.sqrt(0.8) / 1.2 * 2 + math.sqrt(0.5) / 3 * 3, abs=1e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_step_lands_on_x0_without_noise(variance: str) -> None:
    x0, draws = torch.randn(1, 2, 3, 3), []

    def draw() -> Tensor:
        draws.append(1)
        return torch.randn(1, 2, 3, 3)

    def predict(x: Tensor, t: float) -> Prediction:
        return Prediction(x0, (x - x0) / 2)

    result = DDPM(SCHEDULE, steps=8, variance=variance, offset=1).sample(predict, torch.randn(1, 2, 3, 3), draw)
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-6)
    assert len(draws) == 7


def test_default_visits_every_training_step() -> None:
    sampler = build("sampler", {"name": "ddpm"}, schedule=SCHEDULE)
    assert sampler.timesteps == tuple(range(999, -1, -1))
    assert sampler.levels[-1] == 1.0


def test_unknown_variance_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.variance is 'learned'; allowed: fixed_small, fixed_large"):
        build("sampler", {"name": "ddpm", "variance": "learned"}, schedule=SCHEDULE)
