"""What the samplers beyond DDIM and DDPM do with their inputs; their numbers are in tests/parity and tests/property."""

import math

import pytest
import torch
from torch import Tensor

from ldm.registry import ConfigError, build, names
from ldm.samplers import DDIM, LCM, PLMS, Prediction, UniPC, ddim_inversion
from ldm.samplers.dpmpp import dpmpp_step
from ldm.samplers.euler_ancestral import ancestral_split
from ldm.samplers.lcm import boundary
from ldm.samplers.unipc import unip_step
from ldm.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule()
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
SHAPE = (1, 1, 4, 4)
NOT_DDPM = [name for name in names("sampler") if name != "ddpm"]


def toy(x: Tensor, t: float) -> Prediction:
    return Schedule.predict("eps", torch.tanh(x + t / 500), x, SCHEDULE.a_bar_at(t))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def asked(name: str, steps: int) -> list[float]:
    """Times at which a sampler asks its model."""
    times: list[float] = []

    def predict(x: Tensor, t: float) -> Prediction:
        times.append(t)
        return toy(x, t)

    sampler = build("sampler", {"name": name, "steps": steps}, schedule=SCHEDULE)
    sampler.sample(predict, torch.zeros(SHAPE), lambda: torch.zeros(SHAPE))
    return times


def test_plms_tries_its_first_step() -> None:
    assert asked("plms", 20) == [951, 901, *range(901, 0, -50)]


def test_lcm_picks_from_the_teachers_steps() -> None:
    assert asked("lcm", 4) == [999, 759, 499, 259]
    assert asked("lcm", 8) == [999, 879, 759, 639, 499, 379, 259, 139]


def test_calls_of_the_model_per_step() -> None:
    calls = {name: len(asked(name, 10)) for name in names("sampler")}
    assert calls.pop("plms") == 11
    assert calls.pop("heun") == 19
    assert set(calls.values()) == {10}


