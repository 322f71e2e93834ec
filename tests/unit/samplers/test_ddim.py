import math

import pytest
import torch
from torch import Tensor

from ldm.registry import ConfigError, build
from ldm.samplers import DDIM, ImageNoise, Prediction
from ldm.samplers.ddim import ddim_step
from ldm.samplers.ddpm import posterior_mean, posterior_variance
from ldm.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule()


def test_one_step_by_hand() -> None:
    pred = Prediction(x0=torch.tensor(2.0), eps=torch.tensor(-1.0))
    # sqrt(0.81) * 2 - sqrt(0.19)
    assert ddim_step(pred, 0.36, 0.81).item() == pytest.approx(1.8 - math.sqrt(0.19), abs=1e-6)
    # eta 1: sigma^2 = 0.19 / 0.64 * (1 - 0.36 / 0.81) = 0.16493056
    noisy = ddim_step(pred, 0.36, 0.81, eta=1.0, noise=torch.tensor(0.5))
    expected = 1.8 - math.sqrt(0.19 - 0.16493056) + 0.5 * math.sqrt(0.16493056)
    assert noisy.item() == pytest.approx(expected, abs=1e-6)


def test_eta_one_has_ddpms_mean_and_variance() -> None:
    """Same Gaussian at every training step, to 1e-5 (float64 here)."""
    x0, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    sampler = DDIM(SCHEDULE, steps=1000, eta=1.0, offset=0)
    for a_t, a_prev in list(zip(sampler.levels[:-2], sampler.levels[1:-1], strict=True))[::37]:
        x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
        mean = ddim_step(Prediction(x0, eps), a_t, a_prev, eta=1.0, noise=torch.zeros_like(x0))
        noisy = ddim_step(Prediction(x0, eps), a_t, a_prev, eta=1.0, noise=torch.ones_like(x0))
        torch.testing.assert_close(mean, posterior_mean(x_t, x0, a_t, a_prev), rtol=1e-5, atol=1e-9)
        assert (noisy - mean).item() ** 2 == pytest.approx(posterior_variance(a_t, a_prev, "fixed_small"), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 20, 50])
def test_the_true_noise_leads_back_to_the_clean_latent(steps: int) -> None:
    x0, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    def predict(x: Tensor, t: float) -> Prediction:
        return SCHEDULE.predict("eps", eps, x, SCHEDULE.a_bar_at(t))

    sampler = DDIM(SCHEDULE, steps=steps, final="one")
    x_T = SCHEDULE.add_noise(x0, eps, torch.tensor([int(sampler.timesteps[0])] * 2))
    torch.testing.assert_close(sampler.sample(predict, x_T, torch.Tensor), x0, rtol=0, atol=2e-5)
    sd = DDIM(SCHEDULE, steps=steps).sample(predict, x_T, torch.Tensor)  # stops at A_0: 0.02916 of the noise is left
    torch.testing.assert_close(sd, math.sqrt(0.99915) * x0 + math.sqrt(0.00085) * eps, rtol=0, atol=2e-5)


def test_v_prediction_samples_from_pure_noise() -> None:
    zero = Schedule(ScheduleConfig(zero_terminal_snr=True))
    x0, eps = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)

    def predict(x: Tensor, t: float) -> Prediction:
        v = zero.target("v", x0, eps, torch.tensor([int(t)]))
        return zero.predict("v", v, x, zero.a_bar_at(t))

    sampler = DDIM(zero, steps=20, spacing="trailing", final="one")
    torch.testing.assert_close(sampler.sample(predict, eps, torch.Tensor), x0, rtol=0, atol=2e-5)


def test_stochastic_images_do_not_depend_on_their_batch() -> None:
    sampler = DDIM(SCHEDULE, steps=10, eta=0.7)

    def predict(x: Tensor, t: float) -> Prediction:
        return SCHEDULE.predict("eps", torch.sin(x), x, SCHEDULE.a_bar_at(t))

    def run(*seeds: int) -> Tensor:
        noise = ImageNoise(seeds, (1, 4, 4))
        return sampler.sample(predict, noise(), noise)

    torch.testing.assert_close(run(1, 2, 3)[1:2], run(2), rtol=0, atol=0)


def test_eta_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"sampler.eta is 1.5; allowed: 0\.\.1"):
        build("sampler", {"name": "ddim", "steps": 20, "eta": 1.5}, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="noise is None"):
        ddim_step(Prediction(torch.ones(1), torch.ones(1)), 0.5, 0.6, eta=0.5)


def test_builds_from_a_config_node() -> None:
    sampler = build("sampler", {"name": "ddim", "steps": 20, "eta": 0.0}, schedule=SCHEDULE)
    assert isinstance(sampler, DDIM)
    assert sampler.timesteps[:2] == (951, 901)
    with pytest.raises(ConfigError, match=r"sampler\.steps is 0; allowed 1\.\.1000"):
        build("sampler", {"name": "ddim", "steps": 0}, schedule=SCHEDULE)
    with pytest.raises(ConfigError, match="spacing"):
        build("sampler", {"name": "ddim", "spacings": "leading"}, schedule=SCHEDULE)
