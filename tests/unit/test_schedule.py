"""Numbers below are the published tables of the Stable Diffusion schedule, or worked by hand from the formulas."""

import math
import pickle

import pytest
import torch

from ldm.registry import ConfigError
from ldm.schedule import Schedule, ScheduleConfig, timesteps


@pytest.fixture(scope="module")
def sd() -> Schedule:
    return Schedule()


@pytest.mark.parametrize(
    ("t", "a_bar"),
    [
        (0, 0.99915),
        (1, 0.9982960278),
        (250, 0.6737926252),
        (500, 0.2763326838),
        (750, 0.0561698480),
        (981, 0.0057755001),
        (999, 0.0046600985),
    ],
)
def test_the_default_schedule_is_stable_diffusions(sd: Schedule, t: int, a_bar: float) -> None:
    assert sd.a_bar[t].item() == pytest.approx(a_bar, rel=1e-8)
    assert sd.a_bar.dtype == torch.float64


def test_sigma_and_snr_of_stable_diffusion(sd: Schedule) -> None:
    sigma = ((1 - sd.a_bar) / sd.a_bar).sqrt()
    assert sigma[0].item() == pytest.approx(0.0291671582, rel=1e-8)
    assert sigma[999].item() == pytest.approx(14.6146412293, rel=1e-8)
    snr = sd.snr(torch.tensor([0, 999]))
    torch.testing.assert_close(snr, torch.tensor([1175.4706, 0.0046819167]), rtol=1e-6, atol=0)


def test_linear_betas_are_another_schedule() -> None:
    linear = Schedule(ScheduleConfig(kind="linear"))
    assert linear.a_bar[1].item() == pytest.approx(0.99915 * (1 - (0.00085 + 0.01115 / 999)), rel=1e-12)
    assert abs(linear.a_bar[500].item() - 0.27633268) > 0.05


def test_cosine_follows_its_formula_and_cap() -> None:
    cosine = Schedule(ScheduleConfig(kind="cosine", steps=10))

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert cosine.a_bar[4].item() == pytest.approx(f(0.5) / f(0), rel=1e-12)
    assert (cosine.a_bar[9] / cosine.a_bar[8]).item() == pytest.approx(1 - 0.999, rel=1e-9)


def test_zero_terminal_snr_keeps_the_start_and_empties_the_end() -> None:
    a_bar = Schedule(ScheduleConfig(zero_terminal_snr=True)).a_bar
    assert a_bar[999].item() == 0
    assert a_bar[0].item() == pytest.approx(0.99915, rel=1e-12)
    assert a_bar[500].item() == pytest.approx(0.2410187, rel=1e-6)
    assert a_bar[998].item() == pytest.approx(1.9679e-7, rel=1e-4)


def test_a_bar_between_integers_lies_between_its_neighbours(sd: Schedule) -> None:
    a, b = sd.a_bar_at(10), sd.a_bar_at(11)
    log_sigma = [0.5 * math.log((1 - v) / v) for v in (a, sd.a_bar_at(10.25), b)]
    assert log_sigma[1] == pytest.approx(0.75 * log_sigma[0] + 0.25 * log_sigma[2], rel=1e-12)
    assert a == sd.a_bar[10].item()


def test_a_bar_at_reaches_zero_smoothly() -> None:
    zero = Schedule(ScheduleConfig(zero_terminal_snr=True))
    assert zero.a_bar_at(998.5) == pytest.approx(zero.a_bar_at(998) / 2)
    assert zero.a_bar_at(999) == 0


@pytest.mark.parametrize("t", [-0.5, 999.5, 1000])
def test_times_outside_the_schedule_are_refused(sd: Schedule, t: float) -> None:
    with pytest.raises(ValueError, match=r"allowed: 0\.\.999"):
        sd.a_bar_at(t)


def test_each_image_is_noised_to_its_own_time(sd: Schedule) -> None:
    x0, eps = torch.full((2, 1, 1, 2), 2.0), torch.full((2, 1, 1, 2), -1.0)
    x_t = sd.add_noise(x0, eps, torch.tensor([0, 999]))
    # 2 sqrt(0.99915) - sqrt(0.00085); 2 * 0.0682649142 - sqrt(1 - 0.0046600985)
    torch.testing.assert_close(x_t[:, 0, 0, 0], torch.tensor([1.9699947, -0.8611377]), rtol=0, atol=2e-6)


def test_v_target_by_hand(sd: Schedule) -> None:
    one = torch.ones(1, 1, 1, 1)
    v = sd.target("v", 2 * one, 3 * one, torch.tensor([500]))
    # sqrt(0.2763326838) = 0.5256736, sqrt(0.7236673162) = 0.8506864: 3 * 0.5256736 - 2 * 0.8506864
    assert v.item() == pytest.approx(-0.1243520, abs=2e-6)


def test_bf16_latents_are_noised_in_float32(sd: Schedule) -> None:
    x = torch.randn(2, 4, 3, 3).bfloat16()
    assert sd.add_noise(x, x, torch.tensor([1, 2])).dtype == torch.float32
    prediction = sd.predict("v", x, x, 0.5)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