@pytest.mark.parametrize("steps", [0, 10_000])
@pytest.mark.parametrize("name", names("sampler"))
def test_steps_outside_the_schedule_are_refused_in_one_line(name: str, steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.steps is {steps}; allowed 1\.\.\d+.*; ") as error:
        build("sampler", {"name": name, "steps": steps}, schedule=SCHEDULE)
    assert "\n" not in str(error.value)


def test_an_unknown_sampler_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'dpmpp_3m'.*dpmpp_2m"):
        build("sampler", {"name": "dpmpp_3m"}, schedule=SCHEDULE)


def test_lcm_refuses_more_teacher_steps_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.original_steps is 2000; allowed 1\.\.1000"):
        LCM(SCHEDULE, original_steps=2000)


@pytest.mark.parametrize("node", [{"name": "heun"}, {"name": "plms", "spacing": "trailing"}])
def test_methods_that_need_a_finite_first_sigma(node: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"'{node['name']}' with schedule\.zero_terminal_snr true: its first sigma"):
        build("sampler", node, schedule=ZERO)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_zero_terminal_snr_is_sampled_where_allowed(name: str) -> None:
    """The network knows the one clean latent; every sampler has to end there."""
    clean, generator = torch.full(SHAPE, 0.7), torch.Generator().manual_seed(0)

    def predict(x: Tensor, t: float) -> Prediction:
        a_bar = ZERO.a_bar_at(t)
        return Prediction(clean, (x - math.sqrt(a_bar) * clean) / math.sqrt(1 - a_bar))

    sampler = build("sampler", {"name": name, "steps": 12, "spacing": "trailing", "final": "one"}, schedule=ZERO)
    x = sampler.sample(predict, torch.randn(SHAPE, generator=generator), lambda: torch.randn(SHAPE))
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc", "plms"])
def test_constant_noise_of_a_known_latent_leads_back_to_it(name: str) -> None:
    clean, eps = torch.randn(2, *SHAPE)
    sampler = build("sampler", {"name": name, "steps": 20}, schedule=SCHEDULE)
    a = sampler.levels[0]
    x_T = math.sqrt(a) * clean + math.sqrt(1 - a) * eps
    x = sampler.sample(lambda x, t: Schedule.predict("eps", eps, x, SCHEDULE.a_bar_at(t)), x_T, no_noise)
    last = sampler.levels[-1]
    expected = math.sqrt(last) * clean + math.sqrt(1 - last) * eps
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", names("sampler"))
def test_float32_in_and_out_and_bf16_noise_is_widened(name: str) -> None:
    def predict(x: Tensor, t: float) -> Prediction:
        assert x.dtype == torch.float32
        return toy(x, t)

    sampler = build("sampler", {"name": name, "steps": 3}, schedule=SCHEDULE)
    x = sampler.sample(predict, torch.randn(SHAPE).bfloat16(), lambda: torch.randn(SHAPE))
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("name", NOT_DDPM)
def test_starting_late_takes_the_remaining_steps(name: str) -> None:
    seen: list[int] = []
    sampler = build("sampler", {"name": name, "steps": 6}, schedule=SCHEDULE)
    sampler.sample(toy, torch.randn(SHAPE), lambda: torch.randn(SHAPE), on_step=lambda i, _: seen.append(i), start=4)
    assert seen == [4, 5]


def test_unipc_keeps_what_on_step_changed() -> None:
    """A correction starts from the latent before the change; the change must survive it."""
    sampler, x_T, shift = UniPC(SCHEDULE, steps=8), torch.randn(SHAPE), torch.full(SHAPE, 1e-3)
    plain = sampler.sample(toy, x_T, no_noise)
    shifted = sampler.sample(toy, x_T, no_noise, on_step=lambda i, x: x + shift if i == 3 else None)
    none = sampler.sample(toy, x_T, no_noise, on_step=lambda i, x: x.clone())
    torch.testing.assert_close(none, plain)
    assert (shifted - plain).abs().min() > 1e-4


def test_ancestral_split_by_hand() -> None:
    down, up = ancestral_split(2.0, 1.0)  # up^2 = 1 * (4 - 1) / 4
    assert (down, up) == pytest.approx((0.5, math.sqrt(0.75)))
    assert ancestral_split(2.0, 0.0) == (0, 0)


def test_dpmpp_step_by_hand() -> None:
    x, x0, change = torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.2)
    # sigma 2 -> 1: exp(-h) is 1/2; a_bar 1/5 -> 1/2
    kept, signal = math.sqrt(0.5 / 0.8), math.sqrt(0.5)
    assert dpmpp_step(x, x0, None, 0.2, 0.5, None).item() == pytest.approx(kept + signal * 0.5 * 0.5, abs=1e-6)
    assert dpmpp_step(x, x0, change, 0.2, 0.5, None).item() == pytest.approx(kept + signal * 0.5 * 0.6, abs=1e-6)
    noisy = dpmpp_step(x, x0, change, 0.2, 0.5, torch.tensor(2.0)).item()
    assert noisy == pytest.approx(kept * 0.5 + signal * 0.75 * 0.6 + 2 * math.sqrt(0.5 * 0.75), abs=1e-6)


def test_unipc_predicts_like_dpmpp() -> None:
    x, before, now = torch.randn(3, *SHAPE)
    change = (now - before) * math.log(3) / math.log(2)  # sigmas 6 -> 3 -> 1
    a_bars = (1 / 37, 1 / 10, 1 / 2)
    expected = dpmpp_step(x, now, change, a_bars[1], a_bars[2], None)
    torch.testing.assert_close(unip_step(x, (before, now), a_bars), expected)


def test_lcm_boundary_by_hand() -> None:
    assert boundary(0) == (1, 0)
    skip, out = boundary(1)
    assert (skip, out) == pytest.approx((0.25 / 100.25, 10 / math.sqrt(100.25)))


def test_inversion_and_back_come_closer_with_more_steps() -> None:
    x0, gaps = torch.randn(SHAPE), list[float]()
    for steps in (20, 80, 320):
        sampler = DDIM(SCHEDULE, steps=steps)
        noise = ddim_inversion(toy, x0, sampler)
        gaps.append((sampler.sample(toy, noise, no_noise) - x0).abs().max().item())
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[2] < 0.5 * gaps[1]


def test_inversion_shows_its_way() -> None:
    seen: list[int] = []
    ddim_inversion(toy, torch.randn(SHAPE), PLMS(SCHEDULE, steps=3), on_step=lambda i, _: seen.append(i))
    assert seen == [2, 1, 0]
    held = torch.ones(SHAPE)
    x = ddim_inversion(toy, torch.randn(SHAPE), DDIM(SCHEDULE, steps=3), on_step=lambda i, _: held if i == 0 else None)
    assert torch.equal(x, held)
