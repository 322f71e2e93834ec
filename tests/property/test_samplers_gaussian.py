"""On Gaussian data with the exact score every registered sampler reaches the right mean and variance.

Nothing is estimated from random draws. With Gaussian data the best prediction is affine in x_t, and so is every
sampler's update; the result is therefore m + sum_k c_k n_k over the noises n_k that went in. Batch entry 0 carries m
and entry k carries c_k: `Draws` hands out unit vectors instead of random numbers.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ldm.samplers  # noqa: F401  (registers them)
from ldm.registry import build, names
from ldm.samplers import Prediction, Sampler
from ldm.schedule import Schedule

SCHEDULE = Schedule()
VARIANTS = [
    # LCM is left out: it wants x0 from a distilled network, the end of the flow and not the mean of what is possible.
    *({"name": name} for name in names("sampler") if name != "lcm"),
    {"name": "ddim", "eta": 0.5},
    {"name": "ddim", "eta": 1.0},
    {"name": "ddim", "spacing": "trailing", "final": "one"},
    {"name": "ddim", "spacing": "linspace"},
    {"name": "ddpm", "variance": "fixed_large"},
    {"name": "ddpm", "spacing": "trailing"},
    {"name": "plms", "spacing": "trailing", "final": "one"},
    {"name": "euler", "spacing": "leading", "offset": 1},
    *({"name": name, "sigmas": "karras", "final": "first"} for name in ("euler", "euler_ancestral", "heun", "unipc")),
    *({"name": name, "sigmas": "exponential", "final": "first"} for name in ("dpmpp_2m", "dpmpp_2m_sde")),
]
EVEN = {"sigmas": "exponential", "final": "first"}  # equal steps in log sigma, and no jump to zero sigma at the end
ORDERS: list[tuple[dict[str, object], float]] = [
    ({"name": "ddim"}, 1),
    ({"name": "ddim", "spacing": "trailing", "final": "one"}, 1),
    ({"name": "plms"}, 2),
    ({"name": "euler", **EVEN}, 1),
    ({"name": "euler_ancestral", **EVEN}, 1),
    ({"name": "heun", **EVEN}, 2),
    ({"name": "dpmpp_2m", **EVEN}, 2),
    ({"name": "dpmpp_2m_sde", **EVEN}, 2),  # of the mean and variance; single paths converge with order 1
    ({"name": "unipc", **EVEN}, 3),  # the corrector raises the order of the predictor by one
]


@dataclass(frozen=True)
class Gaussian:
    """Data distributed as N(mean, std^2), noised by the schedule."""

    mean: float
    std: float

    def at(self, a_bar: float) -> "Gaussian":
        return Gaussian(math.sqrt(a_bar) * self.mean, math.sqrt(a_bar * self.std**2 + 1 - a_bar))

    def predict(self, x: Tensor, t: float) -> Prediction:
        """E[x0 | x_t] and the eps that belongs to it, on the coordinates described above."""
        a_bar = SCHEDULE.a_bar_at(t)
        noised, constant = self.at(a_bar), torch.zeros_like(x)
        constant[0] = 1.0
        x0 = self.mean * constant + math.sqrt(a_bar) * (self.std / noised.std) ** 2 * (x - noised.mean * constant)
        return Prediction(x0, (x - math.sqrt(a_bar) * x0) / math.sqrt(1 - a_bar))


class Draws:
    """Noise number k is the unit vector of coordinate k; coordinate 0 is the mean, 1 the starting noise."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 1

    def __call__(self) -> Tensor:
        noise = torch.zeros(self.size, 1, 1, 1, dtype=torch.float64)
        noise[self.used] = 1.0
        self.used += 1
        return noise


def reached(sampler: Sampler, data: Gaussian) -> Gaussian:
    start, draw = data.at(sampler.levels[0]), Draws(3 * len(sampler.timesteps) + 2)
    x_T = start.std * draw()
    x_T[0] = start.mean
    x = sampler.sample(data.predict, x_T, draw)
    return Gaussian(x[0].item(), x[1:].square().sum().sqrt().item())


def errors(node: dict[str, object], steps: int, data: Gaussian) -> tuple[float, float]:
    """Distance to the data noised to the sampler's last level: of the means in data stds, of the log stds."""
    sampler = build("sampler", node | {"steps": steps}, schedule=SCHEDULE)
    got, want = reached(sampler, data), data.at(sampler.levels[-1])
    return abs(got.mean - want.mean) / max(want.std, abs(want.mean)), abs(math.log(got.std / want.std))


@pytest.mark.parametrize("node", VARIANTS, ids=lambda node: "-".join(map(str, node.values())))
@settings(max_examples=8)
@given(mean=st.floats(-2, 2), std=st.floats(0.5, 1.5))
def test_sampler_reaches_the_datas_mean_and_variance(node: dict[str, object], mean: float, std: float) -> None:
    mean_error, std_error = errors(node, 200, Gaussian(mean, std))
    assert mean_error < 1e-6  # where x_t is at its mean, eps is 0: no step is too coarse
    assert std_error < 0.05


@pytest.mark.parametrize("node", VARIANTS, ids=lambda node: "-".join(map(str, node.values())))
def test_more_steps_come_closer(node: dict[str, object]) -> None:
    coarse, fine = (errors(node, steps, Gaussian(1.0, 0.5)) for steps in (25, 100))
    assert sum(fine) < 0.5 * sum(coarse) + 1e-6


@pytest.mark.parametrize(("node", "order"), ORDERS, ids=str)
def test_error_falls_at_the_methods_order(node: dict[str, object], order: float) -> None:
    coarse, fine = (sum(errors(node, steps, Gaussian(1.0, 0.5))) for steps in (20, 80))
    assert order - 0.15 < math.log(coarse / fine, 4) < order + 0.5


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_is_of_order_one_but_for_a_logarithm(spacing: str) -> None:
    """Its error is h log(1/h), so a power of h fits no range of steps: 0.73 at 10 to 40 of them, 0.79 at 80 to 320.

    A step h at time t leaves out the variance (h / t)^2 Var(x0 | x_t), and Var(x0 | x_t) goes as t near 0: the sum over
    steps even in t goes as h log(1/h).
    """
    node: dict[str, object] = {"name": "ddpm", "spacing": spacing}
    scaled = [sum(errors(node, steps, Gaussian(1.0, 0.5))) * steps / math.log(steps) for steps in (20, 80, 320)]
    assert max(scaled) < 1.1 * min(scaled)  # a plain first order would be 1.9 apart


def test_lcm_with_the_exact_consistency_function() -> None:
    """It maps x_t to the end of the flow through it: the same number of standard deviations from the mean."""
    data, sampler = Gaussian(1.0, 0.5), build("sampler", {"name": "lcm", "steps": 4}, schedule=SCHEDULE)

    def consistent(x: Tensor, t: float) -> Prediction:
        noised, constant = data.at(SCHEDULE.a_bar_at(t)), torch.zeros_like(x)
        constant[0] = 1.0
        return Prediction(data.mean * constant + data.std / noised.std * (x - noised.mean * constant), x)

    start, draw = data.at(sampler.levels[0]), Draws(6)
    x_T = start.std * draw()
    x_T[0] = start.mean
    x = sampler.sample(consistent, x_T, draw)
    assert x[0].item() == pytest.approx(data.mean, abs=1e-5)
    assert x[1:].square().sum().sqrt().item() == pytest.approx(data.std, abs=1e-5)
