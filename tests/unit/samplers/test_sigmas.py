import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.registry import ConfigError
from ldm.samplers.sigmas import half_log_snr, sigma_of, sigma_times
from ldm.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule()
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
DEFAULTS = {"spacing": "linspace", "offset": 0, "sigmas": "schedule", "final": "one"}


def times(steps: int, schedule: Schedule = SCHEDULE, **options: object) -> tuple[float, ...]:
    return sigma_times(schedule, steps, **(DEFAULTS | options))  # type: ignore[arg-type]


def sigmas(steps: int, **options: object) -> list[float]:
    return [sigma_of(SCHEDULE.a_bar_at(t)) for t in times(steps, **options)]


def test_sigma_and_half_log_snr_by_hand() -> None:
    assert sigma_of(0.2) == pytest.approx(2.0)
    assert half_log_snr(0.2) == pytest.approx(-math.log(2))
    assert sigma_of(0.0) == pytest.approx(4096, rel=1e-6)


def test_linspace_keeps_fractions_and_reaches_both_ends() -> None:
    assert times(5) == (999.0, 749.25, 499.5, 249.75, 0.0)
    assert sigmas(20)[:3] == pytest.approx([14.6146, 10.7469, 8.0815], rel=1e-4)


def test_multistep_solvers_leave_out_the_lowest_level() -> None:
    got = times(20, multistep=True)
    assert got[:3] == (999, 949, 899)
    assert got[-2:] == (100, 50)


def test_karras_sigmas_by_hand() -> None:
    got = sigmas(3, sigmas="karras")
    ends = [14.6146412293 ** (1 / 7), 0.0291671582 ** (1 / 7)]
    assert got == pytest.approx([14.6146412293, (sum(ends) / 2) ** 7, 0.0291671582], rel=1e-6)
    assert times(10, sigmas="karras")[:3] == pytest.approx((999, 916.28, 815.05), abs=0.01)


def test_exponential_sigmas_fall_by_one_factor() -> None:
    got = sigmas(6, sigmas="exponential")
    assert [b / a for a, b in pairwise(got)] == pytest.approx([got[1] / got[0]] * 5)


@pytest.mark.parametrize("kind", ["schedule", "karras", "exponential"])
def test_final_first_is_one_of_the_levels(kind: str) -> None:
    assert (*times(7, sigmas=kind, final="first"), 0) == pytest.approx(
        times(8, sigmas=kind), abs=0.5 if kind == "schedule" else 1e-9
    )


@given(
    steps=st.integers(1, 300),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from(["schedule", "karras", "exponential"]),
    final=st.sampled_from(["first", "one"]),
    multistep=st.booleans(),
)
def test_times_descend_within_the_schedule(steps: int, spacing: str, kind: str, final: str, multistep: bool) -> None:
    got = times(steps, spacing=spacing, sigmas=kind, final=final, multistep=multistep)
    assert len(got) == steps
    assert 0 <= got[-1] <= got[0] <= 999
    assert all(a > b for a, b in pairwise(got))


@pytest.mark.parametrize("steps", [0, -3, 10_000])
def test_too_few_or_too_many_steps(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.steps is {steps}; allowed 1\.\.1000; 20 to 50"):
        times(steps)
    with pytest.raises(ConfigError, match=r"allowed 1\.\.999"):
        times(steps, multistep=True)


def test_unknown_words() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.sigmas is 'beta'; allowed: schedule, karras, exponential"):
        times(10, sigmas="beta")
    for multistep in (False, True):
        with pytest.raises(ConfigError, match=r"sampler\.spacing is 'even'; allowed: leading, trailing, linspace"):
            times(10, spacing="even", multistep=multistep)


def test_a_last_step_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="the last step has no length"):
        times(999, spacing="trailing", final="first")


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_spaced_sigmas_need_a_finite_end(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.sigmas is '{kind}' with schedule\.zero_terminal_snr true"):
        times(10, ZERO, sigmas=kind)