def test_v_prediction_works_without_any_signal() -> None:
    x, v = torch.tensor([3.0]), torch.tensor([-2.0])
    prediction = Schedule.predict("v", v, x, 0.0)
    assert (prediction.x0.item(), prediction.eps.item()) == (2.0, 3.0)


@pytest.mark.parametrize(("objective", "a_bar"), [("eps", 0.0), ("x0", 1.0)])
def test_undefined_conversions_say_so(objective: str, a_bar: float) -> None:
    with pytest.raises(ValueError, match="is undefined at a_bar"):
        Schedule.predict(objective, torch.ones(1), torch.ones(1), a_bar)


def test_min_snr_weights_by_hand(sd: Schedule) -> None:
    t = torch.tensor([0, 999])
    expected = {"eps": [0.004254, 1.0], "v": [0.004250, 0.004660], "x0": [5.0, 0.0046819]}
    for objective, weights in expected.items():
        torch.testing.assert_close(sd.loss_weight(objective, t, 5.0), torch.tensor(weights), rtol=2e-4, atol=0)
    assert sd.loss_weight("v", t).tolist() == [1.0, 1.0]


def test_min_snr_gamma_must_be_positive(sd: Schedule) -> None:
    with pytest.raises(ValueError, match="min_snr_gamma is 0"):
        sd.loss_weight("eps", torch.tensor([0]), 0)


def test_eps_is_refused_on_a_zero_terminal_snr_schedule() -> None:
    zero, one = Schedule(ScheduleConfig(zero_terminal_snr=True)), torch.ones(1, 1, 1, 1)
    t = torch.tensor([999])
    message = r"objective is 'eps' with schedule\.zero_terminal_snr true; allowed there: v"
    for call in (zero.check_objective, lambda o: zero.target(o, one, one, t), lambda o: zero.loss_weight(o, t, 5.0)):
        with pytest.raises(ConfigError, match=message):
            call("eps")
    assert zero.loss_weight("v", t, 5.0).item() == 0
    assert zero.target("v", one, one, t).item() == -1


def test_unknown_objective_is_refused(sd: Schedule) -> None:
    with pytest.raises(ConfigError, match="objective is 'epsilon'; allowed: eps, v, x0"):
        sd.check_objective("epsilon")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sqrt_linear"}, "schedule.kind is 'sqrt_linear'; allowed: scaled_linear, linear, cosine"),
        ({"steps": 1}, "schedule.steps is 1; allowed: 2 or more"),
        ({"beta_start": 0.0}, "allowed: 0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "allowed: 0 < beta_start <= beta_end < 1"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**options)


TIMESTEPS = {
    "leading": [951, 901, 851, 801, 751, 701, 651, 601, 551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1],
    "trailing": [999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 499, 449, 399, 349, 299, 249, 199, 149, 99, 49],
    "linspace": [999, 946, 894, 841, 789, 736, 684, 631, 578, 526, 473, 421, 368, 315, 263, 210, 158, 105, 53, 0],
}


@pytest.mark.parametrize("spacing", TIMESTEPS)
def test_spacings_of_twenty_steps(spacing: str) -> None:
    assert list(timesteps(spacing, 20)) == TIMESTEPS[spacing]


def test_leading_spacing_of_fifty_and_thirty() -> None:
    fifty, thirty = timesteps("leading", 50), timesteps("leading", 30)
    assert (fifty[:2], fifty[-2:], len(fifty)) == ((981, 961), (21, 1), 50)
    assert (thirty[:2], thirty[-2:], len(thirty)) == ((958, 925), (34, 1), 30)


def test_every_training_step_can_be_visited() -> None:
    for spacing in ("leading", "trailing", "linspace"):
        assert timesteps(spacing, 1000) == tuple(range(999, -1, -1))


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_steps_outside_the_schedule_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.steps is {n}; allowed 1\.\.1000; "):
        timesteps("leading", n)


def test_unknown_spacing_and_negative_offset_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.spacing is 'trail'; allowed: leading, trailing, linspace"):
        timesteps("trail", 10)
    with pytest.raises(ConfigError, match=r"sampler\.offset is -1"):
        timesteps("leading", 10, offset=-1)


def test_a_used_schedule_can_be_pickled(sd: Schedule) -> None:
    sd.snr(torch.tensor([3]))
    assert torch.equal(pickle.loads(pickle.dumps(sd)).a_bar, sd.a_bar)


@pytest.mark.gpu
def test_lookups_never_wait_for_the_device(sd: Schedule) -> None:
    x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([3, 900], device="cuda")
    sd.add_noise(x, x, t)  # moves the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_t = sd.add_noise(x, x, t)
        sd.target("v", x, x, t)
        sd.loss_weight("v", t, 5.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x_t.cpu(), sd.add_noise(x.cpu(), x.cpu(), t.cpu()))
