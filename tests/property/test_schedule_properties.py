import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.schedule import OBJECTIVES, Schedule, ScheduleConfig, timesteps

configs = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["scaled_linear", "linear", "cosine"]),
    steps=st.integers(2, 1000),
    beta_start=st.floats(1e-5, 1e-2),
    beta_end=st.floats(1e-2, 0.5),
    zero_terminal_snr=st.booleans(),
)


@given(configs)
def test_schedules_only_ever_lose_signal(config: ScheduleConfig) -> None:
    a_bar = Schedule(config).a_bar
    assert a_bar.shape == (config.steps,)
    assert bool((a_bar.diff() < 0).all())
    assert 0 < a_bar[0] < 1
    assert (a_bar[-1] == 0) == config.zero_terminal_snr


@given(configs, st.floats(0, 1))
def test_a_bar_between_integers_is_monotone(config: ScheduleConfig, where: float) -> None:
    schedule = Schedule(config)
    t = where * (schedule.steps - 1)
    low, high = int(t), min(int(t) + 1, schedule.steps - 1)
    slack = 1e-12  # the float round trip through log-SNR
    assert schedule.a_bar_at(high) - slack <= schedule.a_bar_at(t) <= schedule.a_bar_at(low) + slack


@given(st.integers(0, 999), st.sampled_from(OBJECTIVES), st.integers(0, 10_000))
def test_every_objective_gives_back_x0_and_eps(t: int, objective: str, seed: int) -> None:
    schedule, generator = Schedule(), torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    times = torch.tensor([t])
    x_t, output = schedule.add_noise(x0, eps, times), schedule.target(objective, x0, eps, times)
    prediction = schedule.predict(objective, output, x_t, schedule.a_bar_at(t))
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-6)


@given(st.integers(0, 999), st.floats(0.1, 20))
def test_min_snr_weighs_the_same_error_alike_under_every_objective(t: int, gamma: float) -> None:
    """An x0 error d is an eps error d sqrt(SNR) and a v error d sqrt(SNR + 1)."""
    schedule, times = Schedule(), torch.tensor([t])
    snr = schedule.snr(times)
    x0 = schedule.loss_weight("x0", times, gamma)
    torch.testing.assert_close(schedule.loss_weight("eps", times, gamma) * snr, x0)
    torch.testing.assert_close(schedule.loss_weight("v", times, gamma) * (snr + 1), x0)
    assert x0.item() <= gamma * (1 + 1e-6)


@given(st.data(), st.sampled_from(["leading", "trailing", "linspace"]), st.integers(2, 1200), st.integers(0, 3))
def test_timesteps_are_distinct_and_descend(data: st.DataObject, spacing: str, total: int, offset: int) -> None:
    n = data.draw(st.integers(1, total))
    times = timesteps(spacing, n, total, offset)
    assert len(times) == n
    assert list(times) == sorted(set(times), reverse=True)
    assert 0 <= times[-1] <= times[0] <= total - 1
    if spacing != "leading":
        assert times[0] == total - 1


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_times_may_have_any_integer_type(kind: str) -> None:
    schedule = Schedule(ScheduleConfig(kind=kind))
    x = torch.ones(2, 1, 2, 2)
    expected = schedule.add_noise(x, x, torch.tensor([4, 7]))
    assert torch.equal(schedule.add_noise(x, x, torch.tensor([4, 7], dtype=torch.int32)), expected)
